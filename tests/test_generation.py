"""Text that a model makes, against loops and formulas written out here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.generation import Answer, Sampling, drawn, generate, log_probabilities
from models.teachers.online import Resident
from models.teachers.teacher import Opening
from pipeline.data.tokenizer import train_tokenizer
from tests import fitting, generating

V = fitting.VOCABULARY
PAD = 0
DRAWN = Sampling(max_new_tokens=10, temperature=1.0, seed=4)


def sharp(model: Any) -> Any:
    """Far from even, so that rounding decides nothing."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model.eval()


def llama(vocabulary: int, groups: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp(fitting.model(32, 2, seed=5))


PROMPTS = [
    torch.randint(1, V, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 1, 17, 9, 2, 9, 30, 3)
]


def logits_after(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def by_hand(model: Any, prompt: list[int], limit: int, ends: tuple[int, ...] = ()) -> Answer:
    """Greedy, one prompt, every token read anew for every token."""
    ids: list[int] = []
    while len(ids) < limit:
        ids.append(int(logits_after(model, prompt + ids).argmax()))
        if ids[-1] in ends:
            return Answer(ids, "stop")
    return Answer(ids, "length")


def answers(model: Any, prompts: list[list[int]], sampling: Sampling, **words: Any) -> dict[int, list[Answer]]:
    return dict(generate(model, prompts, sampling, **{"pad_token": PAD, "end_tokens": (), **words}))


# --- the cache, padding, ends ---


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_with_and_without_the_cache_the_text_is_that_of_reading_everything_anew(heads: int) -> None:
    torch.manual_seed(heads)
    model = sharp(llama(V, heads))
    some = PROMPTS[:4]
    ended = by_hand(model, some[0], 12).ids[5]
    expected = {n: [by_hand(model, prompt, 12, (ended,))] for n, prompt in enumerate(some)}
    assert expected[0][0].finish_reason == "stop"
    for use_cache in (True, False):
        assert answers(model, some, Sampling(12), end_tokens=(ended,), use_cache=use_cache) == expected


def test_the_caches_logits_are_those_of_the_whole_forward(model: Any) -> None:
    ids = torch.tensor([PROMPTS[6]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        cache, rows = None, []
        for place in range(ids.shape[1]):
            out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, 0])
    torch.testing.assert_close(torch.stack(rows), whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(10), DRAWN, Sampling(6, beams=3)], ids=["greedy", "drawn", "beams"])
def test_neither_the_batch_nor_the_order_nor_the_neighbours_change_an_answer(model: Any, sampling: Sampling) -> None:
    ends = (3, 11, 40)
    alone = {n: answers(model, [prompt], sampling, end_tokens=ends)[0] for n, prompt in enumerate(PROMPTS)}
    assert {each.finish_reason for (each,) in alone.values()} == {"stop", "length"}
    for batch_size in (1, 3, 16):
        assert answers(model, PROMPTS, sampling, end_tokens=ends, batch_size=batch_size) == alone
    turned = answers(model, PROMPTS[::-1], sampling, end_tokens=ends, batch_size=4)
    assert {len(PROMPTS) - 1 - n: each for n, each in turned.items()} == alone


def test_the_longest_prompts_come_first(model: Any) -> None:
    order = [number for number, _ in generate(model, PROMPTS, Sampling(2), pad_token=PAD, end_tokens=(), batch_size=3)]
    assert [len(PROMPTS[number]) for number in order] == sorted(map(len, PROMPTS), reverse=True)


def test_a_token_that_also_pads_stays_in_an_answer(model: Any) -> None:
    """Only what stands behind the end is cut off."""
    greedy = by_hand(model, PROMPTS[0], 12).ids
    inside, end = greedy[1], greedy[6]
    assert inside not in (end, *greedy[7:])
    got = answers(model, PROMPTS[:3], Sampling(12), pad_token=inside, end_tokens=(end,))
    assert got[0][0].ids == greedy[: greedy.index(end) + 1]
    assert inside in got[0][0].ids


def test_beams_find_the_likeliest_of_all_answers(model: Any) -> None:
    [answer] = answers(model, [PROMPTS[0]], Sampling(2, beams=V))[0]
    first = logits_after(model, PROMPTS[0]).log_softmax(-1)
    both = torch.stack([first[a] + logits_after(model, [*PROMPTS[0], a]).log_softmax(-1) for a in range(V)])
    assert answer.ids == list(divmod(int(both.argmax()), V))


# --- draws ---


def test_draws_are_as_often_as_the_model_says(model: Any) -> None:
    count, temperature = 4000, 0.7
    sampling = Sampling(1, temperature=temperature, samples=count)
    with torch.no_grad():  # evener, so that many tokens are possible
        even = sharp(fitting.model(32, 2, seed=5))
        even.get_output_embeddings().weight.mul_(0.2)
    got = answers(even, [PROMPTS[3]], sampling, batch_size=500)[0]
    seen = torch.bincount(torch.tensor([answer.ids[0] for answer in got]), minlength=V)
    expected = (logits_after(even, PROMPTS[3]) / temperature).softmax(-1) * count
    often = expected > 5
    assert often.sum() > 20
    chi_square = ((seen - expected).square() / expected)[often].sum().item()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    control = (logits_after(even, PROMPTS[3])).softmax(-1) * count  # at temperature 1 it would not pass
    assert ((seen - control).square() / control)[often].sum() > freedom + 4 * (2 * freedom) ** 0.5


def test_every_number_falls_to_its_token_and_top_p_keeps_the_fewest() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 2
    numbers = (torch.arange(20_000) + 0.5) / 20_000
    for top_p in (1.0, 0.8, 0.3, 1e-6):
        for row in logits:
            p = (row.double() / 1.5).softmax(-1)
            order = p.argsort(descending=True).tolist()
            kept = next(n for n in range(1, 51) if p[order[:n]].sum() >= top_p - 1e-12)
            truth = torch.zeros(50, dtype=torch.float64)
            truth[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
            chosen = drawn(row.expand(len(numbers), -1), numbers, 1.5, top_p)
            shares = torch.bincount(chosen, minlength=50) / len(numbers)
            assert (shares - truth).abs().max() < 1.1 / len(numbers) * 2
    for edge in (0.0, 1 - 2**-53):
        one = drawn(torch.tensor([[-torch.inf, 1.0, -torch.inf]]), torch.tensor([edge], dtype=torch.float64), 1.0, 1.0)
        assert one.tolist() == [1]


def test_seeds_prompts_and_samples_each_have_their_own_draws(model: Any) -> None:
    sampling = Sampling(10, temperature=1.5, samples=3, seed=1)
    once, again = (answers(model, PROMPTS[:3], sampling) for _ in range(2))
    assert once == again
    texts = [tuple(answer.ids) for each in once.values() for answer in each]
    other = answers(model, PROMPTS[:3], Sampling(10, temperature=1.5, samples=3, seed=2))
    texts += [tuple(answer.ids) for each in other.values() for answer in each]
    assert len(set(texts)) == len(texts)
    longer = answers(model, PROMPTS[:3], Sampling(20, temperature=1.5, samples=3, seed=1))
    assert all(
        [answer.ids for answer in once[n]] == [answer.ids[:10] for answer in longer[n]] for n in once
    )  # what is asked beyond does not change what comes before


# --- a tokenizer ---


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tokenizer and a model whose vocabulary is padded beyond it."""
    texts = sorted({text.strip() for text in topics.values()}, key=len)[:60]
    tokenizer = train_tokenizer(texts, 300, tmp_path_factory.mktemp("spoken") / "t")
    torch.manual_seed(2)
    return tokenizer, llama(340, 2)


def test_padded_columns_are_never_chosen(spoken: tuple[Any, Any]) -> None:
    tokenizer, model = spoken
    sampling = Sampling(8, temperature=3.0, samples=20)
    free = answers(model, [[1, 2], [3]], sampling)
    assert max(max(answer.ids) for each in free.values() for answer in each) >= len(tokenizer)
    for kind in (sampling, Sampling(8), Sampling(8, beams=2)):
        kept = answers(model, [[1, 2], [3]], kind, tokenizer=tokenizer)
        assert max(max(answer.ids) for each in kept.values() for answer in each) < len(tokenizer)


def test_a_stop_ends_an_answer_with_the_token_that_completes_it(spoken: tuple[Any, Any]) -> None:
    tokenizer, model = spoken
    sampling = Sampling(40, temperature=1.0, samples=6)
    free = answers(model, [[5, 9, 60], [7]], sampling, tokenizer=tokenizer)
    texts = Counter(
        letter
        for each in free.values()
        for answer in each
        for letter in set(tokenizer.decode(answer.ids)) - set(tokenizer.decode([5, 9, 60]))
        if letter.isascii()
    )
    ((stop, count),) = texts.most_common(1)
    assert count >= 1
    got = answers(model, [[5, 9, 60], [7]], sampling, tokenizer=tokenizer, stop=[stop])
    stopped = 0
    for number, each in free.items():
        for whole, cut in zip(each, got[number], strict=True):
            at = next((n for n in range(1, 41) if stop in tokenizer.decode(whole.ids[:n])), None)
            assert cut == (whole if at is None else Answer(whole.ids[:at], "stop"))
            stopped += at is not None
    assert stopped == count
    # A prompt that holds the stop is no answer that does.
    [answer] = answers(model, [tokenizer(stop)["input_ids"]], Sampling(3), tokenizer=tokenizer, stop=[stop * 3])[0]
    assert len(answer.ids) == 3


# --- log-probabilities ---


def test_log_probabilities_are_the_models(model: Any) -> None:
    pairs = [(prompt, by_hand(model, prompt, 1 + n).ids) for n, prompt in enumerate(PROMPTS)]
    pairs += [(PROMPTS[0], []), ([4], [5])]
    for batch_size in (1, 4):
        told = log_probabilities(model, pairs, pad_token=PAD, batch_size=batch_size)
        for (prompt, answer), values in zip(pairs, told, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            truth = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer).view(-1, 1))
            assert values == pytest.approx(truth[:, 0].tolist(), abs=2e-5)


def test_log_probabilities_hold_no_more_logits_than_a_chunk(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(prompt, [1, 2, 3, 4, 5]) for prompt in PROMPTS]
    whole = log_probabilities(model, pairs, pad_token=PAD)
    monkeypatch.setattr("models.generation._LOGITS_AT_ONCE", 3 * V)
    sizes = []
    logits = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: sizes.append(x.numel()) or logits(x, dim))
    assert log_probabilities(model, pairs, pad_token=PAD) == [pytest.approx(each, abs=1e-5) for each in whole]
    assert max(sizes) == 3 * V
    assert len(sizes) == -(-5 * len(pairs) // 3)


def test_columns_beyond_the_vocabulary_can_be_left_out(model: Any) -> None:
    (values,) = log_probabilities(model, [(PROMPTS[0], [1, 2])], pad_token=PAD, vocabulary=30)
    truth = [logits_after(model, ids)[:30].log_softmax(-1) for ids in (PROMPTS[0], [*PROMPTS[0], 1])]
    assert values == pytest.approx([float(truth[0][1]), float(truth[1][2])], abs=2e-5)


# --- the model is left as it was ---


def test_the_model_is_found_as_it_was_at_every_answer(model: Any) -> None:
    other = fitting.model(32, 2, seed=5, dropout=0.5)
    other.load_state_dict(model.state_dict())
    other.train()
    other.model.layers[0].eval()
    other.generation_config = GenerationConfig(repetition_penalty=1.7, eos_token_id=3, top_k=2, do_sample=True)
    modes = {name: module.training for name, module in other.named_modules()}
    own = other.generation_config
    seen = {}
    for number, each in generate(other, PROMPTS[:3], Sampling(6), pad_token=PAD, end_tokens=(), batch_size=1):
        seen[number] = each
        assert {name: module.training for name, module in other.named_modules()} == modes
        assert other.generation_config is own
        assert torch.is_grad_enabled()
    assert seen == {n: [by_hand(model, prompt, 6)] for n, prompt in enumerate(PROMPTS[:3])}
    log_probabilities(other, [(PROMPTS[0], [1])], pad_token=PAD)
    assert {name: module.training for name, module in other.named_modules()} == modes
    assert all(parameter.grad is None for parameter in other.parameters())


def test_it_works_under_autocast_and_in_bfloat16(model: Any) -> None:
    for sampling in (Sampling(5), DRAWN, Sampling(5, beams=2)):
        with torch.autocast("cpu", torch.bfloat16):
            made = answers(model, PROMPTS[:3], sampling)
            told = log_probabilities(model, [(PROMPTS[n], made[n][0].ids) for n in range(3)], pad_token=PAD)
        assert all(len(values) == len(made[n][0].ids) for n, values in enumerate(told))
    half = sharp(fitting.model(32, 2, seed=5)).to(torch.bfloat16)
    (values,) = log_probabilities(half, [(PROMPTS[0], [1, 2])], pad_token=PAD)
    (exact,) = log_probabilities(model, [(PROMPTS[0], [1, 2])], pad_token=PAD)
    assert values == pytest.approx(exact, rel=0.1, abs=0.5)
    assert answers(half, PROMPTS[:3], DRAWN)


REFUSED = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0: need at least 1"),
    "below zero": ({"temperature": -1.0}, "temperature=-1.0: need 0"),
    "no mass": ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0: need \(0, 1\]"),
    "drawn beams": ({"beams": 2, "temperature": 1.0}, "beams are searched, not drawn"),
    "samples alike": ({"samples": 2}, "they would all be the same"),
    "nothing drawn": ({"top_p": 0.5}, "top_p=0.5 with temperature=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused_in_one_line(case: str) -> None:
    values, said = REFUSED[case]
    with pytest.raises(Refusal, match=said) as refused:
        Sampling(**values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(4, temperature=0.5, top_p=0.9)])
def test_logits_that_are_no_numbers_are_refused_when_drawing(sampling: Sampling) -> None:
    broken = fitting.model(32, 2, seed=5)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(Refusal, match="logits are no numbers in float32") as refused:
        list(generate(broken, [[1, 2]], sampling, pad_token=PAD, end_tokens=()))
    assert "\n" not in str(refused.value)


def test_a_prompt_without_tokens_is_refused(model: Any) -> None:
    with pytest.raises(Refusal, match="prompt 1 holds no token"):
        answers(model, [[1], []], Sampling(1))
    with pytest.raises(Refusal, match="prompt 0 holds no token"):
        log_probabilities(model, [([], [1])], pad_token=PAD)


# --- teachers ---


@pytest.mark.slow
def test_a_teacher_sharded_over_two_ranks_answers_as_the_whole_one(tmp_path: Path) -> None:
    whole = sharp(fitting.model(32, 2, seed=2))
    fitting.saved(tmp_path, "teacher", whole)
    resident = Resident(whole, Opening(V))
    for rank, made in enumerate(generating.on_two_ranks(tmp_path)):
        assert made["held"] == 0  # no rank holds a whole weight
        prompts = generating.prompts_of(rank)
        for name, sampling in generating.SAMPLINGS.items():
            expected = dict(resident.generate(prompts, sampling, end_tokens=generating.ENDS, **generating.WORDS))
            texts, told = made["found"][name]
            assert texts == {n: [[*a.ids, a.finish_reason] for a in each] for n, each in expected.items()}
            pairs = [(prompt, expected[n][0].ids) for n, prompt in enumerate(prompts)]
            truth = resident.log_probabilities(pairs, **generating.WORDS)
            for values, exact in zip(told, truth, strict=True):
                assert values == pytest.approx(exact, abs=1e-4)
