"""What a document or a turn weighs in the loss: read, refused, spread over its tokens, summed over a step."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.batch import collate
from pipeline.data.documents import Documents, check, content_key, documents
from pipeline.data.loader import MicroBatch, Order, PackedSequences
from pipeline.data.packing import prepare
from pipeline.data.tokenizer import train_tokenizer

TEXTS = [f"Document {i} says: " + "so and so, " * (i % 7 + 1) for i in range(30)]
WEIGHTS = [(i % 4) / 2 for i in range(30)]  # 0, 0.5, 1, 1.5
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "t")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def weighted(tmp: Path, **fields: Any) -> Documents:
    records = [{"text": text, "w": weight} for text, weight in zip(TEXTS, WEIGHTS, strict=True)]
    given = {"train": jsonl(tmp / "a.jsonl", records), "holdout": 0, "weight_column": "w", "max_length": 24, **fields}
    return Documents(**given)


def chat(*weights: Any) -> list[dict[str, Any]]:
    """A question and an answer for each weight; None gives a message without one."""
    turns = []
    for i, weight in enumerate(weights):
        turns.append({"role": "user", "content": f"Question {i}?"})
        turns.append({"role": "assistant", "content": f"Answer {i}."} | ({} if weight is None else {"weight": weight}))
    return turns


def rows_of(tmp: Path, tokenizer: Any, data: Documents, **options: Any) -> Any:
    return prepare(documents(data, "train"), tokenizer, data, folder=tmp / "rows", **options)


# Texts


def test_weights_stand_beside_the_texts_they_were_given_with(tmp_path: Path) -> None:
    data = weighted(tmp_path)
    check(data)
    found = documents(data, "train")
    assert found.column_names == ["text", "weight"]
    assert list(zip(found["text"], found["weight"], strict=True)) == list(zip(TEXTS, WEIGHTS, strict=True))
    pq.write_table(pa.table({"w": pa.array([2, 3]), "text": ["two", "three"]}), tmp_path / "a.parquet")
    both = documents(weighted(tmp_path, train=[data.train, str(tmp_path / "a.parquet")]), "train")
    assert list(both["weight"]) == [*WEIGHTS, 2, 3]


def test_splits_do_not_depend_on_weights(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        data = weighted(tmp_path, holdout=0.2)
        plain = Documents(train=data.train, holdout=0.2)
        assert list(documents(data, split)["text"]) == list(documents(plain, split)["text"])


def test_a_hub_datasets_weights_are_read_also_where_its_text_column_is_called_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = datasets.Dataset.from_dict({"text": ["one", " ", "two"], "w": [1, 5, 2]})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
    read = documents(Documents(train="acme/corpus", holdout=0, weight_column="w"), "train")
    assert read[:] == {"text": ["one", "two"], "weight": [1.0, 2.0]}
    assert documents(Documents(train="acme/corpus", holdout=0), "train")[:] == {"text": ["one", "two"]}


@pytest.mark.parametrize("packed", [True, False])
def test_every_target_weighs_what_its_document_does(tmp_path: Path, tokenizer: Any, packed: bool) -> None:
    rows, statistics = rows_of(tmp_path, tokenizer, weighted(tmp_path, packing=packed))
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS]
    told = {tokenizer(text)["input_ids"][0] for text in TEXTS}
    assert len(told) == 1
    by_weight = dict.fromkeys(WEIGHTS, 0)
    for length, weight in zip(lengths, WEIGHTS, strict=True):
        by_weight[weight] += length
    found: dict[float, int] = dict.fromkeys(WEIGHTS, 0)
    for row in rows.to_list():
        assert len(row["weights"]) == len(row["targets"])
        for target, weight in zip(row["targets"], row["weights"], strict=True):
            assert (target == IGNORED) == (weight == 0)
            found[weight] += target != IGNORED
        assert row["weight"] == sum(row["weights"])
    assert found == {**by_weight, 0: 0}  # what weighs nothing is not there at all
    assert statistics["unsupervised"] == WEIGHTS.count(0)
    assert statistics["supervised"] == sum(found.values())
    assert statistics["weight"] == sum(weight * count for weight, count in found.items())
    assert (rows.arrays(0)["weights"].dtype, rows.counts.dtype) == (np.float32, np.float64)


def test_rows_of_weight_one_are_those_without_weights(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "b.jsonl", [{"text": text, "w": 1} for text in TEXTS])
    rows, _ = rows_of(tmp_path / "one", tokenizer, weighted(tmp_path, train=source))
    plain, statistics = rows_of(tmp_path / "none", tokenizer, weighted(tmp_path, train=source, weight_column=None))
    assert "weights" not in plain.column_names
    assert "weight" not in statistics
    assert {name: rows[:][name] for name in plain.column_names} == plain[:]
    assert rows["weight"][:] == rows["supervised"][:]


@pytest.mark.parametrize(
    ("value", "told"),
    [(-1, "-1"), (float("nan"), "nan"), (float("inf"), "inf"), ("1", "1"), (None, "None"), (True, "True")],
)
def test_a_weight_that_is_none_is_refused_by_its_document(tmp_path: Path, value: Any, told: str) -> None:
    source = jsonl(tmp_path / "b.jsonl", [{"text": "fine", "w": 1}, {"text": "odd", "w": value}])
    with pytest.raises(Refusal) as refusal:
        documents(weighted(tmp_path, train=source), "train")
    assert str(refusal.value) == (
        f"{source} line 2: has weight {told}; need a number from 0 to 1e9, 1 for what counts as usual"
    )


def test_a_source_without_the_column_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    for change, message in (
        ({"weight_column": "v"}, r"a\.jsonl: data\.weight_column=v is no column of numbers; beside text it has w"),
        ({"weight_column": "text"}, r"data\.weight_column=text is no column of numbers"),
        ({"train": str(tmp_path / "a.txt")}, r"a\.txt: it has no columns, so no data\.weight_column=w; set it to null"),
        ({"train": "stdlib"}, r"data\.train=stdlib: it has no columns"),
    ):
        for work in (check, lambda data: documents(data, "train")):
            with pytest.raises(Refusal, match=message):
                work(weighted(tmp_path, **change))


def test_the_content_key_follows_the_weights(tmp_path: Path) -> None:
    assert content_key(weighted(tmp_path)) != content_key(weighted(tmp_path, weight_column=None))


# Conversations


def test_a_turn_of_weight_0_is_not_supervised_and_needs_no_column(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "c.jsonl", [{"messages": m} for m in (chat(1, 0, None), chat(None), chat(0))])
    data = Documents(train=source, holdout=0, max_length=200, packing=False)
    rows, statistics = rows_of(tmp_path, tokenizer, data)
    said = [tokenizer.decode([t for t in row["targets"] if t != IGNORED]) for row in rows.to_list()]
    assert said == ["Answer 0.<|im_end|>Answer 2.<|im_end|>", "Answer 0.<|im_end|>"]
    assert "weights" not in rows.column_names
    assert statistics["unsupervised"] == 1
    assert "weight" not in tokenizer.decode(rows[0]["input_ids"])


def test_other_weights_of_turns_need_the_column(tmp_path: Path, tokenizer: Any) -> None:
    data = Documents(train=jsonl(tmp_path / "c.jsonl", [{"messages": chat(None)}, {"messages": chat(0.5)}]), holdout=0)
    with pytest.raises(Refusal, match=r"conversation 1: a message has weight 0\.5; without data\.weight_column it can"):
        rows_of(tmp_path, tokenizer, data)


def test_a_turn_weighs_its_conversations_weight_times_its_own(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "c.jsonl",
        [{"messages": chat(None, 0.5, 0), "w": 3}, {"messages": chat(2), "w": 0}, {"messages": chat(2), "w": 0.25}],
    )
    data = Documents(train=source, holdout=0, weight_column="w", max_length=200, packing=False)
    rows, statistics = rows_of(tmp_path, tokenizer, data)
    answer = len(tokenizer("Answer 0.<|im_end|>")["input_ids"])
    weights = [[weight for weight in row["weights"] if weight] for row in rows.to_list()]
    assert weights == [[3.0] * answer + [1.5] * answer, [0.5] * answer]
    for row in rows.to_list():
        assert [weight > 0 for weight in row["weights"]] == [target != IGNORED for target in row["targets"]]
    assert statistics["unsupervised"] == 1
    assert statistics["weight"] == 5 * answer


def test_sources_with_and_without_weights_of_turns_are_read_together(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", [{"messages": chat(None)}])
    two = jsonl(tmp_path / "two.jsonl", [{"messages": chat(1)}, {"messages": chat(0, None)}])
    found = documents(Documents(train=[one, two], holdout=0), "train")
    weights = [[message["weight"] for message in messages] for messages in found["messages"]]
    assert weights == [[None, None], [None, None], [None, 0.0, None, None]]
    assert found.column_names == ["messages"]


def test_copies_of_a_conversation_fall_to_one_split_whatever_they_weigh(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": text}, *chat(w)[1:]]} for text in TEXTS for w in (0, 1, None)]
    data = Documents(train=jsonl(tmp_path / "c.jsonl", records), holdout=0.3)
    parts = [{m[0]["content"] for m in documents(data, split)["messages"]} for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(TEXTS)


@pytest.mark.parametrize("weight", [-1, "no", float("nan")])
def test_a_turns_weight_that_is_none_is_refused(tmp_path: Path, weight: Any) -> None:
    source = jsonl(tmp_path / "c.jsonl", [{"messages": chat(None, weight)}])
    with pytest.raises(Refusal, match=f"line 1: message 3: has weight {weight}; need a number from 0"):
        documents(Documents(train=source, holdout=0), "train")


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_carries_the_weights_beside_the_targets(tmp_path: Path, tokenizer: Any, side: str) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, weighted(tmp_path, packing=False))
    batch = collate(rows.to_list(), pad_token=0, side=side)
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].shape == batch["targets"].shape
    assert torch.equal(batch["weights"] > 0, batch["targets"] != IGNORED)
    assert batch["weights"].sum(1).tolist() == rows["weight"][:]


def test_the_tokens_of_a_step_are_its_weights_on_every_rank(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, weighted(tmp_path))
    module = PackedSequences(rows, None, seed=0, global_batch=4, micro_batch=1, pad_token=0, length=None)
    assert len(rows) > 4
    for rank in range(2):
        order = module.order(rank, 2)
        loaded = iter(module._loader(rows, order))
        batches = [next(loaded) for _ in range(2)]
        mine = sum(rows[int(i)]["weight"] for i in order.step_sequences(0))
        assert [batch["step_tokens"] for batch in batches] == [mine, mine]
        assert isinstance(batches[0]["step_tokens"], float)
    everything = [next(iter(module._loader(rows, [MicroBatch(order.step_sequences(0).tolist(), 0, 0)])))]
    assert float(everything[0]["weights"].sum()) == mine


def test_without_weights_the_tokens_of_a_step_are_a_whole_number() -> None:
    order = Order(np.array([3, 4]), np.array([5, 5]), seed=0, global_batch=2, micro_batch=2, rank=0, world=1)
    tokens = next(iter(order)).step_tokens
    assert (tokens, type(tokens)) == (7, int)


def test_blank_rows_weigh_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, weighted(tmp_path))
    module = PackedSequences(rows, rows, seed=0, global_batch=2, micro_batch=2, pad_token=0, length=None)
    batch = next(iter(module._loader(rows, [MicroBatch([0, -1], 0, 0)])))
    assert batch["weights"][1].tolist() == [0.0] * batch["targets"].shape[1]


def test_weights_and_a_teachers_tokens_go_together(tmp_path: Path, tokenizer: Any) -> None:
    teacher = train_tokenizer(TEXTS, 280, tmp_path / "teacher")
    rows, statistics = rows_of(tmp_path, tokenizer, weighted(tmp_path), teacher_tokenizer=teacher)
    assert statistics["spans"] > 0
    for row in rows.to_list():
        places = [row["spans"][i] + k for i in range(0, len(row["spans"]), 4) for k in range(row["spans"][i + 1])]
        assert all(row["weights"][place] > 0 for place in places)
    batch = collate(rows.to_list(), pad_token=0)
    assert batch.keys() >= {"weights", "spans", "teacher_input_ids", "teacher_position_ids"}
