"""The callback that examines a training from inside: before its first step, and after its last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from models.errors import Refusal
from pipeline import artifact
from pipeline.data.tokenizer import load_tokenizer
from pipeline.doctor import gradient, loss, machine, states, text
from pipeline.doctor.findings import Finding, worst
from pipeline.doctor.probed import Probed

FINDINGS = "findings.json"  # in the stage's work folder


class Probe(pl.Callback):
    """Every rank does the same checks, as most are collective under ZeRO-3; rank 0 writes `<work>/findings.json`.

    It comes after the callback that saves, whose last checkpoint it reads back.
    """

    def __init__(self, folder: str | Path, keep: int, run_dir: str | Path, corpus: Any) -> None:
        """`folder`: of the checkpoints. `keep`: how many the run will have there. `run_dir`: the run's own folder.
        `corpus`: what the plan says of the run's whole text."""
        self.folder, self.keep, self.run_dir = Path(folder), keep, Path(run_dir)
        self.corpus = corpus
        self.found: list[Finding] = []
        self._before: dict[str, str] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        start = str(self.folder.parent / "start")
        probed = Probed(trainer, module, trainer.datamodule, len(load_tokenizer(start)))
        data = probed.data
        numbers = data.order().step_sequences(0).tolist()
        rows = [data.train[number] for number in numbers]
        mine = rows[trainer.global_rank :: trainer.world_size]
        batch = next(iter(data._loader(data.train, data.order(trainer.global_rank, trainer.world_size))))
        batch = {name: each.to(module.device) if isinstance(each, Tensor) else each for name, each in batch.items()}
        with _still(module):
            self._add(trainer, text.targets_are_the_next_tokens(mine))
            self._add(trainer, states.documents_are_apart(probed))
            self._add(trainer, loss.divided_once(probed))
            self._add(trainer, gradient.zero_at_equality(probed, batch))
            self._add(trainer, gradient.gradient_of_the_loss(probed, batch))
            self._add(trainer, states.logits_are_in_chunks(probed, batch))
        bytes_ = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.trained())
        self._add(trainer, machine.collective(trainer, module.device, bytes_))
        self._before = machine.digest({n: p for n, p in module.trained_by_name().items() if p.dtype == torch.float32})

    def on_train_end(self, trainer: Any, module: Any) -> None:
        after = machine.digest(module.trained_by_name())
        of_ranks = gathered(trainer, after)
        self.found.append(machine.ranks_hold_the_same(of_ranks, trainer.global_step))
        self.found.append(machine.moved(self._before, after))
        self._add(trainer, machine.checkpoint_reads_back(trainer, module, self.folder))
        self._add(trainer, machine.memory(module.device))
        vocabulary = int(module.student.get_input_embeddings().num_embeddings)
        self._add(trainer, machine.space(self.run_dir, self.folder.parent, self.keep, self.corpus, vocabulary))
        if trainer.is_global_zero:
            artifact.write_json(self.folder.parent / FINDINGS, {"found": [each.as_json() for each in self.found]})

    def _add(self, trainer: Any, mine: Finding) -> None:
        self.found.append(worst(gathered(trainer, mine)))


def gathered(trainer: Any, mine: Any) -> list[Any]:
    """What each rank says."""
    if trainer.world_size == 1:
        return [mine]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, mine)
    return found


@contextmanager
def _still(module: Any) -> Iterator[None]:
    """Without dropout, and on the text that is given."""
    kept, module.on_policy = module.on_policy, None
    module.student.eval()
    try:
        yield
    except ValueError as problem:
        if isinstance(problem, Refusal):
            raise
        raise Refusal(f"doctor: the objective cannot be asked by itself: {problem}") from problem
    finally:
        module.on_policy = kept
        module.student.train()
