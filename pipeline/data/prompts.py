"""What a teacher is asked to go on from: texts, beginnings of texts, or conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data.conversations import chat_template
from pipeline.data.rendering import rendering
from pipeline.data.source import DataSource, Prompt
from pipeline.data.tokenizer import begin_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1000


def prompts_of(
    documents: Any, tokenizer: PreTrainedTokenizerBase, data: DataSource, prompt_tokens: int | None, tally: Counter[str]
) -> Iterator[Prompt]:
    """The prompts that `documents` of `data` make, in their order.

    `prompt_tokens`: of every text so many tokens, its begin token not counted; shorter texts are left out and counted
    as `too_short`. None: a whole text is a prompt. A conversation is a prompt up to the assistant's last turn.
    """
    if "messages" in documents.column_names:
        yield from _conversations(data, documents, tokenizer, tally)
    else:
        yield from _texts(documents, tokenizer, prompt_tokens, tally)


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
    data: DataSource, documents: Any, tokenizer: PreTrainedTokenizerBase, tally: Counter[str]
) -> Iterator[Prompt]:
    from jinja2 import TemplateError

    template = chat_template(tokenizer, data)
    conversations = (document["messages"] for document in documents)
    while some := list(islice(conversations, _AT_ONCE)):
        texts = []
        for messages in some:
            plain = [{"role": message["role"], "content": message["content"]} for message in messages]
            last = max((i for i, message in enumerate(plain) if message["role"] == "assistant"), default=len(plain))
            asked = plain if plain[-1]["role"] == "user" else plain[:last]
            if not asked:
                tally["without_prompt"] += 1
                continue
            where = f"a conversation that begins {asked[0]['content'][:40]!r}"
            try:
                with rendering(where):
                    text = tokenizer.apply_chat_template(
                        asked, chat_template=template, tokenize=False, add_generation_prompt=True
                    )
            except (TemplateError, TypeError) as error:
                raise Refusal(f"{where}: the chat template does not take it: {error}; mend or drop it") from error
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
