"""Checks of the tensors that a training makes: hidden states of packed documents, and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.heads import crossing, hidden_states
from pipeline.doctor.findings import Finding, finding, skipped
from pipeline.doctor.probed import Probed

_CHUNKED_TOKENS = 512
_ROWS = 2000  # among which one of two documents is looked for


@torch.no_grad()
def documents_are_apart(probed: Probed) -> Finding:
    """Other tokens in the first document of a packed sequence change nothing of the ones behind it, in either model."""
    name = "document isolation"
    if not probed.module.packed:
        return skipped(name, "a row holds one document (data.packing=false)")
    rows = (probed.data.train[number] for number in range(min(_ROWS, len(probed.data.train))))
    if (row := next((row for row in rows if row["position_ids"].count(0) > 1), None)) is None:
        return skipped(name, "no row of the first text holds two documents")
    device = probed.module.device
    ids, positions = (torch.tensor([row[key]], device=device) for key in ("input_ids", "position_ids"))
    end = int((positions[0] == 0).nonzero()[1])  # of the first document
    others = ids.clone()
    others[:, :end] = (others[:, :end] + 1 + probed.vocabulary // 2) % probed.vocabulary
    wrong = []
    with probed.trainer.precision_plugin.forward_context():
        for role, model in {"student": probed.module.student, "teacher": probed.teacher}.items():
            if model is None:
                continue
            apart = (
                (hidden_states(model, ids, positions) - hidden_states(model, others, positions))[:, end:].abs().max()
            )
            experts = any("expert" in each for each, _ in model.named_modules())
            if float(apart) > (1e-2 if experts else 0.0) or (leak := crossing(model, probed.vocabulary)):
                wrong.append(f"{role}: its states change by {float(apart):.1e}" if float(apart) else str(leak))
    measured = "; ".join(wrong) or f"nothing of {ids.shape[1] - end} tokens behind another document changes"
    return finding(name, not wrong, measured, "set data.packing=false, or another trainer.attention")


class _Logits(TorchDispatchMode):
    """The most rows of a tensor as wide as the vocabulary, padded or not; a head's weights, of `width`, are none."""

    def __init__(self, columns: set[int], width: int) -> None:
        super().__init__()
        self.columns, self.width, self.rows = columns, width, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.dim() and (wide := self.columns & {*each.shape}):
                rows = each.numel() // max(wide)
                self.rows = max(self.rows, rows if rows != self.width else 0)
        return result


def logits_are_in_chunks(probed: Probed, batch: dict[str, Any]) -> Finding:
    """No tensor of tokens × vocabulary is made for the loss of a micro-batch, unless trainer.objective_memory_mb has
    room for it, and for its gradient."""
    name, module = "logits in chunks", probed.module
    tokens, config = int((batch["targets"] >= 0).sum()), module.student.config.get_text_config()
    if not probed.most(int(tokens >= _CHUNKED_TOKENS)):
        return skipped(name, f"a micro-batch has {tokens} targets, too few to be cut up")
    seen = _Logits({probed.vocabulary, config.vocab_size}, config.hidden_size)
    with torch.no_grad(), probed.trainer.precision_plugin.forward_context(), seen:
        module._objective(module.objective, batch)
    told = f"logits of {seen.rows:,} tokens at once at most, of {tokens:,} in the micro-batch"
    taken = 2 * seen.rows * probed.vocabulary * 4
    fits = module.memory_bytes is not None and taken <= module.memory_bytes
    told += f"; {taken / 2**20:,.1f} of trainer.objective_memory_mb={module.memory_bytes // 2**20}" if fits else ""
    fine = tokens < _CHUNKED_TOKENS or seen.rows < tokens or fits
    return finding(name, fine, told, "an objective makes all logits at once: work on the blocks that it is given")
