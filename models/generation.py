"""Text that a model makes: greedy, by beams or drawn, with its KV cache, many prompts at a time; and what it costs.

What is drawn for a prompt depends on the model, the prompt and the seed alone: every draw takes its random number from
a counter that is keyed by them, so neither the batch, nor the order, nor the number of ranks has a say. In float32 that
makes the text itself the same; in lower precision a batch of another size rounds otherwise, and where two tokens are as
good as level the other one can come out.

Legend: B sequences, T tokens, N answers' tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria

from models import seeds
from models.errors import Refusal
from models.heads import head_of, hidden_states, through_head

_LOGITS_AT_ONCE = 2**24  # numbers; 64 MB in fp32


@dataclass(frozen=True)
class Sampling:
    """How a continuation is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 takes the likeliest token: greedy, or beams
    top_p: float = 1.0  # draws from the fewest tokens that together have this probability
    beams: int = 1
    samples: int = 1  # answers to each prompt
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams", "samples"):
            if getattr(self, name) < 1:
                raise Refusal(f"sampling.{name}={getattr(self, name)}: need at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise Refusal(f"sampling.temperature={self.temperature}: need 0 (greedy) or more; 1 is the model's own")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"sampling.top_p={self.top_p}: need (0, 1]; 1 draws from the whole vocabulary")
        if self.beams > 1 and self.temperature:
            raise Refusal(
                f"sampling.beams={self.beams} with temperature={self.temperature}: beams are searched, not drawn; "
                f"set temperature=0, or beams=1"
            )
        if self.samples > 1 and not self.temperature:
            raise Refusal(
                f"sampling.samples={self.samples} with temperature=0: they would all be the same; set temperature=1, "
                f"or samples=1"
            )
        if self.top_p < 1 and not self.temperature:
            raise Refusal(f"sampling.top_p={self.top_p} with temperature=0: nothing is drawn; set temperature=1")


@dataclass(frozen=True)
class Answer:
    ids: list[int]  # with the end token, or the tokens of the stop, where it ended by one
    finish_reason: str  # "stop" or "length"


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    pad_token: int,
    end_tokens: Sequence[int],
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    batch_size: int = 16,
    synced: bool = False,
    use_cache: bool = True,
) -> Iterator[tuple[int, list[Answer]]]:
    """(number of the prompt, its `samples` answers), in batches of similar length, the longest first.

    `stop`: texts that end an answer, looked for in the answer alone; needs `tokenizer`. With it the columns that a
    padded vocabulary has beyond the tokenizer's are never chosen. `batch_size`: answers made at once, memory only.
    `synced`: the model's weights are spread over ranks, all of which must call this with equally many prompts.

    The model answers in eval mode and without graph, and is found as it was left at every yield. Raises Refusal for a
    prompt without tokens.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise Refusal(f"prompt {number} holds no token; begin it with the tokenizer's begin token, or leave it out")
    if stop and tokenizer is None:
        raise ValueError("stop needs the tokenizer")
    rows = [(number, sample) for number in range(len(prompts)) for sample in range(sampling.samples)]
    rows.sort(key=lambda row: (-len(prompts[row[0]]), row))
    width = max(1, batch_size // sampling.beams)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=sampling.beams,
        use_cache=use_cache,
        pad_token_id=pad_token,
        eos_token_id=list(end_tokens) or None,
        return_dict_in_generate=True,
    )
    matcher = StopStringCriteria(tokenizer, list(stop)) if stop else None
    vocabulary = None if tokenizer is None else len(tokenizer)
    waiting: list[Answer] = []
    for begin in range(0, len(rows), width):
        some = rows[begin : begin + width]
        batch = [prompts[number] for number, _ in some]
        numbers_BT = _numbers(batch, [sample for _, sample in some], sampling) if sampling.temperature else None
        ends = _Ends(max(map(len, batch)), end_tokens, matcher)
        choice = _Choice(sampling, numbers_BT, vocabulary, ends.start)
        for (number, _), answer in zip(some, _answers(model, batch, config, choice, ends, synced), strict=True):
            waiting.append(answer)
            if len(waiting) == sampling.samples:
                yield number, waiting
                waiting = []


def listed_ends(named: Any, first: int | None) -> list[int]:
    """`first`, and the end tokens that a config names in `named`: one, several or none."""
    listed = named if isinstance(named, list | tuple) else [named]
    return list(dict.fromkeys(int(token) for token in [first, *listed] if token is not None))


def end_tokens(tokenizer: Any, config: Any) -> list[int]:
    """What ends an answer: the tokenizer's end token, and what the model's generation config names beside it.

    Models that speak in turns end a turn by another token than a text. What is named but is an ordinary word of the
    tokenizer ends nothing: families have defaults, which say nothing of this tokenizer.
    """
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    first = tokenizer.eos_token_id
    return [token for token in listed_ends(getattr(config, "eos_token_id", None), first) if token in {first, *known}]


def log_probabilities(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token: int,
    batch_size: int = 16,
    vocabulary: int | None = None,
) -> list[list[float]]:
    """Natural log p of each token of the continuation after (prompt, continuation)'s prompt, at temperature 1.

    One teacher-forced pass, fp32; `vocabulary`: over the first so many columns, None: over all. Raises Refusal for a
    prompt without tokens.
    """
    for number, (prompt, answer) in enumerate(pairs):
        if not len(prompt) and len(answer):
            raise Refusal(f"prompt {number} holds no token, so the first token after it has no distribution")
    order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0]) - len(pairs[number][1]))
    told: list[list[float]] = [[] for _ in pairs]
    for begin in range(0, len(order), batch_size):
        some = order[begin : begin + batch_size]
        for number, values in zip(some, _scores(model, [pairs[n] for n in some], pad_token, vocabulary), strict=True):
            told[number] = values
    return told


@contextmanager
def _in_eval(model: Any) -> Iterator[None]:
    """Eval mode, and afterwards each module's own: dropout of a frozen part is not switched on by coming back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """What a folder's generation_config.json asks for (penalties, top-k, other ends) is not what is asked for here."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def _answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    choice: _Choice,
    ends: _Ends,
    synced: bool,
) -> list[Answer]:
    device = next(model.parameters()).device
    ids_BT = torch.full((len(prompts), ends.start), config.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, ends.start - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[row, ends.start - len(prompt) :] = 1
    with _in_eval(model), _plain(model):
        out = model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
            logits_processor=[choice],
            stopping_criteria=[ends],
            synced_gpus=synced,
        )
    made_BT = out.sequences[:, ends.start :]
    if config.num_beams == 1:
        lengths_B = torch.where(ends.length_B > 0, ends.length_B, made_BT.shape[1])
    else:
        lengths_B = (out.beam_indices >= 0).sum(-1)  # of the best beam, -1 beyond its end
    answers = []
    for ids_T, length in zip(made_BT.cpu(), lengths_B.tolist(), strict=True):
        ids_T = ids_T[:length]
        answers.append(Answer(ids_T.tolist(), "stop" if bool(ends.at_end(ids_T[None])) else "length"))
    return answers


class _Ends(StoppingCriteria):
    """An answer ends with an end token, or as soon as a stop is in its text; this remembers after how many tokens.

    transformers' own criterion for stops also looks at the prompt, and so at padding. And what it pads finished rows
    with may be a token that an answer can hold.
    """

    def __init__(self, start: int, end_tokens: Sequence[int], matcher: StopStringCriteria | None) -> None:
        self.start, self.matcher = start, matcher
        self.end_tokens = torch.tensor(list(end_tokens), dtype=torch.long)
        self.length_B = torch.zeros(0, dtype=torch.long)

    def at_end(self, made_BT: Int[Tensor, "B T"]) -> Bool[Tensor, " B"]:
        ended_B = torch.isin(made_BT[:, -1], self.end_tokens.to(made_BT.device))
        if self.matcher is not None:
            ended_B |= self.matcher(made_BT, None).to(made_BT.device)
        return ended_B

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        made_BT = input_ids[:, self.start :]
        ended_B = self.at_end(made_BT)
        if len(self.length_B) != len(ended_B):
            self.length_B = torch.zeros_like(ended_B, dtype=torch.long)
        self.length_B = torch.where((self.length_B == 0) & ended_B, made_BT.shape[1], self.length_B)
        return ended_B


class _Choice(LogitsProcessor):
    """Leaves only the token that was drawn, for a greedy search to find; without numbers, only padding is masked."""

    def __init__(self, sampling: Sampling, numbers_BT: Tensor | None, vocabulary: int | None, start: int) -> None:
        self.sampling, self.numbers_BT, self.vocabulary, self.start = sampling, numbers_BT, vocabulary, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.vocabulary is not None:
            scores[:, self.vocabulary :] = -torch.inf
        if self.numbers_BT is None:
            return scores
        if scores.isnan().any():
            raise Refusal(
                f"the model's logits are no numbers in {str(scores.dtype).removeprefix('torch.')}, so nothing can be "
                f"drawn; use float32, or see to its weights"
            )
        number_B = self.numbers_BT[:, input_ids.shape[1] - self.start].to(scores.device)
        chosen_B = drawn(scores, number_B, self.sampling.temperature, self.sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


def drawn(
    logits_BV: Float[Tensor, "B V"], number_B: Float[Tensor, " B"], temperature: float, top_p: float
) -> Int[Tensor, " B"]:
    """The token at which the cumulated probability passes a number of [0, 1), after temperature and top-p.

    Cumulated in the order of the vocabulary, not of the probabilities: tokens that are as good as level would change
    places by rounding, and with them the choice.
    """
    p_BV = (logits_BV.double() / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(stable=True, dim=-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # what comes before has all of it already
        p_BV = p_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV), 0.0)
    cumulated_BV = p_BV.cumsum(-1)
    total_B1 = cumulated_BV[:, -1:].contiguous()
    # Rounding could lift the product to the total, beyond the last token.
    at_B1 = torch.minimum(number_B.double()[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulated_BV, at_B1, right=True).squeeze(1)


def _numbers(prompts: Sequence[Sequence[int]], samples: Sequence[int], sampling: Sampling) -> Tensor:
    """Float64[B, max_new_tokens] in [0, 1): a row's first numbers are the same however many are asked for."""
    rows = [
        np.random.Generator(np.random.Philox(key=seeds.of_answer(sampling.seed, prompt, sample))).random(
            sampling.max_new_tokens
        )
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def _scores(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token: int, vocabulary: int | None
) -> list[list[float]]:
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    width = max(1, *lengths)
    ids_BT = torch.full((len(pairs), width), pad_token)
    positions_BT = torch.zeros_like(ids_BT)
    wanted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)  # where the next token is of the continuation
    for row, ((prompt, answer), length) in enumerate(zip(pairs, lengths, strict=True)):
        ids_BT[row, :length] = torch.as_tensor([*prompt, *answer])
        positions_BT[row] = torch.cat([torch.arange(length), torch.arange(width - length)])
        wanted_BT[row, len(prompt) - 1 : length - 1] = len(answer) > 0
    next_N = ids_BT.roll(-1, 1)[wanted_BT].to(device)

    def work(hidden_NH: Tensor) -> Float[Tensor, " N"]:
        head = head_of(model)
        chunk = max(1, _LOGITS_AT_ONCE // len(head.weight))
        told = []
        for some_NH, some_N in zip(hidden_NH.split(chunk), next_N.split(chunk), strict=True):
            log_NV = head.logits(some_NH, torch.float32)[:, :vocabulary].log_softmax(-1)
            told.append(log_NV.gather(1, some_N[:, None]).squeeze(1))
        return torch.cat(told)

    with _in_eval(model):
        hidden_BTH = hidden_states(model, ids_BT.to(device), positions_BT.to(device))
        told_N: Tensor = through_head(model, hidden_BTH[wanted_BT.to(device)], work)
    return [part.tolist() for part in told_N.cpu().split([len(answer) for _, answer in pairs])]
