"""A stage that several jobs share out: what they make together is what one would have made."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from models.errors import Refusal
from models.teachers.cache import Cache
from pipeline import run_folder, shared, verdicts
from pipeline.artifact import content_hash
from pipeline.building import build
from pipeline.check import check
from pipeline.config import selected
from pipeline.context import Context
from pipeline.generation.model import answered_here
from pipeline.status import status
from tests import staged
from tests.command import start, train
from tests.serving import ServerProcess
from tests.staged import manifest
from tests.stages.test_record import LITTLE, same_signals

RECORD = [*LITTLE, "teacher=cached", "encoding=top_k", "stages.record.shard_mb=1", "stages.record.batch_size=2"]
RECORD += ["only=[record]"]
GENERATE = [
    *("+experiment=distill", "+stage@stages.generate=generate", "order=[generate,record,distill,control,evaluate]"),
    *("only=[generate]", "stages.generate.prompt_tokens=6", "stages.generate.sampling.max_new_tokens=8"),
    *("stages.generate.batch_size=4", "data=stdlib", "data.max_documents=14", "data.max_length=64"),
    *("filter=[length]", "trainer.accelerator=cpu", "logger=none"),
]


def make(run_dir: Path, *words: str) -> Path:
    """What one job makes, in this process."""
    config = staged.composed(run_dir, *words)
    run_folder.mark(run_dir)
    if config["share"] is not None:
        config = shared.alone(config)
        shared.begin(Path(config["run_dir"]))
    [stage] = config["only"]
    made, context = build(config, stage), Context(config, stage, attempt=uuid.uuid4().hex)
    context.parents = {
        role: {"path": path, "content_hash": content_hash(Path(path))} for role, path in made.parents(context).items()
    }
    return staged.run_stage(made, context)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("shared") / "one"
    return staged.make(staged.composed(run_dir, "+experiment=quickstart", *LITTLE), "pretrain")


@pytest.fixture(scope="module")
def words(teacher: Path) -> list[str]:
    return ["+experiment=quickstart", *RECORD, f"teacher.path={teacher}"]


@pytest.fixture(scope="module")
def recorded(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one job."""
    return make(tmp_path_factory.mktemp("shared") / "recorded", *words)


def test_what_jobs_record_side_by_side_is_what_one_records(words: list[str], recorded: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    jobs = [start(f"run_dir={run_dir}", *words, f"share={n}/2", log=tmp_path / f"{n}.log") for n in (1, 2)]
    ends = [job.wait(300) for job in jobs]
    said = [(tmp_path / f"{n}.log").read_text() for n in (1, 2)]
    assert ends == [0, 0], said
    assert "share=1/2: finished; record takes it over, when it runs without share" in said[0]
    shares = shared.folders(run_dir, "record")
    assert [share.name for share in shares] == ["1-of-2", "2-of-2"]
    assert min(manifest(share / "record")["metrics"]["pieces"] for share in shares) > 0
    [row] = status(run_dir)
    assert (row["stage"], row["state"], row["shares"]) == ("record", "stopped", (2, 2))
    done = train(f"run_dir={run_dir}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    same_signals(run_dir / "record", recorded)
    names = [path.name for path in (run_dir / "record").glob("shard-*")]
    assert names
    assert not [name for name in names if name.startswith("shard-0000-")]  # nothing was recorded again
    assert not shared.folders(run_dir, "record")
    assert (run_dir / "logs" / "record" / "share-2-of-2" / "start-0" / "rank-00000.log").exists()
    told = manifest(run_dir / "record")["metrics"]
    assert told["pieces"] == manifest(recorded)["metrics"]["pieces"]
    assert told["fidelity"]


def test_the_stage_makes_what_a_share_has_not(words: list[str], recorded: Path, tmp_path: Path) -> None:
    share = make(tmp_path / "run", *words, "share=2/3")
    whole = make(tmp_path / "run", *words)
    same_signals(whole, recorded)
    assert inodes(share)
    assert {*inodes(share)} < {*inodes(whole)}
    assert manifest(whole)["seconds"] > manifest(share)["seconds"]  # which are counted


def inodes(folder: Path) -> list[int]:
    return sorted(path.stat().st_ino for path in folder.glob("shard-*"))


def test_shares_of_another_number_and_the_stage_take_over_each_shard_once(
    words: list[str], recorded: Path, tmp_path: Path
) -> None:
    halves = [make(tmp_path / "run", *words, f"share={number}/2") for number in (1, 2)]
    quarters = [make(tmp_path / "run", *words, f"share={number}/4") for number in (1, 2)]
    made = sorted(inodes(halves[0]) + inodes(halves[1]))
    assert [inodes(quarter) for quarter in quarters] == [made, made]
    whole = make(tmp_path / "run", *words)
    assert inodes(whole) == made
    assert len(Cache(whole)) == len(Cache(recorded))
    assert shared.finished(tmp_path / "run", "record") == (2, 4)


def stopped(run_dir: Path, *words: str) -> Path:
    """A share that was killed once it had made everything, before it was published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.artifact.publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(run_dir, *words)
    return shared.folders(run_dir, "generate" if "only=[generate]" in words else "record")[-1]


def test_what_an_unfinished_share_has_recorded_is_taken_over(words: list[str], recorded: Path, tmp_path: Path) -> None:
    left = stopped(tmp_path / "run", *words, "share=1/2")
    [shelf] = (left / "work" / "signals" / "record").glob("*")
    assert inodes(shelf)
    assert shared.finished(tmp_path / "run", "record") == (0, 2)
    whole = make(tmp_path / "run", *words)
    assert {*inodes(shelf)} < {*inodes(whole)}
    same_signals(whole, recorded)


def test_a_share_takes_over_what_the_run_has(words: list[str], tmp_path: Path) -> None:
    whole = make(tmp_path / "run", *words)
    share = make(tmp_path / "run", *words, "share=1/2")
    assert inodes(share) == inodes(whole)


def test_a_share_of_another_signal_is_none_of_the_stages(words: list[str], recorded: Path, tmp_path: Path) -> None:
    make(tmp_path / "run", *words, "share=1/1", "encoding.k=7")
    whole = make(tmp_path / "run", *words)
    same_signals(whole, recorded)
    assert [path.name[:11] for path in whole.glob("shard-*")] == ["shard-0000-"] * len(inodes(whole))


def test_more_jobs_than_sequences_are_no_fault(words: list[str], tmp_path: Path) -> None:
    empty = make(tmp_path / "run", *words, "share=1/100000")
    assert manifest(empty)["metrics"]["pieces"] == 0


def test_who_forces_a_stage_takes_over_only_what_was_forced(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make(run_dir, *words, "share=1/2")
    make(run_dir, *words, "share=2/2", "force=[record]")
    for folder in shared.folders(run_dir, "record"):  # as the command writes it
        force = ["record"] if folder.name == "2-of-2" else []
        (folder / "config.json").write_text(json.dumps({"force": force}))
    made = [shared.made(run_dir, "record", forced=forced) for forced in (False, True)]
    assert [[each.folder.parent.name for each in some] for some in made] == [["1-of-2", "2-of-2"], ["2-of-2"]]


def test_a_forced_share_that_is_finished_waits_and_one_of_other_values_is_made_again(
    words: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def verdict(*more: str) -> str:
        config = shared.alone(staged.composed(run_dir, *words, "share=1/2", *more))
        entry = check({"config": config, "stages": ["record"]})["plan"][0]
        return str(verdicts.jobs_of(config, {"record": entry})[0]["do"])

    assert verdict("force=[record]") == "start"
    done = train(f"run_dir={run_dir}", *words, "share=1/2", "force=[record]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (verdict("force=[record]"), verdict()) == ("skip", "skip")
    assert verdict("encoding.k=7") == "redo"  # no refusal: of the old ones all is kept that still fits


def test_a_stage_waits_for_jobs_that_make_shares_of_it(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folder = run_dir / "work" / "shares" / "record" / "2-of-2"
    shared.begin(folder)
    with run_folder.claimed(folder):
        refused = train(f"run_dir={run_dir}", *words)
        [row] = status(run_dir)
        busy = train(f"run_dir={run_dir}", *words, "share=2/2")
    assert "another command is working in it" in busy.stderr
    assert refused.returncode == 2
    told = "record: jobs with share=2/2 are working on it; run the same command again when they have ended"
    assert told in refused.stderr
    assert row["state"] == "running"


@pytest.fixture(scope="module")
def servers(teacher: Path) -> Iterator[list[ServerProcess]]:
    started = [ServerProcess(teacher), ServerProcess(teacher)]
    yield started
    for server in started:
        server.kill()


def test_shares_ask_a_server_each(words: list[str], servers: list[ServerProcess], tmp_path: Path) -> None:
    served = [*words, "teacher=served", "teacher.endpoint.top_k=8"]
    urls = [f"teacher.endpoint.url=http://127.0.0.1:{server.port}/v1" for server in servers]
    one = make(tmp_path / "one", *served, urls[0])
    for number, url in enumerate(urls, 1):
        make(tmp_path / "run", *served, url, f"share={number}/2")
    whole = make(tmp_path / "run", *served, urls[0])
    same_signals(whole, one)
    assert manifest(whole)["metrics"]["server"]["kind"]
    assert not list(whole.glob("shard-0000-*"))


def patched_todo(run_dir: Path, *words: str) -> set[tuple[str, int]]:
    """The answers that the stage itself asks for."""
    asked = set()

    def seen(context: Context, source: Any, request: Any, batch_size: int) -> int:
        asked.update((key, sample) for key, samples in request.todo.items() for sample in samples)
        return answered_here(context, source, request, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.stages.generate.answered_here", seen)
        make(run_dir, *words)
    return asked


def answers(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "answers.parquet").to_pylist()
    return rows


def test_what_jobs_generate_side_by_side_is_what_one_generates(teacher: Path, tmp_path: Path) -> None:
    words = [*GENERATE, f"teacher.path={teacher}"]
    alone = make(tmp_path / "one", *words)
    shares = [make(tmp_path / "run", *words, f"share={number}/2") for number in (1, 2)]
    keys = [{(row["provenance"], row["sample"]) for row in answers(share)} for share in shares]
    whole = make(tmp_path / "run", *words)
    assert answers(whole) == answers(alone)
    of_whole, of_one = (manifest(folder)["metrics"] for folder in (whole, alone))
    assert of_whole.pop("tokens_per_second") is None  # the stage itself has made nothing
    assert of_one.pop("tokens_per_second") > 0
    assert of_whole == of_one
    left = stopped(tmp_path / "left", *words, "share=1/2") / "work" / "answers" / "generate"
    kept = {(row["provenance"], row["sample"]) for path in left.glob("*") for row in pq.read_table(path).to_pylist()}
    assert kept == keys[0]
    seen = patched_todo(tmp_path / "left", *words)
    assert seen == keys[1]
    assert not keys[0] & keys[1]
    assert min(map(len, keys)) > 0
    assert len(keys[0] | keys[1]) == of_whole["prompts"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["share=3/2", "only=[record]"], "share=3/2: need I/N, the number of this job, from 1 on, of N, as 1/16"),
        (["share=1/2"], "share=1/2: it is of one stage, record or generate; add only=[STAGE]"),
        (["share=1/2", "only=[pretrain]"], "share=1/2: pretrain is not shared out; leave share out"),
        (
            ["share=1/2", "only=[record]", "prepare_only=true"],
            "prepare_only and share: each is all that a command does",
        ),
        (["share=1/2", "only=[record]"], "record needs the stage pretrain, which has not been run"),
    ],
)
def test_a_share_is_refused_in_a_line(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:  # noqa: PT012 wherever it is found out
        config = shared.alone(staged.composed(tmp_path, "+experiment=quickstart", *RECORD[:-1], *words))
        check({"config": config, "stages": selected(config)})
    assert told in str(refused.value)
    assert not [*tmp_path.iterdir()]


def test_a_share_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run import _of_share

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    config = staged.composed(tmp_path, "+experiment=quickstart", *RECORD, "launch=slurm", "share=1/2")
    with pytest.raises(Refusal, match=r"submitted by launch\.resources\.STAGE\.jobs=N; leave share out"):
        _of_share(config)


def test_the_logs_of_shares_stay_and_their_folders_go(tmp_path: Path) -> None:
    for name in ("1-of-2", "2-of-2"):
        folder = tmp_path / "work" / "shares" / "record" / name
        shared.begin(folder)
        start_0 = folder / "logs" / "record" / "start-0"
        start_0.mkdir(parents=True)
        (start_0 / "rank-00000.log").write_text(name)
    with run_folder.claimed(folder):
        shared.clear(tmp_path, "record")
    assert [path.name for path in shared.folders(tmp_path, "record")] == ["2-of-2"]  # a job is working in it
    shared.clear(tmp_path, "record")
    logs = tmp_path / "logs" / "record"
    assert [(logs / f"share-{name}" / "start-0" / "rank-00000.log").read_text() for name in ("1-of-2", "2-of-2")] == [
        "1-of-2",
        "2-of-2",
    ]
    assert shared.finished(tmp_path, "record") is None
