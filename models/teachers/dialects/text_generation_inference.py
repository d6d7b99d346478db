"""Hugging Face's text-generation-inference: OpenAI's completions, without log-probabilities of other tokens."""

from __future__ import annotations

from typing import ClassVar

from models.teachers.connection import Connection
from models.teachers.dialects.dialect import Continue, Generation, Row
from models.teachers.dialects.openai import OpenAI


class TextGenerationInference:
    name: ClassVar[str] = "tgi"
    owner: ClassVar[str | None] = None
    names_model: ClassVar[bool] = True
    cannot_score: ClassVar[str | None] = (
        "text-generation-inference gives only the log-probabilities of a prompt's own tokens, not the best k beside "
        "them; serve the teacher with vLLM or llama.cpp"
    )

    def __init__(self, connection: Connection) -> None:
        self.connection, self.plain = connection, OpenAI(connection)

    def recognises(self) -> bool:
        return self.connection.look(f"{self.connection.root}/info").get("router") == "text-generation-router"

    def answers(self, ids: list[int]) -> bool:
        return False

    def rows(self, ids: list[int]) -> list[Row]:
        raise self.connection.unusable(str(self.cannot_score))

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation:
        return self.plain.continuation(prompt, settings, seed)
