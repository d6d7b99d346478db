"""In the check of a stage that asks a served teacher: whether the server is there, and is what the stage needs."""

from __future__ import annotations

from models.errors import Refusal
from models.teachers.teacher import Source
from pipeline.context import Context


def check_server(context: Context, teacher: Source, scores: bool) -> list[str]:
    """Warnings for the plan. `scores`: whether log-probabilities of given tokens are needed. Raises Refusal where the
    server does not answer or has something else to offer.

    It is asked once. Under `dry_run` what it says is a warning; it is not asked for a stage that is finished, nor where
    it can serve its model only once a stage of this run has made it.
    """
    server = teacher.server
    if server is None:
        return []
    server.check()
    to_do = not context.finished(str(context.out)) or context.stage in context.config["force"]
    made_later = context.produced_by(teacher.path) and not context.finished(teacher.path)
    if not to_do or made_later:
        return []
    try:
        server.reach(scores)
    except Refusal as problem:
        if not context.config["dry_run"]:
            raise
        return [str(problem)]
    return []
