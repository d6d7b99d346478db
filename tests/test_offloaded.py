"""A model whose layers stay on disk: the numbers are those of the whole one, and few layers are ever there."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from models.errors import Refusal
from models.heads import body_of
from models.layerwise import Passage, in_turn
from models.load import load_model
from models.matrices import name_of_layers
from models.offloaded import Offloaded, load_offloaded
from models.quantization import proof
from models.representations import decoder_layers
from pipeline.stages import quantize
from pipeline.steps.layer_by_layer import FinishedLayers
from tests.pruning.families import FAMILIES, model_of, tokens
from tests.quantization.little import EXPERIMENT, activations, folder_of, teacher_in
from tests.sparsity.test_sparsify import EXPERIMENT as SPARSIFY

WORDS = {"trust_remote_code": False}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Offloaded]:
    """(the whole model, the same with its layers on disk)."""
    aside = folder.parent / "aside"
    return load_model(str(folder), dtype=dtype), load_offloaded(str(folder), aside, device="cpu", dtype=dtype, **WORDS)


def check_same(whole: Any, offloaded: Offloaded) -> None:
    layers = f"{name_of_layers(whole)}."
    state = offloaded.model.state_dict()
    for name, tensor in whole.state_dict().items():
        assert state[name].is_meta == (name.startswith(layers) and name in offloaded.weights)
        found = offloaded.weights[name] if state[name].is_meta else state[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
    buffers = dict(offloaded.model.named_buffers())
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert all(parameter.is_meta for parameter in decoder_layers(offloaded.model).parameters())


def test_a_layer_on_disk_that_is_not_finite_is_refused_in_its_turn(tmp_path: Path) -> None:
    model = model_of("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] = float("nan")
    model.save_pretrained(tmp_path / "model")
    held = load_offloaded(str(tmp_path / "model"), tmp_path / "aside", device="cpu", dtype=torch.float32, **WORDS)
    turns = in_turn(held.model, [tokens()], held.weights)
    assert [next(turns).number, next(turns).number] == [0, 1]
    with pytest.raises(Refusal, match=r"NaN in model\.layers\.2\.mlp\.down_proj\.weight"):
        next(turns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_whole_model_to_the_bit(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model_of(family, dtype=torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    whole, offloaded = opened(tmp_path / "model", dtype)
    check_same(whole, offloaded)
    tables = [(each.get_input_embeddings(), each.get_output_embeddings()) for each in (whole, offloaded.model)]
    assert [embedding.weight is head.weight for embedding, head in tables] == [tied, tied]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_are_those_of_a_checkpoint_of_the_body_alone_and_of_one_in_parts(
    family: str, shards: bool, tmp_path: Path
) -> None:
    model, folder = model_of(family, dtype=torch.float32, tie_word_embeddings=True), tmp_path / "model"
    model.save_pretrained(folder, **({"max_shard_size": "40KB"} if shards else {}))
    for file in folder.glob("*.safetensors") if not shards else ():
        prefix = f"{model.base_model_prefix}."
        save_file({name.removeprefix(prefix): each for name, each in load_file(file).items()}, file)
    assert len(list(folder.glob("*.safetensors"))) > shards
    check_same(*opened(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_text_becomes_layer_by_layer_is_what_a_whole_forward_makes_of_it(family: str, tmp_path: Path) -> None:
    model_of(family, dtype=torch.float32).save_pretrained(tmp_path / "model")
    whole, offloaded = opened(tmp_path / "model")
    batches, seen = list(tokens(5, 11).split(2)), dict[int, list[Tensor]]()

    def hook(number: int) -> Any:
        return lambda module, args, kwargs: seen.setdefault(number, []).append(
            args[0] if args else kwargs["hidden_states"]
        )

    for number, layer in enumerate(decoder_layers(whole)):
        layer.register_forward_pre_hook(hook(number), with_kwargs=True)
    with torch.no_grad():
        want = [body_of(whole)(input_ids=ids, use_cache=False).last_hidden_state for ids in batches]
    for turn in in_turn(offloaded.model, batches, offloaded.weights):
        torch.testing.assert_close(list(turn.hidden), seen[turn.number], rtol=0, atol=1e-6)
    for model, weights in ((offloaded.model, offloaded.weights), (whole, None)):
        torch.testing.assert_close(Passage(model, batches, weights).last(), want, rtol=0, atol=1e-6)
    assert all(parameter.is_meta for parameter in decoder_layers(offloaded.model).parameters())


def test_a_turn_that_fails_leaves_nothing_in_memory(tmp_path: Path) -> None:
    model_of("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    _, offloaded = opened(tmp_path / "model")
    turns = in_turn(offloaded.model, [], offloaded.weights)
    assert not any(parameter.is_meta for parameter in next(turns).layer.parameters())
    with pytest.raises(KeyboardInterrupt):
        turns.throw(KeyboardInterrupt)
    assert all(parameter.is_meta for parameter in decoder_layers(offloaded.model).parameters())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_in(tmp_path_factory.mktemp("offloaded") / "run")


def most_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The largest number of layers that have weights while a stage runs, and of bytes in all matrices."""
    layers, most_layers, most_bytes = WeakSet[torch.nn.Module](), [0], [0]
    plain = LlamaDecoderLayer.forward

    def forward(self: torch.nn.Module, *given: Any, **named: Any) -> Any:
        layers.add(self)
        there = [each for each in layers if not all(parameter.is_meta for parameter in each.parameters())]
        most_layers[0] = max(most_layers[0], len(there))
        return plain(self, *given, **named)

    def after(function: Any) -> Any:
        def looking(*given: Any, **named: Any) -> Any:
            made = function(*given, **named)
            tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
            found = {each.data_ptr(): each.nbytes for each in tensors if not each.is_meta and each.ndim == 2}
            most_bytes[0] = max(most_bytes[0], sum(found.values()))
            return made

        return looking

    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", forward)
        for owner, name in ((FinishedLayers, "keep"), (quantize, "check_held"), (proof, "objective_sum")):
            patch.setattr(owner, name, after(getattr(owner, name)))
        make()
    return most_layers[0], most_bytes[0]


@pytest.mark.parametrize("stage", ["quantize", "sparsify"])
def test_two_layers_are_in_memory_at_most_however_many_there_are(
    stage: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "quantize": [
            "scheme.weights.group_size=4", *activations("w8a8_static"),
            "quantizer=smoothquant",
        ],
        "sparsify": [],
    }  # fmt: skip
    found = {}
    for layers in (2, 6):
        path = folder_of("llama", teacher, tmp_path / str(layers), num_hidden_layers=layers)
        experiment, given = (EXPERIMENT, "model") if stage == "quantize" else (SPARSIFY, "model")
        make = partial(experiment.make, tmp_path / f"run-{layers}", stage, f"{given}.path={path}", *words[stage])
        found[layers] = most_at_once(make, monkeypatch)
    at_once = 2 if stage == "quantize" else 1  # a fold is tried on a copy of its layer
    assert [most for most, _ in found.values()] == [at_once, at_once]
    layer = decoder_layers(load_model(str(path), dtype=torch.float32))[0]
    assert found[6][1] < found[2][1] + sum(each.nbytes for each in layer.parameters())
