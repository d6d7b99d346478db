"""Perplexity of a model with quantized weights, by the method that quantized them.

    .venv/bin/python benchmarks/quantization.py --quick

The same model, calibration tokens, schemes and matrices for all sides; ours goes through the stage `quantize` and is
measured from the folder that it wrote. Each side is a fresh process. The peer lives in an environment of its own
(benchmarks/README.md), whose Python runs this very file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    model: str = ""  # a folder; without one the stage `pretrain` makes one
    text: str = "stdlib"  # or a file: .txt, .jsonl, …
    documents: int = 20000  # of it, at most
    skip: str = ""  # kinds of matrices that stay float on all sides: gate_proj,up_proj
    calibration_samples: int = 128
    calibration_length: int = 256
    held_out_sequences: int = 128  # of as many tokens each
    iterations: int = 200  # of auto-round's tuning
    train_steps: int = 1400  # of the model that is made
    qat_steps: int = 200  # of quantization-aware training
    threads: int = 2
    repeats: int = 3  # each with other calibration sequences


SIDES = {
    "round_to_nearest": "quantizer=round_to_nearest",
    "clipped": "quantizer=clipped",
    "gptq": "quantizer=gptq with clip: false",
    "gptq_clip": "quantizer=gptq",
    "awq": "quantizer=awq",
    "qat": "gptq_clip, then the stage qat by the objective of conf/, the float model teaching",
    "trained": "the same training without quantization: what of the gain is the text's",
    "auto_round_rtn": "auto-round: rounding with searched scales, without tuning",
    "auto_round_awq": "auto-round's AWQ, then the same rounding",
    "auto_round": "auto-round: rounding and ranges tuned by signed gradients",
}
PEERS = [side for side in SIDES if side.startswith("auto_round")]
PAIRS = {"clipped": "auto_round_rtn", "awq": "auto_round_awq", "gptq_clip": "auto_round"}  # ours ÷ theirs
TRAINED = ("qat", "trained")
NEEDS_NO_TEXT = ("round_to_nearest", "clipped")  # every repeat would be the same
SCHEMES = {  # bits, group; None: a channel
    "w8a16": (8, None),
    "w4a16": (4, None),
    "w4a16_g32": (4, 32),
    "w4a16_g128": (4, 128),
    "w3a16": (3, None),
    "w3a16_g32": (3, 32),
    "w3a16_g128": (3, 128),
}


def stage(side: str, scheme: str, skip: list[str], folder: Path, settings: Settings, seed: int) -> tuple[Any, Any]:
    """Our stage and its context, as train.py would build them."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from pipeline.building import build
    from pipeline.config import Config, parse
    from pipeline.context import Context

    words = ["+experiment=quantize_only", f"model.path={settings.model}", *asked(side, scheme, skip, settings, seed)]
    words += [f"run_dir={folder}", *(["quantizer.clip=false"] if side == "gptq" else [])]
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", words))
    return build(config, "quantize"), Context(config, "quantize")


def asked(side: str, scheme: str, skip: list[str], settings: Settings, seed: int) -> list[str]:
    """What every side is given: text and scheme."""
    bits, group = SCHEMES[scheme]
    return [
        *(["data=stdlib"] if settings.text == "stdlib" else ["data=files", f"data.train={settings.text}"]),
        "data.holdout=0.2", f"data.max_documents={settings.documents}",
        f"data.max_length={settings.calibration_length}",
        f"quantizer={'gptq' if side in TRAINED else side.removesuffix('_clip')}",
        f"scheme.weights.bits={bits}", f"scheme.weights.granularity={'group' if group else 'channel'}",
        f"scheme.weights.group_size={group or 'null'}", f"stages.quantize.skip=[{','.join(skip)}]",
        f"stages.quantize.calibration.samples={settings.calibration_samples}", f"stages.quantize.seed={seed}",
        f"stages.quantize.calibration.length={settings.calibration_length}", "trainer.accelerator=cpu", "logger=none",
    ]  # fmt: skip


def trained(side: str, scheme: str, folder: Path, settings: Settings, repeat: int) -> tuple[Any, list[str], float]:
    """As a user runs it; seconds are of both stages."""
    import torch

    from models.load import load_model
    from models.quantization.stored import read_quantized

    words = ["+experiment=demo/quantize_aware", "start=quantize", f"model.path={settings.model}"]
    words += asked(side, scheme, left_out(settings, scheme), settings, repeat)
    words += [f"run_dir={folder}/{side}-{scheme}", f"stages.qat.training.max_steps={settings.qat_steps}"]
    words += [f"stages.qat.seed={repeat}"]
    if side == "trained":
        words += ["stages=[qat]", "stages.qat.qat=null", f"stages.qat.student.path={settings.model}"]
    else:
        words += ["stages=[quantize,qat]"]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\nerror: {side} failed")
    out = folder / f"{side}-{scheme}" / "qat"
    held = out / "quantized.safetensors"
    names = [each.removesuffix(".weight") for each in read_quantized(held).matrices] if side == "qat" else []
    return load_model(str(out), dtype=torch.float32), names, seconds


def ours(side: str, scheme: str, folder: Path, settings: Settings, repeat: int) -> tuple[Any, list[str], float]:
    """(model, names of what is quantized, seconds)."""
    import torch

    from models.load import load_model
    from models.quantization.stored import read_quantized

    made, context = stage(side, scheme, left_out(settings, scheme), folder / f"{side}-{scheme}", settings, repeat)
    begin = time.perf_counter()
    made.prepare(context)
    made.run(context)
    seconds = time.perf_counter() - begin
    names = [name.removesuffix(".weight") for name in read_quantized(context.out / "quantized.safetensors").matrices]
    return load_model(str(context.out), dtype=torch.float32), names, seconds


def peer(side: str, scheme: str, folder: Path, settings: Settings, repeat: int) -> tuple[Any, list[str], float]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bits, group = SCHEMES[scheme]
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    skipped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(left_out(settings, scheme)))
    ]
    sequences = torch.load(folder / "tokens.pt")["calibration"][repeat]
    begin = time.perf_counter()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(settings.model),
        bits=bits,
        group_size=group or -1,
        sym=True,
        dataset=list(sequences.split(8)),
        seqlen=sequences.shape[1],
        nsamples=len(sequences),
        batch_size=8,
        iters=settings.iterations if side == "auto_round" else 0,
        alg_configs=side.removeprefix("auto_round_"),
        layer_config={name: {"bits": 16} for name in skipped},
        enable_torch_compile=False,
        device_map="cpu",
        amp=False,  # or it would tune, and round, in bf16
        seed=repeat,
    )
    made, _ = tuner.quantize()  # rounded weights in plain modules
    seconds = time.perf_counter() - begin
    names = [
        name
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear) and getattr(module, "scale", None) is not None
    ]
    return made.float(), names, seconds


def left_out(settings: Settings, scheme: str) -> list[str]:
    """Kinds of matrices that stay float on all sides: those named, and those whose inputs the groups do not divide."""
    config = json.loads(Path(settings.model, "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    attention = heads * (config.get("head_dim") or hidden // heads)
    widths = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), hidden)
    widths |= {"o_proj": attention, "down_proj": config["intermediate_size"]}
    return [
        name for name, width in widths.items() if name in settings.skip.split(",") or width % (SCHEMES[scheme][1] or 1)
    ]


def worth(model: Any, folder: Path, settings: Settings) -> dict[str, float]:
    """Perplexity of the held-out sequences, and KL(float model ‖ model) in nats a token."""
    import torch
    from transformers import AutoModelForCausalLM

    sequences = torch.load(folder / "tokens.pt")["held_out"]
    parent = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    model.eval()
    nats = divergence = 0.0
    with torch.no_grad():
        for some in sequences.split(16):
            q, p = (each(input_ids=some, use_cache=False).logits[:, :-1].log_softmax(-1) for each in (model, parent))
            nats -= float(q.gather(-1, some[:, 1:, None]).double().sum())
            divergence += float((p.exp() * (p - q)).double().sum())
    tokens = sequences[:, 1:].numel()
    return {"perplexity": math.exp(nats / tokens), "kl": divergence / tokens}


def run_child(side: str, folder: Path, settings: Settings, schemes: list[str], also: dict[str, str]) -> None:
    """In the side's own process: the last line printed is its figures."""
    import warnings
    from importlib import metadata

    import torch
    from transformers import AutoModelForCausalLM, logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    found: dict[str, Any] = {}
    if side == "also":
        for name, path in {"float": settings.model, **also}.items():
            found[name] = worth(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), folder, settings)
    else:
        run = peer if side in PEERS else trained if side in TRAINED else ours
        for scheme in schemes:
            found[scheme] = []
            for repeat in range(1 if side in NEEDS_NO_TEXT else settings.repeats):
                place = folder / f"repeat-{repeat}" if run is not peer else folder
                model, names, seconds = run(side, scheme, place, settings, repeat)
                found[scheme].append({**worth(model, folder, settings), "matrices": sorted(names), "seconds": seconds})
    packages = ("torch", "transformers", *(("auto-round",) if side in PEERS else ()))
    versions = {name: metadata.version(name) for name in packages}
    print(json.dumps({"found": found, "versions": versions, "load": os.getloadavg()[0]}))


def teacher(settings: Settings, say: Callable[[str], None]) -> str:
    """That of the pruning experiments, made once by the project's own stage."""
    run_dir = ROOT / f"runs/benchmarks/quantization-{settings.train_steps}-steps"
    if (run_dir / "pretrain/manifest.json").is_file():
        return str(run_dir / "pretrain")
    say(f"making a model: {settings.train_steps} steps of the stage pretrain, in {run_dir}")
    words = ["+experiment=demo/prune_recover", f"stages.pretrain.training.max_steps={settings.train_steps}"]
    words += ["stages=[pretrain]", f"run_dir={run_dir}", "logger=none"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\nerror: the model was not made")
    return str(run_dir / "pretrain")


def write_tokens(folder: Path, settings: Settings) -> None:
    """The sequences that our stage calibrates with, for the peer too; and sequences of text that was held out."""
    import torch

    from pipeline.data.documents import documents

    calibration = []
    for repeat in range(settings.repeats):
        made, context = stage("gptq", "w8a16", [], folder / f"sequences-{repeat}", settings, repeat)
        tokenizer, _, batches = made.layer_by_layer.open(context)
        calibration.append(torch.cat(batches))
    texts = documents(made.data, "test")["text"][:]
    tokens = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    length = settings.calibration_length
    count = min(settings.held_out_sequences, len(tokens) // length)
    if not count:
        sys.exit(f"error: {len(tokens):,} tokens are held out, less than a sequence of {length}; give more --text")
    held_out = torch.tensor(tokens[: count * length]).view(count, length)
    torch.save({"calibration": torch.stack(calibration), "held_out": held_out}, folder / "tokens.pt")


def measure(
    sides: list[str],
    schemes: list[str],
    also: dict[str, str],
    settings: Settings,
    python: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), settings)
        for side in ["also", *sides]:
            say(f"{side} …")
            words = ["--side", side, "--folder", folder, "--settings", json.dumps(asdict(settings))]
            words += ["--schemes", ",".join(schemes), *(f"--also={name}={path}" for name, path in also.items())]
            command = [python if side in PEERS else sys.executable, __file__, *words]
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stderr[-4000:]}\nerror: side {side} failed under {command[0]}")
            runs[side] = json.loads(done.stdout.splitlines()[-1])
    return summary(runs, sides, schemes)


def summary(runs: dict[str, Any], sides: list[str], schemes: list[str]) -> dict[str, Any]:
    """Medians over repeats. `increase`: of the perplexity over the float model's, a share of it."""
    plain = runs["also"]["found"]
    dense = plain["float"]["perplexity"]
    found: dict[str, Any] = {}
    for side in sides:
        for scheme in schemes:
            each = runs[side]["found"][scheme]
            middle = {key: statistics.median(run[key] for run in each) for key in ("perplexity", "kl", "seconds")}
            values = [run["perplexity"] for run in each]
            names = each[0]["matrices"]
            of_scheme = found.setdefault(scheme, {})
            of_scheme[side] = {
                **middle,
                "perplexity_range": [min(values), max(values)],
                "increase": middle["perplexity"] / dense - 1,
                "matrices": names,
            }
    ratio = {
        f"{mine} ÷ {theirs}, {scheme}": {"perplexity": a["perplexity"] / b["perplexity"], "kl": a["kl"] / b["kl"]}
        for scheme, of_scheme in found.items()
        for mine, theirs in PAIRS.items()
        if (a := of_scheme.get(mine)) and (b := of_scheme.get(theirs)) and a["matrices"] == b["matrices"]
    }
    for of_scheme in found.values():
        for each in of_scheme.values():
            each["matrices"] = len(each["matrices"])
    return {
        "schemes": found,
        "ratio": ratio,
        "float": plain.pop("float"),
        "also": plain,
        "versions": {side: run["versions"] for side, run in runs.items()},
        "load": {side: round(run["load"], 2) for side, run in runs.items()},
    }


def table(found: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("scheme", "side", "perplexity", "range", "increase", "KL", "seconds", "matrices")
    shown.add_row("", "float", f"{found['float']['perplexity']:.3f}")
    for scheme, of_scheme in found["schemes"].items():
        for side, each in of_scheme.items():
            low, high = each["perplexity_range"]
            shown.add_row(
                scheme,
                side,
                f"{each['perplexity']:.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{each['increase']:+.2%}",
                f"{each['kl']:.5f}",
                f"{each['seconds']:.1f}",
                str(each["matrices"]),
            )
    dense = found["float"]["perplexity"]
    for name, each in found["also"].items():
        increase = f"{each['perplexity'] / dense - 1:+.2%}"
        shown.add_row("", name, f"{each['perplexity']:.3f}", "", increase, f"{each['kl']:.5f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two minutes on 2 cores: 150 steps, one scheme, ours alone"
    )
    parser.add_argument(
        "--peer-python",
        help="has auto-round (default: $RETORT_AUTO_ROUND_PYTHON or .venv-auto-round/bin/python)",
        default=os.environ.get("RETORT_AUTO_ROUND_PYTHON", str(ROOT / ".venv-auto-round/bin/python")),
    )
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}; `ours`: all of ours")
    parser.add_argument("--schemes", help=f"comma-separated, of {', '.join(SCHEMES)}")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=FOLDER", help="a model that was made already; repeatable"
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    for name in ("--side", "--folder", "--settings"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    also = dict(each.split("=", 1) for each in words.also if "=" in each)
    if len(also) < len(words.also):
        parser.error(f"--also {' '.join(words.also)}: need NAME=FOLDER, each name once")
    if words.side:
        run_child(
            words.side, Path(words.folder), Settings(**json.loads(words.settings)), words.schemes.split(","), also
        )
        return

    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, wherever it is imported, looks for a GPU and says so
    from rich.console import Console

    settings, sides, schemes = Settings(threads=os.cpu_count() or 1), list(SIDES), list(SCHEMES)
    if words.quick:
        settings = replace(
            settings, train_steps=150, repeats=1, calibration_samples=32, held_out_sequences=32, qat_steps=20
        )
        sides, schemes = [side for side in SIDES if side not in PEERS], ["w4a16_g32"]
    settings = replace(
        settings, **{name: value for name in asdict(settings) if (value := getattr(words, name)) is not None}
    )
    if words.sides:
        sides = [each for each in SIDES if each not in PEERS] if words.sides == "ours" else words.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(sorted(unknown))}: need some of {', '.join(SIDES)}")
    schemes = words.schemes.split(",") if words.schemes else schemes
    if unknown := set(schemes) - set(SCHEMES):
        parser.error(f"--schemes {','.join(sorted(unknown))}: need some of {', '.join(SCHEMES)}")
    if set(sides) & set(PEERS) and not Path(words.peer_python).is_file():
        parser.error(
            f"--peer-python {words.peer_python}: not there; make it as benchmarks/README.md says, or leave auto-round "
            f"out with --sides ours"
        )
    for name, path in also.items():
        if not Path(path, "config.json").is_file():
            parser.error(f"--also {name}={path}: no config.json in it; give a model folder")
    for name in ("repeats", "calibration_samples", "held_out_sequences"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: need 1 or more")
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    settings = replace(settings, model=settings.model or teacher(settings, say))
    for scheme in list(schemes):
        skipped = left_out(settings, scheme)
        if len(skipped) == 7:
            say(f"left out: {scheme}, whose groups divide no width of the model")
            schemes.remove(scheme)
        elif skipped:
            say(f"{scheme}: {', '.join(skipped)} stay float")
    found = measure(sides, schemes, also, settings, words.peer_python, say)
    console.print(table(found))
    for name, each in found["ratio"].items():
        say(f"{name}: perplexity {each['perplexity']:.4f}, KL {each['kl']:.3f}")
    print(json.dumps({**found, "device": f"cpu, {settings.threads} threads", "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
