"""A chat template is a program of somebody else's: it ends, or is refused."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from models.errors import Refusal
from pipeline.data import bounded as bound
from pipeline.data.documents import Documents
from pipeline.data.prompts import prompts_of
from pipeline.data.rendering import Template
from pipeline.data.tokenizer import train_tokenizer
from pipeline.data.turns import turns_of

TURNS = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" + (
    "{% endfor %}{% endfor %}"
)
MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"


def rendered(tokenizer: Any, template: str, messages: Any, where: str) -> Any:
    data = Documents(train="unread")
    return turns_of(tokenizer, data, Template(tokenizer, template)).rendered(messages, where)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(["the quick brown fox " * 20], 257, tmp_path_factory.mktemp("tokenizer") / "made")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PLAIN + LOOPS, "does not end: nothing after 0.5 s of computing"),
        (MARKED + LOOPS, "does not end: nothing after 0.5 s of computing"),
        (PLAIN + "{% set n = 9 %}{{ n ** (n ** n) > 0 }}", "does not end: nothing after 0.5 s of computing"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply"),
        ("{% if a %}" * 3000 + "{% endif %}" * 3000, "is nested too deeply"),
        ("{{ 'a' * 10 ** 15 }}", "takes more memory than there is"),
    ],
    ids=["loops", "loops of a marked one", "power", "macro", "nested", "memory"],
)
def test_a_template_that_does_not_end_is_refused(
    template: str, why: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "SECONDS", 0.5)
    with pytest.raises(Refusal, match=f"^(row 7|data): the chat template {why}; give another one"):
        rendered(tokenizer, template, TURNS, "row 7")
    (tmp_path / "it.jinja").write_text(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    data = Documents(train="unread", chat_template=str(tmp_path / "it.jinja"))
    with pytest.raises(
        Refusal, match=f"(a conversation that begins 'Is it.'|data|data.chat_template=.*): the chat template {why}"
    ):
        next(prompts_of(Dataset.from_list([{"messages": TURNS}]), tokenizer, data, None, Counter()))


def test_one_that_ends_leaves_no_timer_behind(tokenizer: Any) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    assert rendered(tokenizer, PLAIN, TURNS, "row 7")[0] == "user: Is it?\nassistant: It is.\n"
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_each_rendering_is_bounded_and_not_the_conversation(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = PLAIN + "{% for a in range(9) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    turns = TURNS * 20
    monkeypatch.setattr(bound, "SECONDS", 0.5)
    begin = time.process_time()
    assert len(rendered(tokenizer, slow, turns, "row 7")[1]) == 20
    assert time.process_time() - begin > 0.5, "the test renders too little to show anything"


def test_in_another_thread_it_is_rendered_too(tokenizer: Any) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(rendered(tokenizer, PLAIN, TURNS, "row 7")[0]))
    thread.start()
    thread.join()
    assert found == ["user: Is it?\nassistant: It is.\n"]
