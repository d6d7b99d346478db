"""What a server computes in is seen from its answers, with the teacher's weights beside them and without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.teachers.precision import Precision, by_own_forward, by_spacing, has_weights
from tests.serving import Model

V, K = 300, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=128, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)  # logits of several, as trained models have them
    path = tmp_path_factory.mktemp("precision") / "model"
    model.save_pretrained(path)
    return path


PIECES = [[random.Random(seed).randrange(V) for _ in range(24)] for seed in range(6)]


def answers(folder: Path | str, dtype: str) -> list[Any]:
    """As the server of tests/serving.py gives them, through JSON."""
    served = Model(str(folder), K, dtype)
    told = []
    for ids in PIECES:
        best = served.logprobs(ids)[:-1].topk(K)
        values = torch.tensor(best.values.tolist(), dtype=torch.float64).float()
        told.append((best.indices, values))
    return told


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_told_by_our_own_forward_and_a_greater_claim_refused(
    dtype: str, folder: Path, tmp_path: Path
) -> None:
    found = by_own_forward(PIECES, answers(folder, dtype), str(folder), tmp_path / "aside", "cpu", False)
    assert (found.dtype, found.proof, found.tokens) == (dtype, "own forward", 6 * 23)
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=each) for each in (torch.float32, torch.bfloat16)]
        both = [[m(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in PIECES] for m in models]
    apart = [(b - a).gather(1, ids) for a, b, (ids, _) in zip(*both, answers(folder, dtype), strict=True)]
    assert found.error_of_bfloat16 == pytest.approx(float(torch.cat(apart).square().mean().sqrt()), rel=0.05)
    narrower = {"float32": ["float32", "float16", "bfloat16"], "float16": ["float16", "bfloat16"]}
    for claimed in ("float32", "float16", "bfloat16"):
        if claimed in narrower.get(dtype, ["bfloat16"]):
            found.check(claimed, "http://host/v1")
        else:
            with pytest.raises(
                Refusal,
                match=rf"^teacher\.dtype={claimed}: the server at http://host/v1 computes in "
                rf"{dtype} .*`--dtype {claimed}` \(vLLM\), or set teacher\.dtype={dtype}$",
            ):
                found.check(claimed, "http://host/v1")


@pytest.mark.parametrize(("dtype", "seen"), [("float32", None), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_without_weights_the_spacing_of_rounded_logits_tells_it(dtype: str, seen: str | None, folder: Path) -> None:
    found = by_spacing(answers(folder, dtype))
    assert found.dtype == seen
    assert found.proof.startswith("none" if seen is None else "spacing")
    found.check("bfloat16", "http://host/v1")
    if seen:
        with pytest.raises(Refusal, match=rf"computes in {seen}; start it with `--dtype float32`"):
            found.check("float32", "http://host/v1")
    else:
        found.check("float32", "http://host/v1")  # nothing contradicts it, and the record says that nothing is proved


def test_another_model_is_refused_whatever_is_claimed(folder: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
    other.save_pretrained(tmp_path / "other")
    found = by_own_forward(
        PIECES, answers(tmp_path / "other", "float32"), str(folder), tmp_path / "aside", "cpu", False
    )
    for claimed in ("float32", "float16", "bfloat16"):
        with pytest.raises(Refusal, match=r"serves another model than that at teacher\.path.* by \d.* nats") as refused:
            found.check(claimed, "http://host/v1")
        assert "dtype=" not in str(refused.value)


@pytest.mark.parametrize("bits", [6, 4])
def test_the_model_in_fewer_bits_is_refused_unless_no_more_than_bfloat16_is_claimed(
    bits: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in rounded.model.layers.parameters():
            if weight.ndim == 2:
                groups = weight.view(-1, 32)
                scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                groups.copy_((groups / scale).round() * scale)
    rounded.save_pretrained(tmp_path / "rounded")
    told = answers(tmp_path / "rounded", "float32")
    found = by_own_forward(PIECES, told, str(folder), tmp_path / "aside", "cpu", False)
    assert found.dtype is None
    with pytest.raises(Refusal, match=r"further off than bfloat16 \(.*so it has fewer bits or another model"):
        found.check("float32", "http://host/v1")
    found.check("bfloat16", "http://host/v1")
    assert "is it the model at teacher.path? It is recorded as it is" in caplog.text


def test_places_without_a_token_are_left_out(folder: Path, tmp_path: Path) -> None:
    told = answers(folder, "float32")
    for ids, values in told:
        ids[:, -1], values[:, -1] = -1, -np.inf
    found = by_own_forward(PIECES, told, str(folder), tmp_path / "aside", "cpu", False)
    assert found.dtype == "float32"
    assert found.error is not None
    assert found.error < 1e-4
    assert by_spacing(told) == Precision(None, by_spacing(told).proof, 6 * 23)


def test_only_a_folder_with_plain_weights_has_some(folder: Path, tmp_path: Path) -> None:
    assert has_weights(str(folder))
    assert not has_weights("org/teacher")
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    (tmp_path / "model.safetensors").touch()
    assert not has_weights(str(tmp_path))
