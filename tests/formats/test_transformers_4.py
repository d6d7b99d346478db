"""Folders that are written here, opened by transformers 4.57.6, the last version before the names in config.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models.formats.checkpoint import add_tokenizer
from models.formats.format import Finished
from models.formats.huggingface import HuggingFace
from models.save import save_model
from models.transformers_4 import older_config
from pipeline.data.tokenizer import train_tokenizer
from tests.optional_data import STORIES
from tests.pruning.families import FAMILIES, model_of

WHEELS = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.0")
TEXTS = ("the cat sat on the mat", "café <|im_start|>user\nWhat is 12 + 345?<|im_end|>", " two  spaces\n\n")
OPEN = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__ == "4.57.6"
ids, logits, made = torch.tensor(json.loads(sys.argv[1])), {}, {}
for folder in sys.argv[4:]:
    made[folder] = AutoTokenizer.from_pretrained(folder)(json.loads(sys.argv[2]))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits[folder] = model(ids).logits
save_file(logits, sys.argv[3])
print(json.dumps(made))
"""


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e6, **values}}


BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "another theta": ("llama", rope("default")),
    "llama3": ("llama", rope("llama3", **BANDS)),
    "linear": ("llama", rope("linear", factor=4.0)),
    "dynamic": ("llama", rope("dynamic", factor=4.0)),
    "yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "longrope": ("phi3", {"original_max_position_embeddings": 16,
                          **rope("longrope", short_factor=[1.5] * 4, long_factor=[2.5] * 4)}),
    "half of a head": ("gpt_neox", rope("default", partial_rotary_factor=0.5)),
    "no scaling": ("gpt_oss", {"num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 8, "sliding_window": 5,
                               "num_local_experts": 4, "num_experts_per_tok": 2, **rope("default")}),
    "two ropes": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


def test_the_older_words_stand_beside_the_new_ones(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"], 290, tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    family, values = SHAPES["llama3"]
    model = model_of(family, dtype=torch.float32, vocab_size=300, **values)
    save_model(model, opened, tmp_path / "model", model.state_dict(), torch.float32)
    for folder in ("copied", "packed"):
        (tmp_path / folder).mkdir()
    HuggingFace().write(Finished(tmp_path / "model", None, "float32"), tmp_path / "copied")
    model.save_pretrained(tmp_path / "new words")
    opened.save_pretrained(tmp_path / "new words")  # a folder that transformers 5 alone has written
    HuggingFace().write(Finished(tmp_path / "new words", None, "float32"), tmp_path / "packed")
    add_tokenizer(tmp_path / "new words", tmp_path / "only")
    for folder in ("model", "copied", "packed"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
        assert config["rope_scaling"] == {"rope_type": "llama3", **BANDS}
        assert AutoConfig.from_pretrained(tmp_path / folder).rope_parameters == model.config.rope_parameters
    for folder in ("model", "copied", "packed", "only"):
        told = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert told["additional_special_tokens"] == ["<|im_end|>"]
        assert not {"is_local", "local_files_only", "extra_special_tokens"} & told.keys()
        again = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again.extra_special_tokens == ["<|im_end|>"]
        assert again(list(TEXTS))["input_ids"] == opened(list(TEXTS))["input_ids"]


def test_names_that_have_changed_are_written_in_both_spellings() -> None:
    plain = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert older_config(plain) == {**plain, "rope_theta": 5e5}  # and no rope_scaling
    ours = {**plain, "model_type": "gpt_oss"}
    assert older_config(ours) == {**ours, "rope_theta": 5e5, "rope_scaling": None}  # in place of its YaRN
    assert older_config({"model_type": "gpt2"}) == {"model_type": "gpt2"}
    half = rope("default", partial_rotary_factor=0.25)
    assert older_config({"model_type": "stablelm", **half})["partial_rotary_factor"] == 0.25
    told = older_config({"model_type": "gpt_neox", **half})
    assert (told["rotary_emb_base"], told["rotary_pct"]) == (1e6, 0.25)
    assert older_config({"model_type": "qwen3_moe", "num_local_experts": 8})["num_experts"] == 8
    two = older_config({"model_type": "gemma3_text", **SHAPES["two ropes"][1]})
    assert (two["rope_theta"], two["rope_local_base_freq"]) == (1e6, 2e4)
    assert two["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    long = older_config({"model_type": "phi3", **SHAPES["longrope"][1]})["rope_scaling"]
    assert long.keys() == {"type", "short_factor", "long_factor"}


@pytest.fixture(scope="module")
def older() -> Path:
    """A folder with transformers 4.57.6, made once on a machine; or the test is skipped."""
    folder = Path(tempfile.gettempdir()) / "retort-tests-transformers-4.57.6"
    if not (folder / "done").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*pip, *WHEELS], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{', '.join(WHEELS)} cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        (folder / "done").touch()
    return folder


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "gemma2" or config.model_type.startswith("gemma3"):
        config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.slow
def test_what_is_written_is_the_same_model_and_tokenizer_to_the_version_before(older: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat, 12 + 345 " * 9], 290, tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    folders = []
    for name, (family, values) in SHAPES.items():
        model = model_of(family, dtype=torch.float32, **{"vocab_size": 300, "num_key_value_heads": 2, **values})
        folders.append(tmp_path / name)
        save_model(model, tokenizer, folders[-1], model.state_dict(), torch.float32)
        # Version 5 opens a Qwen2's by Qwen2's own rules, whatever tokenizer.json says: what it opens is written.
        opened = AutoTokenizer.from_pretrained(folders[-1])
        save_model(model, opened, folders[-1], model.state_dict(), torch.float32)
    (tmp_path / "export").mkdir()
    HuggingFace().write(Finished(tmp_path / "llama3", None, "float32"), tmp_path / "export")
    if STORIES.exists():
        (tmp_path / "sentencepiece").mkdir()
        HuggingFace().write(Finished(STORIES, None, "float32"), tmp_path / "sentencepiece")
        folders.append(tmp_path / "sentencepiece")
    folders.append(tmp_path / "export")
    ids = torch.randint(3, 280, (2, 40), generator=torch.Generator().manual_seed(0))
    words = [json.dumps(ids.tolist()), json.dumps(TEXTS), str(tmp_path / "logits"), *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(older), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OPEN, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, made = load_file(tmp_path / "logits"), json.loads(done.stdout.strip().splitlines()[-1])
    for folder in folders:
        assert float((logits[str(folder)] - ours(folder, ids)).abs().max()) < 1e-5, folder.name
        assert made[str(folder)] == AutoTokenizer.from_pretrained(folder)(list(TEXTS))["input_ids"], folder.name
