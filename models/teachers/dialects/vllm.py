"""vLLM: OpenAI's completions, with `prompt_logprobs` for given tokens and token ids in both directions."""

from __future__ import annotations

from typing import Any, ClassVar

from models.teachers.connection import Connection, Rejected
from models.teachers.dialects.dialect import Continue, Generation, Row, choice_of
from models.teachers.dialects.openai import completed


class Vllm:
    name: ClassVar[str] = "vllm"
    owner: ClassVar[str | None] = "vllm"
    names_model: ClassVar[bool] = True
    cannot_score: ClassVar[str | None] = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def recognises(self) -> bool:
        return False  # by its owner alone

    def answers(self, ids: list[int]) -> bool:
        connection = self.connection
        try:
            answer = connection.request(f"{connection.base}/completions", self._body(ids, 1))
        except Rejected:  # OpenAI's own schema knows no prompt_logprobs
            return False
        return bool(choice_of(answer).get("prompt_logprobs"))

    def rows(self, ids: list[int]) -> list[Row]:
        """`prompt_logprobs`: one entry a prompt token, null for the first; the token's own beside the best k."""
        connection = self.connection
        answer = connection.post(f"{connection.base}/completions", self._body(ids, connection.top_k))
        entries = choice_of(answer).get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(ids):
            count = len(entries) if isinstance(entries, list) else "no"
            raise connection.unusable(
                f"{count} prompt_logprobs for {len(ids)} tokens; it is not vLLM, or an older one with prefix caching "
                f"(start it with --no-enable-prefix-caching)"
            )
        rows: list[Row] = []
        for own, entry in zip(ids[1:], entries[1:], strict=True):
            if not isinstance(entry, dict) or str(own) not in entry:
                raise connection.unusable(
                    "its prompt_logprobs are of other tokens than were sent; is the model the right one?"
                )
            rows.append({int(token): one["logprob"] for token, one in entry.items()})
        return rows

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation:
        own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True, "logprobs": 1}
        try:
            return completed(self.connection, prompt, settings, seed, own)
        except Rejected as problem:
            raise self.connection.refusal(problem) from None

    def _body(self, ids: list[int], k: int) -> dict[str, Any]:
        # One token more than needed is generated: not all versions take 0.
        model = self.connection.model
        return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
