"""Training, opening and comparing tokenizers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.errors import Refusal
from pipeline.data.tokenizer import PROBE, first_difference, load_tokenizer, train_tokenizer
from tests.command import ROOT
from tests.optional_data import STORIES, needed

TEXTS = [text for _, text in sorted(topics.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TEXTS, 600, path, model_max_length=128)
    return path


def edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """A tokenizer whose tokenizer.json is that of `folder`, changed."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(content))
    (target / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return load_tokenizer(target)


def test_two_processes_train_the_same_tokenizer_to_the_byte(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pydoc_data.topics import topics;"
        "from pipeline.data.tokenizer import train_tokenizer;"
        "train_tokenizer([t for _, t in sorted(topics.items())], 1500, Path(sys.argv[1]))"
    )
    started = []
    for name, seed, threads in (("one", "1", "1"), ("two", "2", "2")):
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        started.append(subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], env=environment))
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(load_tokenizer(tmp_path / "one")) == 1500


def test_a_trained_tokenizer_opens_plainly_and_gives_any_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 600
    assert tokenizer.model_max_length == 128
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    assert ends == {"<|endoftext|>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    for text in (PROBE, " leading and trailing \n\n", "\x00\x07 odd \u2028 ones", *TEXTS[:20]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_little_text_gives_fewer_tokens_than_asked_for(tmp_path: Path) -> None:
    assert 257 <= len(train_tokenizer(["Hello hello"], 2048, tmp_path / "t")) < 300


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="vocab_size=256: need 257 or more"):
        train_tokenizer(TEXTS, 256, tmp_path / "t")
    assert len(train_tokenizer(TEXTS, 257, tmp_path / "t")) == 257


def test_training_again_replaces_the_folder_and_what_was_left_half_written(tmp_path: Path) -> None:
    (tmp_path / ".t.partial").mkdir()
    (tmp_path / ".t.partial" / "half").write_text("written")
    for size in (300, 400):
        train_tokenizer(TEXTS, size, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len(load_tokenizer(tmp_path / "t")) == 400


# Opening


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, "the folder holds no tokenizer.json"),
        (
            {"tokenizer.json": "{bad"},
            "tokenizer.json does not open: Expecting property name .*; copy it from its model",
        ),
        ({"tokenizer.json": '{"model": 3}'}, "it does not open: .*; copy the tokenizer's files from its model again"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "it has no vocabulary"),
        ({"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'}, "it has no vocabulary"),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'},
            "it is Python code of its own; trust_remote_code=true runs it",
        ),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(Refusal, match=message) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_folder_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file.json").write_text("{}")
    for path in ("/no/such/folder", "runs/teacher", "runs/a/b", "file.json", str(tmp_path / "no")):
        with pytest.raises(Refusal, match=f"tokenizer {path}: no such folder"):
            load_tokenizer(path)


# Comparing


def test_a_tokenizer_has_no_difference_from_itself_saved_and_opened_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path)
    assert first_difference(tokenizer, tokenizer) is None
    assert first_difference(tokenizer, load_tokenizer(tmp_path)) is None


def test_two_trainings_on_different_text_differ(folder: Path, tmp_path: Path) -> None:
    other = train_tokenizer(TEXTS[:9], 600, tmp_path / "other")
    assert str(first_difference(load_tokenizer(folder), other)).startswith("token 2")


def test_the_first_differing_token_is_named(folder: Path, tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]

    teacher = load_tokenizer(folder)
    first = min(teacher.get_vocab()["Ġthe"], teacher.get_vocab()["Ġof"])
    one = teacher.convert_ids_to_tokens(first)
    other = {"Ġthe": "Ġof", "Ġof": "Ġthe"}[one]
    difference = first_difference(teacher, edited(folder, tmp_path / "t", swap))
    assert difference == f"token {first}: {one!r} in teacher, {other!r} in student"


def test_a_token_more_is_named_with_both_sizes(folder: Path) -> None:
    teacher, student = load_tokenizer(folder), load_tokenizer(folder)
    student.add_tokens(["<tool>"])
    assert first_difference(teacher, student) == "token 600: absent in teacher (600 tokens), '<tool>' in student"
    assert first_difference(student, teacher) == "token 600: '<tool>' in teacher, absent in student (600 tokens)"


def test_equal_tokens_with_other_merges_differ(folder: Path, tmp_path: Path) -> None:
    def reorder(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        merges[3], merges[4] = merges[4], merges[3]

    difference = first_difference(load_tokenizer(folder), edited(folder, tmp_path / "t", reorder))
    assert str(difference).startswith("merge 3: ")


def test_equal_tokens_and_merges_with_another_normalizer_differ(folder: Path, tmp_path: Path) -> None:
    def lower(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Lowercase"}

    difference = first_difference(load_tokenizer(folder), edited(folder, tmp_path / "t", lower))
    assert str(difference).startswith("the text 'The naïve  café")


def test_an_added_token_that_is_matched_otherwise_differs(folder: Path, tmp_path: Path) -> None:
    def strip(content: dict[str, Any]) -> None:
        content["added_tokens"][0]["rstrip"] = True

    difference = first_difference(load_tokenizer(folder), edited(folder, tmp_path / "t", strip))
    assert str(difference).startswith("the text '<|endoftext|>'")


def test_what_ends_a_text_and_how_long_it_may_be_is_no_difference(folder: Path) -> None:
    teacher = load_tokenizer(folder)
    student = PreTrainedTokenizerFast.from_pretrained(folder, eos_token="Ġthe", model_max_length=7)
    assert first_difference(teacher, student) is None


def test_a_sentencepiece_style_tokenizer_is_compared_too(folder: Path) -> None:
    stories = load_tokenizer(needed(STORIES))
    assert first_difference(stories, load_tokenizer(STORIES)) is None
    assert (
        first_difference(stories, load_tokenizer(folder)) == "token 0: '<unk>' in teacher, '<|endoftext|>' in student"
    )


@pytest.mark.parametrize("length", ["long", 0, -5, True, []])
def test_a_length_that_is_no_number_of_tokens_is_refused(length: Any, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    with pytest.raises(
        Refusal, match=r"model_max_length=.* in tokenizer_config\.json; need a number of tokens above 0"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 1e30}))
    load_tokenizer(tmp_path)
