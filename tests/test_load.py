"""The one door for models: what opens is the whole of what its config describes, and the rest is said in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.errors import Refusal
from models.folder import check_folder
from models.formats.checkpoint import names
from models.load import check_model, load_model
from models.save import save_model
from pipeline.data.tokenizer import load_tokenizer
from tests.optional_data import STORIES, needed
from tests.pruning.families import FAMILIES, model_of, tokens

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    model_of("llama", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def opened(folder: Path | str) -> Any:
    return load_model(str(folder), dtype=torch.float32, role="teacher")


def refusal_of(folder: Path | str) -> str:
    with pytest.raises(Refusal) as refused:
        opened(folder)
    said = str(refused.value)
    assert said.startswith(f"teacher.path={folder}: ")
    assert "\n" not in said
    return said


def checked(folder: Path | str) -> str:
    """What is said before any weight is read."""
    with pytest.raises(Refusal) as refused:
        check_model(str(folder), "teacher")
    return str(refused.value)


def change(folder: Path, work: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    work(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_straight_to_a_device_comes_the_same_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the CPU, called by another name; the way is that of a GPU."""
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *given, **words: asked.append(words) or load(*given, **words)
    )
    model_of(family, dtype=torch.float32).save_pretrained(tmp_path)
    there = load_model(str(tmp_path), dtype=torch.float32, device="cuda")
    plain = load_model(str(tmp_path), dtype=torch.float32)
    assert [words.get("device_map") for words in asked] == [{"": torch.device("cpu")}, None]
    assert dict(plain.named_buffers()).keys() == dict(there.named_buffers()).keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(there.state_dict()[name], tensor), name
    assert not any(hasattr(module, "_hf_hook") for module in there.modules())
    change(tmp_path, lambda state: state.pop(min(name for name in state if "norm" in name or "ln_" in name)))
    with pytest.raises(Refusal, match="1 tensor missing from its weights"):
        load_model(str(tmp_path), dtype=torch.float32, device="cuda")


@pytest.mark.gpu
def test_a_model_goes_to_the_gpu_without_a_copy_in_host_memory(folder: Path) -> None:
    there = load_model(str(folder), dtype=torch.float32, device="cuda")
    assert {tensor.device for tensor in there.state_dict().values()} == {torch.device("cuda", 0)}
    plain = opened(folder).state_dict()
    assert all(torch.equal(tensor.cpu(), plain[name]) for name, tensor in there.state_dict().items())


def in_parts(folder: Path, second: str = "model-2.safetensors") -> None:
    """Two parts and their index; `second` is the name the index has for the second one."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for part, its in halves.items():
        save_file({name: state[name] for name in its}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    told = {"model-1.safetensors": "model-1.safetensors", "model-2.safetensors": second}
    index = {"metadata": {}, "weight_map": {name: told[part] for part, its in halves.items() for name in its}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_as_it_was_saved(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    check_model(str(tmp_path / "model"), "teacher")
    found = opened(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "gone", "said"),
    [
        ("llama", DOWN, f"1 tensor missing from its weights: {DOWN}"),
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", "1 tensor missing from its weights: transformer.h.1.mlp"),
        # What experts are merged to has no room for one less, or cannot be made.
        (
            "qwen3_moe",
            "model.layers.1.mlp.experts.2.down_proj.weight",
            "experts.down_proj [3, 32, 24] where the config",
        ),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
            "parts of model.layers.1.mlp.experts.gate_up",
        ),
    ],
)
def test_a_tensor_that_is_missing_is_named(family: str, gone: str, said: str, tmp_path: Path) -> None:
    model_of(family, dtype=torch.float32).save_pretrained(tmp_path / "model")
    change(tmp_path / "model", lambda state: state.pop(gone))
    assert said in refusal_of(tmp_path / "model")
    assert said in checked(tmp_path / "model")


def test_a_real_teacher_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    shutil.copytree(needed(STORIES), tmp_path / "model", copy_function=shutil.copyfile)
    os.chmod(tmp_path / "model", 0o755)
    assert opened(tmp_path / "model").num_parameters() == 260_032
    change(tmp_path / "model", lambda state: state.pop(DOWN))
    assert f"1 tensor missing from its weights: {DOWN}" in refusal_of(tmp_path / "model")


def test_many_that_are_missing_are_counted_and_three_of_them_named(folder: Path) -> None:
    change(folder, lambda state: [state.pop(name) for name in list(state) if "mlp" in name])
    said = refusal_of(folder)
    assert "9 tensors missing" in said
    assert "and 6 more" in said
    assert said.count("model.layers.") == 3


def test_a_tensor_that_is_no_part_of_the_model_is_named(folder: Path) -> None:
    change(folder, lambda state: state.update({"model.layers.2.mlp.other.weight": torch.zeros(2)}))
    for said in (refusal_of(folder), checked(folder)):
        assert "1 tensor in its weights and not in the model of its config: model.layers.2.mlp.other.weight" in said


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, lambda state: state.update({DOWN: torch.zeros(32, 21)}))
    for said in (refusal_of(folder), checked(folder)):
        assert f"1 tensor of another shape: {DOWN} [32, 21] where the config says [32, 20]" in said


def test_a_layer_more_than_the_config_has_is_not_left_out(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    assert "9 tensors in its weights and not in the model of its config: model.layers.2." in refusal_of(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (DOWN, float("nan"), f"NaN in {DOWN}"),
        ("model.norm.weight", float("-inf"), "infinity in model.norm.weight"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_their_tensors_name(
    name: str, value: float, said: str, folder: Path
) -> None:
    change(folder, lambda state: state[name].view(-1)[-1].fill_(value))
    assert said in refusal_of(folder)


def test_large_numbers_whose_sum_overflows_are_finite(folder: Path) -> None:
    change(folder, lambda state: state[DOWN].fill_(3e38))
    assert opened(folder).model.layers[2].mlp.down_proj.weight.sum().isinf()


def test_what_older_checkpoints_hold_beside_the_weights_is_no_fault(folder: Path) -> None:
    """Rotary frequencies of every layer, as Llama 1 and 2 were published: transformers itself says they are nothing."""
    change(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    check_model(str(folder), "teacher")
    opened(folder)


def test_a_tied_head_may_be_there_or_not(tmp_path: Path) -> None:
    model = model_of("llama", dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    found = opened(tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_packed_weights_scales_are_looked_at_too(folder: Path) -> None:
    from models.whole import held_in

    class Packed(torch.Tensor):
        """As bitsandbytes holds a matrix."""

    class State:
        def __init__(self, absmax: torch.Tensor, inner: State | None = None) -> None:
            self.absmax, self.offset, self.state2 = absmax, torch.zeros(()), inner

    packed = torch.zeros(4, dtype=torch.uint8).as_subclass(Packed)
    packed.quant_state = State(torch.zeros(2, dtype=torch.uint8), State(torch.tensor([float("nan")])))  # type: ignore[attr-defined]
    assert sum(bool(part.isnan().any()) for part in held_in(packed)) == 1


class Armed:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "second", ["evil.bin", "../outside.safetensors", "{folder}/model-2.safetensors", "a\\b.safetensors"]
)
def test_an_index_that_names_anything_but_safetensors_of_the_folder_is_refused(
    second: str, folder: Path, tmp_path: Path
) -> None:
    second = second.format(folder=folder)
    in_parts(folder, second)
    (folder / "evil.bin").write_bytes(pickle.dumps(Armed(tmp_path / "ran")))
    shutil.copy(folder / "model-2.safetensors", tmp_path / "outside.safetensors")
    assert f"model.safetensors.index.json names {second!r}" in refusal_of(folder)
    assert f"names {second!r}" in checked(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "values", [{"transformers_weights": "adapter_model.bin"}, {"transformers_weights": "a.safetensors"}]
)
def test_a_config_that_names_its_weights_is_refused(values: dict[str, str], folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Armed(tmp_path / "ran")))
    change_config(folder, **values)
    assert "names its weights by transformers_weights" in refusal_of(folder)
    assert not (tmp_path / "ran").exists()


def test_an_export_reads_the_files_that_a_load_opens(folder: Path, tmp_path: Path) -> None:
    """Where both a whole file and an index are there, transformers opens the file."""
    whole = load_file(folder / "model.safetensors")
    in_parts(folder, "../outside.safetensors")
    with pytest.raises(Refusal, match=r"names '\.\./outside\.safetensors'"):
        names(folder)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    assert sorted(names(folder)) == sorted(whole)


def test_a_link_to_a_pickle_is_not_opened(folder: Path, tmp_path: Path) -> None:
    in_parts(folder)
    (folder / "evil.bin").write_bytes(pickle.dumps(Armed(tmp_path / "ran")))
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").symlink_to("evil.bin")
    assert "model-2.safetensors is damaged or no safetensors" in refusal_of(folder)
    assert not (tmp_path / "ran").exists()


def test_links_into_a_cache_of_blobs_open(folder: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays a snapshot out."""
    whole = opened(folder).state_dict()
    in_parts(folder)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    found = opened(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("name", ["model.safetensors", "model-2.safetensors"])
def test_a_part_that_is_cut_short_or_gone_is_named(name: str, folder: Path) -> None:
    if name != "model.safetensors":
        in_parts(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-5])
    for said in (refusal_of(folder), checked(folder)):
        assert f"{name} is damaged or no safetensors" in said
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is not there" in checked(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"num_hidden_layers": 200_000},
            "num_hidden_layers=200000 in config.json does not fit its weights: 30 tensors",
        ),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 in config.json does not fit its weights: 61 is the largest"),
        ({"hidden_size": 10**9}, "hidden_size=1000000000 in config.json does not fit its weights"),
        ({"rope_parameters": 3}, "its config does not open"),
        ({"hidden_act": "no such"}, "no such"),
        ({"layer_types": 7}, "its config does not open"),
        ({"num_attention_heads": 0}, "config"),
        ({"model_type": ["llama"]}, "its config does not open"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000"),
        ({"intermediate_size": 10**9}, "9 tensors of another shape"),
    ],
)
def test_a_config_that_fits_no_weights_is_refused_before_anything_is_made(
    values: dict[str, Any], said: str, folder: Path
) -> None:
    change_config(folder, **values)
    assert said in checked(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_attention_heads": -8}, "num_attention_heads=-8 in config.json; need a whole number of 1 or more"),
        ({"intermediate_size": -172}, "intermediate_size=-172 in config.json; need a whole number of 0 or more"),
        ({"vocab_size": -512}, "vocab_size=-512 in config.json; need a whole number of 1 or more"),
        ({"hidden_size": 64.5}, "hidden_size=64.5 in config.json; need a whole number of 1 or more"),
        ({"text_config": {"head_dim": 0}}, "text_config.head_dim=0 in config.json; need a whole number of 1 or more"),
        ({"attention_dropout": 2.0}, "attention_dropout=2.0 in config.json; need a probability from 0 to 1"),
        ({"embd_pdrop": -0.1}, "embd_pdrop=-0.1 in config.json; need a probability from 0 to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan in config.json; need a number"),
        ({"a": [{"b": [1, float("nan")]}]}, "a[0].b[1]=nan in config.json; need a number"),
        ({"rope_theta": 0}, "rope_theta=0 in config.json; need a finite number above 0"),
        (
            {"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}},
            "rope_parameters.rope_theta=nan in config.json; need a number",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": float("inf")}}},
            "rope_parameters.full_attention.rope_theta=inf in config.json; need a finite number above 0",
        ),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 in config.json; need a finite number of 0 or more"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon=-1e-05 in config.json; need a finite number of 0 or more"),
        *(
            ({"rope_parameters": {"rope_type": kind, **values}}, f"rope_parameters.{said} in config.json; need {need}")
            for kind, values, said, need in (
                ("linear", {"factor": -2.0}, "factor=-2.0", "a finite number above 0"),
                ("linear", {"factor": 0.0}, "factor=0.0", "a finite number above 0"),
                ("dynamic", {"factor": -4}, "factor=-4", "a finite number above 0"),
                ("yarn", {"attention_factor": -1}, "attention_factor=-1", "a finite number above 0"),
                ("longrope", {"long_factor": [1.0, 0]}, "long_factor[1]=0", "a finite number above 0"),
                ("yarn", {"original_max_position_embeddings": 0}, "original_max_position_embeddings=0", "a finite"),
                (
                    "llama3",
                    {"high_freq_factor": 1.0, "low_freq_factor": 4.0},
                    "high_freq_factor=1.0",
                    "a number above low_freq_factor=4.0",
                ),
                ("llama3", {"high_freq_factor": -1.0}, "high_freq_factor=-1.0", "a finite number above 0"),
            )
        ),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor=-2 in config.json; need a finite"),
    ],
)
def test_numbers_in_a_config_that_no_model_has_are_named(values: dict[str, Any], said: str, folder: Path) -> None:
    change_config(folder, **values)
    for each in (checked(folder), refusal_of(folder)):
        assert said in each


@pytest.mark.parametrize(
    "values",
    [
        {"time_step_limit": [0.0, float("inf")]},  # as Mamba's are published
        {"num_local_experts": 0, "sliding_window": -1, "attention_dropout": 1, "use_dropout": False},
        {"layer_norm_eps": 0, "num_steps": -1, "time_step": {"factor": -1}},
        {"rope_scaling": {"rope_type": "llama3", "high_freq_factor": 4.0, "low_freq_factor": 1.0, "factor": 8}},
        {"pad_token_id": 61, "bos_token_id": -1, "large": 10**400},
    ],
)
def test_numbers_that_published_configs_hold_pass(values: dict[str, Any], folder: Path) -> None:
    change_config(folder, **values)
    check_folder(str(folder), "teacher")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eos_token_id": 61}, "eos_token_id=61 in {file} is no token of the model: they are 0 to 60 by vocab_size=61"),
        ({"eos_token_id": [2, 99999]}, "eos_token_id=99999 in {file} is no token of the model"),
        ({"bos_token_id": -5}, "bos_token_id=-5 in {file} is no token of the model"),
    ],
)
def test_first_and_last_tokens_are_of_the_vocabulary(
    file: str, values: dict[str, Any], said: str, folder: Path
) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    for each in (checked(folder), refusal_of(folder)):
        assert said.format(file=file) in each


def test_every_familys_own_config_passes_the_door(tmp_path: Path) -> None:
    """Truth: what transformers itself has as the numbers of each causal language model, some ends beyond the vocabulary
    among them; and a short vocabulary, as models made for tests have."""
    seen = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[family]()
        except Exception:  # a family without defaults
            continue
        held = json.loads(config.to_json_string(use_diff=False))
        for values in (held, held | ({"vocab_size": 61} if "vocab_size" in held else {})):
            (tmp_path / "config.json").write_text(json.dumps(values))
            check_folder(str(tmp_path), family, weights=False)
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "config.json is no JSON: nested too deeply"),
        ("{", "config.json is no JSON: "),
        ("[]", "config.json holds no object"),
        ("\ud800", "config.json is no JSON: "),
        ('{"a": "' + "x" * (1 << 24) + '"}', "config.json has 16,777,225 bytes; need at most 16,777,216"),
    ],
    ids=["nested", "cut", "list", "bytes", "large"],
)
def test_a_config_that_is_no_config_is_refused(text: str, said: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said in refusal_of(folder)


def test_adapters_are_refused_alone_and_beside_a_model(folder: Path) -> None:
    """Beside one, transformers would add them to it; alone, it would open the model that they name."""
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"})
    )
    assert "adapter_config.json lies beside the model" in refusal_of(folder)
    (folder / "config.json").unlink()
    assert "an adapter without its model" in refusal_of(folder)


def test_a_hub_id_goes_through_the_same_door(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    home = tmp_path / "hub" / "models--org--name"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    folder.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(opened("org/name").lm_head.weight, opened(snapshot).lm_head.weight)
    change(snapshot, lambda state: state.pop(DOWN))
    assert f"1 tensor missing from its weights: {DOWN}" in refusal_of("org/name")
    (snapshot / "adapter_config.json").write_text("{}")
    assert "adapter_config.json lies beside the model" in refusal_of("org/name")
    in_parts(snapshot, "../evil.bin")
    assert "names '../evil.bin'" in refusal_of("org/name")
    assert "cannot be reached" in refusal_of("org/other")


def test_a_family_that_caps_its_attention_never_runs_without_the_cap(tmp_path: Path) -> None:
    """Truth: the same weights in the family's plain attention, whatever the library would choose."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=0.5,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model_type = type(plain)
    asked = model_type._supports_sdpa
    try:
        model_type._supports_sdpa = True  # as in the versions that leave the cap out
        found = opened(tmp_path).eval()
    finally:
        model_type._supports_sdpa = asked
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, plain(tokens()).logits)
    with pytest.raises(Refusal, match=r"attention=sdpa: Gemma2Config caps its attention's scores at 0\.5"):
        load_model(str(tmp_path), dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize(
    "held",
    [
        {"temperature": 0.9, "top_p": 0.6, "top_k": 3, "eos_token_id": [1, 2]},
        {"early_stopping": True, "num_beams": 1},
        {"pad_token_id": -1},
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_saved_as_it_was(
    held: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Published models have such: transformers saves them unchanged only, and before 5.18 not at all."""
    (folder / "generation_config.json").write_text(json.dumps(held))
    check_model(str(folder), "teacher")
    model, tokenizer = opened(folder), load_tokenizer(needed(STORIES))
    tokenizer.pad_token = tokenizer.eos_token
    save_model(model, tokenizer, tmp_path / "saved", model.state_dict(), torch.float32)
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert said == said | held
    assert held.get("pad_token_id", tokenizer.pad_token_id) == said["pad_token_id"]
    assert model.generation_config.to_dict() == model.generation_config.to_dict() | held
    again = opened(tmp_path / "saved").generation_config
    assert {name: getattr(again, name) for name in held} == held


@pytest.mark.parametrize(
    ("name", "value"), [("eos_token_id", "x"), ("eos_token_id", [1, "2"]), ("bos_token_id", True), ("pad_token_id", {})]
)
def test_words_in_place_of_token_ids_are_refused(name: str, value: Any, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    for said in (refusal_of(folder), checked(folder)):
        assert f"{name}={value!r} in generation_config.json is no number of a token" in said


def test_a_generation_config_that_does_not_open_is_refused_before_the_weights(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"early_stopping": "perhaps"}')
    assert "generation_config.json does not open: `early_stopping` must be a boolean" in checked(folder)


def test_numbers_that_float16_cannot_hold_are_told_apart_from_damage(folder: Path) -> None:
    change(folder, lambda state: state["model.norm.weight"].fill_(1e5))
    assert opened(folder).model.norm.weight[0] == 1e5
    with pytest.raises(Refusal) as refused:
        load_model(str(folder), dtype=torch.float16, role="teacher")
    said = str(refused.value)
    assert "infinity in model.norm.weight as float16; float16 holds no number above 65504" in said
    assert "open it as bfloat16 or float32" in said
    assert "damaged" not in said
    change(folder, lambda state: state[DOWN].view(-1)[-1].fill_(float("nan")))
    with pytest.raises(Refusal, match="damaged"):
        load_model(str(folder), dtype=torch.float16, role="teacher")


@pytest.mark.parametrize(
    ("dtype", "told"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.int64, "I64")]
)
def test_weights_in_few_bits_of_which_the_config_says_nothing_are_refused(
    dtype: torch.dtype, told: str, folder: Path
) -> None:
    change(folder, lambda state: state.update({DOWN: (state[DOWN] * 100).to(dtype)}))
    for said in (refusal_of(folder), checked(folder)):
        assert f"{DOWN} holds {told}, and config.json has no quantization_config" in said


def in_few_bits(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.update({DOWN: (state[DOWN] * 50).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": {"quant_method": "foo"}}, "quant_method='foo', of which transformers "),
        ({"quantization_config": {"quant_method": "modelopt", "bits": 8}}, "quant_method='modelopt', of which"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "quant_method=['gptq'], of which"),
        ({"quantization_config": {"bits": 8}}, "quant_method=None, of which"),
        ({"quantization_config": {}}, "quant_method=None, of which"),
        ({"quantization_config": "gptq"}, "quant_method=None, of which"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method='bitsandbytes' without load_in_4bit or load_in_8bit, of which",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "call it quantization_config"),
    ],
)
def test_weights_packed_in_a_way_that_transformers_does_not_know_are_refused(
    values: dict[str, Any], said: str, dtype: torch.dtype, folder: Path
) -> None:
    """It would warn, and take the packed numbers for weights."""
    change(folder, in_few_bits(dtype))
    change_config(folder, **values)
    assert said in checked(folder)
    assert checked(folder) == refusal_of(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "values",
    [{"quant_method": "fp8"}, {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["re:.*"]}],
)
def test_packed_weights_without_their_scales_are_refused(
    values: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    change(folder, in_few_bits(dtype))
    change_config(folder, quantization_config=values)
    for said in (refusal_of(folder), checked(folder)):
        assert f"{DOWN} holds {'I8' if dtype == torch.int8 else 'F8_E4M3'}, and no scale lies beside it" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes_4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes_8bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
    ],
)
def test_plain_weights_under_a_config_that_says_they_are_packed_are_refused(
    values: dict[str, Any], said: str, folder: Path
) -> None:
    change_config(folder, quantization_config=values)
    for each in (refusal_of(folder), checked(folder)):
        assert f"says {said}, and none of its tensors is packed; remove quantization_config" in each


@pytest.mark.parametrize(
    "words",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
    ],
)
def test_a_model_that_bitsandbytes_packed_opens_with_what_it_computed(
    words: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    # Its kernel for these CPUs takes whole blocks of 64 columns alone, and this model is narrower.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    packing = BitsAndBytesConfig(**words, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing, dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    check_model(str(tmp_path / "packed"), "teacher")
    found = opened(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_a_rope_that_do_not_fit_its_width_are_refused_in_one_line(packed: bool, folder: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    lists = {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3}  # of heads that are 8 wide: 4 each
    change_config(folder, rope_parameters=rope | lists)
    if packed:
        change_config(folder, quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only"})
    said = checked(folder)
    assert "its config makes no causal language model: " in said
    assert "\n" not in said
    fitting = {name: [1.0] * 4 for name in lists}
    change_config(folder, rope_parameters=rope | fitting)
    check_model(str(folder), "teacher")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_width_of_floats_opens(dtype: torch.dtype, folder: Path) -> None:
    change(folder, lambda state: state.update({DOWN: state[DOWN].to(dtype)}))
    check_model(str(folder), "teacher")
    opened(folder)


@pytest.mark.parametrize("other", [0.0, 3.0])
def test_a_tensor_in_two_parts_is_the_same_in_both(other: float, folder: Path) -> None:
    in_parts(folder)
    first, second = (load_file(folder / f"model-{part}.safetensors") for part in (1, 2))
    name = sorted(first)[0]
    save_file(second | {name: first[name] + other}, folder / "model-2.safetensors", metadata={"format": "pt"})
    if not other:
        check_model(str(folder), "teacher")
        assert torch.equal(opened(folder).state_dict()[name], first[name])
        return
    for said in (refusal_of(folder), checked(folder)):
        assert f"{name} is in model-1.safetensors and in model-2.safetensors, with other values" in said


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    said = refusal_of(folder)
    assert "tie_word_embeddings=true in config.json, and its head is another matrix than its embeddings" in said
    assert "set it to false" in said
    change_config(folder, tie_word_embeddings=False)
    opened(folder)


def _buffers(family: str, layer: int) -> dict[str, torch.Tensor]:
    mask, low = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(), torch.tensor(-1e9)
    return {
        "gpt_neo": {f"transformer.h.{layer}.attn.attention.{n}": v for n, v in (("bias", mask), ("masked_bias", low))},
        "gptj": {f"transformer.h.{layer}.attn.{n}": v for n, v in (("bias", mask.byte()), ("masked_bias", low))},
        "codegen": {f"transformer.h.{layer}.attn.causal_mask": mask},
    }[family]


OLD: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "rotary_dim": 4},
    "codegen": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "rotary_dim": 4},
}


@pytest.mark.parametrize("family", OLD)
def test_masks_that_older_versions_of_transformers_saved_are_no_fault(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **OLD[family], vocab_size=64, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda state: [state.update(_buffers(family, layer)) for layer in range(2)])
    check_model(str(tmp_path), "teacher")
    found = opened(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    # A bias is none, whatever its name.
    change(tmp_path, lambda state: state.update({"transformer.h.0.attn.attention.bias": torch.zeros(32)}))
    for said in (refusal_of(tmp_path), checked(tmp_path)):
        assert "1 tensor in its weights and not in the model of its config: transformer.h.0.attn.attention.bias" in said
