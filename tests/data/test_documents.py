"""What is read, and which split it falls to."""

import hashlib
import inspect
import json
import random
import re
import subprocess
import sys
from dataclasses import fields
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import Refusal
from pipeline.data.documents import Documents, check, content_key, documents
from pipeline.data.source import SPLITS
from pipeline.data.stdlib import library_documents
from pipeline.data.tables import empty_documents
from tests.command import ROOT
from tests.optional_data import FOLDER, needed

TEXTS = sorted({text.strip() for text in topics.values()})
HELD_OUT = 0.2
CHAT = [
    {"role": "user", "content": "What does the break statement do?"},
    {"role": "assistant", "content": "It terminates the nearest enclosing loop."},
]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts_of(data: Documents, split: str = "train") -> list[str]:
    return list(documents(data, split)["text"])


def run_python(code: str, *flags: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# The embedded corpus


def test_the_embedded_corpus_is_much_real_english_each_text_once() -> None:
    texts = library_documents()
    assert len(texts) > 3000
    assert sum(map(len, texts)) > 1_400_000
    assert len(set(texts)) == len(texts)
    assert topics["if"].strip() in texts
    assert inspect.getdoc(json.dumps) in texts
    assert all(len(text) > 80 for text in texts if text not in TEXTS)


def test_the_embedded_corpus_is_the_same_in_another_process_without_installed_packages() -> None:
    code = (
        "import hashlib, json, sys; from pipeline.data.stdlib import library_documents as d;"
        "print(hashlib.sha256(json.dumps(d()).encode()).hexdigest());"
        "print([m for m in ('turtle', 'tkinter', 'antigravity', 'idlelib') if m in sys.modules])"
    )
    digest, imported = run_python(code, "-S").splitlines()
    assert digest == hashlib.sha256(json.dumps(library_documents()).encode()).hexdigest()
    assert imported == "[]"


def test_the_embedded_corpus_falls_into_three_splits_without_rest() -> None:
    parts = {split: texts_of(Documents(holdout=0.05), split) for split in SPLITS}
    assert sorted(chain(*parts.values())) == sorted(library_documents())
    for split in ("validation", "test"):
        assert 0.035 < len(parts[split]) / len(library_documents()) < 0.065


# Splits


def test_a_document_falls_to_the_split_its_sha256_says(tmp_path: Path) -> None:
    data = Documents(train=write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), holdout=HELD_OUT)
    for split, low, high in (("test", 0, 0.2), ("validation", 0.2, 0.4), ("train", 0.4, 1)):
        expected = [
            text for text in TEXTS if low <= int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < high
        ]
        assert texts_of(data, split) == expected != []


def test_splits_do_not_depend_on_the_order_of_documents_or_files(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS])
    halves = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in half])
        for name, half in (("b", shuffled[:30]), ("a", shuffled[30:]))
    ]
    for split in SPLITS:
        whole = texts_of(Documents(train=one, holdout=HELD_OUT), split)
        assert set(texts_of(Documents(train=halves, holdout=HELD_OUT), split)) == set(whole)


def test_copies_of_a_document_are_all_in_one_split(tmp_path: Path) -> None:
    data = Documents(train=write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 3]), holdout=HELD_OUT)
    parts = [texts_of(data, split) for split in SPLITS]
    assert sum(map(len, parts)) == 3 * len(TEXTS)
    assert sum(len(set(part)) for part in parts) == len(TEXTS)


def test_copies_of_a_conversation_are_all_in_one_split_however_they_are_written(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": text}, CHAT[1]] for text in TEXTS]
    sharegpt = [
        [{"from": "human", "value": user["content"]}, {"from": "gpt", "value": assistant["content"]}]
        for user, assistant in chats
    ]
    one = Documents(train=write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in chats]), holdout=HELD_OUT)
    two = Documents(train=write_jsonl(tmp_path / "b.jsonl", [{"conversations": m} for m in sharegpt]), holdout=HELD_OUT)
    for split in SPLITS:
        assert documents(one, split)["messages"][:] == documents(two, split)["messages"][:] != []


def test_a_validation_file_leaves_the_test_split_as_it_was(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": text[:50]} for text in TEXTS])
    without = Documents(train=train, holdout=HELD_OUT)
    given = Documents(train=train, validation=other, holdout=HELD_OUT)
    assert texts_of(given, "test") == texts_of(without, "test")
    assert texts_of(given, "validation") == [text[:50] for text in TEXTS]
    assert set(texts_of(given)) == set(texts_of(without)) | set(texts_of(without, "validation"))


def test_a_line_cut_short_is_not_taken_for_text_without_a_test_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(Refusal, match=r"a\.jsonl line 2: not JSON"):
        Documents(train=str(path)).holds("test")
    path.write_text('{"text": "one"}\n')
    assert not Documents(train=str(path), holdout=1e-9).holds("test")


def test_without_holdout_train_has_everything_and_the_others_nothing(tmp_path: Path) -> None:
    data = Documents(train=write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), holdout=0)
    assert texts_of(data) == TEXTS
    assert texts_of(data, "validation") == texts_of(data, "test") == []


def test_max_documents_takes_the_first_of_each_split(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for split in SPLITS:
        all_of_them = texts_of(Documents(train=train, holdout=HELD_OUT), split)
        assert texts_of(Documents(train=train, holdout=HELD_OUT, max_documents=3), split) == all_of_them[:3]


# Files


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    records = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
    write_jsonl(tmp_path / "lines.jsonl", records)
    write_jsonl(tmp_path / "lines.json", records)
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "lines.jsonl").read_bytes())
    for name in ("lines.jsonl", "lines.json", "array.json", "table.parquet", "bom.jsonl"):
        data = Documents(train=str(tmp_path / name), text_column="body", holdout=0)
        assert texts_of(data) == TEXTS, name
        assert check(data)["train"]["bytes"] == (tmp_path / name).stat().st_size
    for name in ("lines.jsonl", "table.parquet"):
        assert check(Documents(train=str(tmp_path / name), text_column="body"))["train"]["documents"] == len(TEXTS)


def test_a_folder_is_its_files_in_order_of_name_hidden_ones_left_out(tmp_path: Path) -> None:
    for name, some in (("b.jsonl", TEXTS[:9]), ("a/z.jsonl", TEXTS[9:20]), (".cache/c.jsonl", TEXTS[20:])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": text} for text in some])
    (tmp_path / "README.md").write_text("not data")
    assert texts_of(Documents(train=str(tmp_path), holdout=0)) == TEXTS[9:20] + TEXTS[:9]


def test_a_list_of_sources_is_read_one_after_the_other(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS[:5]])
    two = tmp_path / "two.txt"
    two.write_text("The last\n\nsection.\n")
    assert texts_of(Documents(train=[one, str(two)], holdout=0)) == [*TEXTS[:5], "The last\n\nsection."]
    assert check(Documents(train=[one, str(two)]))["train"]["sources"] == [one, str(two)]


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": "two"}]
    dataset = documents(Documents(train=write_jsonl(tmp_path / "a.jsonl", records), holdout=0), "train")
    assert list(dataset["text"]) == ["one", "two"]
    assert empty_documents(dataset) == 3


def test_end_of_text_separates_the_documents_of_a_txt_file(tmp_path: Path) -> None:
    stories = [text * 3 for text in TEXTS[:20]]  # longer than a section, and still not cut
    assert max(map(len, stories)) > 10_000
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join([*stories, ""]))
    assert texts_of(Documents(train=str(tmp_path / "a.txt"), holdout=0)) == stories


def test_a_txt_file_is_cut_into_sections_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    sections = texts_of(Documents(train=str(tmp_path / "a.txt"), holdout=0))
    assert "".join("".join(sections).split()) == "".join("".join(TEXTS).split())
    assert all(4000 < len(section) < 8192 + 200 for section in sections[:-1])
    rest = "\n\n".join(TEXTS)
    for section in sections:
        assert rest.startswith(section)
        between = re.match(r"\s*\n|$", rest.removeprefix(section))
        assert between
        assert between[0].count("\n") != 1
        rest = rest[len(section) + between.end() :]


def test_a_txt_file_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [line for line in "\n".join(TEXTS).splitlines() if line.strip()]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    sections = texts_of(Documents(train=str(tmp_path / "a.txt"), holdout=0))
    assert len(sections) > 10
    read = [line.rstrip() for section in sections for line in section.split("\n")]
    assert read == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", [" = Title =", "One", "line.", "Another", "paragraph."]),
        ("paragraph", [" = Title =", "One\nline.", "Another\nparagraph."]),
        ("section", [" = Title = \n \n\nOne\nline.\n\nAnother\nparagraph."]),
        ("document", [" = Title = \n \n\nOne\nline.\n\nAnother\nparagraph."]),
    ],
)
def test_a_txt_file_is_sampled_by(tmp_path: Path, sample_by: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text(" \n = Title = \n \n\nOne\nline.\n\nAnother\r\nparagraph.\n\n\n")
    assert texts_of(Documents(train=str(tmp_path / "a.txt"), sample_by=sample_by, holdout=0)) == expected


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "wikitext2/valid.txt"])
def test_one_well_known_txt_file_gives_all_three_splits(name: str) -> None:
    path = needed(FOLDER / "data" / name)
    parts = [texts_of(Documents(train=str(path)), split) for split in SPLITS]
    assert all(len(part) >= 10 for part in parts)
    assert sum(len(text) for part in parts for text in part) > 0.99 * len(path.read_text())


# Conversations


def test_conversations_are_known_by_their_column_and_keep_role_and_content_only(tmp_path: Path) -> None:
    records = [{"text": "rendered", "messages": [{**m, "weight": 1, "name": None} for m in CHAT]}]
    data = Documents(train=write_jsonl(tmp_path / "a.jsonl", records), holdout=0)
    assert check(data)["chat"] is True
    assert documents(data, "train")["messages"][0] == CHAT


def test_sharegpt_conversations_become_messages_also_from_parquet(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": CHAT[0]["content"]},
        {"from": "gpt", "value": CHAT[1]["content"]},
    ]
    pq.write_table(pa.Table.from_pylist([{"conversations": turns}]), tmp_path / "a.parquet")
    data = Documents(train=str(tmp_path / "a.parquet"), holdout=0)
    assert documents(data, "train")["messages"][0] == [{"role": "system", "content": "Be brief."}, *CHAT]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:1], "no message is the assistant's"),
        ([CHAT[0], {"role": "assistant"}], "message 1 is not a role and a text content"),
        ([{"content": "Hello"}, CHAT[1]], "message 0 is not a role and a text content"),
        ([CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f"}]}], "message 1 is not a role and a text content"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}], "message 1 is not a role"),
        (["Hello", "Hi"], "message 0 is not a role and a text content"),
        ("Hello", "holds str where a list of messages is needed"),
    ],
)
def test_a_malformed_conversation_is_refused_by_its_line(tmp_path: Path, messages: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(Refusal, match=message) as refusal:
        documents(Documents(train=path, holdout=0), "train")
    assert f"{path} line 2" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Hub datasets


def test_a_hub_dataset_is_read_at_its_subset_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        import datasets

        asked.append((path, options))
        return datasets.Dataset.from_dict({"id": range(len(TEXTS) + 1), "body": [*TEXTS, " "]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = Documents(
        train="acme/corpus",
        validation="acme/corpus",
        test="acme/corpus:dev",
        name="en",
        revision="v1",
        text_column="body",
    )
    assert check(data) == {
        "chat": None,
        **{
            split: {"sources": ["acme/corpus"], "bytes": None, "documents": None, "tokens_at_most": None}
            for split in SPLITS
        },
    }
    assert asked == []
    for split in SPLITS:
        dataset = documents(data, split)
        assert list(dataset["text"]) == TEXTS
        assert dataset.column_names == ["text"]
        assert empty_documents(dataset) == 1
    options = {"name": "en", "revision": "v1"}
    assert asked == [("acme/corpus", {**options, "split": s}) for s in ("train", "validation", "dev")]
    held_out = Documents(train="acme/corpus", text_column="body", holdout=HELD_OUT)
    assert sorted(chain(*(texts_of(held_out, split) for split in SPLITS))) == sorted(TEXTS)


def test_a_hub_dataset_of_conversations_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    found = datasets.Dataset.from_list([{"messages": CHAT}])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: found)
    assert documents(Documents(train="acme/chat", holdout=0), "train")["messages"][0] == CHAT


def test_a_hub_dataset_that_does_not_load_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\n 'acme/corpus' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(Refusal, match=r"data\.train=acme/corpus: no such file or folder here, and") as refusal:
        documents(Documents(train="acme/corpus"), "train")
    assert str(refusal.value).endswith("does not load: Couldn't reach 'acme/corpus' on the Hub")


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "data.train is not set: give a .txt"),
        ({"train": "???"}, "data.train is not set"),
        ({"train": []}, "data.train is not set"),
        ({"train": "missing.txt"}, "data.train=missing.txt: no such file or folder"),
        ({"train": "stdlb"}, "data.train=stdlb: no such file .* nor is it a hub dataset id .* or the word"),
        ({"train": "folder/missing"}, "data.train=folder/missing: no such file or folder"),
        ({"train": ["good.jsonl", "acme/x.jsonl"]}, "data.train=acme/x.jsonl: no such file"),
        ({"validation": "/no/such.txt"}, "data.validation=/no/such.txt: no such file"),
        ({"train": "empty.txt"}, "data.train=empty.txt: the file is empty"),
        ({"train": "folder"}, "data.train=folder: the folder holds no .txt, .jsonl, .json, .parquet file"),
        ({"train": "mixed"}, "data.train=mixed: the folder mixes .json and .txt files; .* as mixed/big.txt"),
        ({"train": "table.csv"}, "data.train=table.csv: cannot read this kind of file; give one of .txt"),
        ({"train": "fake.parquet"}, "fake.parquet: not a readable parquet file"),
        ({"train": "bad.jsonl"}, "bad.jsonl line 1: not JSON .* write one object a line, or one array"),
        ({"train": "strings.jsonl"}, "strings.jsonl line 1: holds str where an object is needed"),
        ({"text_column": "body"}, "good.jsonl: data.text_column=body is no column of it; it has id, text"),
        ({"messages_column": "chat"}, "data.messages_column=chat is no column of it; it has id, text"),
        (
            {"train": "sharegpt.jsonl", "messages_column": "messages"},
            "it has conversations; set data.messages_column=conversations",
        ),
        ({"train": "mixed/big.txt", "messages_column": "chat"}, "big.txt: a .txt file has no column"),
        ({"validation": "chat.jsonl"}, "data.validation=chat.jsonl: text and chat cannot be mixed"),
        ({"max_length": 1}, "data.max_length=1: need 2 tokens or more"),
        ({"holdout": 0.5}, r"data.holdout=0.5: need \[0, 0.5\)"),
        ({"holdout": -0.1}, "data.holdout=-0.1"),
        ({"max_documents": 0}, "data.max_documents=0: need 1 or more, or null"),
        ({"validation_sequences": 0}, "data.validation_sequences=0: need 1 or more, or null"),
        ({"sample_by": "word"}, "data.sample_by=word: choose one of section, line, paragraph, document"),
        ({"chat_template": "none.jinja"}, "data.chat_template=none.jinja: no such file"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "mixed"):
        Path(folder).mkdir()
    for name, content in (
        ("good.jsonl", '{"id": 1, "text": "fine"}\n'),
        ("chat.jsonl", json.dumps({"messages": CHAT})),
        ("sharegpt.jsonl", json.dumps({"conversations": CHAT})),
        ("bad.jsonl", "{'text': 1}\n"),
        ("strings.jsonl", '"text"\n'),
        ("empty.txt", ""),
        ("table.csv", "text\nfine\n"),
        ("fake.parquet", "not parquet at all"),
        ("folder/notes.md", "# notes"),
        ("mixed/small.json", '{"text": "x"}'),
        ("mixed/big.txt", "some more text than that"),
    ):
        Path(name).write_text(content)
    with pytest.raises(Refusal, match=message) as refusal:
        check(Documents(**{"train": "good.jsonl", **change}))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": 3}\n', r"line 2: holds int '3' where text is needed"),
        (b'{"text": "fine"}\n{"txt": "x"}\n', "line 2: no column text, unlike the first object; it has txt"),
        (b'{"text": "fine"}\n{"text": "x"\n', "line 2: not JSON"),
        (b'{"text": "fine"}\n{"text": "\\ud83d"}\n', "line 2: holds half a surrogate pair"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "not UTF-8 text"),
        (b'{"text": " "}\n', "none of its 1 documents has text for train"),
    ],
)
def test_a_bad_line_in_a_file_is_refused_by_its_number(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(Refusal, match=message) as refusal:
        documents(Documents(train=str(path), holdout=0), "train")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_txt_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(Refusal, match=r"a\.txt: not UTF-8 text"):
        documents(Documents(train=str(tmp_path / "a.txt"), holdout=0), "train")


def test_a_held_out_split_left_empty_by_chance_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CHAT[0]["content"])
    with pytest.raises(Refusal, match=r"none of its 1 documents falls to test; give data\.test, a larger"):
        documents(Documents(train=str(tmp_path / "a.txt")), "test")


def test_checking_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from pipeline.data.documents import *; check(Documents()); content_key(Documents());"
        "print([m for m in ('torch', 'datasets', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


# Keys and configuration


def test_the_content_key_follows_what_the_files_hold_and_not_what_they_are_called(tmp_path: Path) -> None:
    path = Path(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]))
    key = content_key(Documents(train=str(path)))
    moved = path.rename(tmp_path / "b.jsonl")
    assert content_key(Documents(train=str(moved))) == key
    moved.write_text(moved.read_text().replace("statement", "Statement", 1))
    assert content_key(Documents(train=str(moved))) != key


def test_the_content_key_follows_all_that_shapes_rows(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    base = Documents(chat_template=str(template))
    keys = [content_key(base), content_key(Documents())]
    for change in (
        {"max_length": 64},
        {"packing": False},
        {"holdout": 0.1},
        {"sample_by": "line"},
        {"train": "acme/corpus"},
        {"train": "acme/corpus", "revision": "v2"},
        {"train": "acme/corpus:test"},
        {"validation": "stdlib"},
    ):
        keys.append(content_key(Documents(**{**vars(base), **change})))
    template.write_text("{{ messages[0] }}")
    keys.append(content_key(base))
    assert len(set(keys)) == len(keys)
    assert content_key(Documents(validation_sequences=7)) == content_key(Documents())


@pytest.mark.parametrize("name", ["stdlib", "files", "chat"])
def test_a_data_config_names_every_field_says_what_each_does_and_builds_the_node(name: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    path = ROOT / "conf" / "data" / f"{name}.yaml"
    config = OmegaConf.load(path)
    assert sorted(config) == sorted(["_target_", *(field.name for field in fields(Documents))])
    assert all("  # " in line for line in path.read_text().splitlines()[2:])
    if name != "stdlib":
        assert OmegaConf.is_missing(config, "train")
        config.train = "stdlib"
    data = instantiate(config)
    assert isinstance(data, Documents)
    assert check(data)["train"]["sources"] == ["stdlib"]
    assert (data == Documents()) == (name != "chat")
