"""A stage that trains, as the doctor runs it: on some of its text, for two steps, with a probe inside."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import Any

from models.errors import Refusal
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.sequences import Sequences
from pipeline.data.tokenizer import first_difference, load_tokenizer
from pipeline.doctor import machine, text
from pipeline.doctor.findings import Finding, finding
from pipeline.doctor.probe import FINDINGS
from pipeline.stages.stage import Stage
from pipeline.tracked import tracker_of
from pipeline.training.prepare import Prepared

STEPS = 2
MICRO_BATCHES = 2  # of a rank and step, at most
TEXT_FINDINGS = "findings-of-text.json"
_ROWS = 32  # that are decoded


class Examined:
    """Stands in for `stage` where its processes run (pipeline/worker.py)."""

    def __init__(self, stage: Stage, context: Context) -> None:
        made: Any = stage
        training = made.training
        least = training.micro_batch * context.world * MICRO_BATCHES
        batch = min(training.global_batch, least) if training.global_batch % least == 0 else training.global_batch
        short = {"max_steps": STEPS, "max_tokens": None, "epochs": None, "validate_every_steps": None}
        self.stage: Any = replace(
            made,
            data=made.data.sample(max(200, 20 * batch)),
            training=replace(training, global_batch=batch, **short),
        )

    def prepare(self, context: Context) -> None:
        self.stage.prepare(context)
        found = [each.as_json() for each in self._of_text(context)]
        artifact.write_json(context.work / TEXT_FINDINGS, {"found": found})

    def run(self, context: Context) -> None:
        self.stage.run(context)
        if context.rank != 0:
            return
        path = context.work / FINDINGS
        found = [Finding(**each) for each in json.loads(path.read_text())["found"]]
        found += [
            self._saved_tokenizer(context),
            machine.tracker_answers(tracker_of(context.config["doctor"]["asked"])),
        ]
        artifact.write_json(path, {"found": [each.as_json() for each in found]})

    def _of_text(self, context: Context) -> list[Finding]:
        """What needs no model: one process does it."""
        stage, prepared = self.stage, Prepared.read(context.work)
        rows = Sequences(prepared.train)
        started = load_tokenizer(prepared.start)
        teacher = stage.teacher if getattr(stage, "_taught", False) else None
        theirs = None if teacher is None else load_tokenizer(teacher.path, teacher.trust_remote_code)
        path = getattr(getattr(stage, "student", None), "path", None)
        own = load_tokenizer(path) if path else started
        align = bool(getattr(stage, "align", False))
        found = [text.tokens_are_the_same(own, theirs, align)]
        if align and theirs is not None:
            found.append(text.both_read_the_same_text(islice(rows, _ROWS), started, theirs))
        else:
            chat = bool(stage.data.check()["chat"])
            found.append(text.templates_are_the_same(stage.data, chat, own, theirs, text.rendered))
        return found

    def _saved_tokenizer(self, context: Context) -> Finding:
        """What is published reads text as the training did."""
        name = "saved model"
        try:
            started, saved = (load_tokenizer(str(folder)) for folder in (context.work / "start", context.out))
            difference = first_difference(started, saved)
        except Refusal as problem:
            return finding(name, False, str(problem), "the finished folder does not open; see above")
        told = difference or "written, and its tokenizer is that of the training"
        return finding(
            name, difference is None, told, "the tokenizer changes when it is saved; take the model's own files"
        )
