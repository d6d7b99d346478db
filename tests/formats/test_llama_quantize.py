"""What `type` means, against llama_model_quantize itself, in the library of node-llama-cpp's npm package (llama.cpp
v0.5.0): xllamacpp's has no such function."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.formats.format import Finished
from models.formats.gguf import _FILE_TYPES, Gguf
from models.quantization.ggml import MIXTURES
from tests.formats.exporting import as_folder, small

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PACKAGE = "@node-llama-cpp/linux-x64@3.22.0"
# llama_model_quantize_params: threads, file type, types of head and embeddings (43: by the mixture), six booleans of
# which the second (quantize the head) is true, pointers.
QUANTIZE = """
import ctypes, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
for name in ("libggml-base.so", "libggml.v0.5.0.so"):
    ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(str(folder / "libllama.v0.5.0.so"))
class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 256)]
library.llama_model_quantize_default_params.restype = Parameters
for source, target, kind in json.loads(sys.argv[2]):
    parameters = library.llama_model_quantize_default_params()
    words = (ctypes.c_int32 * 5).from_buffer(parameters)
    assert list(words) == [0, 7, 43, 43, 256], list(words)
    words[0], words[1] = 1, kind
    assert library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)) == 0, (source, kind)
"""
DEEP = {"num_hidden_layers": 16, "vocab_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**DEEP, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}),
    # as SmolLM2: 256 does not divide the model's width, but its MLP's, and the head is the embeddings
    "tied, odd widths": ("llama", {**DEEP, "hidden_size": 288, "intermediate_size": 512, "num_attention_heads": 9,
                                   "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "four queries to a key": ("qwen2", {**DEEP, "hidden_size": 256, "intermediate_size": 288,
                                        "num_attention_heads": 8, "num_key_value_heads": 2}),
    "eight experts": ("mixtral", {**DEEP, "hidden_size": 256, "intermediate_size": 256, "num_local_experts": 8}),
    "four experts": ("mixtral", {**DEEP, "hidden_size": 256, "intermediate_size": 256}),
    "fused": ("phi3", {**DEEP, "hidden_size": 256, "intermediate_size": 256}),
    "learned places": ("gpt2", {**DEEP, "n_embd": 256, "hidden_size": 256, "n_inner": 512}),
    "gemma": ("gemma2", {**DEEP, "hidden_size": 256, "intermediate_size": 512}),
}  # fmt: skip
WHOLE = ("llama", "tied, odd widths", "eight experts")  # in all types, the others in those with the most rules
CASES = [(name, kind) for name in MODELS for kind in (MIXTURES if name in WHOLE else ("q2_k", "q3_k_m", "q4_k_m"))]


@pytest.fixture(scope="module")
def llama_quantize() -> Path:
    """A folder with libllama, brought once to a machine by npm; or the test is skipped."""
    folder = Path(tempfile.gettempdir()) / "retort-tests-node-llama-cpp-3.22.0"
    libraries = folder / "package" / "bins" / "linux-x64"
    if not libraries.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        with tempfile.TemporaryDirectory() as aside:
            done = subprocess.run(["npm", "pack", PACKAGE], cwd=aside, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"{PACKAGE} cannot be fetched: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            with tarfile.open(next(Path(aside).glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
    return libraries


@pytest.mark.slow
def test_every_type_is_llama_quantizes_to_the_byte(llama_quantize: Path, tmp_path: Path) -> None:
    wanted = []
    for name, (family, values) in MODELS.items():
        Gguf(type="f32").write(as_folder(small(family, **values), tmp_path / name), tmp_path / name / "f32")
    for name, kind in CASES:
        source, target = tmp_path / name / "f32" / "model.gguf", tmp_path / name / f"{kind}.gguf"
        wanted.append((str(source), str(target), _FILE_TYPES[kind]))
    words = [sys.executable, "-c", QUANTIZE, str(llama_quantize), json.dumps(wanted)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, kind in CASES:
        Gguf(type=kind).write(Finished(tmp_path / name, None, "float32"), tmp_path / name / kind)
        theirs, own = (
            {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
            for path in (tmp_path / name / f"{kind}.gguf", tmp_path / name / kind / "model.gguf")
        )
        held = {tensor: each.tensor_type.name for tensor, each in own.items()}
        assert held == {tensor: each.tensor_type.name for tensor, each in theirs.items()}, (name, kind)
        for tensor, each in own.items():
            np.testing.assert_array_equal(each.data, theirs[tensor].data, f"{name}, {kind}: {tensor}")
