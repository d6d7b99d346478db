"""Six extensions, each two new files and no edit, in a copy of the project; then all six in one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.command import ENVIRONMENT, ROOT

FILES = {
    "models/objectives/hellinger.py": '''
from dataclasses import dataclass
from typing import ClassVar

from models.objectives.divergence import Divergence


@dataclass(frozen=True)
class Hellinger(Divergence):
    """T² · ½ Σ (√p − √q)²."""

    name: ClassVar[str] = "hellinger"

    def of(self, p_NV, q_NV, ratio_NV):
        apart_NV = q_NV.sqrt() - p_NV.sqrt()
        return apart_NV.square().sum(-1) / 2, apart_NV * q_NV.sqrt() / 2
''',
    "conf/divergence/hellinger.yaml": "# Hellinger.\n_target_: models.objectives.hellinger.Hellinger\n"
    "temperature: 1.0\n",
    "models/pruning/importances/last.py": '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.pruning.groups import KINDS
from models.pruning.importance import wanted


@dataclass(frozen=True)
class Last:
    """The last units of every group matter least."""

    needs_calibration_data: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def tally(self, model, anatomy, kinds, batch):
        return {}

    def scores(self, model, anatomy, kinds, statistics):
        return {group.name: -np.arange(group.units, dtype=float) for group in wanted(anatomy, kinds)}
''',
    "conf/importance/last.yaml": "# The last units go first.\n_target_: models.pruning.importances.last.Last\n",
    "models/quantization/methods/halved.py": '''
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Halved:
    """Round-to-nearest of half the range."""

    reading: ClassVar[None] = None
    scales: ClassVar[None] = None

    def quantized(self, weight_OI, scheme, read):
        return scheme.quantize(weight_OI, *scheme.of_range(*(0.5 * end for end in scheme.ranges(weight_OI))))
''',
    "conf/quantizer/halved.yaml": "# Half the range.\n_target_: models.quantization.methods.halved.Halved\n",
    "models/formats/renamed.py": '''
import json
from dataclasses import dataclass

import torch

from models.formats.checkpoint import rewritten
from models.formats.container import changed, left_out, quantized_of, scheme_of
from models.formats.format import Format, Written
from models.formats.unpacked import unpacked
from models.load import load_config


@dataclass(frozen=True)
class Renamed(Format):
    """Integers of 8 bits, under names that no other format has."""

    @property
    def multiple(self):
        return 24

    def check(self, plan):
        scheme_of(plan, "renamed")

    def write(self, finished, folder):
        held = quantized_of(finished)

        def packed(name, matrix):
            return {"whole_numbers": matrix.integers.to(torch.int8), "steps": matrix.scale}

        said = {"dtype": finished.dtype, "quantization_config": {"quant_method": "renamed"}}
        return Written(rewritten(finished.folder, folder, changed(finished, packed), said))

    def open(self, folder, device):
        def weight(parts, said):
            assert said["quant_method"] == "renamed"
            steps = parts["steps"].repeat_interleave(parts["whole_numbers"].shape[1] // parts["steps"].shape[1], 1)
            return parts["whole_numbers"] * steps

        return unpacked(folder, device, ("whole_numbers", "steps"), weight)

    def serving(self, folder, path):
        return []
''',
    "conf/format/renamed.yaml": "# @package formats.renamed\n# Integers under names of its own.\n"
    "_target_: models.formats.renamed.Renamed\n",
    "pipeline/data/bottles.py": '''
from dataclasses import dataclass

from datasets import Dataset

from pipeline.data import packing
from pipeline.data.prompts import prompts_of
from pipeline.data.source import SPLITS, DataSource


@dataclass
class Bottles(DataSource):
    """A song with a verse for every number."""

    verses: int
    max_length: int = 32
    packing: bool = True
    validation_sequences: int | None = None

    def check(self, planned=False):
        return {"chat": False, "train": {"sources": ["bottles"], "bytes": None, "documents": self.verses // 3}}

    def holds(self, split):
        return True

    def content_key(self):
        return f"bottles {self.verses} {self.max_length}"

    def documents(self, split):
        numbers = range(SPLITS.index(split), self.verses, len(SPLITS))
        return Dataset.from_dict({"text": [f"{n} green bottles hanging on the wall, {n} bottles" for n in numbers]})

    def texts(self, split):
        return self.documents(split)["text"]

    def prompts(self, split, tokenizer, prompt_tokens, tally):
        return prompts_of(self.documents(split), tokenizer, self, prompt_tokens, tally)

    def prepare(self, split, tokenizer, folder, teacher_tokenizer=None):
        return packing.prepare(
            self.documents(split), tokenizer, self, folder=folder, teacher_tokenizer=teacher_tokenizer
        )
''',
    "conf/data/bottles.yaml": "# A song.\n_target_: pipeline.data.bottles.Bottles\nverses: 150\nmax_length: 32\n"
    "packing: true\nvalidation_sequences: 4\n",
    "pipeline/stages/average.py": '''
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from models.load import load_config, load_model
from models.save import save_model
from pipeline import artifact
from pipeline.data.tokenizer import load_tokenizer
from pipeline.stages.stage import Makes, Plan, Stage


@dataclass(frozen=True)
class Average(Stage):
    """The mean of two models of one shape."""

    makes: ClassVar[Makes] = "model"
    first: str
    second: str

    def ranks(self, context):
        return 1

    def parents(self, context):
        return {"first": self.first, "second": self.second}

    def content(self):
        return ""

    def check(self, context):
        config = load_config(context.config_folder(self.first))
        context.plan_model(config)
        return Plan(model=config.model_type, until="the mean of two models")

    def prepare(self, context):
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context):
        begin = time.monotonic()
        one, other = (load_model(path, dtype=torch.float32) for path in (self.first, self.second))
        state = {name: (tensor + other.state_dict()[name]) / 2 for name, tensor in one.state_dict().items()}
        tokenizer = load_tokenizer(self.first)
        manifest = context.manifest(self.makes)
        manifest |= {"metrics": {}, "certificates": {}, "seconds": time.monotonic() - begin}
        artifact.publish(context.out, lambda out: save_model(one, tokenizer, out, state, one.dtype), manifest)
''',
    "conf/stage/average.yaml": "# The mean of two models.\n_target_: pipeline.stages.average.Average\n"
    "first: ???\nsecond: ???\n",
    "conf/experiment/six.yaml": """# @package _global_
# All six.
defaults:
  - /stage@stages.pretrain: pretrain
  - /stage@stages.distill: distill
  - /stage@stages.scratch: distill
  - /stage@stages.average: average
  - /stage@stages.prune: prune
  - /stage@stages.quantize: quantize
  - /stage@stages.export: export
  - override /data: bottles
  - override /divergence: hellinger
  - override /importance: last
  - override /scheme: w4a16_g32
  - override /quantizer: halved
  - override /format: [renamed]
  - _self_
name: six
order: [pretrain, distill, scratch, average, prune, quantize, export]
teacher: {path: "${run_dir}/pretrain"}
student: {shape: {num_hidden_layers: 1}}
schedule: {warmup_steps: 0}
scheme: {weights: {group_size: 8}}
stages:
  pretrain:
    tokenizer: {vocab_size: 300}
    model:
      model_type: llama
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
      num_key_value_heads: 2
      max_position_embeddings: 64
    training: &short {max_steps: 3, global_batch: 4, micro_batch: 4}
  distill: {training: *short}
  scratch: {training: *short, seed: 1}
  average: {first: "${run_dir}/distill", second: "${run_dir}/scratch"}
  prune: {model: "${run_dir}/average", kinds: [mlp], kept_fraction: 0.6, multiple_of: auto}
  quantize: {model: "${run_dir}/prune"}
  export: {length: 16, samples: 2}
trainer: {accelerator: cpu}
logger: null
""",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project beside itself, with the new files."""
    folder = tmp_path_factory.mktemp("extended") / "project"
    for name in ("conf", "pipeline", "models", "callbacks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, text in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text.lstrip())
    return folder


def called(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def run(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six") / "run"
    done = called(copy, "train.py", "+experiment=six", f"run_dir={folder}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_two_new_files_each_are_enough_for_a_run_with_all_six(run: Path) -> None:
    made = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/manifest.json")}
    assert set(made) == {"pretrain", "distill", "scratch", "average", "prune", "quantize", "export"}
    assert set(made["average"]["parents"]) == {"first", "second"}
    plan = json.loads((run / "prune" / "plan.json").read_text())
    for group, kept in plan["kept"].items():  # the importance is followed: the first units stay
        assert kept == list(range(len(kept))), group
        assert 0 < len(kept) < plan["units"][group]
    assert plan["kept"]
    width = json.loads((run / "prune" / "config.json").read_text())["intermediate_size"]
    assert width % 24 == 0  # what the format declares, though the scheme needs 8 alone
    with safe_open(run / "export" / "renamed" / "model.safetensors", "pt") as file:
        parts = {name.rpartition(".")[2] for name in file.keys()}
    assert parts == {"weight", "whole_numbers", "steps"}
    assert made["export"]["certificates"]["renamed"]["weights_bit_equal"]


def test_the_average_is_the_mean_of_both(run: Path) -> None:
    """What a stage of one's own writes is what the others read."""
    import torch
    from safetensors.torch import load_file

    one, other, mean = (load_file(run / name / "model.safetensors") for name in ("distill", "scratch", "average"))
    for name in mean:
        torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2)


def test_the_rule_of_independent_stages_finds_a_new_one(copy: Path) -> None:
    checker = str(Path(sys.executable).parent / "lint-imports")
    done = subprocess.run([checker, "--no-cache"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    stage = copy / "pipeline" / "stages" / "average.py"
    text = stage.read_text()
    stage.write_text("from pipeline.stages.prune import Prune  # noqa: F401\n" + text)
    try:
        done = subprocess.run([checker, "--no-cache"], cwd=copy, capture_output=True, text=True)
        assert done.returncode != 0
        assert "pipeline.stages.average" in done.stdout
    finally:
        stage.write_text(text)


@pytest.mark.parametrize("name", ["divergence/hellinger", "importance/last", "quantizer/halved", "format/renamed"])
def test_help_names_what_is_new(copy: Path, name: str) -> None:
    assert name.partition("/")[2] in called(copy, "train.py", "--help").stdout
