"""A teacher's answers, from prompts to training on them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.generation import Sampling, generate
from models.load import load_model
from models.teachers.dialects.dialect import Generation
from pipeline.artifact import content_hash
from pipeline.building import build
from pipeline.check import check
from pipeline.context import Context
from pipeline.data.answers import Answers
from pipeline.data.filters import (
    Candidate,
    Length,
    LogProbability,
    MajorityVote,
    Predicate,
    Repetition,
    code_key,
    repeated_share,
)
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.generation.request import end_tokens
from tests import staged
from tests.command import ROOT, train, unclocked
from tests.data.test_chat import CHATML, turn
from tests.serving import ServerProcess

TEXTS = sorted({text.strip() for text in topics.values()}, key=len)[:60]
NEW = 12
LITTLE = [
    f"stages.generate.sampling.max_new_tokens={NEW}",
    "stages.generate.prompt_tokens=8",
    "stages.generate.batch_size=3",
    "stages.generate.shard_answers=6",
    "data.holdout=0.2",
    "student.shape={num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 2}",
    "stages.distill.training.max_steps=4",
    "stages.distill.training.epochs=null",
    "stages.distill.training.validate_every_steps=4",
    "stages.distill.training.global_batch=4",
    "stages.distill.training.micro_batch=2",
    "trainer.log_every_steps=1",
    "trainer.accelerator=cpu",
    "logger=none",
]
STAGES = [
    "+experiment=distill",
    "+stage@stages.generate=generate",
    "order=[generate,record,distill,control,evaluate]",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and sure of itself: it ends some of its answers, and repeats itself in others."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = train_tokenizer(TEXTS, 400, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:30]))
    return path


def words_of(teacher: Path, corpus: Path) -> list[str]:
    return [*STAGES, f"teacher.path={teacher}", f"data.train={corpus}", *LITTLE]


def composed(run_dir: Path, *words: str) -> dict[str, Any]:
    return staged.composed(run_dir, *words)


def make(run_dir: Path, stage: str, *words: str, config: dict[str, Any] | None = None) -> Path:
    return staged.make(config or composed(run_dir, *words), stage)


def rows_of(folder: Path, name: str = "answers.parquet") -> list[dict[str, Any]]:
    return pq.read_table(folder / name).to_pylist()


def metrics(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "answers"
    return manifest["metrics"]


@pytest.fixture(scope="module")
def made(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy answers to the first eight tokens of every text."""
    return make(tmp_path_factory.mktemp("made"), "generate", *words_of(teacher, corpus))


SAMPLED = ["stages.generate.sampling.temperature=1.0", "stages.generate.sampling.samples=3"]


@pytest.fixture(scope="module")
def sampled(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sampled"), "generate", *words_of(teacher, corpus), *SAMPLED)


# --- what is written ---


def test_answers_are_the_teachers_to_the_beginnings_of_the_texts(made: Path, teacher: Path) -> None:
    tokenizer, model = load_tokenizer(teacher), load_model(str(teacher), dtype=torch.float32).eval()
    rows = rows_of(made)
    asked = {tuple(row["prompt_ids"]) for row in rows}
    begin = tokenizer.bos_token_id
    assert asked == {(begin, *tokenizer(text)["input_ids"][:8]) for text in TEXTS[:30]}
    for row in rows:
        ids = list(row["prompt_ids"])
        assert row["teacher_prompt_ids"] == ids
        assert row["prompt"] == tokenizer.decode(ids[1:])
        reason, log = "length", []
        for token in row["completion_ids"]:
            assert reason == "length"
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            log.append(logits.log_softmax(-1)[token].item())
            ids.append(token)
            reason = "stop" if token == tokenizer.eos_token_id else "length"
        assert row["finish_reason"] == reason
        assert row["log_probabilities"] == pytest.approx(log, abs=1e-4)
        assert reason == "stop" or len(row["completion_ids"]) == NEW
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_datasets_reads_them_and_the_manifest_counts_them(made: Path, teacher: Path) -> None:
    from datasets import load_dataset

    rows = rows_of(made)
    read = load_dataset("parquet", data_files=str(made / "answers.parquet"), cache_dir=str(made.parent / "cache"))
    assert read["train"].to_list() == rows
    told = metrics(made)
    assert told["answers"] == told["prompts"] == len(rows)
    assert told["tokens"] == sum(len(row["completion_ids"]) for row in rows)
    assert told["truncated"] == sum(row["finish_reason"] == "length" for row in rows)
    assert told["empty_answers"] == sum(not row["completion"].strip() for row in rows)
    log = [value for row in rows for value in row["log_probabilities"]]
    assert told["mean_log_probability"] == pytest.approx(sum(log) / len(log))
    assert told["tokens_per_second"] > 0
    assert load_tokenizer(made).get_vocab() == load_tokenizer(teacher).get_vocab()
    assert len({row["provenance"] for row in rows}) == len(rows)


def test_what_is_held_out_is_answered_apart(made: Path, corpus: Path, teacher: Path) -> None:
    from pipeline.data.documents import Documents, documents

    tokenizer = load_tokenizer(teacher)
    found = rows_of(made)
    assert [row["split"] for row in found] == sorted(
        (row["split"] for row in found), key=["train", "validation", "test"].index
    )
    for split in ("train", "validation", "test"):
        texts = documents(Documents(str(corpus), holdout=0.2), split)["text"]
        expected = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"][:8]] for text in texts]
        assert [row["prompt_ids"] for row in found if row["split"] == split] == expected


def test_samples_are_drawn_and_counted(sampled: Path, teacher: Path) -> None:
    rows = rows_of(sampled)
    told = metrics(sampled)
    assert told["answers"] == 3 * told["prompts"] == len(rows)
    assert [row["sample"] for row in rows] == [0, 1, 2] * told["prompts"]
    by_prompt: dict[str, list[tuple[int, ...]]] = {}
    for row in rows:
        by_prompt.setdefault(row["provenance"], []).append(tuple(row["completion_ids"]))
    assert told["duplicate_answers"] == sum(3 - len(set(each)) for each in by_prompt.values())
    tokenizer, model = load_tokenizer(teacher), load_model(str(teacher), dtype=torch.float32).eval()
    prompts = [row["prompt_ids"] for row in rows[::3]]
    sampling = Sampling(NEW, temperature=1.0, samples=3)
    ends = end_tokens(str(teacher), tokenizer, model.config)
    direct = dict(generate(model, prompts, sampling, pad_token=0, end_tokens=ends, tokenizer=tokenizer))
    assert [list(row["completion_ids"]) for row in rows] == [
        answer.ids for number in range(len(prompts)) for answer in direct[number]
    ]


# --- the same, however it is made ---


@pytest.mark.slow
def test_killed_half_way_it_goes_on_to_the_same_bytes_also_with_two_ranks(
    sampled: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    words = [f"run_dir={tmp_path}", *words_of(teacher, corpus), *SAMPLED, "stages=[generate]"]
    killing = {"path": str(ROOT / "tests" / "killing"), "RETORT_TEST_KILL": "os.rename .shard-0000-000002 1"}
    assert train(*words, **killing).returncode not in (0, 2)
    shelf = tmp_path / "work" / "answers" / "generate"
    kept = {path.name: path.stat().st_mtime_ns for path in shelf.glob("shard-*")}
    assert len(kept) == 2
    shutil.copytree(tmp_path, tmp_path.with_name("ranks"))
    done = train(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "generate" / "answers.parquet").read_bytes() == (sampled / "answers.parquet").read_bytes()
    assert not shelf.exists()

    other = tmp_path.with_name("ranks")
    words[0] = f"run_dir={other}"
    done = train(*words, "trainer.devices=2", "strategy=ddp", "resume=overwrite")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (other / "generate" / "answers.parquet").read_bytes() == (sampled / "answers.parquet").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 64])
def test_another_batch_gives_the_same_text(
    batch_size: int, sampled: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    words = [*words_of(teacher, corpus), *SAMPLED, f"stages.generate.batch_size={batch_size}"]
    other = rows_of(make(tmp_path, "generate", *words))
    for mine, theirs in zip(other, rows_of(sampled), strict=True):
        assert mine.pop("log_probabilities") == pytest.approx(theirs.pop("log_probabilities"), abs=1e-4)
        assert mine == theirs


@pytest.mark.slow
def test_a_teacher_sharded_over_two_ranks_answers_alike(
    sampled: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    words = [f"run_dir={tmp_path}", *words_of(teacher, corpus), *SAMPLED, "stages=[generate]"]
    done = train(*words, "teacher=sharded", "trainer.devices=2", "strategy=ddp")
    assert done.returncode == 0, done.stdout + done.stderr
    for mine, theirs in zip(rows_of(tmp_path / "generate"), rows_of(sampled), strict=True):
        assert mine.pop("log_probabilities") == pytest.approx(theirs.pop("log_probabilities"), abs=1e-4)
        assert mine == theirs


def test_other_filters_and_more_prompts_ask_only_for_what_is_new(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = generate

    def spy(model: Any, prompts: Any, *rest: Any, **words: Any) -> Any:
        asked.append(len(prompts))
        return plain(model, prompts, *rest, **words)

    monkeypatch.setattr("models.teachers.online.generate", spy)
    words = [*words_of(teacher, corpus), "stages.generate.batch_size=1"]
    first = rows_of(make(tmp_path, "generate", *words, "data.max_documents=4"))
    assert sum(asked) == len(first)
    asked.clear()
    finished = ["filter=[length]"]
    finished += [f"filters.length.{told}" for told in ("finished=true", "minimum=1")]
    folder = make(tmp_path, "generate", *words, *finished)
    both = rows_of(folder) + rows_of(folder, "dropped.parquet")
    assert sum(asked) == len(both) - len(first) > 0
    assert metrics(folder)["dropped"] == {"length": len(rows_of(folder, "dropped.parquet"))}
    assert {row["finish_reason"] for row in rows_of(folder)} == {"stop"}
    assert {(row["finish_reason"], row["dropped_by"]) for row in rows_of(folder, "dropped.parquet")} == {
        ("length", "length")
    }
    asked.clear()
    make(tmp_path, "generate", *words)
    assert asked == []
    one, three = ([*words, SAMPLED[0], f"stages.generate.sampling.samples={n}"] for n in (1, 3))
    first = rows_of(make(tmp_path / "samples", "generate", *one))
    more = rows_of(make(tmp_path / "samples", "generate", *three))
    assert [row["completion_ids"] for row in more if row["sample"] == 0] == [row["completion_ids"] for row in first]
    asked.clear()
    make(tmp_path, "generate", *words, "force=[generate]")
    assert sum(asked) == len(both)


# --- prompts ---


def test_a_conversation_is_a_prompt_up_to_the_assistants_last_turn(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML)
    talks = [
        [
            turn("user", "What is a list?"),
            turn("assistant", "A row."),
            turn("user", "And a set?"),
            turn("assistant", "?"),
        ],
        [turn("system", "Be brief."), turn("user", "What is a tuple?")],
        [turn("user", "One"), turn("assistant", "Two")],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ["stages.generate.prompt_tokens=null", "data.holdout=0", f"data.chat_template={tmp_path / 'chatml.jinja'}"]
    folder = make(
        tmp_path,
        "generate",
        *words_of(teacher, path),
        *words,
        "stages.generate.sampling.max_new_tokens=4",
        "stages.generate.too_long=drop",
    )
    rows = rows_of(folder)
    tokenizer = load_tokenizer(teacher)
    told = []
    for talk in (talks[0][:3], talks[1], talks[2][:1]):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk) + "<|im_start|>assistant\n"
        if len(tokenizer(text)["input_ids"]) <= 60:
            told.append(text)
    assert len(told) >= 1
    assert [row["prompt"] for row in rows] == told
    assert [row["prompt_ids"] for row in rows] == [tokenizer(text)["input_ids"] for text in told]
    assert metrics(folder)["too_long"] == 3 - len(told)
    assert load_tokenizer(folder).chat_template == CHATML


def test_whole_texts_are_prompts_and_duplicates_and_leaks_are_counted(teacher: Path, tmp_path: Path) -> None:
    lines = ["What is a list?", "What is a set?", "What is a list?", "What is a tuple?"]
    for name, some in (("train", lines), ("test", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in some))
    words = ["stages.generate.prompt_tokens=null", f"data.test={tmp_path / 'test.jsonl'}", "data.holdout=0"]
    folder = make(tmp_path, "generate", *words_of(teacher, tmp_path / "train.jsonl"), *words)
    assert [(row["prompt"], row["split"]) for row in rows_of(folder)] == [
        (lines[0], "train"), (lines[1], "train"), (lines[3], "test"),
    ]  # fmt: skip
    told = metrics(folder)
    assert (told["prompts"], told["duplicate_prompts"], told["held_out"]) == (3, 1, 1)


def test_prompts_without_room_are_refused_or_left_out_and_counted(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    words = [*words_of(teacher, corpus), "stages.generate.prompt_tokens=null", "data.holdout=0"]
    with pytest.raises(Refusal, match=r"(\d+) of 30 prompts .* set too_long=drop") as refused:
        make(tmp_path / "refuse", "generate", *words)
    assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="no prompt is left of 30"):
        make(tmp_path / "none", "generate", *words, "stages.generate.too_long=drop",
             "stages.generate.sampling.max_new_tokens=60")  # fmt: skip
    short = tmp_path / "short.jsonl"
    short.write_text(corpus.read_text() + json.dumps({"text": "Short."}) + "\n")
    folder = make(tmp_path, "generate", *words, f"data.train={short}", "stages.generate.too_long=drop")
    tokenizer = load_tokenizer(teacher)
    room = [text for text in [*TEXTS[:30], "Short."] if 1 + len(tokenizer(text)["input_ids"]) + NEW <= 64]
    assert [row["prompt"] for row in rows_of(folder)] == room
    assert metrics(folder)["too_long"] == 31 - len(room)
    beginnings = make(tmp_path / "beginnings", "generate", *words_of(teacher, short), "data.holdout=0")
    assert metrics(beginnings)["too_short"] == 1


# --- filters ---


def candidates(folder: Path) -> list[list[Candidate]]:
    by_prompt: dict[str, list[Candidate]] = {}
    for row in rows_of(folder):
        by_prompt.setdefault(row["provenance"], []).append(
            Candidate(
                row["prompt"], row["completion"], row["completion_ids"], row["log_probabilities"], row["finish_reason"]
            )
        )
    return list(by_prompt.values())


def kept(each: Any, folder: Path) -> list[tuple[Candidate, bool]]:
    return [pair for some in candidates(folder) for pair in zip(some, each.keep(some), strict=True)]


def test_filters_divide_real_answers_by_what_they_say(sampled: Path) -> None:
    rules = {
        Length(3, 8): lambda answer: 3 <= len(answer.ids) <= 8,
        Length(finished=True): lambda answer: answer.finish_reason == "stop",
        LogProbability(-1.0): lambda answer: sum(answer.log_probabilities) / len(answer.ids) >= -1.0,
        Predicate("tests.stages.test_generate.has_a_space"): lambda answer: " " in answer.completion,
    }
    for each, rule in rules.items():
        told = kept(each, sampled)
        assert [stays for _, stays in told] == [rule(answer) for answer, _ in told]
        assert {stays for _, stays in told} == {True, False}, each


def has_a_space(answer: Candidate) -> bool:
    return " " in answer.completion


def test_repetition_leaves_text_that_goes_round_out_and_real_text_in(teacher: Path, made: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    real = [Candidate("", text, tokenizer(text)["input_ids"], None, "stop") for text in TEXTS[:20]]
    assert all(Repetition(4, 0.3).keep(real))
    round_ = [Candidate("", one.completion * 3, one.ids * 3, None, "stop") for one in real]
    assert not any(Repetition(4, 0.3).keep(round_))
    assert all(Repetition(4, 1.0).keep(round_))
    assert repeated_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(1 - 2 / 5)
    assert repeated_share([1, 2], 4) == 0


def test_the_majority_of_a_prompts_answers_stays() -> None:
    def said(*completions: str) -> list[Candidate]:
        return [Candidate("", completion, [1], None, "stop") for completion in completions]

    vote = MajorityVote()
    assert vote.keep(said("1 + 1 = 2", "so 3", "it is 2", "nothing")) == [True, False, True, False]
    assert vote.keep(said("4", "5")) == [True, False]
    assert vote.keep(said("none", "at all")) == [False, False]
    assert MajorityVote(r"answer: (\w+)|dunno").keep(said("dunno", "dunno", "answer: yes")) == [False, False, True]
    assert MajorityVote(minimum_share=0.6).keep(said("2", "3", "2", "x")) == [False] * 4
    assert MajorityVote(r"answer: (\w+)").keep(said("answer: yes", "answer: no", "yes, answer: yes")) == [
        True, False, True,
    ]  # fmt: skip


REFUSED_FILTERS = {
    "nothing fits": (lambda: Length(5, 2), "maximum=2 is below minimum=5"),
    "no share": (lambda: Repetition(4, 2.0), r"need \[0, 1\]"),
    "too likely": (lambda: LogProbability(1.0), "no token has more than 0"),
    "no expression": (lambda: MajorityVote("("), "mend the expression"),
    "no module": (lambda: Predicate("nowhere_at_all.keep"), "put its folder on PYTHONPATH"),
    "no function": (lambda: Predicate("json.nothing"), "json has no function nothing"),
    "no name": (lambda: Predicate("keep"), "need module.function"),
    "untold": (lambda: LogProbability().keep([Candidate("", "", [1], None, "stop")]), "the server reports no"),
}


@pytest.mark.parametrize("case", REFUSED_FILTERS)
def test_a_filter_that_cannot_be_is_refused_in_one_line(case: str) -> None:
    ask, said = REFUSED_FILTERS[case]
    with pytest.raises(Refusal, match=said) as refused:
        ask()
    assert "\n" not in str(refused.value)


def test_every_filter_has_its_yaml_and_what_leaves_nothing_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    names = sorted(path.stem for path in (ROOT / "conf" / "filter").glob("*.yaml"))
    assert names == ["length", "log_probability", "majority_vote", "predicate", "repetition"]
    words = [f"filter=[{','.join(names)}]"]
    words.append("filters.predicate.function=tests.stages.test_generate.has_a_space")
    words += ["filters.length.minimum=1000", "data.max_documents=3"]
    with pytest.raises(Refusal, match=r"filters leave none of 9 answers .* loosen them, the answers are kept"):
        make(tmp_path, "generate", *words_of(teacher, corpus), *words)
    assert list((tmp_path / "work" / "answers" / "generate").glob("shard-*"))


def test_a_users_code_counts_and_this_projects_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_judge", raising=False)
    file = tmp_path / "mine_to_judge.py"
    file.write_text("def keep(answer): return True\n")
    filters = [Length(), Predicate("mine_to_judge.keep")]
    before = code_key(filters)
    assert code_key(filters) == before != ""
    file.write_text("def keep(answer): return False\n")
    assert code_key(filters) != before
    assert code_key([Length(), Repetition()]) == ""


# --- a server ---


@pytest.fixture
def servers() -> Iterator[list[ServerProcess]]:
    started: list[ServerProcess] = []
    yield started
    for server in started:
        server.kill()


def served(port: int) -> list[str]:
    url = f"teacher.endpoint.url=http://127.0.0.1:{port}/v1"
    return ["teacher=served", url, "teacher.endpoint.retries=1", "teacher.endpoint.concurrency=3"]


def test_a_served_teacher_that_goes_down_is_asked_again_for_the_rest(
    servers: list[ServerProcess],
    made: Path,
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.teachers.connection.FIRST_PAUSE_SECONDS", 0.01)
    words = [*words_of(teacher, corpus), "stages.generate.filters={}"]
    servers.append(ServerProcess(teacher, "--die-after", "9"))
    config = composed(tmp_path, *words, *served(servers[0].port))
    with pytest.raises(Refusal, match=r"no usable answer in 2 tries .* run the same command again") as down:
        make(tmp_path, "generate", config=config)
    assert "\n" not in str(down.value)
    shelf = tmp_path / "work" / "answers" / "generate"
    before = sum(pq.read_metadata(path).num_rows for path in shelf.glob("shard-*"))
    assert 5 <= before <= 8
    servers.append(ServerProcess(teacher))
    url = f"http://127.0.0.1:{servers[1].port}/v1"
    config["stages"]["generate"]["teacher"]["endpoint"]["url"] = url
    folder = make(tmp_path, "generate", config=config)
    theirs, mine = rows_of(made), rows_of(folder)
    assert [row["prompt_ids"] for row in mine] == [row["prompt_ids"] for row in theirs]
    for got, here in zip(mine, theirs, strict=True):
        length = len(here["completion_ids"])  # this server knows no end token
        assert got["completion_ids"][:length] == here["completion_ids"]
        assert got["log_probabilities"][:length] == pytest.approx(here["log_probabilities"], abs=1e-4)
    assert metrics(folder)["mean_log_probability"] < 0


def test_a_server_that_tells_tokens_has_told_the_stops_too(
    servers: list[ServerProcess],
    made: Path,
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stop is cut off the text alone; its tokens are there, with their log-probabilities."""
    tokenizer = load_tokenizer(teacher)
    ids = rows_of(made)[0]["completion_ids"][:3]
    stop = tokenizer.decode(ids[-1:])
    text = tokenizer.decode(ids).partition(stop)[0]

    def answers(_: Any, items: Any, **__: Any) -> Any:
        for number, (key, *_rest) in enumerate(items):
            told = [-0.5] * (3 if number % 2 else 2)
            yield key, Generation(text, ids if number % 2 else ids[:2], "stop", told)

    monkeypatch.setattr("models.teachers.endpoint.Endpoint.generate", answers)
    servers.append(ServerProcess(teacher))
    words = [*served(servers[0].port), "stages.generate.filters={}", f"stages.generate.stop=[{json.dumps(stop)}]"]
    lengths = set()
    for row in rows_of(make(tmp_path, "generate", *words_of(teacher, corpus), *words)):
        assert tokenizer.decode(row["completion_ids"]).count(stop) == tokenizer.decode(ids).count(stop)
        assert row["completion_ids"][:3] == ids
        lengths.add(len(row["log_probabilities"]))
    assert lengths == {2, 3}


def test_a_server_that_tells_only_text_is_told_where_answers_end(
    servers: list[ServerProcess], made: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """The stop is cut off by the server, and belongs to the answer; its tokens are the text's own."""
    text = {row["prompt"]: "".join(f"<{token}>" for token in row["completion_ids"]) for row in rows_of(made)}
    stop = next(iter(text.values())).split("<")[3]  # the third token of an answer
    stop = f"<{stop}"
    servers.append(ServerProcess(teacher))
    words = served(servers[0].port)
    words[1] = f"teacher.endpoint.url=http://127.0.0.1:{servers[0].port}/openai/v1"
    words += ["stages.generate.filters={}", f"stages.generate.stop=['{stop}']"]
    folder = make(tmp_path, "generate", *words_of(teacher, corpus), *words)
    tokenizer = load_tokenizer(teacher)
    reasons = set()
    for row in rows_of(folder):
        before, found, _ = text[row["prompt"]].partition(stop)
        reasons.add(row["finish_reason"])
        if found:
            assert row["finish_reason"] == "stop"
            assert tokenizer.decode(row["completion_ids"]) == before + stop
        else:  # this server knows no end token, and goes on
            assert tokenizer.decode(row["completion_ids"]).startswith(before)
        assert row["log_probabilities"] is None
    assert reasons == {"stop", "length"}


# --- refusals ---

REFUSED = {
    "no room": (["stages.generate.sampling.max_new_tokens=60"], "leaves 4 for a prompt"),
    "beams of a server": (
        [*served(1), "stages.generate.sampling.beams=2"],
        "a server searches no beams",
    ),
    "drawn beams": (
        ["stages.generate.sampling.beams=2", "stages.generate.sampling.temperature=1.0"],
        "beams are searched, not drawn",
    ),
    "no split": (["stages.generate.splits=[dev]"], "need some of train, validation, test"),
    "an empty stop": (["stages.generate.stop=['']"], "stop holds an empty text"),
    "no way": (["stages.generate.too_long=cut"], "need one of refuse, drop"),
    "no prompt": (["stages.generate.prompt_tokens=0"], "prompt_tokens=0: need at least 1"),
    "answers": (["data=answers", "data.max_length=32"], "answers are no prompts"),
    "no batch": (["stages.generate.batch_size=0"], "generate.batch_size=0: need at least 1"),
    "a typo": (["+stages.generate.sampling.temprature=1"], "did you mean temperature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_loaded(
    case: str, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    words, said = REFUSED[case]
    with pytest.raises(Refusal) as refused:
        check({"config": composed(tmp_path, *words_of(teacher, corpus), *words), "stages": ["generate"]})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


# --- training on answers ---


def on_answers(run_dir: Path, teacher: Path, corpus: Path, *words: str) -> dict[str, Any]:
    config = composed(run_dir, *words_of(teacher, corpus), *words)
    data = {"_target_": "pipeline.data.answers.Answers", "train": f"{run_dir}/generate", "max_length": 32}
    for stage in ("record", "distill"):
        config["stages"][stage]["data"] = dict(data)
    return config


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_loss_is_the_students_on_the_completions_alone(
    made: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "generate")
    count = sum(row["split"] == "train" for row in rows_of(made))
    config = on_answers(
        tmp_path, teacher, corpus, "objective=cross_entropy", "stages.distill.training.max_steps=1",
        f"stages.distill.training.global_batch={count}", f"stages.distill.training.micro_batch={count}",
        "stages.distill.training.validate_every_steps=1",
    )  # fmt: skip
    made_, context = build(config, "distill"), Context(config, "distill")
    for role, path in made_.parents(context).items():
        context.parents[role] = {"path": path, "content_hash": content_hash(Path(path))}
    made_.prepare(context)
    student = load_model(str(context.work / "start"), dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for row in rows_of(made):
        if row["split"] == "train":
            ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
            with torch.no_grad():
                log = student(input_ids=ids).logits[0].log_softmax(-1)
            at = len(row["prompt_ids"])
            nats -= log[at - 1 : -1].gather(1, ids[0, at:, None]).sum().item()
            tokens += len(row["completion_ids"])
    made_.run(context)
    first = losses(context.out)[0]
    assert first["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_logit_distillation_on_answers_is_the_same_online_and_cached(
    made: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("online", "cached"):
        run_dir = tmp_path / name
        shutil.copytree(made, run_dir / "generate")
        words = ["teacher=cached", "encoding.k=400", "encoding.dtype=float32"]
        config = on_answers(run_dir, teacher, corpus, *(words if name == "cached" else []))
        if name == "cached":
            make(run_dir, "record", config=config)
        found.append(losses(make(run_dir, "distill", config=config)))
    for mine, theirs in zip(*found, strict=True):
        for key, value in unclocked(mine).items():
            if key not in ("teacher_gap", "top1_agreement"):  # which a cache of logits says otherwise, or not
                assert value == pytest.approx(theirs[key], rel=1e-4), key


def test_a_run_that_still_has_to_answer_is_planned(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = on_answers(tmp_path, teacher, corpus)
    plan = check({"config": config, "stages": ["generate", "distill"]})["plan"]
    assert plan[1]["parents"]["answers"] == f"{tmp_path}/generate"
    with pytest.raises(Refusal, match="distill needs the stage generate"):
        check({"config": config, "stages": ["distill"]})


def test_answers_of_nothing_are_not_trained_on(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such file or folder; run the stage generate"):
        Answers(str(tmp_path / "nowhere")).check()
    assert Answers(str(tmp_path / "nowhere")).check(planned=True)["chat"] is False


TASK = {
    "_target_": "pipeline.data.tasks.Task",
    "train": "ciphers:3",
    "shots": 1,
    "max_queries": 6,
    "max_length": 32,
    "teacher_max_length": 50,
    "too_long": "drop",
}


def test_a_tasks_queries_are_answered_with_demonstrations_and_learnt_without(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    config = on_answers(tmp_path, teacher, corpus, "stages.generate.prompt_tokens=null")
    config["stages"]["generate"]["data"] = dict(TASK)
    rows = rows_of(make(tmp_path, "generate", config=config))
    tokenizer = load_tokenizer(teacher)
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for row in rows:
        shown, asked = (tokenizer.decode(row[name][1:]) for name in ("teacher_prompt_ids", "prompt_ids"))
        assert shown.endswith(asked)
        assert "\n" in shown
        assert "\n" not in asked
        assert "\n" not in row["completion"][:-1]  # a task's separator ends an answer
    config["stages"]["distill"]["data"]["context"] = True
    assert len(losses(make(tmp_path, "distill", config=config))) >= 4


def test_a_teacher_that_overflows_on_the_way_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowed(model: Any, pairs: Any, **_: Any) -> list[list[float]]:
        return [[math.nan] * len(answer) for _, answer in pairs]

    monkeypatch.setattr("models.teachers.online.log_probabilities", overflowed)
    with pytest.raises(Refusal, match=r"log-probabilities are no numbers in float32; set teacher\.dtype") as refused:
        make(tmp_path, "generate", *words_of(teacher, corpus))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "work" / "answers" / "generate").glob("shard-*"))
