"""llama.cpp's ways to split text before merging (`tokenizer.ggml.pre`), by the rule that a tokenizer.json has for each.

llm_tokenizer_bpe of src/llama-vocab.cpp, github.com/ggml-org/llama.cpp: its own expressions, or the ones they were made
from. Two names of one rule differ in whether a word that is a token is merged all the same (`ignore_merges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|"
_WORDS = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASES = rf"{_BEFORE}{_UPPER}*{_LOWER}+%s|{_BEFORE}{_UPPER}+{_LOWER}*%s|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
_PUNCTUATION = "punctuation"  # no expression: a step of its own in tokenizer.json


@dataclass(frozen=True)
class Split:
    name: str  # llama.cpp's
    rule: tuple[str, ...]  # expressions, applied one after another; matches stand alone
    ignore_merges: bool = False


SPLITS = (
    Split("gpt-2", (_GPT2,)),
    Split("llama-bpe", (_WORDS + r"\p{N}{1,3}|" + _SIGNS + _ENDS,), True),
    Split("smaug-bpe", (_WORDS + r"\p{N}{1,3}|" + _SIGNS + _ENDS,)),
    Split("qwen2", (_WORDS + r"\p{N}|" + _SIGNS + _ENDS,)),
    Split("qwen35", (_ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _ENDS,)),
    Split("gpt-4o", (_CASES % (_ENGLISH + "?", _ENGLISH + "?", r"\p{N}{1,3}"),)),
    Split("tekken", (_CASES % ("", "", r"\p{N}"),), True),
    Split("smollm", (r"\p{N}", _GPT2)),
    Split("seed-coder", (_WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _ENDS,)),
    Split("deepseek-v3", (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r" ?[\p{P}\p{S}]+[\r\n]*|" + _ENDS,
    )),
    Split("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    Split("falcon", (_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    Split("bloom", (" ?[^(\\s|[.,!?…。，、।۔،])]+",)),
)  # fmt: skip


class Unsaid(Exception):
    """GGUF or llama.cpp has no word for this tokenizer; the message says why."""


def splits_of(rules: dict[str, Any]) -> list[Split]:
    """Those with the rule of this tokenizer.json, the ones that also merge as it does first. Raises Unsaid for a rule
    that llama.cpp does not have."""
    rule = _rule(rules["pre_tokenizer"])
    merging = bool(rules["model"].get("ignore_merges"))
    found = [split for split in SPLITS if split.rule == rule]
    if not found:
        raise Unsaid(f"llama.cpp has no way to split text as it does ({' then '.join(rule)[:80] or 'not at all'})")
    return sorted(found, key=lambda split: split.ignore_merges != merging)


def composes(normalizer: Any) -> bool:
    """Whether text is composed (NFC) first, which llama.cpp does not do. Raises Unsaid for any other change."""
    kinds = {each["type"] for each in _flat(normalizer, "normalizers")}
    if odd := kinds - {"NFC"}:
        raise Unsaid(f"llama.cpp does not change text first, as it does ({', '.join(sorted(odd))})")
    return bool(kinds)


def _rule(pre_tokenizer: Any) -> tuple[str, ...]:
    return tuple(step for each in _flat(pre_tokenizer, "pretokenizers") for step in _steps(each))


def _steps(each: dict[str, Any]) -> Sequence[str]:
    kind = each["type"]
    if kind == "ByteLevel":
        if each.get("add_prefix_space"):
            raise Unsaid("llama.cpp puts no space before a text, as it does")
        return [_GPT2] if each.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if each["individual_digits"] else r"\p{N}+"]
    if kind == "Punctuation" and each.get("behavior") == "Contiguous":
        return [_PUNCTUATION]
    if kind == "Split" and (each["behavior"], each["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = each["pattern"]
        if "Regex" in pattern:
            return [pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
        return [f"the text {pattern['String']!r}"]
    return [kind]


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [found for each in step[inner] for found in _flat(each, inner)] if step["type"] == "Sequence" else [step]
