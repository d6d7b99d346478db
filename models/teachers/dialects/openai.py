"""OpenAI's completions, as any other compatible server speaks them: `echo` with `logprobs` scores given tokens."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from models.errors import Refusal
from models.teachers.connection import Connection, Rejected
from models.teachers.dialects.dialect import Continue, Generation, Row, choice_of, values_of


class OpenAI:
    name: ClassVar[str] = "openai"
    owner: ClassVar[str | None] = None
    names_model: ClassVar[bool] = True
    cannot_score: ClassVar[str | None] = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def recognises(self) -> bool:
        return False  # it is what remains

    def answers(self, ids: list[int]) -> bool:
        return False

    def rows(self, ids: list[int]) -> list[Row]:
        """The prompt's tokens and their best k, keyed `token_id:123` where the server can."""
        connection = self.connection
        body = {
            "model": connection.model,
            "prompt": ids,
            "max_tokens": 0,
            "temperature": 1.0,
            "echo": True,
            "logprobs": connection.top_k,
            "return_tokens_as_token_ids": True,
        }
        try:
            answer = connection.request(f"{connection.base}/completions", body)
        except Rejected as problem:
            if re.search(r"return_tokens_as_token_ids|\becho\b|must be a string", problem.message):
                raise connection.unusable(
                    f"the server says {problem.status}: {problem.message}; it cannot score given token ids: serve the "
                    f"teacher with vLLM or llama.cpp"
                ) from None
            raise connection.refusal(problem) from None
        logprobs = choice_of(answer).get("logprobs") or {}
        tokens, rows = logprobs.get("tokens"), logprobs.get("top_logprobs")
        if not isinstance(tokens, list) or not isinstance(rows, list) or min(len(tokens), len(rows)) < len(ids):
            raise connection.unusable(
                "it does not echo a prompt's log-probabilities, so it cannot score given tokens; serve the teacher "
                "with vLLM or llama.cpp"
            )
        if not all(str(token).startswith("token_id:") for token in tokens[: len(ids)]):
            raise connection.unusable(
                f"it names tokens by their text ({tokens[0]!r}), which several ids can share, and not by id "
                f"(return_tokens_as_token_ids); serve the teacher with vLLM or llama.cpp"
            )
        if [_token_id(token) for token in tokens[: len(ids)]] != ids:
            raise connection.unusable("it echoes other tokens than were sent; is the model the right one?")
        return [{_token_id(token): value for token, value in row.items()} for row in rows[1 : len(ids)]]

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation:
        try:
            return completed(self.connection, prompt, settings, seed, {})
        except Rejected as problem:
            refusal = self.connection.refusal(problem)
            if isinstance(prompt, str) or problem.status not in (400, 422):
                raise refusal from None
            raise Refusal(f"{refusal}; a server that takes no token ids takes text prompts") from None


def completed(
    connection: Connection, prompt: list[int] | str, settings: Continue, seed: int | None, own: dict[str, Any]
) -> Generation:
    """A continuation by /completions; `own`: what a dialect adds to the body. Raises Rejected."""
    body = settings.body(prompt, seed) | {"model": connection.model, "max_tokens": settings.max_new_tokens} | own
    choice = choice_of(connection.request(f"{connection.base}/completions", body))
    if not isinstance(choice.get("text"), str):
        raise connection.unusable("its completion holds no text; is it OpenAI-compatible?")
    ids, values = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    return Generation(
        choice["text"], ids, choice.get("finish_reason"), values_of(ids, values, lambda value: (None, value))
    )


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
