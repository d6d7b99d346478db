"""The contract of an objective on what layers give inside, beside the logits.

Legend: B rows, T positions, W width of a captured tensor, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn
from transformers import PretrainedConfig

from models.errors import Refusal


@dataclass(frozen=True)
class Wanted:
    """Numbers of the layers to capture, from 1; 0 is the embeddings. `a | b` is what both terms need."""

    student_hidden: tuple[int, ...] = ()
    teacher_hidden: tuple[int, ...] = ()
    student_relations: tuple[int, ...] = ()
    teacher_relations: tuple[int, ...] = ()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(
            _union(self.student_hidden, other.student_hidden),
            _union(self.teacher_hidden, other.teacher_hidden),
            _union(self.student_relations, other.student_relations),
            _union(self.teacher_relations, other.teacher_relations),
        )


@runtime_checkable
class RepresentationTerm(Protocol):
    """A summand that compares layers of student and teacher, whose depth, width and heads may differ.

    `weight` is the factor the caller multiplies the sum by; nothing here applies it.
    """

    name: ClassVar[str]

    @property
    def weight(self) -> float: ...

    def check(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
        """Refuse, from the configs alone, what cannot be compared."""
        ...

    def wanted(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig) -> Wanted:
        """What has to be captured while both models run."""
        ...

    def build(self, student_config: PretrainedConfig, teacher_config: PretrainedConfig, seed: int) -> nn.Module:
        """The sum over tokens, as a module that holds the term's own parameters, if it has any.

        Its forward(student: Capture, teacher: Capture, position_ids: Int[Tensor, "B T"], weights_BT: Float[Tensor,
        "B T"]) gives Float[Tensor, ""]: the sum of weights_BT times the value per token, in fp32 (fp64 for fp64
        inputs). Weights are 0 where nothing is supervised, and what stands there changes nothing. The teacher gets no
        gradient. Parameters are the same on every rank that says the same seed; no generator that others draw from is
        touched.
        """
        ...


def pairs_of_layers(pairs: Sequence[Sequence[int]] | None, term: str) -> tuple[tuple[int, int], ...] | None:
    """`layers` as a yaml gives it, as (student's, teacher's) numbers."""
    if pairs is None:
        return None
    if not len(pairs) or any(len(pair) != 2 for pair in pairs):
        raise Refusal(f"{term}.layers={pairs}: need [student layer, teacher layer] pairs, e.g. [[2, 6], [4, 12]]")
    return tuple((int(student), int(teacher)) for student, teacher in pairs)


def check_layers(
    pairs: Sequence[tuple[int, int]],
    student_config: PretrainedConfig,
    teacher_config: PretrainedConfig,
    lowest: int,
    term: str,
) -> None:
    """Refuse numbers beyond either model's layers."""
    for at, (role, config) in enumerate((("student", student_config), ("teacher", teacher_config))):
        depth = depth_of(config)
        for pair in pairs:
            if not lowest <= pair[at] <= depth:
                raise Refusal(
                    f"{term}.layers: {role} layer {pair[at]} is not there; the {role} has {lowest} to {depth}"
                )


def depth_of(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _union(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({*ours, *theirs}))
