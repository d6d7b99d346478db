"""When ranks watch each other where no Lightning does, and what counts as a sign of life; as rank 0 of two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from models.generation import Sampling
from models.load import load_model
from models.teachers import sharded
from models.teachers.cache import Header
from models.teachers.encodings.encoding import describe
from models.teachers.encodings.top_k import TopK
from models.teachers.online import Online
from models.teachers.sharded import Sharded
from models.teachers.teacher import Opening, Source
from pipeline.context import Context
from pipeline.data.answer_shards import PROMPTS_SCHEMA, Shards
from pipeline.generation import model as generation
from pipeline.generation.request import Request
from pipeline.steps import recording
from pipeline.steps.recording import Recording
from pipeline.training import ranks
from tests import fitting

V = fitting.VOCABULARY


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fitting.saved(tmp_path_factory.mktemp("ranks"), "teacher", fitting.model(32, 2, seed=2))


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    """Of a stage on two ranks, which nothing silences within a test."""
    monkeypatch.setenv("RANK", "0")
    watchdog = {"_target_": "callbacks.watchdog.Watchdog", "silent_seconds": 600, "timeout_minutes": 60}
    config = {
        "run_dir": str(tmp_path),
        "trainer": {"accelerator": "cpu", "devices": 2, "nodes": 1},
        "callbacks": {"watchdog": watchdog},
    }
    for module in (generation, recording):
        monkeypatch.setattr(module, "join", lambda context: torch.device("cpu"))
    yield Context(config, "asked")
    ranks.unwatch()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """Which a sharded teacher asks at every token."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def as_one_of_two(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        patch.setattr(torch.distributed, name, lambda *_, said=value: said)


def watched() -> bool:
    return any(thread.name == "heartbeat" for thread in threading.enumerate())


class Asked(Exception):
    """So that a test need not go on."""


class ReadLate:
    """As a sharded teacher: no module, and read in its `check`."""

    def __init__(self, seen: list[tuple[str, bool]]) -> None:
        self.seen = seen

    def check(self) -> None:
        self.seen.append(("read", watched()))

    def look(self, *_: Any, **__: Any) -> Any:
        self.seen.append(("asked", watched()))
        raise Asked

    generate = log_probabilities = give = look

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Late(Source):
    seen: list[tuple[str, bool]]
    path: str = ""
    dtype: str = "float32"
    trust_remote_code: bool = False

    def check(self, objective: Any) -> None:
        pass

    def open(self, opening: Opening) -> Any:
        return ReadLate(self.seen)


class Letters:
    """All of a tokenizer that is looked at."""

    pad_token_id = eos_token_id = 0

    def __len__(self) -> int:
        return V


def answer(context: Context, source: Source, folder: Path) -> None:
    row = {"split": "train", "provenance": "p", "prompt": "", "ids": [5, 6], "teacher_ids": [5, 6]}
    prompts = pa.Table.from_pylist([row], schema=PROMPTS_SCHEMA)
    sampling = Sampling(max_new_tokens=9)
    request = Request(prompts, {"p": [0]}, Letters(), sampling, [], [0], Shards(folder, 0, 10))
    generation.answered_here(context, source, request, batch_size=4)


def record(context: Context, source: Source, folder: Path) -> None:
    encoding = TopK(4)
    header = Header(describe(encoding), V, "", "", None, "float32")
    made = Recording(source, encoding, fitting.rows(4), [0, 1], Letters(), header, folder, 2**20)
    made.from_model(context, packing=True, batch_size=1, sample_tokens=8)


@pytest.mark.parametrize("ask", [answer, record])
def test_nobody_is_watched_while_a_teacher_is_read_and_everybody_once_it_is_asked(
    ask: Any, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_one_of_two(monkeypatch)
    seen: list[tuple[str, bool]] = []
    with pytest.raises(Asked):
        ask(context, Late(seen), tmp_path)
    assert seen == [("read", False), ("asked", True)]


@pytest.mark.parametrize("kind", [Online, Sharded])
def test_every_token_that_a_teacher_writes_is_a_sign_of_life(
    kind: Any, path: str, context: Context, group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "load_sharded", lambda path, _, **words: load_model(path, **words))
    monkeypatch.setattr(sharded, "engine_of", lambda body, _: body)  # whoever makes it whole, its forwards are these
    teacher = kind(path).open(Opening(V))
    teacher.check()
    with monkeypatch.context() as patch:
        as_one_of_two(patch)
        ranks.watch(context, teacher)
    before = ranks._heart.progress
    words = {"pad_token": 0, "batch_size": 4, "end_tokens": [], "stop": [], "tokenizer": None}
    ((_, (answer,)),) = teacher.generate([[5, 6, 7]], Sampling(max_new_tokens=11), **words)
    assert len(answer.ids) == 11
    assert ranks._heart.progress - before >= 11  # a forward each
