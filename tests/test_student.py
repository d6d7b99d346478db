"""How a student starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from models.errors import Refusal
from models.student import Folder, Layers, Shape
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog " * 20, "pack my box with five dozen liquor jugs " * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    train_tokenizer(TEXT, 280, folder)
    return load_tokenizer(folder)


FAMILIES = {
    "llama": LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "tied llama": LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "gemma2": Gemma2Config(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=4,
    ),
    "gpt2": GPT2Config(vocab_size=288, n_embd=32, n_layer=5, n_head=4, n_positions=64),
}


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None] + 5, use_cache=False).logits


def test_all_of_the_teachers_layers_are_the_teacher(teacher: Path, tokenizer: Any, tmp_path: Path) -> None:
    depth = opened(teacher).config.num_hidden_layers
    Layers(keep=depth).materialise(str(teacher), tokenizer, tmp_path / "student", seed=0)
    torch.testing.assert_close(logits(opened(tmp_path / "student")), logits(opened(teacher)), rtol=0, atol=0)


def test_some_of_the_teachers_layers_are_the_teacher_without_the_others(
    teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Truth: the teacher itself, with the left-out layers taken out of its list."""
    Layers(keep=[0, 2, 3]).materialise(str(teacher), tokenizer, tmp_path / "student", seed=0)
    whole = opened(teacher)
    inner = whole.model if hasattr(whole, "model") else whole.transformer
    name = "layers" if hasattr(inner, "layers") else "h"
    setattr(inner, name, torch.nn.ModuleList([getattr(inner, name)[i] for i in (0, 2, 3)]))
    inner.config.num_hidden_layers = whole.config.num_hidden_layers = 3
    if kinds := getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [kinds[i] for i in (0, 2, 3)]
    student = opened(tmp_path / "student")
    torch.testing.assert_close(logits(student), logits(whole), rtol=0, atol=0)
    cached = student.generate(torch.arange(4)[None] + 5, max_new_tokens=8, do_sample=False, use_cache=True)
    plain = student.generate(torch.arange(4)[None] + 5, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_layers_are_taken_evenly_from_first_to_last() -> None:
    assert Layers(keep=4).kept(32) == [0, 10, 21, 31]
    assert Layers(keep=1).kept(5) == [0]
    assert Layers(keep=5).kept(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 6, [3, 1], [0, 5], [0, 0], []])
def test_layers_that_do_not_exist_are_refused(keep: Any) -> None:
    with pytest.raises(Refusal, match=r"student\.keep="):
        Layers(keep=keep).kept(5)


def test_a_shape_replaces_numbers_and_starts_from_the_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    start = Shape(shape={"hidden_size": 16, "num_hidden_layers": 2})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # whatever ran before
        start.materialise(str(tmp_path / "teacher"), tokenizer, tmp_path / name, seed)
    a, b, c = (dict(opened(tmp_path / name).state_dict()) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    config = opened(tmp_path / "a").config
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim, config.num_attention_heads) == (16, 2, 4, 4)
    assert a["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.1)


WIDE_HEADS = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64, "head_dim": 24,
}  # fmt: skip
LONG = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
TEACHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {"sliding_window": 5},  # as in Nemo, where head_dim is not hidden_size ÷ heads
    "llama": {"rope_parameters": LONG},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "sliding_window": 7,
        "rope_parameters": {
            "full_attention": LONG,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}


def teacher_of(family: str, folder: Path, **values: Any) -> str:
    AutoConfig.for_model(family, **{**WIDE_HEADS, **TEACHERS.get(family, {}), **values}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 2}, {"hidden_size": 48}, {"intermediate_size": 32}], ids=str)
@pytest.mark.parametrize("family", TEACHERS)
def test_what_a_teachers_config_states_stays_in_its_students(
    family: str, shape: dict[str, int], tmp_path: Path
) -> None:
    teacher = teacher_of(family, tmp_path)
    before = AutoConfig.from_pretrained(teacher).to_dict()
    after = Shape(shape).config(teacher).to_dict()
    assert after["head_dim"] == 24
    follows = {"layer_types", "_name_or_path"} if "num_hidden_layers" in shape else {"_name_or_path"}
    assert {k: v for k, v in after.items() if k not in follows} == {
        k: v for k, v in (before | shape).items() if k not in follows
    }
    if before.get("layer_types"):
        assert after["layer_types"] == before["layer_types"][: after["num_hidden_layers"]]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gemma3_text"])
def test_a_width_of_heads_that_stays_where_others_change_is_told(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family, tmp_path)
    assert Shape({"hidden_size": 48}).notes(teacher) == [
        "head_dim=24 is the teacher's; student.shape.head_dim=… changes it"
    ]
    assert Shape({"num_hidden_layers": 2}).notes(teacher) == []
    assert Shape({"hidden_size": 48, "head_dim": 12}).config(teacher).head_dim == 12
    scalar = getattr(AutoConfig.from_pretrained(teacher), "query_pre_attn_scalar", None)
    assert Shape({"hidden_size": 48, "head_dim": 12}).notes(teacher) == (
        []
        if scalar is None
        else [
            f"query_pre_attn_scalar={scalar} is the teacher's, whose heads are 24 wide and not 12; "
            f"student.shape.query_pre_attn_scalar=… changes it"
        ]
    )
    assert Shape({"head_dim": 12, "query_pre_attn_scalar": 12} if scalar else {"head_dim": 12}).notes(teacher) == []


@pytest.mark.parametrize(
    ("shape", "width"), [({"hidden_size": 32}, 8), ({"num_attention_heads": 2}, 32), ({"num_hidden_layers": 2}, None)]
)
def test_a_width_of_heads_that_follows_the_others_is_told(
    shape: dict[str, int], width: int | None, tmp_path: Path
) -> None:
    """Llama 3.2 1B states head_dim=64, which is its hidden_size ÷ heads, too."""
    teacher = teacher_of("llama", tmp_path, head_dim=16)
    assert Shape(shape).config(teacher).head_dim == (width or 16)
    told = f"head_dim={width} follows from hidden_size and num_attention_heads, as the teacher's 16 does"
    assert Shape(shape).notes(teacher) == ([f"{told}; student.shape.head_dim=… changes it"] if width else [])
    assert Shape({**shape, "head_dim": 16}).notes(teacher) == []


def test_a_student_of_a_family_without_heads_has_a_shape_too(tmp_path: Path) -> None:
    AutoConfig.for_model("mamba", vocab_size=288, hidden_size=32, num_hidden_layers=3).save_pretrained(tmp_path)
    assert Shape({"num_hidden_layers": 2}).notes(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"hidden_act": "nope"}, "LlamaConfig makes no model of these values: KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'LlamaConfig refuses this shape: KeyError: "Missing required'),
        ({"head_dim": 7}, "LlamaConfig refuses this shape: "),
    ],
)
def test_what_a_family_raises_of_a_shape_is_said_in_one_line(shape: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        Shape(shape).config(teacher_of("llama", tmp_path, rope_parameters={"rope_type": "default"}))
    assert str(refused.value).startswith(f"student.shape: {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"attention_dropout": 7}, "attention_dropout=7: need a probability from 0 to 1"),
        ({"eos_token_id": 9999}, "eos_token_id=9999: it is no token of the model; they are 0 to 287 by vocab_size=288"),
        (
            {"rope_parameters": {"rope_theta": 0.0}},
            "rope_parameters.rope_theta=0.0: need a finite number above 0",
        ),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0: need a finite number of 0 or more"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -2.0}},
            "rope_parameters.factor=-2.0: need a finite number above 0",
        ),
        ({"model_type": "gpt2"}, "model_type: it is no number of a shape; leave it out, the student has its own"),
        ({"architectures": ["x"]}, "architectures: it is no number of a shape; leave it out, the student has its own"),
        ({"dtype": "float16"}, "dtype: it is no number of a shape; leave it out, the student has its own"),
        ({"rope_theta": 5e5}, "rope_theta: LlamaConfig has no such number; did you mean rope_parameters.rope_theta?"),
    ],
)
def test_numbers_that_a_folder_of_that_shape_could_not_have_are_refused(
    shape: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        Shape(shape).config(teacher_of("llama", tmp_path))
    assert str(refused.value) == f"student.shape.{said}"


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_of_settings_inside_of_a_config_those_that_are_not_given_stay_the_teachers(tmp_path: Path) -> None:
    """A student that lost its teacher's rope scaling reads long texts at other angles, without a word."""
    teacher = teacher_of("llama", tmp_path / "a", rope_parameters=LLAMA_3)
    assert Shape({"rope_parameters": {"rope_theta": 1e4}}).config(teacher).rope_parameters == {
        **LLAMA_3,
        "rope_theta": 1e4,
    }
    assert Shape({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).config(teacher).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 1e4,
    }
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    teacher = teacher_of("gemma3_text", tmp_path / "b", rope_parameters=kinds)
    shape = Shape({"rope_parameters": {"full_attention": {"factor": 2.0}}})
    kept = shape.config(teacher).rope_parameters
    assert kept["full_attention"] == {**kinds["full_attention"], "factor": 2.0}
    assert kept["sliding_attention"] == kinds["sliding_attention"]


def test_kinds_of_layers_that_no_rule_gives_are_cut_repeated_and_told(tmp_path: Path) -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention"] * 2
    teacher = teacher_of("gemma2", tmp_path, layer_types=kinds)
    for depth in (1, 4, 6, 8):
        assert Shape({"num_hidden_layers": depth}).config(teacher).layer_types == [*kinds, *kinds][:depth]
    assert Shape({"hidden_size": 48, "head_dim": 12}).config(teacher).layer_types == kinds
    (note,) = Shape({"num_hidden_layers": 4}).notes(teacher)
    assert note.startswith("layer_types are those of the teacher's first 4 layers")
    assert Shape({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}).notes(teacher) == []


def test_a_list_by_layer_of_another_name_is_cut_too(tmp_path: Path) -> None:
    teacher = teacher_of("smollm3", tmp_path, pad_token_id=0, no_rope_layers=[0, 1, 1, 1, 0, 1], head_dim=16)
    assert Shape({"num_hidden_layers": 2}).config(teacher).no_rope_layers == [0, 1]
    assert Shape({"num_hidden_layers": 8}).config(teacher).no_rope_layers == [0, 1, 1, 1, 0, 1, 0, 1]


def test_a_student_folder_is_continued_from_its_own_weights(tmp_path: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model.save_pretrained(tmp_path / "old")
    Folder(path=str(tmp_path / "old")).materialise("", tokenizer, tmp_path / "start", seed=0)
    torch.testing.assert_close(logits(opened(tmp_path / "start")), logits(opened(tmp_path / "old")), rtol=0, atol=0)
