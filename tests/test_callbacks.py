"""What watches a training run: on a real Trainer, over one Linear layer."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from callbacks import tracking
from callbacks.checkpoint import Checkpoint
from callbacks.metrics import MetricsFile
from callbacks.progress import Progress
from callbacks.watchdog import Watchdog
from models.errors import NotFinite, Refusal
from models.training.checkpoint import Share, restore, write
from models.training.saved import checkpoints, damage, read_head

# Lightning 2.6.6 builds torch's LeafSpec, which torch 2.13 deprecates; its advice about workers and resumable loaders
# is for real data, of which there is none here; a machine that has Slurm need not run the tests under it.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]

CONF = Path(__file__).parents[1] / "conf"
CONFIG = {"seed": 3, "stages": {"distill": {"temperature": 2.0, "layers": [0, 2]}}}


class Line(pl.LightningModule):
    """Measures itself the way the project's module does; the loss at step k is 1/k, so that every line is known."""

    def __init__(self, log_every: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.log_every = log_every
        self.step_metrics: dict[str, float] | None = None
        self.validation_metrics: dict[str, float] = {}
        self.checkpoint: Path | None = None

    def trained_by_name(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.named_parameters())

    def so_far(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {"validated_at": self.validation_metrics.get("step")}, {}

    def go_on(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        pass

    def on_fit_start(self) -> None:
        if self.checkpoint is not None:
            restore(self.trainer, self, self.checkpoint)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def optimizer_step(self, *arguments: Any, **words: Any) -> None:
        super().optimizer_step(*arguments, **words)
        step = self.trainer.global_step + 1  # Lightning counts it right after this hook
        if step % self.log_every == 0:
            self.step_metrics = {"step": step, "loss": 1 / step, "tokens": 8 * step, "tokens_per_second": 2000.0}

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        step = self.trainer.global_step
        self.validation_metrics = {"step": step, "validation_loss": 2 / (step + 1), "tokens": 8 * step}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.ones(400, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]


def fit(root: Path, steps: int, *callbacks: pl.Callback, resume: bool = False, **words: Any) -> pl.Trainer:
    """Train to `steps` and leave a checkpoint; with `resume`, go on from the last one."""
    module = Line(words.pop("log_every", 1))
    if resume:
        module.checkpoint = checkpoints(root / "left")[-1]
    accumulation = words.get("accumulate_grad_batches", 1)
    words = {"logger": False, "val_check_interval": 4 * accumulation, "num_sanity_val_steps": 1, **words}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=root,
        callbacks=list(callbacks),
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **words,
    )
    trainer.fit(module)
    if not trainer.interrupted:
        Checkpoint(root / "left", None, None).save(trainer, module, asynchronous=False)
    return trainer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_metrics_file_holds_every_step_and_every_validation_once_and_in_order(tmp_path):
    fit(tmp_path, 6, MetricsFile(tmp_path / "a" / "metrics.jsonl"))
    found = lines(tmp_path / "a" / "metrics.jsonl")
    assert [(line["step"], line.get("loss"), line.get("validation_loss")) for line in found] == [
        (1, 1.0, None),
        (2, 1 / 2, None),
        (3, 1 / 3, None),
        (4, 1 / 4, None),
        (4, None, 2 / 5),
        (5, 1 / 5, None),
        (6, 1 / 6, None),
    ]
    assert found[1] == {"step": 2, "loss": 0.5, "tokens": 16, "tokens_per_second": 2000.0}


def test_accumulated_micro_batches_and_steps_between_logs_add_no_line(tmp_path):
    fit(tmp_path, 6, MetricsFile(tmp_path / "metrics.jsonl"), accumulate_grad_batches=3, log_every=2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl") if "loss" in line] == [2, 4, 6]


def test_a_line_is_on_file_before_the_callbacks_after_it_run(tmp_path):
    seen = []

    class Checkpoint(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append((trainer.global_step, lines(tmp_path / "metrics.jsonl")[-1]["step"]))

    fit(tmp_path, 3, MetricsFile(tmp_path / "metrics.jsonl"), Checkpoint())
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_restarted_run_has_the_same_metrics_file_as_an_uninterrupted_one(tmp_path):
    fit(tmp_path / "whole", 9, MetricsFile(tmp_path / "whole" / "metrics.jsonl"))
    path = tmp_path / "cut" / "metrics.jsonl"
    fit(tmp_path / "cut", 5, MetricsFile(path))
    with path.open("a") as file:  # what a killed run had written after its last checkpoint, the last line torn
        file.write('{"step": 6, "loss": 99}\n{"step": 7, "loss": 99}\n{"step": 8, "lo')
    fit(tmp_path / "cut", 9, MetricsFile(path), resume=True)
    assert path.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("key", ["step", "loss"])
@pytest.mark.parametrize("bit", range(8))
def test_a_letter_that_was_changed_costs_its_own_line_at_most(tmp_path, key, bit):
    path = tmp_path / "metrics.jsonl"
    fit(tmp_path, 5, MetricsFile(path))
    content = bytearray(path.read_bytes())
    before = lines(path)
    content[content.index(f'"{key}": '.encode(), len(content) // 2) + 1] ^= 1 << bit
    path.write_bytes(content)
    fit(tmp_path, 7, MetricsFile(path), resume=True)
    assert len([line for line in before if line in lines(path)]) >= len(before) - 1
    assert lines(path)[-1]["step"] == 7


@pytest.mark.parametrize(
    "line", ["[]", "3", "null", '{"loss": 1}', '{"step": "2"}', '{"step": 2, "loss": "x"}', '{"step": 2, "loss": []}']
)
def test_lines_of_others_are_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    fit(tmp_path, 2, MetricsFile(path))
    before = lines(path)
    path.write_text(path.read_text() + line + "\n")
    fit(tmp_path, 3, MetricsFile(path), resume=True)
    assert lines(path)[:-1] == before


def test_a_run_killed_before_its_first_checkpoint_begins_its_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n\0\0\0')
    fit(tmp_path, 2, MetricsFile(tmp_path / "metrics.jsonl"))
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [1.0, 0.5]


def test_a_loss_that_is_no_number_is_null_and_the_line_stays_json(tmp_path):
    class Broken(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Line, *_: Any) -> None:
            module.step_metrics = {"step": trainer.global_step, "loss": float("nan"), "tokens": 0}

    fit(tmp_path, 1, Broken(), MetricsFile(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "tokens": 0}\n'


def test_a_link_beside_the_metrics_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in (".metrics.jsonl.partial", ".metrics.jsonl.aside", "metrics.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    fit(tmp_path, 2, MetricsFile(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    class Rank(pl.Callback):
        def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainer.strategy.__class__ = type("Other", (type(trainer.strategy),), {"is_global_zero": False})

    out = io.StringIO()
    fit(tmp_path, 2, Rank(), MetricsFile(tmp_path / "metrics.jsonl"), Progress("distill", console=Console(file=out)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert out.getvalue() == ""


# --- checkpoints ---------------------------------------------------------------------------------------------------


def fit_with_checkpoints(root: Path, steps: int, callback: type[Checkpoint] = Checkpoint, **words: Any) -> Path:
    folder = root / "checkpoints"
    found = checkpoints(folder)
    if found:
        (root / "left").mkdir(exist_ok=True)
        shutil.copytree(found[-1], root / "left" / found[-1].name, dirs_exist_ok=True)
    fit(root, steps, callback(folder, every_steps=2, every_minutes=None, **words), resume=bool(found))
    return folder


def steps_of(folder: Path) -> list[int]:
    """Of the checkpoints in it, each of which must be whole, with nothing else beside them."""
    assert sorted(folder.iterdir()) == checkpoints(folder)
    assert [damage(path) for path in checkpoints(folder)] == [None] * len(checkpoints(folder))
    return [read_head(path)["step"] for path in checkpoints(folder)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_two_checkpoints_are_kept_and_nothing_else_lies_there(tmp_path, asynchronous):
    assert steps_of(fit_with_checkpoints(tmp_path, 5, asynchronous=asynchronous)) == [4, 5]


def test_a_checkpoint_holds_the_weights_of_its_step_although_training_went_on_while_it_was_written(tmp_path):
    """Written only when two further steps have been made."""
    weights, gate = {}, threading.Event()

    class Slow(Checkpoint):
        def _write(self, mine: Any) -> None:
            gate.wait(10)
            super()._write(mine)

        def on_train_batch_end(self, trainer: pl.Trainer, module: Line, *words: Any) -> None:
            weights[trainer.global_step] = module.layer.weight.detach().clone()
            super().on_train_batch_end(trainer, module, *words)
            if trainer.global_step == 3:
                gate.set()

    first, *_ = checkpoints(fit_with_checkpoints(tmp_path, 4, Slow))
    saved = load_file(first / "rank-00000.safetensors")
    assert torch.equal(saved["layer.weight|0|value"], weights[2].view(-1))
    assert not torch.equal(weights[2], weights[3])


def test_safetensors_itself_reads_what_was_written(tmp_path):
    """Every dtype and shape, also none at all; the header is our own."""
    tensors = {
        "a|0|value": torch.randn(7),
        "a|0|exp_avg": torch.randn(5).bfloat16(),
        "a|step": torch.tensor(3.0),
        "|ids": torch.arange(3, dtype=torch.int32),
        "|empty": torch.zeros(0, dtype=torch.int64),
        "|flags": torch.tensor([True, False]),
    }
    write(Share(0, 1, tensors, {}), tmp_path)
    found = load_file(tmp_path / "rank-00000.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_write_that_fails_stops_training_and_leaves_the_checkpoint_before(tmp_path):
    class Full(Checkpoint):
        def _write(self, mine: Any) -> None:
            if mine.head["step"] == 4:
                mine.tensors["more"] = torch.zeros(1, dtype=torch.complex128)  # no such dtype can be written
            super()._write(mine)

    with pytest.raises(Refusal, match="cannot be written"):
        fit_with_checkpoints(tmp_path, 6, Full)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert steps_of(fit_with_checkpoints(tmp_path, 6)) == [4, 6]  # what was half written is gone


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from callbacks import checkpoint
from tests.test_callbacks import fit_with_checkpoints

finish, write = checkpoint.finish, checkpoint.write

def killed(mine, *words):
    if mine.head["step"] == 4 and sys.argv[2] == "while its part is written":
        path = words[0] / "rank-00000.safetensors"
        write(mine, *words)
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write(mine, *words)

def ended(mine, *words):
    if mine.head["step"] == 4 and sys.argv[2] == "before it is renamed":
        os.kill(os.getpid(), signal.SIGKILL)
    finish(mine, *words)
    if mine.head["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write, checkpoint.finish = killed, ended
fit_with_checkpoints(Path(sys.argv[1]), 6)
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [("while its part is written", [2]), ("before it is renamed", [2]), ("before an older one is removed", [2, 4])],
)
def test_killed_while_a_checkpoint_is_written_the_one_before_it_is_whole(tmp_path, moment, left):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONF.parent)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = checkpoints(tmp_path / "checkpoints")
    assert [read_head(path)["step"] for path in whole] == left
    assert [damage(path) for path in whole] == [None] * len(left)
    assert steps_of(fit_with_checkpoints(tmp_path, 6)) == [4, 6]


def test_a_checkpoint_of_a_step_that_validates_has_the_figures_of_that_validation(tmp_path):
    """Line validates every 4 steps."""
    told = {}

    class Seen(Checkpoint):
        def _write(self, mine: Any) -> None:
            told[mine.head["step"]] = mine.head["so_far"]["validated_at"]
            super()._write(mine)

    fit_with_checkpoints(tmp_path, 9, Seen)
    assert told == {2: 0, 4: 4, 6: 4, 8: 8, 9: 8}


def test_damaged_checkpoints_that_were_passed_over_are_not_counted_among_those_kept(tmp_path):
    fit_with_checkpoints(tmp_path, 4)
    first, second = checkpoints(tmp_path / "checkpoints")
    (second / "rank-00000.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "left")
    shutil.copytree(first, tmp_path / "left" / first.name)
    fit(tmp_path, 3, Checkpoint(tmp_path / "checkpoints", every_steps=1, every_minutes=None), resume=True)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["damaged-step-00000004", "step-00000002", "step-00000003"]


def test_a_checkpoint_of_the_same_step_may_be_damaged_again(tmp_path):
    folder = fit_with_checkpoints(tmp_path, 4)
    for content in (b"first", b"second"):
        (folder / "step-00000004" / "rank-00000.safetensors").write_bytes(content)
        shutil.rmtree(tmp_path / "left")
        shutil.copytree(folder / "step-00000002", tmp_path / "left" / "step-00000002")
        fit(tmp_path, 4, Checkpoint(folder, every_steps=2, every_minutes=None), resume=True)
        assert [damage(path) for path in checkpoints(folder)] == [None, None]
    assert (folder / "damaged-step-00000004" / "rank-00000.safetensors").read_bytes() == b"second"


def test_a_checkpoint_is_not_written_into_what_a_link_leads_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000002.partial").symlink_to(tmp_path / "mine")
    assert steps_of(fit_with_checkpoints(tmp_path, 2)) == [2]
    assert not list((tmp_path / "mine").iterdir())


def test_a_copy_under_another_name_is_neither_a_checkpoint_nor_removed(tmp_path):
    folder = fit_with_checkpoints(tmp_path, 4)
    names = ["step-00000002.bak", "step-mine", "step-2", "step-000000002", "step-00000004 copy"]
    for name in names:
        shutil.copytree(folder / "step-00000002", folder / name)
    (folder / "step-00000009").touch()  # a file
    assert [path.name for path in checkpoints(folder)] == ["step-00000002", "step-00000004"]
    fit_with_checkpoints(tmp_path, 7)
    assert {path.name for path in folder.iterdir()} == {*names, "step-00000006", "step-00000007", "step-00000009"}


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_what_was_changed_of_a_checkpoint_is_known(tmp_path, name, harm):
    checkpoint = checkpoints(fit_with_checkpoints(tmp_path, 2))[-1]
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[:-3])
    if name == "rank-00000.json":  # what it says stands in checkpoint.json too
        assert damage(checkpoint) is None
    else:
        assert checkpoints(checkpoint.parent) == [checkpoint]
        assert damage(checkpoint) is not None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Diverging(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Line, *_: Any) -> None:
            if trainer.global_step == 4:
                module.layer.weight.data.fill_(float("nan"))

    folder = tmp_path / "checkpoints"
    with pytest.raises(NotFinite, match="step 4: the weights are not finite"):
        fit(tmp_path, 6, Diverging(), Checkpoint(folder, every_steps=2, every_minutes=None))
    assert steps_of(folder) == [2]


# --- loggers -------------------------------------------------------------------------------------------------------


def tracker(name: str, folder: Path, restart: int = 0, **words: Any) -> Any:
    """A logger as the stage makes it: from conf/logger, with what only the stage knows."""
    node = OmegaConf.merge(OmegaConf.load(CONF / "logger" / f"{name}.yaml"), words)
    return instantiate(node)(stage="distill", run_name="quick start", folder=folder, config=CONFIG, restart=restart)


def test_csv_has_the_numbers_of_the_metrics_file_also_after_a_restart(tmp_path):
    folder = tmp_path / "logs" / "distill"
    fit(tmp_path, 3, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("csv", folder))
    fit(tmp_path, 6, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("csv", folder, restart=1), resume=True)
    with (folder / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == lines(tmp_path / "metrics.jsonl")
    assert "temperature: 2.0" in (folder / "hparams.yaml").read_text()


def test_csv_has_the_numbers_also_where_a_restart_finds_no_step_left(tmp_path):
    """As after a full disk, or a kill, between the last checkpoint and the result."""
    folder = tmp_path / "logs" / "distill"
    fit(tmp_path, 6, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("csv", folder))
    whole = (folder / "metrics.csv").read_text()
    fit(tmp_path, 6, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("csv", folder, restart=1), resume=True)
    assert (folder / "metrics.csv").read_text() == whole
    assert len(lines(tmp_path / "metrics.jsonl")) == 7


def test_tensorboard_has_the_numbers_of_the_metrics_file_also_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "logs" / "distill"
    fit(tmp_path, 3, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("tensorboard", folder))
    fit(tmp_path, 6, MetricsFile(tmp_path / "metrics.jsonl"), logger=tracker("tensorboard", folder, 1), resume=True)
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(4, pytest.approx(0.4))]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch, package):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=f"{package} is not installed; pip install {package}"):
        instantiate(OmegaConf.load(CONF / "logger" / f"{package}.yaml"))


def test_trackers_load_no_torch_and_no_wandb_before_they_are_called():
    script = (
        "import sys\nfrom callbacks import tracking\ntracking.csv(), tracking.wandb(project='p')\n"
        "print({'torch', 'wandb', 'pytorch_lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CONF.parent, check=True)
    assert done.stdout == "set()\n"


def test_default_callbacks_are_instantiated_with_what_the_stage_adds(tmp_path):
    nodes = OmegaConf.load(CONF / "callbacks" / "default.yaml")
    progress = instantiate(nodes.progress, stage="distill")
    metrics = instantiate(nodes.metrics, path=tmp_path / "metrics.jsonl")
    assert (progress.stage, progress.every_fraction, progress.every_seconds) == ("distill", 0.1, 300)
    assert progress.first_seconds == 20
    assert metrics.path == tmp_path / "metrics.jsonl"


# --- progress ------------------------------------------------------------------------------------------------------


def show(root: Path, steps: int, *, terminal: bool = False, resume: bool = False, **words: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    fit(root, steps, Progress("distill", console=console, **words), resume=resume)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_log_gets_a_plain_line_every_tenth_of_the_steps(tmp_path):
    said = show(tmp_path, 40).splitlines()
    assert [line.split("  ")[0] for line in said] == [
        f"distill: step {step}/40 ({step * 100 // 40} %)" for step in range(4, 41, 4)
    ]


def test_plain_lines_carry_loss_speed_validation_and_time_left(tmp_path):
    said = show(tmp_path, 40).splitlines()
    assert said[1].startswith("distill: step 8/40 (20 %)  loss 0.125  validation 0.400  2,000 tokens/s  0:00:0")
    assert said[1].endswith(" left")
    assert said[-1] == "distill: step 40/40 (100 %)  loss 0.025  validation 0.049  2,000 tokens/s"  # of step 40


def test_a_validation_stands_in_one_line(tmp_path):
    said = show(tmp_path, 12, every_fraction=1 / 12).splitlines()
    found = {line.split()[2]: line.partition("validation ")[2][:5] for line in said if "validation" in line}
    assert found == {"5/12": "0.400", "9/12": "0.222", "12/12": "0.154"}  # of steps 4, 8 and 12
    assert len(said) == len(set(said)) == 12


def test_figures_of_a_step_stand_in_one_line(tmp_path):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    progress = Progress("distill", console=console, every_fraction=1 / 8)
    fit(tmp_path, 24, progress, log_every=10)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    found = {line.split()[2]: line.partition("loss ")[2][:5] for line in said if "loss" in line}
    assert found == {"12/24": "0.100", "21/24": "0.050"}  # of steps 10 and 20
    assert {line.split()[2] for line in said if "tokens/s" in line} == found.keys()
    assert len(said) == 8


def test_restarted_stage_shows_its_right_step(tmp_path):
    show(tmp_path, 20)
    assert [line.split("  ")[0] for line in show(tmp_path, 40, resume=True).splitlines()] == [
        "distill: goes on at step 20/40",
        *(f"distill: step {step}/40 ({step * 100 // 40} %)" for step in range(24, 41, 4)),
    ]
    assert "40/60" in show(tmp_path, 60, resume=True, terminal=True)


def test_slow_steps_are_shown_by_the_clock(tmp_path):
    assert len(show(tmp_path, 12, every_fraction=1.0, every_seconds=0.0).splitlines()) == 12
    assert len(show(tmp_path, 12, every_fraction=1.0).splitlines()) == 1


def test_a_log_tells_soon_and_then_ever_more_seldom(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # ten seconds a step
    monkeypatch.setattr("callbacks.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    now = [0]

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] = next(clock)

    console = Console(file=io.StringIO())
    words = {"every_fraction": 1.0, "every_seconds": 100.0, "first_seconds": 20.0}
    fit(tmp_path, 48, Clock(), Progress("distill", console=console, **words))
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    at = [int(line.split()[2].partition("/")[0]) for line in said]
    # at 20 s, 40 s later, 80 s later, and then every 100 s; the step n ends at 10 (n - 1) s
    assert at == [3, 7, 15, 25, 35, 45, 48]


def test_terminal_gets_a_bar_that_ends_full(tmp_path):
    last = show(tmp_path, 12, terminal=True).split("\r")[-1]
    assert "distill" in last
    assert "12/12" in last
    assert "loss 0.083" in last
    assert "2,000 tokens/s" in last


def test_bar_is_taken_down_before_an_error_is_shown(tmp_path):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("the disk is full")

    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(tmp_path, 2, Progress("distill", console=console), Failing())
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # type: ignore[attr-defined]  # cursor is back


def test_ranks_are_watched_in_their_first_micro_batch_and_not_while_models_are_read(tmp_path, monkeypatch, capsys):
    """As rank 0 of two, of which the other never says anything."""
    seen: dict[str, bool] = {}

    def watched() -> bool:
        return any(thread.name == "heartbeat" for thread in threading.enumerate())

    class Reading(Line):
        def on_fit_start(self) -> None:  # in training: a checkpoint, and a sharded teacher
            seen["reading"] = watched()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            seen["training"] = watched()
            said, until = "", time.monotonic() + 60
            while "rank 1 has not been heard of" not in said:
                assert time.monotonic() < until, said
                time.sleep(0.05)
                said += capsys.readouterr().err
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda _: 2))
    watchdog = Watchdog("distill", tmp_path / "checkpoints", silent_seconds=0.4, timeout_minutes=60)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        default_root_dir=tmp_path,
        callbacks=[watchdog],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Reading(1))
    assert seen == {"reading": False, "training": True}
    assert not watched()
