"""What answers at a served teacher's address: its kind, its model, and the dialect it is asked in."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from models.errors import Refusal
from models.teachers import dialects
from models.teachers.connection import Connection
from models.teachers.dialects.dialect import Continue, Dialect, Generation, Row

OTHERS = "openai"  # the dialect of servers of unknown kind


@dataclass(frozen=True)
class Served:
    """What answers at the url. `kind` is a dialect's name, or unknown: any other OpenAI-compatible server."""

    kind: str
    model: str


@cache
def known_dialects() -> dict[str, type[Any]]:
    """Every dialect by its name: of each file in models/teachers/dialects, the class that continues text."""
    found = {}
    for entry in pkgutil.iter_modules(dialects.__path__):
        module = import_module(f"{dialects.__name__}.{entry.name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "name"):
                found[str(kind.name)] = kind
    return found


def names_to_choose() -> tuple[str, ...]:
    """Values of teacher.endpoint.dialect."""
    return ("auto", *(name for name, kind in known_dialects().items() if kind.cannot_score is None))


class Server:
    """Found out once for each call, before its threads begin. Nothing is asked that is known."""

    def __init__(self, connection: Connection, dialect: str, model: str | None) -> None:
        self.connection, self.chosen = connection, dialect
        self.given_model = model
        self.speaks = {name: kind(connection) for name, kind in known_dialects().items()}
        self.kind = ""  # a dialect's name: who answers
        self.scoring: Dialect = self.speaks[OTHERS]  # how it scores given tokens

    def ask(self) -> Served:
        self.settle()
        return Served("unknown" if self.kind == OTHERS else self.kind, self.connection.model)

    def settle(self) -> None:
        """Find out the kind of server, and the model's name where none was given."""
        connection, chosen = self.connection, self.chosen
        connection.model = self.given_model or ""
        if chosen != "auto" and (connection.model or not self.speaks[chosen].names_model):
            self.kind = chosen
            return
        listed = connection.look(f"{connection.base}/models")
        models = listed.get("data") or [{}]
        self.kind = self._recognised(str(models[0].get("owned_by"))) or (chosen if chosen != "auto" else OTHERS)
        connection.model = connection.model or str(models[0].get("id") or "")
        if not connection.model:
            if self.kind == OTHERS:
                raise Refusal(
                    f"teacher.endpoint.url={connection.url}: it lists no model; see that it ends in /v1, or set "
                    f"teacher.endpoint.model"
                )
            connection.model = self.kind  # these serve one model and ignore its name

    def check_lists(self, model: str) -> None:
        """Refuse a model that the server does not list, where it lists some and its requests name one."""
        if not self.speaks[self.kind].names_model:
            return
        listed = self.connection.look(f"{self.connection.base}/models").get("data")
        names = [str(one["id"]) for one in listed or [] if isinstance(one, dict) and one.get("id")]
        if names and model not in names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise Refusal(
                f"teacher.endpoint.model={model}: {self.connection.url} serves {', '.join(names[:5])}{more}; name "
                f"one of them"
            )

    def settle_scoring(self, ids: list[int]) -> None:
        """Find out how this server gives log-probabilities of given tokens; `ids` are some that it may be asked."""
        self.settle()
        name = self.chosen
        if name == "auto":
            if (reason := self.speaks[self.kind].cannot_score) is not None:
                raise Refusal(f"teacher.endpoint.url={self.connection.url}: {reason}")
            name = self.kind if self.kind != OTHERS else self._answering((ids * 2)[:2])
        self.connection.dialect, self.scoring = name, self.speaks[name]

    def rows(self, ids: list[int]) -> list[Row]:
        """As Dialect.rows. Raises Refusal where the answer has another shape."""
        try:
            return self.scoring.rows(ids)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, Refusal):  # which is a ValueError
                raise
            raise self.connection.unusable(
                f"its answer has another shape ({problem!r}); see teacher.endpoint.dialect"
            ) from None

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation:
        return self.speaks[self.kind].continuation(prompt, settings, seed)

    def _recognised(self, owner: str) -> str:
        """The dialect's name, or nothing."""
        for name, dialect in self.speaks.items():
            if owner == dialect.owner:
                return name
        return next((name for name, dialect in self.speaks.items() if dialect.recognises()), "")

    def _answering(self, ids: list[int]) -> str:
        return next((name for name, dialect in self.speaks.items() if dialect.answers(ids)), OTHERS)
