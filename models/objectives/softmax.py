"""The softmax of a block of logits together with its normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def softmax(logits_NV: Float[Tensor, "N V"]) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """Probabilities, and log-sum-exp in fp64, both from one pass of exponentials: those are the dear part on a CPU.

    log Z = z − log p(z) holds for every logit; the largest has p ≥ 1 / V, so its logarithm loses nothing. A divergence
    at high temperature is a small difference of normalisers, and per row the wider type costs nothing. Of a row that is
    −inf throughout the normaliser is −inf, and there are no probabilities.
    """
    probabilities_NV = torch.softmax(logits_NV, dim=-1)
    likeliest_N, largest_N = probabilities_NV.amax(dim=-1).double(), logits_NV.amax(dim=-1).double()
    return probabilities_NV, torch.where(largest_N == float("-inf"), largest_N, largest_N - likeliest_N.log())
