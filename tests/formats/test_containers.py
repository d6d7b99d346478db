"""What is written is what was quantized: integers as they were, opened by others as the same numbers."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import Refusal
from models.folder import INDEX
from models.formats.awq import AWQ
from models.formats.certificate import certify, refer
from models.formats.compressed_tensors import CompressedTensors
from models.formats.container import check_installed
from models.formats.format import Finished, Format
from models.formats.gguf import Gguf
from models.formats.gptq import GPTQ
from models.formats.huggingface import HuggingFace
from models.formats.torchao import TorchAO
from models.load import check_model, empty_model, load_config, parameter_count
from models.measure import Speed
from models.quantization.scheme import Activations, WeightScheme
from models.quantization.stored import open_quantized, read_quantized
from tests.formats.quantized import plan_of, quantized

ALL: dict[str, Format] = {
    "huggingface": HuggingFace(),
    "compressed_tensors": CompressedTensors(),
    "gptq": GPTQ(),
    "awq": AWQ(),
    "torchao": TorchAO(),
}
WIDE = {"intermediate_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 2}
GROUP = WeightScheme(4, "group", 16)
SCHEMES = {
    "int4": GROUP,
    "int4_asymmetric": WeightScheme(4, "group", 16, symmetric=False),
    "int4_channel": WeightScheme(4, "channel", None),
    "int8": WeightScheme(8, "channel", None),
    "int8_tensor": WeightScheme(8, "tensor", None),
    "int8_asymmetric": WeightScheme(8, "channel", None, symmetric=False),
    "int3": WeightScheme(3, "group", 32),
    "int2": WeightScheme(2, "group", 16),
    "int5": WeightScheme(5, "group", 16),
}
HELD = {
    "huggingface": list(SCHEMES),
    "compressed_tensors": ["int4", "int4_channel", "int8", "int8_tensor", "int3", "int2", "int5"],
    "gptq": ["int4", "int4_channel", "int8", "int8_tensor", "int3", "int2"],
    "awq": ["int4", "int4_asymmetric", "int4_channel"],
    "torchao": list(SCHEMES),
}
ROWS = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (23, 40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name of the scheme, each made once."""
    made: dict[str, Path] = {}

    def model(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = quantized(tmp_path_factory.mktemp(scheme), SCHEMES[scheme], **WIDE)
        return made[scheme]

    return model


def written(form: Format, source: Path, folder: Path, dtype: str = "float32") -> Path:
    folder.mkdir(parents=True)
    form.write(Finished(source, open_quantized(source / "quantized.safetensors"), dtype), folder)
    return folder


def certified(
    form: Format,
    source: Path,
    folder: Path,
    tmp_path: Path,
    dtype: str = "float32",
    activations: Activations | None = None,
) -> dict[str, Any]:
    record, references = source / "quantized.safetensors", tmp_path / "references"
    references.mkdir(exist_ok=True)
    refer(str(source), record, dtype, ROWS, references, "cpu", activations)
    return certify(form, folder, Finished(source, None, dtype), record, ROWS, references, "cpu", Speed(4, 2, 1))


@pytest.mark.parametrize(("name", "scheme"), [(name, scheme) for name, schemes in HELD.items() for scheme in schemes])
def test_every_container_gives_back_the_very_values_of_the_schemes_it_holds(
    name: str, scheme: str, models: Any, tmp_path: Path
) -> None:
    source, form = models(scheme), ALL[name]
    form.check(plan_of(source, SCHEMES[scheme]))
    runtime = form.open(written(form, source, tmp_path / name), "cpu")
    check_model(str(tmp_path / name), "teacher")
    for matrix, made in read_quantized(source / "quantized.safetensors").matrices.items():
        assert torch.equal(runtime.weight(matrix), made.dequantized()), matrix
    want = HuggingFace().open(source, "cpu").logits(ROWS[0][None])
    assert float((runtime.logits(ROWS[0][None]) - want).abs().max()) < 1e-4
    assert want.abs().max() > 0.1


@pytest.mark.parametrize(("name", "scheme"), [(name, scheme) for name, schemes in HELD.items() for scheme in SCHEMES
                                            if scheme not in schemes])  # fmt: skip
def test_a_scheme_that_a_container_cannot_hold_is_refused_with_what_it_could(
    name: str, scheme: str, models: Any
) -> None:
    with pytest.raises(Refusal, match=r"need|use format=") as refused:
        ALL[name].check(plan_of(models(scheme), SCHEMES[scheme]))
    assert "\n" not in str(refused.value)


def bits(words: np.ndarray, count: int, width: int) -> np.ndarray:
    """`count` integers of `width` bits from a row of words, one after another, by arithmetic on one long number."""
    rows = []
    for row in words.reshape(len(words), -1).tolist():
        whole = sum((word % 2**32) << (32 * place) for place, word in enumerate(row))
        rows.append([(whole >> (width * at)) % 2**width for at in range(count)])
    return np.array(rows)


@pytest.mark.parametrize("scheme", ["int4", "int3", "int8"])
def test_integers_in_the_files_of_one_model_are_those_beside_it(scheme: str, models: Any, tmp_path: Path) -> None:
    source, width = models(scheme), SCHEMES[scheme].bits
    record = read_quantized(source / "quantized.safetensors")
    packed = load_file(written(CompressedTensors(), source, tmp_path / "ct") / "model.safetensors")
    gptq = load_file(written(GPTQ(), source, tmp_path / "gptq") / "model.safetensors")
    up = 2 ** (width - 1)
    for name, made in list(record.matrices.items())[:4]:
        module, want = name.removesuffix(".weight"), made.integers.numpy()
        outputs, inputs = want.shape
        assert np.array_equal(bits(packed[f"{module}.weight_packed"].numpy(), inputs, width) - up, want)
        assert torch.equal(packed[f"{module}.weight_scale"], made.scale.half())
        assert np.array_equal(bits(gptq[f"{module}.qweight"].numpy().T, inputs, width) - up, want)
        assert set(bits(gptq[f"{module}.qzeros"].numpy(), outputs, width).flatten()) == {up - 1}
        assert torch.equal(gptq[f"{module}.scales"].T, made.scale.half())
        assert gptq[f"{module}.g_idx"].tolist() == [at // (inputs // made.scale.shape[1]) for at in range(inputs)]
    assert packed["lm_head.weight"].dtype == gptq["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("scheme", ["int4", "int4_asymmetric"])
def test_awq_files_hold_eight_outputs_in_a_word_in_their_own_order(scheme: str, models: Any, tmp_path: Path) -> None:
    source = models(scheme)
    held = load_file(written(AWQ(), source, tmp_path / "awq") / "model.safetensors")
    up = 8 if SCHEMES[scheme].symmetric else 0
    for name, made in list(read_quantized(source / "quantized.safetensors").matrices.items())[:3]:
        module = name.removesuffix(".weight")
        for part, want in (("qweight", made.integers.T + up), ("qzeros", made.zero_point.T + up)):
            words = held[f"{module}.{part}"].numpy()
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                assert np.array_equal((words >> (4 * place)) & 15, want[:, output::8].numpy()), (part, place)
        assert torch.equal(held[f"{module}.scales"], made.scale.T.half())


def autoawqs_weight(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """Float32[I, O], as AutoAWQ dequantizes what it calls GEMM.

    awq/utils/packing_utils.py of github.com/casper-hansen/AutoAWQ: a word is taken apart by shifts of 0, 4, …, 28; its
    eight outputs are at places 0, 4, 1, 5, 2, 6, 3, 7; and a weight is (integer − zero) · scale of its group.
    """

    def integers(words_NW: np.ndarray) -> np.ndarray:
        apart_NWE = (words_NW.astype(np.int64)[..., None] >> (4 * np.arange(8))) & 15
        return apart_NWE[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words_NW), -1)

    rows = np.arange(len(qweight)) // group
    found: np.ndarray = (integers(qweight) - integers(qzeros)[rows]) * scales.astype(np.float32)[rows]
    return found


@pytest.mark.parametrize("scheme", ["int4", "int4_asymmetric", "int4_channel"])
def test_autoawqs_own_unpacking_gives_the_quantized_weights(scheme: str, models: Any, tmp_path: Path) -> None:
    source = models(scheme)
    folder = written(AWQ(), source, tmp_path / "awq")
    held = load_file(folder / "model.safetensors")
    size = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    for name, made in read_quantized(source / "quantized.safetensors").matrices.items():
        qweight, qzeros, scales = (held[f"{name.removesuffix('.weight')}.{part}"].numpy() for part in
                                   ("qweight", "qzeros", "scales"))  # fmt: skip
        weight_IO = autoawqs_weight(qweight, qzeros, scales, len(qweight) if size == -1 else size)
        np.testing.assert_array_equal(weight_IO.T, made.dequantized().numpy(), name)


def test_weights_that_were_changed_after_they_were_quantized_are_refused(models: Any, tmp_path: Path) -> None:
    shutil.copytree(models("int4"), tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.01
    save_file(held, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        Refusal, match=r"layers\.0\.self_attn\.q_proj\.weight is not what quantized\.safetensors beside it"
    ):
        refer(str(tmp_path / "model"), tmp_path / "model" / "quantized.safetensors", "float32", ROWS, tmp_path, "cpu")


@pytest.mark.parametrize("dynamic", [True, False])
def test_activations_are_rounded_as_the_scheme_says(dynamic: bool, tmp_path: Path) -> None:
    activations = Activations(8, dynamic)
    source = quantized(tmp_path / "model", SCHEMES["int8"], activations, **WIDE)
    form = CompressedTensors()
    form.check(plan_of(source, SCHEMES["int8"], activations))
    folder = tmp_path / "ct"
    folder.mkdir()
    made = form.write(Finished(source, read_quantized(source / "quantized.safetensors"), "float32"), folder)
    told = certified(form, source, folder, tmp_path, activations=made.activations)
    assert told["weights_bit_equal"]
    assert told["kl"] < 1e-9
    assert told["logits_max_difference"] < 1e-5
    # transformers divides a token's largest number by 127.5; vLLM and the scheme by 127
    assert (made.activations == activations) == ("activations" not in made.fallbacks) == (not dynamic)
    assert 1e-9 < certified(form, source, folder, tmp_path, activations=activations)["kl"] < 1e-3 or not dynamic
    plain = HuggingFace().open(source, "cpu").logits(ROWS[0][None])
    rounded = form.open(folder, "cpu").logits(ROWS[0][None])
    assert float((plain - rounded).abs().max()) > 1e-3  # so that the certificate is not of a model without them
    for name, other in ALL.items():
        if name not in ("huggingface", "compressed_tensors"):
            with pytest.raises(Refusal, match=r"use format=\[compressed_tensors\]"):
                other.check(plan_of(source, GROUP, activations))


@pytest.mark.parametrize("name", ["huggingface", "compressed_tensors", "torchao"])
def test_a_model_of_16_bits_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    scheme = WeightScheme(4, "group", 16, scale_dtype="bfloat16")
    source = quantized(tmp_path / "model", scheme, dtype=torch.bfloat16, **WIDE)
    form = ALL[name]
    form.check(plan_of(source, scheme))
    told = certified(form, source, written(form, source, tmp_path / name, "bfloat16"), tmp_path, "bfloat16")
    assert told["weights_bit_equal"]
    assert told["logits_max_difference"] == 0


@pytest.mark.parametrize("name", ["compressed_tensors", "torchao"])
def test_scales_that_the_models_dtype_rounds_are_refused(name: str, tmp_path: Path) -> None:
    source = quantized(tmp_path / "model", GROUP, dtype=torch.bfloat16, **WIDE)
    with pytest.raises(Refusal, match=r"rounds scales in float16; quantize with .*=bfloat16"):
        ALL[name].check(plan_of(source, GROUP))


class Requantized(CompressedTensors):
    """Finds a scheme anew in weights that are on one: the usual route."""

    def write(self, finished: Finished, folder: Path) -> Any:
        record = finished.quantized
        assert record is not None
        anew = {}
        for name, made in record.matrices.items():
            weight = made.dequantized()
            scheme = record.scheme.weights
            anew[name] = scheme.quantize(weight, *scheme.of_range(*scheme.ranges(weight)))
        return super().write(Finished(finished.folder, type(record)(record.scheme, anew), finished.dtype), folder)


class Mixed(GPTQ):
    """One matrix by the scales of another scheme."""

    def write(self, finished: Finished, folder: Path) -> Any:
        found = super().write(finished, folder)
        held = load_file(folder / "model.safetensors")
        scales = held["model.layers.1.mlp.up_proj.scales"]
        scales[:] = scales.amax(0)  # by channel, where groups were
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return found


class OtherScales(CompressedTensors):
    """Scales in another 16 bits than those that weights were rounded with."""

    def write(self, finished: Finished, folder: Path) -> Any:
        found = super().write(finished, folder)
        held = load_file(folder / "model.safetensors")
        held = {name: t.bfloat16() if name.endswith("weight_scale") else t for name, t in held.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return found


@pytest.mark.parametrize("wrong", [Requantized, Mixed, OtherScales])
def test_the_certificate_trips_over_weights_of_another_scheme(wrong: Any, models: Any, tmp_path: Path) -> None:
    source = models("int4")
    told = certified(wrong(), source, written(wrong(), source, tmp_path / "wrong"), tmp_path)
    assert not told["weights_bit_equal"]
    assert told["first_odd_weight"].startswith("model.layers.")
    right = wrong.__mro__[1]()
    assert certified(right, source, written(right, source, tmp_path / "right"), tmp_path)["weights_bit_equal"]


def test_the_figures_are_those_of_the_dense_formulas(models: Any, tmp_path: Path) -> None:
    """Of an export that really differs: the other scheme's weights."""
    source, other = models("int4"), models("int2")
    folder = written(HuggingFace(), other, tmp_path / "other")
    told = certified(HuggingFace(), source, folder, tmp_path)
    p, q = (HuggingFace().open(at, "cpu") for at in (source, folder))
    want, apart, nats, targets = 0.0, 0.0, 0.0, 0
    for ids in ROWS:
        a, b = p.logits(ids[None])[0].double(), q.logits(ids[None])[0].double()
        want += float(torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="sum"))
        nats += float(torch.nn.functional.cross_entropy(b[:-1], ids[1:], reduction="sum"))
        apart, targets = max(apart, float((a - b).abs().max())), targets + len(ids) - 1
    assert told["kl"] == pytest.approx(want / sum(map(len, ROWS)), rel=1e-6)
    assert told["kl"] > 1e-3
    assert told["logits_max_difference"] == pytest.approx(apart, rel=1e-6)
    assert told["perplexity_reloaded"] == pytest.approx(float(np.exp(nats / targets)), rel=1e-6)
    assert not told["weights_bit_equal"]


def test_transformers_opens_it_in_a_process_that_knows_nothing_of_this_project(models: Any, tmp_path: Path) -> None:
    source = models("int4")
    folders = [written(ALL[name], source, tmp_path / name) for name in ("huggingface", "compressed_tensors", "torchao")]
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 40)[None]
want, *others = (AutoModelForCausalLM.from_pretrained(at).eval()(ids).logits for at in sys.argv[1:])
print(*[(want - other).abs().max().item() < 1e-5 for other in others], "models" in sys.modules)
"""
    words = [sys.executable, "-P", "-c", code, str(source), *map(str, folders)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-4:] == ["True", "True", "True", "False"], done.stderr


def test_bits_per_weight_count_all_that_is_stored(models: Any, tmp_path: Path) -> None:
    source = models("int4")
    folder = tmp_path / "gptq"
    folder.mkdir()
    told = GPTQ().write(Finished(source, open_quantized(source / "quantized.safetensors"), "float16"), folder)
    held = load_file(folder / "model.safetensors").values()
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in held)
    numbers = parameter_count(empty_model(load_config(str(source))))
    assert told.bits_per_weight == pytest.approx(stored / numbers)
    assert told.fallbacks == {}


@pytest.mark.parametrize("name", list(ALL))
def test_a_checkpoint_of_several_files_and_tied_tables(name: str, tmp_path: Path) -> None:
    source = quantized(tmp_path / "one", GROUP, tie_word_embeddings=True, **WIDE)
    held = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in held
    names = sorted(held)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (source / "model.safetensors").unlink()
    for file, part in files.items():
        save_file({each: held[each] for each in part}, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {each: file for file, part in files.items() for each in part}}
    (source / INDEX).write_text(json.dumps(index))
    form = ALL[name]
    told = certified(form, source, written(form, source, tmp_path / name), tmp_path)
    assert told["weights_bit_equal"]
    assert told["logits_max_difference"] < 1e-4


def test_what_was_skipped_is_named_in_the_config_and_stays_as_it_is(tmp_path: Path) -> None:
    source = quantized(tmp_path / "model", GROUP, **WIDE)
    record = read_quantized(source / "quantized.safetensors")
    left = {name: made for name, made in record.matrices.items() if name != "model.layers.1.mlp.down_proj.weight"}
    type(record)(record.scheme, left).write(source / "quantized.safetensors")
    for name, form in ALL.items():
        folder = written(form, source, tmp_path / name)
        assert certified(form, source, folder, tmp_path)["logits_max_difference"] < 1e-4, name
        said = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
        if name == "gptq":
            assert list(said["dynamic"]) == [r"-:^model\.layers\.1\.mlp\.down_proj$"]
            assert [runtime for runtime, _ in form.serving(folder, "m")] == [
                "transformers, with pip install optimum gptqmodel"
            ]
        elif name != "huggingface":
            key = "ignore" if name == "compressed_tensors" else "modules_to_not_convert"
            assert sorted(said[key]) == ["lm_head", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_matrices_that_are_no_linear_modules_are_refused_where_containers_hold_nothing_else(
    family: str, tmp_path: Path
) -> None:
    scheme = WeightScheme(4, "channel", None)
    source = quantized(tmp_path / "model", scheme, family=family)
    for name in ("compressed_tensors", "gptq", "awq", "torchao"):
        with pytest.raises(Refusal, match=r"Conv1D|other experts") as refused:
            ALL[name].check(plan_of(source, scheme))
        assert "use format=[huggingface]" in str(refused.value)
    folder = written(HuggingFace(), source, tmp_path / "plain")
    assert certified(HuggingFace(), source, folder, tmp_path)["weights_bit_equal"]


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "opt", "gemma2"])
def test_fused_projections_and_biases_come_back(family: str, tmp_path: Path) -> None:
    more = {"ffn_dim": 64} if family == "opt" else {"intermediate_size": 64}
    source = quantized(tmp_path / "model", GROUP, family=family, **more)
    for name, form in ALL.items():
        form.check(plan_of(source, GROUP))
        told = certified(form, source, written(form, source, tmp_path / name), tmp_path)
        assert told["weights_bit_equal"], name
        assert told["logits_max_difference"] < 1e-4, name


def test_widths_that_words_do_not_hold_are_refused_with_those_that_fit(tmp_path: Path) -> None:
    scheme = WeightScheme(4, "channel", None)
    source = quantized(tmp_path / "model", scheme, intermediate_size=44)
    for form in (GPTQ(), AWQ()):
        with pytest.raises(
            Refusal, match=r"44 (inputs|outputs), and the container packs 8 at once; .* prune with .*of=8, "
        ):
            form.check(plan_of(source, scheme))
    CompressedTensors().check(plan_of(source, scheme))
    form = CompressedTensors()
    assert certified(form, source, written(form, source, tmp_path / "ct"), tmp_path)["weights_bit_equal"]


def test_a_model_that_is_not_quantized_goes_into_plain_files_only(models: Any) -> None:
    plan = plan_of(models("int4"), None)
    HuggingFace().check(plan)
    for name in ("compressed_tensors", "gptq", "awq", "torchao"):
        with pytest.raises(Refusal, match="quantized weights, and the model's are not; quantize them with"):
            ALL[name].check(plan)


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(Refusal, match=r"and none is installed; pip install 'compressed-tensors', or .*formats\.a=null"):
        check_installed("stages.export.formats.a", CompressedTensors())
    monkeypatch.setattr(metadata, "version", lambda name: "2025.1.1")
    with pytest.raises(Refusal, match=r"and 2025\.1\.1 is installed; pip install 'xllamacpp==2026"):
        check_installed("stages.export.formats.a", Gguf())  # whose library is known by its binary interface


@pytest.mark.parametrize("name", list(ALL))
def test_every_format_says_how_it_is_served(name: str, models: Any, tmp_path: Path) -> None:
    folder = written(ALL[name], models("int4"), tmp_path / name)
    path = "/my models/café's"
    told = ALL[name].serving(folder, path)
    assert told
    for runtime, command in told:
        words = shlex.split(command)
        if runtime.startswith("DeepSpeed"):
            assert words[:2] == ["python", "-c"]
            assert repr(path) in words[2]
            ast.parse(words[2])
        else:
            assert path in words
    runtimes = {runtime for runtime, _ in told}
    assert ("vLLM" in runtimes) == (name == "huggingface")  # no kernel of vLLM's takes groups of 16


DTYPES_TOLD = {
    # (format, its dtype) → what vLLM computes in, and transformers; left alone, vLLM takes bfloat16 for float32
    ("huggingface", "float32"): ("float32", "float32"),
    ("huggingface", "bfloat16"): ("bfloat16", "bfloat16"),
    ("compressed_tensors", "float32"): ("float16", "float32"),
    ("compressed_tensors", "bfloat16"): ("bfloat16", "bfloat16"),
    ("gptq", "float32"): ("float16", "float16"),
    ("awq", "float32"): ("float16", "float16"),
    ("torchao", "float32"): (None, "float32"),
}


@pytest.mark.parametrize(("name", "dtype"), DTYPES_TOLD)
def test_every_command_says_in_which_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    scheme = WeightScheme(4, "group", 32, scale_dtype="bfloat16" if dtype == "bfloat16" else "float16")
    source = quantized(tmp_path / "model", scheme, dtype=getattr(torch, dtype), **WIDE)
    told = dict(ALL[name].serving(written(ALL[name], source, tmp_path / name, dtype), "m"))
    words = {
        runtime.partition(",")[0]: command.split(" --dtype ")[1:2]
        for runtime, command in told.items()
        if not runtime.startswith(("TensorRT", "DeepSpeed"))  # the one has no such word, the other says it in Python
    }
    vllm, plain = DTYPES_TOLD[name, dtype]
    assert words["transformers"] == [plain]
    assert words.get("vLLM", [None]) == [vllm]
    assert words.get("TGI", [None]) == [vllm if vllm != "float32" else "float16"]  # TGI has no float32
    assert f"torch.{dtype}" in told.get("DeepSpeed-Inference, one answer", f"torch.{dtype}")
