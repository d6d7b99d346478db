"""Vocabularies: which bytes of text each token stands for, and which tokens of two vocabularies stand for the same."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Refusal
from pipeline.data.tokenizer import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """What each id of 0..len(tokenizer)-1 stands for, in UTF-8; None for special, unknown and missing tokens.

    Read from the decoder that tokenizer.json declares: byte-level (GPT-2, Llama 3, Qwen) or pieces with ▁ for a space
    and <0xAB> for a byte (SentencePiece). Another decoder is refused by its name.
    """
    return _spelling(tokenizer)[0]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text: those with a role, and those that are declared special without one."""
    declared = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return declared | set(tokenizer.all_special_ids)


def vocabulary_pairs(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(student ids, teacher ids), Int64[P] each: one-to-one, the same bytes, ascending by student id.

    Of several ids with the same bytes the lowest is taken, but a byte fallback (<0x41>) only where no piece stands
    for it (A): text is never written with it then. The end tokens are a pair, and the begin tokens where they are
    not already. All ids of identical tokenizers are paired with themselves.
    """
    if first_difference(teacher_tokenizer, student_tokenizer) is None:
        every = np.arange(len(student_tokenizer), dtype=np.int64)
        return every, every.copy()
    ours, theirs = (_ids_by_bytes(tokenizer) for tokenizer in (student_tokenizer, teacher_tokenizer))
    pairs = {ours[word]: theirs[word] for word in ours.keys() & theirs.keys()}
    taken = set(pairs.values())
    for role in ("eos_token_id", "bos_token_id"):
        student, teacher = getattr(student_tokenizer, role), getattr(teacher_tokenizer, role)
        if None not in (student, teacher) and student not in pairs and teacher not in taken:
            pairs[student] = teacher
            taken.add(teacher)
    columns = np.array(sorted(pairs.items()), dtype=np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()


def _ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    words, fallback = _spelling(tokenizer)
    ids: dict[bytes, int] = {}
    for id_ in sorted(range(len(words)), key=lambda id_: (id_ in fallback, id_)):
        word = words[id_]
        if word is not None:
            ids.setdefault(word, id_)
    return ids


def _spelling(tokenizer: PreTrainedTokenizerBase) -> tuple[list[bytes | None], set[int]]:
    """The bytes of every token, and which ids are byte fallbacks."""
    if not tokenizer.is_fast:
        raise Refusal(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, so the bytes of its tokens are unknown; "
            "use a model whose folder has one, or a student with the teacher's tokenizer"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level, spaces, falls_back = _decoding(backend)
    added = tokenizer.added_tokens_decoder
    unknown = special_ids(tokenizer) | _unknown_ids(backend)
    words: list[bytes | None] = [None] * len(tokenizer)
    fallback = set()
    alphabet = _byte_alphabet()
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in unknown or id_ >= len(words):
            continue
        byte = _FALLBACK.fullmatch(token) if falls_back else None
        if id_ in added and (byte_level or not added[id_].normalized):
            word = token.encode()  # stands in the text as it is written
        elif byte_level:
            word = bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else b""
        elif byte is not None:
            word = bytes([int(byte[1], 16)])
            fallback.add(id_)
        else:
            for mark, meaning in spaces:
                token = token.replace(mark, meaning)
            word = token.encode()
        words[id_] = word or None
    return words, fallback


def _decoding(backend: dict[str, Any]) -> tuple[bool, list[tuple[str, str]], bool]:
    """(byte-level?, what is replaced by what, byte fallback?) from the decoder of a tokenizer.json."""
    model = backend["model"]
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise _not_understood(f"{model['type']} with {part} {model[part]!r}")
    declared = backend["decoder"]
    if declared is None and any(step["type"] == "ByteLevel" for step in _steps(backend["pre_tokenizer"])):
        return True, [], False
    byte_level, falls_back, fused = False, False, False
    spaces = []
    for step in _steps(declared):
        kind = step["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            falls_back = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Metaspace":
            spaces.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in step["pattern"]:
            spaces.append((step["pattern"]["String"], step["content"]))
        elif kind != "Strip" or not fused:  # of all tokens together, Strip only takes back the space put in front
            raise _not_understood(kind)
    if not byte_level and not spaces and not falls_back:
        raise _not_understood("none" if declared is None else declared["type"])
    if byte_level and spaces:
        raise _not_understood(declared["type"] + " of ByteLevel and others")
    return byte_level, spaces, falls_back


def _steps(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    if rule is None:
        return []
    inner = rule.get("decoders") or rule.get("pretokenizers")
    return [step for one in inner for step in _steps(one)] if inner else [rule]


def _not_understood(kind: str) -> Refusal:
    return Refusal(
        f"the tokenizer's decoder {kind} does not define which bytes a token stands for; across tokenizers both must "
        "be byte-level (as GPT-2's) or SentencePiece's"
    )


def _unknown_ids(backend: dict[str, Any]) -> set[int]:
    model = backend["model"]
    if isinstance(model.get("unk_id"), int):
        return {model["unk_id"]}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict) and model.get("unk_token") in vocabulary:
        return {vocabulary[model["unk_token"]]}
    return set()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones for themselves, the others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
