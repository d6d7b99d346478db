"""Quantization-aware training: what is multiplied is what will be exported, and its gradients are LSQ's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.load import empty_model, load_model
from models.lora import Lora
from models.quantization.methods.clipped import Clipped
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.qat import QAT, rounded, rounding_of
from models.quantization.scheme import Activations, Scheme, WeightScheme
from models.quantization.stored import QuantizedWeights, read_quantized
from models.quantization.straight_through import straight_through
from models.training.language_model import LanguageModel
from pipeline.check import check
from pipeline.training.student import Student
from tests.command import train, weights
from tests.pruning.families import model_of
from tests.staged import Experiment, manifest

LITTLE = [
    "data.max_documents=60",
    "data.max_length=48",
    "stages.pretrain.tokenizer.vocab_size=300",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.intermediate_size=48",
    "stages.pretrain.model.num_hidden_layers=2",
    "stages.pretrain.training.max_steps=6",
    "stages.pretrain.training.validate_every_steps=6",
    "stages.quantize.calibration.samples=12",
    "stages.quantize.calibration.length=32",
    "scheme.weights.group_size=16",
    "stages.qat.training.max_steps=6",
    "stages.qat.training.validate_every_steps=6",
    "schedule.warmup_steps=0",
    "optimizer.lr=0.003",
    "trainer.log_every_steps=1",
    "trainer.checkpoint.every_steps=2",
    "trainer.accelerator=cpu",
    "logger=none",
]
EXPERIMENT = Experiment("demo/quantize_aware", LITTLE)
LORA = ["lora=lora", "lora.dropout=0.0"]
SCHEMES = [
    WeightScheme(4, "group", 8),
    WeightScheme(3, "group", 16, symmetric=False, scale_dtype="bfloat16"),
    WeightScheme(8, "channel", None, scale_dtype="float32"),
    WeightScheme(2, "tensor", None, symmetric=False),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat") / "run"
    for stage in ("pretrain", "quantize", "qat"):
        EXPERIMENT.make(folder, stage)
    return folder


def from_(made: Path, *words: str) -> list[str]:
    return [f"model.path={made / 'pretrain'}", f"stages.qat.student.path={made / 'quantize'}", *words]


@pytest.mark.parametrize("place", ["the CPU, called cuda", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("words", [{"lora": Lora()}, {"lora": Lora(base="nf4")}, {"qat": QAT()}])
def test_adapters_and_rounding_are_made_where_the_weights_are(
    place: str, words: dict[str, Any], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in host memory, where each rank of a machine would hold a model."""
    if place != "cuda":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *given, **words: asked.append(words) or load(*given, **words)
    )
    recipe: Any = SimpleNamespace(**{"lora": None, "qat": None, **words}, saved=torch.float32, keep_zeros=False)
    student = Student.read(str(made / "quantize"), recipe, 3, None)
    there, plain = student.load("cuda"), student.load()
    packed = recipe.lora is not None and recipe.lora.base is not None  # it may not fit there before it is packed
    assert [words.get("device_map") for words in asked] == [None if packed else {"": torch.cuda.current_device()}, None]
    if not packed:
        assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda" if place == "cuda" else "cpu"}
    for (name, one), (known, other) in zip(there.named_parameters(), plain.named_parameters(), strict=True):
        assert (name, one.requires_grad) == (known, other.requires_grad)
        assert torch.equal(one.cpu(), other), name


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


# --- rounding on the way ---------------------------------------------------------------------------------------------


def test_a_straight_through_value_is_the_found_one_to_the_bit() -> None:
    torch.manual_seed(0)
    exact, found = torch.randn(1000, requires_grad=True), torch.randn(1000)
    passed = straight_through(exact, found)
    assert torch.equal(passed, found)
    assert not torch.equal(exact + (found - exact), found)  # what is usually written
    passed.sum().backward()
    assert torch.equal(exact.grad, torch.ones(1000))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_multiplied_is_what_the_scheme_says_and_gradients_are_the_formulas(scheme: WeightScheme) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(6, 32)
    scale, zero_point = scheme.of_range(*(0.6 * end for end in scheme.ranges(weight_OI)))  # some are out of range
    weight, learned = weight_OI.clone().requires_grad_(), scale.clone().requires_grad_()
    got = rounded(weight, learned, zero_point, scheme)
    want = scheme.quantize(weight_OI, scale, zero_point)
    assert torch.equal(got, want.dequantized())

    upstream_OI = torch.randn(6, 32)
    by_weight, by_scale = torch.autograd.grad((got * upstream_OI).sum(), [weight, learned])
    spread = scale.repeat_interleave(32 // scale.shape[1], 1).expand(6, 32)
    zeros = zero_point.repeat_interleave(32 // scale.shape[1], 1).expand(6, 32)
    exact = weight_OI / spread + zeros
    inside = (exact > scheme.lowest) & (exact < scheme.highest)
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(by_weight, upstream_OI * inside)
    of_each = torch.where(inside, want.integers - exact, (want.integers - zeros).float()) * upstream_OI
    wide = of_each.unflatten(1, (scale.shape[1], -1)).sum(-1)
    torch.testing.assert_close(by_scale, wide if len(scale) > 1 else wide.sum(0, keepdim=True), atol=1e-4, rtol=1e-4)


def test_activations_are_rounded_by_token_and_the_gradient_passes() -> None:
    read = torch.tensor([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0]], requires_grad=True)
    found = Activations().rounded(read)
    torch.testing.assert_close(found, torch.tensor([[0.5, -1.27, 0.0], [0.0, 0.0, 0.0]]), atol=1e-6, rtol=0)
    found.sum().backward()
    assert torch.equal(read.grad, torch.ones(2, 3))
    static = Activations(dynamic=False).rounded(read.detach() * 3, torch.tensor(0.01))
    torch.testing.assert_close(static[0], torch.tensor([1.27, -1.28, 0.01]))


# --- a model in training --------------------------------------------------------------------------------------------


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def stored(model: Any, scheme: WeightScheme, activations: Activations | None = None, **words: Any) -> QuantizedWeights:
    from models.matrices import matrices

    parameters = dict(model.named_parameters())
    made = {
        str(m): RoundToNearest().quantized(m.of(parameters[m.parameter]).detach(), scheme, None)
        for m in matrices(model)
    }
    return QuantizedWeights(Scheme(scheme, activations), made, **words)


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_model_in_training_gives_what_the_plain_model_of_rounded_weights_gives(
    family: str, scheme: WeightScheme
) -> None:
    model = model_of(family, dtype=torch.float32, vocab_size=300).eval()
    record = stored(
        model, scheme if scheme.group_size is None else WeightScheme(scheme.bits, "group", 4, scheme.symmetric)
    )
    rounding = rounding_of(QAT(), record, empty_model(model.config))
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = rounding.attach(model)
    got = attached(IDS).logits
    settled = rounding.settle(attached)
    assert model.state_dict().keys() == plain.keys()
    assert torch.equal(attached(IDS).logits, got)
    assert settled.matrices.keys() == record.matrices.keys()
    for name, quantized in settled.matrices.items():
        assert torch.equal(quantized.integers, record.matrices[name].integers)
        tensor = model.state_dict()[name]
        assert torch.equal(tensor.T if family == "gpt2" else tensor, quantized.dequantized())
        assert not torch.equal(tensor, plain[name])


def test_adapters_are_quantized_with_the_weight_they_are_added_to() -> None:
    model, scheme = tiny(), WeightScheme(3, "group", 16)
    rounding = rounding_of(QAT("frozen"), stored(model, scheme), empty_model(model.config))
    adapted = rounding.attach(Lora(r=2, dropout=0.0).attach(model, 0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    module = adapted.model.layers[0].mlp.up_proj
    read = torch.randn(5, 32)
    whole = module.base_layer.weight + module.get_delta_weight("default")
    scale = rounding.rule.start.matrices["model.layers.0.mlp.up_proj.weight"].scale
    wanted = scheme.quantize(whole, scale, torch.zeros_like(scale, dtype=torch.int32)).dequantized()
    torch.testing.assert_close(module(read), read @ wanted.T)
    beside = read @ rounding.rule.start.matrices["model.layers.0.mlp.up_proj.weight"].dequantized().T + (
        read @ module.get_delta_weight("default").T
    )
    assert (module(read) - beside).abs().max() > 0.01  # fq(W) + BA is another model
    got = adapted(IDS).logits
    rounding.settle(adapted)
    torch.testing.assert_close(adapted(IDS).logits, got, atol=1e-5, rtol=1e-5)
    assert torch.equal(adapted.model.layers[0].mlp.up_proj.weight, wanted)


def test_scales_that_follow_the_weights_stop_when_they_are_frozen() -> None:
    model, scheme = tiny(), WeightScheme(4, "group", 16)
    name = "model.layers.1.self_attn.q_proj.weight"
    rounding = rounding_of(QAT("min_max", freeze_step=5), stored(model, scheme), empty_model(model.config))
    rounding.attach(model).train()
    module = model.model.layers[1].self_attn.q_proj
    read = torch.randn(3, 32)

    def nearest() -> torch.Tensor:
        return read @ RoundToNearest().quantized(module.weight.detach(), scheme, None).dequantized().T

    with torch.no_grad():
        module.weight.mul_(1.7)
        rounding.rule.step = 4
        assert torch.equal(module(read), nearest())
        module.weight.mul_(3)
        model.eval()(IDS)  # validation comes after the step's weights have changed, and freezes nothing
        model.train()
        rounding.rule.step = 5
        kept = module(read)
        assert (kept - nearest()).abs().max() > 0.1
    settled = rounding.settle(model).matrices[name]
    assert torch.equal(read @ settled.dequantized().T, kept)


def test_least_squared_scales_are_those_of_the_method() -> None:
    model, scheme = tiny(), WeightScheme(3, "group", 16)
    rounding = rounding_of(QAT("mse"), stored(model, scheme), empty_model(model.config))
    rounding.attach(model)
    rounding.rule.step = 0
    module, read = model.model.layers[0].mlp.gate_proj, torch.randn(3, 32)
    wanted = Clipped().quantized(module.weight.detach(), scheme, None).dequantized()
    torch.testing.assert_close(module(read), read @ wanted.T)


def test_static_and_dynamic_activations_are_rounded_while_it_trains() -> None:
    for activations, scales in ((Activations(), {}), (Activations(dynamic=False), 0.02)):
        model = tiny()
        plain = stored(model, WeightScheme(8, "channel", None))
        inputs = {name: torch.tensor(scales) for name in plain.matrices} if scales else {}
        rounding = rounding_of(
            QAT(),
            QuantizedWeights(Scheme(plain.scheme.weights, activations), plain.matrices, inputs),
            empty_model(model.config),
        )
        rounding.attach(model)
        module, read = model.model.layers[0].mlp.up_proj, torch.randn(4, 32)
        scale = read.abs().amax(-1, keepdim=True) / 127 if activations.dynamic else 0.02
        seen = scale * (read / scale).round().clamp(-128, 127)
        wanted = plain.matrices["model.layers.0.mlp.up_proj.weight"].dequantized()
        torch.testing.assert_close(module(read), seen @ wanted.T)


def test_a_settled_model_as_it_is_served_is_the_one_that_was_trained() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    record = stored(model, WeightScheme(4, "group", 16), activations=Activations())
    rounding = rounding_of(QAT(cache="q8_0"), record, empty_model(config))
    trained = rounding.attach(model)(IDS).logits
    settled = rounding.settle(model)
    assert settled.cache == "q8_0"
    plain = model(IDS).logits
    assert (plain - trained).abs().max() > 1e-4
    with rounding.served(model):
        assert torch.equal(model(IDS).logits, trained)
    assert torch.equal(model(IDS).logits, plain)


# --- the stage -------------------------------------------------------------------------------------------------------


def test_training_begins_as_the_post_training_result_and_ends_on_its_scheme(made: Path) -> None:
    start, trained = (
        read_quantized(made / "quantize" / "quantized.safetensors"),
        read_quantized(made / "qat" / "quantized.safetensors"),
    )
    assert trained.scheme == start.scheme
    told = manifest(made / "qat")
    assert told["certificates"]["weights_bit_equal"] is True
    proof = told["certificates"]["trained_equals_frozen"]
    assert proof["max_difference"] <= proof["tolerance"]
    assert told["metrics"]["bits_per_weight"] == manifest(made / "quantize")["metrics"]["bits_per_weight"]
    plain = weights(made / "qat")
    assert plain.keys() == weights(made / "quantize").keys()
    moved = rescaled = 0
    for name, quantized in trained.matrices.items():
        assert torch.equal(plain[name], quantized.dequantized())
        moved += int((quantized.integers != start.matrices[name].integers).sum())
        rescaled += int((quantized.scale != start.matrices[name].scale).sum())
    assert moved > 0
    assert rescaled > 0
    model = load_model(str(made / "quantize"), dtype=torch.float32)
    rounding = rounding_of(QAT(), start, empty_model(model.config))
    before = model(IDS).logits
    torch.testing.assert_close(rounding.attach(model)(IDS).logits, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "words",
    [
        ["qat=frozen"],
        ["qat=min_max", "qat.freeze_step=3"],
        LORA,
        ["objective=cross_entropy", "trainer.precision=bf16-mixed"],
    ],
    ids=["frozen", "min_max", "lora", "bf16"],
)
def test_every_way_to_train_ends_on_the_scheme_and_goes_on_where_it_was_cut(
    words: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EXPERIMENT.make(tmp_path / "whole", "qat", *from_(made, *words))
    kinds = {str(tensor.dtype) for tensor in weights(whole).values()}
    assert kinds == {f"torch.{json.loads((whole / 'config.json').read_text())['dtype']}"}
    assert kinds == {"torch.bfloat16" if "bf16" in words[-1] else "torch.float32"}
    record = read_quantized(whole / "quantized.safetensors")
    start = read_quantized(made / "quantize" / "quantized.safetensors")
    for name, quantized in record.matrices.items():
        assert torch.equal(weights(whole)[name], quantized.dequantized().to(weights(whole)[name].dtype))
        if "frozen" in words[0]:
            assert torch.equal(quantized.scale, start.matrices[name].scale)
    step = LanguageModel.training_step

    def failing(self: LanguageModel, *arguments: Any) -> Any:
        if self.trainer.global_step == 5:
            raise KeyError("power")
        return step(self, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(LanguageModel, "training_step", failing)
        with pytest.raises(KeyError, match="power"):
            EXPERIMENT.make(tmp_path, "qat", *from_(made, *words))
    assert list((tmp_path / "work" / "qat" / "checkpoints").glob("step-00000004"))
    again = EXPERIMENT.make(tmp_path, "qat", *from_(made, *words))
    for name in ("model.safetensors", "quantized.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


RANKS = [("zero3", LORA)]
SLOW = [("zero3", []), ("ddp", []), ("zero1", []), ("zero2", []), ("zero2", LORA)]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [*RANKS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
    ids=lambda value: value if isinstance(value, str) else "lora" if value else "full",
)
def test_two_ranks_land_where_one_does(strategy: str, words: list[str], made: Path, tmp_path: Path) -> None:
    alone = EXPERIMENT.make(tmp_path / "one", "qat", *from_(made, *words))
    done = train(
        "+experiment=demo/quantize_aware",
        *LITTLE,
        *from_(made, *words),
        f"run_dir={tmp_path / 'two'}",
        "stages=[qat]",
        "stages.qat.training.micro_batch=4",
        "trainer.devices=2",
        f"strategy={strategy}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two" / "qat"
    # The same until a weight half-way between two integers falls to the other.
    assert losses(two)[:3] == pytest.approx(losses(alone)[:3], rel=1e-6)
    assert losses(two) == pytest.approx(losses(alone), rel=1e-3)
    assert manifest(two)["certificates"]["weights_bit_equal"] is True
    one, other = read_quantized(alone / "quantized.safetensors"), read_quantized(two / "quantized.safetensors")
    for name, quantized in one.matrices.items():
        assert (quantized.integers == other.matrices[name].integers).float().mean() > 0.995, name
        torch.testing.assert_close(other.matrices[name].scale, quantized.scale, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["qat=learned", "qat.scales=guessed"], "need one of learned, frozen"),
        (["+qat.freeze_step=3"], "need a step from 0 on, of scales that follow"),
        (["lora=lora"], r"lora\.dropout with qat and lora"),
        ([*LORA, "lora.base=nf4"], r"lora\.base with qat and lora"),
        (["student@stages.qat.student=shape", "~stages.qat.student.path"], "training starts from what the stage"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_weight_is_read(
    words: list[str], said: str, made: Path, tmp_path: Path
) -> None:
    config = EXPERIMENT.composed(tmp_path, f"model.path={made / 'pretrain'}", *words)
    if "path" not in config["stages"]["qat"]["student"]:
        config["stages"]["qat"]["student"] |= {"shape": {}}
    else:
        config["stages"]["qat"]["student"]["path"] = str(made / "quantize")
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": config, "stages": ["qat"]})
    assert "\n" not in str(refused.value)


def test_a_start_that_is_not_quantized_is_refused(made: Path, tmp_path: Path) -> None:
    words = [f"model.path={made / 'pretrain'}", f"stages.qat.student.path={made / 'pretrain'}"]
    with pytest.raises(Refusal, match="starts from a quantized model, and the student is not"):
        check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["qat"]})


def test_experts_and_other_models_are_refused() -> None:
    model = tiny()
    record = stored(model, WeightScheme(4, "group", 16))
    strange = QuantizedWeights(
        record.scheme, {"model.layers.9.mlp.up_proj.weight": next(iter(record.matrices.values()))}
    )
    with pytest.raises(Refusal, match=r"the model has no matrix model\.layers\.9"):
        rounding_of(QAT(), strange, empty_model(model.config))
    experts = model_of("mixtral", dtype=torch.float32, vocab_size=300)
    with pytest.raises(Refusal, match="train as one operation"):
        rounding_of(QAT(), stored(experts, WeightScheme(4, "group", 4)), empty_model(experts.config))
