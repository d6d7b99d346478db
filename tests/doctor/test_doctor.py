"""doctor=true: nothing is found in what is sound, and every defect that is planted is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from callbacks import checkpoint as saving
from callbacks import wandb_run
from callbacks.tracking import wandb as wandb_tracker
from models.errors import Refusal
from models.objectives import chunked, signal
from models.objectives.block import Block
from models.objectives.forward_kl import ForwardKL
from models.teachers.online import Resident
from models.training import language_model
from models.training.language_model import LanguageModel
from pipeline.building import build
from pipeline.context import Context
from pipeline.data.loader import _Collated
from pipeline.data.rows import Rows
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.doctor import loss, machine, states, text, truth, walk
from pipeline.doctor.examined import TEXT_FINDINGS, Examined
from pipeline.doctor.findings import Finding, worst
from pipeline.doctor.probe import FINDINGS
from pipeline.doctor.probed import Probed
from pipeline.training import settings
from tests import staged
from tests.command import ROOT, train
from tests.test_docs import TOPICS, save_little

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]
WORDS = ["+experiment=distill", "student=layers", "student.keep=1", "trainer.accelerator=cpu", "data.max_length=128",
         "stages.distill.training.global_batch=16", "stages.distill.training.micro_batch=8", "only=[distill]",
         "divergence.temperature=2.0", "objective.alpha=0.5", "optimizer.lr=1e-2",
         "schedule.warmup_steps=0"]  # fmt: skip


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    tokenizer = train_tokenizer(TOPICS, 400, folder / "tokenizer")
    tokenizer.chat_template = (ROOT / "examples" / "chat.jinja").read_text()
    save_little(folder / "model", tokenizer, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.lm_head.weight *= 20  # or all that it says is uniform, and every divergence nothing
    model.save_pretrained(folder / "model")
    model.resize_token_embeddings(448, mean_resizing=False)
    model.save_pretrained(folder / "padded")
    tokenizer.save_pretrained(folder / "padded")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in TOPICS[:80]))
    return folder


def words_of(things: Path, *words: str, model: str = "model") -> list[str]:
    return [*WORDS, f"teacher.path={things / model}", f"data.train={things / 'text.jsonl'}", *words]


def examined(things: Path, run_dir: Path, *words: str, model: str = "model") -> dict[str, Finding]:
    """What is found in the stage distill, in this process; by the name of the check."""
    config = staged.composed(run_dir, *words_of(things, *words, model=model))
    context = Context(walk._config_of(config, run_dir / "scratch", {"train": {"bytes": 4000}}), "distill")
    stage: Any = Examined(build(context.config, "distill"), context)
    stage.prepare(context)
    stage.run(context)
    found = [json.loads((context.work / name).read_text())["found"] for name in (TEXT_FINDINGS, FINDINGS)]
    return {each["check"]: Finding(**each) for each in itertools.chain(*found)}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, each in found.items() if each.verdict == "failed"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["divergence=jensen_shannon", "divergence.temperature=3.0", "trainer.precision=bf16-mixed"],
        ["divergence=skew_reverse_kl", "lora=lora"],
        ["divergence=adaptive_kl", "stages.distill.training.micro_batch=1"],
    ],
    ids=["plain", "bf16", "lora", "unknown to the doctor"],
)
def test_of_a_sound_training_nothing_is_found(things: Path, tmp_path: Path, words: list[str]) -> None:
    found = examined(things, tmp_path, *words)
    assert failed(found) == set(), found
    run = {name for name, each in found.items() if each.verdict == "ok"}
    assert run >= {"shift", "document isolation", "loss division", "student = teacher", "weights move", "checkpoint",
                   "tokenizer", "template", "space", "saved model"}  # fmt: skip
    assert ("; not of adaptive_kl" in found["gradient"].measured) == ("divergence=adaptive_kl" in words)
    assert ("logits in chunks" in run) == (words[-1:] != ["stages.distill.training.micro_batch=1"])


def test_padded_vocabularies_are_sound(things: Path, tmp_path: Path) -> None:
    assert failed(examined(things, tmp_path, model="padded")) == set()


# --- planted in what training computes -----------------------------------------------------------------------------


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """The mean over a micro-batch's own targets, then over micro-batches (trl#4719)."""
    collated = _Collated.__getitem__

    def local(self: Any, micro: Any) -> dict[str, Any]:
        batch = collated(self, micro)
        share = len(micro.sequences) / 16
        return batch | {"step_tokens": int((batch["targets"] >= 0).sum()) / share}

    patch.setattr(_Collated, "__getitem__", local)


def divided_twice(patch: pytest.MonkeyPatch) -> None:
    """As torchtune's recipe."""
    collated = _Collated.__getitem__

    def again(self: Any, micro: Any) -> dict[str, Any]:
        batch = collated(self, micro)
        return batch | {"step_tokens": batch["step_tokens"] * 2}

    patch.setattr(_Collated, "__getitem__", again)


def gradient_not_scaled(patch: pytest.MonkeyPatch) -> None:
    """What is reported is right, what is learnt from is divided by the accumulation."""
    step = LanguageModel.training_step
    patch.setattr(
        LanguageModel, "training_step", lambda self, *words: step(self, *words) / self.trainer.accumulate_grad_batches
    )


def cross_entropy_for_kl(patch: pytest.MonkeyPatch) -> None:
    """−Σ p log q: 6.3 where it should be 0, with the gradient of a KL (torchtune, DistiLLM)."""
    add = ForwardKL.add

    def without_entropy(self: Any, block: Block) -> Any:
        p_NV = torch.log_softmax(block.teacher_NV / self.temperature, -1)  # type: ignore[operator]
        return add(self, block) - self.temperature**2 * (p_NV.exp() * p_NV).sum(-1)

    patch.setattr(ForwardKL, "add", without_entropy)


def temperature_lost(patch: pytest.MonkeyPatch) -> None:
    """No T² (trl#5731, Liger)."""
    add = ForwardKL.add

    def plain(self: Any, block: Block) -> Any:
        square = self.temperature**2
        return add(self, dataclasses.replace(block, weight=block.weight / square)) / square

    patch.setattr(ForwardKL, "add", plain)


def temperature_lost_in_the_gradient(patch: pytest.MonkeyPatch) -> None:
    add = ForwardKL.add

    def weaker(self: Any, block: Block) -> Any:
        return add(self, dataclasses.replace(block, weight=block.weight / self.temperature))

    patch.setattr(ForwardKL, "add", weaker)


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    """Columns that stand for no token are in the softmax (trl#2215)."""
    patch.setattr(language_model, "objective_sum", lambda *w, vocabulary, **k: chunked.objective_sum(*w, **k))


def by_order_of_calls(patch: pytest.MonkeyPatch) -> None:
    """A teacher's signal that belongs to a step and not to its text (easydistill#21)."""
    look, calls = Resident.look, itertools.count()

    def other(self: Any, batch: Any, wanted: Any) -> Any:
        looked = look(self, batch, wanted)
        looked.hidden = looked.hidden * (1 + 0.1 * next(calls))
        return looked

    patch.setattr(Resident, "look", other)


def unshifted(patch: pytest.MonkeyPatch) -> None:
    """Targets that are the tokens themselves (DistillKit)."""
    init = loss.PackedSequences.__init__

    def planted(self: Any, rows: Any, *words: Any, **named: Any) -> None:
        shifted = Rows({**row, "targets": [-100, *row["targets"][:-1]]} for row in rows)
        init(self, shifted, *words, **named)

    patch.setattr(loss.PackedSequences, "__init__", planted)


def all_logits_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chunked, "_chunk_tokens", lambda work, kind, N, V, narrow: N)


def documents_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """One mask for the whole row. What refuses such a family before the first step is taken out of the way."""
    from models import heads

    def numbered_on(model: Any, ids: Any, positions: Any, past: Any = None) -> Any:
        return heads.body_of(model)(input_ids=ids, use_cache=False).last_hidden_state

    for module in (language_model, states):
        patch.setattr(module, "hidden_states", numbered_on)


def nothing_is_learnt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: closure() if closure else None)


def a_byte_is_turned(patch: pytest.MonkeyPatch) -> None:
    """By the disk, after it was written."""
    finish = saving.finish

    def damaged(mine: Any, aside: Path, final: Path, given_up: Any) -> None:
        finish(mine, aside, final, given_up)
        path = final / "rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    patch.setattr(saving, "finish", damaged)


def an_older_tensor_is_saved(patch: pytest.MonkeyPatch) -> None:
    """Whole by its hash, and not what is in memory."""
    share = saving.share

    def stale(trainer: Any, module: Any, *, copied: bool) -> Any:
        made = share(trainer, module, copied=copied)
        name = next(iter(made.tensors))
        return dataclasses.replace(made, tensors={**made.tensors, name: torch.zeros_like(made.tensors[name])})

    patch.setattr(saving, "share", stale)


def the_disk_is_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=-(10**9))))


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str, list[str]]] = [
    (mean_of_means, "loss division", []),
    (divided_twice, "loss division", []),
    (gradient_not_scaled, "loss division", []),
    (cross_entropy_for_kl, "student = teacher", []),
    (temperature_lost, "loss division", []),
    (temperature_lost_in_the_gradient, "gradient", []),
    (padding_counts, "loss division", ["padded"]),
    (by_order_of_calls, "loss division", []),
    (unshifted, "shift", []),
    (all_logits_at_once, "logits in chunks", []),
    (documents_see_each_other, "document isolation", []),
    (nothing_is_learnt, "weights move", []),
    (a_byte_is_turned, "checkpoint", []),
    (an_older_tensor_is_saved, "checkpoint", []),
    (the_disk_is_full, "space", []),
]


@pytest.mark.parametrize(("plant", "name", "models"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
def test_a_planted_defect_is_found(
    things: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    name: str,
    models: list[str],
) -> None:
    plant(monkeypatch)
    found = examined(things, tmp_path, model=models[0] if models else "model")
    assert name in failed(found), found
    assert found[name].remedy
    assert failed(found) <= {name, "loss division", "gradient"}  # and it is not looked for where it is not


def test_a_top_k_that_drops_the_rest_is_no_divergence(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept tokens' own terms alone: not zero at equality (DistiLLM's, verl's). Of a teacher that is on disk."""

    def dropped(term: Any, block: Block, ids_NK: Any, teacher_NK: Any, tail_N: Any) -> Any:
        p_NK = torch.softmax(teacher_NK, -1)
        q_NK = torch.log_softmax(block.student_NV, -1).gather(1, ids_NK)
        return (p_NK * (p_NK.log() - q_NK)).sum(-1)

    monkeypatch.setattr(Probed, "teacher", None)
    assert failed(examined(things, tmp_path / "sound")) == set()
    monkeypatch.setattr(signal, "add_in_buckets", dropped)
    found = examined(things, tmp_path / "planted")
    assert failed(found) == {"student = teacher"}
    assert "of top-k logits" in found["student = teacher"].measured


@pytest.mark.parametrize("name", sorted(truth._DIVERGENCES))
def test_a_definition_is_that_of_the_divergence_of_its_name(name: str) -> None:
    """Each side was written without the other."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    term = instantiate(OmegaConf.load(ROOT / "conf" / "divergence" / f"{name}.yaml"), temperature=1.7)
    student, teacher = torch.randn(2, 9, 31, dtype=torch.float64).unbind(0)
    targets = torch.zeros(9, dtype=torch.long)
    block = Block(student.clone(), targets, 0.0, torch.zeros_like(student), teacher.clone())
    found = truth.value(term, student, teacher, targets)
    assert found is not None
    torch.testing.assert_close(found, term.add(block), rtol=1e-9, atol=1e-12)


# --- of the text -----------------------------------------------------------------------------------------------------


def test_a_student_with_other_tokens_is_found(things: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(things / "model"))
    other = train_tokenizer(TOPICS, 380, tmp_path / "other")
    assert text.tokens_are_the_same(tokenizer, tokenizer, spans=False).verdict == "ok"
    assert text.tokens_are_the_same(other, tokenizer, spans=False).verdict == "failed"
    assert text.tokens_are_the_same(other, tokenizer, spans=True).verdict == "ok"


def test_a_teacher_that_is_fed_the_students_tokens_is_found(things: Path, tmp_path: Path) -> None:
    """trl#4562."""
    tokenizer = load_tokenizer(str(things / "model"))
    other = train_tokenizer(TOPICS, 380, tmp_path / "other")
    mine, theirs = (t(TOPICS[0], add_special_tokens=False)["input_ids"] for t in (tokenizer, other))
    right, wrong = {"input_ids": mine, "teacher_input_ids": theirs}, {"input_ids": mine, "teacher_input_ids": mine}
    assert text.both_read_the_same_text([right], tokenizer, other).verdict == "ok"
    assert text.both_read_the_same_text([right, wrong], tokenizer, other).verdict == "failed"


def test_another_template_and_another_beginning_are_found(things: Path) -> None:
    """axolotl#2978, trl#6437."""
    tokenizer, other = (load_tokenizer(str(things / "model")) for _ in range(2))
    data = SimpleNamespace(chat_template=None, node="data")

    def found(chat: bool) -> str:
        return text.templates_are_the_same(data, chat, tokenizer, other, text.rendered).verdict  # type: ignore[arg-type]

    assert found(chat=True) == "ok"
    other.chat_template = tokenizer.chat_template.replace("assistant", "helper")
    assert tokenizer.chat_template != other.chat_template
    assert (found(chat=True), found(chat=False)) == ("failed", "ok")
    other.chat_template = tokenizer.chat_template
    end = tokenizer.convert_ids_to_tokens(0)
    other.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    assert found(chat=False) == "failed"


# --- of the machine --------------------------------------------------------------------------------------------------


def test_a_sum_over_ranks_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, device = SimpleNamespace(world_size=2, global_rank=0), torch.device("cpu")
    monkeypatch.setattr(machine, "_ELEMENTS", 1000)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.add_(2))
    assert machine.collective(trainer, device, 10**9).verdict == "ok"

    def one_is_lost(sent: torch.Tensor) -> None:
        sent.add_(2)[7] = 1

    monkeypatch.setattr(torch.distributed, "all_reduce", one_is_lost)
    found = machine.collective(trainer, device, 10**9)
    assert (found.verdict, found.measured) == ("failed", "5 sums over ranks are wrong")


def test_ranks_that_have_gone_apart_are_found() -> None:
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    other = {**weights, "b": torch.tensor([0.0, -0.0])}  # equal as numbers, and not the same bits
    digests = machine.digest(weights), machine.digest(other)
    assert machine.ranks_hold_the_same([digests[0], digests[0]], 2).verdict == "ok"
    found = machine.ranks_hold_the_same([*digests], 2)
    assert found.verdict == "failed"
    assert found.measured == "1 of 2 weights differ between ranks after 2 steps, b for one"


def test_a_finding_of_any_rank_is_that_of_all() -> None:
    fine, bad = Finding("space", "ok", "10 GB"), Finding("space", "failed", "1 GB", "more")
    assert worst([fine, fine]) == fine
    assert worst([fine, bad, fine]) == Finding("space", "failed", "rank 1: 1 GB", "more")


@pytest.mark.parametrize(
    ("mode", "answer", "verdict"),
    [
        ("auto", True, "ok"),
        ("auto", OSError("no route to host"), "warning"),
        ("offline", None, "ok"),
        ("auto", False, "warning"),  # no account
        ("online", False, "warning"),
    ],
)
def test_a_tracker_that_does_not_answer_is_found(
    monkeypatch: pytest.MonkeyPatch, mode: str, answer: Any, verdict: str
) -> None:
    import wandb

    def login(**words: Any) -> bool:
        if isinstance(answer, Exception) and words["verify"]:
            raise answer
        return bool(answer)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "setup", lambda **_: None)
    found = machine.tracker_answers(wandb_tracker(project="retort", mode=mode))
    assert found.verdict == verdict, found
    assert wandb_run.opened() is None


# --- the command -----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow  # the check, and a process of its own: half a minute
def test_the_command_says_so_in_a_table_and_leaves_the_run_as_it_was(things: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "retort.json").write_text("{}")
    for name in ("doctor", "notes"):  # somebody's own
        (run_dir / name).mkdir()
        (run_dir / name / "mine.txt").write_text("mine")
    before = files_of(run_dir)
    done = train(f"run_dir={run_dir}", *words_of(things), "doctor=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss division" in done.stdout
    after = files_of(run_dir)
    found = json.loads(after.pop("doctor.json"))["found"]
    number = sum(each["verdict"] == "skipped" for each in found)
    told = f"doctor: nothing was found; {number} of {len(found)} checks were skipped"
    assert done.stdout.splitlines()[-1] == told
    assert {each["verdict"] for each in found} == {"ok", "skipped"}
    assert {each["stage"] for each in found} == {"distill"}
    after.pop(".lock")
    assert after == before


@pytest.mark.parametrize("verdict", ["failed", "warning"])
def test_a_check_that_failed_ends_the_command_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Any
) -> None:
    found = [Finding("space", "ok", "10 GB"), Finding("shift", verdict, "3 of 4 [bold]", "mend it")]
    monkeypatch.setattr(walk, "_examined", lambda *_: found)
    stages: dict[str, Any] = {"distill": {"training": {}}, "evaluate": {}}
    config = {"run_dir": str(tmp_path / "run"), "stages": stages, "launch": {"_target_": "pipeline.launch.Local"}}
    console = Console(record=True, width=120)
    plan: dict[str, Any] = {"distill": {}, "evaluate": {}}
    if verdict == "failed":
        with pytest.raises(Refusal, match=r"doctor: 1 of 2 checks failed: distill: shift; see the table"):
            walk.examine(config, plan, console)
    else:
        walk.examine(config, plan, console)
    assert "3 of 4 [bold]" in console.export_text()
    assert not (tmp_path / "run" / walk.FOLDER).exists()
    with pytest.raises(Refusal, match="doctor=true: none of evaluate trains"):
        walk.examine(config, {"evaluate": {}}, console)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(Refusal, match=r"this is no Slurm allocation.*salloc"):
        walk.examine({**config, "launch": {"_target_": "pipeline.launch.Slurm"}}, plan, console)


def test_a_stage_whose_teacher_is_still_to_be_made_is_told_of(tmp_path: Path) -> None:
    config = {"run_dir": str(tmp_path), "stages": {"pretrain": {}, "distill": {}}}
    entry = {"stage": "distill", "parents": {"teacher": str(tmp_path / "pretrain")}}
    (found,) = walk._examined(config, entry, tmp_path / walk.FOLDER, 0)
    assert found.verdict == "skipped"
    assert "the stage pretrain is still to make" in found.measured


def told_of(found: dict[str, list[Finding]], run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The last line of the doctor, or its refusal, where its stages have these findings."""
    monkeypatch.setattr(walk, "_examined", lambda config, entry, *_: found[entry["stage"]])
    stages: dict[str, Any] = {name: {"training": {}} for name in found}
    config = {"run_dir": str(run_dir), "stages": stages, "launch": {"_target_": "pipeline.launch.Local"}}
    console = Console(record=True, width=120)
    try:
        walk.examine(config, {name: {"stage": name} for name in found}, console)
    except Refusal as problem:
        return str(problem)
    return console.export_text().splitlines()[-1].strip()


def test_what_was_not_checked_is_said_and_nothing_checked_is_no_clean_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, fine = (
        Finding("all", "skipped", "it reads what the stage pretrain is still to make"),
        Finding("a", "ok", "1"),
    )
    one = Finding("collective", "skipped", "one rank")
    said = told_of({"distill": [waits], "recover": [waits]}, tmp_path / "none", monkeypatch)
    assert said.startswith("doctor: nothing was checked: it reads what the stage pretrain is still to make; ")
    assert "run the stages before distill, recover first" in said
    assert "\n" not in said
    said = told_of({"pretrain": [fine, fine, one], "distill": [waits]}, tmp_path / "some", monkeypatch)
    assert said == "doctor: nothing was found; 1 of 3 checks were skipped; nothing of distill was checked"
    assert told_of({"pretrain": [fine]}, tmp_path / "all", monkeypatch) == "doctor: nothing was found"
    warning = Finding("logger", "warning", "no answer", "run wandb login")
    said = told_of({"pretrain": [fine, warning]}, tmp_path / "warned", monkeypatch)
    assert said == "doctor: 1 of 2 checks warn; see the table"


def test_space_is_needed_for_the_whole_prepared_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the doctor prepares some only. 4 GB of text: a thousand million tokens or so."""
    monkeypatch.setattr(machine, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10**9)))
    corpus = {"train": {"bytes": 3 * 10**9}, "validation": {"bytes": 10**9}, "test": None}
    scratch = tmp_path / walk.FOLDER / "work" / "distill"
    assert machine.space(tmp_path, scratch, 2, {}, 512).verdict == "ok"
    found = machine.space(tmp_path, scratch, 2, corpus, 512)
    assert found.verdict == "failed"
    assert f"{settings.prepared_bytes(corpus, 512) / 1e9:.3g} GB of prepared text" in found.measured
    assert settings.prepared_bytes(corpus, 512) == 3 * 10**9


def test_all_logits_at_once_are_sound_where_the_memory_was_given(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examined(things, tmp_path / "given", "trainer.objective_memory_mb=4096")["logits in chunks"]
    assert found.verdict == "ok", found
    assert "trainer.objective_memory_mb=4096" in found.measured
    all_logits_at_once(monkeypatch)
    found = examined(things, tmp_path / "planted", "trainer.objective_memory_mb=1")["logits in chunks"]
    assert found.verdict == "failed", found


UNSYNCED = """
import sys
if "pipeline.worker" in sys.orig_argv and "run" in sys.orig_argv:
    import torch.nn.parallel as parallel
    made = parallel.DistributedDataParallel.__init__
    def without(self, *words, **named):
        made(self, *words, **named)
        self.require_backward_grad_sync = False
    parallel.DistributedDataParallel.__init__ = without
    parallel.DistributedDataParallel.require_backward_grad_sync = property(lambda self: False, lambda self, value: None)
"""


@pytest.mark.slow  # two runs of two ranks
def test_of_two_ranks_gradients_that_are_not_summed_are_found(things: Path, tmp_path: Path) -> None:
    """trl#5282: the loss goes past the wrapped forward."""
    words = [*words_of(things), "doctor=true", "trainer.devices=2", "strategy=ddp"]
    sound = train(f"run_dir={tmp_path / 'sound'}", *words)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(UNSYNCED)
    found = train(f"run_dir={tmp_path / 'apart'}", *words, path=str(tmp_path / "planted"))
    assert found.returncode == 2, found.stdout + found.stderr
    assert "distill: gradients across ranks" in found.stderr


@pytest.mark.slow  # two ranks under DeepSpeed
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_of_two_ranks_under_deepspeed_nothing_is_found(things: Path, tmp_path: Path, strategy: str) -> None:
    words = [*words_of(things), "doctor=true", "trainer.devices=2", f"strategy={strategy}"]
    done = train(f"run_dir={tmp_path / 'run'}", *words, "trainer.precision=bf16-mixed")
    assert done.returncode == 0, done.stdout + done.stderr
