"""How long and how fast a stage trains, and everything that can be refused of it before a weight is loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate

from models import nvme
from models.apart import check_apart
from models.errors import Refusal
from models.load import attention_of, load_config
from models.teachers.sharded import Sharded
from models.teachers.teacher import Source
from pipeline.context import Context
from pipeline.data.flat import bytes_a_token
from pipeline.data.loader import accumulation
from pipeline.data.source import DataSource
from pipeline.training import checkpoints
from pipeline.training.observers import callbacks_of
from pipeline.training.strategy import ZeRO

SAVED = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}  # precision → dtype of the finished weights
_BYTES_OF_TEXT_A_TOKEN = 4
_ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class Training:
    """How long and how fast; the first limit that is reached ends the stage."""

    # fields that change nothing that is made, beyond rounding (pipeline/config.py, identity)
    immaterial: ClassVar[frozenset[str]] = frozenset({"micro_batch", "workers"})

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, int], Any]
    global_batch: int  # sequences per optimizer step, over all ranks
    micro_batch: int  # sequences in one forward and backward of a rank: changes memory and speed, not the result
    max_steps: int | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    weight_decay: float = 0.1  # norms and biases are exempt
    gradient_clip: float | None = 1.0
    activation_checkpointing: bool = False
    validate_every_steps: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_tokens is None and self.epochs is None:
            raise Refusal("training has no end: set max_steps, max_tokens or epochs")
        for name in ("max_steps", "max_tokens", "epochs", "global_batch", "micro_batch", "validate_every_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise Refusal(f"training.{name}={value}: need a number above 0")

    def length(self) -> str:
        """For the plan: what ends the stage."""
        limits = {"steps": self.max_steps, "tokens": self.max_tokens, "epochs": self.epochs}
        given = ((f"{value:,}", name) for name, value in limits.items() if value is not None)
        return " or ".join(f"{value} {name[:-1] if value == '1' else name}" for value, name in given)


def check(context: Context, training: Training, precision: Any) -> list[str]:
    """Refuse what can be seen to fail before anything is loaded; warnings of what can be seen to go wrong."""
    trainer = context.config["trainer"]
    _check_numbers(trainer)
    launcher = instantiate(context.config["launch"])
    if trainer["nodes"] > 1 and not launcher.several_nodes:
        raise Refusal(
            f"trainer.nodes={trainer['nodes']}: several nodes need launch=slurm, on a login node or in an allocation"
        )
    _check_attention(trainer["attention"])
    _check_devices(context, precision)
    accumulation(training.global_batch, training.micro_batch, context.world)
    if context.config["logger"] is not None:
        instantiate(context.config["logger"])
    check_callbacks(context)
    given = context.config["stages"][context.stage]["training"]
    if "weight_decay" in given["optimizer"]:
        raise Refusal(
            f"stages.{context.stage}.training.optimizer.weight_decay={given['optimizer']['weight_decay']}: without "
            f"effect; set stages.{context.stage}.training.weight_decay, which spares norms and biases"
        )
    with _refusing(f"stages.{context.stage}.training.optimizer", given["optimizer"]):
        optimizer = training.optimizer([torch.nn.Parameter(torch.zeros(1))])
    with _refusing(f"stages.{context.stage}.training.schedule", given["schedule"]):
        training.schedule(optimizer, 10)
    checkpoints.check(context)
    return _warnings(context, training)


def check_callbacks(context: Context) -> None:
    """Of a stage that trains, or of one whose ranks watch each other."""
    with _refusing("callbacks", {}):
        callbacks_of(context)


@contextmanager
def _refusing(node: str, given: Mapping[str, Any]) -> Iterator[None]:
    """What a class says of its settings: with the key where torch's optimizers name the value in words, else with all
    that were given."""
    words = {"learning rate": ".lr", "beta": ".betas", "epsilon": ".eps", "weight_decay": ".weight_decay"}
    try:
        yield
    except Refusal:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as problem:
        said = (str(problem) or type(problem).__name__).splitlines()[0]
        key = next((key for word, key in words.items() if word in said), "")
        values = ", ".join(f"{name}={value}" for name, value in given.items() if name[0] != "_") if not key else ""
        raise Refusal(f"{node}{key}: {said}{f' (of {values})' if values else ''}; give another value") from None


def _warnings(context: Context, training: Training) -> list[str]:
    schedule = context.config["stages"][context.stage]["training"]["schedule"]
    warmup = schedule.get("warmup_steps", 0)
    if training.max_steps is None or warmup <= training.max_steps:
        return []
    own = "" if schedule == context.config["schedule"] else f"stages.{context.stage}.training."
    return [
        f"{own}schedule.warmup_steps={warmup} of {training.max_steps} steps: the learning rate never reaches "
        f"optimizer.lr; set fewer"
    ]


def _check_numbers(trainer: dict[str, Any]) -> None:
    cadence = trainer["checkpoint"]
    for name, value in {
        "nodes": trainer["nodes"],
        "log_every_steps": trainer["log_every_steps"],
        "objective_memory_mb": trainer["objective_memory_mb"],
        "checkpoint.every_steps": cadence["every_steps"],
        "checkpoint.every_minutes": cadence["every_minutes"],
        "checkpoint.keep": cadence["keep"],
    }.items():
        if value is not None and not value > 0:
            raise Refusal(f"trainer.{name}={value}: need a number above 0")


def _check_attention(attention: str) -> None:
    if attention not in _ATTENTION:
        raise Refusal(f"trainer.attention={attention}: need {', '.join(_ATTENTION[:-1])} or {_ATTENTION[-1]}")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Refusal("trainer.attention=flash_attention_2: the package flash_attn is not installed; use auto")


def _check_devices(context: Context, precision: Any) -> None:
    """What these devices can compute in, and how many processes the strategy runs on them."""
    if precision not in SAVED:
        raise Refusal(f"trainer.precision={precision}: need {' or '.join(SAVED)}")
    here = context.place is None
    device = context.device
    if here and precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bf16; use 32-true")
    if here and device == "cuda" and context.devices > torch.cuda.device_count() and "SLURM_JOB_ID" not in os.environ:
        raise Refusal(f"trainer.devices={context.devices}: this machine has {torch.cuda.device_count()} GPUs")
    context.strategy.check(device, context.world)


def check_length(config: Any, data: DataSource, role: str) -> None:
    """Refuse sequences that are longer than a model reads; `role` is for the message."""
    name = "max_length"
    if role == "teacher" and data.teacher_prompts:
        name = "teacher_max_length"
    length = getattr(data, name)
    if (limit := getattr(config, "max_position_embeddings", None)) and limit < length:
        raise Refusal(
            f"{data.node}.{name}={length}: the {role} reads at most {limit} tokens (max_position_embeddings); use "
            f"{data.node}.{name}={limit}"
        )


def check_family(context: Context, config: Any) -> None:
    """Refuse an attention that the model's family cannot have."""
    wanted = context.config["trainer"]["attention"]
    attention_of(config, None if wanted == "auto" else wanted)


def check_packing(config: Any, data: DataSource, role: str) -> None:
    """Refuse packed sequences where the model's family lets their documents see each other; `role` is for the message.

    By a small model of the family; where none can be made, the model itself is asked before the first step.
    """
    if data.packing or (role == "teacher" and data.teacher_prompts > 1):
        check_apart(config, f"{data.node}.packing=true, {role}")


def prepared_bytes(corpus: dict[str, Any], vocabulary: int) -> int:
    """Or so, of what `check_source` says of the text; `vocabulary`: tokens of the tokenizer that reads it."""
    texts = sum((corpus.get(split) or {}).get("bytes") or 0 for split in ("train", "validation", "test"))
    return int(texts // _BYTES_OF_TEXT_A_TOKEN * bytes_a_token(vocabulary))


def check_nvme(context: Context, trained: int, teacher: Source | None) -> None:
    """Refuse a folder for an offloaded optimizer that cannot take that of this machine's ranks, and of a teacher beside
    it on the same disk."""
    here, strategy = min(context.devices, context.world), context.strategy
    if isinstance(strategy, ZeRO) and strategy.nvme_path is not None:
        share = -(-trained // context.world)
        stepped = min(share, strategy.stepped_at_a_time)
        # Master, gradient and two moments of each, in fp32; and a buffer for each of the four.
        disk = 16 * share * here
        if isinstance(teacher, Sharded) and teacher.nvme_path and nvme.one_disk(teacher.nvme_path, strategy.nvme_path):
            config = load_config(context.config_folder(teacher.path), "teacher", teacher.trust_remote_code)
            disk += teacher.disk_bytes(config, context.world, here)
        nvme.check(strategy.nvme_path, "strategy.nvme_path", disk=disk, locked=16 * stepped)


def check_disk(
    context: Context,
    parameters: int,
    corpus: dict[str, Any],
    vocabulary: int,
    trained: int | None = None,
    teacher: Source | None = None,
) -> None:
    """A run that fills the disk dies hours later. `trained`: how many of the parameters are, if not all; `corpus`: what
    `check_source` says of the text; `vocabulary`: tokens of the tokenizer that it is prepared with; `teacher`: one that
    runs beside the student."""
    keep = context.config["trainer"]["checkpoint"]["keep"]
    needed = {
        "the start and the result": 2 * parameters * 4,
        # weights and two moments each; the oldest goes when the newest is whole
        "checkpoints": (trained or parameters) * 4 * 3 * (keep + 1),
        "prepared text": prepared_bytes(corpus, vocabulary),
    }
    if context.on_this_machine:
        check_nvme(context, trained or parameters, teacher)
    place = context.run_dir
    while not place.exists():
        place = place.parent
    had = sum(p.stat().st_size for p in context.work.rglob("*") if p.is_file()) if context.work.exists() else 0
    had += sum(p.stat().st_size for p in context.data_folder.rglob("*") if p.is_file())
    disk = shutil.disk_usage(place)
    if disk.total == 0:  # no space to tell of: /proc, where nothing can be made, and some file systems in user space
        try:
            tempfile.TemporaryDirectory(dir=place).cleanup()
        except OSError as problem:
            told = f"no folder can be made in {place} ({problem.strerror})"
            raise Refusal(f"run_dir={context.run_dir}: {told}; choose another run_dir") from None
        return
    free = disk.free + had
    if free < sum(needed.values()) and not context.finished(str(context.out)):
        counted = ", ".join(f"{size / 1e9:.1f} for {what}" for what, size in needed.items())
        raise Refusal(
            f"run_dir={context.run_dir}: {context.stage} needs {sum(needed.values()) / 1e9:.1f} GB or so ({counted}) "
            f"and {free / 1e9:.1f} GB are free; choose another run_dir, or a smaller trainer.checkpoint.keep or "
            f"data.max_documents"
        )
