"""Tokens per second and peak memory of one logit-distillation step: ours against TRL's and DistillKit's trainers.

    .venv/bin/python benchmarks/distillation_step.py --quick

The same Llama student and teacher (weights written once), the same batches, AdamW, clipping and precision. Each
measurement is a fresh process, so that peak memory is its own; the sides take turns, so that a busy machine slows both.
TRL lives in an environment of its own (benchmarks/README.md), whose Python runs this very file.
"""

from __future__ import annotations

import argparse
import itertools
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
ALPHA, LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 0.5, 1e-4, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 32000
    student_hidden: int = 256
    student_layers: int = 2
    teacher_hidden: int = 512
    teacher_layers: int = 4
    sequences: int = 4
    length: int = 512
    temperature: float = 2.0
    device: str = "cpu"
    precision: str = "fp32"  # bf16: autocast over fp32 student weights, the teacher's own weights in bf16
    threads: int = 2
    warmup_steps: int = 2
    steps: int = 4
    repeats: int = 3
    distillkit: str = ""  # a checkout of it; without one its side is left out

    @property
    def teacher_dtype(self) -> str:
        return "float32" if self.precision == "fp32" else "bfloat16"


# Each is run in a process of its own; those in the first line belong to --quick.
SIDES = {
    "ours": "Retort: ½ cross-entropy + ½ T²·KL",
    "trl": "TRL DistillationTrainer, β=0: KL, and the student's entropy for its log",
    "ours_kl": "Retort: T²·KL alone",
    "gkd": "TRL GKDTrainer, λ=0, β=0: KL on dense logits",
    "distillkit": "DistillKit: ½ cross-entropy + ½ T²·KL on dense logits",
    "ours_checkpointed": "as ours, with activation checkpointing",
    "trl_checkpointed": "as trl, with activation checkpointing, its default",
    "trl_liger": "as trl, with Liger's kernels for the layers (GPU only)",
}


class Clock:
    """Peak memory since it was made, and the time between optimizer steps."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device, self.ends = torch, device, list[float]()
        if device == "cuda":
            torch.zeros((), device="cuda")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
        self.before = self._resident("VmRSS")

    def step_ended(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def figures(self, tokens_per_step: int, warmup_steps: int) -> dict[str, Any]:
        ends = self.ends[warmup_steps - 1 :]
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        host = self._resident("VmHWM") - self.before
        peak = self.torch.cuda.max_memory_allocated() if self.device == "cuda" else host
        return {
            "tokens_per_second": [tokens_per_step / each for each in seconds],
            "peak_memory": peak,
            "peak_host_memory": host,
            "load": os.getloadavg()[0],
        }

    @staticmethod
    def _resident(field: str) -> int:
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
        return int(line.split()[1]) * 1024


def write_inputs(folder: Path, settings: Settings) -> None:
    """Student, teacher, the sequences of every step, and the least of a tokenizer that TRL's constructor asks for."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    for name, hidden, layers in (
        ("student", settings.student_hidden, settings.student_layers),
        ("teacher", settings.teacher_hidden, settings.teacher_layers),
    ):
        heads = max(1, hidden // 64)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=settings.vocabulary,
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=settings.length,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ).save_pretrained(folder / name)
    steps = settings.warmup_steps + settings.steps
    torch.save(
        torch.randint(2, settings.vocabulary, (steps, settings.sequences, settings.length)), folder / "tokens.pt"
    )
    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    ).save_pretrained(folder / "tokenizer")


def ours(folder: Path, settings: Settings, side: str) -> dict[str, Any]:
    import functools

    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from models.load import load_model
    from models.objectives.distillation import Distillation
    from models.objectives.forward_kl import ForwardKL
    from models.teachers.online import Online
    from models.teachers.teacher import Opening
    from models.training.language_model import LanguageModel
    from models.training.schedules import constant

    tokens = torch.load(folder / "tokens.pt")
    batches = []
    for step, ids in enumerate(tokens):
        targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
        batches.append(
            {
                "input_ids": ids,
                "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
                "targets": targets,
                "step_tokens": int((targets >= 0).sum()),
                "tokens_of_step": ids.numel(),
                "sequences": [step],
            }
        )
    clock = Clock(settings.device)
    divergences = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            clock.step_ended()
            if module.step_metrics:
                divergences.append(module.step_metrics["forward_kl"])

    divergence = ForwardKL(settings.temperature)
    module = LanguageModel(
        load_student=lambda: load_model(str(folder / "student"), dtype=torch.float32, attention="sdpa"),
        load_teacher=lambda: Online(str(folder / "teacher"), dtype=settings.teacher_dtype).open(
            Opening(settings.vocabulary, "sdpa")
        ),
        objective=divergence if side == "ours_kl" else Distillation(ALPHA, divergence),
        optimizer=functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, betas=BETAS, fused=True),
        schedule=constant(),
        weight_decay=WEIGHT_DECAY,
        max_steps=len(batches),
        vocabulary=settings.vocabulary,
        packed=False,
        seed=0,
        log_every_steps=len(batches),
        activation_checkpointing=side.endswith("checkpointed"),
    )
    pl.Trainer(
        accelerator=settings.device,
        devices=1,
        precision="32-true" if settings.precision == "fp32" else "bf16-mixed",
        max_steps=len(batches),
        max_epochs=-1,
        gradient_clip_val=CLIP,
        logger=False,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, DataLoader(batches, batch_size=None))
    figures = clock.figures(tokens[0].numel(), settings.warmup_steps)
    return {
        **figures,
        "first_divergence": divergences[0],
        "versions": _versions("torch", "transformers", "pytorch_lightning"),
    }


def trl(folder: Path, settings: Settings, side: str) -> dict[str, Any]:
    """TRL's own training step on ready batches: nothing is generated, nothing collated while the clock runs."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    dense = side == "gkd"
    if dense:
        from trl.experimental.gkd import GKDConfig as Config
        from trl.experimental.gkd import GKDTrainer as Base
    else:
        from trl import DistillationConfig as Config
        from trl import DistillationTrainer as Base

    tokens = torch.load(folder / "tokens.pt").to(settings.device)
    clock = Clock(settings.device)
    losses = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step_ended()

    class ReadyBatches:
        """Stands before TRL's trainer: hands it the step's batch and keeps the loss it computes."""

        def _prepare_inputs(self, _: Any) -> dict[str, Any]:
            ids = tokens[len(losses)]
            mask = torch.ones_like(ids)
            if dense:  # GKD masks by labels and shifts them itself
                return {"input_ids": ids, "attention_mask": mask, "labels": ids}
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum(),
            }

        def compute_loss(self, *arguments: Any, **words: Any) -> Any:
            loss = super().compute_loss(*arguments, **words)
            losses.append(loss.detach())
            return loss

    Trainer = type("Trainer", (ReadyBatches, Base), {})

    model, teacher = _models(folder, settings)
    trainer = Trainer(
        model=model,
        teacher_model=teacher,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=Dataset.from_list([{"prompt": "<s>"}] * (len(tokens) * settings.sequences)),
        args=Config(
            output_dir=str(folder / "trl"),
            beta=0.0,
            temperature=settings.temperature,
            use_liger_kernel=side == "trl_liger",
            **_arguments(settings, side, len(tokens)),
            **({"lmbda": 0.0, "seq_kd": False, "dataset_kwargs": {"skip_prepare_dataset": True}} if dense else {}),
        ),
        callbacks=[Watch()],
        **({"data_collator": list} if dense else {}),
    )
    trainer.train()
    figures = clock.figures(tokens[0].numel(), settings.warmup_steps)
    # TRL leaves the T² out, and GKDTrainer (1.16) computes its loss at T = 1 whatever its temperature.
    scale = 1.0 if dense else settings.temperature**2
    return {
        **figures,
        "first_divergence": float(losses[0]) * scale,
        "versions": _versions("torch", "transformers", "trl"),
    }


def distillkit(folder: Path, settings: Settings, side: str) -> dict[str, Any]:
    """Its own trainer, an SFTTrainer of TRL's, on ready batches; teacher online, no tokens left out."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig

    sys.path.insert(0, settings.distillkit)
    from distillkit.configuration import DistillationRunConfig
    from distillkit.signals import OnlineSignalSource
    from distillkit.trainer import DistillationTrainer

    tokens = torch.load(folder / "tokens.pt").to(settings.device)
    clock = Clock(settings.device)
    divergences: list[float] = []
    handed = itertools.count()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step_ended()

    class Trainer(DistillationTrainer):
        def _prepare_inputs(self, _: Any) -> dict[str, Any]:
            ids = tokens[next(handed)]
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

        def log(self, logs: dict[str, float], *arguments: Any, **words: Any) -> None:
            divergences.extend(value for name, value in logs.items() if name.endswith("kl"))

    losses = [
        {"function": "cross_entropy", "weight": ALPHA},
        {"function": "kl", "weight": 1 - ALPHA, "temperature": settings.temperature},
    ]
    config = DistillationRunConfig(
        model=str(folder / "student"),
        dataset={"train_dataset": {"disk_path": "none"}},
        teacher={"kind": "hf", "path": str(folder / "teacher")},
        sequence_length=settings.length,
        output_path=str(folder / "distillkit"),
        loss_functions=losses,
    )
    model, teacher = _models(folder, settings)
    sequences = [{"input_ids": sequence} for sequence in tokens.reshape(-1, settings.length).tolist()]
    trainer = Trainer(
        model,
        config,
        OnlineSignalSource(teacher, settings.vocabulary),
        settings.vocabulary,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=Dataset.from_list(sequences),
        args=SFTConfig(
            output_dir=str(folder / "distillkit"),
            max_length=settings.length,
            dataset_kwargs={"skip_prepare_dataset": True},
            **_arguments(settings, side, len(tokens)),
        ),
        callbacks=[Watch()],
    )
    trainer.train()
    figures = clock.figures(tokens[0].numel(), settings.warmup_steps)
    return {**figures, "first_divergence": divergences[0], "versions": _versions("torch", "transformers", "trl")}


def _models(folder: Path, settings: Settings) -> Any:
    """Student and teacher, as transformers opens them."""
    import torch
    from transformers import AutoModelForCausalLM

    return (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        for name, dtype in (("student", "float32"), ("teacher", settings.teacher_dtype))
    )


def _arguments(settings: Settings, side: str, steps: int) -> dict[str, Any]:
    """What every trainer of transformers' is told alike."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": settings.sequences,
        "gradient_checkpointing": side.endswith("checkpointed"),
        "bf16": settings.precision == "bf16",
        "use_cpu": settings.device == "cpu",
        "optim": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def run_side(side: str, folder: Path, settings: Settings) -> None:
    """In the side's own process: the last line printed is its figures."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    run = ours if side.startswith("ours") else distillkit if side == "distillkit" else trl
    print(json.dumps(run(folder, settings, side)))


def measure(sides: list[str], settings: Settings, peer_python: str, say: Any) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    # A thread that spins at a barrier while its partner waits for a core makes a busy machine ten times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), settings)
        for repeat in range(settings.repeats):
            for side in sides:
                python = sys.executable if side.startswith("ours") else peer_python
                done = subprocess.run(
                    [python, __file__, "--side", side, "--folder", folder, "--settings", json.dumps(asdict(settings))],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    sys.exit(f"{done.stderr[-4000:]}\nerror: side {side} failed under {python}")
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                last = runs[side][-1]
                say(
                    f"{repeat + 1}/{settings.repeats} {side}: {statistics.median(last['tokens_per_second']):,.0f} "
                    f"tokens/s, {last['peak_memory'] / 2**20:,.0f} MiB"
                )
    return {side: summary(each) for side, each in runs.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats (of tokens/s: over every timed step of every repeat), and the spread."""
    speeds = [speed for run in runs for speed in run["tokens_per_second"]]
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "peak_host_memory": int(statistics.median(run["peak_host_memory"] for run in runs)),
        "first_divergence": runs[0]["first_divergence"],
        "load": [round(run["load"], 2) for run in runs],
        "versions": runs[0]["versions"],
    }


def table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("side", "tokens/s", "peak memory, MiB", "T²·KL, first step", "what it computes")
    for side, each in figures.items():
        shown.add_row(
            side,
            f"{each['tokens_per_second']:,.0f}",
            f"{each['peak_memory'] / 2**20:,.0f}",
            f"{each['first_divergence']:.6f}",
            SIDES[side],
        )
    return shown


def ratios(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours over theirs, like with like."""
    pairs = {
        "ratio": ("ours", "trl"),
        "ratio_kl": ("ours_kl", "trl"),
        "ratio_gkd": ("ours_kl", "gkd"),
        "ratio_distillkit": ("ours", "distillkit"),
        "ratio_checkpointed": ("ours_checkpointed", "trl_checkpointed"),
        "ratio_liger": ("ours", "trl_liger"),
    }
    keys = ("tokens_per_second", "peak_memory")
    return {
        name: {key: round(figures[mine][key] / figures[theirs][key], 3) for key in keys}
        for name, (mine, theirs) in pairs.items()
        if mine in figures and theirs in figures
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="about a minute on 2 cores: fewer sequences, steps and sides"
    )
    parser.add_argument(
        "--peer-python",
        help="has TRL (default: $RETORT_PEER_PYTHON or .venv-peers/bin/python)",
        default=os.environ.get("RETORT_PEER_PYTHON", str(ROOT / ".venv-peers/bin/python")),
    )
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, value in asdict(Settings()).items():
        if name not in ("device", "precision"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    for name in ("--side", "--folder", "--settings"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.side:
        run_side(words.side, Path(words.folder), Settings(**json.loads(words.settings)))
        return

    sides = (words.sides or ",".join(SIDES)).split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(unknown)}: need some of {', '.join(SIDES)}")
    if words.quick and not words.sides:
        sides = sides[:2]
    if not all(side.startswith("ours") for side in sides) and not Path(words.peer_python).is_file():
        parser.error(
            f"--peer-python {words.peer_python}: not there; make it as benchmarks/README.md says, or leave "
            f"TRL out with --sides ours"
        )

    import torch
    from rich.console import Console

    device = words.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, wherever it is imported, looks for a GPU and says so
        sides = [side for side in sides if side != "trl_liger"]
    settings = Settings(device=device, precision="bf16" if device == "cuda" else "fp32", threads=os.cpu_count() or 1)
    if words.quick:
        settings = replace(settings, sequences=2, steps=3, repeats=2)
    given = {name: value for name in asdict(settings) if (value := getattr(words, name, None)) is not None}
    settings = replace(settings, **given)
    if not settings.distillkit:
        sides = [side for side in sides if side != "distillkit"]
    console = Console()
    figures = measure(sides, settings, words.peer_python, lambda line: console.print(line, highlight=False))
    console.print(table(figures))
    found = ratios(figures)
    for name, each in found.items():
        console.print(f"{name}: {each['tokens_per_second']:.2f} × tokens/s, {each['peak_memory']:.2f} × peak memory")
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {settings.threads} threads"
    print(json.dumps({**figures, **found, "device": name, "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
