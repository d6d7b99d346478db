"""Attention relations: which tokens are alike in a layer's queries, keys and values, for any number of heads.

Legend: B rows, T positions, W width of the projections (of student or teacher), R relation heads, D = W / R,
n queries of one block, K keys of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from models.errors import Refusal
from models.objectives.representation import Wanted, check_layers, depth_of, pairs_of_layers
from models.objectives.softmax import softmax
from models.representations import Capture, check_capture, projection_widths

_KINDS = ("queries", "keys", "values")
# Relations of one block of queries, all relation heads: there are about six tensors of this size at a time.
_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}


@dataclass(frozen=True)
class AttentionRelations:
    """Multi-head self-attention relations of MiniLMv2, arXiv:2012.15828, under a causal mask.

    A relation is softmax(A Aᵀ / √D) over a document's tokens up to the query's own, with A the layer's queries, keys
    or values, all heads side by side and split anew into `relation_heads`. The value per query token is
    KL(teacher's relation ‖ student's), in nats, averaged over relation heads, kinds and pairs of layers. Depth, width
    and numbers of heads may differ; `relation_heads` must divide all widths. `layers=None` pairs last with last; for
    a large teacher the paper prefers one of its upper middle layers, e.g. [[12, 21]] of 24.
    """

    relations: Sequence[str] = _KINDS
    relation_heads: int = 8
    layers: Sequence[Sequence[int]] | None = None
    weight: float = 1.0
    name: ClassVar[str] = "attention_relations"

    def __post_init__(self) -> None:
        object.__setattr__(self, "relations", tuple(self.relations))
        if not self.relations or set(self.relations) - set(_KINDS) or len(set(self.relations)) < len(self.relations):
            raise Refusal(
                f"attention_relations.relations={list(self.relations)}: need one or more of {', '.join(_KINDS)}, "
                f"each once"
            )
        if self.relation_heads < 1:
            raise Refusal(f"attention_relations.relation_heads={self.relation_heads}: need 1 or more")
        if not self.weight > 0:
            raise Refusal(
                f"attention_relations.weight={self.weight}: need a number above 0; leave the term out otherwise"
            )
        object.__setattr__(self, "layers", pairs_of_layers(self.layers, self.name))

    def check(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
        pairs = self._pairs(student_config, teacher_config)
        check_layers(pairs, student_config, teacher_config, 1, self.name)
        widths = {
            f"{role}'s {kind}": width
            for role, config in (("student", student_config), ("teacher", teacher_config))
            for kind, width in zip(_KINDS, projection_widths(config), strict=True)
            if kind in self.relations
        }
        if any(width % self.relation_heads for width in widths.values()):
            common = math.gcd(*widths.values())
            fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
            stated = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise Refusal(
                f"attention_relations.relation_heads={self.relation_heads}: does not divide every width ({stated}); "
                f"these do: {fitting}"
            )
        check_capture(student_config, [], [student for student, _ in pairs])
        check_capture(teacher_config, [], [teacher for _, teacher in pairs])

    def wanted(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> Wanted:
        pairs = self._pairs(student_config, teacher_config)
        return Wanted(
            student_relations=tuple(sorted({student for student, _ in pairs})),
            teacher_relations=tuple(sorted({teacher for _, teacher in pairs})),
        )

    def build(
        self, student_config: PretrainedConfig, teacher_config: PretrainedConfig, seed: int
    ) -> RelationDivergence:
        return RelationDivergence(
            self._pairs(student_config, teacher_config), tuple(self.relations), self.relation_heads
        )

    def _pairs(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> tuple[tuple[int, int], ...]:
        if self.layers is not None:
            return tuple((student, teacher) for student, teacher in self.layers)
        return ((depth_of(student_config), depth_of(teacher_config)),)


class RelationDivergence(nn.Module):
    """The sum over tokens that `AttentionRelations` describes; it has no parameters.

    Differentiable once: the gradients are ready when the value is, and no relation outlives its block.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], kinds: Sequence[str], relation_heads: int) -> None:
        super().__init__()
        self.pairs, self.kinds, self.relation_heads = tuple(pairs), tuple(kinds), relation_heads

    def forward(
        self,
        student: Capture,
        teacher: Capture,
        position_ids: Int[Tensor, "B T"],
        weights_BT: Float[Tensor, "B T"],
    ) -> Float[Tensor, ""]:
        student.reshape(*position_ids.shape)
        teacher.reshape(*position_ids.shape)
        rows = max(1, _BLOCK_BYTES[_kind(position_ids)] // (4 * self.relation_heads * position_ids.shape[1]))
        blocks = list(_Block.all_of(document_begins(position_ids), weights_BT != 0, rows))
        sums = []
        for kind in self.kinds:
            students, teachers = getattr(student, kind), getattr(teacher, kind)
            for ours, theirs in self.pairs:
                work = _Work(
                    teachers[theirs].detach(), blocks, weights_BT, self.relation_heads, torch.is_grad_enabled()
                )
                sums.append(_Relations.apply(students[ours], work))
        return torch.stack(sums).mean()


def document_begins(position_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Of every token, where in its row its document begins: where positions do not go on by one, as transformers
    derives its own mask from them."""
    begins_BT = torch.ones_like(position_ids, dtype=torch.bool)
    begins_BT[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    places_T = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(begins_BT, places_T, 0).cummax(dim=1).values


@dataclass
class _Work:
    """Everything of a call that autograd need not see."""

    teacher_BTW: Tensor
    blocks: list[_Block]
    weights_BT: Tensor
    relation_heads: int
    differentiate: bool  # inside the function autograd is off, and needs_input_grad does not know of no_grad


@dataclass(frozen=True)
class _Block:
    """Some supervised queries of one row, and the stretch of keys that any of them sees."""

    row: int
    queries_n: Tensor
    keys: slice
    hidden_nK: Tensor

    @staticmethod
    def all_of(begins_BT: Int[Tensor, "B T"], supervised_BT: Bool[Tensor, "B T"], rows: int) -> Iterator[_Block]:
        """At most `rows` queries each, in order. Keys before the first query's document and after the last query are
        left out, so causality and packing save work and not only change results."""
        device, begins_BT, supervised_BT = begins_BT.device, begins_BT.cpu(), supervised_BT.cpu()
        for row, supervised_T in enumerate(supervised_BT):
            for queries_n in supervised_T.nonzero().squeeze(1).split(rows):
                if not len(queries_n):
                    continue
                keys = slice(int(begins_BT[row, queries_n[0]]), int(queries_n[-1]) + 1)
                places_K = torch.arange(keys.start, keys.stop)
                seen_nK = (places_K >= begins_BT[row, queries_n][:, None]) & (places_K <= queries_n[:, None])
                yield _Block(row, queries_n.to(device), keys, ~seen_nK.to(device))

    def heads(
        self, of_BTW: Float[Tensor, "B T W"], relation_heads: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "R n D"], Float[Tensor, "R K D"]]:
        """Queries, over √D, and keys by relation head; a key that no query here sees is zero, be it NaN."""
        of_TRD = of_BTW[self.row].unflatten(-1, (relation_heads, -1))
        queries_RnD = of_TRD[self.queries_n].to(dtype).transpose(0, 1) * of_TRD.shape[-1] ** -0.5
        keys_RKD = of_TRD[self.keys].to(dtype).masked_fill(self.hidden_nK.all(0)[:, None, None], 0).transpose(0, 1)
        return queries_RnD, keys_RKD

    def scores(self, queries_RnD: Float[Tensor, "R n D"], keys_RKD: Float[Tensor, "R K D"]) -> Float[Tensor, "R n K"]:
        return (queries_RnD @ keys_RKD.transpose(1, 2)).masked_fill_(self.hidden_nK, -math.inf)


class _Relations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_BTW: Tensor, work: _Work) -> Tensor:
        device, heads = student_BTW.device.type, work.relation_heads
        ctx.dtype = student_BTW.dtype
        wide = torch.float64 if student_BTW.dtype == torch.float64 else torch.float32
        gradient_BTW = None
        if work.differentiate and ctx.needs_input_grad[0]:
            gradient_BTW = torch.zeros_like(student_BTW, dtype=wide)
        total = torch.zeros((), dtype=torch.float64, device=student_BTW.device)
        with torch.autocast(device, enabled=False):
            for block in work.blocks:
                queries_RnD, keys_RKD = block.heads(student_BTW, heads, wide)
                student_RnK = block.scores(queries_RnD, keys_RKD)
                teacher_RnK = block.scores(*block.heads(work.teacher_BTW, heads, wide))
                student_p_RnK, student_normaliser_Rn = _softmax(student_RnK)
                teacher_p_RnK, teacher_normaliser_Rn = _softmax(teacher_RnK)
                # Σ p · (log p − log q), the normalisers taken out of the sum; where nothing is seen, ∞ − ∞ is 0
                apart_RnK = teacher_RnK.sub_(student_RnK).masked_fill_(block.hidden_nK, 0)
                value_Rn = torch.linalg.vecdot(teacher_p_RnK, apart_RnK)
                value_Rn = value_Rn + student_normaliser_Rn - teacher_normaliser_Rn
                weights_n = work.weights_BT[block.row, block.queries_n].to(wide)
                total += (value_Rn.mean(0) * weights_n).sum()
                if gradient_BTW is None:
                    continue
                # d KL / d scores is q − p, and every token is query and key of the same product.
                by_scores_RnK = student_p_RnK.sub_(teacher_p_RnK).mul_(weights_n[:, None] / heads)
                by_queries_RnD = (by_scores_RnK @ keys_RKD) * queries_RnD.shape[-1] ** -0.5
                by_keys_RKD = by_scores_RnK.transpose(1, 2) @ queries_RnD
                gradient_TW = gradient_BTW[block.row]
                gradient_TW.index_add_(0, block.queries_n, by_queries_RnD.transpose(0, 1).flatten(1))
                gradient_TW[block.keys] += by_keys_RKD.transpose(0, 1).flatten(1)
        ctx.save_for_backward(gradient_BTW)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        (gradient_BTW,) = ctx.saved_tensors
        # In place, so that a second backward is refused and not wrong.
        return None if gradient_BTW is None else gradient_BTW.mul_(upstream).to(ctx.dtype), None


def _kind(tensor: Tensor) -> str:
    return tensor.device.type if tensor.device.type in _BLOCK_BYTES else "cuda"


def _softmax(scores_RnK: Float[Tensor, "R n K"]) -> tuple[Float[Tensor, "R n K"], Float[Tensor, "R n"]]:
    probabilities_NK, normaliser_N = softmax(scores_RnK.flatten(0, 1))
    return probabilities_NK.view_as(scores_RnK), normaliser_N.view(scores_RnK.shape[:2])
