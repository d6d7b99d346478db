"""Tokens per second of generation with and without the KV cache, and what the cache takes, by kind of attention.

    .venv/bin/python benchmarks/generation.py --quick

The same prompt and random weights, greedy, through models.generation: with the cache a token costs one column of
attention and one token's products; without it all tokens before are read again. Each side is a fresh process; the sides
take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ATTENTIONS = ("mha", "gqa", "mqa")
MODES = ("cached", "uncached")
SIDES = tuple(f"{attention}_{mode}" for attention in ATTENTIONS for mode in MODES)


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 8000
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    groups: int = 2  # key-value heads of gqa; mha has one for each head, mqa one
    prompt_tokens: int = 16
    lengths: str = "64,128,256,512,1024"  # new tokens
    sequences: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 2
    repeats: int = 3

    def kv_heads(self, attention: str) -> int:
        return {"mha": self.heads, "gqa": self.groups, "mqa": 1}[attention]

    @property
    def new_tokens(self) -> list[int]:
        return [int(length) for length in self.lengths.split(",")]


def run_child(side: str, settings: Settings) -> None:
    """One measurement of every length, after one for nothing; JSON on the last line."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.generation import Sampling, generate

    torch.set_num_threads(settings.threads)
    attention, mode = side.split("_")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads(attention),
            max_position_embeddings=settings.prompt_tokens + max(settings.new_tokens),
        )
    )
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    model = model.to(settings.device, dtype).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        settings.vocabulary, (settings.sequences, settings.prompt_tokens), generator=generator
    ).tolist()

    def now() -> float:
        if settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def text(length: int) -> list[list[int]]:
        """No end token: all answers have this length."""
        sampling = Sampling(max_new_tokens=length)
        found = generate(
            model,
            prompts,
            sampling,
            pad_token=0,
            end_tokens=(),
            batch_size=settings.sequences,
            use_cache=mode == "cached",
        )
        return [answer.ids for _, (answer,) in sorted(found)]

    text(min(settings.new_tokens))  # warm up
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
    seconds, cpu_seconds, texts = {}, {}, {}
    for length in settings.new_tokens:
        begin, cpu = now(), time.process_time()
        made = text(length)
        seconds[length], cpu_seconds[length] = now() - begin, time.process_time() - cpu
        texts[length] = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    peak = torch.cuda.max_memory_allocated() if settings.device == "cuda" else resident("VmHWM") - before
    with torch.no_grad():
        ids = torch.tensor(prompts, device=settings.device)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "texts": texts,
                "cache_bytes_per_token": held / (settings.sequences * settings.prompt_tokens),
                "peak_memory": peak,
                "load": os.getloadavg()[0],
                "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
            }
        )
    )


def resident(field: str) -> int:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) * 1024


def measure(sides: list[str], settings: Settings, say: Any) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(settings.repeats):
        for side in sides:
            words = ["--side", side, "--settings", json.dumps(asdict(settings))]
            done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stderr[-4000:]}\nerror: {side} failed")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            last = settings.new_tokens[-1]
            speed = settings.sequences * last / runs[side][-1]["seconds"][str(last)]
            say(f"{repeat + 1}/{settings.repeats} {side}: {speed:,.0f} tokens/s at {last} tokens")
    figures = {side: summary(each, settings) for side, each in runs.items()}
    return {"sides": figures, "ratio": ratios(figures), "same_text": same_text(runs)}


def summary(runs: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Medians over repeats. `growth`: the exponent by which the work grows over the last doubling of the length; the
    work is the seconds on a GPU, and on a CPU the processor's, which do not count waiting for others."""
    seconds = {n: statistics.median(run["seconds"][str(n)] for run in runs) for n in settings.new_tokens}
    cpu = {n: statistics.median(run["cpu_seconds"][str(n)] for run in runs) for n in settings.new_tokens}
    work = cpu if settings.device == "cpu" else seconds
    *_, before, last = (1, *settings.new_tokens)
    grown = work[last] / work[before] if before in work else None
    return {
        "tokens_per_second": {n: round(settings.sequences * n / seconds[n], 1) for n in seconds},
        "tokens_per_second_range": {
            n: [round(settings.sequences * n / pick(run["seconds"][str(n)] for run in runs), 1) for pick in (max, min)]
            for n in seconds
        },
        "cpu_ms_per_token": {n: round(1000 * cpu[n] / (settings.sequences * n), 2) for n in cpu},
        "growth": None if grown is None else round(math.log(grown) / math.log(last / before), 2),
        "cache_bytes_per_token": runs[0]["cache_bytes_per_token"],
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "load": [round(run["load"], 2) for run in runs],
        "versions": runs[0]["versions"],
    }


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """Cached ÷ uncached tokens/s, by attention and length."""
    found = {}
    for attention in ATTENTIONS:
        pair = [figures.get(f"{attention}_{mode}") for mode in MODES]
        if all(pair):
            cached, uncached = (each["tokens_per_second"] for each in pair if each)
            found[attention] = {length: round(cached[length] / uncached[length], 2) for length in cached}
    return found


def same_text(runs: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Whether cached and uncached generation wrote the same tokens, at every length."""
    found = {}
    for attention in ATTENTIONS:
        texts = [run["texts"] for mode in MODES for run in runs.get(f"{attention}_{mode}", [])]
        if texts:
            found[attention] = all(each == texts[0] for each in texts)
    return found


def table(found: dict[str, Any], lengths: list[int]) -> Any:
    from rich.table import Table

    columns = [f"{length}: tokens/s (CPU ms a token)" for length in lengths]
    shown = Table("side", *columns, "growth", "cache bytes a token", "peak MiB")
    for side, each in found["sides"].items():
        shown.add_row(
            side,
            *(f"{each['tokens_per_second'][n]:,.0f} ({each['cpu_ms_per_token'][n]:.1f})" for n in lengths),
            "" if each["growth"] is None else f"n^{each['growth']:.2f}",
            f"{each['cache_bytes_per_token']:,.0f}" if side.endswith("_cached") else "",
            f"{each['peak_memory'] / 2**20:,.0f}",
        )
    for attention, ratio in found["ratio"].items():
        shown.add_row(f"{attention}: cached ÷ uncached", *(f"{ratio[length]:.2f}×" for length in lengths), "", "", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute on 2 cores: up to 256 tokens, once")
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, value in asdict(Settings()).items():
        if name not in ("device", "precision"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    for name in ("--side", "--settings"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.side:
        run_child(words.side, Settings(**json.loads(words.settings)))
        return

    sides = (words.sides or ",".join(SIDES)).split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(sorted(unknown))}: need some of {', '.join(SIDES)}")

    import torch
    from rich.console import Console

    device = words.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device=device, precision="bf16" if device == "cuda" else "fp32", threads=os.cpu_count() or 1)
    if words.quick:
        settings = replace(settings, lengths="64,128,256", repeats=1)
    given = {name: value for name in asdict(settings) if (value := getattr(words, name, None)) is not None}
    settings = replace(settings, **given)
    for name in ("sequences", "repeats", "prompt_tokens", "layers"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: need 1 or more")
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    found = measure(sides, settings, lambda line: console.print(line, highlight=False))
    console.print(table(found, settings.new_tokens))
    for attention, same in found["same_text"].items():
        console.print(f"{attention}: {'the same text' if same else 'ANOTHER TEXT'} with and without the cache")
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {settings.threads} threads"
    print(json.dumps({**found, "device": name, "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
