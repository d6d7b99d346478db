"""The contract of a data source: one of your own is a class and a yaml, and every stage reads it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from models.errors import Refusal
from pipeline.building import build
from pipeline.check import check
from pipeline.config import Config, parse
from pipeline.context import Context
from pipeline.data.answers import Answers
from pipeline.data.documents import Documents
from pipeline.data.prepared import prepared, sequences_of
from pipeline.data.rendering import tokenizer_of
from pipeline.data.source import DataSource
from pipeline.data.tasks import Task
from tests.command import ROOT

CLASS = '''
from dataclasses import dataclass

from datasets import Dataset

from pipeline.data import packing
from pipeline.data.prompts import prompts_of
from pipeline.data.source import SPLITS, DataSource


@dataclass
class Bottles(DataSource):
    """A song with a verse for every number; each third of them is a split."""

    verses: int
    max_length: int = 32
    packing: bool = True
    validation_sequences: int | None = None

    def check(self, planned=False):
        return {"chat": False, "train": {"sources": ["bottles"], "bytes": None, "documents": self.verses // 3}}

    def holds(self, split):
        return self.verses >= len(SPLITS)

    def content_key(self):
        return f"bottles {self.verses} {self.max_length} {self.packing}"

    def documents(self, split):
        numbers = range(SPLITS.index(split), self.verses, len(SPLITS))
        return Dataset.from_dict({"text": [f"{n} green bottles hanging on the wall, {n} bottles" for n in numbers]})

    def texts(self, split):
        return self.documents(split)["text"]

    def prompts(self, split, tokenizer, prompt_tokens, tally):
        return prompts_of(self.documents(split), tokenizer, self, prompt_tokens, tally)

    def prepare(self, split, tokenizer, folder, teacher_tokenizer=None):
        given = self.documents(split), tokenizer, self
        return packing.prepare(*given, folder=folder, teacher_tokenizer=teacher_tokenizer)
'''
YAML = """
_target_: songs.Bottles
verses: 120
max_length: 32
packing: true
validation_sequences: 4
"""
MODEL = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A folder with the two new files, and what names it on the command line."""
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/songs.py").write_text(CLASS)
    (tmp_path / "mine/data/bottles.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    yield [
        f"hydra.searchpath=[file://{tmp_path / 'mine'}]",
        "data=bottles",
        f"run_dir={tmp_path / 'run'}",
        "stages.pretrain.tokenizer.vocab_size=300",
        f"stages.pretrain.model={MODEL}",
        "trainer.accelerator=cpu",
    ]
    sys.modules.pop("songs", None)


def composed(*words: str) -> dict[str, Any]:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("config", list(words)))


def test_a_source_of_two_new_files_is_planned_by_every_stage(words: list[str]) -> None:
    config = composed("+experiment=quickstart", *words)
    plan = check({"config": config, "stages": config["order"]})["plan"]
    assert {entry["stage"] for entry in plan} >= {"pretrain", "distill", "prune", "quantize", "export", "evaluate"}
    contents = {entry["stage"]: entry["content"] for entry in plan}
    assert contents["pretrain"] == contents["distill"] == "bottles 120 32 True"


def test_a_source_of_two_new_files_trains_a_tokenizer_is_packed_and_asks_a_teacher(
    words: list[str], tmp_path: Path
) -> None:
    config = composed("+experiment=quickstart", *words)
    more = ["+stage@stages.generate=generate", f"order=[{','.join([*config['order'], 'generate'])}]"]
    pretrain = build(config, "pretrain")
    context = Context(config, "pretrain")
    pretrain.prepare(context)
    start = context.work / "start"
    tokenizer = tokenizer_of(str(start), pretrain.data)
    assert 256 < len(tokenizer) <= 300
    assert len(tokenizer(" green bottles hanging on the wall")["input_ids"]) < 10  # it was trained on the song

    for split in ("train", "validation", "test"):  # of which the first two are there: training has prepared them
        sequences, statistics, folder = sequences_of(pretrain.data, split, tokenizer, context.data_folder)
        assert prepared(folder)[1] == statistics
        told = "".join(tokenizer.decode(ids) for ids in sequences["input_ids"])
        texts = pretrain.data.texts(split)
        assert len(texts) == 40
        assert all(told.count(text + tokenizer.eos_token) == 1 for text in texts)
    assert len(list(context.data_folder.glob("[a-z]*"))) == 3

    config = composed("+experiment=quickstart", *words, *more, f"teacher.path={start}")
    generate = build(config, "generate")
    context = Context(config, "generate", parents={"teacher": {"path": str(start), "content_hash": "it"}})
    generate.prepare(context)
    asked = pq.read_table(context.work / "prompts-test.parquet")["prompt"].to_pylist()
    assert asked == list(generate.data.texts("test"))


def test_a_class_that_leaves_a_part_of_the_contract_out_is_no_source() -> None:
    class Partial(DataSource):
        def content_key(self) -> str:
            return "it"

    with pytest.raises(TypeError, match=r"abstract methods? '?check'?, '?holds'?, '?prepare'?, '?prompts"):
        Partial()  # type: ignore[abstract]


def test_every_source_says_all_that_stages_ask_of_it(tmp_path: Path) -> None:
    names = {name for name in [*vars(DataSource), *DataSource.__annotations__] if not name.startswith("_")}
    assert names >= {"max_length", "packing", "weight_column", "chat_template", "stops", "texts", "prompts", "prepare"}
    for source in (Documents(), Answers(str(tmp_path)), Task(str(tmp_path / "a.jsonl"))):
        assert [name for name in sorted(names) if not hasattr(source, name)] == []


def test_answers_neither_train_a_tokenizer_nor_ask(tmp_path: Path) -> None:
    from collections import Counter

    with pytest.raises(Refusal, match="no tokenizer is trained on answers"):
        Answers(str(tmp_path)).texts("train")
    with pytest.raises(Refusal, match="answers are no prompts; give texts"):
        Answers(str(tmp_path)).prompts("train", None, None, Counter())


def test_a_tokenizer_can_be_trained_on_a_task() -> None:
    task = Task("ciphers:3")
    texts = list(task.texts("train"))
    assert len(texts) == len(task.examples("train"))
    assert all(len(text) == 10 and text.endswith("\n") for text in texts)


def test_nothing_falls_to_a_split_that_is_neither_given_nor_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    given = {"train": str(tmp_path / "a.txt"), "validation": str(tmp_path / "a.txt"), "holdout": 0}
    data = Documents(**given)
    assert [data.holds(split) for split in ("train", "validation", "test")] == [True, True, False]


def test_no_module_of_the_room_imports_in_a_circle() -> None:
    """Imports for types and inside of functions included."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "pipeline/data").glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
        parts = [name.split(".") for name in names if name.startswith("pipeline.data.")]
        found[path.stem] = {name[2] for name in parts}
    assert found["documents"] >= {"source", "packing", "prompts"}
    while found:
        leaves = {name for name, imports in found.items() if not imports & found.keys()}
        assert leaves, f"a circle among {sorted(found)}"
        found = {name: imports for name, imports in found.items() if name not in leaves}
