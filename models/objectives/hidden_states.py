"""Hidden states: the student's residual stream at some layers against the teacher's at others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from models.errors import Refusal
from models.objectives.representation import Wanted, check_layers, depth_of, pairs_of_layers
from models.representations import Capture, check_capture

_KINDS = ("mse", "cosine")


@dataclass(frozen=True)
class HiddenStates:
    """Distance of hidden states per token, averaged over pairs of layers.

    `mse`: mean over the teacher's width of the squared difference (FitNets, arXiv:1412.6550; TinyBERT,
    arXiv:1909.10351). `cosine`: 1 − cos (DistilBERT, arXiv:1910.01108), 1/2 where one side is all zeros.

    A layer's state is what it adds up to before any final norm. `layers=None` pairs the student's layer i of Ls with
    the teacher's round(i · Lt / Ls), last with last; a student deeper than its teacher may meet its embeddings, 0.
    `projection` learns one linear map without bias per pair, from the student's width to the teacher's; without it
    the widths must be equal. It belongs to the training alone and is no part of the student. `normalise` takes mean
    and variance out of both sides, after the projection: residual streams grow with depth and have a few huge
    channels, which otherwise are most of the squared error.
    """

    kind: str = "mse"
    layers: Sequence[Sequence[int]] | None = None
    projection: bool = True
    normalise: bool = False
    weight: float = 1.0
    name: ClassVar[str] = "hidden_states"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise Refusal(f"hidden_states.kind={self.kind}: need one of {', '.join(_KINDS)}")
        if not self.weight > 0:
            raise Refusal(f"hidden_states.weight={self.weight}: need a number above 0; leave the term out otherwise")
        object.__setattr__(self, "layers", pairs_of_layers(self.layers, self.name))

    def check(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
        pairs = self._pairs(student_config, teacher_config)
        check_layers(pairs, student_config, teacher_config, 0, self.name)
        student_width, teacher_width = _width(student_config), _width(teacher_config)
        if not self.projection and student_width != teacher_width:
            raise Refusal(
                f"hidden_states.projection=false: the student's states are {student_width} wide and the teacher's "
                f"{teacher_width}; set projection=true or give the student hidden_size={teacher_width}"
            )
        check_capture(student_config, [student for student, _ in pairs], [])
        check_capture(teacher_config, [teacher for _, teacher in pairs], [])

    def wanted(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> Wanted:
        pairs = self._pairs(student_config, teacher_config)
        return Wanted(
            student_hidden=tuple(sorted({student for student, _ in pairs})),
            teacher_hidden=tuple(sorted({teacher for _, teacher in pairs})),
        )

    def build(
        self, student_config: PretrainedConfig, teacher_config: PretrainedConfig, seed: int
    ) -> HiddenStateDistance:
        pairs = self._pairs(student_config, teacher_config)
        projections: list[nn.Module] = [nn.Identity() for _ in pairs]
        if self.projection:
            widths = _width(student_config), _width(teacher_config)
            # On the CPU, where every rank draws the same; and only its generator is borrowed.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                projections = [Projection(*widths, bias=False, device="cpu") for _ in pairs]
        return HiddenStateDistance(pairs, projections, self.kind, self.normalise)

    def _pairs(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> tuple[tuple[int, int], ...]:
        if self.layers is not None:
            return tuple((student, teacher) for student, teacher in self.layers)
        students, teachers = depth_of(student_config), depth_of(teacher_config)
        return tuple((i, round(i * teachers / students)) for i in range(1, students + 1))


class Projection(nn.Linear):
    """A linear map that takes states of another dtype than its weight's: the wider of the two, or autocast's."""

    def forward(self, input: Tensor) -> Tensor:
        wider = torch.promote_types(input.dtype, self.weight.dtype)
        return F.linear(input.to(wider), self.weight.to(wider))


class HiddenStateDistance(nn.Module):
    """The sum over tokens that `HiddenStates` describes, with its projections."""

    def __init__(
        self, pairs: Sequence[tuple[int, int]], projections: Sequence[nn.Module], kind: str, normalise: bool
    ) -> None:
        super().__init__()
        self.pairs, self.kind, self.normalise = tuple(pairs), kind, normalise
        self.projections = nn.ModuleList(projections)

    def forward(
        self,
        student: Capture,
        teacher: Capture,
        position_ids: Int[Tensor, "B T"],
        weights_BT: Float[Tensor, "B T"],
    ) -> Float[Tensor, ""]:
        supervised_N = weights_BT.reshape(-1).nonzero().squeeze(1)
        weights_N = weights_BT.reshape(-1)[supervised_N]
        student_hidden, teacher_hidden = student.hidden, teacher.hidden
        sums = []
        for (ours, theirs), projection in zip(self.pairs, self.projections, strict=True):
            # Chosen first: nothing at other positions, not even a NaN, is ever multiplied by anything.
            student_NW = student_hidden[ours].flatten(0, -2).index_select(0, supervised_N)
            teacher_NW = teacher_hidden[theirs].detach().flatten(0, -2).index_select(0, supervised_N)
            # Each pair would keep several [tokens × width] tensors in fp32; they are cheaper to make again. The
            # projection stays outside, so that what ZeRO-3 does around its forward and backward happens once.
            sums.append(
                checkpoint(
                    self._sum,
                    projection(student_NW),
                    teacher_NW,
                    weights_N,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.stack(sums).mean()

    def _sum(
        self, student_NW: Float[Tensor, "N W"], teacher_NW: Float[Tensor, "N W"], weights_N: Float[Tensor, " N"]
    ) -> Float[Tensor, ""]:
        wide = torch.float64 if student_NW.dtype == torch.float64 else torch.float32
        student_NW, teacher_NW = student_NW.to(wide), teacher_NW.to(wide)
        if self.normalise:
            student_NW, teacher_NW = (F.layer_norm(each, each.shape[-1:]) for each in (student_NW, teacher_NW))
        if self.kind == "mse":
            values_N = (student_NW - teacher_NW).square().mean(-1)
        else:
            # 1 − cos is half the squared distance of the directions, which is exactly zero where they are equal.
            values_N = (F.normalize(student_NW, dim=-1) - F.normalize(teacher_NW, dim=-1)).square().sum(-1) / 2
        return (values_N * weights_N.to(wide)).sum()


def _width(config: PretrainedConfig) -> int:
    return int(config.get_text_config().hidden_size)
