"""Each expert of a mixture is calibrated on the tokens that its router sends to it, and on nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from models.errors import Refusal
from models.experts import LEAST_TOKENS, check_experts_read
from models.hessian import Hessian
from models.layerwise import in_turn
from models.matrices import Matrix, chosen, matrices
from models.pruning.groups import anatomy_of
from models.quantization.folding import fold
from models.quantization.methods.awq import AWQ, Magnitudes
from models.quantization.methods.gptq import GPTQ
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.scheme import QuantizedMatrix, WeightScheme
from models.sparsity.sparsegpt import SparseGPT
from models.sparsity.wanda import Norms, Wanda
from pipeline.steps.layer_by_layer import told_of_experts
from tests.pruning.families import MIXTURES, model_of, tokens

SCHEME = WeightScheme(bits=4, group_size=4)


def routed(model: Any, batches: list[Tensor], layer: int = 0) -> dict[str, Tensor]:
    """By hand: what each expert's matrices read, from the router's weight, softmax and its best k. Float[N, I]."""
    mixture = model.model.layers[layer].mlp
    seen: list[Tensor] = []
    handle = mixture.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for ids in batches:
            model(ids, use_cache=False)
    handle.remove()
    found = {}
    for expert in range(mixture.experts.num_experts):
        parts, inner = [], []
        for x_NI in seen:
            chosen_NK = (x_NI @ mixture.gate.weight.T).softmax(-1).topk(mixture.gate.top_k).indices
            own_NI = x_NI[(chosen_NK == expert).any(-1)]
            gate_NO, up_NO = (own_NI @ mixture.experts.gate_up_proj[expert].T).chunk(2, -1)
            parts.append(own_NI)
            inner.append(silu(gate_NO) * up_NO)
        found[f"mlp.experts.gate_up_proj[{expert}]"] = torch.cat(parts).detach()
        found[f"mlp.experts.down_proj[{expert}]"] = torch.cat(inner).detach()
    return found


def of_experts(model: Any, layer: int = 0) -> list[Matrix]:
    return [matrix for matrix in matrices(model) if matrix.layer == layer and matrix.slot is not None]


def same_integers(got: QuantizedMatrix, want: QuantizedMatrix) -> None:
    """But for halves: the same sums in another order can round a weight that lies between two integers otherwise."""
    assert (got.integers != want.integers).float().mean() < 0.005
    assert (got.integers - want.integers).abs().max() <= 1
    torch.testing.assert_close(got.scale, want.scale, rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_experts_gptq_is_that_of_a_dense_matrix_which_reads_its_routed_tokens(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    batches = list(tokens(16, 30).split(5))
    by_hand = routed(model, batches)
    turn = next(in_turn(model, batches))
    read = turn.read(Hessian)
    assert turn.routed == {place: len(rows) for place, rows in by_hand.items()}
    assert sum(turn.routed.values()) == 2 * 2 * 16 * 30  # two matrices, two experts a token
    for matrix in of_experts(model):
        rows_NI, weight = by_hand[matrix.place], matrix.of(model.get_parameter(matrix.parameter)).detach()
        dense = Hessian(rows_NI.shape[1])
        dense.add(rows_NI)
        assert dense.tokens == read[matrix.place].tokens
        torch.testing.assert_close(read[matrix.place].mean_II, 2 * rows_NI.T @ rows_NI / len(rows_NI))
        made = GPTQ(act_order=False).quantized(weight, SCHEME, read[matrix.place])
        same_integers(made, GPTQ(act_order=False).quantized(weight, SCHEME, dense))
        nearest = RoundToNearest().quantized(weight, SCHEME, None)
        apart = [rows_NI @ (each.dequantized() - weight).T for each in (made, nearest)]
        assert apart[0].norm() < apart[1].norm()  # which is what it is for


def best_scale(readers: list[tuple[Tensor, Tensor]], mean_I: Tensor) -> Tensor:
    """AWQ's search by hand, on the tokens themselves: of 20 ratios the one with the least error of all outputs."""
    found = []
    for ratio in torch.arange(20) / 20:
        s_I = mean_I.pow(float(ratio))
        s_I = s_I / (s_I.max() * s_I.min()).sqrt()
        errors = []
        for weight, rows_NI in readers:
            back = RoundToNearest().quantized(weight * s_I, SCHEME, None).dequantized() / s_I
            errors.append(float((rows_NI.double() @ (back - weight).double().T).square().sum()))
        found.append((sum(errors), s_I))
    return min(found, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_so_is_awqs_and_the_scale_that_experts_share_is_the_best_for_all_their_tokens(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    batches = list(tokens(16, 30).split(5))
    by_hand, layer = routed(model, batches), model.model.layers[0]
    first, second = ([m for m in of_experts(model) if name in m.name] for name in ("gate_up", "down"))
    whole = {m.place: m.of(model.get_parameter(m.parameter)).detach().clone() for m in (*first, *second)}
    shared = torch.cat([by_hand[m.place] for m in first]).abs().mean(0)
    s_I = best_scale([(whole[m.place], by_hand[m.place]) for m in first], shared)
    norm, router = layer.post_attention_layernorm.weight.detach().clone(), layer.mlp.gate.weight.detach().clone()
    with torch.no_grad():
        logits = model(batches[0]).logits
    turn, method = next(in_turn(model, batches)), AWQ()
    taken = [m for m in chosen(model, (), "skip") if m.layer == 0]
    read = fold(anatomy_of(model), turn, taken, turn.read(Magnitudes), method.scales, SCHEME)
    torch.testing.assert_close(layer.post_attention_layernorm.weight, norm / s_I)
    torch.testing.assert_close(layer.mlp.gate.weight, router * s_I)  # or other experts would be chosen
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, logits, rtol=1e-3, atol=1e-3)
    for up, down in zip(first, second, strict=True):
        rows_NI = by_hand[down.place]
        t_I = best_scale([(whole[down.place], rows_NI)], rows_NI.abs().mean(0))
        scaled = whole[up.place] * s_I
        scaled[len(scaled) // 2 :] /= t_I[:, None]
        for matrix, weight, rows in (
            (up, scaled, by_hand[up.place] / s_I),
            (down, whole[down.place] * t_I, rows_NI / t_I),
        ):
            now = matrix.of(model.get_parameter(matrix.parameter)).detach()
            torch.testing.assert_close(now, weight, rtol=1e-4, atol=1e-5)
            dense = Magnitudes(rows.shape[1])
            dense.add(rows)
            same_integers(method.quantized(now, SCHEME, read[matrix.place]), method.quantized(weight, SCHEME, dense))


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_sparsified_by_what_is_routed_to_them(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    batches = list(tokens(16, 30).split(5))
    by_hand, turn = routed(model, batches), next(in_turn(model, batches))
    norms, hessians = turn.read(Norms), turn.read(Hessian)
    for matrix in of_experts(model):
        weight, rows = matrix.of(model.get_parameter(matrix.parameter)).detach(), by_hand[matrix.place]
        scores = weight.abs() * rows.norm(dim=0)
        half = weight.shape[1] // 2
        want = weight.masked_fill(scores.argsort(1).argsort(1) < half, 0)
        assert torch.equal(Wanda().sparsified(weight, weight.numel() // 2, norms[matrix.place]), want)
        dense = Hessian(rows.shape[1])
        dense.add(rows)
        got, want = (
            SparseGPT().sparsified(weight, weight.numel() // 2, each) for each in (hessians[matrix.place], dense)
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("counts", [[LEAST_TOKENS, 99], [LEAST_TOKENS - 1, 0]])
def test_what_is_told_of_experts_counts_those_below_the_floor(
    counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_of_experts("quantize", {"a": counts[0], "b": counts[1]}, "round to nearest")["experts"]
    few = {name: tokens for name, tokens in zip("ab", counts, strict=True) if tokens < 32}
    assert (told["too_few_tokens"], told["round_to_nearest"]) == (few, len(few))
    assert bool(capsys.readouterr().out) == bool(few)
    assert told_of_experts("quantize", {}, "round to nearest") == {}


def test_experts_of_another_layout_are_refused_with_the_remedy() -> None:
    model = model_of("mixtral", dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    experts.register_parameter("third_proj", torch.nn.Parameter(torch.zeros(4, 8, 8)))
    with pytest.raises(Refusal, match=r"GPTQ: what the experts of .*third_proj read is not known.*use a, or skip="):
        check_experts_read(model, matrices(model), "GPTQ", "a")
    del experts.third_proj
    experts.act_fn = torch.nn.GELU()
    turn = next(in_turn(model, [tokens(4, 20)]))
    assert turn.read(Hessian)
    plain = experts.forward
    experts.forward = lambda *words: 2 * plain(*words)  # an operation that does something else besides
    with pytest.raises(Refusal, match=r"MixtralExperts: what its experts read is not known.*skip="):
        turn.read(Hessian)
