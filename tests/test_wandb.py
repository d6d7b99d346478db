"""What is logged to Weights & Biases: read back from an offline run's own file, or told to a stand-in for a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from callbacks import tracking, wandb_run
from callbacks.metrics import MetricsFile
from models.errors import STOPPED, TERMINATED, Refusal, Stopped
from pipeline import artifact
from pipeline.command_line import arguments
from pipeline.config import Config, parse
from pipeline.context import Context
from pipeline.tracked import closed, run_name, tracked
from tests.command import ROOT
from tests.test_callbacks import CONF, fit, tracker

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whoever runs the tests may have a W&B account: it is not used."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield
    wandb_run.end()
    wandb.teardown()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in one offline run."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_wandb_without_an_account_goes_offline_in_one_line_and_reads_back(tmp_path, capfd):
    folder = tmp_path / "logs" / "distill"
    fit(tmp_path, 3, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("wandb", folder))
    wandb_run.end()
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "wandb" in line.lower() or "W&B" in line]
    assert len(said) == 1
    assert said[0].startswith("W&B: offline, no account found (wandb login); later: wandb sync ")
    synced = Path(said[0].split("wandb sync ")[1])
    records = records_of(synced)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["job_type"]) == ("retort", "quick start", "distill")
    assert run["display_name"] == "quick start-distill"
    assert run["run_id"].startswith("quick-start-distill-")
    assert run["run_id"].endswith("-r0")
    assert run["config"]["update"]["seed"] == 3
    assert run["config"]["update"]["stages"] == {"distill": {"temperature": 2.0, "layers": [0, 2]}}
    history = history_of(records)
    assert [(row["trainer/global_step"], row["loss"], row["tokens"]) for row in history] == [
        (1, 1.0, 8),
        (2, 0.5, 16),
        (3, 1 / 3, 24),
    ]
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]


def test_wandb_offline_restart_is_a_run_of_its_own_that_holds_all_steps(tmp_path):
    folder = tmp_path / "logs" / "distill"
    fit(tmp_path, 3, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("wandb", folder, mode="offline"))
    wandb_run.end()
    fit(
        tmp_path,
        5,
        MetricsFile(tmp_path / "metrics.jsonl"),
        resume=True,
        logger=tracker("wandb", folder, restart=1, mode="offline"),
    )
    wandb_run.end()
    first, second = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.name[-2:])
    assert first.name.endswith("-r0")
    assert second.name.endswith("-r1")
    assert first.name.rsplit("-", 2)[1] == second.name.rsplit("-", 2)[1]
    history = history_of(records_of(second))
    assert [row["trainer/global_step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]


class Online:
    """A server's side of a run that knows steps up to `known`; records what reaches it."""

    def __init__(self, known: int | None) -> None:
        self.resumed, self.summary = known is not None, {"trainer/global_step": known}
        self.id, self.url, self.logged, self.finished = "id", "https://example.invalid/run", [], None

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


def test_wandb_online_goes_on_in_the_same_run_and_sends_no_step_twice(monkeypatch, tmp_path):
    import wandb

    folder, asked, runs = tmp_path / "logs" / "distill", [], [Online(None), Online(3)]
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", lambda **words: asked.append(words) or runs[len(asked) - 1])
    fit(tmp_path, 2, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("wandb", folder))
    wandb_run.end()
    fit(tmp_path, 5, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("wandb", folder, restart=1), resume=True)
    wandb_run.end()
    assert [(words["mode"], words["resume"]) for words in asked] == [("online", "allow")] * 2
    assert asked[0]["id"] == asked[1]["id"]
    assert [row["trainer/global_step"] for row in runs[1].logged] == [4, 4, 5]  # 4 is trained and validated
    assert [run.finished for run in runs] == [0, 0]


def context_of(run_dir: Path, stage: str = "distill", **words: Any) -> Context:
    """Of a stage of a run that logs to W&B."""
    logger = {"_target_": "callbacks.tracking.wandb", "project": "retort", "mode": "auto"}
    stages = {"distill": {"_target_": "pipeline.stages.distill.Distill"}}
    config = {"name": "demo", "run_dir": str(run_dir), "logger": logger, "stages": stages, "seed": 0}
    return Context(config, stage, **words)


@pytest.mark.parametrize(
    ("problem", "code", "preempting"),
    [(RuntimeError("the disk is full"), 1, 0), (Stopped(3, STOPPED), STOPPED, 1)],
)
def test_a_run_that_made_way_is_preempted_and_one_that_failed_is_not(
    tmp_path: Path, problem: BaseException, code: int, preempting: int
) -> None:
    class Ending(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise problem

    context = context_of(tmp_path / "demo")
    folder = context.run_dir / "logs" / "distill"
    with pytest.raises(type(problem)), tracked(context):
        fit(tmp_path, 2, MetricsFile(tmp_path / "metrics.jsonl"), Ending(), logger=tracker("wandb", folder))
    (synced,) = (folder / "wandb").glob("offline-run-*")
    records = records_of(synced)
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [code]
    assert sum(record["type"] == "preempting" for record in records) == preempting
    assert [row["loss"] for row in history_of(records)] == [1.0]


def made(run_dir: Path, stage: str, text: str, **parents: dict[str, str]) -> dict[str, Any]:
    """A finished stage of one file."""
    return artifact.publish(
        run_dir / stage,
        lambda folder: (folder / "weights").write_text(text) and None,
        {
            "stage": stage,
            "kind": "model",
            "config": {},
            "parents": parents,
            "metrics": {"parameters": 7},
            "seconds": 1.5,
        },
    )


def told(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The artifacts that the last run of a stage has logged, and what it says of itself."""
    folder = sorted((run_dir / "logs" / stage / "wandb").glob("offline-run-*"))[-1]
    return [record["artifact"] for record in records_of(folder) if record["type"] == "artifact"]


def test_what_one_stage_makes_is_what_the_next_one_used(tmp_path: Path) -> None:
    """Stages that do not train: their runs are of their results alone. Nothing of the files is copied."""
    run_dir = tmp_path / "demo"
    teacher = made(run_dir, "pretrain", "abc")
    text = {"path": "mine.jsonl", "content_hash": "ab" * 32}
    parent = {"path": str(run_dir / "pretrain"), "content_hash": teacher["content_hash"]}
    hub = {"path": "org/model", "content_hash": "hub:org/model@12ab"}
    made(run_dir, "distill", "de", teacher=parent, student=hub, data=text)
    for stage in ("pretrain", "distill"):
        with tracked(context_of(run_dir, stage)):
            pass
    (output,) = told(run_dir, "pretrain")
    used, used_hub, used_text, own = told(run_dir, "distill")
    assert [used.get("use_after_commit"), own.get("use_after_commit")] == [True, None]
    for name in ("name", "type", "digest"):
        assert output[name] == used[name]
    assert (own["name"], own["type"]) == ("demo-distill", "model")
    assert (used_hub["name"], used_text["name"], used_text["type"]) == ("org-model", "demo-text", "dataset")
    assert {entry["ref"] for entry in used_hub["manifest"]["contents"]} >= {
        "https://huggingface.co/org/model/tree/12ab"
    }
    references = {entry["ref"] for entry in own["manifest"]["contents"]}
    assert (run_dir / "distill" / "weights").as_uri() in references
    assert json.loads(own["metadata"])["content_hash"] in references
    assert not [path for path in (run_dir / "logs").rglob("*") if path.name == "weights"]
    made(run_dir, "pretrain", "abd")
    with tracked(context_of(run_dir, "pretrain", restart=1)):
        pass
    assert told(run_dir, "pretrain")[0]["digest"] != output["digest"]  # another version, in the same place


def test_the_result_of_a_training_is_logged_in_the_run_of_its_curves(tmp_path: Path) -> None:
    context = context_of(tmp_path / "demo")
    folder = context.run_dir / "logs" / "distill"
    with tracked(context):
        fit(tmp_path, 2, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("wandb", folder))
        made(context.run_dir, "distill", "de")
    (synced,) = (folder / "wandb").glob("offline-run-*")
    records = records_of(synced)
    assert [row["loss"] for row in history_of(records)] == [1.0, 0.5]
    assert [record["artifact"]["type"] for record in records if record["type"] == "artifact"] == ["model"]
    summary = {k: v for r in records if r["type"] == "summary" for k, v in r["summary"].get("update", {}).items()}
    assert (summary["result/metrics/parameters"], summary["result/seconds"]) == (7, 1.5)
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]


def test_other_ranks_and_other_loggers_log_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path / "demo")
    made(context.run_dir, "distill", "de")
    monkeypatch.setenv("RANK", "1")
    with tracked(context):
        pass
    monkeypatch.setenv("RANK", "0")
    for logger in (None, {"_target_": "callbacks.tracking.csv"}):
        with tracked(Context({**context.config, "logger": logger}, "distill")):
            pass
        closed({**context.config, "logger": logger}, REPORT)
    assert not (context.run_dir / "logs").exists()


def test_a_tracker_that_fails_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path / "demo")
    made(context.run_dir, "distill", "de")

    def failing(*_: Any) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(wandb_run, "log_result", failing)
    monkeypatch.setattr(wandb_run, "log_table", failing)
    with tracked(context):
        pass
    closed(context.config, REPORT)
    said = [line for line in capsys.readouterr().out.splitlines() if "no such host" in line]
    assert said == [
        "W&B: distill is done, and not all of it is logged: no such host",
        "W&B: the report's table is not logged: no such host",
    ]
    assert wandb_run.opened() is None


REPORT = {
    "rows": [
        {"stage": "teacher", "perplexity": 3.5, "runtime": None},
        {"stage": "export/gguf", "perplexity": 4, "runtime": "llama.cpp"},
    ],
    "comparisons": [{"stage": "distill", "against": "control", "interval": [0.1, 0.2]}],
    "verdicts": [
        {"stage": "export", "against": "a", "verdict": "worse", "sentence": "it is", "perplexity": {"p": None}}
    ],
}


def test_the_closing_table_is_a_run_of_its_own_in_the_same_group(tmp_path: Path) -> None:
    context = context_of(tmp_path / "demo")
    for _ in range(2):  # the second time with a stage more
        closed(context.config, REPORT)
    first, second = sorted(
        (context.run_dir / "logs" / "report" / "wandb").glob("offline-run-*"), key=lambda p: p.name[-2:]
    )
    assert (first.name[-3:], second.name[-3:]) == ("-r0", "-r1")
    records = records_of(second)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_group"], run["job_type"]) == ("demo", "report")
    (row,) = history_of(records)
    assert (row["teacher/perplexity"], row["export/gguf/perplexity"]) == (3.5, 4)
    tables = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in second.rglob("*.table.json")}
    assert tables["report"]["columns"] == ["stage", "perplexity", "runtime"]
    assert tables["report"]["data"] == [["teacher", 3.5, None], ["export/gguf", 4, "llama.cpp"]]
    assert tables["verdicts"]["data"] == [["export", "a", "worse", "it is"]]
    assert tables["comparisons"]["data"] == [["distill", "control", "[0.1, 0.2]"]]
    staged = [record["artifact"]["manifest"]["contents"][0]["local_path"] for record in records if "artifact" in record]
    assert staged
    assert all(Path(path).is_relative_to(context.run_dir) and Path(path).exists() for path in staged)  # for the sync


def test_runs_of_one_name_in_several_folders_are_groups_of_their_own() -> None:
    assert run_name({"name": "demo", "run_dir": "runs/demo"}) == "demo"
    assert run_name({"name": "demo", "run_dir": "runs/sweep/a1"}) == "demo-a1"


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_of_the_runs_of_a_sweep_the_closing_one_is_the_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent names one run of its sweep; a stage that took the name would have its steps mixed with the others'."""
    import wandb

    asked: list[tuple[Any, dict[str, str | None]]] = []

    def init(**words: Any) -> Any:
        asked.append((words.get("id"), {name: os.environ.get(name) for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID")}))
        return Online(None)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    agent = {"WANDB_RUN_ID": "agents", "WANDB_SWEEP_ID": "sweep"}
    for name, value in agent.items():
        monkeypatch.setenv(name, value)
    context = context_of(tmp_path / "demo")
    closed(context.config, REPORT)
    made(context.run_dir, "distill", "de")
    with tracked(context):
        pass
    (closing, kept), (stage, removed) = asked
    assert closing is None
    assert kept == agent
    assert stage.startswith("demo-distill-")
    assert removed == {"WANDB_RUN_ID": None, "WANDB_SWEEP_ID": None}


ConfigStore.instance().store(name="schema", node=Config)  # as train.py does


def test_the_example_of_a_sweep_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B's agent puts the command together, with the first and the last value of each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    found = []
    for end in (0, -1):
        values = {
            name: node["values"][end] if "values" in node else (node["min"], node["max"])[end]
            for name, node in sweep["parameters"].items()
        }
        given = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        words: list[str] = []
        for word in create_sweep_command([*sweep["command"]]):
            macro = word[2:-1] if word.startswith("${") and word.endswith("}") else None
            words += [word] if macro is None else given.get(macro, [])
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments(words)])
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = parse(compose("config", overrides=sys.argv[1:]))
        assert config["run_dir"] == "runs/sweep/abc"
        assert config["logger"]["_target_"] == "callbacks.tracking.wandb"
        training, objective = (config["stages"]["distill"][key] for key in ("training", "objective"))
        assert training["optimizer"]["lr"] == values["optimizer.lr"]
        assert objective["alpha"] == values["objective.alpha"]
        found.append(objective["divergence"]["_target_"].rpartition(".")[2])
    assert found == ["ForwardKL", "JensenShannon"]
    stage, _, figure = sweep["metric"]["name"].partition("/")
    assert stage in config["order"]
    assert figure == "perplexity"


def test_wandb_whose_server_does_not_answer_goes_offline_unless_online_is_asked_for(monkeypatch, tmp_path, capsys):
    import wandb

    started = wandb.init

    def unreachable(**words: Any) -> Any:
        if words["mode"] == "online":
            raise wandb.errors.CommError("no such host\nConsider increasing the init_timeout")
        return started(**words)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    tracker("wandb", tmp_path / "logs").finalize("success")
    assert capsys.readouterr().out.startswith("W&B: offline, no such host; later: wandb sync ")
    with pytest.raises(Refusal, match=r"logger\.mode=online: no such host; use logger.mode=auto or offline"):
        tracker("wandb", tmp_path / "logs", mode="online")


def test_wandb_online_without_an_account_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"logger\.mode=online: W&B finds no account"):
        tracker("wandb", tmp_path / "logs", mode="online")


def test_a_fresh_start_in_a_used_log_folder_is_a_new_wandb_run(tmp_path):
    first, again, anew = (tracking._identity(tmp_path, "a-b", restart) for restart in (0, 1, 0))
    assert first == again
    assert anew != first


def end_service() -> None:
    """By SIGTERM, of the process of W&B's own that this one has started."""
    import wandb

    started: Any = wandb.setup()
    process = started._connection._proc._process
    process.terminate()
    process.wait()


@pytest.mark.parametrize("problem", [Stopped(3, STOPPED), Stopped(3, TERMINATED)])
def test_a_training_whose_wandb_service_is_killed_goes_on_and_ends_as_it_would(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], problem: Stopped
) -> None:
    """A preemption signals every process of the step, the service too."""

    class Signalled(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                end_service()
            if trainer.global_step == 3:
                raise problem

    context = context_of(tmp_path / "demo")
    metrics = tmp_path / "metrics.jsonl"
    folder = context.run_dir / "logs" / "distill"
    with pytest.raises(Stopped) as ended, tracked(context):
        fit(tmp_path, 5, MetricsFile(metrics), Signalled(), logger=tracker("wandb", folder))
    assert ended.value is problem
    assert [json.loads(line)["loss"] for line in metrics.read_text().splitlines()[:2]] == [1.0, 0.5]
    told = [line for line in capfd.readouterr().out.splitlines() if "goes on without it" in line]
    assert len(told) == 1


def test_a_service_that_is_killed_at_the_end_does_not_hide_why_the_stage_ended(tmp_path: Path) -> None:
    class Signalled(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            end_service()
            raise Stopped(1, TERMINATED)

    context = context_of(tmp_path / "demo")
    with pytest.raises(Stopped), tracked(context):
        fit(tmp_path, 2, Signalled(), logger=tracker("wandb", context.run_dir / "logs" / "distill"))


def test_a_tracker_that_raises_does_not_replace_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.Wandb, "ended", lambda *_: {}["a bug"])
    with pytest.raises(Stopped), tracked(context_of(tmp_path / "demo")):
        raise Stopped(1, STOPPED)


def test_why_a_stage_failed_is_kept_before_a_tracker_that_does_not_answer_and_it_is_not_waited_for(
    tmp_path: Path,
) -> None:
    """In a process of its own, which must end with its own status, whatever holds the tracker's threads."""
    script = """
import sys, threading
from callbacks import tracking
from pipeline import tracked, worker
import pipeline.building
class Failing:
    def run(self, context): raise ValueError("a defect")
    def prepare(self, context): pass
def hanging(*_):
    import pathlib
    print("told first:", len(list(pathlib.Path(sys.argv[2]).glob("rank-*.error.json"))), flush=True)
    threading.Event().wait()
tracking.Wandb.ended = hanging
tracked._SECONDS = 0.2
pipeline.building.build = lambda *_: Failing()
sys.exit(worker.main(["run", sys.argv[1]]))
"""
    context = context_of(tmp_path / "demo", attempt="ab")
    (tmp_path / "logs").mkdir()
    spec = {
        **{name: getattr(context, name) for name in ("config", "stage")},
        "parents": {},
        "identity": {},
        "restart": 0,
        "attempt": "ab",
    }
    artifact.write_json(tmp_path / "spec.json", artifact.with_hash(spec))
    words = [sys.executable, "-c", script, str(tmp_path / "spec.json"), str(tmp_path / "logs")]
    env = {**os.environ, "RETORT_LOGS": str(tmp_path / "logs"), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=100)
    assert "told first: 1" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "ValueError: a defect" in done.stderr
    assert "the tracker does not answer" in done.stdout
    kept = json.loads((tmp_path / "logs" / "rank-00000.error.json").read_text())
    assert kept["message"] == "ValueError: a defect"
