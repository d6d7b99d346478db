"""Answers become rows: the prompt is read, the completion's very tokens are learnt."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.answers import Answers
from pipeline.data.prepared import sequences_of
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = sorted({text.strip() for text in topics.values()}, key=len)[:60]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "t")


def pairs(tokenizer: Any, count: int = 24) -> list[dict[str, Any]]:
    """Beginnings of real texts, and what follows in them, cut where the tokenizer would not cut."""
    found = []
    for number, text in enumerate(TEXTS[:count]):
        prompt, completion = text[:11], text[11 : 20 + number]
        found.append(
            {
                "prompt": prompt,
                "completion": completion,
                "prompt_ids": [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]],
                # Byte by byte: tokenized anew they would be fewer.
                "completion_ids": [i for letter in completion for i in tokenizer(letter)["input_ids"]],
                "teacher_prompt_ids": [tokenizer.bos_token_id, *tokenizer(f"Look: {prompt}")["input_ids"]],
                "split": SPLITS[number % 3],
                "finish_reason": "length" if number % 2 else "stop",
            }
        )
    return found


def written(folder: Path, rows: list[dict[str, Any]], *columns: str, name: str = "answers.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{key: value for key, value in row.items() if not columns or key in columns} for row in rows]
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def prepared(data: Answers, split: str, tokenizer: Any, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    data.check()
    rows, statistics = data.prepare(split, tokenizer, folder / f"rows-{split}")
    return rows.to_list(), statistics


@pytest.mark.parametrize("name", ["answers.parquet", "answers.jsonl"])
def test_the_targets_are_the_completions_own_tokens(name: str, tokenizer: Any, tmp_path: Path) -> None:
    told = pairs(tokenizer)
    path = written(tmp_path, told, name=name)
    for split in SPLITS:
        rows, statistics = prepared(Answers(str(path)), split, tokenizer, tmp_path)
        mine = [row for row in told if row["split"] == split]
        assert len(rows) == len(mine) == statistics["documents"] == 8
        for row, pair in zip(rows, mine, strict=True):
            assert row["input_ids"] == pair["prompt_ids"] + pair["completion_ids"]
            at = len(pair["prompt_ids"])
            assert row["targets"] == [IGNORED] * (at - 1) + pair["completion_ids"] + [IGNORED]
            assert row["supervised"] == len(pair["completion_ids"])
            assert row["bytes"] == len(pair["completion"].encode())


def test_packed_answers_do_not_see_each_other(tokenizer: Any, tmp_path: Path) -> None:
    told = pairs(tokenizer)
    path = written(tmp_path, told)
    rows, statistics = prepared(Answers(str(path), packing=True), "train", tokenizer, tmp_path)
    assert len(rows) < 8 == statistics["pieces"]
    pieces = []
    for row in rows:
        starts = [*(at for at, place in enumerate(row["position_ids"]) if place == 0), len(row["input_ids"])]
        for start, stop in itertools.pairwise(starts):
            ids, targets = row["input_ids"][start:stop], row["targets"][start:stop]
            pieces.append((ids, targets))
            at = sum(target == IGNORED for target in targets)
            assert targets == [IGNORED] * (at - 1) + ids[at:] + [IGNORED]
    expected = [row["prompt_ids"] + row["completion_ids"] for row in told if row["split"] == "train"]
    assert sorted(ids for ids, _ in pieces) == sorted(expected)


def test_texts_get_begin_and_end_and_a_prompt_has_the_tokens_it_has_by_itself(tokenizer: Any, tmp_path: Path) -> None:
    told = [{**row, "split": "train"} for row in pairs(tokenizer)]
    path = written(tmp_path, told, "prompt", "completion", "finish_reason", "split", name="pairs.jsonl")
    rows, _ = prepared(Answers(str(path)), "train", tokenizer, tmp_path)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row, pair in zip(rows, told, strict=True):
        prompt = [begin, *tokenizer(pair["prompt"].rstrip(" "))["input_ids"]]  # its spaces are the answer's
        answer = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt
        assert (answer[-1] == end) == (pair["finish_reason"] == "stop")
        told = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert told == pair["prompt"] + pair["completion"]
        assert row["targets"] == [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]


def test_without_a_split_the_prompts_hash_decides_and_the_parts_are_apart(tokenizer: Any, tmp_path: Path) -> None:
    told = pairs(tokenizer, 60)
    path = written(tmp_path, [*told, *told[:5]], "prompt_ids", "completion_ids")  # duplicates go where theirs went
    data = Answers(str(path), holdout=0.2)
    parts = {split: prepared(data, split, tokenizer, tmp_path)[0] for split in SPLITS}
    assert sum(map(len, parts.values())) == 65
    asked = {split: {tuple(row["input_ids"]) for row in rows} for split, rows in parts.items()}
    assert all(asked.values())
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]
    assert len(asked["test"]) < 30


def test_a_file_of_its_own_is_held_out_whatever_train_says(tokenizer: Any, tmp_path: Path) -> None:
    told = pairs(tokenizer)
    train = written(tmp_path / "a", told[:12])
    test = written(tmp_path / "b", [{**row, "split": "train"} for row in told[12:]])
    data = Answers(str(train), test=str(test))
    assert len(prepared(data, "test", tokenizer, tmp_path)[0]) == 12
    assert data.made_by_stages == {"answers": str(train), "test_answers": str(test)}


@pytest.mark.parametrize("columns", [(), ("prompt", "completion")])
def test_what_a_file_of_its_own_holds_out_is_not_learnt_from(
    columns: tuple[str, ...], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{name: value for name, value in row.items() if name != "split"} for row in pairs(tokenizer)]
    rows = [{name: row[name] for name in columns} if columns else row for row in rows]
    names = tuple(rows[0])
    train = written(tmp_path, rows, *names, name="train.parquet")
    test = written(tmp_path, rows[:5], *names, name="test.parquet")
    data = Answers(str(train), test=str(test), holdout=0.0)
    learnt, statistics = prepared(data, "train", tokenizer, tmp_path / "rows")
    held_out, _ = prepared(data, "test", tokenizer, tmp_path / "rows")
    asked = [{tuple(_prompt(row)) for row in each} for each in (learnt, held_out)]
    assert not asked[0] & asked[1]
    assert len(held_out) == statistics["held_out"] == 5
    assert len(learnt) == len(rows) - 5


def _prompt(row: dict[str, Any]) -> list[int]:
    first = next(at for at, target in enumerate(row["targets"]) if target != -100)
    return list(row["input_ids"][: first + 1])


def test_the_template_of_the_answers_is_the_students(tokenizer: Any, tmp_path: Path) -> None:
    data = Answers(str(tmp_path))
    assert data.chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    tokenizer.chat_template = None
    assert data.chat_template is not None
    assert Path(data.chat_template).read_text() == "{{ messages }}"
    assert Answers(str(tmp_path), as_text=True).chat_template is None


def test_what_is_too_long_is_refused_left_out_or_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    told = [{**row, "split": "train"} for row in pairs(tokenizer)]
    path = written(tmp_path, told)
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in told]
    limit = sorted(lengths)[12]
    beyond = sum(length > limit for length in lengths)
    with pytest.raises(Refusal, match=f"{beyond} of 24 answers .* the longest {max(lengths)} tokens") as refused:
        prepared(Answers(str(path), max_length=limit), "train", tokenizer, tmp_path)
    assert "\n" not in str(refused.value)
    rows, statistics = prepared(Answers(str(path), max_length=limit, too_long="drop"), "train", tokenizer, tmp_path)
    assert len(rows) == 24 - beyond
    assert statistics["too_long"] == beyond
    for kind, what in (("drop", "left out, being longer than"), ("truncate", "cut at")):
        source = Answers(str(path), max_length=limit, too_long=kind)
        _, told_of, _ = sequences_of(source, "train", tokenizer, tmp_path / "work")
        assert told_of["cut"] == f"{beyond} of 24 answers were {what} {limit} tokens (answers.max_length)"
    data = Answers(str(path), max_length=limit, too_long="truncate")
    rows, statistics = prepared(data, "train", tokenizer, tmp_path / "cut")
    assert (statistics["too_long"], statistics["truncated"]) == (beyond, beyond)
    assert [row["input_ids"] for row in rows] == [
        (pair["prompt_ids"] + pair["completion_ids"])[:limit] for pair in told
    ]
    for row, pair in zip(rows, told, strict=True):
        whole = pair["completion"].encode()
        assert row["bytes"] == len(whole[: row["supervised"]])  # a byte is a token here


def test_with_context_the_teacher_reads_its_own_prompt(tokenizer: Any, tmp_path: Path) -> None:
    told = [{**row, "split": "train"} for row in pairs(tokenizer)]
    data = Answers(str(written(tmp_path, told)), context=True)
    assert data.teacher_prompts == 1
    rows, _ = prepared(data, "train", tokenizer, tmp_path)
    for row, pair in zip(rows, told, strict=True):
        assert row["input_ids"] == pair["prompt_ids"] + pair["completion_ids"]
        assert row["teacher_input_ids"] == pair["teacher_prompt_ids"] + pair["completion_ids"]
        learnt = [target for target in row["teacher_targets"] if target != IGNORED]
        assert learnt == pair["completion_ids"] == [target for target in row["targets"] if target != IGNORED]
    with pytest.raises(Refusal, match="context=true needs the tokens of teacher_prompt_ids"):
        Answers(str(written(tmp_path / "x", told, "prompt_ids", "completion_ids")), context=True).check()


def test_another_tokenizers_tokens_are_refused_and_its_texts_taken(tokenizer: Any, tmp_path: Path) -> None:
    told = [{**row, "split": "train"} for row in pairs(tokenizer)]
    written(tmp_path / "made", told)
    tokenizer.save_pretrained(tmp_path / "made")
    other = train_tokenizer(TEXTS[:20], 300, tmp_path / "other")
    prepared(Answers(str(tmp_path / "made")), "train", load_tokenizer(tmp_path / "made"), tmp_path)
    with pytest.raises(Refusal, match=r"its tokens are another tokenizer's; set data.as_text=true") as refused:
        prepared(Answers(str(tmp_path / "made")), "train", other, tmp_path / "x")
    assert "\n" not in str(refused.value)
    rows, _ = prepared(Answers(str(tmp_path / "made"), as_text=True), "train", other, tmp_path / "y")
    assert rows[0]["input_ids"][1:4] == other(told[0]["prompt"])["input_ids"][:3]
    high = written(tmp_path / "bare", [{**told[0], "completion_ids": [399]}])
    with pytest.raises(Refusal, match="it holds token 399, and the tokenizer has 300"):
        prepared(Answers(str(high)), "train", other, tmp_path / "z")


def test_the_key_knows_the_content_and_not_the_name(tokenizer: Any, tmp_path: Path) -> None:
    told = pairs(tokenizer)
    one, same = written(tmp_path / "a", told), written(tmp_path / "b", told)
    other = written(tmp_path / "c", told[:-1])
    keys = [Answers(str(path)).content_key() for path in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
    assert Answers(str(one), max_length=9).content_key() != keys[0]


def test_empty_ones_are_counted_and_what_was_dropped_is_not_read(tokenizer: Any, tmp_path: Path) -> None:
    told = [{**row, "split": "train"} for row in pairs(tokenizer)]
    written(tmp_path, [*told, {**told[0], "completion_ids": []}])
    written(tmp_path, told, name="dropped.parquet")
    rows, statistics = prepared(Answers(str(tmp_path)), "train", tokenizer, tmp_path)
    assert len(rows) == 24
    assert statistics["empty"] == 1
    few = Answers(str(tmp_path), max_answers=5)
    assert len(prepared(few, "train", tokenizer, tmp_path / "few")[0]) == 5


REFUSED = {
    "missing columns": (["prompt_ids", "completion"], {}, "no column prompt; need prompt_ids and completion_ids"),
    "no such mode": ([], {"too_long": "cut"}, "need one of refuse, drop, truncate"),
    "no length": ([], {"max_length": 1}, "max_length=1: need 2 tokens"),
    "no share": ([], {"holdout": 0.5}, r"holdout=0.5: need \[0, 0.5\)"),
    "no answers": ([], {"max_answers": 0}, "max_answers=0: need 1 or more"),
    "text in context": ([], {"as_text": True, "context": True}, "leave one out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, tokenizer: Any, tmp_path: Path) -> None:
    columns, values, said = REFUSED[case]
    path = written(tmp_path, pairs(tokenizer), *columns)
    with pytest.raises(Refusal, match=said) as refused:
        Answers(str(path), **values).check()
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "broken.parquet": "not a readable parquet file",
        "list.jsonl": "line 1: holds list where an object is needed",
        "bad.jsonl": "line 1: not JSON",
        "empty": "it holds no answers.parquet",
        "nowhere": "no such file or folder; run the stage generate",
    }.items():
        with pytest.raises(Refusal, match=said) as refused:
            Answers(str(tmp_path / name)).check()
        assert "\n" not in str(refused.value)
