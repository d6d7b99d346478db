"""Keys and values in 8 bits, as llama.cpp keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.formats.format import Finished
from models.formats.gguf import Gguf
from models.quantization import cache

IDS = torch.arange(24).view(2, 12)


def model(head_dim: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def test_blocks_are_ggmls_to_the_bit() -> None:
    torch.manual_seed(0)
    heads = torch.randn(2, 3, 5, 64) * torch.logspace(-4, 2, 5)[:, None]
    heads[0, 0, 0] = 0
    kind = GGMLQuantizationType.Q8_0
    wanted = dequantize(quantize(heads.numpy().reshape(-1, 64), kind), kind).reshape(heads.shape)
    np.testing.assert_array_equal(cache.rounded(heads).numpy(), wanted)


def test_attention_reads_the_rounded_keys_and_values_behind_their_rotation() -> None:
    """Against the cache itself: filled by the plain model, rounded there, and read by the plain model's next token."""
    plain, rounding = model(), model()
    with torch.no_grad():
        past = plain(IDS[:, :-1], use_cache=True).past_key_values
        before = cache.attach(rounding)
        assert before == "sdpa"
        first = rounding.model.layers[0]
        seen = []
        handle = first.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -1]))
        changed = rounding(IDS).logits
        handle.remove()
        # The first layer's queries do not depend on the cache: its attention is a softmax over rounded keys.
        whole = plain(IDS, use_cache=True).past_key_values.layers[0]
        keys, values = cache.keys_as_cached(whole.keys, turned=True), cache.values_as_cached(whole.values)
        keys, values = (each.repeat_interleave(2, 1) for each in (keys, values))
        hidden = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(IDS))
        query = plain.model.layers[0].self_attn.q_proj(hidden).view(2, 12, 4, 32).transpose(1, 2)
        cos, sin = plain.model.rotary_emb(hidden, torch.arange(12)[None])
        turned = query * cos + torch.cat([-query[..., 16:], query[..., :16]], -1) * sin
        weights = (turned[:, :, -1:] @ keys.transpose(-1, -2) / 32**0.5).softmax(-1)
        wanted = (weights @ values)[:, :, 0].flatten(1)
        torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=1e-5)
        apart = (changed - plain(IDS).logits).abs().max()
        assert 1e-6 < apart < 0.05
        assert past.layers[0].keys.shape[-1] == 32
        cache.detach(rounding, before)
        assert torch.equal(rounding(IDS).logits, plain(IDS).logits)


def test_gradients_pass() -> None:
    rounding = model()
    cache.attach(rounding)
    rounding(IDS).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in rounding.parameters())
    assert float(rounding.model.layers[0].self_attn.k_proj.weight.grad.abs().sum()) > 0


def test_heads_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(Refusal, match="heads are 48 wide, and a block is 32"):
        cache.check(model(48).config, "q8_0", "qat.cache")
    with pytest.raises(Refusal, match=r"qat\.cache=int4: need one of q8_0, or null"):
        cache.check(model().config, "int4", "qat.cache")
    eager = model()
    eager.set_attn_implementation("eager")
    with pytest.raises(Refusal, match="use sdpa or flash_attention_2"):
        cache.attach(eager)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_is_what_llama_cpp_does_with_such_a_cache(family: str, head_dim: int, tmp_path: Path) -> None:
    """Keys of unlike channels, so that it matters which of them share a block."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    if family == "qwen2":  # its heads are hidden_size / heads wide
        config.num_attention_heads = config.num_key_value_heads = 128 // head_dim
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.k_proj.weight.mul_(
                torch.logspace(-1.5, 0.5, head_dim)
                .roll(5)
                .repeat(len(layer.self_attn.k_proj.weight) // head_dim)[:, None]
            )
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "gguf").mkdir()
    form = Gguf("f32", others="f32", cache="q8_0")
    form.write(Finished(tmp_path / "plain", None, "float32"), tmp_path / "gguf")
    ids = torch.randint(0, 96, (1, 120))
    served = form.open(tmp_path / "gguf", "cpu").logits(ids)[0].double().log_softmax(-1)
    with torch.no_grad():
        whole = plain(ids).logits[0].double().log_softmax(-1)
        cache.attach(plain)
        rounding = plain(ids).logits[0].double().log_softmax(-1)

    def kl(other: torch.Tensor) -> float:
        return float((served.exp() * (served - other)).sum(-1).mean())

    assert kl(rounding) < 0.65 * kl(whole)
