"""A recorded signal against the dense teacher; what the files keep, and what they refuse."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import seeds
from models.errors import Refusal
from models.objectives.adaptive_kl import AdaptiveKL
from models.objectives.chunked import objective_sum
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.representation import Wanted
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Dense, Signal
from models.objectives.top_k import TopK as TopKDivergence
from models.objectives.total_variation import TotalVariation
from models.objectives.universal_logit import UniversalLogit
from models.teachers.cache import HEAD, HEADER, Cache, Header, save_head, write_header, write_index
from models.teachers.cached import Cached
from models.teachers.encodings.encoding import Encoding, Payload, describe
from models.teachers.encodings.fidelity import fidelity
from models.teachers.encodings.hidden_states import HiddenStates
from models.teachers.encodings.sampled import Sampled
from models.teachers.encodings.top_k import TopK
from models.teachers.endpoint import Endpoint
from models.teachers.pieces import key_of, pieces_of, scan
from models.teachers.recorded import Recorded
from models.teachers.served import Served
from models.teachers.shards import Shard, Writer
from models.teachers.teacher import Opening, Source
from pipeline.data.rows import Rows

CPU = torch.device("cpu")
N, V, H = 13, 41, 12

# --- the dense truth, in fp64 and without a line of the project's ---


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


FORMULAS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward_kl": (ForwardKL, kl),
    "reverse_kl": (ReverseKL, lambda p, q: kl(q, p)),
    "jensen_shannon": (JensenShannon, js),
}


def probabilities(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    return (hidden.double() @ head.weight.double().T / temperature).softmax(-1)


def in_buckets(p: Tensor, ids: Tensor) -> Tensor:
    kept = p.gather(1, ids)
    return torch.cat([kept, p.scatter(1, ids, 0).sum(-1, keepdim=True)], dim=1)


def dense(
    formula: Callable[[Tensor, Tensor], Tensor],
    taught: tuple[Tensor, Head],
    student: tuple[Tensor, Head],
    temperature: float,
    k: int,
) -> tuple[float, Tensor]:
    """T² · D over the teacher's k likeliest and the rest together; its gradient by the student's hidden states."""
    hidden = student[0].detach().double().requires_grad_()
    p, q = probabilities(*taught, temperature), probabilities(hidden, student[1], temperature)
    if k < p.shape[1]:
        ids = p.topk(k).indices
        p, q = in_buckets(p, ids), in_buckets(q, ids)
    value = temperature**2 * formula(p, q).sum()
    (gradient,) = torch.autograd.grad(value, hidden)
    return value.item(), gradient


def model(seed: int, dtype: torch.dtype = torch.float64, tokens: int = N, vocabulary: int = V) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, Head(torch.randn(vocabulary, H, generator=generator, dtype=torch.float64).to(dtype))


def measured(term: Any, signal: Signal, student: tuple[Tensor, Head]) -> tuple[float, Tensor]:
    hidden = student[0].detach().requires_grad_()
    total, _ = objective_sum(term, hidden, student[1], torch.zeros(len(hidden), dtype=torch.long), signal)
    (gradient,) = torch.autograd.grad(total, hidden)
    return total.item(), gradient


def through(encoding: Encoding, taught: tuple[Tensor, Head], seed: int = 0) -> Signal:
    return encoding.signal(encoding.encode(*taught, seed), taught[1] if encoding.keeps_head else None)


# --- encodings ---


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("k", [1, 7, V - 1, V, V + 5])
def test_a_top_k_gives_the_divergence_over_its_buckets(k: int, name: str, temperature: float) -> None:
    term, formula = FORMULAS[name]
    taught, student = model(0), model(1)
    value, gradient = measured(term(temperature), through(TopK(k, dtype="float32"), taught), student)
    expected, slope = dense(formula, taught, student, temperature, min(k, V))
    assert value == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("k", [1, 7, V])
def test_a_student_that_is_its_teacher_loses_nothing_to_a_top_k(k: int, name: str, temperature: float) -> None:
    taught = model(0, torch.float32)
    value, gradient = measured(FORMULAS[name][0](temperature), through(TopK(k, dtype="float32"), taught), taught)
    assert abs(value) / N < 1e-6
    assert gradient.abs().max().item() < 1e-6 * taught[1].weight.abs().max().item()


@pytest.mark.parametrize("encoding", [TopK(V, dtype="float32"), HiddenStates("float32")], ids=["top_k", "hidden"])
@pytest.mark.parametrize(
    "term", [ForwardKL(2.0), ReverseKL(1.0), JensenShannon(2.0, beta=0.2), AdaptiveKL(1.0), TotalVariation(2.0)]
)
def test_a_whole_top_k_and_hidden_states_are_the_dense_teacher(term: Any, encoding: Encoding) -> None:
    taught, student = model(0), model(1)
    value, gradient = measured(term, through(encoding, taught), student)
    expected, slope = measured(term, Dense(*taught), student)
    assert value == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_hidden_states_are_within_their_dtype_of_the_dense_teacher(dtype: str, tolerance: float) -> None:
    """Of a float32 teacher; the tolerance is of the gradient's norm and of the value."""
    taught, student = model(0, torch.float32), model(1, torch.float32)
    value, gradient = measured(ForwardKL(2.0), through(HiddenStates(dtype), taught), student)
    expected, slope = dense(kl, taught, student, 2.0, V)
    assert value == pytest.approx(expected, rel=tolerance)
    assert (gradient - slope).norm() < tolerance * slope.norm()
    if dtype != "float32":  # and it does lose something, or this test would say nothing
        assert (gradient - slope).norm() > 1e-5 * slope.norm()


def test_a_bfloat16_teachers_hidden_states_lose_nothing_in_bfloat16() -> None:
    taught = model(0, torch.bfloat16)
    payload = HiddenStates("bfloat16").encode(*taught, 0)
    assert torch.equal(payload["hidden"], taught[0])


def test_int8_errs_by_half_a_step_of_the_tokens_own_scale() -> None:
    hidden = model(0, torch.float32)[0] * torch.logspace(-3, 3, N)[:, None]  # tokens of very different sizes
    payload = HiddenStates("int8").encode(hidden, model(0)[1], 0)
    step_N = hidden.abs().amax(-1) / 127
    error = (payload["hidden"].float() * payload["scale"][:, None] - hidden).abs()
    assert (error <= step_N[:, None] * 0.5001).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_give_the_dense_value_and_gradient_on_average(temperature: float) -> None:
    taught, student, draws, seeds = model(0), model(1), 8, 600
    expected, slope = dense(kl, taught, student, temperature, V)
    encoding = Sampled(draws, temperature)
    runs = [measured(ForwardKL(temperature), through(encoding, taught, seed), student) for seed in range(seeds)]
    for got, truth in (
        (torch.tensor([value for value, _ in runs]), torch.tensor(expected)),
        (torch.stack([gradient for _, gradient in runs]), slope),
    ):
        error = got.std(0) / seeds**0.5  # of the mean
        assert (error > 0).all()
        assert ((got.mean(0) - truth).abs() <= 5 * error).all()
        assert (error < 0.2 * truth.abs().mean()).all()


def test_samples_keep_the_exact_negentropy_and_all_their_draws() -> None:
    taught = model(0)
    payload = Sampled(50, 2.0).encode(*taught, 3)
    p = probabilities(*taught, 2.0)
    torch.testing.assert_close(payload["negentropy"], (p * p.log()).sum(-1))
    assert payload["distinct"].sum() == len(payload["ids"]) == len(payload["counts"])
    counts = payload["counts"].long().split(payload["distinct"].tolist())
    assert all(each.sum() == 50 for each in counts)
    ids = payload["ids"].long().split(payload["distinct"].tolist())
    assert all(len(each.unique()) == len(each) for each in ids)


def test_a_long_tail_is_drawn_as_often_as_it_is_likely() -> None:
    """98 % on one token, the rest on a quarter of a million: in fp32 these vanish beside the sum, a fifth of them."""
    tail = 2**18
    logits = torch.full((16, tail + 1), np.log(0.02 / tail), dtype=torch.float32)
    logits[:, 0] = np.log(0.98)
    payload = Sampled(60000).of(logits, torch.Generator().manual_seed(0))
    share = payload["counts"].long()[payload["ids"] > 0].sum().item() / (16 * 60000)
    assert share == pytest.approx(0.02, abs=5 * (0.02 * 0.98 / (16 * 60000)) ** 0.5)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_ids_take_two_bytes_where_they_fit(vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(1, vocabulary)
    logits[0, -1] = 9.0  # the highest id there is
    for payload in (TopK(1).of(logits), Sampled(20).of(logits * 9, torch.Generator().manual_seed(0))):
        assert payload["ids"].dtype == dtype
        assert vocabulary - 1 in payload["ids"].long()
    signal = TopK(1).signal(TopK(1).of(logits), None)
    assert signal.ids_NK.tolist() == [[vocabulary - 1]]  # type: ignore[attr-defined]


def test_a_teacher_that_holds_tokens_impossible_leaves_numbers() -> None:
    taught, student = model(0, torch.float32), model(1, torch.float32)
    bias = torch.zeros(V)
    bias[5:] = -torch.inf
    impossible = (taught[0], replace(taught[1], bias=bias))
    for k in (3, 7, V):
        for dtype in ("float16", "float32"):
            value, gradient = measured(ForwardKL(2.0), through(TopK(k, dtype=dtype), impossible), student)
            assert np.isfinite(value)
            assert gradient.isfinite().all()


def test_the_own_kl_of_an_exact_encoding_is_nothing_and_a_coarse_one_states_its_error() -> None:
    taught = model(0, torch.float32, tokens=60)

    def of(encoding: Any) -> dict[str, float | int]:
        return fidelity(encoding, encoding.encode(*taught, 0), *taught, 1.0)

    for exact in (TopK(V, dtype="float32"), HiddenStates("float32")):
        assert abs(of(exact)["own_kl"]) < 1e-6
        assert of(exact)["gradient_error"] < 1e-5
    assert abs(of(TopK(4))["own_kl"]) < 1e-5  # no bias at equality
    assert of(TopK(4))["kl_encoded"] < of(TopK(4))["kl_dense"]  # buckets see less
    errors = [of(TopK(k))["gradient_error"] for k in (2, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-5
    coarse, fine = (of(Sampled(draws))["gradient_error"] for draws in (4, 4000))
    assert fine < coarse / 10


@pytest.mark.parametrize(
    ("encoding", "term", "said"),
    [
        (TopK(), ForwardKL(4.0), "temperature=4, and the signal is recorded for 1, 2; add it to"),
        (TopK(), UniversalLogit(1.0), "universal_logit needs whole distributions; record with encoding=hidden_states"),
        (TopK(), TopKDivergence(8, ForwardKL(1.0)), "name the divergence it wraps"),
        (Sampled(), ReverseKL(1.0), "reverse_kl cannot be worked out from samples"),
        (Sampled(temperature=2.0), ForwardKL(1.0), "set encoding.temperature=1"),
    ],
)
def test_what_an_encoding_cannot_give_it_refuses(encoding: Encoding, term: Any, said: str) -> None:
    reason = encoding.refusal(term)
    assert reason is not None
    assert said in reason
    assert "\n" not in reason
    for fitting in (ForwardKL(getattr(encoding, "temperature", 1.0)),):
        assert encoding.refusal(fitting) is None
    assert HiddenStates().refusal(term) is None


# --- pieces and keys ---

HEADER_OF = Header({"name": "top_k", "settings": {"k": 3}}, V, "teacher", "tokenizer", "template", "float32")


def test_pieces_are_the_same_however_they_are_packed_padded_and_ordered() -> None:
    one, other, silent = ([5, 6, 7], [6, 7, -100]), ([8, 9], [9, -100]), ([1, 2], [-100, -100])

    def batch(*rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        width = max(sum(len(ids) for ids, _ in row) for row in rows)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "targets": []}
        for row in rows:
            padded = [*row, ([0] * pad, [-100] * pad)] if (pad := width - sum(len(ids) for ids, _ in row)) else row
            columns["input_ids"].append([i for ids, _ in padded for i in ids])
            columns["targets"].append([t for _, targets in padded for t in targets])
            columns["position_ids"].append([p for ids, _ in padded for p in range(len(ids))])
        return {name: torch.tensor(values) for name, values in columns.items()}

    print_of = HEADER_OF.fingerprint
    packed = pieces_of(batch([one, silent, other]), print_of)
    apart = pieces_of(batch([other], [silent], [one]), print_of)
    assert [p.key for p in packed] == [p.key for p in reversed(apart)]
    assert [(p.row, p.start, p.stop, p.supervised.tolist()) for p in packed] == [(0, 0, 3, [0, 1]), (0, 5, 7, [5])]
    assert [(p.row, p.start, p.stop, p.supervised.tolist()) for p in apart] == [(0, 0, 2, [0]), (2, 0, 3, [0, 1])]
    rows = Rows(
        [
            {"input_ids": [5, 6, 7, 1, 2], "position_ids": [0, 1, 2, 0, 1], "targets": [6, 7, -100, -100, -100]},
            {"input_ids": [8, 9], "position_ids": [0, 1], "targets": [9, -100]},
        ]
    )
    [(numbers, counts, keys)] = scan(rows, print_of)
    assert (numbers.tolist(), counts.tolist(), keys) == ([0, 1], [2, 1], [p.key for p in packed])


def test_a_key_depends_on_ids_mask_and_every_field_of_the_header() -> None:
    ids, targets = np.array([3, 4, 5, 6]), np.array([4, 5, 6, -100])
    variants = [
        HEADER_OF,
        replace(HEADER_OF, encoding={"name": "top_k", "settings": {"k": 4}}),
        replace(HEADER_OF, vocabulary=V + 1),
        replace(HEADER_OF, teacher="another"),
        replace(HEADER_OF, tokenizer="another"),
        replace(HEADER_OF, template=None),
        replace(HEADER_OF, dtype="bfloat16"),
        replace(HEADER_OF, head={"scale": 2.0}),
    ]
    assert len(variants) == 1 + len(Header.__dataclass_fields__)
    keys = [key_of(ids, targets, header.fingerprint) for header in variants]
    keys.append(key_of(np.array([3, 4, 5, 7]), targets, HEADER_OF.fingerprint))
    keys.append(key_of(ids, np.array([-100, 5, 6, -100]), HEADER_OF.fingerprint))
    keys.append(key_of(ids[:-1], targets[:-1], HEADER_OF.fingerprint))
    assert len(set(keys)) == len(keys)
    assert key_of(ids.astype(np.int64), targets + 0, HEADER_OF.fingerprint) == keys[0]
    assert key_of(ids, np.array([9, 9, 9, -100]), HEADER_OF.fingerprint) == keys[0]  # targets are ids already


# --- files ---


def payload_of(number: int) -> Payload:
    generator = torch.Generator().manual_seed(number)
    hidden, head = torch.randn(1 + number % 5, H, generator=generator), model(0, torch.float32)[1]
    return TopK(3).encode(hidden, head, 0)


def key(number: int) -> bytes:
    return key_of(np.array([number, 1]), np.array([1, -100]), HEADER_OF.fingerprint)


def write(folder: Path, count: int = 12, ranks: int = 2, shard_bytes: int = 150) -> dict[bytes, Payload]:
    folder.mkdir(exist_ok=True)
    header = replace(HEADER_OF, encoding=describe(TopK(3)))
    write_header(folder, header)
    writers = [Writer(folder, rank, shard_bytes) for rank in range(ranks)]
    pieces = {key(number): payload_of(number) for number in range(count)}
    for number, (name, payload) in enumerate(pieces.items()):
        writers[number % ranks].add(name, payload)
    for writer in writers:
        writer.flush()
    return pieces


def same(cache: Cache, pieces: dict[bytes, Payload]) -> None:
    for name, payload in pieces.items():
        got = cache.read([name], CPU)
        assert got.keys() == payload.keys()
        for each in payload:
            assert got[each].dtype == payload[each].dtype
            assert torch.equal(got[each].view(-1).view(torch.uint8), payload[each].view(-1).view(torch.uint8))


def test_pieces_come_back_to_the_bit_in_any_order_from_many_shards(tmp_path: Path) -> None:
    pieces = write(tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert len(cache.shards) == 4
    assert {shard.path.name[:10] for shard in cache.shards} == {"shard-0000", "shard-0001"}
    assert len(cache) == len(pieces)
    same(cache, pieces)
    order = np.random.default_rng(0).permutation(len(pieces)).tolist()
    together = cache.read([key(number) for number in order], CPU)
    for name, values in together.items():
        expected = torch.cat([pieces[key(number)][name] for number in order])
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert cache.holds([key(3), key(99), key(0)]).tolist() == [True, False, True]
    assert key(3) in cache
    assert {name: tuple(values.shape) for name, values in cache.read([], CPU).items()} == {
        "ids": (0, 3),
        "logits": (0, 3),
        "tails": (0, 2),
    }


def test_a_cache_with_an_index_opens_without_its_shards_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    pieces = write(folder, count=24, shard_bytes=1)
    write_index(folder)
    opened = []
    begin = Shard.__init__
    monkeypatch.setattr(Shard, "__init__", lambda shard, path: (opened.append(path), begin(shard, path))[1])
    cache = Cache(folder)
    assert cache.holds([key(3), key(99), key(0)]).tolist() == [True, False, True]
    assert opened == []
    assert not any(values.flags.owndata for values in (cache.index.first, cache.index.second, cache.index.shard))
    same(cache, pieces)
    assert len(opened) == len(set(opened)) == 24
    # Of other shards it is not believed, nor where a shard holds others at the same size.
    shards = sorted(folder.glob("shard-*"))
    contents = [path.read_bytes() for path in shards]
    one, other = next(pair for pair in combinations(range(24), 2) if len({len(contents[at]) for at in pair}) == 1)
    shards[one].write_bytes(contents[other])
    shards[other].write_bytes(contents[one])
    with pytest.raises(Refusal, match=f"{shards[one].name} is damaged|{shards[other].name} is damaged"):
        same(Cache(folder), pieces)
    shards[one].unlink()
    cache = Cache(folder)
    assert len(cache) < len(pieces)
    same(cache, {name: payload for name, payload in pieces.items() if name in cache})


def test_keys_that_are_alike_in_one_half_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    write_header(tmp_path / "cache", replace(HEADER_OF, encoding=describe(TopK(3))))
    writer = Writer(tmp_path / "cache", 0, 10**9)
    keys = [
        first + second for first in (b"a" * 8, b"\0" * 8, b"\xff" * 8) for second in (b"x" * 8, b"\0" * 8, b"y" * 8)
    ]
    for number, each in enumerate(keys):
        writer.add(each, payload_of(number))
    writer.flush()
    cache = Cache(tmp_path / "cache")
    same(cache, {each: payload_of(number) for number, each in enumerate(keys)})
    assert not cache.holds([b"a" * 16, b"\xff" * 16, b"\0" * 8 + b"z" * 8]).any()


def test_every_kind_of_number_an_encoding_writes_comes_back(tmp_path: Path) -> None:
    for number, encoding in enumerate(
        [
            TopK(3),
            TopK(3, dtype="float32"),
            Sampled(9),
            Sampled(999),
            *map(HiddenStates, ("int8", "bfloat16", "float32")),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_header(folder, replace(HEADER_OF, encoding=describe(encoding)))
        writer = Writer(folder, 0, 10**9)
        pieces = {key(seed): encoding.encode(*model(seed, torch.float32, tokens=seed + 1), seed) for seed in range(4)}
        for name, payload in pieces.items():
            writer.add(name, payload)
        writer.flush()
        cache = Cache(folder)
        assert cache.encoding == encoding
        same(cache, pieces)


def test_a_later_writer_goes_on_beside_what_is_there(tmp_path: Path) -> None:
    pieces = write(tmp_path / "cache", count=4, ranks=1)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").glob("shard-*")}
    writer = Writer(tmp_path / "cache", 0, 10**9)
    writer.add(key(50), payload_of(50))
    writer.flush()
    assert all(path.read_bytes() == content for path, content in before.items())
    same(Cache(tmp_path / "cache"), pieces | {key(50): payload_of(50)})


def test_a_leftover_of_a_torn_write_is_not_read(tmp_path: Path) -> None:
    pieces = write(tmp_path / "cache", count=4)
    whole = next(iter((tmp_path / "cache").glob("shard-*"))).read_bytes()
    (tmp_path / "cache" / ".shard-0000-000009.safetensors.partial").write_bytes(whole[: len(whole) // 2])
    cache = Cache(tmp_path / "cache")
    assert len(cache) == 4
    same(cache, pieces)


def test_a_flipped_byte_anywhere_is_refused_with_the_shards_name(tmp_path: Path) -> None:
    pieces = write(tmp_path / "cache", count=4, ranks=1, shard_bytes=10**9)
    (path,) = (tmp_path / "cache").glob("shard-*")
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    same(Cache(tmp_path / "cache"), pieces)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        if chr(content[at]) == " " and at < 8 + header:  # that fills up the header, and may be a tab too
            continue
        with pytest.raises(Refusal, match=path.name):
            same(Cache(tmp_path / "cache"), pieces)


def test_a_dtype_of_the_same_width_in_the_files_header_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache", count=4, ranks=1, shard_bytes=10**9)
    (path,) = (tmp_path / "cache").glob("shard-*")
    content = path.read_bytes()
    assert content.count(b'"F16"') == 1
    path.write_bytes(content.replace(b'"F16"', b'"I16"'))
    with pytest.raises(Refusal, match="is damaged"):
        Cache(tmp_path / "cache")


def test_fields_that_changed_places_are_refused(tmp_path: Path) -> None:
    """Same bytes, same checksums one by one: the data of two pieces exchanged, their keys left."""
    pieces = write(tmp_path / "cache", count=6, ranks=1, shard_bytes=10**9)
    (path,) = (tmp_path / "cache").glob("shard-*")
    content = path.read_bytes()
    one, other = (pieces[key(number)]["logits"].numpy().tobytes() for number in (0, 5))  # of one token both
    assert len(one) == len(other) == 6
    swapped = content.replace(one, b"######").replace(other, one).replace(b"######", other)
    assert swapped != content
    path.write_bytes(swapped)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(Refusal, match="is damaged; remove it"):
        cache.read([key(0)], CPU)


def test_a_shard_cut_short_at_any_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache", count=4, ranks=1, shard_bytes=10**9)
    (path,) = (tmp_path / "cache").glob("shard-*")
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for length in (0, 4, 8, 8 + header // 2, 8 + header, 8 + header + 10, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(Refusal, match=path.name):
            Cache(tmp_path / "cache")


def test_a_missing_piece_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "cache", count=4)
    cache = Cache(tmp_path / "cache")
    rows = Rows({"input_ids": ids, "position_ids": [0, 1], "targets": [1, -100]} for ids in ([2, 1], [77, 1]))
    for ask in (
        lambda: cache.read([key(1), key(4)], CPU),
        lambda: cache.check_holds(rows),
    ):
        with pytest.raises(
            Refusal, match=r"a piece of the text is not in it \(4 pieces are.*record the teacher's signal"
        ) as no:
            ask()
        assert "\n" not in str(no.value)


def test_two_teachers_caches_never_serve_one_another(tmp_path: Path) -> None:
    """The shards of one under the header of another: nothing is found."""
    pieces = write(tmp_path / "cache")
    for field, value in {"teacher": "another", "dtype": "bfloat16", "vocabulary": 40, "template": None}.items():
        write_header(tmp_path / "cache", replace(HEADER_OF, encoding=describe(TopK(3)), **{field: value}))
        cache = Cache(tmp_path / "cache")
        batch = {"input_ids": [[1, 1]], "position_ids": [[0, 1]], "targets": [[1, -100]]}
        (piece,) = pieces_of(batch, cache.fingerprint)
        assert piece.key not in pieces
        with pytest.raises(Refusal, match="not in it"):
            cache.read([piece.key], CPU)


def test_a_header_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=f"no readable {HEADER}.*record the teacher's signal"):
        Cache(tmp_path)
    write(tmp_path / "cache", count=1)
    told = json.loads((tmp_path / "cache" / HEADER).read_text())
    for name in ("fidelity", "os", "../top_k", "top_q"):
        (tmp_path / "cache" / HEADER).write_text(json.dumps({**told, "encoding": {"name": name, "settings": {}}}))
        with pytest.raises(Refusal, match="no such encoding"):
            Cache(tmp_path / "cache")


def test_a_flipped_byte_anywhere_in_the_head_is_refused(tmp_path: Path) -> None:
    weight, bias = torch.randn(7, 5).to(torch.bfloat16), torch.randn(7).to(torch.bfloat16)
    told = replace(HEADER_OF, encoding=describe(HiddenStates()), head={"scale": 0.5, "softcap": 30.0})
    write_header(tmp_path, told)
    save_head(tmp_path, Head(weight, bias))
    head = Cache(tmp_path).open_head(CPU, torch.bfloat16)
    assert head is not None
    assert head.bias is not None
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert (head.scale, head.softcap) == (0.5, 30.0)
    content = (tmp_path / HEAD).read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        (tmp_path / HEAD).write_bytes(flipped)
        if chr(content[at]) == " " and at < 8 + header:
            continue
        with pytest.raises(Refusal, match=HEAD):
            Cache(tmp_path).open_head(CPU, torch.bfloat16)


# --- the teacher that reads it ---


@pytest.mark.parametrize("encoding", [TopK(V, dtype="float32"), HiddenStates("float32")], ids=["top_k", "hidden"])
def test_a_recorded_teacher_gives_each_batch_its_own_pieces_in_order(encoding: Encoding, tmp_path: Path) -> None:
    told = replace(HEADER_OF, encoding=describe(encoding))
    write_header(tmp_path, told)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (3, 10), generator=generator)
    positions = torch.tensor([[*range(4), *range(6)], [*range(10)], [*range(2), *range(8)]])
    targets = ids.roll(-1, 1).where(torch.rand(3, 10, generator=generator) > 0.4, -100)
    hidden, head = torch.randn(3, 10, H, generator=generator), model(0, torch.float32)[1]
    save_head(tmp_path, head)
    writer = Writer(tmp_path, 0, 10**9)
    batch = {"input_ids": ids, "position_ids": positions, "targets": targets}
    for piece in reversed(pieces_of(batch, told.fingerprint)):
        writer.add(piece.key, encoding.encode(hidden[piece.row][piece.supervised], head, seeds.of_piece(piece.key)))
    writer.flush()
    student, students_head = torch.randn(3, 10, H, generator=generator), model(1, torch.float32)[1]
    objective = Distillation(0.3, ForwardKL(2.0))
    teacher = Recorded(str(tmp_path), Opening(V))
    for order in ([0, 1, 2], [2, 0], [1]):
        some = {name: values[order] for name, values in batch.items()}
        looked = teacher.look(some, Wanted())

        def work(signal: Signal, order: list[int] = order) -> float:
            return objective_sum(objective, student[order], students_head, targets[order], signal)[0].item()

        assert teacher.give(looked, work) == pytest.approx(work(Dense(hidden[order], head)), rel=1e-6)
    teacher.close()


@pytest.mark.parametrize("encoding", [HiddenStates(), Sampled(temperature=2.0)], ids=str)
def test_what_a_server_cannot_fill_is_refused(encoding: Encoding) -> None:
    with pytest.raises(Refusal, match=rf"encoding={encoding.name}: .* use encoding=top_k"):
        encoding.of_server(20)


def test_a_server_decides_how_many_tokens_are_kept() -> None:
    assert TopK(dtype="float32").of_server(20) == TopK(20, [1.0], "float32")
    with pytest.raises(Refusal, match=r"encoding\.k=30: .*teacher\.endpoint\.top_k=20 decides"):
        TopK(30).of_server(20)


def test_fidelity_is_reported_at_the_temperatures_that_an_encoding_declares() -> None:
    kinds = (HiddenStates(), Sampled(temperature=2.0), TopK(temperatures=[1.0, 3.0]))
    assert [list(encoding.measured_at) for encoding in kinds] == [[1.0], [2.0], [1.0, 3.0]]


def test_a_source_of_ones_own_declares_what_differs_and_nothing_else() -> None:
    class Own(Source):
        path, dtype, trust_remote_code = "teacher", "float32", False

        def check(self, objective: Any) -> None:
            """It serves all of them."""

        def open(self, opening: Any) -> Any:
            raise NotImplementedError

    own = Own()
    assert (own.recorded, own.server, own.packed_weights) == (None, None, None)
    assert own.runs_here
    assert not own.needs_record
    assert own.asked_once() is own
    assert own.key("sha256:1") == "sha256:1"
    endpoint = Endpoint("http://localhost:1/v1", model="big")
    served = Served("teacher", "cache", endpoint)
    assert (served.recorded, served.server, served.key("sha256:1")) == ("cache", endpoint, "served big")
    assert not served.runs_here
    with pytest.raises(Refusal, match=r"teacher\.recorder=null"):
        Cached("teacher", "cache").asked_once()
