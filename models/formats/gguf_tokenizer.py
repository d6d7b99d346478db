"""A tokenizer as GGUF tells it, where llama.cpp then makes the same tokens of a text; that it does is tried out.

llama.cpp's own converter (conversion/base.py) knows tokenizers by a list of hashes. Here the way in which llama.cpp
splits text before merging (its `pre`) is the one with this tokenizer's own rule, and llama.cpp has to give its ids on
PROBE and on the export's text.
"""

from __future__ import annotations

import base64
import json
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.formats.gguf_splits import Split, Unsaid, composes, splits_of
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
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
_NONE = "no_vocab"  # what a file without a tokenizer has for its kind
_DEFAULT = Split("default", ())  # of kinds that llama.cpp does not split text for
_COMPOSE = "llama.cpp does not compose letters and accents (NFC), as the tokenizer does: give it composed text"


@dataclass(frozen=True)
class Described:
    """What a GGUF file holds of a tokenizer."""

    model: str  # gpt2 (byte-level BPE), llama (SentencePiece's BPE), t5 (unigram)
    tokens: list[str]
    types: list[int]
    splits: Sequence[Split] = (_DEFAULT,)  # to be tried
    ignore_merges: bool = False
    composes: bool = False  # text is in NFC before it is split
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    one_space: bool | None = None  # runs of spaces are one
    charsmap: bytes | None = None


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, texts: Sequence[str] = ()) -> str | None:
    """Write it, and return what has to be known of it; or, where llama.cpp would make other tokens of a text, write
    that there is none and return why.

    `vocabulary`: rows of the embeddings. `texts`: what it is tried on, beside PROBE. Token ids are right in every case.
    """
    try:
        described = _described(tokenizer, vocabulary)
        split = _agreeing(tokenizer, described, texts)
    except Unsaid as problem:
        add_none(writer)
        return f"token ids only: {problem}"
    _write(writer, tokenizer, described, split)
    return _COMPOSE if described.composes else None


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
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise Unsaid(f"llama.cpp has no {option} in its merges")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        ignore, composed = bool(model.get("ignore_merges")), composes(rules["normalizer"])
        return Described("gpt2", tokens, types, splits_of(rules), ignore, composed, merges)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = UNKNOWN
        for id_, token in enumerate(tokens):
            if types[id_] == NORMAL and token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                types[id_] = BYTE
        prefix = _says(rules, "Prepend") or (_says(rules, "Metaspace") and not _says(rules, "never"))
        scores = _scores(model, tokens)
        return Described("llama", tokens, types, scores=scores, space_prefix=prefix, one_space=False)
    if model["type"] == "Unigram":
        of_piece = dict(model["vocab"])
        scores = [float(of_piece.get(token, 0.0)) for token in tokens]
        prefix = _says(rules, "Metaspace") and not _says(rules, "never")
        charsmap = next((base64.b64decode(found) for found in _charsmaps(rules["normalizer"])), None)
        one = " {2,}" in json.dumps(rules["normalizer"])
        return Described("t5", tokens, types, scores=scores, space_prefix=prefix, one_space=one, charsmap=charsmap)
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


def _agreeing(tokenizer: Any, described: Described, own: Sequence[str]) -> str:
    """The first way to split with which llama.cpp makes this tokenizer's tokens of PROBE and of `own`."""
    import gguf

    problem = ""
    with tempfile.TemporaryDirectory() as aside:
        for split in described.splits:
            texts = [*own, *PROBE, *_around_added(tokenizer)]
            if described.model == "gpt2" and split.ignore_merges != described.ignore_merges:
                texts += _words(tokenizer)  # a word that is a token is where it shows
            if described.composes:
                texts = [unicodedata.normalize("NFC", text) for text in texts]
            expected = tokenizer(texts)["input_ids"]
            path = Path(aside) / f"{split.name}.gguf"
            writer = gguf.GGUFWriter(str(path), "llama")
            writer.add_vocab_size(len(described.tokens))
            _write(writer, tokenizer, described, split.name)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            found = tokenized_apart(path, texts)
            if found == expected:
                return split.name
            if not problem:
                problem = _first_difference(texts, expected, found)
            path.unlink()
    raise Unsaid(problem)


def _around_added(tokenizer: Any) -> list[str]:
    """Text around added tokens, those first that take spaces with them."""
    decoder = tokenizer.added_tokens_decoder
    tokens = [token for token in decoder.values() if token.content.strip() == token.content]
    tokens.sort(key=lambda token: not (token.lstrip or token.rstrip or token.single_word))
    return [f"{each.content}one {each.content} two{each.content}{each.content}" for each in tokens[:8]]


def _words(tokenizer: Any) -> list[str]:
    """Every token that is a text."""
    told = tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [text for text in told if text and "\ufffd" not in text]


def _first_difference(texts: Sequence[str], expected: list[list[int]], found: list[list[int]] | str) -> str:
    if isinstance(found, str):
        return f"llama.cpp does not open it ({found})"
    text = next(text for text, one, other in zip(texts, expected, found, strict=True) if one != other)
    return f"llama.cpp makes other tokens of {text[:30]!r}"
