"""A teacher behind an OpenAI-compatible endpoint: asked once, in the stage `record`."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import Refusal
from models.objectives.term import Objective
from models.teachers.cached import refuse_representations
from models.teachers.endpoint import Endpoint
from models.teachers.recorded import Recorded
from models.teachers.teacher import SERVED, Opening, Source, Teacher


@dataclass(frozen=True)
class Served(Source):
    """vLLM or llama.cpp's server gives the top-k log-probabilities of every token; training reads them from `cache`.

    `path` holds the teacher's tokenizer and config; its weights are the server's. A server gives log-probabilities at
    temperature 1 alone, so the objective's divergence must be at temperature 1.
    """

    path: str
    cache: str
    endpoint: Endpoint
    dtype: str = "float32"
    trust_remote_code: bool = False

    @property
    def recorded(self) -> str:
        return self.cache

    @property
    def server(self) -> Endpoint:
        return self.endpoint

    def key(self, content_hash: str) -> str:
        # The server is asked where no model is named: what answers at an address can change.
        return f"{SERVED}{self.endpoint.model or self.endpoint.ask().model}"

    def check(self, objective: Objective) -> None:
        refuse_representations(objective)
        self.endpoint.check()
        for _, term in objective.terms:
            temperature = getattr(term, "temperature", 1.0)
            if term.needs_teacher and temperature != 1.0:
                raise Refusal(
                    f"objective: {term.name} at temperature={temperature:g}, and a server gives what lies beyond "
                    f"its top k at temperature 1 only; set the temperature of {term.name} to 1"
                )

    def open(self, opening: Opening) -> Teacher:
        return Recorded(self.cache, opening)
