"""How much the loss would change without a unit, by its Taylor series: LLM-Pruner's own importance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.matrices import is_linear, is_transposed
from models.pruning.groups import Anatomy
from models.pruning.importance import Batch, Statistics, Tally, check_reduction, over_ranks, wanted, weights_of
from models.sharding import gathered

# Gradients made at once: on a CPU they stay in its cache, on a GPU few launches count.
_AT_ONCE = {"cpu": 2**20}  # and 2**26 elsewhere
ORDERS = ("first", "second", "mix", "vectorize")


@dataclass(frozen=True)
class Taylor:
    """With w a weight, g its gradient of a batch's mean loss, A the mean of its squared per-sample gradients:

        first |w g|    second |w² A|    mix |w g − ½ w² A|    vectorize |Σ w g|

    summed over each matrix's part of a unit (of vectorize the size of each row's or column's sum), then `reduction`
    over the matrices. LLM-Pruner, arXiv:2305.11627, as its code has it. All calibration samples count
    alike; the scores of several batches are averaged before `reduction`.

    All come from one backward pass a batch: a matrix's gradient for each sample is the product of its inputs and the
    gradients of its outputs, made in a hook, some rows at a time, and dropped there. For experts and their routers the
    gradients are computed again, sample by sample, in the backward pass; these are held whole, one at a time.
    """

    order: str = "mix"
    reduction: str = "sum"
    needs_calibration_data: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True  # told to a forecast
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp", "experts", "hidden")

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise Refusal(f"importance.order={self.order}: need one of {', '.join(ORDERS)}")
        check_reduction(self.reduction)

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        groups = wanted(anatomy, kinds)
        names = {id(weight): name for name, weight in weights_of(model, groups).items()}
        counts_B = (batch["targets"] >= 0).sum(1)
        samples = int(over_ranks((counts_B > 0).sum()))
        pass_ = _Pass(
            self, Tally(groups, absolute_places=self.order == "vectorize"), names, len(counts_B), max(1, samples)
        )
        handles = [model.get_input_embeddings().register_forward_hook(_differentiable)]
        for module in model.modules():
            own = names.keys() & {id(parameter) for parameter in module.parameters(recurse=False)}
            if own and not isinstance(module, nn.Embedding):  # of a table: what it is as a head
                handles.append(module.register_forward_hook(pass_.product if is_linear(module) else pass_.other))
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        training = model.training
        model.eval().requires_grad_(False)
        try:
            logits_BTV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            each_BT = nn.functional.cross_entropy(
                logits_BTV.float().transpose(1, 2), batch["targets"], reduction="none"
            )
            ((each_BT.sum(1) / counts_B.clamp(min=1)).sum() / max(1, samples)).backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])
            model.train(training)
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        values = {key: values / world for key, values in pass_.tally.values.items()}  # every rank has the whole
        return {**values, "batches": np.array([1.0 / world])}

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        tally = Tally(wanted(anatomy, kinds))
        batches = float(statistics["batches"][0])
        tally.values = {key: values / batches for key, values in statistics.items() if key != "batches"}
        return tally.scores(self.reduction)

    def change(self, weight: Tensor, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """What a sum over a unit's places is taken of, from g and A."""
        if self.order == "vectorize":
            return weight * gradient
        change = torch.zeros_like(gradient) if self.order == "second" else weight * gradient
        if squares is not None:
            change = change - (0.5 if self.order == "mix" else -1.0) * weight**2 * squares
        return change.abs()


@dataclass
class _Pass:
    """One forward and backward pass, and what its hooks gather."""

    taylor: Taylor
    tally: Tally
    names: dict[int, str]  # of the weights that are asked for
    own_samples: int  # on this rank
    samples: int  # on all

    def product(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of what is one matrix product: the gradient of its weight is the product of
        its inputs and its outputs' gradients."""
        read = inputs[0].detach()

        def taken(gradient: Tensor) -> None:
            pair = (gradient.detach(), read)
            with gathered([module.weight]):
                self._tell_product(module.weight, *(reversed(pair) if is_transposed(module) else pair))

        output.register_hook(taken)

    def other(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Of any other module whose inputs and outputs have a first dimension of tokens: run again for each sample."""
        outputs = [each for each in (output if isinstance(output, tuple) else (output,)) if each.requires_grad]
        read = [each.detach() for each in inputs]
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in self.names]

        def taken(gradients: Sequence[Tensor | None]) -> None:
            for parameter in own:  # one by one: each is a matrix of all experts
                with gathered(module.parameters()):
                    self._tell(
                        parameter, (self._again(module, read, gradients, parameter, n) for n in range(self.own_samples))
                    )

        torch.autograd.graph.register_multi_grad_hook(outputs, taken)

    def _again(
        self, module: Any, read: list[Tensor], gradients: Sequence[Tensor | None], parameter: Tensor, sample: int
    ) -> Tensor:
        with torch.enable_grad():
            parameter.requires_grad_(True)
            output = module.forward(*(each.chunk(self.own_samples)[sample] for each in read))
            outputs = [each for each in (output if isinstance(output, tuple) else (output,)) if each.requires_grad]
            pairs = [
                (o, g.chunk(self.own_samples)[sample]) for o, g in zip(outputs, gradients, strict=True) if g is not None
            ]
            (gradient,) = torch.autograd.grad([o for o, _ in pairs], [parameter], [g for _, g in pairs])
            parameter.requires_grad_(False)
        return gradient.float()

    @property
    def _squared(self) -> bool:
        return self.taylor.order in ("second", "mix")

    @torch.no_grad()
    def _tell_product(self, parameter: Tensor, left: Tensor, right: Tensor) -> None:
        """Of a matrix [R, C] whose gradient of a sample is left[T, R]ᵀ @ right[T, C]."""
        left_BTR, right_BTC = (each.reshape(self.own_samples, -1, each.shape[-1]).float() for each in (left, right))
        name, (height, width) = self.names[id(parameter)], parameter.shape
        step = max(1, _AT_ONCE.get(parameter.device.type, 2**26) // width)
        device = parameter.device
        sums = {d: torch.zeros(parameter.shape[d], dtype=torch.float64, device=device) for d in self.tally.dims(name)}
        place = torch.empty(min(step, height), width, device=device)
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            left_BTr, squares = left_BTR[..., rows], None
            if self._squared:
                one, total = place[: rows.stop - first], torch.zeros_like(place[: rows.stop - first])
                squares = torch.zeros_like(total)
                for left_Tr, right_TC in zip(left_BTr, right_BTC, strict=True):
                    torch.mm(left_Tr.T, right_TC, out=one)
                    total += one
                    squares.addcmul_(one, one, value=self.samples)  # see _tell
            else:
                total = left_BTr.flatten(0, 1).T @ right_BTC.flatten(0, 1)
            change = self._change(parameter[rows], total, squares)
            if 0 in sums:
                sums[0][rows] = change.sum(1, dtype=torch.float64)
            if 1 in sums:
                sums[1] += change.sum(0, dtype=torch.float64)
        self.tally.add_lines(name, sums)

    @torch.no_grad()
    def _tell(self, parameter: Tensor, gradients: Iterable[Tensor]) -> None:
        """`gradients`: one for each of this rank's samples, of its share of the batch's loss."""
        total: Tensor | None = None
        squares: Tensor | None = None
        for one in gradients:
            if self._squared:
                # Of the sample's own loss, which is as many times as large; over the number of samples in the end.
                squares = torch.zeros_like(one) if squares is None else squares
                squares.addcmul_(one, one, value=self.samples)
            total = one if total is None else total.add_(one)
        assert total is not None
        for slot in range(len(total)):  # an expert at a time, in place of what is needed no more
            square = None if squares is None else squares[slot]
            total[slot] = self._change(parameter[slot], total[slot], square)
        self.tally.add(self.names[id(parameter)], total)

    def _change(self, weight: Tensor, total: Tensor, squares: Tensor | None) -> Tensor:
        over_ranks(total)
        if squares is not None:
            over_ranks(squares)
        return self.taylor.change(weight.float(), total, squares)


def _differentiable(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """The embeddings' output gets a gradient, and so does all that is computed from it; no weight has one."""
    return output.requires_grad_()
