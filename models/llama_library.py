"""ggml and llama.cpp, as the library inside xllamacpp's wheel, by their C interface; without torch, to start quickly.

    python -m models.llama_library FILE     texts (JSON, standard input) → their token ids (JSON)

Its assertions end the process: whoever opens a file that may not be right does so in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import Refusal

PINNED = "xllamacpp==2026.10.11549"  # whose structures are known here


@functools.cache
def library() -> Any:
    """The library, with the signatures of what quantizes. Raises Refusal where it is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("xllamacpp*.so"))
    if not files:
        raise Refusal(f"format=gguf: llama.cpp is not installed; pip install {PINNED}")
    loaded = ctypes.CDLL(str(files[0]))
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    return loaded


def row_reader(kind: str) -> Any:
    """ggml's function from blocks (address) to float32 (address), of so many numbers. `kind`: q4_0, q4_K, …"""
    function = getattr(library(), f"dequantize_row_{kind}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


class Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params, as bytes. Larger than either: both are passed on the stack, from
    which the library reads as much as its own has."""

    _fields_ = [("bytes", ctypes.c_uint8 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# Where a field lies, and its default: of xllamacpp 2026.10.11549. Another version is known by other defaults or sizes.
_MODEL_BYTES, _CONTEXT_BYTES = 78, 168
_MODEL = {"n_gpu_layers": (16, -1), "split_mode": (20, 1), "load_mode": (24, -1), "lazy_mode": (28, 1)}
_VOCAB_ONLY = 72  # a byte
CONTEXT_FIELDS = {
    "n_ctx": (0, 512), "n_batch": (4, 2048), "n_ubatch": (8, 512), "n_seq_max": (12, 1), "n_threads": (28, 4),
    "n_threads_batch": (32, 4), "rope_scaling_type": (40, -1), "pooling_type": (44, -1), "attention_type": (48, -1),
    "flash_attn_type": (52, -1), "type_k": (104, 1), "type_v": (108, 1),
}  # fmt: skip
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []  # llama.cpp's own words, of which the last explain a failure


def _hear(level: int, text: bytes, data: int | None) -> None:
    _said.append(text.decode(errors="replace").strip())
    del _said[:-200]


_hearing = _LOG(_hear)  # held for as long as the library may call it


@functools.cache
def llama() -> Any:
    """The library with its signatures. Raises Refusal where its structures are not the ones known here."""
    lib = library()
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
        "llama_init_from_model": (pointer, [pointer, Parameters]),
        "llama_model_free": (None, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_n_batch": (ctypes.c_uint32, [pointer]),
        "llama_n_threads": (whole, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (whole, [pointer, Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_model_n_ctx_train": (whole, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (whole, [pointer]),
        "llama_tokenize": (
            whole,
            [pointer, ctypes.c_char_p, whole, ctypes.POINTER(whole), whole, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_backend_init": (None, []),
    }
    for name, (given, taken) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = given, taken
    for name, size, fields in (
        ("llama_model_default_params", _MODEL_BYTES, _MODEL),
        ("llama_context_default_params", _CONTEXT_BYTES, CONTEXT_FIELDS),
    ):
        getattr(lib, name).restype = Parameters
        defaults, written = _defaults(lib, name)
        found = {field: field_at(defaults, offset).value for field, (offset, _) in fields.items()}
        if written != size or found != {field: default for field, (_, default) in fields.items()}:
            raise Refusal(
                "format=gguf: this version of xllamacpp lays its parameters out in another way than the one that is "
                f"known here; pip install {PINNED}"
            )
    lib.llama_log_set(_hearing, None)
    lib.llama_backend_init()
    return lib


def _defaults(lib: Any, name: str) -> tuple[Parameters, int]:
    """What the library's function returns, and how many bytes it has written: a structure of this size is given back
    in memory that the caller names."""
    into = Parameters()
    ctypes.memset(ctypes.byref(into), 0xAB, ctypes.sizeof(into))
    address = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value
    assert address is not None
    ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(into))
    return into, len(bytes(into.bytes).rstrip(b"\xab"))


def field_at(parameters: Parameters, offset: int) -> ctypes.c_int32:
    return ctypes.c_int32.from_buffer(parameters, offset)


def load_file(path: Path, device: str, vocab_only: bool = False) -> int:
    lib = llama()
    parameters = lib.llama_model_default_params()
    if device == "cpu":
        field_at(parameters, _MODEL["n_gpu_layers"][0]).value = 0
    parameters.bytes[_VOCAB_ONLY] = vocab_only
    forget_words()
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise Refusal(f"{path}: llama.cpp does not open it: {reason()}")
    return int(model)


def forget_words() -> None:
    _said.clear()


def reason() -> str:
    """Why llama.cpp has just failed, in its own words."""
    told = [line for line in _said if "error" in line.lower() or "fail" in line.lower()]
    return (told or _said or ["it says nothing"])[0]


def tokenized(model: int, text: str) -> list[int]:
    lib, data = llama(), text.encode()
    vocabulary = lib.llama_model_get_vocab(model)
    place = len(data) + 16
    into = (ctypes.c_int32 * place)()
    count = lib.llama_tokenize(vocabulary, data, len(data), into, place, True, True)
    if count < 0:
        raise RuntimeError(f"llama.cpp: {-count} tokens of {len(data)} bytes")
    return list(into[:count])


def tokenized_apart(path: Path, texts: Sequence[str]) -> list[list[int]] | str:
    """Token ids of texts by llama.cpp in a process of its own; or, where that ends badly, what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "models.llama_library", str(path.resolve())],
        input=json.dumps(list(texts)),
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"it ended with {done.returncode}"
    told: list[list[int]] = json.loads(done.stdout)
    return told


if __name__ == "__main__":
    try:
        opened = load_file(Path(sys.argv[1]), "cpu", vocab_only=True)
        print(json.dumps([tokenized(opened, text) for text in json.load(sys.stdin)]))
    except (Refusal, RuntimeError) as problem:
        sys.exit(str(problem))
