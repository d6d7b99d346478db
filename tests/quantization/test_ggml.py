"""ggml's blocks: its own rounding against the gguf package's, schemes packed without rounding, mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.errors import Refusal
from models.quantization.ggml import TYPES, Blocks, GgmlType, Mixture, fitting, packed_integers, type_of_scheme
from models.quantization.scheme import Scheme, WeightScheme
from models.quantization.stored import BlockWeights, QuantizedWeights, open_quantized, read_outline, read_quantized

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 512, generator=torch.Generator().manual_seed(0))


def read_by_gguf(blocks: Blocks) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[blocks.type.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.bytes.numpy(), kind))


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_read_as_the_gguf_package_reads_them(kind: str, weight: torch.Tensor) -> None:
    blocks = GgmlType(kind).pack(weight)
    torch.testing.assert_close(blocks.dequantized(), read_by_gguf(blocks), rtol=0, atol=0)
    code = gguf.GGMLQuantizationType[kind.upper()]
    width, size = gguf.GGML_QUANT_SIZES[code]
    assert (GgmlType(kind).width, GgmlType(kind).bits_per_weight) == (width, 8 * size / width)
    assert blocks.bytes.numel() * 8 == GgmlType(kind).bits_per_weight * weight.numel()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_the_quantizer_is_that_of_the_gguf_package_to_the_byte(kind: str, weight: torch.Tensor) -> None:
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(GgmlType(kind).pack(weight).bytes.numpy(), theirs)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q6_k"])
def test_threads_change_nothing(kind: str, weight: torch.Tensor) -> None:
    before = torch.get_num_threads()
    alone = GgmlType(kind).pack(weight)
    try:
        torch.set_num_threads(5)  # does not divide the rows
        shared = GgmlType(kind).pack(weight)
        torch.testing.assert_close(shared.bytes, alone.bytes, rtol=0, atol=0)
        torch.testing.assert_close(shared.dequantized(), alone.dequantized(), rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TYPES)
def test_the_error_is_what_the_bits_allow(kind: str, weight: torch.Tensor) -> None:
    rounded = GgmlType(kind).rounded(weight)
    least = {"q2_k": 0.12, "q3_k": 0.03, "q4_0": 0.01, "q4_1": 0.01, "q4_k": 0.007}.get(kind, 0.003)
    assert 0 < (rounded - weight).square().mean() < least
    assert GgmlType(kind).rounded(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_would_end_the_process_is_refused(value: float, weight: torch.Tensor) -> None:
    weight[3, 7] = value
    with pytest.raises(Refusal, match="a weight is NaN, infinite or beyond 65504"):
        GgmlType("q4_k").pack(weight)


def test_widths_that_blocks_do_not_divide_are_refused_with_what_fits() -> None:
    GgmlType("q4_k").check("down", 512)
    with pytest.raises(Refusal, match=r"down has 96 inputs.*blocks of 256.*need q4_0 or q4_1.*multiple_of=256"):
        GgmlType("q4_k").check("down", 96)
    with pytest.raises(Refusal, match="need f16"):
        GgmlType("q8_0").check("down", 172)
    with pytest.raises(Refusal, match="q4_x: need one of"):
        GgmlType("q4_x")


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(4, "group", 32),
        WeightScheme(4, "group", 128),
        WeightScheme(4, "channel", None),
        WeightScheme(4, "tensor", None),
        WeightScheme(3, "group", 64),
        WeightScheme(2, "channel", None),
    ],
)
def test_integers_and_scales_of_a_scheme_lie_in_the_blocks_as_they_are(
    scheme: WeightScheme, kind: str, weight: torch.Tensor
) -> None:
    quantized = scheme.quantize(weight, *scheme.of_range(*scheme.ranges(weight)))
    blocks = packed_integers(quantized, kind)
    torch.testing.assert_close(read_by_gguf(blocks), quantized.dequantized(), rtol=0, atol=0)
    raw = blocks.bytes.view(24, 16, -1)  # rows, blocks, bytes
    scales = raw[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    assert torch.equal(scales, quantized.scale.expand(24, -1).repeat_interleave(16 // quantized.scale.shape[1], 1))
    if kind == "q4_0":  # two to a byte, the first half of the block in the lower bits
        integers = torch.cat([raw[..., 2:] & 15, raw[..., 2:] >> 4], -1).int() - 8
    else:
        integers = raw[..., 2:].contiguous().view(torch.int8).int()
    assert torch.equal(integers.flatten(1), quantized.integers)


def test_all_256_integers_of_eight_bits_are_held() -> None:
    scheme = WeightScheme(8, "channel", None)
    weight = torch.arange(-128, 128).float()[None] * 0.5
    quantized = scheme.quantize(weight, torch.tensor([[0.5]]), torch.zeros(1, 1, dtype=torch.int32))
    assert quantized.integers.unique().numel() == 256
    torch.testing.assert_close(read_by_gguf(packed_integers(quantized, "q8_0")), weight, rtol=0, atol=0)


def test_rounding_quantized_weights_again_is_not_exact(weight: torch.Tensor) -> None:
    """What the usual route (dequantize, then ggml's quantizer) does to a trained scheme."""
    scheme = WeightScheme(4, "group", 32)
    quantized = scheme.quantize(weight, *scheme.of_range(*scheme.ranges(weight)))
    assert not torch.equal(GgmlType("q4_0").rounded(quantized.dequantized()), quantized.dequantized())


def test_the_type_of_a_scheme() -> None:
    assert [type_of_scheme(WeightScheme(bits, "group", 64)) for bits in (2, 3, 4, 5, 8)] == ["q4_0"] * 3 + ["q8_0"] * 2
    for scheme, said in (
        (WeightScheme(4, "group", 128, symmetric=False), "symmetric=true"),
        (WeightScheme(4, "group", 128, scale_dtype="bfloat16"), "scheme.weights.scale_dtype=float16"),
        (WeightScheme(4, "group", 16), "scheme.weights.group_size=16 is no multiple of 32"),
    ):
        with pytest.raises(Refusal, match=said):
            type_of_scheme(scheme)


def test_most_zero_points_times_scale_are_no_half_precision_number(weight: torch.Tensor) -> None:
    """Why an asymmetric scheme is refused: q4_1 would hold the products."""
    scheme = WeightScheme(4, "group", 32, symmetric=False)
    scale, zero_point = scheme.of_range(*scheme.ranges(weight))
    product = scale * zero_point
    assert (product.half().float() == product).float().mean() < 0.5


def test_half_of_values_and_downs_get_more_bits_in_q4_k_m() -> None:
    """As llama.cpp's README has it for 32 layers: "uses GGML_TYPE_Q6_K for half of the attention.wv and
    feed_forward.w2 tensors, else GGML_TYPE_Q4_K"."""
    mixture = Mixture("q4_k_m", 32)
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down", "attn_qkv"):
        assert [layer for layer in range(32) if mixture.type_of(part, layer) == "q6_k"] == more
    parts = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "token_embd")
    assert {mixture.type_of(part, layer) for part in parts for layer in range(32)} == {"q4_k"}
    assert mixture.type_of("output", 0) == "q6_k"
    assert Mixture("q8_0", 32).type_of("output", 0) == "q8_0"
    assert Mixture("q4_k_m", 80, 8, seventy=True).type_of("attn_v", 40) == "q5_k"
    assert Mixture("q4_k_m", 32, 4, experts=8).type_of("attn_k", 5) == "q8_0"


def test_what_blocks_do_not_divide_falls_back_as_llama_quantize_does() -> None:
    assert [fitting(kind, 512) for kind in ("q4_k", "q6_k", "q8_0")] == ["q4_k", "q6_k", "q8_0"]
    assert [fitting(kind, 96) for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")] == [
        "q4_0", "q4_0", "q5_0", "q5_1", "q8_0",
    ]  # fmt: skip
    assert [fitting(kind, 172) for kind in ("q4_k", "q8_0", "q4_0")] == ["f16"] * 3


def test_blocks_beside_a_model_are_read_back(weight: torch.Tensor, tmp_path: Path) -> None:
    record = BlockWeights({"a.weight": GgmlType("q4_k").pack(weight), "b.weight": GgmlType("q6_k").pack(weight)})
    record.write(tmp_path / "one")
    record.write(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = open_quantized(tmp_path / "one")
    assert isinstance(again, BlockWeights)
    assert {name: blocks.type for name, blocks in again.matrices.items()} == {"a.weight": "q4_k", "b.weight": "q6_k"}
    for name, blocks in record.matrices.items():
        assert torch.equal(again.matrices[name].bytes, blocks.bytes)
    scheme = WeightScheme(4, "group", 32)
    QuantizedWeights(Scheme(scheme), {"a": scheme.quantize(weight, *scheme.of_range(*scheme.ranges(weight)))}).write(
        tmp_path / "scheme"
    )
    assert isinstance(open_quantized(tmp_path / "scheme"), QuantizedWeights)
    assert [read_outline(tmp_path / name).ggml is None for name in ("one", "scheme")] == [False, True]
    (tmp_path / "odd").write_bytes(b"\x00" * 64)
    for read, name in ((read_quantized, "one"), (open_quantized, "odd"), (read_outline, "odd")):
        with pytest.raises(Refusal, match="quantize the model again"):
            read(tmp_path / name)
