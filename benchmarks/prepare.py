"""Tokens per second of preparing text: packed sequences on disk, from a file of documents.

    .venv/bin/python benchmarks/prepare.py --quick

The same documents and the same tokenizer, of ours in one process and in two, of `datasets.map` with TRL's packing, and
of the tokenizer alone. Each side is a fresh process whose tokenizer uses one thread, and they take turns. With
`--before CHECKOUT` an earlier version of the project is a side too.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("tokenizer", "ours_1", "ours_2", "trl", "before")
KINDS = ("short", "long")


@dataclass(frozen=True)
class Settings:
    megabytes: int = 128  # of text
    part_megabytes: int = 16  # of text in a shard; the project's own are 64
    vocabulary: int = 16_000
    length: int = 2048  # tokens in a packed sequence
    repeats: int = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--sides", default="tokenizer,ours_1,ours_2,trl")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version, as one more side")
    parser.add_argument(
        "--peer-python", default=os.environ.get("RETORT_PEER_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"{value}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = Settings(megabytes=6, part_megabytes=2, vocabulary=2000, repeats=1) if given.quick else Settings()
    settings = replace(settings, **{n: v for n in asdict(settings) if (v := getattr(given, n)) is not None})
    if given.child:
        print(json.dumps(measured(given.child[0], Path(given.child[1]), settings)))
        return 0
    sides = [*given.sides.split(","), *(["before"] if given.before else [])]
    if unknown := {*sides} - {*SIDES} | {*given.kinds.split(",")} - {*KINDS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return compare(sides, given.kinds.split(","), settings, given.peer_python, given.before)


def compare(sides: list[str], kinds: list[str], settings: Settings, peer: str, before: Path | None) -> int:
    sys.path.insert(0, str(ROOT))
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            folder = Path(scratch) / kind
            folder.mkdir()
            write_text(folder, kind, settings)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(settings.repeats):
                for side in sides:
                    runs[side].append(child(side, folder, settings, peer, before))
            figures[kind] = {side: summary(each) for side, each in runs.items()}
            table(kind, figures[kind])
    ratios = {kind: ratios_of(each) for kind, each in figures.items()}
    for kind, told in ratios.items():
        print(f"{kind}: " + ", ".join(f"{name} {ratio:.2f}×" for name, ratio in told.items()))
    libraries = {name: version(name) for name in ("tokenizers", "transformers", "datasets", "numpy")}
    print(
        json.dumps(
            {"figures": figures, "ratios": ratios, "device": "cpu", "settings": asdict(settings)}
            | {"versions": libraries}
        )
    )
    return 0


def child(side: str, folder: Path, settings: Settings, peer: str, before: Path | None) -> dict[str, Any]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    python = peer if side == "trl" else sys.executable
    root = before if side == "before" else ROOT
    env = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    env |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [python, str(Path(__file__).resolve()), "--child", side, str(folder), *words]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["tokens"] / run["seconds"] for run in runs]
    return {
        "tokens_per_second": statistics.median(speeds),
        "range": [min(speeds), max(speeds)],
        **{name: statistics.median(run[name] for run in runs) for name in ("tokens", "bytes_per_token", "peak_memory")},
        "load": [run["load"] for run in runs],
    }


def ratios_of(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    pairs = [("ours_2", "ours_1"), *(("ours_1", other) for other in ("before", "trl", "tokenizer"))]
    speed = {side: each["tokens_per_second"] for side, each in figures.items()}
    return {f"{a} ÷ {b}": speed[a] / speed[b] for a, b in pairs if a in speed and b in speed}


def table(kind: str, figures: dict[str, dict[str, Any]]) -> None:
    print(f"\n{kind} documents\n| side | tokens/s (range) | bytes a token on disk | peak memory |\n|---|---|---|---|")
    for side, each in figures.items():
        low, high = each["range"]
        speed = f"{each['tokens_per_second']:,.0f} ({low:,.0f}–{high:,.0f})"
        print(
            f"| `{side}` | {speed} | {each['bytes_per_token']:.2f} | {each['peak_memory'] / 2**20:,.0f} MB |",
            flush=True,
        )


# Text


def write_text(folder: Path, kind: str, settings: Settings) -> None:
    """Documents of the embedded corpus, whole or by paragraphs, again and again; and a tokenizer trained on them."""
    from pipeline.data.stdlib import library_documents
    from pipeline.data.tokenizer import train_tokenizer

    texts = library_documents()
    train_tokenizer(texts, settings.vocabulary, folder / "tokenizer").save_pretrained(folder / "tokenizer")
    if kind == "short":
        texts = [part for text in texts for part in text.split("\n\n") if len(part) > 40]
    left, number = settings.megabytes * 10**6, 0
    with (folder / "text.jsonl").open("w") as file:
        while left > 0:
            text = f"{texts[number % len(texts)]} {number}"
            left, number = left - len(text), number + 1
            file.write(json.dumps({"text": text}) + "\n")


# Sides, each in a process of its own


def measured(side: str, folder: Path, settings: Settings) -> dict[str, Any]:
    work: dict[str, Callable[[Path, Settings], Iterator[Any]]] = {"tokenizer": tokenizer_alone, "trl": trl}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (folder / "out").unlink(missing_ok=True)
        (folder / "out").symlink_to(scratch)
        steps = work.get(side, lambda *given: ours(*given, workers=2 if side == "ours_2" else 1))(folder, settings)
        next(steps)  # imports, the tokenizer
        begin = time.perf_counter()
        tokens = next(steps)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "bytes_per_token": size / tokens,
        "peak_memory": int(peak.split()[1]) * 1024,
        "load": os.getloadavg()[0],
    }


def ours(folder: Path, settings: Settings, workers: int) -> Iterator[Any]:
    from pipeline.data.documents import Documents
    from pipeline.data.tokenizer import load_tokenizer

    data = Documents(train=str(folder / "text.jsonl"), max_length=settings.length, holdout=0)
    try:
        from pipeline.data import packing, parts
    except ImportError:  # an earlier version
        from pipeline.data import packing
    else:
        parts.PART_BYTES = settings.part_megabytes * 2**20
        data.workers = workers
    tokenizer = load_tokenizer(folder / "tokenizer")
    yield packing
    yield data.prepare("train", tokenizer, folder / "out" / "rows")[1]["tokens"]


def tokenizer_alone(folder: Path, settings: Settings) -> Iterator[Any]:
    """The ids of every document, which are not kept; read from the same file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with (folder / "text.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    yield None
    tokens = 0
    for first in range(0, len(texts), 1000):
        encoded = tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
        tokens += sum(len(each) + 2 for each in encoded)  # with begin and end, as the others have
    yield tokens


def trl(folder: Path, settings: Settings) -> Iterator[Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ends = tokenizer.eos_token_id
    cache = str(folder / "out" / "cache")
    yield None
    tokens = 0

    def tokenized(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        nonlocal tokens
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        tokens += sum(len(each) + 2 for each in ids)
        return {"input_ids": [[ends, *each, ends] for each in ids]}

    documents = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=cache)
    documents = documents.map(tokenized, batched=True, remove_columns=["text"])
    packed = pack_dataset(documents, settings.length, strategy="bfd_split")
    packed.save_to_disk(str(folder / "out" / "rows"))
    yield tokens


if __name__ == "__main__":
    sys.exit(main())
