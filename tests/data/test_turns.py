"""What is learnt of a conversation, by the templates that models ship: the assistant's words and what ends its turn."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from datetime import datetime
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.conversations import conversation
from pipeline.data.documents import Documents
from pipeline.data.packing import prepare
from pipeline.data.prompts import prompts_of
from pipeline.data.rendering import Template
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.data.turns import turns_of
from tests.data.templates import FAMILIES, LLAMA_3, MISTRAL, QWEN_2_5, QWEN_3, Family
from tests.data.test_controls import sentencepiece

TEXTS = sorted({text.strip() for text in topics.values()}, key=len)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM = turn("system", "Be brief.")
TURNS = [
    turn("user", "What does break do?"),
    turn("assistant", "It ends the loop — früher. 👍"),
    turn("user", "And continue?"),
    turn("assistant", "  It goes on\n\nwith the next cycle.\n"),
    turn("user", "Thanks."),
    turn("assistant", "You are welcome"),
]
SAID = ["It ends the loop — früher. 👍", "It goes on\n\nwith the next cycle.", "You are welcome"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TEXTS[:40], 400, folder)
    return folder


def tokenizer_of(trained: Path, family: Family) -> Any:
    tokenizer = load_tokenizer(trained)
    tokenizer.add_special_tokens({"bos_token": family.begin, "eos_token": family.end})
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.specials]})
    tokenizer.add_tokens([*family.plain, *family.frames])
    tokenizer.chat_template = family.template
    return tokenizer


def learnt(tmp: Path, tokenizer: Any, messages: Any, **fields: Any) -> list[str]:
    """The text of every unbroken run of targets."""
    data = Documents(max_length=4096, packing=False, **fields)
    rows, _ = prepare(Dataset.from_dict({"messages": [messages]}), tokenizer, data, folder=tmp / "rows")
    runs = groupby(rows[0]["targets"], key=lambda token: token != IGNORED)
    return [tokenizer.decode(list(tokens)) for supervised, tokens in runs if supervised]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_learnt_with_its_end_and_nothing_else(tmp_path: Path, trained: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(trained, family)
    conversations = {"plain": TURNS, "one": TURNS[:2]}
    if family.system:
        conversations["system"] = [SYSTEM, *TURNS]
    if family.tools:
        asked = [turn("assistant", "Let me look."), turn("tool", "break: a statement"), turn("tool", "42")]
        conversations["tools"] = [TURNS[0], *asked, *TURNS[1:]]
    for kind, messages in conversations.items():
        said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        (tmp_path / kind).mkdir()
        found = learnt(tmp_path / kind, tokenizer, messages)
        assert [one.removesuffix(family.turn_end).strip() for one in found] == said, kind
        assert all(one.endswith(family.turn_end) for one in found), kind
        # What stands before a content is at most the space with which it is written.
        assert all(len(one) - len(one.lstrip()) <= 2 for one in found), kind


def test_an_empty_answer_is_its_end_also_where_the_template_adds_a_thought(tmp_path: Path, trained: Path) -> None:
    tokenizer = tokenizer_of(trained, QWEN_3)
    assert "<think>\n\n</think>" in tokenizer.apply_chat_template([TURNS[0], turn("assistant", "")], tokenize=False)
    assert learnt(tmp_path, tokenizer, [TURNS[0], turn("assistant", "")]) == ["<|im_end|>"]


def test_a_systems_message_that_the_template_leaves_out_is_refused(tmp_path: Path, trained: Path) -> None:
    """Mistral's writes it beside a user's message that is the last of all."""
    tokenizer = tokenizer_of(trained, MISTRAL)
    with pytest.raises(Refusal, match="conversation 0: the chat template leaves message 0 out, whose role is system"):
        learnt(tmp_path, tokenizer, [SYSTEM, *TURNS])
    asked = Dataset.from_dict({"messages": [[SYSTEM, *TURNS]]})
    (prompt,) = prompts_of(asked, tokenizer, Documents(), None, Counter())
    assert prompt.text.endswith("[INST] Be brief.\n\nThanks.[/INST]")


def test_a_tools_result_is_part_of_what_a_teacher_is_asked(trained: Path) -> None:
    tokenizer = tokenizer_of(trained, QWEN_2_5)
    messages = [TURNS[0], turn("assistant", "Let me look."), turn("tool", "42")]
    (prompt,) = prompts_of(Dataset.from_dict({"messages": [messages]}), tokenizer, Documents(), None, Counter())
    assert prompt.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<tool_response>\n42\n</tool_response>" in prompt.text


def test_characters_by_which_turns_are_found_are_refused(tmp_path: Path, trained: Path) -> None:
    tokenizer = tokenizer_of(trained, LLAMA_3)
    with pytest.raises(Refusal, match=r"conversation 0: it holds the private-use character U\+10C60F, .*; drop it"):
        learnt(tmp_path, tokenizer, [turn("user", "a \U0010c60f"), turn("assistant", "b")])


_MARKS = re.compile("[\U0010c000-\U0010efff]")
# Letters of everything, and spellings of what frames turns in one family or another.
_WORDS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\n\n",
        "<|im_end|>",
        "<|eot_id|>",
        "[INST]",
        "</s>",
        "assistant",
        "<end_of_turn>",
        "<|end|>",
        "<start_of_turn>",
        "\U0010c60f",
    ]
)
_SAID = st.lists(_WORDS, max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), said=st.lists(st.tuples(_SAID, _SAID), min_size=1, max_size=4))
def test_of_any_conversation_the_assistants_words_are_learnt(
    trained: Path, name: str, said: list[tuple[str, str]]
) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(trained, family)
    messages = [turn(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        if _MARKS.search("".join(message["content"] for message in messages)):
            with pytest.raises(Refusal, match=r"private-use character .*; drop it"):
                learnt(Path(folder), tokenizer, messages)
            return
        found = learnt(Path(folder), tokenizer, messages)
    assert [one.removesuffix(family.turn_end).strip() for one in found] == [text.strip() for _, text in said]
    assert all(one.endswith(family.turn_end) for one in found)


def test_a_thought_is_learnt_where_the_template_keeps_it(tmp_path: Path, trained: Path) -> None:
    tokenizer = tokenizer_of(trained, QWEN_3)
    thinking = [
        turn("user", "1 + 1?"),
        turn("assistant", "<think>\nEasy.\n</think>\n\n2"),
        turn("user", "2 + 2?"),
        turn("assistant", "<think>\nHarder.\n</think>\n\n4"),
    ]
    assert learnt(tmp_path, tokenizer, thinking) == ["2<|im_end|>", "<think>\nHarder.\n</think>\n\n4<|im_end|>"]
    empty = [*thinking[:3], turn("assistant", "<think>\n\n</think>\n\n4")]  # said by the data, so it is learnt
    (tmp_path / "empty").mkdir()
    assert learnt(tmp_path / "empty", tokenizer, empty)[1] == "<think>\n\n</think>\n\n4<|im_end|>"
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("<think>", "</think>")]
    assert None not in ids
    assert tokenizer("<think>", add_special_tokens=False)["input_ids"] == ids[:1]


def test_an_empty_answer_is_its_end(tmp_path: Path, trained: Path) -> None:
    tokenizer = tokenizer_of(trained, LLAMA_3)
    messages = [TURNS[0], turn("assistant", ""), *TURNS[2:4]]
    assert learnt(tmp_path, tokenizer, messages) == ["<|eot_id|>", SAID[1] + "<|eot_id|>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_answer_is_its_end_in_every_template(tmp_path: Path, trained: Path, name: str) -> None:
    tokenizer = tokenizer_of(trained, FAMILIES[name])
    messages = [TURNS[0], turn("assistant", ""), *TURNS[2:4], TURNS[4], turn("assistant", " ")]
    end = FAMILIES[name].turn_end
    found = learnt(tmp_path, tokenizer, messages)
    assert [one.removesuffix(end).strip() for one in found] == ["", SAID[1], ""]
    assert all(one.endswith(end) for one in found)


def test_of_an_empty_answer_behind_a_channel_the_end_is_learnt(tmp_path: Path, trained: Path) -> None:
    """As gpt-oss writes it: the prompt ends before the channel, and the last answer has an end of its own."""
    tokenizer = tokenizer_of(trained, LLAMA_3)
    tokens = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    messages = [TURNS[0], turn("assistant", ""), TURNS[2], turn("assistant", "")]
    assert learnt(tmp_path, tokenizer, messages) == ["<|end|>", "<|return|>"]


SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPACED_AND_MARKED = SPACED.replace(
    "{{ m.role + ': ' + m.content + eos_token }}",
    "{% if m.role == 'user' %}{{ 'user: ' + m.content + eos_token }}{% else %}{{ 'assistant: ' }}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}",
)


@pytest.mark.parametrize("template", [SPACED, SPACED_AND_MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_first_word_is_learnt_also_where_its_token_begins_with_the_headers_space(
    tmp_path: Path, trained: Path, kind: str, template: str
) -> None:
    tokenizer = load_tokenizer(trained) if kind == "byte-level" else sentencepiece("first")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = template
    said = ["a loop", "another: the one"]
    joined = {"byte-level": ["Ġa", "Ġan"], "sentencepiece": ["▁a", "▁a"]}[kind]
    for text, token in zip(said, joined, strict=True):
        assert token in tokenizer.tokenize(f"assistant: {text}")
    messages = [turn("user", "q"), turn("assistant", said[0]), turn("user", "r"), turn("assistant", said[1])]
    assert [one.strip() for one in learnt(tmp_path, tokenizer, messages)] == [f"{text}</s>" for text in said]


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_of_a_long_conversation_are_where_those_of_each_turn_rendered_by_itself_are(
    trained: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(trained, FAMILIES[name])
    messages = [*TURNS[:4], turn("user", "And?"), turn("assistant", "<think>\n\nHm.\n</think>\n\n So."), *TURNS]
    turns = turns_of(tokenizer, Documents())
    found = turns.rendered(messages, "row 0")
    monkeypatch.setattr("pipeline.data.turns._Header.before", lambda *_: None)
    assert found == turns.rendered(messages, "row 0")


def test_a_conversation_of_many_turns_is_not_rendered_for_each(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(trained, QWEN_3)
    turns = turns_of(tokenizer, Documents())
    messages = [turn(role, f"{role} {number}") for number in range(300) for role in ("user", "assistant")]
    rendered: list[int] = []
    before = Template.render
    monkeypatch.setattr(Template, "render", lambda *given, **words: rendered.append(1) or before(*given, **words))
    assert len(turns.rendered(messages, "row 0")[1]) == 300
    assert len(rendered) < 20


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "It ends"}, {"type": "text", "text": " the loop."}]
    read = conversation([turn("user", [{"type": "text", "text": "Hm?"}]), turn("assistant", parts)], "line 1")
    assert [message["content"] for message in read] == ["Hm?", "It ends the loop."]
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Refusal, match="line 1: message 0 is not a role and a text content"):
        conversation([turn("user", image), turn("assistant", parts)], "line 1")


# Nothing from outside


class _Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Tomorrow:
        return cls(2031, 12, 24)


def test_a_template_that_asks_for_the_date_writes_the_same_on_every_day(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(trained, LLAMA_3)
    monkeypatch.setattr(chat_template_utils, "datetime", _Tomorrow)
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert "24 Dec 2031" in theirs  # the library's clock
    template = Template(tokenizer, LLAMA_3.template)
    assert template.render(TURNS) == theirs.replace("24 Dec 2031", "26 Jul 2024")
    assert "05 Mar 2024" in Template(tokenizer, LLAMA_3.template, "2024-03-05").render(TURNS)


def test_the_clock_tells_what_strftime_tells_in_english() -> None:
    class Bare:
        special_tokens_map: dict[str, str] = {}

    asked = "%d %b %Y|%A %a %B %-d, %H:%M:%S %%d %j %c %x %X %p %I %-I %y %F %-m/%e"
    text = "  {% if strftime_now is defined %}\n{{- strftime_now('" + asked + "') }}{% endif %}\n\nx"
    told = Template(Bare(), text, "2024-03-05").render([turn("user", "")])  # type: ignore[arg-type]
    assert told == datetime(2024, 3, 5).strftime(asked) + "\nx"


def test_another_date_is_another_text_and_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text.\n")
    plain, dated = (Documents(train=str(tmp_path / "a.txt"), date=date) for date in (None, "2024-03-05"))
    assert plain.content_key() != dated.content_key()
    with pytest.raises(Refusal, match=r"data\.date=5 March: need a day as 2024-07-26"):
        Documents(train=str(tmp_path / "a.txt"), date="5 March").check()


def test_a_template_that_draws_at_random_is_refused(tmp_path: Path, trained: Path) -> None:
    tokenizer = tokenizer_of(trained, LLAMA_3)
    tokenizer.chat_template = "{{ ['Hi', 'Hello'] | random }}" + LLAMA_3.template
    with pytest.raises(Refusal, match="draws at random"):
        learnt(tmp_path, tokenizer, TURNS)
