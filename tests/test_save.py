"""Weights that are written one after the other are those of a model that is saved whole."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models.errors import Refusal
from models.folder import INDEX, WEIGHTS
from models.save import save_model
from models.sharding import gathered_weights
from models.sparsity import zeros
from tests.pruning.families import FAMILIES, MIXTURES, VOCABULARY, model_of, tokens

PART = 20_000  # bytes: about a layer


def tokenizer() -> Any:
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w1")


def in_files(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *sorted({*MIXTURES} - {*FAMILIES})])
def test_a_model_in_parts_is_the_model_in_one_file(family: str, tied: bool, tmp_path: Path) -> None:
    """Also where a family splits its experts, or renames, on the way out."""
    model = model_of(family, dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    save_model(model, tokenizer(), tmp_path / "parts", gathered_weights(model, True), torch.float32, part_bytes=PART)
    save_model(model, tokenizer(), tmp_path / "dict", model.state_dict(), torch.float32, part_bytes=PART)
    want = load_file(tmp_path / "whole" / WEIGHTS)
    for made in (tmp_path / "parts", tmp_path / "dict"):
        found = in_files(made)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
        paths = sorted(path.name for path in made.glob("*.safetensors"))
        assert len(paths) >= 3
        assert paths == [f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)]
        index = json.loads((made / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in want.values())
        for name, part in index["weight_map"].items():
            with safe_open(made / part, "pt") as opened:
                assert name in opened.keys()
                assert opened.metadata() == {"format": "pt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_model_is_the_file_that_transformers_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("qwen3", dtype=dtype, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    save_model(model.float(), tokenizer(), tmp_path / "ours", gathered_weights(model, True), dtype)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not (tmp_path / "ours" / INDEX).exists()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_no_more_than_a_file_of_weights_is_held(tmp_path: Path) -> None:
    model = model_of("llama", num_hidden_layers=12, dtype=torch.float32)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    held: dict[int, int] = {}
    most = 0

    def followed() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in gathered_weights(model, keep=True):
            held[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, held.pop, id(tensor))
            most = max(most, sum(held.values()))
            yield name, tensor
            del tensor

    save_model(model, tokenizer(), tmp_path, followed(), torch.float32, part_bytes=2 * layer)
    assert not held
    assert 2 * layer < most <= 4 * layer < sum(parameter.nbytes for parameter in model.parameters()) / 3


@pytest.mark.parametrize("part_bytes", [PART, 10**9])
def test_a_tied_table_whose_zeros_are_watched_is_saved_once(part_bytes: int, tmp_path: Path) -> None:
    model = model_of("llama", dtype=torch.float32, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0
    counts: dict[str, int] = {}
    weights = zeros.watched(model, model.state_dict(), counts)
    save_model(model, tokenizer(), tmp_path, weights, torch.bfloat16, part_bytes=part_bytes)
    assert in_files(tmp_path).keys() == model.state_dict().keys() - {"lm_head.weight"}
    width = model.config.hidden_size
    assert counts == {"zeros_before": width, "zeros_after": width}
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["model.layers.0.mlp.up_proj.weight"][0, 3] = 1
    with pytest.raises(Refusal, match=rf"1 of {width} zeros of .*up_proj.* are no longer zero; nothing was written"):
        save_model(model, tokenizer(), tmp_path / "again", zeros.watched(model, changed, {}), torch.float32)


def test_parts_that_are_not_the_whole_model_are_refused(tmp_path: Path) -> None:
    model = model_of("llama", dtype=torch.float32)
    weights = (pair for pair in gathered_weights(model, keep=True) if pair[0] != "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Refusal, match=r"what was saved.*layers\.1\.mlp\.up_proj"):
        save_model(model, tokenizer(), tmp_path, weights, torch.float32, part_bytes=PART)
