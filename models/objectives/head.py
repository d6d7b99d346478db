"""A language-model head: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


def product_dtype(hidden: Float[Tensor, "*tokens H"]) -> torch.dtype:
    """Of a head's products: the hidden states', or autocast's, as the model's own head would run under it."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition to a head's weight: scale · up @ down."""

    down: nn.Module  # hidden → [.., r], its dropout and its scale included
    up: Float[Tensor, "V r"]


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale · (hidden @ weight.T + bias)), softcap(z) = cap · tanh(z / cap)."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: Adapter | None = None

    def logits(self, hidden_NH: Float[Tensor, "N H"], dtype: torch.dtype) -> Float[Tensor, "N V"]:
        into_NV = hidden_NH.new_empty(len(hidden_NH), len(self.weight), dtype=dtype)
        with torch.no_grad():
            low_Nr = None if self.adapter is None else self.adapter.down(hidden_NH).to(hidden_NH.dtype)
            return self.write_logits(hidden_NH, into_NV, low_Nr)

    def write_logits(
        self,
        hidden_NH: Float[Tensor, "N H"],
        logits_NV: Float[Tensor, "N V"],
        low_Nr: Float[Tensor, "N r"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Into `logits_NV`, in its dtype; outside autograd. `low_Nr` is what the adapter's `down` made of hidden."""
        if hidden_NH.dtype == self.weight.dtype == logits_NV.dtype:  # autocast does not reach a product with `out`
            torch.mm(hidden_NH, self.weight.T, out=logits_NV)
            if self.bias is not None:
                logits_NV += self.bias
        else:
            logits_NV.copy_(nn.functional.linear(hidden_NH, self.weight, self.bias))
        if self.adapter is not None and low_Nr is not None:
            logits_NV += low_Nr @ self.adapter.up.T
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def restricted(self, vocabulary: int | None, dtype: torch.dtype) -> Head:
        """The first `vocabulary` columns (a padded table has more rows than its tokenizer has tokens), in `dtype`."""
        weight = self.weight.detach()[:vocabulary].to(dtype)
        bias = None if self.bias is None else self.bias.detach()[:vocabulary].to(dtype)
        adapter = None
        if self.adapter is not None:
            adapter = Adapter(self.adapter.down, self.adapter.up.detach()[:vocabulary].to(dtype))
        return Head(weight, bias, self.scale, self.softcap, adapter)
