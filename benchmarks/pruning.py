"""Perplexity right after pruning, seconds and peak memory: ours against LLM-Pruner's algorithm in torch-pruning.

    .venv/bin/python benchmarks/pruning.py --quick

The same model, calibration tokens and kept fraction of heads and MLP channels. Each side is a fresh process; the sides
take turns, so that a busy machine slows all of them. The peers live in an environment of their own
(benchmarks/README.md), whose Python runs this very file. `--model random-1.1b`: time and memory alone.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIG = "random-1.1b"


@dataclass(frozen=True)
class Settings:
    model: str = ""  # a folder; without one the stage `pretrain` makes one; or BIG
    kept_fraction: float = 0.75
    calibration_samples: int = 10  # LLM-Pruner's
    calibration_length: int = 64
    held_out_sequences: int = 128  # of 128 tokens each, for the perplexity
    train_steps: int = 1400  # of the model that is made
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    repeats: int = 3  # each with other calibration sequences, and another seed of the random sides


SIDES = {
    "ours": "Retort: Taylor, mix: |w·g − ½w²·A|",
    "llm_pruner": "LLM-Pruner's passes and formula, mix, in torch-pruning's groups",
    "ours_first": "Retort: Taylor, first: |w·g|",
    "torch_pruning": "its GroupTaylorImportance: |w·g|",
    "ours_vectorize": "Retort: Taylor, vectorize: |Σ w·g|",
    "torch_pruning_vectorize": "its GroupTaylorImportance, multivariable: |Σ w·g|",
    "ours_second": "Retort: Taylor, second: w²·A",
    "torch_pruning_second": "its GroupHessianImportance: w²·A of the last sample alone",
    "ours_l2": "Retort: w²",
    "torch_pruning_l2": "its GroupMagnitudeImportance: w²",
    "ours_random": "Retort: random",
    "torch_pruning_random": "its RandomImportance",
}
PEERS = dict(zip(list(SIDES)[:10:2], list(SIDES)[1:10:2], strict=True))  # what is random is not compared
PARTS = ("load", "score", "prune", "save")
GOALS = {"perplexity": 1.0, "seconds": 1 / 3, "peak_memory": 0.6}  # ours ÷ theirs, at most
HELD = {"ours": 2.2, "peer": 4.2}  # times the weights, at most: what must be free before a side starts


class Clock:
    """Peak memory since it was made, and seconds by part of the work."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device, self.seconds = torch, device, dict[str, float]()
        if device == "cuda":
            torch.zeros((), device="cuda")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
        self.before = resident("VmRSS")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - begin

    def figures(self) -> dict[str, Any]:
        host = resident("VmHWM") - self.before
        peak = self.torch.cuda.max_memory_allocated() if self.device == "cuda" else host
        return {"seconds": self.seconds, "peak_memory": peak, "load": os.getloadavg()[0]}


def resident(field: str, of: str = "self/status") -> int:
    line = next(text for text in Path("/proc", of).read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) * 1024


def ours(side: str, folder: Path, settings: Settings, sequences: Any, seed: int) -> dict[str, Any]:
    """As the stage `prune`, without its certificate, which no peer has."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.load import DTYPES, load_model
    from models.pruning.groups import anatomy_of
    from models.pruning.importance import gather
    from models.pruning.importances.magnitude import Magnitude
    from models.pruning.importances.random import Random
    from models.pruning.importances.taylor import Taylor
    from models.pruning.plan import Wish, alike, choose
    from models.pruning.sizes import Shapes
    from models.pruning.surgery import pruned_state, smaller_config
    from models.save import save_model
    from pipeline.data.tokenizer import load_tokenizer

    order = side.removeprefix("ours").removeprefix("_") or "mix"
    importance = {"l2": Magnitude(2), "random": Random(seed)}.get(order) or Taylor(order)
    dtype = DTYPES[settings.dtype]
    ends = torch.full((len(sequences), 1), -100, device=sequences.device)
    batch = {
        "input_ids": sequences,
        "position_ids": torch.arange(sequences.shape[1], device=sequences.device).expand_as(sequences),
        "targets": torch.cat([sequences[:, 1:], ends], dim=1),
    }
    clock = Clock(settings.device)
    with clock.part("load"):
        tokenizer = load_tokenizer(settings.model)
        model = load_model(settings.model, dtype=dtype).to(settings.device)
    with clock.part("score"):
        anatomy = anatomy_of(model)
        kinds = ("heads", "mlp")
        statistics_ = gather(importance, model, anatomy, kinds, [batch] if importance.needs_calibration_data else [])
        scores = importance.scores(model, anatomy, kinds, statistics_)
    with clock.part("prune"):
        shapes, wish = Shapes.of_model(model, anatomy), Wish(kept_fraction=settings.kept_fraction)
        kept = alike(shapes, scores, choose(shapes, scores, wish), wish)
        with torch.device("meta"):
            pruned = AutoModelForCausalLM.from_config(smaller_config(model.config, anatomy, kept)[0])
        state = pruned_state(model.state_dict(), anatomy, kept)
    with clock.part("save"):
        save_model(pruned, tokenizer, folder / side, state, dtype)
    found = clock.figures()
    del model, state
    pruned = load_model(str(folder / side), dtype=dtype).to(settings.device)
    removed = {name: sorted({*range(anatomy.groups[name].units)} - {*kept[name].tolist()}) for name in kept}
    return {**found, "perplexity": perplexity(pruned, folder), "parameters": numbers(pruned), "removed": removed}


def peer(side: str, folder: Path, settings: Settings, sequences: Any, seed: int) -> dict[str, Any]:
    """torch-pruning's recipe for language models (examples/LLMs/prune_llm.py) with the hidden size left whole."""
    import torch
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    order = side.rpartition("_")[2] if side.startswith("torch_pruning_") else side
    torch.manual_seed(seed)
    clock = Clock(settings.device)
    with clock.part("load"):
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
        model = model.to(settings.device).eval()
        model.config.use_cache = False
    with clock.part("score"):
        importance = _importance(tp, order, model, sequences)
        layers, ratio = model.model.layers, 1 - settings.kept_fraction
        heads = {layer.self_attn.q_proj: f"layers.{n}.heads" for n, layer in enumerate(layers)}
        mlps = {layer.mlp.gate_proj: f"layers.{n}.mlp" for n, layer in enumerate(layers)}
        counts = [getattr(layer.self_attn, f"{name}_proj") for layer in layers for name in "qkv"]
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=sequences[:1, :8],
            output_transform=lambda out: out.logits,
            importance=importance,
            global_pruning=False,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            num_heads=dict.fromkeys(counts, model.config.num_attention_heads),
            prune_num_heads=True,
            prune_head_dims=False,
            ignored_layers=[model.lm_head, *(each for x in layers for each in (x.self_attn.o_proj, x.mlp.down_proj))],
        )
        plan = pruner.step(interactive=True)
        groups = [next(plan)]  # all are scored before the first is handed out
    with clock.part("prune"):
        removed = {}
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        while groups:
            for dependency, places in groups[0]:
                if dependency.pruning_fn == tp.prune_linear_out_channels and dependency.layer in mlps:
                    removed[mlps[dependency.layer]] = sorted(places)
                elif dependency.pruning_fn == tp.prune_linear_out_channels and dependency.layer in heads:
                    removed[heads[dependency.layer]] = sorted({place // head_dim for place in places})
            groups.pop().prune()
            groups += [group for group in (next(plan, None),) if group is not None]
    with clock.part("save"):
        torch.save(model.state_dict(), folder / f"{side}.pt")  # no folder that from_pretrained opens
    found = clock.figures()
    (folder / f"{side}.pt").unlink()
    return {**found, "perplexity": perplexity(model, folder), "parameters": numbers(model), "removed": removed}


def _importance(tp: Any, order: str, model: Any, sequences: Any) -> Any:
    """With the gradients it reads in the model. Group reduction sum, nothing normalised: LLM-Pruner's."""
    plain = {"group_reduction": "sum", "normalizer": None}
    if order in ("l2", "random"):
        return tp.importance.RandomImportance() if order == "random" else tp.importance.MagnitudeImportance(2, **plain)
    squares: dict[Any, Any] = {}
    if order == "llm_pruner":  # its passes: of each sample alone, squared and kept, of every parameter
        for sequence in sequences:
            model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
            for parameter in model.parameters():
                square = parameter.grad * parameter.grad / len(sequences)
                squares[parameter] = squares[parameter].add_(square) if parameter in squares else square
            model.zero_grad()
    if order == "second":
        hessian = tp.importance.GroupHessianImportance(**plain)
        for sequence in sequences:
            model.zero_grad()
            model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
            hessian.accumulate_grad(model)
        return hessian
    model(input_ids=sequences, labels=sequences, use_cache=False).loss.backward()
    if order != "llm_pruner":
        return tp.importance.GroupTaylorImportance(multivariable=order == "vectorize", **plain)

    class Mix(tp.importance.GroupTaylorImportance):  # torch-pruning has none of both orders
        def __call__(self, group: Any) -> Any:
            parts, roots = [], []
            for item in group:
                name = type(item.dep.layer).__name__
                if name == "Linear":
                    weight = item.dep.layer.weight.detach()
                    change = weight * item.dep.layer.weight.grad
                    change = change - 0.5 * weight * squares[item.dep.layer.weight] * weight
                    out = item.dep.pruning_fn == tp.prune_linear_out_channels
                    parts.append(change.abs().sum(1 if out else 0)[item.idxs])
                    roots.append(item.root_idxs)
            return self._reduce(parts, roots)

    return Mix(**plain)


def perplexity(model: Any, folder: Path) -> float | None:
    """Of the held-out sequences; None where there are none."""
    import torch

    sequences = torch.load(folder / "tokens.pt")["held_out"].to(model.device)
    if not len(sequences):
        return None
    losses = 0.0
    with torch.no_grad():
        for some in sequences.split(16):
            logits = model(input_ids=some, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            losses += float(torch.nn.functional.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum"))
    return math.exp(losses / sequences[:, 1:].numel())


def numbers(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_child(side: str, folder: Path, settings: Settings, repeat: int) -> None:
    """In the side's own process: the last line printed is its figures."""
    import warnings
    from importlib import metadata

    import torch
    from transformers import logging

    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, let it be this process's end
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    sequences = torch.load(folder / "tokens.pt")["calibration"][repeat].to(settings.device)
    run = ours if side.startswith("ours") else peer
    small = replace(settings, model=str(folder / "warm"))
    run(side, folder / "warm", small, sequences % 64, 0)  # all of it, for nothing
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = run(side, folder, settings, sequences, repeat)
    names = ("torch", "transformers", *(() if side.startswith("ours") else ("torch-pruning",)))
    print(json.dumps({**found, "versions": {name: metadata.version(name) for name in names}}))


def teacher(settings: Settings, say: Callable[[str], None]) -> str:
    """The quickstart's teacher with eight heads, each of its own KV; made once by the project's own stage."""
    run_dir = ROOT / f"runs/benchmarks/pruning-{settings.train_steps}-steps"
    if (run_dir / "pretrain/manifest.json").is_file():
        return str(run_dir / "pretrain")
    say(f"making a model: {settings.train_steps} steps of the stage pretrain, in {run_dir}")
    words = [f"stages.pretrain.model.{name}=8" for name in ("num_attention_heads", "num_key_value_heads")]
    words += [f"stages.pretrain.training.max_steps={settings.train_steps}", "stages=[pretrain]", f"run_dir={run_dir}"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\nerror: the model was not made")
    return str(run_dir / "pretrain")


def write_inputs(folder: Path, settings: Settings) -> tuple[Settings, float | None]:
    """The sequences of all sides, a small model to warm up with, the big random one; perplexity before pruning."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, logging

    from pipeline.data.documents import Documents, documents
    from pipeline.data.tokenizer import load_tokenizer

    logging.disable_progress_bar()
    dtype = getattr(torch, settings.dtype)
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    big = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    torch.manual_seed(0)
    for name, shape in (("warm", tiny), *((("model", big),) if settings.model == BIG else ())):
        heads = shape["hidden_size"] // (64 if shape is big else 8)
        config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=heads)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / name)
        words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / name)
    torch.save({"held_out": torch.randint(64, (1, 8))}, folder / "warm/tokens.pt")
    generator = torch.Generator().manual_seed(0)
    shape = (settings.repeats, settings.calibration_samples, settings.calibration_length)
    if settings.model == BIG:
        tokens = {"calibration": torch.randint(32000, shape), "held_out": torch.zeros(0, 128, dtype=torch.long)}
        torch.save(tokens, folder / "tokens.pt")
        return replace(settings, model=str(folder / "model")), None
    tokenizer = load_tokenizer(settings.model)

    def some(split: str, sequences: int, length: int) -> Any:
        texts = tokenizer(documents(Documents(), split)["text"][:])["input_ids"]
        whole = torch.tensor([token for text in texts for token in text])
        every = len(whole) // sequences  # from all of the text alike
        if every < length:
            sys.exit(
                f"error: {len(whole):,} tokens to hold out; need {sequences * length:,}: fewer --held-out-sequences"
            )
        starts = torch.randint(every - length + 1, (sequences,), generator=generator) + every * torch.arange(sequences)
        return torch.stack([whole[start : start + length] for start in starts])

    calibration = [some("train", shape[1], shape[2]) for _ in range(settings.repeats)]
    tokens = {"calibration": torch.stack(calibration), "held_out": some("validation", settings.held_out_sequences, 128)}
    torch.save(tokens, folder / "tokens.pt")
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    return settings, perplexity(model, folder)


def measure(sides: list[str], settings: Settings, peer_python: str, say: Callable[[str], None]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings, dense = write_inputs(Path(folder), settings)
        weights = sum(path.stat().st_size for path in Path(settings.model).glob("*.safetensors"))
        for repeat in range(settings.repeats):
            for side in sides:
                need = HELD["ours" if side.startswith("ours") else "peer"] * weights + 2**29
                if (free := resident("MemAvailable", "meminfo")) < need:
                    say(f"{side} left out: it may need {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
                    continue
                python = sys.executable if side.startswith("ours") else peer_python
                words = ["--side", side, "--folder", folder, "--repeat", str(repeat)]
                words += ["--settings", json.dumps(asdict(settings))]
                words = [python, __file__, *words]
                done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{done.stderr[-4000:]}\nerror: side {side} failed under {python}")
                runs.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
                last = runs[side][-1]
                parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in last["seconds"].items())
                say(f"{repeat + 1}/{settings.repeats} {side}: seconds: {parts}; {last['peak_memory'] / 2**20:,.0f} MiB")
    found = {side: summary(each) for side, each in runs.items()}
    ratio = ratios(runs, found)
    goals = {  # of each pair: never worse, three times as fast, with 0.6 of the memory
        name: {key: value <= most for key, most in GOALS.items() if (value := each[key]) is not None}
        for name, each in ratio.items()
    }
    return {"sides": found, "ratio": ratio, "goals": goals, "perplexity_before": dense, "weights": weights}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats, and the spread."""
    seconds = [sum(run["seconds"].values()) for run in runs]
    found = [run["perplexity"] for run in runs if run["perplexity"] is not None]
    return {
        "perplexity": statistics.median(found) if found else None,
        "perplexity_range": [min(found), max(found)] if found else None,
        "seconds": round(statistics.median(seconds), 3),
        "seconds_range": [round(min(seconds), 3), round(max(seconds), 3)],
        "parts": {part: round(statistics.median(run["seconds"][part] for run in runs), 3) for part in PARTS},
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "parameters": runs[0]["parameters"],
        "load": [round(run["load"], 2) for run in runs],
        "versions": runs[0]["versions"],
    }


def ratios(runs: dict[str, list[dict[str, Any]]], figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Ours over theirs, like with like. `same_removed`: of the units that they remove, the share that ours does too."""
    found = {}
    for mine, theirs in PEERS.items():
        if mine in figures and theirs in figures:
            ours, other = figures[mine], figures[theirs]
            shares = []
            for one, two in zip(runs[mine], runs[theirs], strict=False):
                both = [(set(one["removed"].get(name, ())), set(units)) for name, units in two["removed"].items()]
                shares.append(sum(len(a & b) for a, b in both) / sum(len(b) for _, b in both))
            found[f"{mine} ÷ {theirs}"] = {
                "perplexity": ours["perplexity"] and round(ours["perplexity"] / other["perplexity"], 4),
                "seconds": round(ours["seconds"] / other["seconds"], 3),
                "score_seconds": round(ours["parts"]["score"] / other["parts"]["score"], 3),
                "peak_memory": round(ours["peak_memory"] / other["peak_memory"], 3),
                "same_removed": round(statistics.mean(shares), 4),
            }
    return found


def table(found: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table("side", "perplexity", "seconds", "of which scores", "peak MiB", "parameters", "what it is")
    for side, each in found["sides"].items():
        shown.add_row(
            side,
            "" if each["perplexity"] is None else f"{each['perplexity']:.3f}",
            f"{each['seconds']:.2f}",
            f"{each['parts']['score']:.2f}",
            f"{each['peak_memory'] / 2**20:,.0f}",
            f"{each['parameters']:,}",
            SIDES[side],
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute on 2 cores: 300 steps, fewer sides, once")
    parser.add_argument(
        "--peer-python",
        help="has torch-pruning (default: $RETORT_PEER_PYTHON or .venv-peers/bin/python)",
        default=os.environ.get("RETORT_PEER_PYTHON", str(ROOT / ".venv-peers/bin/python")),
    )
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}; `ours`: all of ours")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, value in asdict(Settings()).items():
        if name != "device":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    for name in ("--side", "--folder", "--repeat", "--settings"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if words.side:
        run_child(words.side, Path(words.folder), Settings(**json.loads(words.settings)), int(words.repeat))
        return

    import torch
    from rich.console import Console

    device = words.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, wherever it is imported, looks for a GPU and says so
    settings = Settings(device=device, threads=os.cpu_count() or 1)
    sides = list(SIDES)[:4] if words.model == BIG else list(SIDES)
    if words.quick:
        settings, sides = replace(settings, train_steps=300, repeats=1), sides[:2]
    given = {name: value for name in asdict(settings) if (value := getattr(words, name, None)) is not None}
    settings = replace(settings, **given)
    if words.sides:
        sides = [each for each in sides if each.startswith("ours")] if words.sides == "ours" else words.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(sorted(unknown))}: need some of {', '.join(SIDES)}")
    if not all(side.startswith("ours") for side in sides) and not Path(words.peer_python).is_file():
        parser.error(
            f"--peer-python {words.peer_python}: not there; make it as benchmarks/README.md says, or leave "
            f"torch-pruning out with --sides ours"
        )
    for name, least in (
        ("repeats", 1),
        ("calibration_samples", 1),
        ("calibration_length", 8),
        ("held_out_sequences", 1),
    ):
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: need {least} or more")
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    settings = replace(settings, model=settings.model or teacher(settings, say))
    if settings.model != BIG:
        config = json.loads(Path(settings.model, "config.json").read_text())
        if config.get("num_key_value_heads") != config["num_attention_heads"]:
            say("left out: the peers; torch-pruning prunes models whose heads share keys and values wrongly")
            sides = [side for side in sides if side.startswith("ours")]
    found = measure(sides, settings, words.peer_python, say)
    console.print(table(found))
    if found["perplexity_before"]:
        say(f"before pruning: perplexity {found['perplexity_before']:.3f}")
    for name, each in found["ratio"].items():
        missed = [key for key, met in found["goals"][name].items() if not met]
        shown = ", ".join(f"{key} {value}" for key, value in each.items() if value is not None)
        say(f"{name}: {shown}" + (f"; short of the goal: {', '.join(missed)}" if missed else ""))
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {settings.threads} threads"
    print(json.dumps({**found, "device": name, "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
