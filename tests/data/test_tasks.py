"""Tasks: which text the teacher is shown, which the student, and where the answer's tokens stand in both."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.errors import Refusal
from pipeline.data.pairs import Pair, common_prefix, write_sequences
from pipeline.data.prepared import sequences_of
from pipeline.data.tasks import Task
from pipeline.data.tokenizer import train_tokenizer

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = [f"capital of place {i} is town {i}\nname: yes no maybe" for i in range(200)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tasks") / "tokenizer")


def written(folder: Path, rows: list[dict[str, Any]], name: str = "task.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def towns(folder: Path, count: int = 60) -> str:
    return written(folder, [{"query": f"place {i}:", "answer": f"town {i % 7}"} for i in range(count)])


def told(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("selection", ["fixed", "random", "nearest"])
def test_the_teacher_reads_demonstrations_and_the_query_and_never_the_query_among_them(
    tmp_path: Path, tokenizer: Any, selection: str
) -> None:
    task = Task(train=towns(tmp_path), shots=3, selection=selection, context="Where is it?")
    task.check()
    for split in ("train", "test"):
        items = list(task.items(split, tokenizer))
        assert items
        for item in items:
            assert told(tokenizer, item.prompt) == item.example.query
            lines = told(tokenizer, item.teacher_prompts[0]).split("\n")
            assert lines[0] == "Where is it?"
            assert len(lines) == 5
            assert lines[-1] == item.example.query
            assert not any(line.startswith(item.example.query) for line in lines[:-1])
            assert all(line.split(":")[0] + ":" in {e.query for e in task.demonstrations} for line in lines[1:-1])
            assert told(tokenizer, item.answer) == item.example.answer + "\n"


def test_fixed_demonstrations_are_no_queries_and_the_splits_share_none(tmp_path: Path) -> None:
    task = Task(train=towns(tmp_path), shots=4)
    queries = {split: {e.query for e in task.examples(split)} for split in ("train", "validation", "test")}
    shown = {e.query for e in task.demonstrations}
    assert len(shown) == 4
    assert sum(map(len, queries.values())) + 4 == 60
    assert not queries["train"] & queries["test"]
    assert not shown & (queries["train"] | queries["test"])


def test_a_query_that_also_stands_in_the_given_test_is_not_trained_on(tmp_path: Path) -> None:
    """Whatever its answer or demonstrations: the test would measure what was learnt by heart."""
    train = towns(tmp_path, 200)
    test = [{"query": f"place {i}:", "answer": "another town"} for i in range(150, 250)]
    task = Task(train=train, test=written(tmp_path, test, "test.jsonl"), shots=4)
    queries = {split: {e.query for e in task.examples(split)} for split in ("train", "validation", "test")}
    assert queries["test"] == {row["query"] for row in test}
    held_out = queries["test"] & {f"place {i}:" for i in range(200)}
    assert len(held_out) == 50
    for seen in (queries["train"], queries["validation"], {e.query for e in task.demonstrations}):
        assert seen
        assert not seen & held_out


@pytest.mark.parametrize("selection", ["fixed", "random", "nearest"])
def test_one_query_with_several_answers_is_in_one_split_and_never_shown_before_itself(
    tmp_path: Path, selection: str
) -> None:
    rows = [{"query": f"place {i % 20}:", "answer": f"town {i}", "document": f"page {i}"} for i in range(80)]
    task = Task(train=written(tmp_path, rows), shots=3, selection=selection, context="{document}")
    asked = {split: {e.asked for e in task.examples(split)} for split in ("train", "validation", "test")}
    assert not asked["train"] & (asked["test"] | asked["validation"])
    assert all(asked.values())
    for split in asked:
        for example in task.examples(split):
            assert example.asked not in {each.asked for each in task.shown(example)}


def test_what_is_shown_depends_on_seed_draw_and_query_alone(tmp_path: Path) -> None:
    task = Task(train=towns(tmp_path), shots=3, selection="random")
    again = Task(train=towns(tmp_path), shots=3, selection="random")
    other = Task(train=towns(tmp_path), shots=3, selection="random", seed=1)
    one, two = task.examples("test")[:2]
    assert task.shown(one) == again.shown(one)
    assert task.shown(one) != other.shown(one)
    assert task.shown(one) != task.shown(two)
    assert task.shown(one, draw=1) != task.shown(one)
    few = replace(task, max_queries=2)
    assert few.shown(one) == task.shown(one)


def test_the_nearest_demonstrations_are_the_most_alike_and_the_nearest_stands_last(tmp_path: Path) -> None:
    rows = [{"query": q, "answer": str(i)} for i, q in enumerate(["red apple", "red apples", "blue sea", "green hill"])]
    rows += [{"query": "a red apple!", "answer": "9"}]
    task = Task(
        train=written(tmp_path, rows[:4]),
        test=written(tmp_path, rows[4:], "test.jsonl"),
        shots=2,
        selection="nearest",
        holdout=0.0,
    )
    (query,) = task.examples("test")
    assert [e.query for e in task.shown(query)] == ["red apples", "red apple"]


def test_rows_supervise_the_answer_alone_on_both_sides(tmp_path: Path, tokenizer: Any) -> None:
    task = Task(train=towns(tmp_path), shots=2)
    rows, statistics = task.prepare("train", tokenizer, tmp_path / "rows")
    items = list(task.items("train", tokenizer))
    assert statistics["queries"] == len(rows) == len(items)
    for row, item in zip(rows, items, strict=True):
        assert row["input_ids"] == item.prompt + item.answer
        assert [t for t in row["targets"] if t != IGNORED] == item.answer
        assert row["targets"].index(item.answer[0]) == len(item.prompt) - 1
        assert row["teacher_input_ids"] == item.teacher_prompts[0] + item.answer
        assert [t for t in row["teacher_targets"] if t != IGNORED] == item.answer
        for ids, targets in ((row["input_ids"], row["targets"]), (row["teacher_input_ids"], row["teacher_targets"])):
            assert all(target == ids[at + 1] for at, target in enumerate(targets) if target != IGNORED)
        assert row["bytes"] == len((item.example.answer + "\n").encode())


def test_without_anything_to_show_the_teacher_has_no_prompt_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = Task(train=towns(tmp_path), shots=0).prepare("train", tokenizer, tmp_path / "rows")
    assert "teacher_input_ids" not in rows.column_names


def test_several_draws_stand_one_after_another(tmp_path: Path, tokenizer: Any) -> None:
    task = Task(train=towns(tmp_path), shots=2, selection="random", draws=3)
    rows, _ = task.prepare("train", tokenizer, tmp_path / "rows")
    for row, item in zip(rows, task.items("train", tokenizer), strict=True):
        assert row["teacher_input_ids"] == [t for prompt in item.teacher_prompts for t in prompt + item.answer]
        assert sum(p == 0 for p in row["teacher_position_ids"]) == 3
        assert [t for t in row["teacher_targets"] if t != IGNORED] == item.answer * 3


def test_the_common_prefix_is_what_fixed_demonstrations_begin_with(tmp_path: Path, tokenizer: Any) -> None:
    task = Task(train=towns(tmp_path), shots=4)
    rows, _ = task.prepare("train", tokenizer, tmp_path / "rows")
    prefix = common_prefix(rows)
    shown = "".join(f"{e.query}{e.answer}\n" for e in task.demonstrations)
    assert told(tokenizer, prefix).startswith(shown)
    assert all(row["teacher_input_ids"][: len(prefix)] == prefix for row in rows)
    asked = min(next(i for i, t in enumerate(row["teacher_targets"]) if t != IGNORED) for row in rows)
    assert len(prefix) <= asked
    random, _ = replace(task, selection="random").prepare("train", tokenizer, tmp_path / "random")
    assert common_prefix(random) == []


def test_the_teachers_side_has_its_columns_under_the_usual_names(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = Task(train=towns(tmp_path), shots=2).prepare("train", tokenizer, tmp_path / "rows")
    side = rows.teacher_side()
    assert side["input_ids"][:] == rows["teacher_input_ids"][:]
    assert side["targets"][:] == rows["teacher_targets"][:]


def test_a_space_before_an_answer_belongs_to_it_and_tokens_that_reach_across_are_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    spaced = Task(
        train=written(tmp_path, [{"query": f"place {i}: ", "answer": f"town {i}"} for i in range(9)]), shots=0
    )
    for item in spaced.items("train", tokenizer):
        assert told(tokenizer, item.prompt).endswith(":")
        assert told(tokenizer, item.answer).startswith(" town")
    # "tow" and "n 3" are one token together where nothing separates them
    rows = [{"query": f"place {i}: tow", "answer": f"n {i}"} for i in range(9)]
    counts: Counter[str] = Counter()
    task = Task(train=written(tmp_path, rows, "across.jsonl"), shots=0)
    items = list(task.items("train", tokenizer, counts))
    assert counts["across"] == len(items) > 0
    for item in items:
        assert item.prompt == [tokenizer.eos_token_id, *tokenizer(item.example.query)["input_ids"]]
        assert told(tokenizer, item.prompt + item.answer) == item.example.query + item.example.answer + "\n"


def test_with_a_tokenizer_that_marks_words_a_prompt_is_the_same_with_and_without_its_answer(tmp_path: Path) -> None:
    """SentencePiece's way, as in Llama 2: a word's first token holds the space before it, and a text gets one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = ["place town: town place\n" + "0123456789"] * 9
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    rows = [{"query": f"place {i}:", "answer": f"{'' if i % 2 else ' '}town {i % 7}"} for i in range(30)]
    task = Task(train=written(tmp_path, rows), shots=2)
    for item in task.items("train", tokenizer):
        alone = [tokenizer.bos_token_id, *tokenizer(item.example.query, add_special_tokens=False)["input_ids"]]
        assert item.prompt == alone
        (shown,) = item.teacher_prompts
        text = "".join(f"{e.query}{e.answer}\n" for e in task.demonstrations) + item.example.query
        assert told(tokenizer, shown) == text
        for prompt, before in ((item.prompt, item.example.query), (shown, text)):
            assert told(tokenizer, prompt + item.answer) == f"{before}{item.example.answer}\n"


def test_a_hub_task_is_read_at_its_subset_revision_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(path: str, **words: Any) -> list[dict[str, str]]:
        asked.append((path, words))
        return [{"query": f"{words['split']} {i}", "answer": str(i % 2)} for i in range(20)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = Task(train="acme/sums", test="acme/sums:dev", name="main", revision="v1", shots=0)
    assert {e.query[:3] for e in task.examples("test")} == {"dev"}
    words = {"name": "main", "revision": "v1"}
    assert asked == [("acme/sums", {**words, "split": split}) for split in ("train", "dev")]
    other = replace(task, revision="v2")
    assert other.content_key() != task.content_key()

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(Refusal, match=r"task\.name=main, task\.revision=v1, split train\) does not load") as problem:
        replace(task).check()
    assert "\n" not in str(problem.value)


def test_prompts_that_are_too_long_are_refused_shortened_or_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    task = Task(train=towns(tmp_path), shots=4, teacher_max_length=40)
    with pytest.raises(Refusal, match=r"task\.teacher_max_length=40: the query .* takes .* tokens; .*too_long"):
        list(task.items("train", tokenizer))
    counts: Counter[str] = Counter()
    items = list(replace(task, too_long="fewer").items("train", tokenizer, counts))
    assert counts["demonstrations_left_out"] > 0
    assert len(items) == counts["queries"]
    assert all(len(i.teacher_prompts[0]) + len(i.answer) <= 40 for i in items)
    counts = Counter()
    assert list(replace(task, too_long="drop").items("train", tokenizer, counts)) == []
    assert counts["too_long"] == counts["queries"] > 0
    asked = counts["queries"]
    _, statistics, _ = sequences_of(replace(task, too_long="drop"), "train", tokenizer, tmp_path / "work")
    assert statistics["cut"] == (
        f"{asked} of {asked} queries were left out, being longer than {task.max_length} tokens (task.max_length), or "
        f"the teacher's 40 (task.teacher_max_length)"
    )


@pytest.mark.parametrize(
    ("words", "rows", "reason"),
    [
        ({}, [{"query": "a"}, {"query": "b"}], r"task.answer='\{answer\}' names \{answer\}, and it has query"),
        ({}, [{"query": "a", "answer": "b"}, {"query": "b", "answer": None}], "null here; drop it"),
        ({"answer": None}, None, "task.answer=None: need a text"),
        ({"context": None}, None, "an empty one shows no context"),
        ({"query": "{query}{answer}"}, None, r"names \{answer\}, as task.answer does"),
        ({"query": "{question}"}, None, r"names \{question\}, and it has query, answer"),
        ({}, [{"query": str(i), "answer": "same"} for i in range(20)], "every answer is 'same'"),
        ({"choices": ["one"]}, None, "a task with one answer"),
        ({"choices": ["a", "b"]}, None, "is none of task.choices"),
        ({"label": "answer"}, None, "task.choices, which is not set"),
        ({"selection": "best"}, None, "need one of fixed, random, nearest"),
        ({"draws": 2}, None, "all draws are alike"),
        ({"shots": 500}, None, "queries of task.train to show: "),
        ({"train": "nowhere.jsonl"}, None, "no such file"),
        ({"train": "ciphers:99"}, None, "they go from ciphers:0"),
        ({}, [{"query": " ", "answer": "b"}, {"query": "b", "answer": "c"}], "its query is empty"),
        ({}, [{"query": "a", "answer": " "}, {"query": "b", "answer": "c"}], "its answer is empty"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(
    tmp_path: Path, words: dict[str, Any], rows: list[dict[str, Any]] | None, reason: str
) -> None:
    source = towns(tmp_path) if rows is None else written(tmp_path, rows, "bad.jsonl")
    task = Task(**{"train": source, "holdout": 0.0, **words})
    with pytest.raises(Refusal, match=reason) as problem:
        task.check() and task.examples("train")
    assert "\n" not in str(problem.value)


def test_labels_choose_among_choices_and_csv_is_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(30)))
    task = Task(train=str(path), query="{text}\nname:", choices=[" no", " yes"], label="label", shots=2)
    task.check()
    for question, shown in task.questions("test", tokenizer, 100, Counter()):
        assert shown.prompt[-len(question.prompt) + 1 :] == question.prompt[1:]
        assert [told(tokenizer, choice) for choice in question.choices] == [" no\n", " yes\n"]
        assert question.answer == [" no", " yes"][question.right]


def test_pairs_longer_than_a_sequence_are_not_cut_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 \\+ 3 tokens"):
        write_sequences(
            [Pair([1, 2, 3], [4, 5, 6], 3)],
            max_length=5,
            packed=False,
            folder=tmp_path / "rows",
            counts={},
            vocabulary=9,
        )
