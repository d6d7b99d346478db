"""The student's own text of each step: who writes it, what is kept of it, and how it becomes batches.

What a step reads depends on the seed, the step and the student's weights alone: ranks share the work of writing, then
all know all of it, so that the tokens are counted without asking again, and every rank keeps the same buffer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import seeds
from models.generation import generate
from models.load import unsharded
from models.objectives.chunked import objective_sum
from models.objectives.long_horizon import long_horizon_sum
from models.objectives.representation import RepresentationTerm
from models.objectives.term import Objective, Term
from models.sharding import gathered
from models.targets import IGNORED
from models.training.on_policy import OnPolicy

_DUE, _REPLAY, _WRITE = range(1, 4)  # streams of random numbers
_BLANK = -1  # in a list of examples: one that is skipped


@dataclass(frozen=True)
class Answered:
    """An example of the data by its number, and what the student wrote after its prompt: nothing, where it is
    skipped."""

    number: int
    ids: list[int]


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    weight: float | None  # of an answer's tokens, where examples are weighted: what its first token had
    teachers: list[list[int]]  # where the teacher has prompts of its own


@dataclass(frozen=True)
class _Step:
    """All of an optimizer step's examples, on every rank, and what they count."""

    numbers: list[int]
    examples: list[dict[str, Any]]
    supervised: float
    tokens: int


class Rollouts:
    """The student's text of each step: who writes it, what is kept of it, and how it becomes batches."""

    def __init__(
        self,
        values: OnPolicy,
        *,
        examples: Any,
        step_examples: Callable[[int], Iterable[Any]],
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        load_student: Callable[[], nn.Module],
        seed: int,
        pad_token: int,
        end_tokens: Sequence[int],
        skipped: Mapping[int, int] | None,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
    ) -> None:
        """`examples[number]` is one of the data, unpacked; `step_examples(step)`: a step's numbers, of all ranks.

        `tokenizer`: with it the student writes none of the columns that a padded vocabulary has beyond it. `skipped`
        (number → step): from that step on nothing is written for that example, and what was is not read again. Its
        place in a step and in the buffer stays, so that all others come when they would have come.
        """
        self.values, self.examples, self.step_examples, self.collate = values, examples, step_examples, collate
        self.seed, self.pad_token, self.tokenizer = seed, pad_token, tokenizer
        self.end_tokens, self.stop, self.skipped = end_tokens, stop, skipped or {}
        self.replica = Replica(load_student)
        self.buffer: deque[Answered] = deque(maxlen=values.replay_capacity)
        self.steps = self.generated_tokens = 0  # so far: on the student's text; tokens it wrote
        self._step: _Step | None = None

    def due(self, step: int) -> bool:
        """Whether a step is on the student's text: the same on all ranks, and known from the seed."""
        return self._draws(_DUE, step).random() < self.values.share

    def begin(self, student: nn.Module, step: int, *, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Have all examples of a step that is due written, for all its micro-batches. All ranks must call it."""
        self.steps += 1
        numbers = [int(number) for number in self.step_examples(step)]
        capacity = self.values.replay_capacity
        draws = self._draws(_REPLAY, step)
        if capacity and len(self.buffer) == capacity and draws.random() < self.values.replay_share:
            answered = [self.buffer[at] for at in draws.choice(capacity, len(numbers), replace=False)]
            answered = [Answered(one.number, []) if self._skips(one.number, step) else one for one in answered]
            prompts = [self._prompt(one.number, step) for one in answered]
        else:
            prompts = [self._prompt(number, step) for number in numbers]
            asked = [place for place, number in enumerate(numbers) if not self._skips(number, step)]
            told = [prompts[place].ids for place in asked]
            texts = self._write(self._writer(student, device), told, step, rank, world)
            written = dict(zip(asked, texts, strict=True))
            answered = [Answered(number, written.get(place, [])) for place, number in enumerate(numbers)]
            self.generated_tokens += sum(map(len, texts))
            self.buffer.extend(answered)
        both = list(zip(prompts, answered, strict=True))
        supervised = sum(len(one.ids) * (1 if prompt.weight is None else prompt.weight) for prompt, one in both)
        self._step = _Step(
            [_BLANK if self._skips(one.number, step) else one.number for one in answered],
            [_example(prompt, one.ids) for prompt, one in both],
            supervised or 1,  # all of the step skipped: its sum is 0, and is divided all the same
            sum(len(prompt.ids) + len(one.ids) for prompt, one in both if not self._skips(one.number, step)),
        )

    def take(self, batch: dict[str, Any], micro: int, *, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """In place of `batch`, micro-batch `micro` of the step that was begun last: as many examples."""
        assert self._step is not None
        count = len(batch["sequences"])
        mine = slice(count * (micro * world + rank), count * (micro * world + rank + 1))  # as the data order deals
        device = batch["input_ids"].device
        made = self.collate(self._step.examples[mine])
        return {
            **{name: value.to(device) for name, value in made.items()},
            "step_tokens": self._step.supervised,
            "tokens_of_step": self._step.tokens,
            "sequences": self._step.numbers[mine],
        }

    def objective(self, objective: Objective) -> Objective:
        """What of it applies to the student's text."""
        return _Corrected(objective)

    @property
    def sum(self) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """What sums the objective: the engine, or with all that MiniLLM has beside it."""
        if not self.values.long_horizon:
            return objective_sum
        return partial(long_horizon_sum, length_normalised=self.values.length_normalised)

    def metrics(self, step: int) -> dict[str, float]:
        """Of the first `step` steps."""
        return {"on_policy_share": self.steps / step, "generated_tokens": self.generated_tokens}

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """For the checkpoint; the same on every rank."""
        ids = [torch.tensor(answered.ids, dtype=torch.int32) for answered in self.buffer]
        return {"steps": self.steps, "generated_tokens": self.generated_tokens}, {
            "examples": torch.tensor([answered.number for answered in self.buffer], dtype=torch.int64),
            "lengths": torch.tensor([len(part) for part in ids], dtype=torch.int64),
            "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *ids]),
        }

    def load(self, counts: dict[str, int], state: dict[str, Tensor]) -> None:
        self.steps, self.generated_tokens = counts["steps"], counts["generated_tokens"]
        ids, lengths = state["ids"].tolist(), state["lengths"].tolist()
        ends = list(accumulate(lengths))
        self.buffer.clear()
        for number, length, end in zip(state["examples"].tolist(), lengths, ends, strict=True):
            self.buffer.append(Answered(number, ids[end - length : end]))

    def _write(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], step: int, rank: int, world: int
    ) -> list[list[int]]:
        """The model's answers. Ranks divide the prompts, and tell each other once, when all is written."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt), []).append(place)
        # The longest first, one rank after another: as even as can be known before anything is written.
        mine = sorted(places, key=lambda prompt: (-len(prompt), prompt))[rank::world]
        sampling = replace(self.values.sampling, seed=seeds.mixed(self.seed, self.values.sampling.seed, step, _WRITE))
        written: dict[int, list[int]] = {}
        for times in sorted({len(places[prompt]) for prompt in mine}):  # an equal prompt gets an answer of its own
            some = [prompt for prompt in mine if len(places[prompt]) == times]
            for number, answers in generate(
                model,
                some,
                replace(sampling, samples=times) if sampling.temperature else sampling,
                pad_token=self.pad_token,
                end_tokens=self.end_tokens,
                stop=self.stop,
                tokenizer=self.tokenizer,
                batch_size=self.values.batch_size,
            ):
                for at, place in enumerate(places[some[number]]):
                    written[place] = answers[at % len(answers)].ids
        if world > 1:
            told: list[Any] = [None] * world
            torch.distributed.all_gather_object(told, written)
            written = {place: ids for part in told for place, ids in part.items()}
        return [written[place] for place in range(len(prompts))]

    def _writer(self, student: nn.Module, device: torch.device) -> nn.Module:
        if not any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
            return student
        return self.replica.refreshed(student, device)

    def _skips(self, number: int, step: int) -> bool:
        return self.skipped.get(number, step + 1) <= step

    def _prompt(self, number: int, step: int) -> _Prompt:
        """Of an example; of one that is skipped a token of padding, which stands in its place."""
        example = self.examples[number]
        if self._skips(number, step):
            weight = 0.0 if "weights" in example else None
            return _Prompt([self.pad_token], weight, [[0]] if "teacher_targets" in example else [])
        first = next(at for at, target in enumerate(example["targets"]) if target != IGNORED)
        more = max(0, min(self.values.prompt_tokens, len(example["input_ids"]) - 1) - first - 1)
        weight = example["weights"][first] if "weights" in example else None
        return _Prompt(example["input_ids"][: first + 1 + more], weight, _teachers_prompts(example, more))

    def _draws(self, stream: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, step])


class Replica:
    """A whole copy, on every rank, of a student that ZeRO-3 has sharded.

    Weights are gathered one by one, once for all that is written with them; after that every rank writes by itself.
    With the shards each token would gather every weight again, and a rank that is done would have to wait with the
    others, or they for it for ever. It takes the memory of one set of weights.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self.load = load
        self.model: nn.Module | None = None

    def refreshed(self, student: nn.Module, device: torch.device) -> nn.Module:
        """With the student's weights of now. All ranks must call it, outside of the student's forward."""
        parameters = dict(student.named_parameters())
        if self.model is None:
            self.model = self._build()
            for name, mine in self.model.named_parameters():  # and not of buffers: rotary frequencies stay fp32
                mine.data = mine.data.to(parameters[name].dtype)
            self.model.to(device)
        for name, mine in self.model.named_parameters():
            with torch.no_grad(), gathered([parameters[name]]):
                mine.copy_(parameters[name])
        return self.model

    def _build(self) -> nn.Module:
        with unsharded():
            return self.load().requires_grad_(False)


@dataclass(frozen=True)
class _Corrected:
    """The terms of an objective that ask the teacher."""

    objective: Objective

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(weight, term) for weight, term in self.objective.terms if term.needs_teacher]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return self.objective.representations


def ends_of(examples: Any, sample: int = 256) -> list[int]:
    """Tokens that end what is supervised in most of the first examples, and stand nowhere else in it.

    Beside the tokenizer's own end token: a chat template's, or a task's separator.
    """
    total: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    for number in range(min(sample, len(examples))):
        targets = examples[number]["targets"]
        total.update(target for target in targets if target != IGNORED)
        ends.update(one for one, after in pairwise([*targets, IGNORED]) if one != IGNORED and after == IGNORED)
    return [token for token, times in ends.items() if 2 * times > ends.total() and times == total[token]]


def _teachers_prompts(example: dict[str, Any], more: int) -> list[list[int]]:
    """Each up to its first supervised token, and `more` beyond, as the student's."""
    if "teacher_targets" not in example:
        return []
    begins = [at for at, position in enumerate(example["teacher_position_ids"]) if position == 0]
    prompts = []
    for begin, end in zip(begins, [*begins[1:], len(example["teacher_input_ids"])], strict=True):
        first = next(at for at in range(begin, end) if example["teacher_targets"][at] != IGNORED)
        prompts.append(example["teacher_input_ids"][begin : first + 1 + more])
    return prompts


def _example(prompt: _Prompt, ids: list[int]) -> dict[str, Any]:
    """Prompt and answer as the data hold them: the answer is supervised, its end token included."""
    example: dict[str, Any] = dict(
        zip(("input_ids", "position_ids", "targets"), _columns(prompt.ids, ids), strict=True)
    )
    if prompt.weight is not None:
        example["weights"] = [0.0] * (len(prompt.ids) - 1) + [prompt.weight] * len(ids) + [0.0]
    if prompt.teachers:
        columns = [_columns(teachers, ids) for teachers in prompt.teachers]
        for name, parts in zip(("input_ids", "position_ids", "targets"), zip(*columns, strict=True), strict=True):
            example[f"teacher_{name}"] = [value for part in parts for value in part]
    return example


def _columns(prompt: list[int], ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    together = prompt + ids
    return together, list(range(len(together))), [IGNORED] * (len(prompt) - 1) + ids + [IGNORED]
