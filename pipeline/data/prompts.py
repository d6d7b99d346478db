"""What a teacher is asked to go on from: texts, beginnings of texts, or conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.data.frames import controls_of
from pipeline.data.prepared import SPELLINGS, tell
from pipeline.data.source import DataSource, Prompt
from pipeline.data.tokenizer import begin_token
from pipeline.data.turns import turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1000


def prompts_of(
    documents: Any, tokenizer: PreTrainedTokenizerBase, data: DataSource, prompt_tokens: int | None, tally: Counter[str]
) -> Iterator[Prompt]:
    """The prompts that `documents` of `data` make, in their order.

    `prompt_tokens`: of every text so many tokens, its begin token not counted; shorter texts are left out and counted
    as `too_short`. None: a whole text is a prompt. A conversation is a prompt without the assistant's last
    turn, if it ends with it.
    """
    if "messages" in documents.column_names:
        yield from _conversations(data, documents, tokenizer, tally)
    else:
        yield from _texts(documents, tokenizer, data, prompt_tokens, tally)


def _texts(
    documents: Any, tokenizer: PreTrainedTokenizerBase, data: DataSource, prompt_tokens: int | None, tally: Counter[str]
) -> Iterator[Prompt]:
    begin, controls = begin_token(tokenizer), controls_of(tokenizer, data)
    texts = (document["text"] for document in documents)
    while some := list(islice(texts, _AT_ONCE)):
        for text, (tokens, _) in zip(some, controls.text_tokens(some), strict=True):
            if prompt_tokens is not None and len(tokens) < prompt_tokens:
                tally["too_short"] += 1
                continue
            if prompt_tokens is not None and len(tokens) > prompt_tokens:
                tokens = tokens[:prompt_tokens]
                text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            yield Prompt(text, [begin, *tokens], [begin, *tokens])
    tally[SPELLINGS] += controls.count
    tell(data, controls.statistics())


def _conversations(
    data: DataSource, documents: Any, tokenizer: PreTrainedTokenizerBase, tally: Counter[str]
) -> Iterator[Prompt]:
    turns = turns_of(tokenizer, data)
    conversations = (document["messages"] for document in documents)
    while some := list(islice(conversations, _AT_ONCE)):
        texts, places = [], []
        for messages in some:
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            if not asked:
                tally["without_prompt"] += 1
                continue
            places.append(f"a conversation that begins {asked[0]['content'][:40]!r}")
            texts.append(turns.prompt(asked, places[-1]))
        for text, (tokens, _) in zip(texts, turns.tokens(texts, places), strict=True):
            yield Prompt(turns.controls.unquoted(text), tokens, tokens)
    tally[SPELLINGS] += turns.controls.count
    tell(data, turns.controls.statistics())
