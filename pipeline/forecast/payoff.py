"""Whether distillation is likely to pay against plain training of the same student.

Distillation Scaling Laws (Busbridge et al., arXiv:2502.08606): distillation beats supervised training only while the
student's tokens, or the compute in all, stay below a threshold that grows with the student; and where the teacher is
there already, or serves for more than one student. With enough data or compute both come to the same student. The
law's fitted coefficients are of the authors' own text and models, and are not used here.
"""

from __future__ import annotations

from pipeline.report.units import si

# The tokens a parameter at which plain training spends its compute best (Hoffmann et al., arXiv:2203.15556). Below it
# the student lacks data, which is where a teacher's distributions say more than a token; above it this says less.
_COMPUTE_OPTIMAL = 20


def verdict(*, student: int, tokens: int | None, made_here: bool, fresh: bool, cost: float) -> str:
    """In a sentence. `made_here`: the teacher is trained by this run, for it alone. `cost`: operations a token, as a
    multiple of plain training's."""
    price = f"it computes {cost:.2f} × as much a token as plain training"
    if cost > 1 and tokens is not None:
        price += f", which would see {si(tokens * cost)} tokens for the same compute"
    if not fresh:
        return (
            f"distillation against plain training: {price}; the law is of students from random weights, and says "
            f"nothing of one that goes on from a trained model: run stage control beside it"
        )
    if made_here:
        return (
            f"distillation is unlikely to pay: {price}, and the teacher is trained by this run for one student; plain "
            f"training of the student should win (arXiv:2502.08606), unless the teacher serves others too"
        )
    if tokens is None:
        return f"whether distillation pays depends on its tokens: set max_tokens or max_steps; {price}"
    per_parameter = tokens / student
    told = f"{per_parameter:.3g} tokens a parameter; {price}"
    if per_parameter <= _COMPUTE_OPTIMAL:
        return (
            f"distillation is likely to pay at this budget: the teacher is there already, and {told} "
            f"(arXiv:2502.08606; short of data below about {_COMPUTE_OPTIMAL})"
        )
    return (
        f"distillation may not pay at this budget: {told}; above about {_COMPUTE_OPTIMAL} the student no longer lacks "
        f"data, and from some threshold on, which grows with the student, plain training does as well "
        f"(arXiv:2502.08606): run stage control beside it on a part of the budget"
    )
