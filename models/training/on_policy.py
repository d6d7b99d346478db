"""On-policy distillation: the student writes an answer, and the teacher gives its distribution at every token of it.

GKD (arXiv:2306.13649) takes a share of the steps on the student's own text, and any divergence; MiniLLM
(arXiv:2306.08543) the reverse KL of whole sequences; DistiLLM (arXiv:2402.03898) reads such text again, from a buffer.

Here stand its settings and what they refuse; the text itself comes about in rollouts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.errors import Refusal
from models.generation import Sampling
from models.objectives.reverse_kl import ReverseKL
from models.objectives.term import Objective, needs_teacher
from models.teachers.teacher import Source


@dataclass(frozen=True)
class OnPolicy:
    """How much of the training is on text of the student's own, and how that text comes about.

    An example's prompt is what stands before its first supervised token; the student writes the rest anew. Hard labels
    are left out on such text: the student's own words are no truth.
    """

    # fields that change nothing that is made, beyond rounding (pipeline/config.py, identity)
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    sampling: Sampling
    share: float = 0.5  # of the optimizer steps; GKD's λ
    prompt_tokens: int = (
        1  # at least so many tokens of an example are its prompt: plain text is supervised from its start
    )
    replay_capacity: int = 0  # answers kept to be read again, the newest; 0 keeps none
    replay_share: float = 0.5  # of the student's steps, once so many are kept: these read, and write nothing
    long_horizon: bool = False  # with reverse_kl: the gradient of the whole sequence's KL, not of each token's alone
    length_normalised: bool = True  # of the long horizon: mean over the later tokens, not sum
    batch_size: int = 64  # answers a rank writes at once; memory only

    def __post_init__(self) -> None:
        for name in ("share", "replay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"on_policy.{name}={getattr(self, name)}: need [0, 1]; 0.5 is every second step")
        for name, least in (("prompt_tokens", 1), ("replay_capacity", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise Refusal(f"on_policy.{name}={getattr(self, name)}: need at least {least}")
        if self.sampling.samples != 1:
            raise Refusal(f"on_policy.sampling.samples={self.sampling.samples}: an example takes one answer; set 1")
        if self.long_horizon and (self.sampling.temperature, self.sampling.top_p) != (1.0, 1.0):
            raise Refusal(
                f"on_policy.long_horizon=true: its gradient is of text drawn from the student itself, and sampling has "
                f"temperature={self.sampling.temperature:g}, top_p={self.sampling.top_p:g}; set both to 1"
            )
        if self.long_horizon and self.replay_capacity:
            raise Refusal(
                f"on_policy.long_horizon=true with replay_capacity={self.replay_capacity}: what is kept was written by "
                f"an older student; set on_policy.replay_capacity=0"
            )

    def check(self, objective: Objective, teacher: Source, global_batch: int) -> None:
        """Refuse, before anything is loaded, what cannot judge text that is not written yet."""
        if not needs_teacher(objective):
            raise Refusal("on_policy: the objective asks no teacher, and there is nobody to correct; leave it out")
        if teacher.needs_record:
            raise Refusal(
                "on_policy: a cached or served teacher has scored the data's text alone; use teacher=online or "
                "teacher=sharded"
            )
        reverse = [term for weight, term in objective.terms if isinstance(term, ReverseKL) and weight]
        if self.long_horizon and [term.temperature for term in reverse] != [1.0]:
            raise Refusal(
                "on_policy.long_horizon=true: it completes reverse_kl at temperature 1; set "
                "divergence=reverse_kl and divergence.temperature=1"
            )
        if 0 < self.replay_capacity < global_batch:
            raise Refusal(
                f"on_policy.replay_capacity={self.replay_capacity}: a step reads global_batch={global_batch} answers "
                f"from it; keep at least as many"
            )
