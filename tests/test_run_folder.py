"""Whatever happened to a run folder is told, and nothing in it is lost; the cases are a table of the docs."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models.errors import Refusal, of_storage
from models.files import hash_of
from pipeline import artifact, run_folder, verdicts
from pipeline.context import Context
from pipeline.training.checkpoints import choose
from pipeline.worker import _tells
from tests.command import ROOT

RESUME = {"mode": "continue", "from_step": None, "skip_sequences": []}
OVERWRITE = {"resume": {**RESUME, "mode": "overwrite"}}
SETTINGS = {"max_steps": 4}
DOCS = ROOT / "docs" / "concepts" / "run_folder.md"


def _build(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 9)
    (folder / "config.json").write_text("{}")


def _make(run_dir: Path) -> None:
    """distill, and prune made of it, as commands leave them."""
    with run_folder.claimed(run_dir):
        for name, parents in (("distill", []), ("prune", ["distill"])):
            found = {
                role: {"path": str(run_dir / role), "content_hash": artifact.content_hash(run_dir / role)}
                for role in parents
            }
            manifest = {"stage": name, "kind": "model", "parents": found, "config": SETTINGS, "attempt": name}
            artifact.publish(run_dir / name, _build, manifest)


def _verdicts(run_dir: Path, **words: Any) -> dict[str, str]:
    """What the same command would do with each stage now."""
    config = {
        "run_dir": str(run_dir),
        "stages": {"distill": {}, "prune": {}},
        "force": [],
        "share": None,
        "resume": RESUME,
        **words,
    }
    plan = {
        name: {"identity": SETTINGS, "parents": {p: str(run_dir / p) for p in parents}, "commits": {}, "content": ""}
        for name, parents in (("distill", []), ("prune", ["distill"]))
    }
    run_folder.check_ours(run_dir)
    with run_folder.claimed(run_dir):
        artifact.sweep(run_dir, config["stages"])
        return {job["stage"]: job["do"] for job in verdicts.jobs_of(config, plan)}


@dataclass(frozen=True)
class Case:
    happened: str
    harm: Callable[[Path], object]  # does it to a run folder, whose parent is the test's own
    told: str | None = None  # a part of the refusal; None: nothing is refused
    verdicts: tuple[str, str] = ("skip", "skip")  # of distill and prune where nothing is refused
    overwrites: bool = False  # resume=overwrite is a way out
    moved: bool = False  # the folder's place is another one afterwards
    settled: bool = False  # its files are old enough for their hashes to be remembered


def _flip(path: Path, keep_clock: bool = False) -> None:
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_clock:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _edit_manifest(path: Path, rehash: bool = True, **changes: Any) -> None:
    changed = {**artifact.checked(json.loads(path.read_text())), **changes}
    path.write_text(json.dumps(artifact.with_hash(changed) if rehash else {**json.loads(path.read_text()), **changes}))


def _fifo(path: Path) -> None:
    """Nobody will write to it: whoever reads it waits for ever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _to_scratch(folder: Path) -> None:
    elsewhere = folder.parent.parent / "scratch"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)


def _killed_between_renames(folder: Path) -> None:
    folder.rename(folder.parent / f".{folder.name}.old")
    (folder.parent / f".{folder.name}.partial").mkdir()


CASES = [
    Case("nothing", lambda r: None),
    Case(
        "a file of a finished stage is cut short",
        lambda r: os.truncate(r / "distill/model.safetensors", 5),
        "5 bytes instead of 63",
    ),
    Case("one bit of it is another", lambda r: _flip(r / "distill/model.safetensors"), "model.safetensors was changed"),
    Case(
        "the same, its time of change put back",
        lambda r: _flip(r / "distill/model.safetensors", keep_clock=True),
        "model.safetensors was changed",
    ),
    Case("a file of it is gone", lambda r: (r / "distill/config.json").unlink(), "config.json is missing"),
    Case(
        "a file was put into it",
        lambda r: (r / "distill/thesis.tex").write_text("x"),
        "thesis.tex is not of",
    ),
    Case("its manifest is cut short", lambda r: os.truncate(r / "distill/manifest.json", 99), "is not JSON"),
    Case("its manifest is `[]`", lambda r: (r / "distill/manifest.json").write_text("[]"), "is not Retort's"),
    Case(
        "its manifest is another program's",
        lambda r: (r / "distill/manifest.json").write_text('{"name": "app", "version": 3}'),
        "is not Retort's",
    ),
    Case(
        "its manifest lost its configuration",
        lambda r: _edit_manifest(r / "distill/manifest.json", config=None),
        "it has no config",
    ),
    Case(
        "its manifest names a file outside",
        lambda r: _edit_manifest(r / "distill/manifest.json", files={"../x": {"bytes": 1, "sha256": ""}}),
        "../x in a way",
    ),
    Case(
        "a figure in its manifest is another",
        lambda r: _edit_manifest(r / "distill/manifest.json", rehash=False, seconds=1),
        "manifest.json was changed",
    ),
    Case("its manifest is gone", lambda r: (r / "distill/manifest.json").unlink(), "no manifest.json"),
    Case(
        "it is another stage's",
        lambda r: (shutil.rmtree(r / "distill"), shutil.copytree(r / "prune", r / "distill")),
        "a stage prune",
    ),
    Case("it is gone", lambda r: shutil.rmtree(r / "distill"), None, ("start", "redo")),
    Case("it is a link to a folder with the same content", lambda r: _to_scratch(r / "distill")),
    Case(
        "it is a link to nowhere",
        lambda r: (_to_scratch(r / "distill"), shutil.rmtree(r.parent / "scratch")),
        "no manifest.json",
    ),
    Case("the command was killed while it was replaced", lambda r: _killed_between_renames(r / "distill")),
    Case("`work/` is gone", lambda r: shutil.rmtree(r / "work", ignore_errors=True)),
    Case("the remembered hashes are cut short", lambda r: _hashes_are(r, '{"/')),
    Case("one digit of each remembered hash is another", lambda r: _remember(r, wrong=True), settled=True),
    Case("a begun stage's `stage.json` is cut short", lambda r: _begun(r, '{"identity"'), "how the stage was begun"),
    Case("a begun stage's `stage.json` is `[]`", lambda r: _begun(r, "[]"), "how the stage was begun"),
    Case("a begun stage's `stage.json` is gone", lambda r: _begun(r, None), "and no stage.json", overwrites=True),
    Case(
        "a begun stage's `stage.json` is a FIFO",
        lambda r: _fifo(r / "work/distill/stage.json"),
        "it is no ordinary file",
    ),
    Case("its manifest is a FIFO", lambda r: _fifo(r / "distill/manifest.json"), "it is no ordinary file"),
    Case("the remembered hashes are a FIFO", lambda r: _fifo(r / "work/hashes.json")),
    Case("the folder was moved", lambda r: r.rename(r.parent / "moved"), moved=True),
    Case("its clock is set back ten years", lambda r: [os.utime(p, (4e8, 4e8)) for p in r.rglob("*")]),
    Case("its marker is gone, and artifacts alone are left", lambda r: [(r / "retort.json").unlink()]),
    Case(
        "its marker is gone, and other things lie in it",
        lambda r: ((r / "retort.json").unlink(), (r / "thesis").mkdir()),
        "it holds other things (thesis)",
    ),
]


def _hashes_are(run_dir: Path, text: str) -> None:
    (run_dir / "work").mkdir()
    (run_dir / "work" / "hashes.json").write_text(text)


SETTLED = -(10**12)  # a file that has just been written is old enough


def _remember(run_dir: Path, wrong: bool = False) -> list[int]:
    """The hashes of both stages, as a later command has them. Where each stands in the file."""
    cache = run_dir / "work" / "hashes.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "_SETTLED_NS", SETTLED)
        for name in ("distill", "prune"):
            artifact.content_hash(run_dir / name, cache)
    text = cache.read_text()
    places = [found.start() + 2 for found in re.finditer(r'"[0-9a-f]{64}"', text)]
    for place in places if wrong else ():
        text = _other_digit(text, place)
    cache.write_text(text)
    return places


def _other_digit(text: str, place: int) -> str:
    return text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :]


def _begun(run_dir: Path, text: str | None) -> None:
    shutil.rmtree(run_dir / "distill")
    (run_dir / "work" / "distill" / "checkpoints" / "step-00000004").mkdir(parents=True)
    if text is not None:
        (run_dir / "work" / "distill" / "stage.json").write_text(text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.happened)
def test_what_happened_to_a_run_folder_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    if case.settled:
        monkeypatch.setattr(artifact, "_SETTLED_NS", SETTLED)
    run_dir = tmp_path / "run"
    _make(run_dir)
    case.harm(run_dir)
    run_dir = tmp_path / "moved" if case.moved else run_dir
    before = _contents(tmp_path)
    if case.told is None:
        assert tuple(_verdicts(run_dir).values()) == case.verdicts
        return
    for words in ({},) if case.overwrites else ({}, OVERWRITE):
        with pytest.raises(Refusal, match=re.escape(case.told)) as refused:
            _verdicts(run_dir, **words)
        assert "\n" not in str(refused.value)
    assert _contents(tmp_path) == before, "what is refused is left as it is"
    if case.overwrites:
        assert _verdicts(run_dir, **OVERWRITE)["distill"] == "start"


def test_no_wrong_digit_in_what_is_remembered_becomes_the_hash_of_a_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that has no manifest, and of a finished stage."""
    monkeypatch.setattr(artifact, "_SETTLED_NS", SETTLED)
    run_dir, cache = tmp_path / "run", tmp_path / "run" / "work" / "hashes.json"
    _make(run_dir)
    (run_dir / "prune" / artifact.MANIFEST).unlink()
    truth = {name: artifact.content_hash(run_dir / name) for name in ("distill", "prune")}
    places = _remember(run_dir)
    before = cache.read_text()
    entry = {"parents": {name: str(run_dir / name) for name in truth}, "commits": {}, "content": ""}
    assert len(places) > 4
    for place in places:
        cache.write_text(_other_digit(before, place))
        found = verdicts.parents_of({"run_dir": str(run_dir), "force": []}, entry)
        assert {name: each["content_hash"] for name, each in found.items()} == truth


def test_what_is_remembered_spares_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "run")
    cache = tmp_path / "run" / "work" / "hashes.json"
    _remember(tmp_path / "run")
    monkeypatch.setattr(artifact, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
    artifact.content_hash(tmp_path / "run" / "distill", cache)


def test_the_docs_have_the_table_of_cases() -> None:
    def becomes(case: Case) -> str:
        if case.told is not None:
            return f"refused: “…{case.told}…”"
        return (
            "both are skipped" if case.verdicts == ("skip", "skip") else "it is made again, and what was made of it too"
        )

    rows = "".join(f"| {case.happened} | {becomes(case)} |\n" for case in CASES)
    table = f"| what happened | the same command then |\n|---|---|\n{rows}"
    assert table in DOCS.read_text(), f"{DOCS.name} needs this table:\n{table}"


def test_the_way_out_of_a_damaged_stage_is_to_force_it(tmp_path: Path) -> None:
    _make(tmp_path / "run")
    _flip(tmp_path / "run" / "distill" / "model.safetensors")
    assert _verdicts(tmp_path / "run", force=["distill"]) == {"distill": "redo", "prune": "redo"}


def test_a_damaged_parent_from_elsewhere_is_refused_until_its_manifest_goes(tmp_path: Path) -> None:
    _make(tmp_path / "other")
    _flip(tmp_path / "other" / "distill" / "model.safetensors")
    entry = {"parents": {"model": str(tmp_path / "other" / "distill")}, "commits": {}, "content": ""}
    config = {"run_dir": str(tmp_path / "run"), "force": []}
    with pytest.raises(
        Refusal, match=r"changed since it was made.*remove its manifest.json if you changed it on purpose"
    ):
        verdicts.parents_of(config, entry)
    (tmp_path / "other" / "distill" / "manifest.json").unlink()
    assert verdicts.parents_of(config, entry)["model"]["content_hash"] == artifact.content_hash(
        tmp_path / "other" / "distill"
    )


def test_what_hydra_writes_of_a_sweep_of_one_run_is_no_other_thing(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").touch()
    with run_folder.claimed(tmp_path):
        assert (tmp_path / run_folder.MARKER).exists()


def test_of_a_folder_with_other_things_nothing_is_touched(tmp_path: Path) -> None:
    for name in ("distill", ".config.old", "config", ".x.partial", ".notes.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "distill" / "thesis.tex").write_text("years")
    before = _contents(tmp_path)
    with pytest.raises(Refusal, match="it holds other things"):
        _verdicts(tmp_path)
    assert _contents(tmp_path) == before
    (tmp_path / run_folder.MARKER).touch()  # although it is said to be one
    with pytest.raises(Refusal, match=r"distill: it has no manifest.json"):
        _verdicts(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {".config.old", "config", ".x.partial", ".notes.old"}
    assert (tmp_path / "distill" / "thesis.tex").read_text() == "years"


def test_a_damaged_stage_of_another_experiment_is_told_before_the_report_meets_it(tmp_path: Path) -> None:
    _make(tmp_path / "run")
    artifact.publish(
        tmp_path / "run" / "older", _build, {"stage": "older", "kind": "model", "parents": {}, "config": {}}
    )
    assert _verdicts(tmp_path / "run") == {"distill": "skip", "prune": "skip"}
    os.truncate(tmp_path / "run" / "older" / "manifest.json", 40)
    with pytest.raises(Refusal, match=r"older: its manifest.json is not JSON"):
        _verdicts(tmp_path / "run")


def test_publishing_over_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    _make(tmp_path / "run")
    folder = tmp_path / "run" / "distill"
    _to_scratch(folder)
    artifact.publish(folder, _build, {"stage": "distill", "kind": "model", "parents": {}, "config": {}})
    assert not folder.is_symlink()
    assert artifact.look(folder).state == artifact.look(tmp_path / "scratch").state == "complete"
    assert _verdicts(tmp_path / "run", resume={**RESUME, "mode": "overwrite"}) == {
        "distill": "redo",
        "prune": "redo",
    }  # other settings


def _left_at(run_dir: Path, *steps: int, turns: list[dict[str, Any]] | None = None) -> None:
    """An unfinished distill with checkpoints of these steps."""
    work = run_dir / "work" / "distill"
    started = {"stage": "distill", "identity": BEGUN, "parents": {}, "restart": 0, "attempt": "a", "turns": turns or []}
    with run_folder.claimed(run_dir):
        for step in steps:
            checkpoint = work / "checkpoints" / f"step-{step:08d}"
            checkpoint.mkdir(parents=True)
            head = {"step": step, "files": []}
            artifact.write_json(checkpoint / "checkpoint.json", {**head, "sha256": hash_of(head)})
        artifact.write_json(work / "stage.json", started)
        artifact.write_json(work / artifact.PREPARED, {"statistics": {"train": {"sequences": 9}}})


BEGUN = {"training": {"optimizer": {"lr": 1.0}, "max_steps": 9}, "objective": {"alpha": 0.5}}


def _turned(run_dir: Path, told: dict[str, Any], **resume: Any) -> Any:
    """What a command with these values would do with the unfinished distill."""
    job = {"stage": "distill", "identity": told, "plan": {"parents": {}, "commits": {}, "content": ""}}
    config = {"run_dir": str(run_dir), "stages": {"distill": {}}, "force": [], "share": None}
    config["resume"] = {**RESUME, **resume}
    return verdicts.verdict_of(config, job, set()), verdicts.turn_of(
        config, verdicts.begun(run_dir / "work/distill"), told
    )


LOWER = {**BEGUN, "training": {"optimizer": {"lr": 0.1}, "max_steps": 9}}


def _ends_at(step: int) -> dict[str, Any]:
    return {**BEGUN, "training": {"optimizer": {"lr": 1.0}, "max_steps": step}}


def test_an_unfinished_stage_goes_back_to_a_checkpoint_with_other_values_of_its_training(tmp_path: Path) -> None:
    _left_at(tmp_path, 4, 8)
    assert _turned(tmp_path, BEGUN) == ("resume", None)
    turn = {"step": 4, "changed": [["training.optimizer.lr", 1.0, 0.1]], "skipped": [3]}
    assert _turned(tmp_path, LOWER, from_step=4, skip_sequences=[3]) == ("turn", turn)
    assert _turned(tmp_path, BEGUN, from_step=4) == ("turn", {"step": 4, "changed": [], "skipped": []})


def test_sequences_can_be_skipped_where_the_student_writes_the_text_too(tmp_path: Path) -> None:
    _left_at(tmp_path, 4)
    started = verdicts.begun(tmp_path / "work/distill")
    assert started is not None
    written = {**BEGUN, "on_policy": {"share": 1.0}}
    config = {"run_dir": str(tmp_path), "resume": {**RESUME, "from_step": 4, "skip_sequences": [3]}}
    turn = verdicts.turn_of(config, {**started, "identity": written}, written)
    assert turn == {"step": 4, "changed": [], "skipped": [3]}


def test_a_turn_that_was_taken_is_gone_on_in_and_not_taken_twice(tmp_path: Path) -> None:
    _left_at(tmp_path, 4, 8, turns=[{"step": 4, "changed": [], "skipped": []}])
    assert _turned(tmp_path, BEGUN, from_step=4) == ("resume", None)
    assert _turned(tmp_path, BEGUN, from_step=4, skip_sequences=[1])[0] == "turn"


@pytest.mark.parametrize(
    ("told", "resume", "message"),
    [
        (LOWER, {}, "add resume.from_step=8 to go on with them from there, resume=overwrite to redo it"),
        (_ends_at(6), {}, "add resume.from_step=4 to go on with them from there"),
        (_ends_at(4), {}, "max_steps: 9 → 4); add resume=overwrite to redo it"),
        (_ends_at(6), {"from_step": 8}, "resume.from_step=8: training ends at max_steps=6; give a step before it, or"),
        (_ends_at(8), {"from_step": 8}, "resume.from_step=8: training ends at max_steps=8; give a step before it, or"),
        (LOWER, {"from_step": 5}, "distill has none of that step; the checkpoints are of 4, 8"),
        ({**BEGUN, "objective": {"alpha": 0.3}}, {"from_step": 4}, "objective.alpha cannot change between"),
        ({**BEGUN, "objective": {"alpha": 0.3}}, {}, "add resume=overwrite to redo it"),
        ({**BEGUN, "training": {"global_batch": 16}}, {"from_step": 4}, "training.global_batch cannot change"),
    ],
)
def test_other_ways_to_go_back_are_refused(tmp_path: Path, told: Any, resume: Any, message: str) -> None:
    _left_at(tmp_path, 4, 8)
    with pytest.raises(Refusal, match=re.escape(message)):
        _turned(tmp_path, told, **resume)
    assert verdicts.steps_of(tmp_path / "work" / "distill") == [4, 8]


def test_the_way_on_from_a_number_that_is_not_finite_is_one_that_this_very_folder_takes(tmp_path: Path) -> None:
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 0.5}
    stages = {"distill": {"training": {"optimizer": {"lr": 9.0}}}, "prune": {"training": {"optimizer": optimizer}}}
    config = {"run_dir": str(tmp_path), "optimizer": optimizer, "stages": stages}
    told = "run it again with a lower stages.distill.training.optimizer.lr= (it is 9.0)"
    assert verdicts.after_not_finite(config, "distill").endswith(f"no checkpoint was saved yet; {told}")
    assert verdicts.after_not_finite(config, "prune").endswith("with a lower optimizer.lr= (it is 0.5)")
    _left_at(tmp_path, 4, 8)
    told = verdicts.after_not_finite(config, "distill")
    assert "add resume.from_step=8 (its last checkpoint) and a lower stages.distill.training.optimizer.lr=" in told
    assert "or resume.skip_sequences=[…] with the sequences of the line above" in told
    assert _turned(tmp_path, LOWER, from_step=8)[0] == _turned(tmp_path, BEGUN, from_step=8, skip_sequences=[8])[0]


def test_sequences_that_the_text_does_not_have_are_refused_before_anything_is_removed(tmp_path: Path) -> None:
    _left_at(tmp_path, 4, 8)
    before = _contents(tmp_path)
    with pytest.raises(Refusal, match=re.escape("skip_sequences=[9, 99]: the text makes 9 sequences, from 0 on")):
        _turned(tmp_path, LOWER, from_step=4, skip_sequences=[9, 8, 99])
    assert _turned(tmp_path, LOWER, from_step=4, skip_sequences=[8])[0] == "turn"
    (tmp_path / "work" / "distill" / artifact.PREPARED).write_text("{}")
    with pytest.raises(Refusal, match=r"prepared\.json does not say how many sequences there are; restore it"):
        _turned(tmp_path, LOWER, from_step=4, skip_sequences=[8])
    (tmp_path / "work" / "distill" / artifact.PREPARED).unlink()
    before = {name: content for name, content in before.items() if not str(name).endswith(artifact.PREPARED)}
    assert _contents(tmp_path) == before


def test_going_back_to_a_damaged_checkpoint_is_refused_while_the_later_ones_stand(tmp_path: Path) -> None:
    _left_at(tmp_path, 4, 8)
    _flip(tmp_path / "work" / "distill" / "checkpoints" / "step-00000004" / "checkpoint.json")
    with pytest.raises(Refusal, match=r"from_step=4: that checkpoint is damaged"):
        _turned(tmp_path, LOWER, from_step=4)
    assert verdicts.steps_of(tmp_path / "work" / "distill") == [4, 8]


def _choice(run_dir: Path) -> str | None:
    """The checkpoint that an unfinished distill goes on from."""
    found = choose(Context({"run_dir": str(run_dir)}, "distill"))
    return None if found is None else found.name


def test_a_checkpoint_that_lost_its_head_is_damaged_and_not_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _left_at(tmp_path, 4, 8)
    folder = tmp_path / "work" / "distill" / "checkpoints"
    (folder / ".step-00000012.partial").mkdir()  # it was being written
    assert _choice(tmp_path) == "step-00000008"
    assert capsys.readouterr().out == ""
    (folder / "step-00000008" / "checkpoint.json").unlink()
    assert _choice(tmp_path) == "step-00000004"
    (told,) = capsys.readouterr().out.splitlines()
    assert "step-00000008 is damaged and passed over: checkpoint.json cannot be read" in told
    (folder / "step-00000004" / "checkpoint.json").unlink()
    with pytest.raises(Refusal, match="no checkpoint is whole; restore one"):
        _choice(tmp_path)


def test_a_stage_that_was_killed_at_the_first_or_last_of_its_work_folder_is_begun(tmp_path: Path) -> None:
    """Before stage.json was in place; and while the folder was removed."""
    _make(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "distill")
    work = tmp_path / "run" / "work" / "distill"
    work.mkdir(parents=True)
    (work / ".stage.json.partial").touch()
    assert _verdicts(tmp_path / "run")["distill"] == "start"
    (work / "checkpoints").mkdir()
    (work / "stage.json").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        run_folder.clear(tmp_path / "run", "distill")
    assert [path.name for path in work.parent.iterdir() if path.is_dir()] == [".distill.old"]
    assert _verdicts(tmp_path / "run")["distill"] == "start"
    assert not any(path.is_dir() for path in work.parent.iterdir())


def test_what_a_later_turn_leaves_behind_is_no_longer_skipped_from_there() -> None:
    def skipped(*turns: tuple[int, list[int]]) -> dict[int, int]:
        return Context({}, "distill", turns=[{"step": step, "skipped": found} for step, found in turns]).skipped

    assert skipped((8, [3]), (4, [3])) == {3: 4}
    assert skipped((8, [3, 5]), (4, [7])) == {7: 4}
    assert skipped((4, [3]), (8, [3, 5])) == {3: 4, 5: 8}


def test_a_second_command_is_kept_out(tmp_path: Path) -> None:
    told = "another command is working in it"
    with run_folder.claimed(tmp_path / "run"), pytest.raises(Refusal, match=told):
        _verdicts(tmp_path / "run")
    assert f"| {told} | refused: “…{told}…” |" in DOCS.read_text()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda lock: lock.symlink_to(lock.parent / "thesis"), "is a link"),
        (lambda lock: lock.symlink_to("/nowhere"), "is a link"),
        (lambda lock: lock.mkdir(), "is a folder"),
        (os.mkfifo, "is no ordinary file"),
    ],
    ids=["link", "link to nowhere", "folder", "FIFO"],
)
def test_a_lock_that_is_no_file_is_refused_and_what_it_leads_to_stays(
    tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    (tmp_path / "retort.json").touch()
    (tmp_path / "thesis").write_text("mine")
    make(tmp_path / ".lock")
    with pytest.raises(Refusal, match=rf"/\.lock {told}, .*; remove it$"), run_folder.claimed(tmp_path):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"
    assert "| its `.lock` is a link, a folder or a FIFO | refused: “….lock is…” |" in DOCS.read_text()


def test_a_second_name_of_ones_own_file_that_lies_there_as_the_lock_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "retort.json").touch()
    (tmp_path / "thesis").write_text("mine")
    os.link(tmp_path / "thesis", tmp_path / ".lock")
    with run_folder.claimed(tmp_path):
        assert (tmp_path / "thesis").read_text() == "mine"


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.json", "config.json"])
def test_a_report_of_ones_own_keeps_a_folder_from_becoming_a_run_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(Refusal, match=f"it holds other things .{name}."), run_folder.claimed(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(Refusal, match="a file of that name"):
        run_folder.check_ours(tmp_path / "run")


def test_a_write_that_the_file_system_refuses_leaves_the_old_artifact_and_says_where(tmp_path: Path) -> None:
    """A limit on the size of files, as a quota is; in a process of its own, since it cannot be lifted again."""
    _make(tmp_path / "run")
    before = _contents(tmp_path)
    code = """
import sys
from pathlib import Path
from models.errors import of_storage
from pipeline import artifact
def build(folder):
    (folder / "model.safetensors").write_bytes(bytes(100_000))
try:
    artifact.publish(Path(sys.argv[1]), build, {"stage": "distill", "kind": "model", "parents": {}, "config": {}})
except OSError as problem:
    print(of_storage(problem, Path(sys.argv[1])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run" / "distill")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 0, done.stderr
    told = r".*: File too large, by a limit on .* \([\d.]+ GB are free there\); what was finished is whole.*\n"
    assert re.fullmatch(told, done.stdout)
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    "raised",
    [
        OSError(122, "Disk quota exceeded", "/nowhere/config.json"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_errors_of_storage_are_known_in_whatever_words(tmp_path: Path, raised: Exception) -> None:
    told = of_storage(raised, tmp_path)
    assert told is not None
    assert "GB are free there" in told
    outer = RuntimeError("saving failed")
    outer.__cause__ = raised
    assert of_storage(outer, tmp_path) == told
    assert of_storage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), tmp_path) is None


def test_a_folder_that_cannot_be_written_to_has_another_remedy_than_space(tmp_path: Path) -> None:
    told = of_storage(PermissionError(13, "Permission denied", str(tmp_path / "config.json")), tmp_path)
    assert told == f"{tmp_path}/config.json: Permission denied; choose a run_dir that can be written to"
    told = of_storage(PermissionError(13, "Permission denied", "/elsewhere/train.jsonl"), tmp_path)
    assert told == "/elsewhere/train.jsonl: Permission denied; ask for access to it"


def test_what_was_being_handled_is_not_the_reason_unless_there_is_no_room(tmp_path: Path) -> None:
    def raised_while_handling(handled: Exception) -> Exception:
        try:
            try:
                raise handled
            except OSError:
                {}["key"]
        except KeyError as found:
            return found
        raise AssertionError

    assert of_storage(raised_while_handling(PermissionError(13, "Permission denied", "/cache/x")), tmp_path) is None
    assert "No space left" in str(of_storage(raised_while_handling(OSError(28, "No space left on device")), tmp_path))


def test_what_killed_checks_left_in_the_temporary_folder_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = Path(tempfile.mkdtemp(prefix="retort-check-"))
    (left / "spec.json").touch()
    Path(tempfile.mkdtemp(dir=left), "plan").mkdir()
    os.utime(left, (0, 0))
    with run_folder.scratch() as mine:
        assert not left.exists()
        os.utime(mine, (0, 0))  # as if it ran for long
        with run_folder.scratch() as other:
            assert mine.exists()
            assert other != mine
    assert not list(tmp_path.iterdir())


def test_what_a_rank_left_there_to_say_that_it_has_told_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert _tells("run", {"attempt": uuid.uuid4().hex, "restart": 3})
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with run_folder.scratch():
        assert not left.exists()


def test_other_things_of_such_a_name_in_the_temporary_folder_are_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("retort-check-thesis", "retort-check-mythesis"):  # the second as long as ours are
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    os.mkfifo(tmp_path / "retort-check-afifo_78")
    (tmp_path / "retort-check-alink_78").symlink_to(tmp_path / "retort-check-mythesis")
    before = _contents(tmp_path)
    with run_folder.scratch():
        pass
    assert _contents(tmp_path) == before


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Of all files and links; the lock and what is remembered of hashes are left out."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if not (p.is_dir() and not p.is_symlink()) and p.name not in (".lock", "hashes.json")
    }
