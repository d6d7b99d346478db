"""What a teacher is asked to go on from: texts, beginnings of texts, conversations, or a task's queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from models.errors import Refusal
from pipeline.data import corpora, packing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1000


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]  # the student's
    teacher_ids: list[int]  # mostly the same


@runtime_checkable
class Asking(Protocol):
    """A data source that makes its own prompts."""

    def prompts(self, split: str, tokenizer: Any, counts: Counter[str]) -> Iterator[Prompt]:
        """Those of a split; what is left out for its length is counted in `counts` as `too_long`."""
        ...


def prompts_of(
    data: Any, split: str, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None, tally: Counter[str]
) -> Iterator[Prompt]:
    """The prompts of a split, in the order of its documents.

    `prompt_tokens`: of every text so many tokens, its begin token not counted; shorter texts are left out and counted
    as `too_short`. None: a whole text is a prompt. A conversation is a prompt up to the assistant's last turn.
    """
    if isinstance(data, Asking):
        counts: Counter[str] = Counter()
        yield from data.prompts(split, tokenizer, counts)
        tally["left_out_by_task"] += counts["too_long"]
        tally.update({name: counts[name] for name in ("across", "demonstrations_left_out")})
        return
    documents = corpora.documents(data, split, unanswered=True)
    if "messages" in documents.column_names:
        yield from _conversations(data, documents, tokenizer, tally)
    else:
        yield from _texts(documents, tokenizer, prompt_tokens, tally)


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text; a tokenizer without begin puts end there, as its model was taught."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise Refusal("the tokenizer has neither a begin nor an end token, so no text could begin; set its eos_token")
    return begin


def _texts(
    documents: Any, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None, tally: Counter[str]
) -> Iterator[Prompt]:
    begin = begin_token(tokenizer)
    texts = (document["text"] for document in documents)
    while some := list(islice(texts, _AT_ONCE)):
        for text, tokens in zip(some, _tokenized(tokenizer, some), strict=True):
            if prompt_tokens is not None and len(tokens) < prompt_tokens:
                tally["too_short"] += 1
                continue
            if prompt_tokens is not None and len(tokens) > prompt_tokens:
                tokens = tokens[:prompt_tokens]
                text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            yield Prompt(text, [begin, *tokens], [begin, *tokens])


def _conversations(
    data: Any, documents: Any, tokenizer: PreTrainedTokenizerBase, tally: Counter[str]
) -> Iterator[Prompt]:
    from jinja2 import TemplateError

    template = packing.chat_template(tokenizer, data)
    conversations = (document["messages"] for document in documents)
    while some := list(islice(conversations, _AT_ONCE)):
        texts = []
        for messages in some:
            told = [{"role": message["role"], "content": message["content"]} for message in messages]
            last = max((i for i, message in enumerate(told) if message["role"] == "assistant"), default=len(told))
            asked = told if told[-1]["role"] == "user" else told[:last]
            if not asked:
                tally["without_prompt"] += 1
                continue
            try:
                text = tokenizer.apply_chat_template(
                    asked, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except (TemplateError, TypeError) as error:
                raise Refusal(
                    f"a conversation that begins {asked[0]['content'][:40]!r}: the chat template does not take it: "
                    f"{error}; mend or drop it"
                ) from error
            texts.append(str(text))
        for text, tokens in zip(texts, _tokenized(tokenizer, texts), strict=True):
            yield Prompt(text, tokens, tokens)


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return found
