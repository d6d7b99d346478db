"""Quantized activations: against PyTorch's own fake quantization and against plain products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.activations import Largest, attach
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.scheme import Activations, QuantizedMatrix, Scheme, WeightScheme
from models.quantization.stored import QuantizedWeights, read_quantized
from tests.pruning.families import model_of, tokens


def read(rows: int = 7, width: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=draw) * 10 ** torch.linspace(-3, 2, rows)[:, None]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_token_is_rounded_by_its_own_scale_as_pytorch_does(bits: int) -> None:
    x, high = read(), 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1) / high
    want = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(len(x)), 0, -high - 1, high)
    torch.testing.assert_close(Activations(bits).rounded(x), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_scale_cuts_off_what_is_beyond_it_as_pytorch_does(bits: int) -> None:
    x, high = read(), 2 ** (bits - 1) - 1
    static = Activations(bits, dynamic=False)
    scale = static.scale(torch.tensor(3.0))
    want = torch.fake_quantize_per_tensor_affine(x, scale, torch.zeros(1, dtype=torch.int32), -high - 1, high)
    torch.testing.assert_close(static.rounded(x, scale), want, rtol=1e-6, atol=0)
    assert float(want.abs().max()) < float(x.abs().max())


def test_the_gradient_passes_where_a_number_is_in_range() -> None:
    x = read().requires_grad_()
    Activations().rounded(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # by its own scale every number is
    x.grad = None
    static = Activations(dynamic=False)
    static.rounded(x, static.scale(torch.tensor(1.0))).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_zeros_stays_one_of_zeros(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=dtype)
    made = Activations().rounded(x)
    assert made.dtype == dtype
    assert made[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(made[1], x[1], rtol=0, atol=1 / 127)
    assert float(Activations(dynamic=False).scale(torch.zeros(()))) == 1.0


def test_bits_that_do_not_exist_are_refused() -> None:
    for bits in (3, 9):
        with pytest.raises(Refusal, match=rf"activations\.bits={bits}: need 4 to 8"):
            Activations(bits)


def test_the_largest_of_batches_is_the_largest_of_all() -> None:
    x, found = read(), Largest(12)
    for part in x.split(3):
        found.add(part)
    assert torch.equal(found.largest_I, x.abs().amax(0))


def nothing(width: int) -> QuantizedMatrix:
    return RoundToNearest().quantized(torch.zeros(1, width), WeightScheme(8, "tensor", None), None)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_attached_model_multiplies_rounded_inputs(family: str, dynamic: bool, tmp_path: Path) -> None:
    model = model_of(family, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj" if family == "llama" else "transformer.h.1.mlp.c_fc"
    module, ids = model.get_submodule(name), tokens()
    seen: list[tuple[Tensor, Tensor]] = []
    activations = Activations(8, dynamic)
    scales = {} if dynamic else {f"{name}.weight": torch.tensor(0.01)}
    QuantizedWeights(
        Scheme(WeightScheme(8, "tensor", None), activations), {f"{name}.weight": nothing(32)}, scales
    ).write(tmp_path / "r")
    with torch.no_grad():
        plain = model(ids).logits
        watch = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))  # before it is rounded
        handles = attach(model, read_quantized(tmp_path / "r"))
        watch_after = module.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
        rounded = model(ids).logits
        for handle in [*handles, watch, watch_after]:
            handle.remove()
        again = model(ids).logits
    before, (after, output) = seen
    x = before.flatten(0, -2)
    scale = x.abs().amax(-1, keepdim=True) / 127 if dynamic else torch.full((len(x), 1), 0.01)
    want = (x / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(after.flatten(0, -2), want)
    weight = module.weight if family == "gpt2" else module.weight.T
    product = want @ weight + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(output.flatten(0, -2), product, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, plain)
    assert not torch.equal(rounded, plain)


def test_a_scheme_without_activations_attaches_nothing() -> None:
    model = model_of("llama", dtype=torch.float32)
    assert (
        attach(
            model,
            QuantizedWeights(
                Scheme(WeightScheme(8, "tensor", None)), {"model.layers.0.mlp.up_proj.weight": nothing(32)}
            ),
        )
        == []
    )
