"""Control tokens: a tokenizer's special tokens, which only a chat template and the frame of a text write.

A text that spells one (`</s>`, `<|im_end|>`) holds these characters and not the token: whoever could write the token
could end a document in its middle, or forge a turn. Tokens that are added without being special (Qwen's `<think>`) are
vocabulary like any other and stay tokens, as the model was trained with them.

To keep both apart in one string, what a text spells is quoted: written in private-use characters, as many of them, so
that places in the string stay places in the text. `tokens` writes a quoted spelling as text and any other as the token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import Refusal
from pipeline.data.prepared import FIRST_SPELLING, SPELLINGS
from pipeline.data.source import PARSE
from pipeline.data.token_bytes import special_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and where each stands in the text, in characters

# In the planes of Unicode for private use: the number of the token, and what fills its length.
_TOKEN, _QUOTED, _FILLING = 0xF0000, 0xF8000, chr(0x100000)


class Controls:
    """The control tokens of a tokenizer, and how often texts were found to spell one.

    `setting`: data.control_tokens; `also`: spellings of further ones.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, setting: str | None = None, also: Iterable[str] = ()
    ) -> None:
        self.tokenizer, self.parses = tokenizer, setting == PARSE
        self.count = 0
        self.first: str | None = None  # of `count` spellings, in words
        vocabulary = tokenizer.get_added_vocab()
        ids = special_ids(tokenizer) | {vocabulary[spelling] for spelling in also}
        self._spellings_of = {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in sorted(ids)}
        self._known = frozenset(ids)
        self.spellings = sorted(self._spellings_of.values(), key=lambda one: (-len(one), one))  # the longest is taken
        self.pattern = re.compile("|".join(map(re.escape, self.spellings)) or "(?!)")
        self._numbers = {spelling: number for number, spelling in enumerate(self.spellings)}
        self._written_tokens, self._quotations = (
            re.compile("|".join(self._written(spelling, plane) for spelling in self.spellings) or "(?!)")
            for plane in (_TOKEN, _QUOTED)
        )

    def statistics(self) -> dict[str, Any]:
        return {SPELLINGS: self.count, FIRST_SPELLING: self.first}

    # Quoting

    def quote(self, text: str, but: Collection[str] = ()) -> str:
        """A text with what it spells as text. `but`: spellings that are not quoted."""
        if self.parses:
            return text
        return self.pattern.sub(lambda it: it[0] if it[0] in but else self._written(it[0], _QUOTED), text)

    def note(self, text: str, where: str) -> None:
        """Count the quotations in a text. `where` it stands, for the message."""
        if quotations := self._quotations.findall(text):
            self.count += len(quotations)
            self.first = self.first or f"{self._read(quotations[0])!r} in {where}"

    def wrote(self, text: str, ids: Sequence[int]) -> bool:
        """Whether all that a text spells are control tokens among `ids`, which are its tokens, perhaps behind a begin
        token."""
        spelled = self.pattern.findall(text)
        read = [self._spellings_of[id_] for id_ in ids if id_ in self._known]
        return bool(spelled) and spelled in (read, read[1:])

    def differing(self, text: str, ids: Sequence[int]) -> str | None:
        """The first control token that a text with quotations spells and its tokens `ids` do not hold, or the other way
        round: a tokenizer that normalizes its control tokens reads `<|END|>` as `<|end|>`."""
        unknown = self._spellings_of.get(self.tokenizer.unk_token_id)  # it also stands for characters without a token
        spelled = [spelling for spelling in self.pattern.findall(text) if spelling != unknown]
        read = [self._spellings_of[id_] for id_ in ids if id_ in self._known]
        pairs = zip_longest(spelled, (spelling for spelling in read if spelling != unknown))
        return next((one or other for one, other in pairs if one != other), None)

    def unquoted(self, text: str) -> str:
        """The text as it is read; of the same length."""
        return self._quotations.sub(lambda match: self._read(match[0]), text)

    def tokens(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """Of texts whose quoted spellings are text, and whose other ones are control tokens."""
        read = [self.unquoted(text) for text in texts]
        if read == list(texts):
            yield from tokenized(self.tokenizer, texts)
            return
        for text, plain, tokens in zip(texts, read, tokenized(self.tokenizer, read), strict=True):
            yield tokens if text == plain else self._apart(text)

    def ids_of(self, text: str) -> list[int]:
        return next(self.tokens([text]))[0]

    # Texts that nobody frames

    def text_tokens(self, texts: Sequence[str], places: Sequence[str] = ()) -> Iterator[Tokens]:
        """Of texts in which all that is spelled is text; counted. `places`: where they stand, for the message.

        A text that spells none, which is nearly every one, is tokenized once, as ever.
        """
        for number, (text, tokens) in enumerate(zip(texts, tokenized(self.tokenizer, texts), strict=True)):
            if not self.parses and not self._known.isdisjoint(tokens[0]):
                kinds = zip(*tokens, strict=True)
                if any(self._spells(id_, text, place) for id_, place in kinds):
                    quoted = self.quote(text)
                    self.note(quoted, places[number] if places else f"text {number}")
                    tokens = self._apart(quoted)
            yield tokens

    # The same of many texts at once, as the tokenizer's own encodings

    @cached_property
    def plain(self) -> bool:
        """Whether a tokenizer does no more to texts than its tokenizer.json says, so that `encoded` can be asked."""
        kind = type(self.tokenizer)
        return self.tokenizer.is_fast and all(
            method.__module__.startswith("transformers.tokenization_utils")
            for method in (kind.__call__, getattr(kind, "_encode_plus", kind.__call__))
        )

    def encoded(self, texts: Sequence[str], placed: bool) -> list[Encoding]:
        """Of texts as they are, whatever they spell. Without `placed` they do not say where tokens stand."""
        if not texts:
            return []
        self.tokenizer("", add_special_tokens=False, verbose=False)  # takes back truncation and padding of other calls
        backend = self.tokenizer.backend_tokenizer
        encode = backend.encode_batch if placed else backend.encode_batch_fast
        return list(encode(list(texts), add_special_tokens=False))

    def suspects(self, ids: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
        """The numbers of the texts, of so many tokens each, that may spell a control token."""
        if self.parses or not self._known:
            return np.zeros(0, dtype=np.int64)
        table = np.zeros(max(int(ids.max(initial=0)), *self._known) + 1, dtype=np.bool_)
        table[list(self._known)] = True
        return np.unique(np.searchsorted(np.cumsum(counts), np.flatnonzero(table[ids]), side="right"))

    def _spells(self, id_: int, text: str, place: tuple[int, int]) -> bool:
        """Whether a token is a control token, and not what stands for characters that the tokenizer does not know."""
        if id_ not in self._known:
            return False
        return id_ != self.tokenizer.unk_token_id or text[slice(*place)].strip() == self._spellings_of[id_]

    # The tokenizer that writes control tokens from our spelling of them alone

    def _apart(self, text: str) -> Tokens:
        """Of a text with quotations: each control token in it becomes our spelling of it, each quotation the text."""
        if not self.tokenizer.is_fast:
            return self._by_python(self.unquoted(text))
        if self._written_tokens.search(text):
            raise Refusal(f"a text holds the private-use character U+{_TOKEN:X} or one behind it; drop it")
        text = self.unquoted(self.pattern.sub(lambda match: self._written(match[0], _TOKEN), text))
        backend, ids_of = self._backend
        encoding = backend.encode(text, add_special_tokens=False)
        kept: Tokens = ([], [])
        for id_, place in zip((ids_of.get(id_, id_) for id_ in encoding.ids), encoding.offsets, strict=True):
            ids, places = [id_], [place]
            if self._spells(id_, text, place) and not self._written_tokens.search(text, *place):
                # Some vocabularies merge the letters of a spelling into the token.
                letters = [(letter, at) for at in range(*place) for letter in self._letters(text[at])]
                ids, places = [letter for letter, _ in letters], [(at, at + 1) for _, at in letters]
            kept[0].extend(ids)
            kept[1].extend(places)
        return kept

    def _letters(self, character: str) -> list[int]:
        """A character by itself, or its bytes."""
        vocabulary = self.tokenizer.get_vocab()
        known = vocabulary.get("▁" if character == " " and "▁" in vocabulary else character)
        found = [known] if known is not None else [vocabulary.get(f"<0x{byte:02X}>") for byte in character.encode()]
        if None in found:
            raise Refusal(
                f"the tokenizer writes a control token from the letters of a text, and {character!r} has no token of "
                f"its own; leave documents that spell one out, or set data.control_tokens={PARSE}"
            )
        return [id_ for id_ in found if id_ is not None]

    def _by_python(self, text: str) -> Tokens:
        """A tokenizer without tokenizer.json has no frames to keep: conversations need a fast one."""
        words = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[int] = self.tokenizer(text, **words)["input_ids"]
        return ids, _equal_places(text, ids)

    @cached_property
    def _backend(self) -> tuple[Tokenizer, dict[Any, int]]:
        """The tokenizer with its control tokens under our spelling, and which ids that changed."""
        from tokenizers import Tokenizer

        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules["truncation"] = rules["padding"] = None
        ids = {}
        for token in rules["added_tokens"]:
            content = token["content"]
            if content in self._numbers:
                token["content"] = self._written(content, _TOKEN)
            ids[token["content"]] = token["id"]
        backend = Tokenizer.from_str(json.dumps(rules))
        return backend, {backend.token_to_id(content): id_ for content, id_ in ids.items()}

    def _written(self, spelling: str, plane: int) -> str:
        return chr(plane + self._numbers[spelling]) + _FILLING * (len(spelling) - 1)

    def _read(self, quotation: str) -> str:
        return self.spellings[ord(quotation[0]) - _QUOTED]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tokens]:
    """Tokens of each text and where they stand in it, in characters; nothing is added or left out."""
    if not texts:
        return
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # that a text is longer than the model takes is what windows are for
    )
    for i, tokens in enumerate(encoded["input_ids"]):
        # without offsets all tokens of the text are taken as equally long
        yield tokens, encoded["offset_mapping"][i] if tokenizer.is_fast else _equal_places(texts[i], tokens)


def _equal_places(text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    places = [len(text) * k // max(1, len(ids)) for k in range(len(ids) + 1)]
    return list(pairwise(places))
