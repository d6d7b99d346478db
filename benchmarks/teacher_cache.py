"""Tokens per second of an epoch by where the teacher's signal comes from, and what a recorded one costs and loses.

    .venv/bin/python benchmarks/teacher_cache.py --quick

The same student on the same sequences of real text, without a teacher, with one that runs beside it, and with what the
stage `record` wrote of it. Each training is a fresh process, so that peak memory is its own; the sides take turns, so
that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALPHA, TEMPERATURE, LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 0.5, 1.0, 1e-3, (0.9, 0.95), 0.1, 1.0
GOAL = 0.9  # of cross-entropy's tokens/s, from a cache


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 8000
    student_hidden: int = 256
    student_layers: int = 4
    teacher_hidden: int = 512
    teacher_layers: int = 8
    teacher_steps: int = 100  # of `teacher_sequences`, before anything is measured
    teacher_sequences: int = 2
    sequences: int = 8
    length: int = 256
    device: str = "cpu"
    precision: str = "fp32"  # bf16: autocast over fp32 student weights, the teacher's own weights in bf16
    threads: int = 2
    warmup_steps: int = 2
    steps: int = 6
    repeats: int = 2

    @property
    def epoch_sequences(self) -> int:
        return (self.warmup_steps + self.steps) * self.sequences

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "fp32" else "bfloat16"


@dataclass(frozen=True)
class Side:
    what: str
    encoding: tuple[str, dict[str, Any]] | None = None  # module in models/teachers/encodings and its settings


# Each is trained in a process of its own.
SIDES = {
    "cross_entropy": Side("no teacher: cross-entropy"),
    "online": Side("teacher in the student's process"),
    "sharded": Side("teacher in a ZeRO-3 engine of its own, one rank"),
    "cached_top_k": Side("64 likeliest tokens and the rest's sum", ("top_k", {"k": 64, "temperatures": [TEMPERATURE]})),
    "cached_sampled": Side("50 draws", ("sampled", {"draws": 50, "temperature": TEMPERATURE})),
    "cached_hidden_bf16": Side("last hidden states in bf16", ("hidden_states", {"dtype": "bfloat16"})),
    "cached_hidden_int8": Side("last hidden states in int8", ("hidden_states", {"dtype": "int8"})),
}
QUICK = ("cross_entropy", "online", "cached_top_k", "cached_sampled")


class Clock:
    """Peak memory since it was made, and the ends of optimizer steps with the tokens of each."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.ends, self.tokens = list[float](), list[int]()
        if device == "cuda":
            torch.zeros((), device="cuda")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
        self.before = self._resident("VmRSS")

    def now(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def step_ended(self, tokens: int) -> None:
        self.ends.append(self.now())
        self.tokens.append(tokens)

    def figures(self, warmup_steps: int) -> dict[str, Any]:
        seconds = self.ends[-1] - self.ends[warmup_steps - 1]
        host = self._resident("VmHWM") - self.before
        return {
            "tokens_per_second": sum(self.tokens[warmup_steps:]) / seconds,
            "peak_memory": self.torch.cuda.max_memory_allocated() if self.device == "cuda" else host,
            "peak_host_memory": host,
            "load": os.getloadavg()[0],
        }

    @staticmethod
    def _resident(field: str) -> int:
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
        return int(line.split()[1]) * 1024


def text(folder: Path, name: str, settings: Settings) -> Any:
    """The node `data` of a run on one of the files that `write_inputs` wrote."""
    from pipeline.data.documents import Documents

    return Documents(train=str(folder / f"{name}.jsonl"), holdout=0.0, max_length=settings.length)


def packed(folder: Path, name: str, settings: Settings) -> Any:
    from pipeline.data.prepared import sequences_of
    from pipeline.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return sequences_of(text(folder, name, settings), "train", tokenizer, folder / "work/data")[0]


def write_inputs(folder: Path, settings: Settings) -> dict[str, Any]:
    """Real text, its tokenizer and sequences, a student, and a teacher that has learnt something of other text."""
    import random

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.objectives.cross_entropy import CrossEntropy
    from pipeline.data.documents import Documents, documents
    from pipeline.data.tokenizer import train_tokenizer

    texts = documents(Documents(), "train")["text"][:]
    tokenizer = train_tokenizer(texts, settings.vocabulary, folder / "tokenizer")
    random.Random(0).shuffle(texts)
    for name, sequences in (
        ("epoch", settings.epoch_sequences),
        ("lessons", settings.teacher_steps * settings.teacher_sequences),
    ):
        tokens, chosen = 0, list[str]()
        while texts and tokens < sequences * settings.length:
            chosen.append(json.dumps({"text": texts.pop()}) + "\n")
            tokens += len(tokenizer(json.loads(chosen[-1])["text"])["input_ids"])
        if name == "epoch" and tokens < sequences * settings.length:
            sys.exit(f"error: {sequences} sequences of {settings.length} tokens are more than the embedded corpus has")
        (folder / f"{name}.jsonl").write_text("".join(chosen))
    torch.manual_seed(0)
    for name, hidden, layers in (
        ("student", settings.student_hidden, settings.student_layers),
        ("teacher", settings.teacher_hidden, settings.teacher_layers),
    ):
        heads = max(1, hidden // 64)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=settings.length,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lessons = packed(folder, "lessons", settings) if settings.teacher_steps else None
    if lessons is not None and len(lessons):
        taught = replace(settings, sequences=settings.teacher_sequences)
        module, _ = train(folder, "teacher", CrossEntropy(), None, lessons, settings.teacher_steps, taught)
        module.student.save_pretrained(folder / "teacher")
    return {**of_teacher(folder, settings), "steps": settings.teacher_steps}


def of_teacher(folder: Path, settings: Settings) -> dict[str, Any]:
    """How much it has learnt, on the first sequences of the text it will be asked about."""
    import torch
    from torch.nn.functional import cross_entropy

    from models.heads import head_of, hidden_states
    from models.load import load_model
    from pipeline.data.batch import collate

    model = load_model(str(folder / "teacher"), dtype=torch.float32).eval()
    sequences = packed(folder, "epoch", settings)
    batch = collate(
        [sequences.arrays(number) for number in range(min(settings.sequences, len(sequences)))], pad_token=0
    )
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
        supervised = batch["targets"] >= 0
        log_p = head_of(model).logits(hidden[supervised], torch.float32).log_softmax(-1)
        loss = cross_entropy(log_p, batch["targets"][supervised])
    p = log_p.exp()
    return {
        "vocabulary": log_p.shape[1],
        "cross_entropy": round(loss.item(), 3),
        "entropy": round(-(p * log_p).sum(-1).mean().item(), 3),
        "mass_of_top_64": round(p.topk(min(64, p.shape[1])).values.sum(-1).mean().item(), 3),
    }


def encoding_of(side: str) -> Any:
    from models.teachers.encodings.encoding import open_encoding

    encoding = SIDES[side].encoding
    assert encoding is not None
    return open_encoding({"name": encoding[0], "settings": encoding[1]})


def record(folder: Path, settings: Settings, side: str) -> dict[str, Any]:
    """The stage `record`, as a run would run it; only the clock around its teacher is ours."""
    import torch

    from models.teachers.cache import HEAD
    from models.teachers.cached import Cached
    from models.teachers.online import Online
    from pipeline.artifact import content_hash, read_manifest
    from pipeline.context import Context
    from pipeline.stages.record import Record

    clock = Clock(settings.device)
    looks, gives = list[float](), list[float]()

    class Timed(torch.nn.Module):
        def __init__(self, teacher: Any) -> None:
            super().__init__()
            self.teacher, self.check, self.close = teacher, teacher.check, teacher.close

        def look(self, *arguments: Any) -> Any:
            looks.append(clock.now())
            return self.teacher.look(*arguments)

        def give(self, *arguments: Any) -> Any:
            result = self.teacher.give(*arguments)
            gives.append(clock.now())
            return result

    class TimedOnline(Online):
        def open(self, opening: Any) -> Any:
            return Timed(super().open(opening))

    path = str(folder / "teacher")
    stage = Record(
        text(folder, "epoch", settings),
        Cached(path, str(folder / side), settings.dtype, recorder=TimedOnline(path, settings.dtype)),
        encoding_of(side),
        batch_size=settings.sequences,
        sample_tokens=settings.sequences * settings.length,
    )
    context = Context(
        {
            "run_dir": str(folder),
            "seed": 0,
            "force": [],
            "stages": {side: {}},
            "trainer": {"accelerator": settings.device, "devices": 1, "nodes": 1},
            "strategy": {"_target_": "pipeline.training.strategy.Single"},
        },
        side,
        parents={"teacher": {"path": path, "content_hash": content_hash(Path(path))}},
    )
    stage.prepare(context)
    stage.run(context)
    manifest = read_manifest(folder / side)
    assert manifest is not None
    metrics = manifest["metrics"]
    told = metrics["fidelity"]["1"]
    lengths = [len(ids) for ids in packed(folder, "epoch", settings)["input_ids"]]
    # From the first batch's end, which warms up, to the last shard on disk; the last batch of all measures.
    warm = len(gives) > 2
    tokens = sum(lengths[settings.sequences :] if warm else lengths)
    return {
        "bytes_per_token": round(metrics["bytes_per_token"], 1),
        "head_bytes": manifest["files"].get(HEAD, {}).get("bytes", 0),
        "gradient_error": told["gradient_error"],
        "kl_error": told["kl_encoded"] / told["kl_dense"] - 1,
        "own_kl": told["own_kl"],
        "recording_tokens_per_second": round(tokens / (looks[-1] - (gives[0] if warm else looks[0])), 1),
        "recorded_tokens": manifest["tokens"],
        "pieces": metrics["pieces"],
        "load_while_recording": round(os.getloadavg()[0], 2),
    }


def train(
    folder: Path,
    student: str,
    objective: Any,
    source: Any,
    sequences: Any,
    steps: int,
    settings: Settings,
    keep: Path | None = None,
) -> tuple[Any, tuple[Clock, list[float]]]:
    """As pipeline/training/fit.py does: (module, (clock, the divergences that were logged)). `keep`: of the first
    gradient."""
    import functools

    import pytorch_lightning as pl
    import torch

    from models.load import load_model
    from models.teachers.teacher import Opening
    from models.training.language_model import LanguageModel
    from models.training.schedules import constant
    from pipeline.data.batch import pad_token
    from pipeline.data.loader import PackedSequences
    from pipeline.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    data = PackedSequences(
        sequences,
        None,
        seed=0,
        global_batch=settings.sequences,
        micro_batch=settings.sequences,
        pad_token=pad_token(tokenizer),
        length=settings.length,
    )
    clock, divergences = Clock(settings.device), list[float]()

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if keep is not None and trainer.global_step == 0:  # which warms up
                torch.save([parameter.grad for parameter in module.student.parameters()], keep)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            clock.step_ended(batch["tokens_of_step"])
            if module.step_metrics and "forward_kl" in module.step_metrics:
                divergences.append(module.step_metrics["forward_kl"])

    opening = Opening(len(tokenizer), "sdpa", packed=True)
    module = LanguageModel(
        load_student=lambda: load_model(str(folder / student), dtype=torch.float32, attention="sdpa"),
        load_teacher=None if source is None else lambda: source.open(opening),
        objective=objective,
        optimizer=functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, betas=BETAS, fused=True),
        schedule=constant(),
        weight_decay=WEIGHT_DECAY,
        max_steps=steps,
        vocabulary=len(tokenizer),
        packed=True,
        seed=0,
        log_every_steps=steps,
        activation_checkpointing=False,
    )
    pl.Trainer(
        accelerator=settings.device,
        devices=1,
        precision="32-true" if settings.precision == "fp32" else "bf16-mixed",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=CLIP,
        check_val_every_n_epoch=None,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[Watch()],
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, datamodule=data)
    return module, (clock, divergences)


def train_side(folder: Path, settings: Settings, side: str) -> dict[str, Any]:
    from models.objectives.cross_entropy import CrossEntropy
    from models.objectives.distillation import Distillation
    from models.objectives.forward_kl import ForwardKL
    from models.teachers.cached import Cached
    from models.teachers.online import Online
    from models.teachers.sharded import Sharded

    if side == "sharded":
        import deepspeed  # noqa: F401 - the library itself is no part of the peak

    path = str(folder / "teacher")
    source: Any = {
        "cross_entropy": lambda: None,
        "online": lambda: Online(path, settings.dtype),
        "sharded": lambda: Sharded(path, settings.dtype),
    }.get(side, lambda: Cached(path, str(folder / side), settings.dtype))()
    objective = CrossEntropy() if source is None else Distillation(ALPHA, ForwardKL(TEMPERATURE))
    sequences = packed(folder, "epoch", settings)
    steps = settings.warmup_steps + settings.steps
    keep = folder / f"{side}.gradient"
    _, (clock, divergences) = train(folder, "student", objective, source, sequences, steps, settings, keep)
    return {
        **clock.figures(settings.warmup_steps),
        "first_divergence": divergences[0] if divergences else None,
        "versions": _versions("torch", "transformers", "pytorch_lightning", "deepspeed", "safetensors"),
    }


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def run_child(task: str, side: str, folder: Path, settings: Settings) -> None:
    """In a process of its own: the last line printed is the figures."""
    import logging
    import warnings

    import torch
    from datasets import disable_progress_bars

    warnings.simplefilter("ignore")
    disable_progress_bars()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(settings.threads)
    if task == "inputs":
        found = write_inputs(folder, settings)
    else:
        found = (record if task == "record" else train_side)(folder, settings, side)
    print(json.dumps(found))


def measure(sides: list[str], settings: Settings, say: Any) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    # A thread that spins at a barrier while its partner waits for a core makes a busy machine ten times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    recorded: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def child(task: str, side: str = "") -> Any:
            words = ["--task", task, "--side", side, "--folder", folder, "--settings", json.dumps(asdict(settings))]
            done = subprocess.run(
                [sys.executable, __file__, *words], env=environment, capture_output=True, text=True, cwd=folder
            )
            if done.returncode:
                sys.exit(f"{done.stderr[-4000:]}\nerror: {task} {side} failed")
            return json.loads(done.stdout.splitlines()[-1])

        teacher = child("inputs")
        say(
            f"teacher after {teacher['steps']} steps: cross-entropy {teacher['cross_entropy']:.2f}, entropy "
            f"{teacher['entropy']:.2f}, {teacher['mass_of_top_64']:.0%} of its mass on 64 of {teacher['vocabulary']:,}"
        )
        for side in sides:
            if SIDES[side].encoding is not None:
                recorded[side] = child("record", side)
                last = recorded[side]
                say(
                    f"{side}: recorded at {last['recording_tokens_per_second']:,.0f} tokens/s, "
                    f"{last['bytes_per_token']:,.1f} bytes a token"
                )
        for repeat in range(settings.repeats):
            for side in sides:
                last = child("train", side)
                runs[side].append(last)
                say(
                    f"{repeat + 1}/{settings.repeats} {side}: {last['tokens_per_second']:,.0f} tokens/s, "
                    f"{last['peak_memory'] / 2**20:,.0f} MiB"
                )
        errors = first_gradient_errors(Path(folder), sides)
    figures = {
        side: {**summary(each), **recorded.get(side, {}), "first_gradient_error": errors.get(side)}
        for side, each in runs.items()
    }
    if "cross_entropy" in figures:
        plain = figures["cross_entropy"]["tokens_per_second"]
        for each in figures.values():
            each["ratio_to_cross_entropy"] = round(each["tokens_per_second"] / plain, 3)
    return {"sides": figures, "teacher": teacher, "goals": goals(figures)}


def first_gradient_errors(folder: Path, sides: list[str]) -> dict[str, float]:
    """Of the student's first gradient, over all its parameters and all tokens of the batch: against `online`'s."""
    import torch

    if "online" not in sides:
        return {}

    def gradient(side: str) -> Any:
        parts = torch.load(folder / f"{side}.gradient", map_location="cpu")
        return torch.cat([part.double().flatten() for part in parts])

    truth = gradient("online")
    return {side: ((gradient(side) - truth).norm() / truth.norm()).item() for side in sides if side != "cross_entropy"}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats, each of a whole epoch less its warm-up, and the spread."""
    speeds = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "peak_host_memory": int(statistics.median(run["peak_host_memory"] for run in runs)),
        "first_divergence": runs[0]["first_divergence"],
        "load": [round(run["load"], 2) for run in runs],
        "versions": runs[0]["versions"],
    }


def goals(figures: dict[str, Any]) -> dict[str, Any]:
    ratios = {side: each.get("ratio_to_cross_entropy") for side, each in figures.items() if SIDES[side].encoding}
    return {side: {"is": is_, "goal": GOAL, "met": is_ >= GOAL} for side, is_ in ratios.items() if is_ is not None}


def table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table(
        "source",
        "tokens/s (range)",
        "÷ cross-entropy",
        "bytes a token",
        "gradient error",
        "of the first step",
        "KL error",
        "recorded, tokens/s",
        "peak MiB",
        "KL, first step",
        "what it is",
    )
    for side, each in figures.items():
        low, high = each["tokens_per_second_range"]
        recorded = SIDES[side].encoding is not None
        exact = "" if side == "cross_entropy" else "0"
        shown.add_row(
            side,
            f"{each['tokens_per_second']:,.0f} ({low:,.0f}–{high:,.0f})",
            f"{each['ratio_to_cross_entropy']:.2f}" if "ratio_to_cross_entropy" in each else "",
            f"{each['bytes_per_token']:,.1f}" if recorded else "",
            f"{each['gradient_error']:.1%}" if recorded else exact,
            "" if each["first_gradient_error"] is None else f"{each['first_gradient_error']:.2%}",
            f"{each['kl_error']:+.1%}" if recorded else exact,
            f"{each['recording_tokens_per_second']:,.0f}" if recorded else "",
            f"{each['peak_memory'] / 2**20:,.0f}",
            "" if each["first_divergence"] is None else f"{each['first_divergence']:.5f}",
            SIDES[side].what,
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="about a minute on 2 cores: fewer sequences, steps, sides and lessons"
    )
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, value in asdict(Settings()).items():
        if name not in ("device", "precision"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    for name in ("--task", "--side", "--folder", "--settings"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.task:
        run_child(words.task, words.side, Path(words.folder), Settings(**json.loads(words.settings)))
        return

    sides = (words.sides or ",".join(QUICK if words.quick else SIDES)).split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(sorted(unknown))}: need some of {', '.join(SIDES)}")

    import torch
    from rich.console import Console

    device = words.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device=device, precision="bf16" if device == "cuda" else "fp32", threads=os.cpu_count() or 1)
    if words.quick:
        settings = replace(settings, sequences=4, teacher_steps=10, warmup_steps=1, steps=3, repeats=1)
    given = {name: value for name in asdict(settings) if (value := getattr(words, name, None)) is not None}
    settings = replace(settings, **given)
    for name in ("sequences", "warmup_steps", "steps", "repeats"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: need 1 or more")
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    found = measure(sides, settings, lambda line: console.print(line, highlight=False))
    console.print(table(found["sides"]))
    for side, each in found["goals"].items():
        told = "met" if each["met"] else "missed"
        console.print(
            f"{side}: {each['is']:.2f} of cross-entropy's tokens/s (goal {each['goal']:g}, {told})", highlight=False
        )
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {settings.threads} threads"
    print(json.dumps({**found, "device": name, "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
