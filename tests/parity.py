"""Every stage that trains, under every strategy: what two ranks learn is what one process learns.

python -m tests.parity [STAGE ...]     `make verify`; all of them take some 15 minutes on 2 idle cores

Two ranks accumulate two micro-batches, and gradients are clipped; one process takes the whole batch at once. Told is
the largest difference of a step's loss, and of its gradient's norm before clipping (relative), over all steps.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.command import SMALL, train

STEPS = 6
STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "zero1": ["strategy=zero1"],
    "zero2": ["strategy=zero2"],
    "zero3": ["strategy=zero3", "+strategy.config.stage3_param_persistence_threshold=0"],
    "zero3 hpZ": [
        *("strategy=zero3", "+strategy.config.stage3_param_persistence_threshold=0"),
        "+strategy.config.zero_hpz_partition_size=2",
    ],
    "zero3 offload": ["strategy=zero3_offload", "+strategy.config.stage3_param_persistence_threshold=0"],
}
BOUND = 1e-4  # of both; in fp32 they are some 1e-6


@dataclass(frozen=True)
class Case:
    stage: str
    words: tuple[str, ...] = ()


CASES = {
    "pretrain": Case("pretrain"),
    "distill, online teacher": Case("distill"),
    "distill, sharded teacher": Case("distill", ("teacher=sharded",)),
    "distill, recorded teacher": Case("distill", ("teacher=cached",)),
    "on-policy": Case("distill", ("on_policy=gkd", "data.packing=false")),
    "recover with LoRA": Case("recover", ("lora.dropout=0",)),
    "qat": Case("qat"),
}
_ALL = ["pretrain", "record", "distill", "prune", "recover", "quantize", "qat"]


def _words(run_dir: Path, *more: str) -> list[str]:
    small = [
        word for word in SMALL if not word.startswith(("order=", "~stages", "stages.evaluate", "trainer.log_every"))
    ]
    small = [
        word
        for word in small
        if "validate_every_steps" not in word and "micro_batch" not in word and "dropout" not in word
    ]
    trained = [name for name in _ALL if name not in ("record", "prune", "quantize")]
    return [
        *small,
        *(f"~stages.{name}" for name in ("control", "unquantized", "export", "evaluate")),
        f"order=[{','.join(_ALL)}]",
        *(f"stages.{name}.training.{key}" for name in trained for key in ("global_batch=8", "gradient_clip=0.3")),
        *(f"stages.{name}.training.max_steps={STEPS}" for name in trained),
        *(f"stages.{name}.training.validate_every_steps={STEPS}" for name in trained),
        "stages.quantize.calibration={samples: 4, length: 32}",
        "scheme.weights.group_size=16",
        "quantizer=round_to_nearest",
        "trainer.accelerator=cpu",
        "trainer.log_every_steps=1",
        "logger=none",
        f"run_dir={run_dir}",
        *more,
    ]


def _run(run_dir: Path, *more: str) -> str:
    done = train(*_words(run_dir, *more), timeout=1200)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return (lines or done.stderr.strip().splitlines() or ["error"])[-1].removeprefix("error: ")
    return ""


def _steps(run_dir: Path, stage: str) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def _apart(got: tuple[float, float], want: tuple[float, float]) -> tuple[float, float]:
    return abs(got[0] - want[0]), abs(got[1] / want[1] - 1)


def _copied(base: Path, folder: Path, without: str) -> Path:
    shutil.copytree(base, folder, ignore=lambda at, names: {without} if Path(at) == base else set())
    return folder


def compare(base: Path, scratch: Path, name: str) -> dict[str, str]:
    """Strategy → the largest differences from one process, or why it was refused. Raises SystemExit where one process
    fails."""
    case = CASES[name]
    batch = f"stages.{case.stage}.training.micro_batch"
    one = _copied(base, scratch / "one", case.stage)
    if refusal := _run(one, f"only=[{case.stage}]", *case.words, f"{batch}=8"):
        raise SystemExit(f"error: {name}, one process: {refusal}")
    expected = _steps(one, case.stage)
    assert len(expected) == STEPS
    found = {}
    for strategy, words in STRATEGIES.items():
        two = _copied(base, scratch / strategy, case.stage)
        refusal = _run(two, f"only=[{case.stage}]", *case.words, *words, f"{batch}=2", "trainer.devices=2")
        if refusal:
            found[strategy] = f"{refusal} ✗"
            continue
        pairs = list(zip(_steps(two, case.stage), expected, strict=True))
        loss, norm = (max(each) for each in zip(*(_apart(*pair) for pair in pairs), strict=True))
        same = all(math.isfinite(each) and each <= BOUND for pair in pairs for each in _apart(*pair))
        found[strategy] = f"{loss:.0e} {norm:.0e}" + ("" if same else " ✗")
        shutil.rmtree(two)
    shutil.rmtree(one)
    return found


def main() -> None:
    names = sys.argv[1:] or [*CASES]
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"error: {unknown[0]}: no such case; known: {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        if refusal := _run(base, "only=[pretrain,record,distill,prune,recover,quantize]", "teacher=cached"):
            raise SystemExit(f"error: {refusal}")
        wrong = False
        print(f"| loss, gradient's norm | {' | '.join(STRATEGIES)} |\n|{'---|' * (len(STRATEGIES) + 1)}", flush=True)
        for at, name in enumerate(names):
            found = compare(base, Path(folder) / str(at), name)
            wrong = wrong or any("✗" in told for told in found.values())
            print(f"| {name} | {' | '.join(found.values())} |", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
