"""In-context distillation as it is run: whatever the teacher's source and the number of ranks, the same training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import Refusal
from models.generation import end_tokens
from models.measure import _names
from models.questions import Question, answered
from pipeline.building import build
from pipeline.check import check
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.report.report import write_report
from pipeline.report.terminal import table
from pipeline.steps.accuracy import gap_closed
from pipeline.steps.quiz import quiz_of
from tests import staged
from tests.command import train, weights

LITTLE = [
    "task.max_queries=40",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.intermediate_size=48",
    "stages.pretrain.training.max_steps=4",
    "stages.pretrain.training.validate_every_steps=4",
    "stages.distill.training.max_steps=4",
    "stages.distill.training.global_batch=8",
    "stages.distill.training.micro_batch=4",
    "stages.distill.training.validate_every_steps=4",
    "stages.evaluate.task_queries=6",
    "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 4, new_tokens: 4, repeats: 1}",
    "trainer.log_every_steps=1",
]
CORPUS = "data.max_documents=60"  # the teacher's: refused where a run is given another one
HIDDEN = ["teacher=cached", "encoding=hidden_states"]


def composed(run_dir: Path, *words: str, experiment: str = "demo/in_context") -> dict[str, Any]:
    return staged.composed(run_dir, f"+experiment={experiment}", CORPUS, *LITTLE, *words)


def make(run_dir: Path, stage: str, *words: str) -> Path:
    return staged.make(composed(run_dir, *words), stage)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, its teacher online."""
    folder = tmp_path_factory.mktemp("in-context") / "plain"
    for stage in ("pretrain", "distill", "evaluate"):
        make(folder, stage)
    return folder


def same(one: Path, other: Path, tolerance: float) -> None:
    mine, theirs = weights(one), weights(other)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


def moved(folder: Path, run_dir: Path) -> float:
    """How far training has brought the weights from where they started, at most."""
    start, end = weights(run_dir / "pretrain"), weights(folder)
    return max(float((end[name] - start[name]).abs().max()) for name in start)  # type: ignore[operator]


def test_a_recorded_teacher_with_demonstrations_is_the_online_one(plain: Path, tmp_path: Path) -> None:
    words = [f"teacher.path={plain / 'pretrain'}", *HIDDEN]
    make(tmp_path / "run", "record", *words)
    assert moved(plain / "distill", plain) > 1e-3
    same(make(tmp_path / "run", "distill", *words), plain / "distill", 1e-5)


@pytest.mark.parametrize(
    ("selection", "strategy", "teacher"),
    [
        pytest.param("random", "zero3", "online", marks=pytest.mark.slow),
        pytest.param("fixed", "ddp", "online", marks=pytest.mark.slow),
        pytest.param("fixed", "zero3", "online", marks=pytest.mark.slow),  # the shared prompt's keys and values
        pytest.param("fixed", "zero2", "sharded", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(plain: Path, tmp_path: Path, selection: str, strategy: str, teacher: str) -> None:
    words = [f"teacher.path={plain / 'pretrain'}", f"task.selection={selection}"]
    one = plain / "distill" if selection == "fixed" else make(tmp_path / "one", "distill", *words)
    done = train(
        "+experiment=demo/in_context",
        *LITTLE,
        *words,
        f"run_dir={tmp_path / 'two'}",
        "stages=[distill]",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        f"strategy={strategy}",
        f"teacher={teacher}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same(tmp_path / "two" / "distill", one, 1e-5)


@pytest.mark.parametrize("draws", [1, 2])
def test_the_loss_is_the_students_distance_from_the_teacher_that_has_read_more(
    plain: Path, tmp_path: Path, draws: int
) -> None:
    """One step on all queries, against whole logits of each text by itself: documents as the context, and draws."""
    from transformers import AutoModelForCausalLM

    lines = [{"query": f"w{n}>", "answer": "abc"[n % 3], "document": "xyz"[n % 3] * (2 + n % 4)} for n in range(12)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = ["task.context='{document}'", "task.shots=0"]
    if draws > 1:
        shown = ["task.selection=random", "task.shots=2", f"task.draws={draws}"]
    sharp = tmp_path / "teacher"  # so little training leaves all distributions nearly the same
    shutil.copytree(plain / "pretrain", sharp)
    model = AutoModelForCausalLM.from_pretrained(sharp).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.ndim == 2 else 1)
    model.save_pretrained(sharp)
    words = [
        f"teacher.path={sharp}", f"task.train={tmp_path / 'documents.jsonl'}", "task.test=null",
        "task.holdout=0.0", *shown, "stages.distill.training.max_steps=1", "stages.distill.training.global_batch=12",
        "stages.distill.training.micro_batch=12", "stages.distill.training.validate_every_steps=1",
    ]  # fmt: skip
    folder = make(tmp_path / "run", "distill", *words)
    config = composed(tmp_path / "run", *words)
    tokenizer, task = load_tokenizer(str(plain / "pretrain")), build(config, "distill").data
    items = list(task.items("train", tokenizer))
    assert len(items) == 12

    def told(prompt: list[int], answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([prompt + answer])).logits
        return logits[0, len(prompt) - 1 : -1].softmax(-1)  # the student starts as the teacher

    total, tokens = 0.0, 0
    for item in items:
        text = tokenizer.decode(item.prompt[1:])
        assert not any(letter in text for letter in "xyz\n")
        p = torch.stack([told(prompt, item.answer) for prompt in item.teacher_prompts]).mean(0)
        total += float((p * (p.log() - told(item.prompt, item.answer).log())).sum())
        tokens += len(item.answer)
        assert len(item.teacher_prompts) == draws
    if draws == 1:
        documents = {tokenizer.decode(item.teacher_prompts[0][1:]).split("\n")[0] for item in items}
        assert documents == {line["document"] for line in lines}
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert total / tokens > 0.01


def test_no_demonstrations_are_plain_distillation_to_the_bit(plain: Path, tmp_path: Path) -> None:
    teacher = f"teacher.path={plain / 'pretrain'}"
    none = make(tmp_path / "none", "distill", teacher, "task.shots=0")
    # The same queries as a file of prompts and completions, which knows nothing of demonstrations.
    from pipeline.data.tasks import Task

    tokenizer = load_tokenizer(str(plain / "pretrain"))
    task = Task(train="ciphers:3", test="ciphers:3:unseen", shots=0, max_queries=40)
    lines = []
    for split in ("train", "validation", "test"):
        for item in task.items(split, tokenizer):
            lines.append({"prompt_ids": item.prompt, "completion_ids": item.answer, "split": split})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = "{_target_: pipeline.data.answers.Answers, train: " + str(path) + ", max_length: 128}"
    logits = make(tmp_path / "plain", "distill", teacher, f"stages.distill.data={answers}")
    for name, tensor in weights(none).items():
        assert torch.equal(tensor, weights(logits)[name]), name  # type: ignore[arg-type]


def test_the_report_says_what_was_transferred(plain: Path) -> None:
    manifest = json.loads((plain / "evaluate" / "manifest.json").read_text())
    rows = {row["stage"]: row for row in manifest["metrics"]["rows"]}
    assert list(rows) == ["pretrain", "pretrain, 6 shots", "distill", "student before"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert {"gap_closed", "gap_closed_low", "gap_closed_high"} <= set(rows["distill"])
    assert rows["student before"]["accuracy"] == rows["pretrain"]["accuracy"]  # it starts as the teacher's copy


def test_a_report_without_speed_and_comparisons_has_empty_cells(plain: Path, tmp_path: Path) -> None:
    models = ",".join(str(plain / stage) for stage in ("pretrain", "distill"))
    words = ["stages.evaluate.speed=null", "stages.evaluate.compare=null", "stages.evaluate.before=null"]
    folder = make(tmp_path, "evaluate", *words, f"stages.evaluate.models=[{models}]")
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    known = {
        row["stage"]: row for row in json.loads((plain / "evaluate" / "manifest.json").read_text())["metrics"]["rows"]
    }
    for row in metrics["rows"]:
        assert row["perplexity"] == known[row["stage"]]["perplexity"]
        assert not {"generate_tokens_per_second", "first_token_ms", "peak_memory_bytes"} & set(row)
    assert metrics["comparisons"] == []
    report = write_report(tmp_path)
    assert [row["generate_tokens_per_second"] for row in report["rows"]] == [None, None]
    assert " against " not in str(table(report).caption)
    assert (tmp_path / "report.html").exists()


def test_questions_of_one_text_are_counted_one_by_one(plain: Path, tmp_path: Path) -> None:
    """Documents as the context: what is asked of each can be the same."""
    lines = [{"query": "what?", "answer": "abc"[n % 3], "document": "xyz"[n % 3]} for n in range(6)]
    lines += [{"query": f"w{n}>", "answer": "abc"[n % 3], "document": "x"} for n in range(6)]
    for name, some in (("train", lines[6:]), ("test", lines[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    words = [
        f"teacher.path={plain / 'pretrain'}", f"task.train={tmp_path / 'train.jsonl'}", "task.shots=0",
        f"task.test={tmp_path / 'test.jsonl'}", "task.context='{document}'", "stages.evaluate.before=null",
        "stages.evaluate.models=[]",
    ]  # fmt: skip
    made = build(composed(tmp_path / "run", *words), "evaluate")
    tokenizer = load_tokenizer(str(plain / "pretrain"))
    questions = quiz_of(made.task, tokenizer, role="teacher", shown=True, queries=6, batch_size=4, choices_per="choice")
    names = {name: _names(each) for name, each in questions.questions.items()}
    assert len(set(names["unseen"])) == len(names["unseen"]) == 6
    assert names["unseen"] == names["unseen, shown"]


def test_the_gap_and_its_interval_are_those_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    student, without, shown = (
        {str(n): bool(right) for n, right in enumerate(draw.random(400) < p)} for p in (0.7, 0.2, 0.9)
    )
    told = gap_closed(student, without, shown)
    a, b, c = (np.array(list(each.values()), dtype=float) for each in (student, without, shown))
    share = (a.mean() - b.mean()) / (c.mean() - b.mean())
    assert told["gap_closed"] == pytest.approx(share)
    # the delta method, with the covariances of a paired sample
    gap = (c - b).mean()
    deviation = ((a - b) - share * (c - b)).std() / gap / np.sqrt(len(a))
    assert told["gap_closed_low"] == pytest.approx(share - 1.96 * deviation, abs=0.2 * deviation)
    assert told["gap_closed_high"] == pytest.approx(share + 1.96 * deviation, abs=0.2 * deviation)
    assert gap_closed(shown, without, shown)["gap_closed"] == 1
    assert gap_closed(without, without, shown)["gap_closed"] == 0
    assert gap_closed(shown, shown, without)["gap_closed"] is None
    half = {query: student[query] for query in list(student)[:200]}
    assert gap_closed(half, without, shown) == gap_closed(
        half, {q: without[q] for q in half}, {q: shown[q] for q in half}
    )


@pytest.mark.parametrize("per", ["choice", "token", "byte"])
def test_choices_are_ranked_by_their_likelihood_and_texts_are_compared(plain: Path, per: str) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(plain / "pretrain"), load_tokenizer(plain / "pretrain")
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 257, (count,), generator=generator).tolist()

    questions, best = [], []
    for number in range(12):
        prompt, choices = ids(5), [ids(1 + number % 3), ids(3), ids(4)]
        texts = tuple("é" * (1 + number % 2) + "a" * at for at in range(3))
        sums = []
        for choice in choices:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            size = {"choice": 1, "token": len(choice), "byte": 2 + 2 * (number % 2) + len(sums)}[per]
            sums.append(sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(choice)) / size)
        best.append(max(range(3), key=sums.__getitem__))
        questions.append(Question(prompt, "", "", 3, choices, texts))
    got = answered(model, questions, tokenizer, 0, "\n", batch_size=5, per=per)
    assert got == [each == 0 for each in best]
    assert len(set(got)) == 2


def test_a_texts_answer_ends_where_its_mark_stands_and_fits_what_the_model_reads(plain: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model, tokenizer = AutoModelForCausalLM.from_pretrained(plain / "pretrain"), load_tokenizer(plain / "pretrain")
    prompt = tokenizer("abcd>")["input_ids"]
    made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    text = tokenizer.decode(made)
    end = text[3]
    free = [Question(prompt, "", answer, 3) for answer in (text.split(end)[0], text.split(end)[0] + "x")]
    assert answered(model, free, tokenizer, 0, end, batch_size=2) == [True, False]

    sizes: dict[str, int] = {"vocab_size": 257, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    short = GPT2LMHeadModel(GPT2Config(**sizes)).eval()  # its positions are learnt: a ninth token is an error
    assert len(prompt) == 5
    assert answered(short, [Question(prompt, "", "zzz", 3)], tokenizer, 0, "\n", batch_size=2) == [False]


def test_an_answer_ends_at_every_end_token_that_the_model_names(tmp_path: Path) -> None:
    """As of models whose turns end by another token than texts: the second of generation_config's list."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(["abcd"], 300, tmp_path / "t")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    size = len(tokenizer)
    a, b, z = (tokenizer(letter)["input_ids"][0] for letter in "abz")
    turn_end = tokenizer.convert_tokens_to_ids("<|eot|>")
    shape = {"hidden_size": size + size % 2, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=False, **shape)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, size + size % 2))
        model.lm_head.weight.zero_()
        for token, following in ((a, b), (b, turn_end), (turn_end, z), (z, z)):  # a b <|eot|> z z z …
            model.lm_head.weight[following, token] = 1
    question = [Question([a], "a", "b", 3)]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert answered(model, question, tokenizer, 0, "\n", batch_size=1) == [False]  # it speaks on
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
    assert answered(model, question, tokenizer, 0, "\n", batch_size=1) == [True]
    # Rollouts end by them too; what a family names by default, and is a word here, ends nothing.
    assert end_tokens(tokenizer, model.generation_config) == [tokenizer.eos_token_id, turn_end]
    model.generation_config.eos_token_id = b
    assert end_tokens(tokenizer, model.generation_config) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["task.train=nowhere.jsonl"], "task.train=nowhere.jsonl: no such file"),
        (["task.query='{question}'"], r"names \{question\}, and it has query, answer"),
        (["task.shots=5000"], "queries of task.train to show: "),
        (["teacher=cached", "task.selection=random", "task.draws=2"], "task.draws=2: .*teacher=online"),
        (["auxiliary=[hidden_states]"], "hidden_states compares layers .* the teacher's prompts"),
        (["task.teacher_max_length=4096"], "the teacher reads at most 512"),
        (["stages.evaluate.task_queries=0"], "task_queries=0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path: Path, words: list[str], reason: str) -> None:
    config = composed(tmp_path / "run", *words)
    stages = ["pretrain", *(["record"] if "teacher=cached" in words else []), "distill", "evaluate"]
    with pytest.raises(Refusal, match=reason) as problem:
        check({"config": config, "stages": stages})
    assert "\n" not in str(problem.value)


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("experiment", ["demo/in_context", "demo/sequence_level", "demo/on_policy"])
def test_the_experiments_do_what_they_say(tmp_path: Path, experiment: str) -> None:
    done = train(f"+experiment={experiment}", f"run_dir={tmp_path / 'run'}", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["stage"]: row for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}
    assert rows["pretrain, 6 shots"]["accuracy"] - rows["pretrain"]["accuracy"] > 0.8
    assert rows["distill"]["gap_closed_low"] > 0.8
    if experiment != "demo/in_context":
        assert rows["distill"]["accuracy"] > rows["control"]["accuracy"] + 0.1
        assert rows["distill"]["perplexity"] < rows["control"]["perplexity"]
