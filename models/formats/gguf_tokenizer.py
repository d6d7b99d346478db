"""A tokenizer as GGUF tells it, where llama.cpp then makes the same tokens of a text; that it does is tried out.

llama.cpp's own converter (conversion/base.py) knows tokenizers by a list of hashes. Here the way in which llama.cpp
splits text before merging (its `pre`) is the first that gives this tokenizer's ids on PROBE.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.llama_library import tokenized_apart

# Text on which ways to split disagree: case, accents (composed or not), digits, runs of spaces, line ends, width,
# other scripts, emoji.
PROBE = (
    "Once upon a time, there was a little girl named Lily.",
    "The naïve  café\tsold 1234567 crêpes,\r\n\n   it's 3.14 € — don't SHOUT; cafe\u0301 \uff21\uff22 \ufb01 \u2167",
    "Привет 你好 👩\u200d🚀 def f(x):\n    return x\n",
    " a  b   c    d\n\n\ne \n f\t\tg",
    "I'LL we'Ve x'y 's can't 12 123 1234 12345 a1b22c333 $5 #tag @me _under_ foo_bar fooBar FOOBar",
    "...!?\n-- (a) [b] {c} <d> \"e\" 'f' //g\n/* h */ 東京タワー 한국어 עברית العربية हिन्दी ไทย",
    "  leading", "trailing  ", "x",
)  # fmt: skip
# llama.cpp's ways to split text of byte-level BPE, the usual ones first.
SPLITS = (
    "gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "deepseek-llm", "smollm", "starcoder", "falcon",
    "stablelm2", "dbrx", "olmo", "command-r", "refact", "bloom", "chatglm-bpe", "default",
)  # fmt: skip
_KNOWN_BY = {"llama-bpe": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
_NONE = "no_vocab"  # what a file without a tokenizer has for its kind


class Unsaid(Exception):
    """GGUF or llama.cpp has no word for this tokenizer; the message says why."""


@dataclass(frozen=True)
class Described:
    """What a GGUF file holds of a tokenizer."""

    model: str  # gpt2 (byte-level BPE), llama (SentencePiece's BPE), t5 (unigram)
    tokens: list[str]
    types: list[int]
    splits: Sequence[str]  # to be tried
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    one_space: bool | None = None  # runs of spaces are one
    charsmap: bytes | None = None


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> str | None:
    """Write it; or, where llama.cpp would make other tokens of a text, write that there is none and return why.

    `vocabulary`: rows of the embeddings. Token ids are right in every case.
    """
    try:
        described = _described(tokenizer, vocabulary)
        split = _agreeing(tokenizer, described)
    except Unsaid as problem:
        add_none(writer)
        return f"token ids only: {problem}"
    _write(writer, tokenizer, described, split)
    return None


def add_none(writer: Any) -> None:
    """llama.cpp then works with token ids alone."""
    writer.add_tokenizer_model(_NONE)


def has_tokenizer(path: Path) -> bool:
    from gguf import GGUFReader

    return str(GGUFReader(path).fields["tokenizer.ggml.model"].contents()) != _NONE


def _write(writer: Any, tokenizer: Any, described: Described, split: str) -> None:
    writer.add_tokenizer_model(described.model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token.encode() for token in described.tokens])
    writer.add_token_types(described.types)
    if described.merges:
        writer.add_token_merges(described.merges)
    if described.scores:
        writer.add_token_scores(described.scores)
    if described.space_prefix is not None:
        writer.add_add_space_prefix(described.space_prefix)
    if described.one_space is not None:
        writer.add_remove_extra_whitespaces(described.one_space)
    if described.charsmap is not None:
        writer.add_precompiled_charsmap(described.charsmap)
    for name, say in _specials(writer).items():
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            say(token)
    begins, ends = _ends(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _specials(writer: Any) -> dict[str, Callable[[int], None]]:
    return {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether it adds the tokens that begin and end a text."""
    bare, whole = (tokenizer("x", add_special_tokens=added)["input_ids"] for added in (False, True))
    if whole == bare:
        return False, False
    for begins in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_token_id] if begins else []
            behind = [tokenizer.eos_token_id] if ends else []
            if whole == before + bare + behind:
                return begins, ends
    raise Unsaid("it adds other tokens to a text than the ones that begin and end it")


def _described(tokenizer: Any, vocabulary: int) -> Described:
    if not getattr(tokenizer, "is_fast", False):
        raise Unsaid("it has no tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = rules["model"], {each["id"]: each for each in rules["added_tokens"]}
    if len(tokenizer) > vocabulary:
        raise Unsaid(f"it has {len(tokenizer)} tokens, the model {vocabulary}")
    tokens = [f"[PAD{id_}]" for id_ in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, id_ in tokenizer.get_vocab().items():
        tokens[id_], types[id_] = token, NORMAL
    for id_, each in added.items():
        tokens[id_], types[id_] = each["content"], CONTROL if each["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None and model["type"] != "BPE":
        types[tokenizer.unk_token_id] = UNKNOWN
    if model["type"] == "BPE" and _says(rules, "ByteLevel"):
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        pattern_text = json.dumps(rules["pre_tokenizer"])
        first = [name for name, pattern in _KNOWN_BY.items() if json.dumps(pattern)[1:-1] in pattern_text]
        return Described("gpt2", tokens, types, [*first, *(name for name in SPLITS if name not in first)], merges)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = UNKNOWN
        for id_, token in enumerate(tokens):
            if types[id_] == NORMAL and token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                types[id_] = BYTE
        prefix = _says(rules, "Prepend") or (_says(rules, "Metaspace") and not _says(rules, "never"))
        return Described("llama", tokens, types, ["default"], [], _scores(model, tokens), prefix, False)
    if model["type"] == "Unigram":
        of_piece = dict(model["vocab"])
        scores = [float(of_piece.get(token, 0.0)) for token in tokens]
        prefix = _says(rules, "Metaspace") and not _says(rules, "never")
        charsmap = next((base64.b64decode(found) for found in _charsmaps(rules["normalizer"])), None)
        one = " {2,}" in json.dumps(rules["normalizer"])
        return Described("t5", tokens, types, ["default"], [], scores, prefix, one, charsmap)
    raise Unsaid(f"llama.cpp has no {model['type']} of this kind")


def _says(rules: dict[str, Any], word: str) -> bool:
    return f'"{word}"' in json.dumps([rules["pre_tokenizer"], rules["normalizer"]])


def _charsmaps(normalizer: Any) -> list[str]:
    """Of a normalizer or a sequence of some."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [found for each in normalizer["normalizers"] for found in _charsmaps(each)]
    return [normalizer["precompiled_charsmap"]] if normalizer["type"] == "Precompiled" else []


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece joins the neighbours whose union scores best; merges are by rank, so a token's score is that of the
    first merge that makes it."""
    rank: dict[str, int] = {}
    for at, pair in enumerate(model["merges"]):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        rank.setdefault(left + right, at)
    return [-float(rank[token]) if token in rank else -1e6 for token in tokens]


def _agreeing(tokenizer: Any, described: Described) -> str:
    """The first way to split with which llama.cpp makes this tokenizer's tokens of PROBE."""
    import gguf

    added = [token for token in tokenizer.get_added_vocab() if token.strip() == token][:8]
    texts = [*PROBE, *(f"{token}one {token} two{token}{token}" for token in added)]
    expected = [list(tokenizer(text)["input_ids"]) for text in texts]
    problem = ""
    with tempfile.TemporaryDirectory() as aside:
        for split in described.splits:
            path = Path(aside) / f"{split}.gguf"
            writer = gguf.GGUFWriter(str(path), "llama")
            writer.add_vocab_size(len(described.tokens))
            _write(writer, tokenizer, described, split)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            found = tokenized_apart(path, texts)
            if found == expected:
                return split
            if not problem:
                problem = _first_difference(texts, expected, found)
            path.unlink()
    raise Unsaid(problem)


def _first_difference(texts: Sequence[str], expected: list[list[int]], found: list[list[int]] | str) -> str:
    if isinstance(found, str):
        return f"llama.cpp does not open it ({found})"
    text = next(text for text, one, other in zip(texts, expected, found, strict=True) if one != other)
    return f"llama.cpp makes other tokens of {text[:30]!r}"
