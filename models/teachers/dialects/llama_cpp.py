"""llama.cpp's own server: /completion, one token at a time, from a cache of the prefix."""

from __future__ import annotations

from typing import ClassVar

from models.teachers.connection import Connection
from models.teachers.dialects.dialect import Continue, Generation, Row, values_of

# The server withholds the probabilities of a token that ends inside a character; no more of them are banned at once.
BANNED_AT_MOST = 256


class LlamaCpp:
    name: ClassVar[str] = "llama.cpp"
    owner: ClassVar[str | None] = "llamacpp"
    names_model: ClassVar[bool] = False
    cannot_score: ClassVar[str | None] = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.harmless: int | None = None  # a token whose probabilities the server does not withhold

    def recognises(self) -> bool:
        return "default_generation_settings" in self.connection.look(f"{self.connection.root}/props")

    def answers(self, ids: list[int]) -> bool:
        return False  # recognised by its owner or its page

    def rows(self, ids: list[int]) -> list[Row]:
        return [self._row(ids[:end]) for end in range(1, len(ids))]

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation:
        plain = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "return_tokens": True}
        plain |= {"n_predict": settings.max_new_tokens, "n_probs": 1}
        answer = self.connection.post(f"{self.connection.root}/completion", settings.body(prompt, seed) | plain)
        reason = "length" if answer.get("stop_type") == "limit" else "stop"
        ids, entries = answer.get("tokens") or None, answer.get("completion_probabilities")
        values = values_of(ids, entries, lambda one: (one["id"], one["logprob"]))
        return Generation(str(answer.get("content", "")), ids, reason, values)

    def _row(self, prefix: list[int]) -> Row:
        """One generated token's `top_logprobs`: a softmax of the raw logits, whatever is sampled from them.

        The server keeps the prefix in its cache, so that each costs one token. Which token it samples does not matter,
        except that it withholds the numbers of one that ends inside a UTF-8 character; such a one is banned, and once a
        token is known to be none it is made to win everywhere.
        """
        connection = self.connection
        banned: list[int] = []
        for _ in range(BANNED_AT_MOST):
            harmless = None if banned else self.harmless
            answer = connection.post(
                f"{connection.root}/completion",
                {
                    "prompt": prefix,
                    "n_predict": 1,
                    "n_probs": connection.top_k,
                    "temperature": 0.0,
                    "cache_prompt": True,
                    "return_tokens": True,
                    "logit_bias": [[token, False] for token in banned]
                    + ([[harmless, 1e6]] if harmless is not None else []),
                    "response_fields": ["completion_probabilities", "tokens", "tokens_predicted", "tokens_evaluated"],
                },
            )
            if answer.get("tokens_evaluated") != len(prefix):
                raise connection.unusable(
                    f"it read {answer.get('tokens_evaluated')} tokens where {len(prefix)} were sent; is it llama.cpp's?"
                )
            entries, sampled = answer.get("completion_probabilities") or [], answer.get("tokens") or []
            if len(entries) == 1 and answer.get("tokens_predicted") == 1:
                if "top_logprobs" not in entries[0]:
                    raise connection.unusable(
                        "it gives probabilities without ids; llama.cpp does since December 2024: update it"
                    )
                self.harmless = entries[0].get("id")
                return {one["id"]: one["logprob"] for one in entries[0]["top_logprobs"]}
            if not sampled or sampled[0] in banned:
                break
            banned.append(sampled[0])
        raise connection.unusable("it gives no completion_probabilities; is it llama.cpp's server?")
