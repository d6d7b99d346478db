"""What a model folder is worth, measured on the folder: quality, speed, memory.

Each folder is opened in a process of its own, forked from a server that has imported the libraries and nothing else,
so one model's memory is not mistaken for another's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal
from models.heads import check_split, head_of, hidden_states
from models.load import DTYPES, attention_for, load_model, parameter_count
from models.objectives.block import Block
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.questions import Question, answered
from models.sparsity.zeros import share


@dataclass(frozen=True)
class Speed:
    """One prompt at a time, greedy, with the KV cache; medians over `repeats`."""

    prompt_tokens: int = 64
    new_tokens: int = 64
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 2 or self.repeats < 1:
            raise Refusal(f"{self}: need prompt_tokens and repeats of at least 1, new_tokens of at least 2")


@dataclass(frozen=True)
class Quiz:
    """Sets of questions, by name, and what it takes to ask them."""

    questions: dict[str, list[Question]]
    tokenizer: Any
    pad_token: int
    end: str  # the text that ends an answer
    batch_size: int
    per: str = "choice"  # of models.questions.PER


def open_for_inference(folder: str, device: str, dtype: str, trust_remote_code: bool = False) -> Any:
    kind = DTYPES[dtype]
    model = load_model(
        folder, dtype=kind, attention=attention_for("auto", device, kind), trust_remote_code=trust_remote_code
    )
    return model.to(device).eval()


@dataclass(frozen=True)
class _EachToken(CrossEntropy):
    values: list[Tensor] = field(default_factory=list)

    def add(self, block: Block) -> Tensor:
        self.values.append(super().add(block))
        return self.values[-1]


class Likelihood:
    """-log p in nats and how many targets, of each document that batches number in `documents`; all are one where they
    number none."""

    def __init__(self) -> None:
        self.nats_D, self.tokens_D = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)

    def add(self, nats_N: Tensor, documents_N: Tensor) -> None:
        nats_N, documents_N = nats_N.to("cpu", torch.float64), documents_N.cpu()
        more = int(documents_N.max()) + 1 - len(self.nats_D) if len(documents_N) else 0
        if more > 0:
            self.nats_D, self.tokens_D = (torch.cat([had, had.new_zeros(more)]) for had in (self.nats_D, self.tokens_D))
        self.nats_D.index_add_(0, documents_N, nats_N)
        self.tokens_D.index_add_(0, documents_N, torch.ones_like(documents_N))

    @property
    def nats(self) -> float:
        return float(self.nats_D.sum())

    @property
    def tokens(self) -> int:
        return int(self.tokens_D.sum())

    @property
    def perplexity(self) -> float:
        nats = self.nats / self.tokens
        return math.inf if nats > 700 else math.exp(nats)


@torch.no_grad()
def likelihood_of(model: Any, batches: Iterable[dict[str, Tensor]]) -> Likelihood:
    """Over all of the model's columns, as anyone else would compute it; in fp32, a chunk of tokens at a time."""
    found = Likelihood()
    device = next(model.parameters()).device
    for batch in batches:
        moved = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "targets")}
        hidden = hidden_states(model, moved["input_ids"], moved["position_ids"])
        each = _EachToken()
        objective_sum(each, hidden, head_of(model), moved["targets"])
        if each.values:
            found.add(torch.cat(each.values), documents_of(batch)[batch["targets"] >= 0])
    return found


def documents_of(batch: dict[str, Tensor]) -> Tensor:
    """Int64[B, T]: the number of each token's document."""
    return batch.get("documents", torch.zeros_like(batch["targets"]))


@torch.no_grad()
def speed(model: Any, prompt: Tensor, settings: Speed) -> dict[str, float]:
    """`prompt`: Int64[1, T]. Prefill is the forward over the prompt; generation is what comes after the first token."""
    prompt = prompt.to(next(model.parameters()).device)

    def generate(new_tokens: int) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
        _synchronise(prompt)

    def prefill() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        _synchronise(prompt)

    return rates(generate, prefill, prompt.shape[1], settings)


def rates(
    generate: Callable[[int], object], prefill: Callable[[], object], prompt_tokens: int, settings: Speed
) -> dict[str, float]:
    """Of a runtime that has done its work when these return: `generate(new_tokens)` from a prompt, and `prefill()`."""

    def seconds(work: Callable[..., object], *words: int) -> float:
        begin = time.perf_counter()
        work(*words)
        return time.perf_counter() - begin

    generate(2), prefill()  # warm up
    first = statistics.median(seconds(generate, 1) for _ in range(settings.repeats))
    whole = statistics.median(seconds(generate, settings.new_tokens) for _ in range(settings.repeats))
    return {
        "generate_tokens_per_second": (settings.new_tokens - 1) / max(whole - first, 1e-9),
        "prefill_tokens_per_second": prompt_tokens
        / statistics.median(seconds(prefill) for _ in range(settings.repeats)),
        "first_token_ms": 1000 * first,
    }


@torch.no_grad()
def cache_bytes_per_token(model: Any, prompt: Tensor) -> float | None:
    """Of the keys and values that generation keeps of a token that is in its window, in the dtype the model runs in.

    `prompt`: Int64[1, T]. None where a model keeps something else.
    """
    prompt = prompt.to(next(model.parameters()).device)
    cache = getattr(model(input_ids=prompt, use_cache=True), "past_key_values", None)
    kept = [
        each
        for layer in getattr(cache, "layers", [])
        for each in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if each is not None and each.ndim == 4
    ]
    return sum(each.numel() * each.element_size() / each.shape[-2] for each in kept) or None


class PeakMemory:
    """Bytes taken since the start, at their highest: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or new tensors would seem to cost nothing
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
        self.before = self._read("VmRSS")

    def bytes(self) -> int:
        return self._read("VmHWM") - self.before

    def _read(self, field: str) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
        return int(line.split()[1]) * 1024


def _names(questions: Sequence[Question]) -> list[str]:
    """One for each, the same for every model; some questions have one text, and documents or answers of their own."""
    seen: Counter[tuple[str, str]] = Counter()
    names = []
    for question in questions:
        key = (question.asked, question.answer)
        names.append(json.dumps([*key, seen[key]]))
        seen[key] += 1
    return names


def measure_folder(
    folder: str,
    batches: list[dict[str, Tensor]],
    text_bytes: int,
    prompt: Tensor,
    device: str,
    dtype: str,
    settings: Speed | None,
    packed: bool,
    trust_remote_code: bool = False,
    quiz: Quiz | None = None,
    record: Path | None = None,
) -> dict[str, Any]:
    """One row of the report. `text_bytes`: UTF-8 bytes of the text that the batches' targets stand for. `record`: of a
    quantized model, which is scored with activations and cache rounded as that says; its speed is the plain model's.
    `settings` None: neither speed nor the memory of a request is measured.

    With a `quiz` also `right`: for each of its sets, whether each question was answered right, by its text.
    """
    if settings is not None and device == "cpu":
        # Once for nothing: the libraries' code that loads on first use is as large as a small model.
        model = open_for_inference(folder, device, dtype, trust_remote_code)
        speed(model, prompt[:, :2], Speed(new_tokens=2, repeats=1))
        del model
    memory = PeakMemory(device)
    model = open_for_inference(folder, device, dtype, trust_remote_code)
    quick: dict[str, float] = {}
    if settings is not None:
        short = _within(prompt, getattr(model.config, "max_position_embeddings", None), settings)
        quick = speed(model, short, settings)
        # what serving one request takes; scoring long texts below is another matter
        quick["peak_memory_bytes"] = memory.bytes()
    check_split(model, model.config.vocab_size, packed)
    if record is not None:
        from models.quantization.proof import round_as_quantized
        from models.quantization.stored import open_quantized

        round_as_quantized(model, open_quantized(record))
    found = likelihood_of(model, batches)
    right = {}
    for name, questions in (quiz.questions if quiz else {}).items():
        assert quiz is not None
        told = answered(model, questions, quiz.tokenizer, quiz.pad_token, quiz.end, quiz.batch_size, quiz.per)
        right[name] = dict(zip(_names(questions), told, strict=True))
    zeros, cache = share(model), cache_bytes_per_token(model, prompt)
    return {
        "parameters": parameter_count(model),
        **_scores(found, text_bytes),
        **quick,
        **({} if cache is None else {"cache_bytes_per_token": cache}),
        **({} if zeros is None else {"zeros": zeros}),
        **({"right": right} if quiz else {}),
    }


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def pieces(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids, targets, number of its document) of each piece with something to predict, Int64[T] each, without
    padding."""
    found = []
    rows = (batch["input_ids"], batch["position_ids"], batch["targets"], documents_of(batch))
    for ids_T, positions_T, targets_T, documents_T in zip(*rows, strict=True):
        begins = [*(positions_T == 0).nonzero()[:, 0].tolist(), len(ids_T)]
        for begin, end in pairwise(begins):  # padding is a piece of its own, without targets
            if bool((targets_T[begin:end] >= 0).any()):
                found.append((ids_T[begin:end], targets_T[begin:end], documents_T[begin:end]))
    return found


def likelihood_served(runtime: Any, batches: Iterable[dict[str, Tensor]]) -> Likelihood:
    """As likelihood_of, of an export as its runtime reads it: a piece at a time."""
    found = Likelihood()
    for batch in batches:
        for ids_T, targets_T, documents_T in pieces(batch):
            real_T = targets_T >= 0
            logits_TV = runtime.logits(ids_T[None])[0][real_T]
            nats_N = torch.nn.functional.cross_entropy(logits_TV.float(), targets_T[real_T], reduction="none")
            found.add(nats_N, documents_T[real_T])
    return found


def _scores(found: Likelihood, text_bytes: int) -> dict[str, Any]:
    return {
        "perplexity": found.perplexity,
        "bits_per_byte": found.nats / math.log(2) / text_bytes,
        "nats_D": found.nats_D.tolist(),
        "tokens_D": found.tokens_D.tolist(),
    }


def measure_export(
    form: Any,  # models.formats.format.Format
    folder: str,
    batches: list[dict[str, Tensor]],
    text_bytes: int,
    prompt: Tensor,
    device: str,
    settings: Speed | None,
) -> dict[str, Any]:
    """One row of the report, of a folder that `form` has written."""
    runtime, quick = served(form, Path(folder), prompt, device, settings)
    return {
        **_scores(likelihood_served(runtime, batches), text_bytes),
        **quick,
        "runtime": runtime.name,
    }


def served(
    form: Any,  # models.formats.format.Format
    folder: Path,
    prompt: Tensor,
    device: str,
    settings: Speed | None,
) -> tuple[Any, dict[str, float]]:
    """(runtime, speed and memory of one request): nothing of the latter where the format's own runtime cannot be had
    here, as they would be another one's, or where `settings` is None. `prompt`: Int64[1, T]."""
    if settings is None:
        return form.open(folder, device), {}
    if device == "cpu":
        runtime = form.open(folder, device)  # once for nothing, as in measure_folder
        runtime.speed(prompt[:, :2], Speed(new_tokens=2, repeats=1))
        runtime.close()
        del runtime
    memory = PeakMemory(device)
    runtime = form.open(folder, device)
    if not runtime.serves:
        return runtime, {}
    prompt = _within(prompt, runtime.limit, settings)
    return runtime, {**runtime.speed(prompt, settings), "peak_memory_bytes": memory.bytes()}


def _within(prompt: Tensor, limit: int | None, settings: Speed) -> Tensor:
    """So much of Int64[1, T] that what is generated behind it has its places too."""
    return prompt if limit is None else prompt[:, : max(1, limit - settings.new_tokens)]
