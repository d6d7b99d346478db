"""conf/: every choice composes and becomes what it names; every mistake is one line."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from models.errors import Refusal
from pipeline.building import build
from pipeline.check import compared_by_content, immaterial
from pipeline.config import Config, differences, identity, parse, selected
from tests.command import ROOT, front_door, train

CONF = ROOT / "conf"
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix("")) for path in (CONF / "experiment").rglob("*.yaml")
)
MODEL, TEXT = "model.path=some/folder", "data.train=stdlib"
GIVEN = {  # to the experiments that bring no model of their own
    "distill": ["teacher.path=some/folder", TEXT],
    "sequence_level": ["teacher.path=some/folder", "student.keep=2", TEXT],
    "on_policy": ["teacher.path=some/folder", "student.keep=2", TEXT],
    "in_context": ["teacher.path=some/folder", "task.train=pairs.jsonl"],
    "prune_recover": [MODEL, TEXT],
    "prune_distill": [MODEL, TEXT],
    "sparsify_recover": [MODEL, TEXT],
    "quantize_only": [MODEL, TEXT],
    "quantize_export": [MODEL, TEXT],
    "quantize_aware": [MODEL, TEXT],
    "export_only": [MODEL],
    "evaluate_only": [MODEL, "data.test=stdlib"],
}
# what a person must say, for the choices that cannot know it
SAID = {
    "data=files": ["data.train=stdlib"],
    "data=test": ["data.test=stdlib"],
    "data=chat": ["data.train=chat.jsonl"],
    "student=layers": ["student.keep=2"],
    "strategy=zero3_nvme": ["strategy.nvme_path=some/folder"],
    "student=one_billion": [],
    "student=folder": ["student.path=some/folder"],
    "student=kv_heads": ["student.kv_heads=1"],
    "teacher=served": ["teacher.endpoint.url=http://localhost:8000/v1"],
}


ConfigStore.instance().store(name="schema", node=Config)  # as train.py does


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose("config", list(words)))


def quickstart(*words: str) -> dict[str, Any]:
    return composed("+experiment=quickstart", *words)


CHOICES = [
    f"{group.name}={choice.stem}"
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for choice in sorted(group.glob("*.yaml"))
    if group.name in ("data", "teacher", "student", "objective", "strategy", "logger", "callbacks", "launch")
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_is_instantiated(choice: str) -> None:
    config = quickstart(choice, *SAID.get(choice, []))
    group = choice.partition("=")[0]
    nodes = config[group].values() if group == "callbacks" else [config[group]]
    nodes = [node for node in nodes if node is not None]  # logger=none
    for node in nodes:
        made = instantiate(node, _convert_="all", _partial_=group == "callbacks")
        assert made is not None
    build(config, "distill")


@pytest.mark.parametrize(
    "choice",
    [f"{g}={p.stem}" for g in ("schedule", "optimizer") for p in sorted((CONF / g).glob("*.yaml"))]
    + [f"divergence={p.stem}" for p in sorted((CONF / "divergence").glob("*.yaml"))]
    + [f"+divergence@objective.also.more={p.stem}" for p in sorted((CONF / "divergence").glob("[!f]*.yaml"))]
    + [f"auxiliary=[{p.stem}]" for p in sorted((CONF / "auxiliary").glob("*.yaml"))],
)
def test_every_part_of_a_stage_can_be_chosen(choice: str) -> None:
    assert build(quickstart(choice), "distill").training.max_steps == 600


@pytest.mark.parametrize("encoding", sorted(p.stem for p in (CONF / "encoding").glob("*.yaml")))
def test_every_encoding_can_be_recorded_in(encoding: str) -> None:
    stage = build(quickstart("teacher=cached", f"encoding={encoding}"), "record")
    assert stage.encoding.name == encoding


@pytest.mark.parametrize("importance", sorted(p.stem for p in (CONF / "importance").glob("*.yaml")))
def test_every_importance_can_decide_what_is_pruned(importance: str) -> None:
    words = ["+experiment=demo/prune_recover", f"importance={importance}"]
    made = build(composed(*words), "prune").importance
    assert type(made).__module__.endswith(importance)
    assert build(composed(*words, "lora=none"), "recover").lora is None


@pytest.mark.parametrize("method", sorted(p.stem for p in (CONF / "sparsity").glob("*.yaml")))
def test_every_method_can_decide_what_becomes_zero(method: str) -> None:
    made = build(composed("+experiment=demo/sparsify_recover", f"sparsity={method}"), "sparsify")
    assert type(made.sparsity).__module__.endswith(method)


@pytest.mark.parametrize("scheme", sorted(p.stem for p in (CONF / "scheme").glob("*.yaml")))
@pytest.mark.parametrize("method", sorted(p.stem for p in (CONF / "quantizer").glob("*.yaml")))
def test_every_scheme_can_be_quantized_to_by_every_method(scheme: str, method: str) -> None:
    words = [f"scheme={scheme}", f"quantizer={method}"]
    made = build(composed("+experiment=quantize_only", "model.path=some/folder", "data=stdlib", *words), "quantize")
    assert type(made.quantizer).__module__.endswith(method)
    printed = str(made.scheme).lower().replace(" ", "_")
    assert printed.removesuffix("_dynamic") == scheme
    assert build(composed("+experiment=quantize_only", "model.path=m", "data=stdlib", *words, "scheme.weights.bits=5",
                          "scheme.weights.granularity=group", "scheme.weights.group_size=64"),
                 "quantize").scheme.weights.group_size == 64  # fmt: skip


@pytest.mark.parametrize("scales", sorted(p.stem for p in (CONF / "qat").glob("*.yaml")))
def test_every_kind_of_scale_can_be_trained_with(scales: str) -> None:
    made = build(composed("+experiment=demo/quantize_aware", f"qat={scales}"), "qat")
    assert getattr(made.qat, "scales", "ggml") == scales
    assert made.teacher.path == "runs/quantize_aware/pretrain"  # the float parent


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "format").glob("*.yaml")))
def test_every_format_can_be_exported_to_beside_others(name: str) -> None:
    words = ["+experiment=quantize_export", "model.path=some/folder", "data=stdlib"]
    one = name.partition("_q8_0_")[0]  # variants stand in the folder of their format
    chosen = dict.fromkeys(["torchao", "huggingface", name])
    words.append(f"format=[{','.join(chosen)}]")
    made = build(composed(*words, *([] if one == "torchao" else ["formats.torchao=null"])), "export")
    assert list(made.formats) == list(dict.fromkeys(["torchao", "huggingface", one]))
    assert list(made._formats) == [each for each in made.formats if each == one or each != "torchao"]
    assert all(type(form).__module__.endswith(f".{folder}") for folder, form in made._formats.items())


def test_activations_can_be_quantized_too_and_set_by_their_fields() -> None:
    words = ["+experiment=quantize_only", "model.path=some/folder", "data=stdlib"]
    assert build(composed(*words), "quantize").scheme.activations is None
    for more, dynamic in ((["scheme=w8a8"], True), (["scheme=w8a8_static"], False)):
        assert build(composed(*words, *more), "quantize").scheme.activations.dynamic == dynamic
    made = build(composed(*words, "scheme=w8a8", "scheme.activations.dynamic=false"), "quantize")
    assert str(made.scheme) == "W8A8 static"


def test_an_export_stage_with_formats_of_its_own_keeps_them_whatever_the_others_are() -> None:
    own = quickstart("format=[gptq,awq]")["stages"]
    assert {stage: list(own[stage]["formats"]) for stage in ("unquantized", "export")} == {
        "unquantized": ["f16", "q8_0"],
        "export": ["gptq", "awq"],
    }
    one = quickstart("format=[gguf]", "formats.gguf.type=q4_k_m")["stages"]["export"]["formats"]["gguf"]
    assert one["type"] == "q4_k_m"


@pytest.mark.parametrize("recorder", ["online", "sharded"])
def test_a_cached_teacher_can_be_recorded_by(recorder: str) -> None:
    teacher = build(quickstart("teacher=cached", f"teacher@teacher.recorder={recorder}"), "record").teacher
    assert type(teacher.recorder).__name__.lower() == recorder
    assert teacher.recorder.path == teacher.path


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ([], ["pretrain", "distill", "control", "evaluate"]),
        (["teacher=sharded"], ["pretrain", "distill", "control", "evaluate"]),
        (["teacher=cached"], ["pretrain", "record", "distill", "control", "evaluate"]),
        (["teacher=cached", "teacher.cache=elsewhere/record"], ["pretrain", "distill", "control", "evaluate"]),
        (["teacher=cached", "teacher.path=a/teacher"], ["record", "distill", "control", "evaluate"]),
    ],
)
def test_a_stage_that_records_runs_only_where_its_record_is_read(words: list[str], stages: list[str]) -> None:
    from pipeline.check import needed
    from pipeline.config import selected

    after = ["prune", "recover", "quantize", "qat", "unquantized", "export", "evaluate"]
    config = quickstart(*words)
    assert needed(config, selected(config)) == stages[:-1] + after


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("scale", [None, *sorted(p.stem for p in (CONF / "scale").glob("*.yaml"))])
def test_every_experiment_composes_and_builds_all_its_stages(experiment: str, scale: str | None) -> None:
    words = [f"+experiment={experiment}"]
    words += GIVEN.get(experiment, [])
    if scale is not None:
        if experiment != "distill_7b_to_1b":
            pytest.skip("scales belong to the production run")
        words.append(f"+scale={scale}")
    config = composed(*words)
    for stage in config["order"]:
        assert callable(build(config, stage).run)


def test_every_yaml_is_met_by_one_of_these_tests() -> None:
    groups = {group.name for group in CONF.iterdir() if group.is_dir()}
    assert groups == {
        "data",
        "teacher",
        "student",
        "objective",
        "strategy",
        "logger",
        "callbacks",
        "launch",
        "schedule",
        "optimizer",
        "divergence",
        "auxiliary",
        "encoding",
        "task",
        "on_policy",
        "filter",
        "experiment",
        "scale",
        "stage",
        "training",
        "importance",
        "sparsity",
        "lora",
        "scheme",
        "quantizer",
        "format",
        "qat",
    }
    assert {p.stem for p in (CONF / "stage").glob("*.yaml")} == {
        "pretrain",
        "cipher_teacher",
        "record",
        "generate",
        "distill",
        "control",
        "evaluate",
        "prune",
        "sparsify",
        "recover",
        "quantize",
        "qat",
        "export",
        "unquantized",
    }


def test_the_production_run_is_what_it_says() -> None:
    config = composed("+experiment=distill_7b_to_1b")
    stage = build(config, "distill")
    assert (config["strategy"]["stage"], config["trainer"]["precision"]) == (3, "bf16-mixed")
    assert stage.training.activation_checkpointing
    assert (config["data"]["max_length"], config["data"]["packing"]) == (4096, True)
    assert config["trainer"]["checkpoint"]["every_minutes"] == 30
    assert config["logger"]["_target_"].endswith("wandb")


def test_the_student_of_the_production_run_has_about_a_billion_parameters(tmp_path: Path) -> None:
    from models.load import empty_model, parameter_count

    config = composed("+experiment=distill_7b_to_1b")
    teacher = build(config, "pretrain")._config(32000)
    teacher.save_pretrained(tmp_path)
    assert parameter_count(empty_model(teacher)) == 6_738_415_616  # the published Llama-2-7B
    student = build(config, "distill").student.config(str(tmp_path))
    assert parameter_count(empty_model(student)) == 2 * 32000 * 4096 + 4 * 202_383_360 + 4096


def test_tiny_changes_sizes_only() -> None:
    full, tiny = (composed("+experiment=distill_7b_to_1b", *words) for words in ([], ["+scale=tiny"]))
    changed = {key for key, _, _ in differences(full, tiny)}
    sizes = {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "vocab_size",
        "keep",
        "max_length",
        "max_documents",
        "validation_sequences",
        "holdout",
        "max_steps",
        "max_tokens",
        "global_batch",
        "micro_batch",
        "warmup_steps",
        "validate_every_steps",
        "workers",
        "samples",
        "length",
        "group_size",
        "sized_for",
        "prompt_tokens",
        "new_tokens",
        "repeats",
        "devices",
        "accelerator",
        "nodes",
        "path",
        "train",
        "name",
    }
    assert {key.rpartition(".")[2] for key in changed} <= sizes


def test_the_identity_of_a_stage_ignores_hardware_and_where_the_run_folder_is() -> None:
    one = quickstart("run_dir=here")
    other = quickstart(
        "run_dir=there",
        "strategy=ddp",
        "trainer.devices=2",
        "logger=wandb",
        "launch=slurm",
        "stages.distill.training.micro_batch=2",
        "trainer.checkpoint.every_steps=7",
    )
    assert identity(one, "distill", immaterial) == identity(other, "distill", immaterial)
    for word in (
        "seed=1",
        "objective.alpha=0.3",
        "optimizer.lr=0.1",
        "data.max_length=64",
        "trainer.precision=bf16-mixed",
        "student.shape.hidden_size=48",
    ):
        assert identity(quickstart("run_dir=here", word), "distill", immaterial) != identity(
            one, "distill", immaterial
        ), word


def test_the_identity_of_a_stage_knows_data_by_what_it_holds_and_not_by_where_it_lies(tmp_path: Path) -> None:
    from pipeline.check import check

    template = "{{ messages }}"
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text("One line.\n" * 40)
        (tmp_path / place / "chat.jinja").write_text(template)

    def told(place: str, *words: str) -> dict[str, Any]:
        folder = tmp_path / place
        config = quickstart(
            "run_dir=run", f"data.train=[{folder}/text.txt]", f"data.test={folder}/text.txt",
            f"data.chat_template={folder}/chat.jinja", *words,
        )  # fmt: skip
        return {stage: identity(config, stage, immaterial, compared_by_content) for stage in config["stages"]}

    assert told("here") == told("there")
    for other in ("data.train=[owner/name]", "data.test=stdlib", "data.chat_template=null", "data.holdout=0.1"):
        assert told("here", other)["distill"] != told("here")["distill"], other
    assert told("here", "data.train=owner/name")["distill"]["data"]["train"] == "owner/name"

    # The worker says so too; what the files hold is compared apart.
    def plan(place: str) -> dict[str, Any]:
        config = quickstart("run_dir=run", f"data.train={tmp_path / place}/text.txt")
        (found,) = check({"config": config, "stages": ["pretrain"]})["plan"]
        return found

    before, after = plan("here"), plan("there")
    assert before["identity"] == after["identity"]
    assert before["content"] == after["content"]
    (tmp_path / "there" / "text.txt").write_text("Another line.\n" * 40)
    assert plan("there")["content"] != before["content"]
    assert plan("there")["identity"] == before["identity"]


def test_the_identity_of_a_stage_knows_its_models_by_what_they_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.check import check
    from pipeline.data.tokenizer import train_tokenizer

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    for place in ("here", "there"):
        train_tokenizer(["a few words"], 257, tmp_path / place)
        LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(tmp_path / place)  # type: ignore[arg-type]

    def plan(place: str) -> dict[str, Any]:
        config = composed(
            "+experiment=prune_recover", "run_dir=run", f"model.path={tmp_path / place}", "data.train=stdlib",
            "only=[prune]",
        )  # fmt: skip
        (found,) = check({"config": config, "stages": ["prune"]})["plan"]
        return found

    here, there = plan("here"), plan("there")
    assert here["identity"] == there["identity"]
    assert here["identity"]["model"] == "<model>"
    assert here["parents"] != there["parents"]  # of which the hashes are compared


def test_answers_of_a_stage_of_the_run_have_one_identity_before_and_after_they_are_made(tmp_path: Path) -> None:
    def told() -> dict[str, Any]:
        config = composed("+experiment=demo/sequence_level", f"run_dir={tmp_path}")
        return identity(config, "distill", immaterial, compared_by_content)

    before = told()
    (tmp_path / "generate").mkdir()
    assert told() == before


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every single value below a node."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        yield path
    for key, value in pairs or ():
        yield from leaves(value, (*path, key))


SPEED_AND_MEMORY = {  # of these experiments' stages: all that may change in the middle of a stage
    ("training", "micro_batch"),
    ("training", "workers"),
    ("data", "workers"),
    ("batch_size",),
    ("verdict", "require"),  # how the run ends
    ("shard_mb",),
    ("shard_answers",),
    ("sample_tokens",),
}


@pytest.mark.parametrize("experiment", ["quickstart", "demo/sequence_level"])
def test_every_value_of_a_stage_is_of_its_identity_but_for_those_of_speed_and_memory(experiment: str) -> None:
    config = composed(f"+experiment={experiment}", "run_dir=here")
    for stage, node in config["stages"].items():
        told = identity(config, stage, immaterial)
        for path in leaves(node):
            if path[-1] == "_target_":
                continue  # another class may leave out other fields
            changed = copy.deepcopy(config)
            at = changed["stages"][stage]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = "another value"
            same = identity(changed, stage, immaterial) == told
            quantized_in_batches = stage == "quantize" and path == ("calibration", "batch_size")
            assert same == (path in SPEED_AND_MEMORY or quantized_in_batches), (stage, path)


def test_a_key_is_left_out_of_the_identity_where_its_class_says_so_and_nowhere_else() -> None:
    """A field of that name elsewhere may decide what is made: of another class, or of a node that builds none."""
    config = quickstart("run_dir=here")
    for place in ("student", "data", "objective"):
        for name in ("micro_batch", "workers", "batch_size", "shard_mb", "concurrency", "retries"):
            if (place, name) == ("data", "workers"):
                continue  # of Documents it is one
            changed = copy.deepcopy(config)
            changed["stages"]["distill"][place][name] = 3
            assert identity(changed, "distill", immaterial) != identity(config, "distill", immaterial), (place, name)


def test_what_a_class_calls_immaterial_are_fields_of_its() -> None:
    """A field that was renamed would be part of the identity all at once."""
    targets = {found for path in CONF.rglob("*.yaml") for found in re.findall(r"_target_: ([\w.]+)", path.read_text())}
    declaring = {target: immaterial(target) for target in sorted(targets) if immaterial(target)}
    assert len(declaring) >= 6
    for target, names in declaring.items():
        assert {n.partition(".")[0] for n in names} <= set(inspect.signature(get_object(target)).parameters), target


def test_a_selection_is_a_range_and_a_set() -> None:
    assert selected(quickstart("only=[distill,evaluate]")) == ["distill", "evaluate"]
    assert selected(quickstart("start=distill", "stop=control")) == ["distill", "control"]
    assert selected(quickstart("start=distill", "only=[pretrain,control]")) == ["control"]
    with pytest.raises(Refusal, match="comes after"):
        selected(quickstart("start=control", "stop=distill"))


MISTAKES = {
    "objective.alfa=1": ["'objective.alfa'", "did you mean alpha?"],
    "+objective.alfa=1": ["'alfa'", "did you mean alpha?"],
    "+a.b=1": ["'a'"],
    "+seeds=1": ["'seeds'", "did you mean seed?"],
    "+stages.distil.x=1": ["stages.distil", "did you mean distill?"],
    "trainer.devices=0": ["trainer.devices=0"],
    "run_dir=": ["write run_dir=VALUE"],
    "trainer.precision=fp16": ["trainer.precision=fp16", "bf16-mixed"],
    "trainer.accelerator=tpu": ["trainer.accelerator=tpu"],
    "trainer.accelerator=cuda": ["trainer.accelerator=cuda"],
    "teacher.dtype=float8": ["teacher.dtype=float8", "bfloat16"],
    "trainer.devices=2": ["strategy=single", "ddp"],
    "experiment=quickstart": ["write +experiment=quickstart"],
    "+experiment=quickstrat": ["quickstrat", "quickstart"],
    "strategy=zero4": ["strategy=zero4", "did you mean zero"],
    "stages=[distil]": ["only=[distil]", "did you mean distill?"],
    "start=nowhere": ["start=nowhere"],
    "resume=maybe": ["resume=maybe", "overwrite"],
    "seed=x": ["seed"],
    "objective.alpha=2.0": ["alpha=2.0", "[0, 1]"],
    "divergence.temperature=-1.5": ["temperature=-1.5"],
    "stages.distill.training.micro_batch=5": ["micro_batch=5", "1, 2, 4, 8"],
    "stages.distill.training.max_steps=null": ["max_steps, max_tokens or epochs"],
    "stages.distill.training.max_steps=-1": ["max_steps=-1"],
    "student.shape.num_attention_heads=5": ["hidden_size=64", "num_attention_heads=5"],
    "student.shape.num_key_value_heads=3": ["num_key_value_heads=3"],
    "+student.shape.hiden_size=5": ["hiden_size", "did you mean hidden_size?"],
    "student.shape.hed_dim=5": ["student.shape.hed_dim", "did you mean head_dim?"],
    "student.shape={hed_dim:5}": ["student.shape.hed_dim", "did you mean head_dim?"],
    "student.shape={num_key_value_heads:0}": ["student.shape.num_key_value_heads=0"],
    "student.shape.hidden_act=nope": ["student.shape: LlamaConfig makes no model of these values: KeyError: 'nope'"],
    "student.shape.rope_parameters={rope_type:yarn}": ["student.shape: LlamaConfig refuses this shape", "factor"],
    "+stages.pretrain.model.hidden_act=nope": ["model: LlamaConfig makes no model of these values: KeyError: 'nope'"],
    "student=layers student.keep=1.5": ["student.keep=1.5: need a number"],
    "student=copy student.shape.head_dim=5": ["student.shape"],
    "stages.pretrain.model.model_type=lama": ["model_type=lama"],
    "data.train=nothing.txt": ["nothing.txt"],
    "data.max_length=1": ["data.max_length=1"],
    "data.max_length=1024": ["data.max_length=1024", "max_position_embeddings"],
    "teacher.path=./nowhere": ["teacher.path=./nowhere"],
    "logger=wandb logger.mode=sometimes": ["mode"],
    "stages.evaluate.dtype=bf16": ["dtype=bf16", "bfloat16"],
    "stages.evaluate.batch_size=0": ["batch_size=0"],
    "stages.evaluate.speed.repeats=0": ["repeats"],
    "trainer.log_every_steps=0": ["trainer.log_every_steps=0"],
    "trainer.checkpoint.every_steps=0": ["checkpoint.every_steps=0"],
    "trainer.nodes=0": ["trainer.nodes=0"],
    "strategy=zero3 trainer.devices=2 +strategy.config.zero_hpz_partition_size=8": [
        "zero_hpz_partition_size=8: 2 ranks are no multiple of it; give the ranks of a node"
    ],
    "strategy=zeropp trainer.devices=8": ["zero_quantized_weights=true: DeepSpeed quantizes on GPUs only"],
    "strategy=zero2 +strategy.config.zero_hpz_partition_size=1 +strategy.config.zero_quantized_gradients=true": [
        "zero_quantized_gradients=true: ZeRO++ is of ZeRO-3; use strategy=zeropp or zero3"
    ],
    "strategy=zero2 +strategy.config.reduce_bucket_sise=1": [
        "config.reduce_bucket_sise: unknown in DeepSpeed's section zero_optimization; did you mean reduce_bucket_size?"
    ],
    "strategy=zero2 strategy.communication_dtype=fp8": ["communication_dtype=fp8: need one of null, fp32, bf16"],
    "data.workers=-3": ["data.workers=-3", "null for one a core"],
    "forecast=true doctor=true": ["forecast and doctor: each is all that a command does"],
    "trainer.nodes=2": ["trainer.nodes=2", "launch=slurm"],
    "trainer.attention=nonsense": ["trainer.attention=nonsense", "eager"],
    "trainer.attention=flash_attention_2": ["flash_attn is not installed"],
    "+optimizer.lrr=1": ["lrr"],
    "+launch.x=1": ["x"],
    "+callbacks.progress.foo=1": ["foo"],
    "+experiment=distill data.train=stdlib": ["teacher.path is not set"],
    "student=layers": ["student.keep is not set"],
    "only=null start=nowhere": ["start=nowhere"],
    "trainer.objective_memory_mb=0": ["trainer.objective_memory_mb=0"],
    "teacher=sharded teacher.offload=disk": ["teacher.offload=disk", "cpu"],
    "teacher=sharded teacher.offload=nvme": ["teacher.nvme_path"],
    "teacher=sharded teacher.offload=nvme teacher.nvme_path=/nowhere": ["teacher.nvme_path=/nowhere", "no such folder"],
    "teacher=cached teacher@teacher.recorder=sharded teacher.recorder.offload=nvme "
    "teacher.recorder.nvme_path=/nowhere": ["teacher.recorder.nvme_path=/nowhere"],
    "strategy=ddp trainer.devices=2 strategy.timeout_minutes=0 only=[pretrain]": [
        "callbacks.watchdog.timeout_minutes=0 (strategy.timeout_minutes, unless set itself): need a number above 0"
    ],
    "run_dir=/proc/some/run": ["run_dir=/proc/some/run: no folder can be made in /proc (No such file or directory)"],
    "strategy=zero3_nvme trainer.devices=2": ["strategy.nvme_path is not set"],
    "strategy=zero3_nvme trainer.devices=2 strategy.nvme_path=/nowhere only=[pretrain] "
    "stages.pretrain.training.micro_batch=4": [
        "strategy.nvme_path=/nowhere",
        "no such folder",
    ],
    "strategy=zero3 trainer.devices=2 +strategy.config.offload_param.device=nvme": ["strategy.offload_parameters=true"],
    "strategy=zero2 trainer.devices=2 +strategy.nvme_path=/tmp": ["strategy.nvme_path=/tmp", "strategy=zero3_nvme"],
    "teacher=cached divergence.temperature=3.0": ["temperature=3", "recorded for 1, 2", "temperatures"],
    "teacher=cached encoding=sampled": ["temperature=2", "encoding.temperature=2"],
    "teacher=cached encoding=sampled divergence=reverse_kl": ["reverse_kl cannot be worked out from samples"],
    "teacher=cached divergence=universal_logit": ["universal_logit", "encoding=hidden_states"],
    "teacher=cached auxiliary=[hidden_states]": ["hidden_states compares layers", "online"],
    "teacher=cached teacher.cache=./nowhere": ["nowhere", "record the teacher's signal"],
    "teacher=cached start=distill teacher.path=./nowhere": ["teacher.path=./nowhere"],
    "stages=[record]": ["nothing to record"],
    "teacher=served teacher.endpoint.url=nonsense divergence.temperature=1.0": ["nonsense"],
    "teacher=served teacher.endpoint.url=http://localhost:1/v1": ["temperature=2", "forward_kl to 1"],
    "teacher=served": ["teacher.endpoint.url is not set"],
    "teacher=served teacher.endpoint.url=http://localhost:1/v1 encoding=hidden_states": [
        "encoding=hidden_states: a server gives the best k"
    ],
    "stages.distill.align=true": ["align=true", "student=folder"],
    "encoding.k=0 teacher=cached": ["encoding.k=0"],
    "+divergence@objective.also.more=forward_kl": ["two terms are named forward_kl"],
    "auxiliary=[attention_relations] auxiliaries.attention_relations.relation_heads=7": ["relation_heads=7"],
    "auxiliary=[hidden_states] auxiliaries.hidden_states.layers=[[9,1]]": ["student layer 9"],
    "auxiliary=[hidden_states] auxiliaries.hidden_states.projection=false": ["64", "128"],
    "divergence=jensen_shannon divergence.beta=2.0": ["beta=2.0"],
}


def checked(*words: str) -> tuple[str, list[dict[str, Any]]]:
    """What `python train.py WORDS` refuses, a line each, and the plan: by train.py itself, but that Hydra composes and
    the check runs in here."""
    from pipeline.check import check

    def main() -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config, typed = door.configuration(compose("config", sys.argv[1:]))
        plan.extend(check({"config": config, "stages": selected(config), "typed": typed})["plan"])

    door, told, plan = front_door(), io.StringIO(), list[dict[str, Any]]()
    with (
        mock.patch.object(door, "main", main),
        mock.patch.object(sys, "argv", ["train.py", *words]),
        contextlib.redirect_stderr(told),
    ):
        assert door._told(door.front_door) == (0 if plan else 2)
    lines = told.getvalue().splitlines()
    assert plan or all(line.startswith("error: ") for line in lines)
    return "\n".join(line.removeprefix("error: ") for line in lines), plan


def refused(*words: str) -> str:
    told, plan = checked(*words)
    assert not plan, "nothing was refused"
    return told


def unrefused(*words: str) -> list[dict[str, Any]]:
    told, plan = checked(*words)
    assert plan, told
    return plan


STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 10**18, 0.5, -0.5, float("nan"), float("inf")),
    *("word", "", "6Q", "/nonexistent/path", [], ["a"], [1], {}, {"a": 1}),
]


@pytest.mark.slow
def test_no_value_of_any_key_of_the_quickstart_is_a_traceback() -> None:
    """300 random values of random keys: each is planned with or refused."""
    from pipeline.check import check

    plain = quickstart("trainer.accelerator=cpu", "run_dir=/nonexistent/run")
    keys = [key for key in _keys(plain) if key[-1] != "_target_"]
    draw, failed = random.Random(0), []
    for _ in range(300):
        tried = copy.deepcopy(plain)
        *above, last = draw.choice(keys)
        node = tried
        for key in above:
            node = node[key]
        node[last] = draw.choice(STRANGE)
        try:
            config = parse(OmegaConf.create(tried))
            check({"config": config, "stages": selected(config)})
        except Refusal:
            continue
        except Exception as problem:
            failed.append((".".join([*above, last]), node[last], repr(problem)))
    assert failed == []


def _keys(node: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of values, and of settings as a whole; those at the top are choices, of which the front door refuses null."""
    below = node.items() if isinstance(node, dict) else ()
    own = [above] if len(above) > 1 or not isinstance(node, dict) else []
    return own + [key for name, value in below for key in _keys(value, (*above, name))]


def test_settings_that_do_not_say_what_they_build_are_refused() -> None:
    """As an experiment of one's own has them that forgets it."""
    tried = copy.deepcopy(quickstart())
    tried["stages"]["distill"]["data"] = {"train": "some.txt"}
    with pytest.raises(Refusal, match=r"^stages\.distill\.data: settings without _target_, .*"):
        build(tried, "distill")


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(words: str) -> None:
    said = refused(*words.split())
    assert len(said.splitlines()) == 1, said
    for part in MISTAKES[words]:
        assert part in said


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("teacher.endpoint.url='http://host/v1?api_key=SECRET'", "teacher.endpoint.url"),
        ("teacher.endpoint.url='http://me:SECRET@host/v1'", "teacher.endpoint.url"),
        ("data.train='https://host/text.jsonl?access_token=SECRET'", "data.train"),
        ("data.train=['https://SECRET@host/text.jsonl']", "data.train.0"),
        ("logger.project='s3://host/a?x=1&sig=SECRET'", "logger.project"),
    ],
)
def test_a_key_in_any_address_is_refused_without_saying_it(word: str, key: str) -> None:
    given = ["teacher=served", "logger=wandb", "data=files", "divergence.temperature=1.0"]
    url = [] if "endpoint" in word else ["teacher.endpoint.url='http://host/v1?page=2'"]
    text = [] if word.startswith("data") else ["data.train=stdlib"]
    with pytest.raises(Refusal) as told:
        quickstart(*given, *url, *text, word)
    assert str(told.value).startswith(f"{key}: the address holds a password or a key")
    assert "SECRET" not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("+launch.site.environment.WANDB_API_KEY=VALUE", "environment.WANDB_API_KEY: WANDB_API_KEY"),
        ("+launch.site.environment.HF_TOKEN=VALUE", "environment.HF_TOKEN: HF_TOKEN"),
        ("+launch.site.environment.aws_secret_access_key=VALUE", "environment.aws_secret_access_key: "),
        ("+launch.site.environment.AWS_ACCESS_KEY_ID=VALUE", "environment.AWS_ACCESS_KEY_ID: "),
        ("launch.site.setup=['module load cuda','export HF_TOKEN=VALUE']", "setup.1: HF_TOKEN"),
        ("launch.site.options=['--export=ALL,DB_PASSWORD=VALUE']", "options.0: DB_PASSWORD"),
    ],
)
def test_a_secret_among_the_variables_of_a_site_is_refused_without_saying_it(word: str, key: str) -> None:
    with pytest.raises(Refusal) as told:
        quickstart("launch=slurm", word)
    assert str(told.value).startswith(f"launch.site.{key}")
    assert "export it before the command instead" in str(told.value)
    assert "VALUE" not in str(told.value)
    assert "\n" not in str(told.value)


def test_what_a_site_sets_without_a_secret_passes() -> None:
    setup = "launch.site.setup=['export HF_TOKEN=$(cat token)','export MONKEYS=3 A_KEY_FILE=k']"
    variables = ["TOKENIZERS_PARALLELISM=false", "NCCL_DEBUG=WARN", "HF_TOKEN_PATH=token"]
    given = [f"+launch.site.environment.{each}" for each in variables]
    assert quickstart("launch=slurm", setup, *given)["launch"]["site"]["environment"]


def test_a_plan_for_a_cluster_is_made_anywhere_and_a_run_where_srun_can_be_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert unrefused("dry_run=true", "launch=slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    told = "launch=slurm: there is no sbatch on the PATH; call it where Slurm's programs are, or leave launch=slurm out"
    assert refused("launch=slurm") == told
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    told = "launch=slurm: there is no srun on the PATH; call it where Slurm's programs are, or leave launch=slurm out"
    assert refused("launch=slurm") == told
    (tmp_path / "srun").touch(0o700)
    assert unrefused("launch=slurm")


@pytest.mark.parametrize("words", ["+a.b=1", "trainer.devices=0", "stages.quantize.method=awq", "quantizer=null"])
def test_the_front_door_says_it_in_one_line_before_any_work(words: str, tmp_path: Path) -> None:
    done = train(f"run_dir={tmp_path}/run", words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_pickled_weights_alone_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "only pickled weights (pytorch_model.bin)" in refused(
        "+experiment=distill", f"teacher.path={folder}", "data.train=stdlib"
    )


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused("+experiment=distill", f"teacher.path={tmp_path}", "data.train=stdlib")


@pytest.mark.slow
def test_a_full_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    wide = [
        f"student.shape.{name}={value}"
        for name, value in {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 60}.items()
    ]
    assert "GB are free" in refused(f"run_dir={tmp_path}/run", *wide)


def test_cfg_job_answers_without_heavy_imports() -> None:
    import subprocess
    import sys

    code = (
        "import sys, runpy; sys.argv = ['train.py', '--cfg', 'job']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'pytorch_lightning', 'datasets', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "experiment" not in done.stdout.splitlines()[0]
    assert "name: quickstart" in done.stdout


def test_conversations_cannot_train_a_tokenizer(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert "tokenizer.path" in refused("data=chat", f"data.train={chat}", "data.max_length=64")


def test_a_student_of_a_quantized_teacher_is_not_quantized(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from models.student import Shape

    config = LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    assert getattr(Shape(shape={"num_hidden_layers": 1}).config(str(tmp_path)), "quantization_config", None) is None


def test_one_gpu_is_used_by_the_default_strategy_wherever_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.context import Context

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Context(quickstart(), "distill").devices == 1
    assert Context(quickstart("strategy=ddp"), "distill").devices == 4


def test_a_student_larger_than_its_teacher_is_warned_of() -> None:
    from pipeline.check import check

    plan = check({"config": quickstart("student.shape.hidden_size=256"), "stages": ["pretrain", "distill"]})["plan"]
    assert any("is larger than its teacher" in line for line in plan[1]["warnings"])


def test_a_warm_up_longer_than_the_stage_is_warned_of() -> None:
    from pipeline.check import check

    words = ["schedule.warmup_steps=1000", *(f"stages.{name}.training.max_steps=2" for name in ("pretrain", "distill"))]
    pretrain, distill = check({"config": quickstart(*words), "stages": ["pretrain", "distill"]})["plan"]
    told = "schedule.warmup_steps={} of 2 steps: the learning rate never reaches optimizer.lr; set fewer"
    assert pretrain["warnings"] == ["stages.pretrain.training." + told.format(100)]
    assert distill["warnings"] == [told.format(1000)]
    (pretrain,) = check({"config": quickstart(), "stages": ["pretrain"]})["plan"]
    assert pretrain["warnings"] == []


def test_two_tokenizers_are_refused_with_the_first_differing_token(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.data.tokenizer import load_tokenizer, train_tokenizer

    for name, text in (("teacher", "the cat sat on the mat " * 9), ("student", "pack my box with five jugs " * 9)):
        train_tokenizer([text], 270, tmp_path / f"{name}-tokenizer")
        LlamaForCausalLM(
            LlamaConfig(vocab_size=270, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        ).save_pretrained(tmp_path / name)
        load_tokenizer(tmp_path / f"{name}-tokenizer").save_pretrained(tmp_path / name)
    said = refused(
        "+experiment=distill",
        f"teacher.path={tmp_path}/teacher",
        "data.train=stdlib",
        "student=folder",
        f"student.path={tmp_path}/student",
    )
    assert "different tokenizers: token 257" in said
    assert "in teacher" in said
