"""Packed sequences on disk: built once, named by everything they depend on, and shared by the stages of a run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.files import remove, sync
from pipeline import artifact
from pipeline.data.flat import FORMAT, SHARD, Shard
from pipeline.data.sequences import Sequences
from pipeline.data.source import PARSE, DataSource

STATISTICS = "statistics.json"
CUT = "cut"  # in them, where the limit of the length took something: how much, and the key that changes it, in a line
SPELLINGS, FIRST_SPELLING = "control_spellings", "first_control_spelling"  # in them: see pipeline/data/controls.py


def sequences_of(
    data: DataSource, split: str, tokenizer: Any, root: Path, teacher_tokenizer: Any | None = None
) -> tuple[Sequences, dict[str, Any], Path]:
    """(packed sequences, statistics, folder) of a split; the folder is named by everything the sequences depend on.

    With `teacher_tokenizer` they carry the teacher's tokens and the spans between both (pipeline/data/packing.py). What
    the limit of the length took is in the statistics, in a line, which is printed when they are built.
    """
    folder = folder_of(data, split, tokenizer, root, teacher_tokenizer)
    built = not whole(folder)
    if built:
        sequences, statistics = data.prepare(split, tokenizer, folder, teacher_tokenizer)
        tell(data, statistics)
    else:
        sequences, statistics = prepared(folder)
    if lost := _cut(data, statistics):
        statistics = {**statistics, CUT: lost}
        if built:
            print(f"{data.node}.{split}: {lost}", flush=True)
    return sequences, statistics, folder


def folder_of(data: DataSource, split: str, tokenizer: Any, root: Path, teacher_tokenizer: Any | None) -> Path:
    given = [data.content_key(), FORMAT, *_rules(tokenizer)]
    if teacher_tokenizer is not None:
        given += _rules(teacher_tokenizer)
    return root / f"{split}-{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]}"


def tell(data: DataSource, statistics: dict[str, Any]) -> None:
    """A line on the control tokens that texts were found to spell, where there are some."""
    if count := statistics.get(SPELLINGS):
        print(
            f"{data.node}: texts spell control tokens, {count:,} in all, which are read as text; the first is "
            f"{statistics.get(FIRST_SPELLING)} ({data.node}.control_tokens={PARSE} reads them as tokens)",
            flush=True,
        )


def _cut(data: DataSource, statistics: dict[str, Any]) -> str | None:
    """What was lost to the limit of the length, of sources that lose something: texts go on in another sequence."""
    noun = "queries" if "queries" in statistics else "answers" if "too_long" in statistics else "conversations"
    whole, cut = statistics.get("queries", statistics.get("documents", 0)), statistics.get("truncated", 0)
    left_out = statistics.get("too_long", 0) - cut if noun != "conversations" else statistics.get("cut_to_nothing", 0)
    limit = f"{data.max_length:,} tokens ({data.node}.max_length)"
    if noun == "conversations":
        nothing = f", {left_out:,} of them before anything that is learnt, and left out" if left_out else ""
        return f"{cut:,} of {whole:,} conversations were cut at {limit}{nothing}" if cut else None
    if data.teacher_prompts or noun == "queries":
        limit += f", or the teacher's {data.teacher_max_length:,} ({data.node}.teacher_max_length)"
    told = [f"{cut:,} of {whole:,} {noun} were cut at {limit}"] if cut else []
    told += [f"{left_out:,} of {whole:,} {noun} were left out, being longer than {limit}"] if left_out else []
    return "; ".join(told) or None


def once(folder: Path, build: Callable[[Path], list[Shard]]) -> tuple[Sequences, dict[str, Any]]:
    """The sequences in `folder`, which `build(aside)` writes where they are not there yet; it returns their shards.

    A folder that holds what was written is only opened. Else it is written aside and renamed; of several processes that
    ask at once one writes and the others wait. `aside` may hold shards that a killed run has left.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if whole(folder):
            return prepared(folder)
        with writing(folder, alone=True):
            remove(folder)
            aside = aside_of(folder)
            made = build(aside)
            told = {f"{shard.folder.name}/{name}": sha256 for shard in made for name, sha256 in shard.sha256.items()}
            artifact.seal(aside, told, folder, [name for name in told if _unchanged(aside / name)])
            sync(aside)
            os.rename(aside, folder)
            sync(folder.parent)
            for shard in made:  # what the index was made from
                for path in (folder / shard.folder.name).glob(".*.bin"):
                    path.unlink()
    return prepared(folder)


@contextmanager
def writing(folder: Path, alone: bool) -> Iterator[None]:
    """Whoever makes what will be `folder` from the shards is `alone`; jobs that make shards are so together. It would
    take theirs away while they are written, and they would go on in a folder that has become the finished one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.with_name(f".{folder.name}.jobs.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        if alone:
            told = "jobs with prepare_data are making shards of it; run the same command again when they have ended"
        else:
            told = "prepare_data: a run is preparing it already; leave prepare_data out, that run makes all of it"
        raise Refusal(f"{folder}: {told}") from None
    except OSError:
        pass  # some cluster file systems have no locks
    try:
        yield
    finally:
        os.close(handle)


def _unchanged(file: Path) -> bool:
    """Since the hash was written down beside it, which may be long ago, and by another job."""
    return file.stat().st_ctime_ns <= (file.parent / SHARD).stat().st_ctime_ns


def aside_of(folder: Path) -> Path:
    """Where the shards of what will be `folder` are made."""
    aside = folder.with_name(f".{folder.name}.partial")
    if aside.is_symlink() or not aside.is_dir():
        remove(aside)
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def whole(folder: Path) -> bool:
    """What was changed since it was written is told, and made again: it follows from the text."""
    if not folder.exists() or artifact.sealed(folder):
        return folder.exists()
    print(f"{folder}: its packed sequences were changed since they were written; they are made again", flush=True)
    return False


def prepared(folder: Path) -> tuple[Sequences, dict[str, Any]]:
    """Sequences that `once` wrote, memory mapped, and their statistics."""
    return Sequences(folder), json.loads((folder / STATISTICS).read_text())


def _rules(tokenizer: Any) -> list[Any]:
    found = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    # No part of the rules below: what begins and ends a text, what templates write, and what is a control token.
    found += [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(map(str, tokenizer.special_tokens_map.items()))]
    found += [sorted(tokenizer.all_special_ids)]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        found.append(
            {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
        )  # last call's
    return found
