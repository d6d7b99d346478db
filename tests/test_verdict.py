"""What the stage `evaluate` says of a model is what its documents and answers say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.measure import likelihood_of
from pipeline.building import build
from pipeline.data.batch import collate
from pipeline.data.prepared import sequences_of
from pipeline.data.tokenizer import load_tokenizer
from pipeline.report.columns import columns_of
from pipeline.report.report import write_report
from pipeline.steps.accuracy import SEEN, UNSEEN, with_accuracy
from pipeline.steps.verdict import Margin, Rule, Scored, relative_interval, verdict_on
from tests.command import train
from tests.quantization.test_qat import EXPERIMENT, LITTLE
from tests.staged import manifest

SPEED = "stages.evaluate.speed=null"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdict") / "run"
    for stage in ("pretrain", "quantize", "qat", "evaluate"):
        EXPERIMENT.make(folder, stage, SPEED)
    return folder


def test_each_document_has_the_nats_of_a_plain_loop(made: Path, tmp_path: Path) -> None:
    config = EXPERIMENT.composed(made)
    tokenizer, path = load_tokenizer(made / "pretrain"), str(made / "pretrain")
    data = build(config, "evaluate").data
    rows, _, _ = sequences_of(data, "test", tokenizer, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats: list[float] = []
    tokens: list[int] = []
    texts = [text for text in data.texts("test") if text.strip()]
    for text in texts:
        ids = [begin, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        nats.append(0.0)
        tokens.append(len(ids) - 1)
        for at in range(0, len(ids) - 1, data.max_length - 1):
            window = torch.tensor([ids[at : at + data.max_length]])
            with torch.no_grad():
                logs = model(window).logits[0, :-1].double().log_softmax(-1)
            nats[-1] -= float(logs.gather(1, window[0, 1:, None]).sum())
    numbers = rows.documents(begin)
    each = [
        {**rows.arrays(number), "documents": rows.document_of_tokens(number, numbers)} for number in range(len(rows))
    ]
    found = likelihood_of(model, [collate(each[at : at + 8], pad_token=0) for at in range(0, len(each), 8)])
    assert found.tokens_D.tolist() == tokens
    assert found.nats_D.tolist() == pytest.approx(nats, rel=1e-5)
    (row,) = [row for row in manifest(made / "evaluate")["metrics"]["rows"] if row["stage"] == "pretrain"]
    assert row["documents"] == len(texts)
    assert row["perplexity"] == pytest.approx(np.exp(sum(nats) / sum(tokens)), rel=1e-5)
    assert row["perplexity_interval"][0] < row["perplexity"] < row["perplexity_interval"][1]


def test_every_model_has_a_verdict_against_the_teacher_of_all(made: Path) -> None:
    metrics = manifest(made / "evaluate")["metrics"]
    assert [(each["stage"], each["against"]) for each in metrics["verdicts"]] == [
        ("quantize", "pretrain"),
        ("qat", "pretrain"),
    ]
    rows = {row["stage"]: row["perplexity"] for row in metrics["rows"]}
    for each in metrics["verdicts"]:
        told = each["perplexity"]
        assert told["difference"] == pytest.approx(rows[each["stage"]] / rows["pretrain"] - 1, rel=1e-6)
        assert told["interval"][0] <= told["difference"] <= told["interval"][1]
        assert each["sentence"].startswith(f"{each['stage']} ")
    (pair,) = metrics["comparisons"]
    assert pair["relative_interval"][0] <= pair["relative"] <= pair["relative_interval"][1]
    report = write_report(made)
    assert [each["sentence"] for each in report["verdicts"]] == [each["sentence"] for each in metrics["verdicts"]]
    told = (made / "report.md").read_text()
    page = (made / "report.html").read_text()
    for each in metrics["verdicts"]:
        assert f"**{each['verdict']}**" in told
        assert f'class="{each["verdict"]}"' in page


def scored(nats: Any, right: dict[str, bool] | None = None, tokens: Any = None) -> Scored:
    tokens = np.full(40, 10.0) if tokens is None else tokens
    return Scored(np.asarray(nats, dtype=float), tokens, right or {})


def test_perplexity_and_accuracy_are_judged_together() -> None:
    base = np.linspace(20, 40, 40)
    noise = np.random.default_rng(0).normal(0, 0.005, 40)
    some = {f"q{n}": n % 3 == 0 for n in range(300)}
    worse = {name: right and n % 2 == 0 for n, (name, right) in enumerate(some.items())}
    found = verdict_on("a", scored(base + noise, worse), "b", scored(base, some), Margin())
    assert (found["perplexity"]["verdict"], found["accuracy"]["verdict"]) == ("equivalent", "worse")
    assert found["verdict"] == "worse"
    assert found["sentence"].startswith(
        "a is worse than b: perplexity −0.00 % (95 %: −0.02 to +0.01; margin ±1 %) on 40 "
    )
    assert "accuracy −16.67 points (95 %: −20.80 to −12.31; margin ±1) on 300 questions, McNemar" in found["sentence"]
    alike = verdict_on("a", scored(base + noise), "b", scored(base), Margin())
    assert alike["verdict"] == "equivalent"
    other = verdict_on("a", scored(base[:20]), "b", scored(base), Margin())
    told = "a cannot be compared with b: it was measured on 20 documents, and b on 40 documents"
    assert (other["verdict"], other["sentence"]) == ("undecided", told)
    apart = np.full(40, 12.0)  # of another tokenizer
    assert "perplexity" in verdict_on("a", scored(base, tokens=apart), "b", scored(base), Margin())
    for unit in ("window of 64 tokens", "conversation"):  # are others then
        one, two = (replace(each, unit=unit) for each in (scored(base, some, tokens=apart), scored(base, some)))
        found = verdict_on("a", one, "b", two, Margin(accuracy=0.2))
        assert "perplexity" not in found
        assert found["sentence"].endswith("; perplexity was measured on other documents")
        assert relative_interval(one, two) is None
        assert "perplexity" in verdict_on("a", replace(one, tokens_D=two.tokens_D), "b", two, Margin())
    few = verdict_on("a", scored([1.0, 2.0], tokens=np.ones(2)), "b", scored([1.0, 2.5], tokens=np.ones(2)), Margin())
    assert few["verdict"] == "undecided"
    assert "on 2 documents, which are too few" in few["sentence"]
    json.dumps(few, allow_nan=False)


def test_what_is_required_and_not_shown_ends_the_run(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    (run / "retort.json").touch()
    words = ["+experiment=demo/quantize_aware", *LITTLE, f"run_dir={run}", "only=[evaluate]", SPEED]
    ended = train(*words, "verdict.require=equivalent", "verdict.margin.perplexity=1e-6", "resume=overwrite")
    verdicts = manifest(run / "evaluate")["metrics"]["verdicts"]
    short = [each for each in verdicts if each["verdict"] in ("worse", "undecided")]
    assert [each["stage"] for each in short] == ["quantize"]
    assert ended.returncode == 3, ended.stderr
    assert "verdict.require=equivalent does not hold: " in ended.stderr
    assert all(each["sentence"] in ended.stderr for each in short)
    assert (run / "report.html").exists()
    wide = ["verdict.margin.perplexity=0.9", "verdict.require=equivalent", "resume=overwrite"]
    ended = train(*words, *wide)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["verdict.reference=nobody"],
            r"verdict\.reference=nobody: it is not measured; need one of pretrain, quantize",
        ),
        (
            ["stages.evaluate.models=[qat]", "verdict.require=equivalent"],
            r"verdict\.require=equivalent: qat alone is measured, so nothing is compared",
        ),
    ],
)
def test_verdicts_that_cannot_be_given_are_refused_before_anything_is_measured(
    words: list[str], told: str, made: Path
) -> None:
    stage, context = EXPERIMENT.begin(made, "evaluate", SPEED, *words)
    with pytest.raises(Refusal, match=told):
        stage.check(context)


def test_a_verdict_may_be_against_any_model(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    shutil.rmtree(run / "evaluate")
    EXPERIMENT.make(run, "evaluate", SPEED, "verdict.reference=quantize")
    verdicts = manifest(run / "evaluate")["metrics"]["verdicts"]
    assert [(each["stage"], each["against"]) for each in verdicts] == [("pretrain", "quantize"), ("qat", "quantize")]


def test_an_accuracy_has_its_interval_in_the_report() -> None:
    """By the formula of Wilson's score interval; and none where nothing was asked."""
    right = {f"q{n}": n < 27 for n in range(40)}
    task: Any = None  # only a teacher's row reads it
    asked = {"a": {UNSEEN: right, SEEN: {}}, "b": {UNSEEN: {}, SEEN: {}}}
    one, none = with_accuracy([{"stage": "a"}, {"stage": "b"}], asked, None, task)
    z, share, count = 1.959964, 27 / 40, 40
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    assert one["accuracy"] == share
    assert one["accuracy_interval"] == pytest.approx((middle - reach, middle + reach), abs=1e-6)
    assert (none["accuracy"], none["accuracy_interval"]) == (None, None)
    assert "0.520 to 0.799" in [column.show(one.get(column.key)) for column in columns_of([one])]


@pytest.mark.parametrize(
    ("made_of", "told"),
    [
        (lambda: Margin(perplexity=0), r"verdict\.margin\.perplexity=0: need a number between 0 and 1"),
        (lambda: Margin(accuracy=2), r"verdict\.margin\.accuracy=2"),
        (lambda: Rule(require="better"), r"verdict\.require=better: need equivalent, or null"),
    ],
)
def test_rules_that_make_no_sense_are_refused(made_of: Any, told: str) -> None:
    with pytest.raises(Refusal, match=told):
        made_of()
