"""How much the loss would change without a unit, by its Taylor series: LLM-Pruner's own importance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.pruning.groups import Anatomy
from models.pruning.importance import Tally, check_reduction, wanted, weights_of

ORDERS = ("first", "second", "mix", "vectorize")


@dataclass(frozen=True)
class Taylor:
    """With w a weight, g its gradient of the batch's mean loss, A the mean of its squared per-sample gradients:

        first |w g|    second |w² A|    mix |w g − ½ w² A|    vectorize |Σ w g|

    summed over each matrix's part of a unit (of vectorize the size of each row's or column's sum), then `reduction`
    over the matrices. LLM-Pruner, arXiv:2305.11627, as its code has it. A sample is a row of the calibration data, of
    which each counts as much as any other.

    All come from one backward a batch: a matrix's gradient of each sample is the product of its inputs and the
    gradients of its outputs, made in a hook and dropped there. Only the matrix at hand is ever held, twice. Raises
    Refusal for matrices of experts, which take samples together, at second and mix.
    """

    order: str = "mix"
    reduction: str = "sum"
    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp", "experts", "hidden")

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise Refusal(f"importance.order={self.order}: need one of {', '.join(ORDERS)}")
        check_reduction(self.reduction)

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        groups = wanted(anatomy, kinds)
        names = {id(weight): name for name, weight in weights_of(model, groups).items()}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        plain = [m for m in model.modules() if _is_plain(m) and id(m.weight) in names]
        apart = names.keys() - tables - {id(module.weight) for module in plain}  # experts and their routers
        if apart and self.order in ("second", "mix"):
            raise Refusal(
                f"importance.order={self.order}: experts read tokens of all samples together, so "
                f"{names[min(apart)]} has no gradients of each; use first or vectorize"
            )
        parts = list(batches)  # one batch of all: g is its gradient, whose size is not the sum of its parts' sizes
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tally = Tally(groups)
        handles = [
            m.register_forward_hook(_Watch(self, names[id(m.weight)], tally, len(batch["input_ids"]))) for m in plain
        ]
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in apart)
            if id(parameter) in apart:
                hook = _take(self, names[id(parameter)], tally)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        training = model.training
        model.eval()
        try:
            _loss(model, batch).backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])
            model.train(training)
        return tally.scores(self.reduction)

    def tell(self, tally: Tally, name: str, weight: Tensor, gradient: Tensor, squares: Tensor | None) -> None:
        """One matrix's share, from its gradient and the mean of its squared per-sample gradients."""
        if self.order == "vectorize":
            tally.add(name, weight * gradient, absolute_places=True)
            return
        change = torch.zeros_like(gradient) if self.order == "second" else weight * gradient
        if self.order != "first":
            assert squares is not None
            change = change - (0.5 if self.order == "mix" else -1.0) * weight**2 * squares
        tally.add(name, change.abs())


class _Watch:
    """A forward hook that waits for the gradient of what the module gives."""

    def __init__(self, taylor: Taylor, name: str, tally: Tally, samples: int) -> None:
        self.taylor, self.name, self.tally, self.samples = taylor, name, tally, samples

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read = inputs[0].detach()
        if not output.requires_grad:  # the first layer's inputs: nothing before them has a gradient
            output = output.requires_grad_()

        def then(gradient: Tensor) -> None:
            self.taken(module, read, gradient.detach())

        output.register_hook(then)
        return output

    @torch.no_grad()
    def taken(self, module: Any, read: Tensor, gradient: Tensor) -> None:
        samples = self.samples
        read_BTI, gradient_BTO = (each.reshape(samples, -1, each.shape[-1]).float() for each in (read, gradient))
        transposed = type(module).__name__ == "Conv1D"
        total: Tensor | None = None
        squares: Tensor | None = None
        for read_TI, gradient_TO in zip(read_BTI, gradient_BTO, strict=True):
            one = read_TI.T @ gradient_TO if transposed else gradient_TO.T @ read_TI
            total = one if total is None else total.add_(one)
            if self.taylor.order in ("second", "mix"):
                # Of the sample's own loss, which is as many times as large as its share of the batch's.
                square = (one * samples).square_()
                squares = square if squares is None else squares.add_(square)
        assert total is not None
        mean = None if squares is None else squares / samples
        self.taylor.tell(self.tally, self.name, module.weight.float(), total, mean)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is one matrix product, whose weight's gradient is that of what it read and what it gave."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _take(taylor: Taylor, name: str, tally: Tally) -> Any:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        taylor.tell(tally, name, parameter.detach().float(), parameter.grad.float(), None)
        parameter.grad = None

    return take


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over samples of each one's mean cross-entropy."""
    logits_BTV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    losses_BT = nn.functional.cross_entropy(logits_BTV.float().transpose(1, 2), batch["targets"], reduction="none")
    counts_B = (batch["targets"] >= 0).sum(1)
    return (losses_BT.sum(1) / counts_B.clamp(min=1)).mean()
