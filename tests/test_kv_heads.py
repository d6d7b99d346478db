"""Fewer KV heads: the mean of those that become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.measure import cache_bytes_per_token
from models.representations import projection_widths
from models.student import KvHeads
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from tests.pruning.families import config_of, model_of, tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    train_tokenizer(["the quick brown fox " * 20], 257, folder)
    return load_tokenizer(folder)


def keys_and_values(model: Any) -> list[tuple[torch.Tensor, slice]]:
    """The rows of all key and value projections, biases too."""
    queries, keys, _ = projection_widths(model.config)
    found = []
    for name, parameter in model.named_parameters():
        if ".k_proj." in name or ".v_proj." in name:
            found.append((parameter, slice(0, keys)))
        elif ".qkv_proj." in name:
            found += [(parameter, slice(queries, queries + keys)), (parameter, slice(queries + keys, None))]
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_were_the_same_become_one_without_a_trace(
    family: str, kv_heads: int, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = model_of(family, dtype=torch.float32, num_key_value_heads=4)
    with torch.no_grad():
        for parameter, rows in keys_and_values(teacher):
            heads = parameter[rows].unflatten(0, (kv_heads, 4 // kv_heads, -1))
            parameter[rows] = heads[:, :1].expand_as(heads).flatten(0, 2)
    teacher.save_pretrained(tmp_path / "teacher")
    KvHeads(kv_heads).materialise(str(tmp_path / "teacher"), tokenizer, tmp_path / "student", 0)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert student.config.num_key_value_heads == kv_heads
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)
        cache = student(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == kv_heads


def test_heads_that_differ_become_their_mean(tokenizer: Any, tmp_path: Path) -> None:
    teacher = model_of("qwen2", dtype=torch.float32, num_key_value_heads=4)
    teacher.save_pretrained(tmp_path / "teacher")
    KvHeads(2).materialise(str(tmp_path / "teacher"), tokenizer, tmp_path / "student", 0)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for mine, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        for part in ("k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                whole, pooled = (getattr(getattr(each.self_attn, part), kind) for each in (theirs, mine))
                heads = whole.chunk(4)
                torch.testing.assert_close(pooled, torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]))
        assert torch.equal(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("family", "kv_heads", "said"),
    [("llama", 3, "the teacher has 2; need one of 1, 2"), ("llama", 0, "need one of"), ("gpt2", 1, "no number of KV")],
)
def test_numbers_that_cannot_be_are_refused(family: str, kv_heads: int, said: str, tmp_path: Path) -> None:
    config_of(family).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=said):
        KvHeads(kv_heads).config(str(tmp_path))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_that_is_reported_has_so_many_heads(kv_heads: int) -> None:
    model = model_of("llama", num_key_value_heads=kv_heads, dtype=torch.float32)
    assert cache_bytes_per_token(model, tokens(1, 7)) == 2 * 3 * kv_heads * 8 * 4  # of 3 layers, 8 numbers a head


def test_the_cache_of_a_window_is_what_a_token_in_it_takes() -> None:
    model = model_of("mistral", dtype=torch.float32)  # a window of 5
    assert {cache_bytes_per_token(model, tokens(1, length)) for length in (3, 19)} == {2 * 3 * 2 * 6 * 4}
