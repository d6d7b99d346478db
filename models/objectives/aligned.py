"""A teacher with another tokenizer: its distributions put beside the student's where both stand before the same bytes.

A span is the smallest run of student tokens and of teacher tokens that cover the same bytes. Before its first byte both
models have read the same text, so their next-token distributions can be compared, over what both can say there:

    the tokens that stand for the same bytes in both vocabularies, and
    the span's own bytes, where one side or both need several tokens for them: the product of their probabilities

A multi-token way of writing takes its share out of its first token's category, so the categories exclude one another;
what only one side can say (tokens without a partner) is left out, and both sides are normalised over the rest. With
identical tokenizers every span is one token on each side and every token has its partner: the same-vocabulary loss.

A span has one value, whatever its number of tokens; like every term's, the sum is divided by the supervised tokens. So
where spans are long, or tokens lie in none, the divergence weighs less beside cross-entropy than alpha says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.head import Head, product_dtype
from models.objectives.signal import Look

_NOTHING = -1e9  # the logit of a category that neither side has: finite, so that 0 · (x − x) is 0


@dataclass(frozen=True)
class Aligned:
    """`spans_S5`: row, student position that predicts the span, student tokens, the same two of the teacher.

    `student_ids_C`, `teacher_ids_C`: tokens of the same bytes, in pairs. `teacher_targets`: at each position the next
    token of the teacher's own text.
    """

    hidden: Float[Tensor, "B Tt Ht"]
    head: Head
    teacher_targets: Int[Tensor, "B Tt"]
    spans_S5: Int[Tensor, "S 5"]
    student_length: int
    student_ids_C: Int[Tensor, " C"]
    teacher_ids_C: Int[Tensor, " C"]
    teacher_vocabulary: int | None = None

    def at(self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Tensor, wide: torch.dtype) -> Look:
        return _AlignedLook(self, supervised_N, vocabulary or len(like), wide)


class _AlignedLook:
    def __init__(self, signal: Aligned, supervised_N: Tensor, columns: int, wide: torch.dtype) -> None:
        self.wide, self.signal = wide, signal
        device = supervised_N.device
        row_S, at_S, length_S, taught_at_S, taught_length_S = signal.spans_S5.unbind(1)
        position_S = row_S * signal.student_length + at_S
        first_S = torch.searchsorted(supervised_N, position_S)
        last_S = (first_S + length_S - 1).clamp_max(max(0, len(supervised_N) - 1))
        if len(first_S) and not (
            torch.equal(supervised_N[first_S.clamp_max(len(supervised_N) - 1)], position_S)
            and torch.equal(supervised_N[last_S], position_S + length_S - 1)
        ):
            raise ValueError("a span covers tokens that are not supervised")
        # Everything that decides shapes lives on the CPU, so that a GPU is not waited for at every block.
        self.first_S, self.length_S = first_S.cpu().numpy(), length_S.cpu().numpy()
        self.taught_length_S = taught_length_S.cpu().numpy()
        inside = np.ones(len(supervised_N) + 1, dtype=bool)
        for length in range(2, int(self.length_S.max(initial=1)) + 1):
            inside[self.first_S[self.length_S >= length] + length - 1] = False
        self.cuts = inside.tolist()
        taught_first_S = row_S * signal.hidden.shape[1] + taught_at_S
        self.taught_offset_S = np.concatenate([[0], np.cumsum(self.taught_length_S)])
        taught_M = torch.repeat_interleave(taught_first_S, taught_length_S) + _within(self.taught_length_S, device)
        flat = signal.hidden.detach().reshape(-1, signal.hidden.shape[-1])
        flat = flat.to(product_dtype(flat))
        self.hidden_MH, self.targets_M = flat[taught_M], signal.teacher_targets.reshape(-1)[taught_M]
        self.head = signal.head.restricted(signal.teacher_vocabulary, flat.dtype)
        rate = max(1.0, len(taught_M) / max(1, len(supervised_N)))  # teacher tokens for every student token
        self.columns = int(rate * len(self.head.weight))
        self.partner_V = _partners(signal.student_ids_C, columns)
        self.taught_partner_V = _partners(signal.teacher_ids_C, len(self.head.weight))
        ids = torch.arange(columns, device=device)
        self.all_paired = torch.equal(signal.student_ids_C, ids) and torch.equal(signal.teacher_ids_C, ids)
        self.all_paired = self.all_paired and len(self.head.weight) == columns

    def open(self, chunk: slice) -> None:
        self.spans = self._spans_of(chunk)
        self.taught_begin = int(self.taught_offset_S[self.spans.start])
        hidden_mH = self.hidden_MH[self.taught_begin : int(self.taught_offset_S[self.spans.stop])]
        self.logits_mV = self.head.logits(hidden_mH, self.wide)

    def add(self, term: Any, block: Block, tokens: slice) -> Tensor:
        spans, student_nV, targets_n, weight = self._spans_of(tokens), block.student_NV, block.targets_N, block.weight
        values_n = student_nV.new_zeros(len(student_nV), dtype=torch.float64)
        length_s, taught_length_s = self.length_S[spans], self.taught_length_S[spans]
        first_s = self.first_S[spans] - tokens.start
        taught_first_s = self.taught_offset_S[spans] - self.taught_begin
        one = (length_s == 1) & (taught_length_s == 1)
        by_rank = getattr(term, "any_vocabulary", False)
        for simple in (True, False):
            chosen = np.flatnonzero(one if simple else ~one)
            if not len(chosen):
                continue
            first, taught_first = (
                torch.from_numpy(each[chosen]).to(student_nV.device) for each in (first_s, taught_first_s)
            )
            if by_rank or simple:
                student_sV, teacher_sV = student_nV[first], self.logits_mV[taught_first]
                if not (by_rank or self.all_paired):
                    student_sV = student_sV[:, self.signal.student_ids_C]
                    teacher_sV = teacher_sV[:, self.signal.teacher_ids_C]
                slope_sV = torch.zeros_like(student_sV)
                paired = Block(student_sV, targets_n[first], weight, slope_sV, teacher_sV)
                values_n[first] = term.add(paired).double()
                if not weight:
                    continue
                if by_rank or self.all_paired:
                    block.gradient_NV.index_add_(0, first, slope_sV)
                else:
                    block.gradient_NV.index_put_((first[:, None], self.signal.student_ids_C), slope_sV, accumulate=True)
            else:
                lengths = [torch.from_numpy(each[chosen]).to(student_nV.device) for each in (length_s, taught_length_s)]
                values_n[first] = self._several(term, block, first, lengths[0], taught_first, lengths[1])
        return values_n

    def _several(
        self,
        term: Any,
        block: Block,
        first_s: Tensor,
        length_s: Tensor,
        taught_first_s: Tensor,
        taught_length_s: Tensor,
    ) -> Tensor:
        """Spans of which one side, or both, need more than one token."""
        with torch.enable_grad():
            leaf_nV = block.student_NV.detach().requires_grad_()
            student_sC, span_s, alone_s = _categories(
                leaf_nV, block.targets_N, first_s, length_s, self.signal.student_ids_C, self.partner_V, term.temperature
            )
            with torch.no_grad():
                taught_sC, taught_span_s, taught_alone_s = _categories(
                    self.logits_mV,
                    self.targets_M[self.taught_begin : self.taught_begin + len(self.logits_mV)],
                    taught_first_s,
                    taught_length_s,
                    self.signal.teacher_ids_C,
                    self.taught_partner_V,
                    term.temperature,
                )
            # Where one side writes the bytes as one token that has a partner, the other side's partner says the same:
            # it counts with the span.
            student_sC, span_s = _merged(_without(student_sC, alone_s), span_s, taught_alone_s, term.temperature)
            taught_sC, taught_span_s = _merged(
                _without(taught_sC, taught_alone_s), taught_span_s, alone_s, term.temperature
            )
            student_sC = torch.cat([student_sC, span_s[:, None]], 1)
        slope_sC = torch.zeros_like(student_sC)
        taught_sC = torch.cat([taught_sC, taught_span_s[:, None]], 1)
        spanned = Block(student_sC.detach(), block.targets_N[first_s], block.weight, slope_sC, taught_sC)
        values_s: Tensor = term.add(spanned)
        if block.weight:
            block.gradient_NV.add_(torch.autograd.grad(student_sC, leaf_nV, slope_sC)[0])
        return values_s.double()

    def _spans_of(self, tokens: slice) -> slice:
        return slice(*np.searchsorted(self.first_S, [tokens.start, tokens.stop]).tolist())


def _categories(
    logits_nV: Tensor,
    targets_n: Tensor,
    first_s: Tensor,
    length_s: Tensor,
    ids_C: Tensor,
    partner_V: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one side: logits of the paired tokens and of the span, both up to one constant a row, and the category of the
    token that writes the whole span alone (-1: it takes several, or the token has no partner)."""
    said_s = targets_n[first_s]
    first_logit_s = logits_nV[first_s].gather(1, said_s[:, None]).squeeze(1)
    paired_sC = logits_nV[first_s][:, ids_C]
    category_s = partner_V[said_s]
    # log-probability, at T, of the tokens after the first, given those before
    ongoing = _within(length_s.cpu().numpy() - 1, first_s.device)
    span_of_r = torch.repeat_interleave(torch.arange(len(first_s), device=first_s.device), length_s - 1)
    row_r = first_s[span_of_r] + 1 + ongoing
    log_q_r = torch.log_softmax(logits_nV[row_r] / temperature, -1).gather(1, targets_n[row_r][:, None]).squeeze(1)
    going_on_s = torch.zeros_like(first_logit_s).index_add(0, span_of_r, log_q_r)
    several_s = length_s > 1
    span_s = first_logit_s + temperature * going_on_s
    # what the first token keeps: the ways on that are not the span
    kept_s = temperature * torch.log(-torch.expm1(torch.where(several_s, going_on_s, -1.0).clamp_max(-1e-6)))
    taken_s = several_s & (category_s >= 0)
    column_sC = torch.nn.functional.one_hot(category_s.clamp_min(0), paired_sC.shape[1]).bool()
    paired_sC = torch.where(column_sC & taken_s[:, None], paired_sC + kept_s[:, None], paired_sC)
    return paired_sC, span_s, torch.where(several_s, -1, category_s)


def _without(paired_sC: Tensor, category_s: Tensor) -> Tensor:
    """Category `category_s` of each row taken out; none where it is -1."""
    column_sC = torch.nn.functional.one_hot(category_s.clamp_min(0), paired_sC.shape[1]).bool()
    return paired_sC.masked_fill(column_sC & (category_s >= 0)[:, None], _NOTHING)


def _merged(paired_sC: Tensor, span_s: Tensor, category_s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Category `category_s` of each row moved into the span's; nothing where it is -1."""
    moved_s = paired_sC.gather(1, category_s.clamp_min(0)[:, None]).squeeze(1)
    none_s = (span_s == -math.inf) & (moved_s == -math.inf)  # of two impossibilities logaddexp's gradient is NaN
    parts = [logit_s.masked_fill(none_s, 0.0) / temperature for logit_s in (span_s, moved_s)]
    both_s = (torch.logaddexp(*parts) * temperature).masked_fill(none_s, -math.inf)
    return _without(paired_sC, category_s), torch.where(category_s >= 0, both_s, span_s)


def _partners(ids_C: Tensor, size: int) -> Tensor:
    """Category of each token, -1 without."""
    partner_V = torch.full((size,), -1, dtype=torch.long, device=ids_C.device)
    partner_V[ids_C] = torch.arange(len(ids_C), device=ids_C.device)
    return partner_V


def _within(lengths_S: np.ndarray, device: torch.device) -> Tensor:
    """0, 1, … length − 1 for each of the lengths, one after the other."""
    ends = np.cumsum(lengths_S)
    return torch.from_numpy(np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths_S, lengths_S)).to(device)
