"""Tiny real trainings for tests: in this process, or on two ranks through torchrun (`python -m tests.fitting`)."""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from callbacks.checkpoint import Checkpoint
from models.errors import NotFinite, Refusal
from models.generation import Sampling
from models.load import load_config
from models.objectives.attention_relations import AttentionRelations
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.hidden_states import HiddenStates
from models.objectives.reverse_kl import ReverseKL
from models.save import save_model
from models.sharding import gathered_weights, load_sharded, zero3
from models.teachers.online import Online
from models.teachers.sharded import Sharded
from models.teachers.teacher import Opening
from models.training.costs import Arithmetic, Forward
from models.training.language_model import LanguageModel
from models.training.on_policy import OnPolicy
from models.training.rollouts import Rollouts
from models.training.saved import checkpoints
from models.training.schedules import cosine
from pipeline.data.batch import collate
from pipeline.data.loader import PackedSequences, accumulation
from pipeline.data.rows import Rows
from pipeline.training import strategy as strategies

VOCABULARY, LENGTH = 61, 24


@dataclass(frozen=True)
class Scenario:
    name: str
    strategy: str = "single"
    world: int = 1
    micro_batch: int = 8
    global_batch: int = 8
    steps: int = 20
    taught: bool = True
    precision: str = "32-true"
    tied: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False
    side: str = "right"
    clip: float = 0.1  # of gradients of some 0.2
    checkpoint_at: int | None = None  # save a checkpoint there, into `folder`
    resume: bool = False
    resume_from: str = ""  # the scenario that left the checkpoint, where it is another one
    student: str | None = None  # another folder than the shared one
    teacher: str = "teacher"
    sharded: bool = False  # the teacher by an engine of its own
    offload: str = "none"
    sub_group: int | None = None  # elements that the optimizer steps at a time
    nvme: bool = False  # the optimizer's states in files, and the weights of a teacher with an engine of its own
    persistence: int | None = (
        0  # under ZeRO-3, parameters of fewer elements stay whole on every rank; None: its default
    )
    copies: int = 1  # under ZeRO-3, ranks that hold the weights between them a second time (ZeRO++)
    communicated: str | None = None  # dtype in which gradients are summed over the ranks
    layers: bool = False  # hidden states and attention compared as well
    lora_head: bool = False  # the student's head frozen under a low-rank adapter
    answers: bool = False  # rows of a prompt and a supervised answer, in place of packed ones
    scrambled: bool = False  # with other answers to the same prompts
    replaced: int | None = None  # an example that holds something else
    on_policy: dict[str, Any] | None = None  # of answers: OnPolicy's values, its sampling among them
    skipped: dict[int, int] | None = None  # of answers: an example's number, and from which step on it is left out
    divergence: str = "ForwardKL"
    poisoned: bool = False  # the student's embedding of a token is no number
    spare: bool = False  # a layer that the loss does not reach is trained as well
    torn: bool = False  # a gradient is no number, although the loss is one
    summed: bool = False  # nothing is learnt: what gradients of unlike size add up to
    in_parts: bool = False  # the student is saved while its weights are gathered, in files of a few kB
    damaged: bool = False  # nothing is trained: what every rank says of the models in DAMAGES, under ZeRO-3


def model(hidden: int, layers: int, seed: int, tied: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attention_dropout=dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def rows(count: int = 40, seed: int = 0) -> Rows:
    """Rows of uneven length with several documents each, and uneven numbers of supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, LENGTH + 1, (), generator=generator))
        cut = int(torch.randint(2, length - 2, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        positions = [*range(cut), *range(length - cut)]
        targets = [*ids[1:], -100]
        targets[cut - 1] = -100
        for at in torch.randint(0, length, (3,), generator=generator).tolist():
            targets[at] = -100
        made.append(
            {
                "input_ids": ids,
                "position_ids": positions,
                "targets": targets,
                "supervised": sum(t >= 0 for t in targets),
                "bytes": 0,
            }
        )
    return Rows(made)


def answer_rows(count: int = 40, seed: int = 0, scrambled: bool = False) -> Rows:
    """Rows of a prompt, some of them equal, and an answer that ends with token 0."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.Generator().manual_seed(seed + 1000)
    made = []
    for _ in range(count):
        prompt_length, *lengths = torch.randint(1, LENGTH // 2, (3,), generator=generator).tolist()
        prompt = torch.randint(1, VOCABULARY, (prompt_length,), generator=generator).tolist()
        if prompt_length == 1:
            prompt = [7]
        answers = [
            [*torch.randint(1, VOCABULARY, (length,), generator=source).tolist(), 0]
            for length, source in zip(lengths, (generator, others), strict=True)
        ]
        answer = answers[scrambled]
        made.append(
            {
                "input_ids": prompt + answer,
                "position_ids": list(range(len(prompt) + len(answer))),
                "targets": [-100] * (len(prompt) - 1) + answer + [-100],
                "supervised": len(answer),
                "bytes": 0,
            }
        )
    return Rows(made)


def rollouts(values: dict[str, Any], data: PackedSequences, load_student: Any) -> Rollouts:
    """As the pipeline makes them."""
    return Rollouts(
        OnPolicy(**{**values, "sampling": Sampling(**values["sampling"])}),
        examples=data.train,
        step_examples=data.order().step_sequences,
        collate=functools.partial(collate, pad_token=0, side=data.side),
        load_student=load_student,
        seed=data.seed,
        pad_token=0,
        end_tokens=[0],
        tokenizer=range(VOCABULARY),  # its length is all that is looked at
        skipped=data.skipped,
    )


def collectives(module: LanguageModel, step: int) -> int:
    """How often a rank speaks with the others while the student's text of a step is written."""
    assert module.on_policy is not None
    with torch.profiler.profile() as profile:
        module.on_policy.begin(
            module.student, step, device=module.device, rank=module.global_rank, world=module.trainer.world_size
        )
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


def adapted_head(student: Any) -> Any:
    """PEFT's LoRA on the head alone, which is frozen under it; the body trains."""
    from peft.tuners.lora import Linear

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4)
    student.lm_head.requires_grad_(False)
    student.lm_head = Linear(student.lm_head, "default", config, r=2, lora_alpha=4)
    torch.nn.init.normal_(student.lm_head.lora_B["default"].weight, std=0.1)
    return student


def saved(folder: Path, name: str, made: LlamaForCausalLM) -> str:
    made.save_pretrained(folder / name)
    return str(folder / name)


def fit(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Train as the pipeline does; losses per step, gradient norms and final weights."""
    from models.load import load_model

    student = folder / (scenario.student or f"student-{scenario.tied}-{scenario.dropout}")
    teacher = folder / scenario.teacher
    seen: list[dict[str, float]] = []
    saver = Checkpoint(folder / "saved" / scenario.name, None, None)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if module.step_metrics is not None:
                seen.append(module.step_metrics)
            at = scenario.checkpoint_at
            if at and trainer.global_step == at and module.step_metrics and not scenario.resume:
                saver.save(trainer, module, asynchronous=True)
                saver.wait()

    also = {"hidden": HiddenStates(), "attention": AttentionRelations(relation_heads=2)} if scenario.layers else {}
    divergence = ReverseKL() if scenario.divergence == "ReverseKL" else ForwardKL(2.0)
    objective = Distillation(0.3, divergence, also) if scenario.taught else CrossEntropy()
    disk = str(folder / "disk") if scenario.nvme else None
    source = (
        Sharded(str(teacher), offload=scenario.offload, nvme_path=disk) if scenario.sharded else Online(str(teacher))
    )

    def load_student() -> Any:
        loaded = load_model(str(student), dtype=torch.float32)
        if scenario.poisoned:
            loaded.model.embed_tokens.weight.data[17] = float("nan")  # a token that some rows have
        if scenario.spare:
            loaded.model.spare = torch.nn.Linear(8, 8)
        if scenario.torn:
            loaded.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
        return adapted_head(loaded) if scenario.lora_head else loaded

    skipped = {int(number): step for number, step in (scenario.skipped or {}).items()}  # JSON has them as text
    answered = answer_rows(scrambled=scenario.scrambled)
    if scenario.replaced is not None:
        answered = Rows([answer_rows(seed=9)[0] if at == scenario.replaced else row for at, row in enumerate(answered)])
    plain = scenario.answers or scenario.on_policy is not None
    data = PackedSequences(
        answered if plain else rows(),
        rows(9, seed=1),
        seed=0,
        global_batch=scenario.global_batch,
        micro_batch=scenario.micro_batch,
        pad_token=0,
        length=None if plain else LENGTH,
        side=scenario.side,
        skipped=skipped,
    )
    module = LanguageModel(
        load_student=load_student,
        load_teacher=(lambda: source.open(Opening(VOCABULARY))) if scenario.taught else None,
        objective=objective,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95)),
        schedule=cosine(warmup_steps=3),
        weight_decay=0.1,
        max_steps=scenario.steps,
        vocabulary=VOCABULARY,
        packed=not plain,
        seed=0,
        log_every_steps=1,
        activation_checkpointing=scenario.activation_checkpointing,
        configs=(load_config(str(student)), load_config(str(teacher))),
        arithmetic=Arithmetic(
            Forward.of(load_config(str(student))),  # type: ignore[arg-type]
            False,
            Forward.of(load_config(str(teacher))) if scenario.taught else None,
        ),
        on_policy=rollouts(scenario.on_policy, data, load_student) if scenario.on_policy else None,
        checkpoint=checkpoints(folder / "saved" / (scenario.resume_from or scenario.name))[0]
        if scenario.resume
        else None,
    )
    kind = scenario.strategy
    settings: dict[str, Any] = {}
    if scenario.persistence is not None:
        settings["stage3_param_persistence_threshold"] = scenario.persistence
    if scenario.copies > 1:
        settings["zero_hpz_partition_size"] = scenario.copies
    if scenario.sub_group is not None:
        settings["sub_group_size"] = scenario.sub_group
    zero = functools.partial(strategies.ZeRO, communication_dtype=scenario.communicated, config=settings)
    make = {
        "single": strategies.Single,
        "ddp": strategies.DDP,
        "zero3_offload": functools.partial(zero, 3, True, True, disk),
    }.get(kind, functools.partial(zero, int(kind[4]) if kind.startswith("zero") else 0))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=scenario.world,
        strategy=make().lightning("cpu"),
        max_steps=scenario.steps,
        max_epochs=-1,
        precision=scenario.precision,
        gradient_clip_val=scenario.clip,
        accumulate_grad_batches=accumulation(scenario.global_batch, scenario.micro_batch, scenario.world),
        val_check_interval=scenario.steps * accumulation(scenario.global_batch, scenario.micro_batch, scenario.world),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[Watch()],
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    whole = {n for n, p in module.student.named_parameters() if getattr(p, "ds_persist", False)}
    state = dict(gathered_weights(module.student, keep=True))
    if scenario.in_parts:
        _save_in_parts(module.student, folder / f"{scenario.name}-saved", trainer.is_global_zero)
    teacher_gradients = [n for n, p in module.named_parameters() if n.startswith("teacher.") and p.grad is not None]
    return {
        "metrics": seen,
        "kept": None if module.on_policy is None else kept(module.on_policy),
        **(written(module) if scenario.strategy.startswith("zero3") and module.on_policy is not None else {}),
        "validation": module.validation_metrics,
        "state": state,
        "persistent": whole,
        "on_disk": bytes_on_disk(folder / "disk"),
        "copied": all(getattr(p, "ds_secondary_tensor", None) is not None for p in module.student.parameters()),
        "teacher_gradients": teacher_gradients,
        "teacher_sharded": all(hasattr(p, "ds_id") and p.numel() == 0 for p in module.teacher.parameters())
        if isinstance(module.teacher, torch.nn.Module)
        else None,
    }


def _save_in_parts(student: Any, folder: Path, first: bool) -> None:
    weights = gathered_weights(student, first, torch.bfloat16)
    if first:
        save_model(student, ByT5Tokenizer(), folder, weights, torch.bfloat16, part_bytes=6_000)
    else:
        assert not list(weights)


def bytes_on_disk(folder: Path) -> dict[str, int]:
    """What DeepSpeed has put there: of parameters, and of the optimizer."""
    found = {"params": 0, "optimizer": 0}
    for path in folder.rglob("*.swp"):
        found["optimizer" if "optimizer" in path.parts else "params"] += path.stat().st_size
    return found


def kept(on_policy: Rollouts) -> dict[str, Any]:
    """Its buffer, and what it counts."""
    counts, buffered = on_policy.state()
    return {"counts": tuple(counts.values()), **buffered}


def written(module: LanguageModel) -> dict[str, Any]:
    """What writes under ZeRO-3, after training: its weights, and how often ranks speak for short and for long text."""
    assert module.on_policy is not None
    spoken = []
    for tokens in (2, 30):
        sampling = replace(module.on_policy.values.sampling, max_new_tokens=tokens)
        module.on_policy.values = replace(module.on_policy.values, sampling=sampling, replay_share=0.0)
        module.on_policy.end_tokens = []
        spoken.append(collectives(module, step=1000))
    assert module.on_policy.replica.model is not None
    return {"collectives": spoken, "replica": dict(module.on_policy.replica.model.state_dict())}


def write_models(folder: Path) -> None:
    for tied in (False, True):
        for dropout in (0.0, 0.1):
            saved(folder, f"student-{tied}-{dropout}", model(16, 2, seed=1, tied=tied, dropout=dropout))
    saved(folder, "teacher", model(32, 2, seed=2))
    saved(folder, "wide", model(256, 1, seed=1))  # of which DeepSpeed's threshold, 100,000 elements, leaves some whole


class Summed(pl.LightningModule):
    """Its gradient is 1 in the first micro-batch of a step, and 2⁻⁹ in each of the 255 others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def training_step(self, _: Any, number: int) -> torch.Tensor:
        said = self.layer(torch.ones(1, 8, dtype=self.layer.weight.dtype)).sum()
        return 256 * (1.0 if number == 0 else 2.0**-9) * said  # Lightning divides by their number

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(256, 1))


def summed(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """The sum, as the optimizer's fp32 weights have it after one step."""
    from deepspeed.utils import safe_get_full_fp32_param

    module = Summed()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=scenario.world,
        strategy=strategies.ZeRO(int(scenario.strategy[4])).lightning("cpu"),
        precision=scenario.precision,
        max_steps=1,
        accumulate_grad_batches=256,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    return {"sum": -safe_get_full_fp32_param(module.layer.weight).detach().clone()}


DAMAGES = ("missing", "unexpected", "shape", "nan")
DAMAGED = "model.layers.1.mlp.down_proj.weight"


def write_damaged(folder: Path) -> None:
    """The teacher, each with one fault in DAMAGED; the number that is none lies in the last rank's shard."""
    for damage in DAMAGES:
        whole = model(32, 2, seed=2)
        whole.save_pretrained(folder / damage)
        state = dict(whole.state_dict())
        if damage == "missing":
            del state[DAMAGED]
        elif damage == "unexpected":
            state[f"{DAMAGED}.more"] = torch.zeros(2)
        elif damage == "shape":
            state[DAMAGED] = torch.zeros(32, 63)
        else:
            state[DAMAGED][-1, -1] = float("nan")
        save_file(state, folder / damage / "model.safetensors", metadata={"format": "pt"})


def said_of_damaged(folder: Path) -> dict[str, Any]:
    """By damage, what each rank says."""
    said: list[str] = []
    for damage in DAMAGES:
        try:
            load_sharded(str(folder / damage), zero3("float32"), dtype=torch.float32)
            said.append("nothing")
        except Refusal as refusal:
            said.append(str(refusal))
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, said)
    return dict(zip(DAMAGES, zip(*of_ranks, strict=True), strict=True))


def said_of_torn(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """What each rank raises."""
    try:
        fit(scenario, folder)
        said = "nothing"
    except (NotFinite, Refusal) as problem:
        said = str(problem)
    of_ranks: list[Any] = [said] * scenario.world
    if scenario.world > 1:
        torch.distributed.all_gather_object(of_ranks, said)
    return {"said": of_ranks}


def main() -> None:
    """On every rank: run the scenarios of a JSON file, and let rank 0 save what came out."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for entry in json.loads((folder / "scenarios.json").read_text()):
        scenario = Scenario(**entry)
        if scenario.damaged:
            result = said_of_damaged(folder)
        elif scenario.torn or scenario.spare:
            result = said_of_torn(scenario, folder)
        else:
            result = summed(scenario, folder) if scenario.summed else fit(scenario, folder)
        if int(os.environ["RANK"]) == 0:
            torch.save(result, folder / f"{entry['name']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def on_two_ranks(scenarios: list[Scenario], folder: Path) -> dict[str, dict[str, Any]]:
    """All scenarios in one pair of processes."""
    return on_ranks(2, scenarios, folder)


def on_ranks(world: int, scenarios: list[Scenario], folder: Path) -> dict[str, dict[str, Any]]:
    """All scenarios in as many processes as there are ranks."""
    import subprocess

    (folder / "scenarios.json").write_text(json.dumps([asdict(replace(s, world=world)) for s in scenarios]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            "tests.fitting",
            str(folder),
        ],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-12000:]
    return {s.name: torch.load(folder / f"{s.name}.pt", weights_only=True) for s in scenarios}


if __name__ == "__main__":
    main()
