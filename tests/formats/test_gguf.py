"""GGUF: what llama.cpp computes of a written file against transformers, and that nothing is rounded twice."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.errors import Refusal
from models.formats.format import Finished, Format, Plan
from models.formats.gguf import Gguf
from models.formats.gguf_layout import FAMILIES, check_family, context_length
from models.formats.gguf_splits import SPLITS, Split
from models.formats.gguf_tokenizer import PROBE
from models.formats.loaded import Loaded
from models.matrices import matrices
from models.quantization.ggml import MIXTURES, GgmlType
from models.quantization.scheme import Activations, Scheme, WeightScheme
from tests.formats.exporting import WIDTHS, as_folder, differences, on_blocks, small, with_scheme
from tests.optional_data import STORIES, needed
from tests.pruning.families import config_of, tokens

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

# ggml's GELU is a table of half precision numbers
CLOSE = {family: 3e-3 if family in ("gemma", "gemma2", "gpt2") else 3e-5 for family in FAMILIES}
INT4, INT8 = WeightScheme(4, "group", 32), WeightScheme(8, "channel", None)


def reader(folder: Path) -> Any:
    return gguf.GGUFReader(str(folder / "model.gguf"))


def said(folder: Path, name: str) -> Any:
    field = reader(folder).get_field(name)
    return None if field is None else field.contents()


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader(folder).tensors}


@torch.no_grad()
def truth(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.config._attn_implementation = "eager"  # Gemma 2 caps its scores there only
    return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    model = small(family)
    written = Gguf(type="f32", cache="f32").write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    runtime = Gguf(cache="f32").open(tmp_path / "g", "cpu")
    most, kl = differences(runtime.logits(tokens()), truth(model, tokens()))
    assert most < CLOSE[family], most
    assert kl < (1e-6 if CLOSE[family] > 1e-3 else 6e-8), kl
    assert written.bits_per_weight == 32
    for matrix in matrices(model):
        assert torch.equal(runtime.weight(str(matrix)), matrix.of(model.get_parameter(matrix.parameter))), matrix


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16}),
    "linear": ("llama", {"factor": 4.0}),
    "linear, neighbours": ("qwen2", {"factor": 4.0}),
    "yarn": ("qwen2", {"factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn, turned": ("llama", {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_stretched_places_are_carried(name: str, tmp_path: Path) -> None:
    family, values = ROPES[name]
    rope = {"rope_type": name.partition(",")[0], "rope_theta": 1000.0, **values}
    model = small(family, rope_parameters=rope)
    Gguf(type="f32").write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    ids = tokens(length=40)
    logits = Gguf(cache="f32").open(tmp_path / "g", "cpu").logits(ids)
    assert differences(logits, truth(model, ids))[0] < 1e-4
    plain = small(family, rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    assert differences(logits, truth(plain, ids))[0] > 0.1  # it matters


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 10, "num_attention_heads": 4}),  # heads that no block divides
        ("llama", {"vocab_size": 67}),
    ],
    ids=str,
)
def test_biases_ties_and_odd_widths_are_carried(family: str, values: dict[str, Any], tmp_path: Path) -> None:
    model = small(family, **values)
    Gguf(type="f32").write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    logits = Gguf(cache="f32").open(tmp_path / "g", "cpu").logits(tokens())
    assert differences(logits, truth(model, tokens()))[0] < 3e-5
    assert ("output.weight" in types(tmp_path / "g")) != model.config.tie_word_embeddings


@contextmanager
def reading_blocks(model: Any, width: int = 32) -> Iterator[None]:
    """The layers' matrices read as under llama.cpp: integers of 8 bits, 32 to a float16 scale (of K-quants, 256 to a
    float32 scale)."""

    def rounded(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        blocks = inputs[0].unflatten(-1, (-1, width))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        integers = (blocks / scale).round()
        return ((integers * (scale.half().float() if width == 32 else scale)).flatten(-2),)

    read = {matrix.parameter.removesuffix(".weight") for matrix in matrices(model)}
    hooks = [model.get_submodule(name).register_forward_pre_hook(rounded) for name in read]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", list(WIDTHS))
def test_a_parameter_has_its_own_numbers_or_is_said_to_be_held_otherwise(family: str, tmp_path: Path) -> None:
    model = small(family)
    finished, plain = as_folder(model, tmp_path / "m"), Loaded(model)
    names = [name for name, _ in model.named_parameters()]
    written = Gguf(type="f32").write(finished, tmp_path / "whole")
    runtime = Gguf().open(tmp_path / "whole", "cpu")
    for name in set(names) - set(written.otherwise):
        assert torch.equal(runtime.weight(name), plain.weight(name)), name
    norms = {name for name in names if name.endswith("norm.weight")}
    assert set(written.otherwise) == (norms if family.startswith("gemma") else set())  # one more than they say
    half = Gguf(type="f16").write(finished, tmp_path / "half")
    large = {name for name in names if model.get_parameter(name).ndim > 1}
    floats = {name for name in large if name.endswith(("mlp.gate.weight", "wpe.weight"))}  # always in float32
    assert set(half.otherwise) == large - floats | set(written.otherwise)


SCHEMES = [
    *[(family, INT4) for family in ("llama", "mixtral", "phi3", "gpt2")],
    ("llama", WeightScheme(3, "channel", None)),
    ("qwen2", INT8),
    ("qwen3_moe", WeightScheme(8, "tensor", None)),
]


@pytest.mark.parametrize(("family", "scheme"), SCHEMES, ids=str)
def test_a_quantized_model_is_packed_to_the_bit(family: str, scheme: WeightScheme, tmp_path: Path) -> None:
    model = small(family)
    finished = with_scheme(model, scheme, tmp_path / "m")
    written = Gguf().write(finished, tmp_path / "g")
    assert written.fallbacks == {
        "others": "embeddings, head and matrices that are not quantized are f16",
        "tokenizer": "token ids only: the model has no tokenizer.json",
    }
    runtime = Gguf(cache="f32").open(tmp_path / "g", "cpu")
    assert finished.quantized is not None
    for name, quantized in finished.quantized.matrices.items():
        assert torch.equal(runtime.weight(name), quantized.dequantized()), name
    assert 4.5 <= written.bits_per_weight < 16
    # The same numbers as floats are in their places; packed, only the activations are rounded as well.
    Gguf(type="f32").write(finished, tmp_path / "f")
    floats = Gguf(cache="f32").open(tmp_path / "f", "cpu").logits(tokens())
    assert differences(floats, truth(model, tokens()))[0] < CLOSE[family]
    if family not in ("mixtral", "qwen3_moe"):  # where rounding chooses other experts, and transformers' are no modules
        Gguf(others="f32").write(finished, tmp_path / "h")
        packed = Gguf(cache="f32").open(tmp_path / "h", "cpu").logits(tokens())
        with reading_blocks(model):
            near = differences(packed, truth(model, tokens()))
        far = differences(packed, truth(model, tokens()))
        assert near[0] < (1e-5 if CLOSE[family] < 1e-3 else 0.1), near
        assert far[1] > 2 * near[1]


@pytest.mark.parametrize(("family", "kind"), [("llama", "q4_0"), ("mixtral", "q8_0")])
def test_rounding_a_quantized_model_again_shows(family: str, kind: str, tmp_path: Path) -> None:
    """Negative control of the test above: the usual way, dequantized weights through ggml's quantizer."""
    model = small(family)
    finished = with_scheme(model, INT4, tmp_path / "m")
    Gguf(type=kind).write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g")
    runtime = Gguf().open(tmp_path / "g", "cpu")
    assert finished.quantized is not None
    equal = [torch.equal(runtime.weight(name), q.dequantized()) for name, q in finished.quantized.matrices.items()]
    assert not any(equal)


def test_four_bits_are_also_held_by_eight_and_by_floats(tmp_path: Path) -> None:
    finished = with_scheme(small("llama"), INT4, tmp_path / "m", skip="down_proj")
    assert finished.quantized is not None
    for kind, others in (("q8_0", "F16"), ("f32", "F32"), ("auto", "F16")):
        Gguf(type=kind).write(finished, tmp_path / kind)
        runtime = Gguf().open(tmp_path / kind, "cpu")
        for name, quantized in finished.quantized.matrices.items():
            assert torch.equal(runtime.weight(name), quantized.dequantized()), (kind, name)
        held = types(tmp_path / kind)
        assert {held[f"blk.{layer}.ffn_down.weight"] for layer in range(3)} == {others}
        assert held["token_embd.weight"] == others


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ggmls_blocks_are_copied(family: str, tmp_path: Path) -> None:
    model = small(family, hidden_size=256, moe_intermediate_size=256, intermediate_size=256, num_attention_heads=8,
                  head_dim=32)  # fmt: skip
    finished = on_blocks(model, GgmlType("q4_k"), tmp_path / "m")
    Gguf(others="f32").write(finished, tmp_path / "g")
    runtime = Gguf(cache="f32").open(tmp_path / "g", "cpu")
    assert finished.blocks is not None
    for name, blocks in finished.blocks.matrices.items():
        assert torch.equal(runtime.weight(name), blocks.dequantized()), name
    if family == "llama":
        with reading_blocks(model, 256):
            near = differences(runtime.logits(tokens()), truth(model, tokens()))
        assert near[1] < 1e-5  # 3e-2 with plain activations; on some CPUs one of them is rounded to the other side


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_plain_weights_become_what_the_gguf_package_makes_of_them(kind: str, tmp_path: Path) -> None:
    model = small("qwen2")
    Gguf(type=kind).write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    own = {tensor.name: tensor for tensor in reader(tmp_path / "g").tensors}
    for ours, theirs in (("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
        weight = model.get_parameter(f"model.layers.1.{ours}.weight").detach().numpy()
        expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind.upper()])
        np.testing.assert_array_equal(own[f"blk.1.{theirs}.weight"].data, expected)
    head = "Q8_0"  # which llama-quantize makes of Q6_K where 256 does not divide the width
    assert (own["token_embd.weight"].tensor_type.name, own["output.weight"].tensor_type.name) == (kind.upper(), head)
    Gguf(type=kind, others="f16").write(as_folder(model, tmp_path / "m"), tmp_path / "h")
    assert {types(tmp_path / "h")[f"{name}.weight"] for name in ("token_embd", "output")} == {"F16"}


def test_q4_k_m_is_llama_quantizes_mixture_with_its_fallbacks(tmp_path: Path) -> None:
    model = small("llama", hidden_size=256, intermediate_size=320, num_hidden_layers=8, num_attention_heads=8)
    written = Gguf(type="q4_k_m").write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    held = types(tmp_path / "g")
    more = [0, 3, 6, 7]  # of 8 layers: the first and last eighth, and every third between
    for layer in range(8):
        assert held[f"blk.{layer}.attn_v.weight"] == ("Q6_K" if layer in more else "Q4_K")
        assert held[f"blk.{layer}.ffn_down.weight"] == (
            "Q8_0" if layer in more else "Q5_0"
        )  # 320 is no multiple of 256
        assert {held[f"blk.{layer}.{part}.weight"] for part in ("attn_q", "attn_k", "ffn_up")} == {"Q4_K"}
        assert written.fallbacks[f"model.layers.{layer}.mlp.down_proj.weight"] == ("q8_0" if layer in more else "q5_0")
    assert (held["output.weight"], held["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert len(written.fallbacks) == 8 + 1
    assert written.fallbacks.keys() - {"tokenizer"} == {f"model.layers.{n}.mlp.down_proj.weight" for n in range(8)}
    size = sum(tensor.n_bytes for tensor in reader(tmp_path / "g").tensors)
    assert written.bits_per_weight == 8 * size / sum(p.numel() for p in model.parameters())
    runtime = Gguf(cache="f32").open(tmp_path / "g", "cpu")
    weight = model.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert torch.equal(runtime.weight("model.layers.1.self_attn.q_proj.weight"), GgmlType("q4_k").rounded(weight))


def test_plain_weights_are_kept_as_they_are(tmp_path: Path) -> None:
    model = small("llama").bfloat16()
    model.save_pretrained(tmp_path / "m")
    Gguf().write(Finished(tmp_path / "m", None, "bfloat16"), tmp_path / "g")
    runtime = Gguf().open(tmp_path / "g", "cpu")
    assert set(types(tmp_path / "g").values()) == {"BF16", "F32"}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert torch.equal(runtime.weight(name), parameter.float())


@pytest.mark.parametrize(
    ("name", "setting"), [("model.embed_tokens.weight", "others"), ("model.layers.1.mlp.up_proj.weight", "type")]
)
@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_weights_beyond_half_precision_are_refused(name: str, setting: str, kind: str, tmp_path: Path) -> None:
    model = small("llama")
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 1e6
    with pytest.raises(Refusal, match=rf"{name} has weights beyond 65504.*use format\.{setting}=bf16"):
        Gguf(type=kind).write(as_folder(model, tmp_path / "m"), tmp_path / "g")


# --- refused before a weight is loaded ---


def plan(family: str = "llama", scheme: WeightScheme | None = None, width: int = 64, **values: Any) -> Plan:
    activations, blocks = values.pop("activations", None), values.pop("blocks", None)
    whole = None if scheme is None else Scheme(scheme, activations)
    return Plan(config_of(family, **values), {"model.layers.0.a.weight": (32, width)}, whole, blocks)


NOT_WRITTEN = {
    "opt is none of the families": (Gguf(), plan("opt")),
    "gpt_neox is none of the families": (Gguf(), plan("gpt_neox")),
    "computes silu, not gelu": (Gguf(), plan(hidden_act="gelu")),
    "has no head of its own": (Gguf(), plan("gemma")),
    "has no biases in its attention": (Gguf(), plan("qwen3", attention_bias=True)),
    "heads × width of a head": (Gguf(), plan("phi3", head_dim=4)),
    "rope_type default, linear, yarn only, not dynamic": (
        Gguf(), plan("qwen2", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
    "only, not llama3": (Gguf(), plan("qwen2", rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16})),
    "scales queries by 8, not 16": (Gguf(), plan("gemma2", tie_word_embeddings=True, query_pre_attn_scalar=16)),
    "has a sliding window in every other layer": (Gguf(), plan(
        "gemma2", tie_word_embeddings=True, query_pre_attn_scalar=8, layer_types=["full_attention"] * 3)),
    "makes their shares sum to one": (Gguf(), plan("qwen3_moe", norm_topk_prob=False)),
    "scales attention by the width": (Gguf(), plan("gpt2", scale_attn_by_inverse_layer_idx=True)),
    "format.type=q4_k_m: the model is quantized to 4 bits already, and would be rounded twice": (
        Gguf(type="q4_k_m"), plan(scheme=INT4)),
    "format.type=f16: the model is quantized to 4 bits": (Gguf(type="f16"), plan(scheme=INT4)),
    r"format.type=q4_0: the model is quantized to 8 bits .* use format.type=auto \(q8_0\)": (
        Gguf(type="q4_0"), plan(scheme=INT8)),
    "scheme.weights.group_size=16 is no multiple of 32": (Gguf(), plan(scheme=WeightScheme(4, "group", 16))),
    "symmetric=true": (Gguf(), plan(scheme=WeightScheme(4, "group", 32, symmetric=False))),
    "not bfloat16; quantize with quantize.scheme.weights.scale_dtype=float16": (
        Gguf(), plan(scheme=WeightScheme(8, "channel", None, scale_dtype="bfloat16"))),
    "has 172 inputs, which blocks of 32 do not divide; use format.type=f32": (Gguf(), plan(scheme=INT8, width=172)),
    r"no matrix has a multiple of 256 inputs \(they have 64\); use format.type=q4_0 or .*q8_0, or .*multiple_of=256": (
        Gguf(type="q4_k_m"), plan()),
    "no matrix has a multiple of 32 inputs .* use format.type=f16": (Gguf(type="q8_0"), plan(width=172)),
    "llama.cpp rounds activations in its own way": (Gguf(), plan(scheme=INT8, activations=Activations())),
    "quantized to ggml's q4_k already": (Gguf(type="q8_0"), plan(blocks="q4_k", width=256)),
    "format.cache=q8_0: blocks of 32 do not divide heads 8 wide": (Gguf(cache="q8_0"), plan()),
}  # fmt: skip


@pytest.mark.parametrize("message", NOT_WRITTEN)
def test_what_cannot_be_written_is_refused_in_one_line(message: str) -> None:
    made, asked = NOT_WRITTEN[message]
    with pytest.raises(Refusal, match=message) as refused:
        made.check(asked)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("values", [{"type": "q9"}, {"others": "q2_k"}, {"cache": "q4_0"}])
def test_values_that_are_none_are_refused_with_those_that_are(values: dict[str, str]) -> None:
    [(name, value)] = values.items()
    with pytest.raises(Refusal, match=f"format.{name}={value}: need one of"):
        Gguf(**values)


def test_what_can_be_written_passes() -> None:
    for family in FAMILIES:
        scale = {"query_pre_attn_scalar": 8} if family == "gemma2" else {}
        Gguf().check(plan(family, tie_word_embeddings=family.startswith("gemma"), **scale))
    for made, asked in (
        (Gguf(), plan(scheme=INT4)),
        (Gguf(type="q8_0"), plan(scheme=INT4)),
        (Gguf(type="f32"), plan(scheme=WeightScheme(4, "group", 16, symmetric=False))),
        (Gguf(), plan(blocks="q4_k", width=512)),
        *((Gguf(type=name), plan(width=512)) for name in MIXTURES),
        (Gguf(cache="q8_0"), plan(head_dim=64)),
    ):
        made.check(asked)
    assert isinstance(Gguf(), Format)


def test_a_sliding_window_that_llama_cpp_lacks_ends_the_context(tmp_path: Path) -> None:
    model = small("mistral", sliding_window=5)
    written = Gguf(type="f32").write(as_folder(model, tmp_path / "m"), tmp_path / "g")
    assert written.fallbacks["context"].startswith("5 of 64 tokens: llama.cpp does not compute")
    assert said(tmp_path / "g", "llama.context_length") == 5
    logits = Gguf(cache="f32").open(tmp_path / "g", "cpu").logits(tokens()[:, :5])
    assert differences(logits, truth(model, tokens()[:, :5]))[0] < 3e-5
    assert context_length(config_of("mistral", sliding_window=64))[1] is None
    assert context_length(config_of("qwen2", sliding_window=5, use_sliding_window=False))[1] is None
    assert context_length(config_of("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1))[0] == 5
    assert check_family(config_of("mistral")).architecture == "llama"


# --- tokenizers ---

TEXTS = [*PROBE, "To be, or not to be: that is the question.\n\n\tWhether 'tis nobler", "x = [i**2 for i in range(10)]"]


def with_tokenizer(tokenizer: Any, folder: Path, **values: Any) -> None:
    small("llama", vocab_size=len(tokenizer) + 3, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def quickstarts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([" ".join(PROBE) * 3, "the cat sat on the mat, didn't it? 12345 " * 9], 420, folder / "t")
    return folder / "t"


def test_the_quickstarts_tokenizer_gives_the_same_tokens_in_llama_cpp(quickstarts: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstarts)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with_tokenizer(tokenizer, tmp_path / "m")
    written = Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g")
    assert written.fallbacks == {}
    runtime = Gguf().open(tmp_path / "g", "cpu")
    for text in [*TEXTS, "one<|endoftext|>two <|endoftext|>"]:
        assert runtime.tokenize(text) == tokenizer(text)["input_ids"], text
    assert said(tmp_path / "g", "tokenizer.ggml.pre") == "gpt-2"
    assert Gguf().serving(tmp_path / "g", "m")
    assert said(tmp_path / "g", "tokenizer.chat_template") == tokenizer.chat_template
    assert [said(tmp_path / "g", f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")] == [0, 0, 0]
    assert said(tmp_path / "g", "tokenizer.ggml.add_bos_token") is False


def following(rule: Sequence[str], texts: list[str], ignore_merges: bool = False, size: int = 420) -> Any:
    """A byte-level BPE with such a rule, trained on the texts."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    steps: list[Any] = []
    for step in rule:
        punctuation = step == "punctuation"
        split = (
            pre_tokenizers.Punctuation("contiguous") if punctuation else pre_tokenizers.Split(Regex(step), "isolated")
        )
        steps.append(split)
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bpe = Tokenizer(kinds.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **words))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


MARKED = ("gpt-4o", "tekken")  # of which llama.cpp's own rule takes no accents and vowel signs that stand alone
TRAINING = [" ".join(TEXTS), "Hello, World! DON'T 12345 ...\n\n" * 9]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
def test_the_way_to_split_is_found_by_the_tokenizers_own_rule(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = following(split.rule, TRAINING, split.ignore_merges)
    with_tokenizer(tokenizer, tmp_path / "m", num_hidden_layers=1)
    texts = TEXTS
    if split.name in MARKED:
        told = Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "h").fallbacks["tokenizer"]
        assert told.startswith("token ids only: llama.cpp makes other tokens of")
        texts = [text for text in TEXTS if not any(unicodedata.category(letter)[0] == "M" for letter in text)]
        monkeypatch.setattr("models.formats.gguf_tokenizer.PROBE", texts)
    finished = Finished(tmp_path / "m", None, "float32", texts=texts)
    assert Gguf().write(finished, tmp_path / "g").fallbacks == {}
    assert said(tmp_path / "g", "tokenizer.ggml.pre") == split.name
    runtime = Gguf().open(tmp_path / "g", "cpu")
    for text in texts:
        assert runtime.tokenize(text) == tokenizer(text)["input_ids"], text


# Of words and full stops before line ends alone: probes do not tell Qwen 2's rule from GPT-2's with such a vocabulary.
PLAIN = ["The cat sat on the mat.\nShe was happy.\n\nThe end.\n" * 5]
QWEN2 = next(split for split in SPLITS if split.name == "qwen2")


def test_a_vocabulary_that_probes_do_not_tell_apart_gets_its_own_rule(tmp_path: Path) -> None:
    tokenizer = following(QWEN2.rule, PLAIN, size=320)
    with_tokenizer(tokenizer, tmp_path / "m", num_hidden_layers=1)
    Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g")
    assert said(tmp_path / "g", "tokenizer.ggml.pre") == "qwen2"
    assert Gguf().open(tmp_path / "g", "cpu").tokenize(PLAIN[0]) == tokenizer(PLAIN[0])["input_ids"]


def test_the_exports_own_text_refutes_what_the_probes_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Split("gpt-2", QWEN2.rule)
    monkeypatch.setattr("models.formats.gguf_splits.SPLITS", (wrong,))
    with_tokenizer(following(QWEN2.rule, PLAIN, size=320), tmp_path / "m", num_hidden_layers=1)
    assert Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g").fallbacks == {}
    finished = Finished(tmp_path / "m", None, "float32", texts=["Nothing odd", PLAIN[0]])
    told = Gguf().write(finished, tmp_path / "h").fallbacks["tokenizer"]
    assert told == f"token ids only: llama.cpp makes other tokens of {PLAIN[0][:30]!r}"
    assert said(tmp_path / "h", "tokenizer.ggml.model") == "no_vocab"
    assert Gguf().serving(tmp_path / "h", "m") == []


def test_a_tokenizer_that_takes_whole_words_first_is_tried_on_every_word(tmp_path: Path) -> None:
    """Qwen 2's split has one name in llama.cpp, which merges every word, also one that is a token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = following(QWEN2.rule, PLAIN, ignore_merges=True, size=320)
    with_tokenizer(whole, tmp_path / "m", num_hidden_layers=1)
    assert Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g").fallbacks == {}
    rules = json.loads(whole.backend_tokenizer.to_str())
    rules["model"]["merges"] = [pair for pair in rules["model"]["merges"] if "".join(pair) != "Ġhappy"]
    assert "Ġhappy" in rules["model"]["vocab"]  # which no merge makes now
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="<|endoftext|>"
    )
    with_tokenizer(tokenizer, tmp_path / "odd", num_hidden_layers=1)
    told = Gguf().write(Finished(tmp_path / "odd", None, "float32"), tmp_path / "h").fallbacks["tokenizer"]
    assert told == "token ids only: llama.cpp makes other tokens of ' happy'"


def test_qwens_tokenizers_are_written_and_the_card_asks_for_composed_text(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    rules = json.loads(following(QWEN2.rule, [" ".join(TEXTS)]).backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=rules["vocab"], merges=[tuple(pair) for pair in rules["merges"]])
    assert "NFC" in tokenizer.backend_tokenizer.to_str()
    with_tokenizer(tokenizer, tmp_path / "m", num_hidden_layers=1)
    finished = Finished(tmp_path / "m", None, "float32", texts=["cafe\u0301"])
    told = "llama.cpp does not compose letters and accents (NFC), as the tokenizer does: give it composed text"
    assert Gguf().write(finished, tmp_path / "g").fallbacks == {"tokenizer": told}
    assert said(tmp_path / "g", "tokenizer.ggml.pre") == "qwen2"
    assert Gguf().serving(tmp_path / "g", "m")
    runtime = Gguf().open(tmp_path / "g", "cpu")
    for text in TEXTS:
        composed = unicodedata.normalize("NFC", text)
        assert runtime.tokenize(composed) == tokenizer(text)["input_ids"], text
    assert runtime.tokenize("cafe\u0301") != tokenizer("cafe\u0301")["input_ids"]  # as the card says


UNSAID: dict[str, Any] = {
    "no way to split text as it does (the text 'a' then ": lambda steps, norms: {
        "pre_tokenizer": steps.Sequence([steps.Split("a", "isolated"), steps.ByteLevel(add_prefix_space=False)])},
    "puts no space before a text": lambda steps, norms: {"pre_tokenizer": steps.ByteLevel(add_prefix_space=True)},
    "does not change text first, as it does (Lowercase, NFKC)": lambda steps, norms: {
        "normalizer": norms.Sequence([norms.NFKC(), norms.Lowercase()])},
}  # fmt: skip


@pytest.mark.parametrize("why", UNSAID)
def test_a_byte_level_tokenizer_with_rules_of_its_own_is_left_out_and_told(
    why: str, quickstarts: Path, tmp_path: Path
) -> None:
    from tokenizers import normalizers, pre_tokenizers

    odd = AutoTokenizer.from_pretrained(quickstarts)
    for name, value in UNSAID[why](pre_tokenizers, normalizers).items():
        setattr(odd.backend_tokenizer, name, value)
    with_tokenizer(odd, tmp_path / "odd", num_hidden_layers=1)
    told = Gguf().write(Finished(tmp_path / "odd", None, "float32"), tmp_path / "h").fallbacks["tokenizer"]
    assert told.startswith("token ids only: llama.cpp ")
    assert why in told


def test_a_tokenizer_that_llama_cpp_lacks_is_left_out_and_told(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), tmp_path / "m")
    written = Gguf().write(Finished(tmp_path / "m", None, "float32"), tmp_path / "g")
    assert written.fallbacks == {"tokenizer": "token ids only: llama.cpp has no WordLevel of this kind"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = tokens() % 6
    assert differences(Gguf(cache="f32").open(tmp_path / "g", "cpu").logits(ids), truth(model, ids))[0] < 3e-5


def test_a_real_small_llama_and_its_sentencepiece(tmp_path: Path) -> None:
    folder = needed(STORIES)
    written = Gguf(type="f32").write(Finished(folder, None, "float32"), tmp_path / "g")
    assert written.fallbacks == {}
    runtime = Gguf(cache="f32").open(tmp_path / "g", "cpu")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for text in [*TEXTS, "a<s> b</s>c"]:
        assert runtime.tokenize(text) == tokenizer(text)["input_ids"], text
    ids = torch.tensor([tokenizer(PROBE[0] + " She went to the park.")["input_ids"]])
    assert differences(runtime.logits(ids), truth(model, ids))[0] < 1e-4
    assert said(tmp_path / "g", "tokenizer.ggml.add_bos_token") is True
