"""Conversations become rows: only what the assistant says is a target."""

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import ByT5Tokenizer

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data import conversations as chats
from pipeline.data.documents import Documents, documents
from pipeline.data.packing import prepare
from pipeline.data.prepared import sequences_of
from pipeline.data.prompts import prompts_of
from pipeline.data.rendering import chat_template
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from tests.optional_data import STORIES, needed

TOPICS = sorted({text.strip() for text in topics.values()}, key=len)

HEADER = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = f"""\
{{% for message in messages %}}{HEADER}{{{{ message['content'] + '<|im_end|>\\n' }}}}{{% endfor %}}{PROMPT}"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""

MARKED = (
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + PROMPT
)

# What the assistant said is written in other words once others follow.
FORGETFUL = CHATML.replace(
    "{{ message['content']",
    "{{ (message['content'] if loop.last or message['role'] == 'user' else '(something)')",
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHORT = [
    turn("system", "You explain Python."),
    turn("user", "What does break do?"),
    turn("assistant", "It ends the nearest loop — früher als geplant. 👍"),
    turn("user", "And continue?"),
    turn("assistant", "It goes on with the next cycle of the loop."),
]
REAL = [  # a real question and its real answer, several times in a conversation
    [message for text in some for message in (turn("user", text.splitlines()[0]), turn("assistant", text))]
    for some in (TOPICS[0:3], TOPICS[3:4], TOPICS[4:6])
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = train_tokenizer(TOPICS, 600, tmp_path_factory.mktemp("tokenizer") / "t")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture
def stories() -> Any:
    return load_tokenizer(needed(STORIES))


def rows_of(
    tmp: Path, tokenizer: Any, conversations: list[Any], template: str | None, **fields: Any
) -> tuple[Dataset, dict[str, Any]]:
    if template is not None:
        (tmp / "template.jinja").write_text(template)
        fields["chat_template"] = str(tmp / "template.jinja")
    data = Documents(**{"max_length": 4096, "packing": False, **fields})
    return prepare(Dataset.from_dict({"messages": conversations}), tokenizer, data, folder=tmp / "rows")


def spoken(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The text of every unbroken run of targets."""
    runs = groupby(row["targets"], key=lambda token: token != IGNORED)
    return [tokenizer.decode(list(tokens)) for supervised, tokens in runs if supervised]


def answers(conversation: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in conversation if message["role"] == "assistant"]


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [(CHATML, "", "<|im_end|>"), (MARKED, "", "<|im_end|>"), (LLAMA_2, " ", " </s>")],
    ids=["chatml", "marked", "llama-2"],
)
def test_the_targets_are_the_assistants_turns_and_their_ends(
    tmp_path: Path, tokenizer: Any, template: str, before: str, after: str
) -> None:
    conversations = [SHORT, *REAL]
    rows, statistics = rows_of(tmp_path, tokenizer, conversations, template)
    for row, conversation in zip(rows, conversations, strict=True):
        assert spoken(tokenizer, row) == [before + answer + after for answer in answers(conversation)]
        whole = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == whole
        assert row["position_ids"] == list(range(len(row["input_ids"])))
        assert row["supervised"] == sum(target != IGNORED for target in row["targets"])
        for target, following in zip(row["targets"], row["input_ids"][1:], strict=False):
            assert target in (IGNORED, following)
        said = "".join(before + answer + after for answer in answers(conversation))
        for special in ("<|im_end|>", "</s>"):  # stands for no text, as the end of a plain text does
            said = said.replace(special, "")
        assert row["bytes"] == len(said.encode())
    assert (statistics["truncated"], statistics["unsupervised"]) == (0, 0)


def test_a_tokenizer_that_adds_begin_itself_does_not_add_it_to_a_rendered_conversation(
    tmp_path: Path, stories: Any
) -> None:
    rows, _ = rows_of(tmp_path, stories, [SHORT[1:]], LLAMA_2)
    ids = rows[0]["input_ids"]
    assert ids.count(stories.bos_token_id) == 2  # one for each of the user's turns
    assert ids[0] == stories.bos_token_id
    assert ids[1] != stories.bos_token_id
    assert ids[-1] == stories.eos_token_id
    assert rows[0]["targets"].count(stories.eos_token_id) == 2
    assert [said.replace("</s>", "").strip() for said in spoken(stories, rows[0])] == answers(SHORT)


def test_marks_give_the_mask_that_transformers_gives_where_every_character_has_its_token(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, REAL, MARKED)
    for row, conversation in zip(rows, REAL, strict=True):
        theirs = tokenizer.apply_chat_template(
            conversation, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["input_ids"] == theirs["input_ids"]
        assert [target != IGNORED for target in row["targets"][:-1]] == [m == 1 for m in theirs["assistant_masks"][1:]]


def test_every_turn_is_supervised_also_where_the_tokenizer_trims_spaces_from_offsets(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.save_pretrained(tmp_path)
    trimming = load_tokenizer(tmp_path)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trimming("a b", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 3)]
    spaced = MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% end", "{{ ' ' + message['content'] + ' ' }}{% end"
    )
    for name, template in (("marked", spaced), ("llama-2", LLAMA_2)):
        (tmp_path / name).mkdir()
        rows, _ = rows_of(tmp_path / name, trimming, [SHORT], template)
        said = [run.replace("</s>", "").strip() for run in spoken(trimming, rows[0])]
        assert said == answers(SHORT)


def test_conversations_pack_without_touching_each_other(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "packed").mkdir()
    loose, before = rows_of(tmp_path, tokenizer, [SHORT, *REAL, SHORT], CHATML)
    packed, after = rows_of(tmp_path / "packed", tokenizer, [SHORT, *REAL, SHORT], CHATML, packing=True)
    assert len(packed) < len(loose)
    taken_apart = []
    for row in packed:
        begins = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for begin, end in pairwise([*begins, len(row["input_ids"])]):
            taken_apart.append((row["input_ids"][begin:end], row["targets"][begin:end]))
            assert row["targets"][end - 1] == IGNORED
    assert sorted(taken_apart) == sorted((row["input_ids"], row["targets"]) for row in loose)
    assert before["bytes"] == after["bytes"]
    assert before["supervised"] == after["supervised"]


def test_a_long_conversation_is_cut_off_and_counted_and_dropped_if_nothing_is_left(
    tmp_path: Path, tokenizer: Any
) -> None:
    late = [turn("user", TOPICS[-1]), turn("assistant", "Too late to be heard.")]
    rows, statistics = rows_of(tmp_path, tokenizer, [SHORT, late, SHORT[1:3]], CHATML, max_length=100)
    whole = tokenizer.apply_chat_template(SHORT, chat_template=CHATML, return_dict=True)["input_ids"]
    assert len(whole) > 100
    assert rows[0]["input_ids"] == whole[:100]
    assert rows[0]["targets"][-1] == IGNORED
    assert (statistics["documents"], statistics["sequences"]) == (3, 2)
    assert (statistics["truncated"], statistics["unsupervised"], statistics["cut_to_nothing"]) == (2, 1, 1)


def test_what_the_length_limit_cuts_is_told_once_with_its_key_and_stays_in_the_statistics(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of eight: three too long, one of these with nothing left that is learnt; one has nothing to learn from itself."""
    late = [turn("user", TOPICS[-1]), turn("assistant", "Too late to be heard.")]
    unheard = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in SHORT[1:3]]
    told = [SHORT, SHORT[1:3], late, SHORT[1:3], SHORT, SHORT[1:3], unheard, SHORT[1:3]]
    lengths = [len(tokenizer.apply_chat_template(each, chat_template=CHATML)["input_ids"]) for each in told]
    assert [length > 100 for length in lengths] == [True, False, True, False, True, False, False, False]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in told))
    (tmp_path / "t.jinja").write_text(CHATML)
    data = Documents(
        train=str(tmp_path / "a.jsonl"), holdout=0, chat_template=str(tmp_path / "t.jinja"), max_length=100
    )
    lost = (
        "3 of 8 conversations were cut at 100 tokens (data.max_length), 1 of them before anything that is learnt, "
        "and left out"
    )
    _, statistics, _ = sequences_of(data, "train", tokenizer, tmp_path / "work")
    assert f"data.train: {lost}\n" in capsys.readouterr().out
    assert statistics["cut"] == lost
    assert sequences_of(data, "train", tokenizer, tmp_path / "work")[1] == statistics
    assert capsys.readouterr().out == ""
    longer = replace(data, max_length=max(lengths))
    _, statistics, _ = sequences_of(longer, "train", tokenizer, tmp_path / "work")
    assert "cut" not in statistics
    assert capsys.readouterr().out == ""


def test_of_plain_text_longer_than_a_sequence_nothing_is_lost_and_nothing_told(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS))
    data = Documents(train=str(tmp_path / "a.jsonl"), holdout=0, max_length=16)
    _, statistics, _ = sequences_of(data, "train", tokenizer, tmp_path / "work")
    assert statistics["bytes"] == sum(len(text.encode()) for text in TOPICS)
    assert "cut" not in statistics
    assert "cut" not in capsys.readouterr().out


def test_the_tokenizers_own_template_is_used_unless_a_file_is_given(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    own = load_tokenizer(tmp_path / "t")
    own.chat_template = CHATML
    (tmp_path / "file.jinja").write_text(LLAMA_2)
    assert chat_template(own, Documents()) == CHATML
    assert chat_template(own, Documents(chat_template=str(tmp_path / "file.jinja"))) == LLAMA_2
    rows, _ = rows_of(tmp_path, own, [SHORT], None)
    assert spoken(own, rows[0]) == [answer + "<|im_end|>" for answer in answers(SHORT)]


def test_a_sharegpt_file_is_learned_from_like_any_other(tmp_path: Path, tokenizer: Any) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in SHORT]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    (tmp_path / "t.jinja").write_text(CHATML)
    data = Documents(
        train=str(tmp_path / "a.jsonl"), holdout=0, chat_template=str(tmp_path / "t.jinja"), max_length=512
    )
    rows, _ = prepare(documents(data, "train"), tokenizer, data, folder=tmp_path / "rows")
    assert spoken(tokenizer, rows[0]) == [answer + "<|im_end|>" for answer in answers(SHORT)]


def test_roles_are_known_in_capitals_too_and_axolotls_train_is_heeded(tmp_path: Path, tokenizer: Any) -> None:
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    turns = [{**message, "role": names[message["role"]]} for message in SHORT]
    rows, _ = rows_of(tmp_path, tokenizer, [turns], CHATML)
    assert spoken(tokenizer, rows[0]) == [answer + "<|im_end|>" for answer in answers(SHORT)]
    for field in ("train", "training"):
        first = next(turn for turn in turns if turn["role"] == "Assistant")
        told = [{**turn, field: turn is not first} for turn in turns]
        (tmp_path / field).mkdir()
        rows, _ = rows_of(tmp_path / field, tokenizer, [told], CHATML)
        assert spoken(tokenizer, rows[0]) == [answer + "<|im_end|>" for answer in answers(SHORT)[1:]]


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, [[turn("assistant", "Hello!"), *SHORT[1:3]]], CHATML)
    assert spoken(tokenizer, rows[0]) == ["Hello!<|im_end|>", answers(SHORT)[0] + "<|im_end|>"]


# Refusals


THOUGHT = r"; put the thought into content as <think>…</think>, or drop the field"


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("reasoning_content", "Easy.", THOUGHT),
        ("thinking", "Easy.", THOUGHT),
        ("function_call", {"name": "f", "arguments": "{}"}, "; write the call out in content, or drop the field"),
        ("refusal", "No.", "; put it into content, or drop the field"),
    ],
)
def test_what_a_message_says_beside_its_content_is_refused_and_not_dropped(field: str, value: Any, remedy: str) -> None:
    said = [SHORT[1], {**SHORT[2], field: value}]
    with pytest.raises(Refusal, match=f"^line 3: message 1 has {field}, which is not read here{remedy}$"):
        chats.conversation(said, "line 3")
    for nothing in (None, "", [], {}, " "):
        assert chats.conversation([SHORT[1], {**SHORT[2], field: nothing}], "line 3") == SHORT[1:3]
    noted = {**SHORT[2], "name": "bot", "id": "3", "weight": 1, "audio": None, "annotations": [], "time": 2.5}
    assert chats.conversation([SHORT[1], noted], "line 3") == SHORT[1:3]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_a_row_says_beside_its_conversation_is_refused_and_not_dropped(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    remedy = "make it the first message, or drop the column"
    for system, why in (("Be brief.", rf"(line 2|row 1) has system, which is not read here; {remedy}$"), ("", None)):
        rows: list[dict[str, Any]] = [{"messages": SHORT, "tools": None}, {"messages": SHORT, "system": system}]
        if kind == "parquet":
            rows = [{"messages": SHORT, "tools": None, "system": None}, {"tools": "[]", **rows[1]}]
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = Documents(train=str(path), holdout=0)
        if why is None:
            assert len(documents(data, "train")) == 2
        else:
            with pytest.raises(Refusal, match=why):
                documents(data, "train")


@pytest.mark.parametrize("role", ["developer", "function", "observation", "model"])
@pytest.mark.parametrize("marks", [False, True], ids=["found", "marked"])
def test_a_message_whose_role_the_template_does_not_write_is_refused_by_its_number_and_role(
    tmp_path: Path, tokenizer: Any, role: str, marks: bool
) -> None:
    known = "{% if message['role'] in ['system', 'user', 'assistant'] %}"
    template = (MARKED if marks else CHATML).replace(HEADER, known + HEADER).replace("{% endfor %}", "{% endif %}@")
    template = template.replace("@", "{% endfor %}")
    why = f"conversation 0: the chat template leaves message 1 out, whose role is {role}; give it a role"
    with pytest.raises(Refusal, match=why):
        rows_of(tmp_path, tokenizer, [[SHORT[0], turn(role, "it"), *SHORT[1:]]], template)  # "it" stands elsewhere, too
    tokenizer_with = load_tokenizer(save(tokenizer, tmp_path / "t"))
    tokenizer_with.chat_template = template
    asked = Dataset.from_dict({"messages": [[SHORT[1], turn(role, "it"), SHORT[3]]]})
    with pytest.raises(Refusal, match=f"the chat template leaves message 1 out, whose role is {role}"):
        next(prompts_of(asked, tokenizer_with, Documents(), None, Counter()))
    (tmp_path / "empty").mkdir()
    assert len(rows_of(tmp_path / "empty", tokenizer, [[turn(role, " "), *SHORT]], template)[0]) == 1


def save(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("conversation", "template", "message"),
    [
        (
            [SHORT[1], turn("assistant", "It ends."), SHORT[3], SHORT[4]],
            FORGETFUL,
            "conversation 1: what the chat template makes of message 1 is not found in the conversation, so the "
            "assistant's part is not known; give a data.chat_template with {% generation %} marks",
        ),
        (
            [SHORT[2], SHORT[1]],
            LLAMA_2,
            "conversation 1: the chat template does not take it: Conversation roles must alternate "
            "user/assistant/user/assistant/...; mend or drop it",
        ),
        (
            [SHORT[1]],
            CHATML,
            "conversation 1: no message is the assistant's, so there is nothing to learn; drop it",
        ),
    ],
)
def test_a_conversation_that_cannot_be_supervised_is_refused_by_its_number(
    tmp_path: Path, tokenizer: Any, conversation: Any, template: str, message: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        rows_of(tmp_path, tokenizer, [SHORT[1:3], conversation], template)
    assert str(refusal.value) == message


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(Refusal, match=r"the tokenizer has no chat template; give data\.chat_template=FILE"):
        rows_of(tmp_path, tokenizer, [SHORT], None)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (b"{% for message in messages %}", r"not a jinja template \(line 1: Unexpected end of template\..*\); mend it"),
        (b"\n{{ message | louder }}", r"not a jinja template \(line 2: No filter named 'louder'\.\); mend it"),
        (b"{{ 'gr\xfc\xdfe' }}", r"not UTF-8 text \('utf-8' codec .*\); convert it, for example with iconv"),
        (b"{% if a %}" * 3000 + b"{% endif %}" * 3000, "the chat template is nested too deeply; give another one, .*"),
    ],
    ids=["unfinished", "filter", "not UTF-8", "nested"],
)
def test_a_broken_template_is_refused_by_the_check_and_by_the_stage(
    tmp_path: Path, tokenizer: Any, template: bytes, why: str
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_bytes(template)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": SHORT}))
    data = Documents(train=str(tmp_path / "a.jsonl"), chat_template=str(path))
    for read in (data.check, lambda: chat_template(tokenizer, data)):
        with pytest.raises(Refusal, match=rf"^data\.chat_template={path}: {why}$"):
            read()


def test_a_template_of_marks_and_breaks_passes_the_check(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "marked.jinja"
    for template in (MARKED, MARKED.replace("{% generation %}", "{%- generation -%}"), CHATML + "{% break %}"):
        path.write_text(template.replace("{% break %}", "{% for m in messages %}{% break %}{% endfor %}"))
        assert Documents(chat_template=str(path)).check()["chat"] is False
        assert chat_template(tokenizer, Documents(chat_template=str(path))) == path.read_text()


def test_a_tokenizer_that_does_not_tell_where_tokens_stand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="need a fast tokenizer"):
        rows_of(tmp_path, ByT5Tokenizer(), [SHORT], CHATML)
