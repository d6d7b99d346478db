"""Tokenizers: train one, open one, and compare two."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from models.files import hash_of, remove

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Any of these makes a folder worth opening.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)

# Text on which tokenizers of one vocabulary can still disagree: case, accents (composed or not), digits, runs
# of spaces, line ends, width, other scripts, emoji.
PROBE = (
    "The naïve  café\tsold 1234567 crêpes,\r\n\n   it's 3.14 € — don't SHOUT; cafe\u0301 \uff21\uff22 \ufb01 "
    "\u2167 Привет 你好 👩\u200d🚀 def f(x):\n    return x\n"
)
_NO_VOCABULARY = "it has no vocabulary; copy tokenizer.json from its model there"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, *, model_max_length: int = 1_000_000
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<|endoftext|>` for begin, end and padding; the same texts give the same files.

    `folder` opens with plain AutoTokenizer. Little text can give fewer than `vocab_size` tokens: size models
    by len(tokenizer). A folder of that name is replaced.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise Refusal(f"vocab_size={vocab_size}: need {len(alphabet) + 1} or more, for the bytes and {END_OF_TEXT}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,  # decoding gives back the very text
    )
    aside = folder.with_name(f".{folder.name}.partial")
    remove(aside)
    tokenizer.save_pretrained(aside)
    remove(folder)
    os.rename(aside, folder)
    return tokenizer


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; what does not open is refused in one line."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    in_a_folder = len(folder.parts) > 2 or (len(folder.parts) == 2 and folder.parent.is_dir())
    if not folder.is_dir() and (in_a_folder or folder.exists()):
        raise Refusal(f"tokenizer {path}: no such folder; give a model folder or a hub id (OWNER/NAME)")
    if folder.is_dir() and not any((folder / name).exists() for name in FILES):
        raise Refusal(f"tokenizer {path}: the folder holds no tokenizer.json; copy the tokenizer of its model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else str(path), trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise Refusal(f"tokenizer {path}: it is Python code of its own; trust_remote_code=true runs it") from error
        raise Refusal(f"tokenizer {path}: {_why_not(folder, error)}") from error
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
        raise Refusal(
            f"tokenizer {path}: model_max_length={length!r} in tokenizer_config.json; need a number of tokens above 0"
        )
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        # transformers 5 makes an empty tokenizer of a tokenizer_config.json whose vocabulary is missing.
        raise Refusal(f"tokenizer {path}: {_NO_VOCABULARY}")
    return tokenizer


def _why_not(folder: Path, error: Exception) -> str:
    """What is wrong with a tokenizer that did not open, and what to do."""
    if folder.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as problem:
                return f"{name} does not open: {problem}; copy it from its model again"
        if not any((folder / name).exists() for name in FILES if name != "tokenizer_config.json"):
            return _NO_VOCABULARY
    why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
    return f"it does not open: {why}; copy the tokenizer's files from its model again"


def first_difference(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str | None:
    """The first difference between two tokenizers, in words, or None: token ids, then merges, then a text's tokens.

    Compares tokenizers only: the vocabulary of a model may be padded beyond them, and which token ends a text
    or a turn may differ.
    """
    ours, theirs = ({id_: token for token, id_ in t.get_vocab().items()} for t in (teacher, student))
    for id_ in sorted(ours.keys() | theirs.keys()):
        if ours.get(id_) != theirs.get(id_):
            return f"token {id_}: {_told(ours, id_, 'teacher')}, {_told(theirs, id_, 'student')}"
    for rank, (one, other) in enumerate(zip_longest(_merges(teacher), _merges(student))):
        if one != other:
            return f"merge {rank}: {one or 'none'} in teacher, {other or 'none'} in student"
    for text in (PROBE, *sorted(teacher.get_added_vocab())):
        one, other = (t(f"{text} {text}", add_special_tokens=False)["input_ids"] for t in (teacher, student))
        if one != other:
            at = next(i for i, pair in enumerate(zip_longest(one, other)) if pair[0] != pair[1])
            first, second = (t.convert_ids_to_tokens(ids[at : at + 3]) for t, ids in ((teacher, one), (student, other)))
            return f"the text {text[:20]!r}: token {at} on it is {first} in teacher, {second} in student"
    return None


def _told(tokens: dict[int, str], id_: int, role: str) -> str:
    return f"{tokens[id_]!r} in {role}" if id_ in tokens else f"absent in {role} ({len(tokens)} tokens)"


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The merges of a byte-pair tokenizer; a tokenizer of another kind has none."""
    if not tokenizer.is_fast:
        return []
    merges: list[Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    return merges


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the rules: equal for tokenizers that make the same tokens of any text."""
    rules_of: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # not these two: they are whatever the last call asked for
        rules_of.append({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})
    return hash_of(rules_of)


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text; a tokenizer without begin puts end there, as its model was taught."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise Refusal("the tokenizer has neither a begin nor an end token, so no text could begin; set its eos_token")
    return begin


def ends(tokenizer: PreTrainedTokenizerBase, whose: str) -> tuple[int, int]:
    """The tokens before and behind a text; a tokenizer without begin puts end there, as its model was taught."""
    end = tokenizer.eos_token_id
    if end is None:
        raise Refusal(f"{whose} has no end token, so no text could end; set its eos_token")
    return end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number above every token."""
    return int(max(tokenizer.get_vocab().values())) + 1
