"""What a person types: spellings that are understood, and answers that say what to type instead."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from pipeline import run_folder
from pipeline.building import build, check_kinds
from pipeline.command_line import CONF, arguments, choices
from pipeline.config import parse
from pipeline.context import Context
from pipeline.data import parts
from pipeline.data.prepared import sequences_of
from pipeline.data.shards import Shards
from pipeline.data.tokenizer import train_tokenizer
from tests.command import train
from tests.test_config import composed, quickstart, refused, unrefused

WRONG = {  # what is typed → what the answer says
    "seed=abc": "seed=abc: need a whole number",
    "trainer.checkpoint=null": "trainer.checkpoint=null: need settings; set its keys one by one: "
    "trainer.checkpoint.every_steps=…",
    "trainer.checkpoint.every_minutes=10m": "trainer.checkpoint.every_minutes=10m: need a number",
    "run_dir=runs/lr=1e-3": "write 'run_dir=\"runs/lr=1e-3\"'",
    "teacher.path=a/epoch=3-step=100": "write 'teacher.path=\"a/epoch=3-step=100\"'",
    "data.train=[a": "write 'data.train=\"[a\"'",
    "data.max_length": "write data.max_length=VALUE",
    "optimizer.learning_rate=1": "unknown config key 'optimizer.learning_rate'; did you mean lr?",
    "optimizer.lr=fast": "optimizer.lr=fast: need a number",
    "stages.distill.training.optimizer.lr=3": "stages.distill.training.optimizer is taken from optimizer; "
    "write optimizer.lr=3",
    "stages.distill.student.shape.hidden_size=8": "write student.shape.hidden_size=8",
    "stages.distill.lora=qlora": "a name stands where settings are needed; write lora=qlora",
    "stages.distill.objective=cross_entropy": "write objective=cross_entropy",
    "stages.quantize.method=awq": "unknown config key 'stages.quantize.method'; write quantizer=awq",
    "stages.quantize.quantizer=awq": "write quantizer=awq",
    "stages.quantize.scheme=w4a16_g32": "write scheme=w4a16_g32",
    "stages.quantize.grid=int4_group32": "it is called scheme: scheme=CHOICE, of w2a16_g32",
    "stages.prune.importance=wanda": "write importance=wanda",
    "experiment=distill": "write +experiment=distill",
    "--dry-run": "settings are written KEY=VALUE; write dry_run=true",
    "show_data=-1": "show_data=-1: need a number of sequences to show",
    "prepare_data=0/4": "prepare_data=0/4: need I/N, the number of this job, from 1 on, of N, as 1/16",
    "dry_run=maybe": "dry_run=maybe: need true or false",
    "lr=1e-4": "unknown config key 'lr'; did you mean optimizer.lr?",
    "scheme.bits=4": "unknown config key 'scheme.bits'; did you mean scheme.weights.bits?",
    "formats.gguf.type=q4_km": "formats.gguf.type=q4_km: need one of auto",
    "stages.distill.training.global_batch=6": "stages.distill.training.global_batch=6 is not a multiple of "
    "stages.distill.training.micro_batch=8",
    "+experiment=evaluate_only model.path=/no/where data.test=stdlib": "model.path=/no/where: no such folder",
    "+experiment=distill model.path=m teacher.path=t data.train=t": "the teacher is teacher.path",
    "prune_recover": "write +experiment=prune_recover",
    "data.train=": "it names no value; write data.train=VALUE, or data.train=null for none",
    "data.train=[a,b=c]": "write 'data.train=[a,\"b=c\"]'",
    "quantizer=null": "quantizer=null: a run needs one; choose quantizer=awq, clipped, gptq",
    "only=[x]": "only=[x]: no such stage",
    "on_policy.share=1": "choose on_policy= first, of distillm, gkd, minillm",
    "formats.torchao.x=1": "choose it: format=[huggingface,compressed_tensors,gguf,torchao]",
    "format=[gguf,gpqt]": "format=gpqt: no such choice; did you mean gptq?",
    "auxiliary=[hidden_state]": "auxiliary=hidden_state: no such choice; did you mean hidden_states?",
    "formats=[gguf]": "choose some by name: format=[gguf]",
    "formats=gguf": "write format=gguf",
    "stages.export.formats=gguf": "write format=gguf",
    "stages.export.formats=[gguf]": "write format=gguf",
    "stages.distill.training.schedule=wsd": "write schedule=wsd",
    "objective.also.x=hidden_states": "objective.also is taken from auxiliaries; write auxiliary=[hidden_states]",
    "objective.also.x=reverse_kl": "write +divergence@auxiliaries.x=reverse_kl",
    "stages.evaluate.compare=[distill,control]": "need a list of pairs, e.g. [[distill, control]]",
    "stages.evaluate.compare=5": "stages.evaluate.compare=5: need a list of pairs, e.g. [[distill, control]] or null",
    "auxiliary=[hidden_states] auxiliaries.hidden_states.layers=[3]": "layers=[3]: need a list of pairs, e.g. [[1, 2]]",
    "student.shape.num_hidden_layers=1000000": "num_hidden_layers=1000000: need at most 10,000 layers",
    "student.shape.num_attention_heads=x": "student.shape.num_attention_heads=x: need a whole number of at least 1",
    "student.shape.num_key_value_heads=-1": "student.shape.num_key_value_heads=-1: need a whole number of at least 1",
    "stages.pretrain.model.hidden_size=0.5": "model.hidden_size=0.5: need a whole number of at least 1",
    "stages.quantize.scheme=null": "stages.quantize.scheme=null: ",
    "stages.distill.training=null": "stages.distill.training=null: ",
    "stages.pretrain.training=5": "stages.pretrain.training=5: settings are needed, and no number",
    "stages.pretrain.model=null": "stages.pretrain.model=null: ",
    "student.shape=null": "student.shape=null: ",
    "stages.distill=null": "stages.distill=null: need settings; a stage is left out with only=[…] or stop=…",
    "optimizer.lr=nan": "optimizer.lr: Invalid learning rate: nan; give another value",
    "callbacks.progress.first_seconds=x": "callbacks.progress.first_seconds=x: need a number",
    "callbacks.progress.every_seconds=null": "callbacks.progress.every_seconds=null: need a number",
    "callbacks.watchdog.silent_seconds=null": "callbacks.watchdog.silent_seconds=null: need a number",
    "callbacks.watchdog.timeout_minutes=-1": "watchdog.timeout_minutes=-1 (strategy.timeout_minutes, unless set",
    "+callbacks.mine.x=1": "callbacks.mine: settings without _target_, the class they are of",
    "+callbacks.mine=5": "callbacks.mine=5: settings are needed, and no number",
    "optimizer.betas=[0.9]": "stages.pretrain.training.optimizer: list index out of range (of lr=0.004, betas=[0.9]",
    "+optimizer.weight_decay=0.5": "optimizer.weight_decay=0.5: without effect; set stages.distill.training.",
    "resume.skip_sequences=null": "resume.skip_sequences=null: need a list, e.g. resume.skip_sequences=[]",
    "student.shape.attention_dropout=7": "student.shape.attention_dropout=7: need a probability from 0 to 1",
    "+stages.pretrain.model.attention_dropout=7.0": "model.attention_dropout=7.0: need a probability from 0 to 1",
    "student.shape.rope_theta=1e4": "no such number; did you mean rope_parameters.rope_theta?",
    "stages.prune.steps=0": "stages.prune.steps=0: need at least 1",
    "stages.distill.training.max_steps=0": "stages.distill.training.max_steps=0: need a number above 0",
    "+experiment=export_only model.path=m quantizer=awq": "quantizer=awq: no stage of export_only takes it; its stages "
    "are export",
    "+experiment=sparsify_recover model.path=m data.train=t on_policy=gkd": "on_policy=gkd: no stage of",
    "+experiment=demo/prune_recover qat.scales=x": "qat.scales=x: no stage of prune_recover takes it",
    "+experiment=distill teacher.path=t data.train=t importance=wanda": "importance=wanda: no stage of distill",
    "model.path=m": "model.path=m: no stage of quickstart takes it",
    "+experiment=evaluate_only model.path=m": "data.test is not set",
    "+experiment=evaluate_only model.path=m data.train=t": "data.test is not set",
    "+experiment=in_context teacher.path=t": "task.train is not set",
    "encoding=sampled": "encoding=sampled: only the stage record takes it, which this run leaves out; it runs with "
    "teacher=cached or teacher=served",
    "scheme=w4a16_g64": "no such choice; write scheme=w4a16_g128 scheme.weights.group_size=64",
    "scheme=w5a16_g64": "write scheme=w4a16_g128 scheme.weights.bits=5 scheme.weights.group_size=64",
    "scheme=w4a16": "did you mean w4a16_g128 or w4a16_g128_asymmetric or w4a16_g32?",
    "stages.prune.target_parameters=6Q": "need a whole number or null; 6B, 900M and 6e9 are understood",
    "order=[pretrain,distill,control,prune,recover,quantize,qat,unquantized,export,evaluate]": "stages.record is not "
    "in order, which says when a stage runs: add it, e.g. order=[",
}


@pytest.mark.parametrize(
    "words",
    [
        ["student.shape.head_dim=16"],
        ["student.shape={num_hidden_layers: 1, head_dim: 16}"],
        ["+student.shape.head_dim=16"],
        ["student.shape.head_dim=16", "student.shape={num_hidden_layers: 1}"],
        ["student.shape.rope_parameters={rope_theta: 5, rope_type: default}"],
    ],
    ids=str,
)
def test_any_number_of_the_teachers_config_can_be_typed(words: list[str]) -> None:
    config = composed(*arguments(words))
    shape = config["student"]["shape"]
    assert shape == config["stages"]["distill"]["student"]["shape"]
    assert shape["hidden_size"] == 64
    assert shape["num_hidden_layers"] == (1 if "num_hidden_layers" in str(words) else 3)
    assert shape.get("head_dim") == (16 if "head_dim" in str(words) else None)
    assert shape.get("rope_parameters") == ({"rope_theta": 5, "rope_type": "default"} if "rope" in str(words) else None)


def test_a_number_that_the_yaml_does_not_list_reaches_stages_that_change_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pipeline.command_line as line

    shape = "{_target_: models.student.Shape, shape: {hidden_size: null, num_hidden_layers: %s}}"
    made = OmegaConf.create(f"student: {shape % 'null'}\nstages: {{a: {{student: {shape % 2}}}}}")
    monkeypatch.setattr(line, "composed_without_values", lambda words: made)
    words = arguments(
        ["student.shape.head_dim=16", "student.shape.hidden_size=32", "student.shape.num_hidden_layers=1"]
    )
    assert [word for word in words if "head_dim" in word] == [
        "++stages.a.student.shape.head_dim=${student.shape.head_dim}",
        "++student.shape.head_dim=16",
    ]
    assert "stages.a.student.shape.hidden_size=${student.shape.hidden_size}" in words
    assert "student.shape.hidden_size=32" in words
    assert not any("stages.a.student.shape.num_hidden_layers" in word for word in words)


@pytest.mark.parametrize("word", WRONG)
def test_an_answer_names_the_argument_and_the_spelling_that_works(word: str) -> None:
    told = refused(*word.split())
    assert WRONG[word] in told
    assert len(told.splitlines()) == 1


def test_a_watchdog_of_ranks_that_do_not_train_is_checked_too(tmp_path: Path, narrow: Path) -> None:
    told = refused(
        f"run_dir={tmp_path / 'run'}",
        f"teacher.path={narrow}",
        *("teacher=cached", "only=[record]", "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
        "callbacks.watchdog.silent_seconds=-1",
    )
    assert told == "callbacks.watchdog.silent_seconds=-1: need a number above 0"


class Own:
    """As a callback of one's own may be annotated."""

    def __init__(self, every: int | str = 10, mode: bool | str = False, least: Optional[float] = 0.5) -> None:  # noqa: UP045
        self.values = [every, mode, least]


def test_values_are_held_against_annotations_and_what_these_take_is_let_be() -> None:
    node = {"_target_": "tests.test_command_line.Own"}
    for fine in ({"every": "epoch"}, {"mode": "auto"}, {"least": None}, {"every": 3, "mode": True, "least": 1}):
        check_kinds({**node, **fine}, "callbacks.own")
    for value, need in ({"every": 1.5}, "a whole number or a word"), ({"least": "x"}, "a number or null"):
        with pytest.raises(Refusal, match=f"need {need}"):
            check_kinds({**node, **value}, "callbacks.own")


def test_annotations_that_are_evaluated_say_the_same() -> None:
    """As in a module without `from __future__ import annotations`."""
    kinds: dict[str, Any] = {"models": Sequence[str], "share": float, "most": Optional[int], "path": Path}  # noqa: UP045
    made = dataclasses.make_dataclass("Made", kinds.items())
    sys.modules[__name__].Made = made
    node = {"_target_": f"{__name__}.Made"}
    for fine in ({"models": ["one", "two"]}, {"share": 1}, {"most": None}, {"path": "here"}):
        check_kinds({**node, **fine}, "stages.own")
    for value, need in (
        ({"models": "one"}, "a list"),
        ({"models": [1]}, "a list"),
        ({"share": "x"}, "a number"),
        ({"most": 0.5}, "a whole number or null"),
    ):
        with pytest.raises(Refusal, match=f"need {need}"):
            check_kinds({**node, **value}, "stages.own")


@pytest.mark.parametrize("word", ["run_dir=runs/lr=1e-3", "teacher.path=a (b)/c=[1]", "data.train={x"])
def test_the_quotes_that_an_answer_proposes_are_what_hydra_takes(word: str) -> None:
    with pytest.raises(Refusal) as told:
        arguments([word])
    quoted = str(told.value).rpartition("write '")[2].removesuffix("'")
    parsed = OverridesParser.create().parse_overrides([quoted])[0]
    assert f"{parsed.key_or_group}={parsed.value()}" == word


@pytest.mark.parametrize(
    ("written", "count"),
    [("6B", 6_000_000_000), ("6e9", 6_000_000_000), ("900M", 900_000_000), ("1.5k", 1500), ("12", 12)],
)
def test_counts_are_written_as_people_write_them(written: str, count: int) -> None:
    config = quickstart(f"stages.prune.target_parameters={written}", f"stages.distill.training.max_tokens={written}")
    assert config["stages"]["prune"]["target_parameters"] == count
    assert config["stages"]["distill"]["training"]["max_tokens"] == count
    assert isinstance(config["stages"]["distill"]["training"]["max_tokens"], int)


def test_other_words_stay_words() -> None:
    assert quickstart("name=6B", "run_dir=runs/6B")["name"] == "6B"


def test_the_home_folder_is_meant_by_a_tilde() -> None:
    home = os.path.expanduser("~")
    assert arguments(["run_dir=~/x", "data.train=[~/a,~/b]", "teacher.path=~"])[1:] == [
        f"run_dir={home}/x",
        f"data.train=[{home}/a,{home}/b]",
        f"teacher.path={home}",
    ]


def test_options_of_hydra_keep_their_values() -> None:
    assert arguments(["--cfg", "job"]) == ["--cfg", "job", "+experiment=quickstart"]
    assert arguments(["seed=1", "-c", "job"]) == ["+experiment=quickstart", "seed=1", "-c", "job"]


def test_only_and_stages_select_alike() -> None:
    assert arguments(["stages=[a,b]"])[1:] == arguments(["only=[a,b]"])[1:] == ["only=[a,b]"]
    assert arguments(["only=a"])[1:] == ["only=[a]"]


@pytest.mark.parametrize("group", ["lora", "on_policy", "task", "logger"])
def test_none_of_a_group_is_null(group: str) -> None:
    words = arguments(["+experiment=demo/prune_recover", f"{group}=null"])
    assert words[1] == f"{group}=none"
    assert composed(*words)[group] is None


def test_values_of_choices_reach_the_stages_that_take_them() -> None:
    config = quickstart("divergence=reverse_kl", "divergence.temperature=1.5", "optimizer.lr=0.5", "schedule=wsd")
    for stage in ("distill", "recover", "qat"):
        assert config["stages"][stage]["objective"]["divergence"]["temperature"] == 1.5
        assert config["stages"][stage]["objective"]["divergence"]["_target_"].endswith("ReverseKL")
    assert config["stages"]["distill"]["training"]["optimizer"]["lr"] == 0.5
    assert config["stages"]["control"]["training"]["optimizer"]["lr"] == 0.5
    assert config["stages"]["distill"]["training"]["schedule"]["decay_fraction"] == 0.2
    assert config["stages"]["recover"]["training"]["optimizer"]["lr"] == 2.0e-3  # of its own


def test_a_sweep_gives_each_run_a_folder_of_its_own() -> None:
    folders = [word for word in arguments(["-m", "seed=1,2"]) if word.startswith("run_dir=")]
    assert folders == ["run_dir=runs/sweeps/${name}/${hydra:job.override_dirname}"]
    (named,) = [word for word in arguments(["-m", "seed=1,2", "data.train=a/b"]) if word.startswith("hydra.")]
    assert named == 'hydra.job.config.override_dirname.exclude_keys=["data.train","experiment","run_dir"]'
    assert [word for word in arguments(["-m", "seed=1,2", "run_dir=x"]) if word.startswith("run_dir=")] == ["run_dir=x"]


def test_help_is_the_products_own_page_and_names_every_choice() -> None:
    from pipeline.help import page

    told = page()
    for group, name, _ in choices():
        if group not in ("stage", "training", "callbacks"):
            assert name in told, (group, name)
    assert told.count("python train.py") >= 7
    done = train("--help")
    assert done.returncode == 0
    assert done.stdout.strip() == told.strip()


def test_every_choice_says_what_it_is() -> None:
    assert [f"{group}/{name}" for group, name, told in choices() if not told] == []


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = train("dry_run=true", f"run_dir={tmp_path / 'run'}", "data.max_documents=50", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "checking"  # no terminal shows the spinner
    assert "checking" not in "".join(rest)
    (distill,) = [line for line in rest if line.startswith("│ distill")]  # whole cells in one line, however narrow
    assert f" {tmp_path / 'run' / 'pretrain'} (" in distill
    assert " 600 steps " in distill
    assert "…" not in done.stdout
    assert "nothing was started" in done.stdout
    assert not (tmp_path / "run").exists()


def test_show_data_marks_what_is_learnt_and_writes_nothing(tmp_path: Path) -> None:
    """On the command line, of conversations: their header is read, the answer and its end are learnt."""
    teacher, chats = tmp_path / "teacher", tmp_path / "chats.jsonl"
    tokenizer = train_tokenizer(["Where do cats sleep? On the book."] * 3, 300, teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    asked = [{"role": "user", "content": f"Cats <|turn|>\x1b {n}?"} for n in range(40)]
    said = {"role": "assistant", "content": "On the book."}
    chats.write_text("".join(json.dumps({"messages": [one, said]}) + "\n" for one in asked))
    words = ["+experiment=distill", "data=chat", f"teacher.path={teacher}", f"data.train={chats}", "data.packing=false"]
    words += ["student.shape={num_hidden_layers: 1}", "only=[distill]", f"run_dir={tmp_path / 'run'}"]
    done = train(*words, "show_data=2")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("‹<|turn|>›")]
    shown = re.fullmatch(
        r"‹<\|turn\|>›user:Cats <\|turn\|>\\x1b \d+\?‹<\|turn\|>›assistant:⟦On the book\.‹<\|endoftext\|>›⟧", rows[0]
    )
    assert shown, done.stdout
    assert len(rows) == 2
    assert "the first is '<|turn|>' in conversation 0" in done.stdout
    assert "show_data=2: nothing was started" in done.stdout
    assert not (tmp_path / "run").exists()


def test_jobs_that_share_the_text_out_leave_what_the_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.check import check
    from pipeline.config import selected

    monkeypatch.setattr(parts, "PART_BYTES", 400)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} bottles " * 9}) + "\n" for n in range(40)))
    words = [f"data.train={tmp_path / 'a.jsonl'}", "data=files", "data.workers=1", f"run_dir={tmp_path / 'run'}"]
    words += ["only=[pretrain]", "data.max_length=32"]
    told = []
    for job in ("2/2", "1/2", "1/2"):
        config = quickstart(*words, f"prepare_data={job}")
        told.append(check({"config": config, "stages": selected(config)})["shown"])
    made = [int(re.search(r"train: (\d+) shards made", " ".join(lines))[1]) for lines in told]  # type: ignore[index]
    assert made[0] >= made[1] > 3
    assert made[2] == 0
    monkeypatch.setattr(Shards, "make_one", None)  # nothing is left to make
    config = quickstart(*words)
    stage, context = build(config, "pretrain"), Context(config, "pretrain")
    data, tokenizer, _ = stage.reading(context, tmp_path / "tokenizer")
    rows, statistics, _ = sequences_of(data, "train", tokenizer, context.data_folder)
    assert len(rows) == statistics["sequences"] > 0
    run_folder.check_ours(tmp_path / "run")


def test_a_job_that_made_its_share_does_not_say_that_nothing_was_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.run import _walk

    config = quickstart(f"run_dir={tmp_path / 'run'}", "prepare_data=1/2")
    assert _walk(config, [], None, {"plan": [], "shown": ["train: 3 shards made"]}) is None
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "train: 3 shards made"
    assert " ".join(last[1].split()) == "prepare_data=1/2: no stage was started; the run itself makes what is missing"


def test_what_is_shown_is_what_the_first_stage_that_trains_learns() -> None:
    from pipeline.check import check
    from pipeline.config import selected

    config = quickstart("only=[pretrain]", "show_data=1", "data.max_length=32", "data.max_documents=20")
    lines = check({"config": config, "stages": selected(config)})["shown"]
    assert lines[0].startswith("pretrain: ")
    assert lines[1] == "row 0: 32 tokens, 31 learnt"
    assert lines[2].startswith("‹<|endoftext|>›⟦")
    assert lines[2].endswith("⟧")
    config = quickstart("show_data=1")
    with pytest.raises(
        Refusal, match=r"show_data: distill reads text with the tokenizer of .*pretrain, which is still"
    ):
        build(config, "distill").reading(Context(config, "distill"), Path("unused"))


def test_a_recipe_far_from_its_size_is_warned_of() -> None:
    from pipeline.check import check
    from pipeline.config import selected

    config = {**quickstart("only=[pretrain]"), "sized_for": [1e9, 1e10]}
    (entry,) = check({"config": config, "stages": selected(config)})["plan"]
    assert "for models of 1,000,000,000 to 10,000,000,000 parameters" in entry["warnings"][0]
    config = quickstart("only=[pretrain]")
    (entry,) = check({"config": config, "stages": selected(config)})["plan"]
    assert entry["warnings"] == []


CHANGING = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml")) if "${model.path}" in path.read_text()]


@pytest.mark.parametrize("experiment", CHANGING)
def test_the_model_that_an_experiment_changes_must_be_given_and_is_its_teacher_too(experiment: str) -> None:
    text = "data.test=t" if experiment == "evaluate_only" else "data.train=t"
    words = [f"+experiment={experiment}"] if experiment == "export_only" else [f"+experiment={experiment}", text]
    assert refused(*words) == "model.path is not set; give model.path=…"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("config", [f"+experiment={experiment}", "model.path=some/folder", text]))
    first = config["stages"][config["order"][0]]
    assert "some/folder" in (first.get("model"), *(first.get("models") or []))
    assert config["teacher"]["path"] == "some/folder"


def test_every_recipe_that_changes_a_model_is_among_them() -> None:
    assert len(CHANGING) == 8


def test_finished_models_are_measured_without_one_that_is_changed(tmp_path: Path) -> None:
    config = composed(
        "+experiment=evaluate_only", "stages.evaluate.models=[a/b,c/d]", "data.test=t", f"run_dir={tmp_path}"
    )
    assert config["model"]["path"] is None
    assert config["teacher"]["path"] == "a/b"
    assert config["data"]["train"] == "t"


def test_a_changed_key_of_a_choice_reaches_the_stages_that_change_another_one() -> None:
    """A stage with a learning rate of its own holds a copy of the optimizer; what it has set itself stays."""
    words = arguments(["optimizer.betas=[0.8,0.9]", "optimizer.lr=1e-9", "schedule.minimum=0.5"])
    config = composed(*words)
    trained = {name: stage["training"] for name, stage in config["stages"].items() if "training" in stage}
    assert {*trained} >= {"pretrain", "distill", "control", "recover", "qat"}
    for name, training in trained.items():
        assert training["optimizer"]["betas"] == [0.8, 0.9], name
        assert training["schedule"]["minimum"] == 0.5, name
    assert trained["pretrain"]["optimizer"]["lr"] == 4e-3
    assert trained["distill"]["optimizer"]["lr"] == 1e-9
    mine = composed(*arguments(["optimizer.eps=1e-5", "stages.qat.training.optimizer.eps=1e-6"]))["stages"]
    assert mine["qat"]["training"]["optimizer"]["eps"] == 1e-6
    assert mine["pretrain"]["training"]["optimizer"]["eps"] == 1e-5


def test_a_sweep_over_a_key_is_a_run_for_each_value() -> None:
    words = arguments(["optimizer.eps=1e-5,1e-6", "-m"])
    assert "stages.pretrain.training.optimizer.eps=${optimizer.eps}" in words


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few layers, short texts, and widths that 32 does not divide; its KV heads are 36 wide together."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 4, "max_position_embeddings": 128}
    train_tokenizer(["a few words"], 257, folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **heads, **shape)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "+experiment=prune_recover model.path={} stages.prune.protect_first=1 stages.prune.protect_last=1",
        "+experiment=quantize_only model.path={} scheme=w4a16_g32 scheme.weights.group_size=8",
        "+experiment=sparsify_recover model.path={} stages.sparsify.calibration.length=64",
        "+experiment=export_only model.path={}",
        "+experiment=evaluate_only model.path={} data.test=stdlib",
        "+experiment=distill teacher.path={} student.shape='{{num_hidden_layers: 1}}'",
    ],
)
def test_a_damaged_tokenizer_is_told_before_anything_runs(words: str, narrow: Path, tmp_path: Path) -> None:
    """As are the files beside it: transformers does without a generation config that does not open."""
    folder = Path(shutil.copytree(narrow, tmp_path / "model"))
    data = [] if "evaluate_only" in words else ["data.train=stdlib"]
    typed = [*shlex.split(words.format(folder)), *data, "data.max_length=64", "trainer.accelerator=cpu"]
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:500])
    assert f"tokenizer {folder}: tokenizer.json does not open" in refused(*typed)
    (folder / "tokenizer.json").unlink()
    assert f"tokenizer {folder}: it has no vocabulary; copy tokenizer.json" in refused(*typed)
    (folder / "tokenizer.json").write_bytes(whole)
    (folder / "generation_config.json").write_text('{"eos_token_id": [')
    assert f"path={folder}: generation_config.json is no JSON" in refused(*typed)


def test_a_value_that_others_take_theirs_from_can_be_given_beside_them() -> None:
    """teacher.path is ${model.path} there, and data.train is ${data.test}."""
    config = composed(*arguments(["+experiment=quantize_only", "model.path=a", "teacher.path=b", "data.train=t"]))
    assert (config["model"]["path"], config["teacher"]["path"]) == ("a", "b")
    config = composed(*arguments(["+experiment=evaluate_only", "model.path=a", "data.test=t", "data.train=s"]))
    assert (config["data"]["train"], config["data"]["test"]) == ("s", "t")


def test_all_that_a_run_refuses_is_told_at_once_with_what_to_type(narrow: Path) -> None:
    words = ["+experiment=quantize_export", f"model.path={narrow}", "data.train=stdlib", "scheme=w4a16_g32"]
    length, scheme, gguf, gptq = refused(*words, "format=[gguf,gptq]").splitlines()
    assert length.endswith("use stages.quantize.calibration.length=128")
    assert "need 8 or 4 or scheme.weights.granularity=channel with scheme.weights.group_size=null" in scheme
    assert scheme.endswith("prune the width with +experiment=prune_recover stages.prune.multiple_of=32")
    assert "use formats.gguf.type=f32" in gguf
    assert gptq.endswith("leave such matrices as they are with stages.quantize.skip=[k_proj,v_proj]")
    # What is proposed is taken.
    words += ["stages.quantize.calibration.length=128", "scheme.weights.group_size=8", "format=[gguf,gptq]"]
    words += ["formats.gguf.type=f32", "stages.quantize.skip=[k_proj,v_proj]"]
    assert unrefused(*words)

    words = ["+experiment=prune_recover", f"model.path={narrow}", "data.train=stdlib"]
    layers, length = refused(*words).splitlines()
    assert layers.endswith("use e.g. stages.prune.protect_first=1 stages.prune.protect_last=1")
    assert length.endswith("use data.max_length=128")


def test_an_export_of_a_plain_model_is_referred_to_an_experiment_that_quantizes_it(narrow: Path) -> None:
    words = ["+experiment=export_only", f"model.path={narrow}"]
    gptq, awq = refused(*words, "format=[gptq,awq]").splitlines()
    assert "quantize them with +experiment=quantize_export scheme=w4a16_g128, or use format=[huggingface]" in gptq
    assert awq == gptq.replace("gptq", "awq")
    told = refused(*words, "format=gguf", "formats.gguf.type=q4_k_m")
    assert told.endswith(
        "use formats.gguf.type=f16, or prune the widths with +experiment=prune_recover stages.prune.multiple_of=256"
    )


def test_ranks_that_no_stage_has_are_refused_or_warned_of(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["+experiment=export_only", f"model.path={narrow}"]
    told = "without effect, as each stage here (export) runs on one rank"
    assert refused(*words, "trainer.devices=2") == f"trainer.devices=2: {told}; leave it out"
    assert refused(*words, "strategy=zero3") == f"strategy=zero3: {told}; leave it out"
    # As slurm/train.sbatch adds it to every run.
    monkeypatch.setattr("pipeline.launch.Slurm.check", lambda self: None)
    (export,) = unrefused(*words, "trainer.devices=2", "launch=slurm")
    assert export["warnings"] == [f"trainer.devices=2: {told}"]
    # Of a part of a run, whose other stages take it.
    words = ["+experiment=prune_recover", f"model.path={narrow}", "data.train=stdlib", "data.test=stdlib"]
    (evaluate,) = unrefused(*words, "only=[evaluate]", "strategy=ddp")
    assert evaluate["warnings"] == ["strategy=ddp: without effect, as each stage here (evaluate) runs on one rank"]
    (pretrain,) = unrefused("only=[pretrain]", "strategy=zero1")
    assert pretrain["warnings"] == []
