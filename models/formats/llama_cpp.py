"""llama.cpp itself, opening what models.formats.gguf has written."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.formats.gguf_layout import layout_of_file
from models.llama_library import CONTEXT_FIELDS, Batch, field_at, forget_words, llama, load_file, reason, tokenized
from models.measure import Speed, rates

# B sequences, T tokens, V vocabulary, O outputs of a matrix, I its inputs

FILE = "model.gguf"
CACHES = {"f32": 0, "f16": 1, "q8_0": 8}  # what keys and values are held in → ggml_type
_CONTEXT = 512  # tokens of the first context; a longer one is made when it is needed
_AT_ONCE = 512  # tokens of one decode


class LlamaCpp:
    """The file's model under llama.cpp, on the CPU, or with all layers on the GPU where the library was built for one.

    `cache`: what keys and values are held in. llama.cpp's own default is f16, with a fused attention that computes in
    half precision; with f32 attention is plain, for comparing.
    """

    name: ClassVar[str] = "llama.cpp"
    serves: ClassVar[bool] = True

    def __init__(self, folder: Path, device: str = "cpu", cache: str = "f16") -> None:
        from gguf import GGUFReader

        self.path = folder / FILE
        if not self.path.is_file():
            raise Refusal(f"{folder}: no {FILE} in it; export it with format=gguf")
        self._model = load_file(self.path, device)
        self._vocabulary = llama().llama_vocab_n_tokens(llama().llama_model_get_vocab(self._model))
        self._cache = CACHES[cache]
        self._context: int | None = None
        self._tokens = 0  # that the context has place for
        self._reader = GGUFReader(str(self.path))
        self._layout = layout_of_file(self._reader)

    def close(self) -> None:
        if self._context is not None:
            llama().llama_free(self._context)
        if self._model:
            llama().llama_model_free(self._model)
        self._context, self._model = None, 0

    @property
    def limit(self) -> int:
        return int(llama().llama_model_n_ctx_train(self._model))

    def weight(self, name: str) -> Tensor:
        """Read from the file by the gguf package, not by what has packed it."""
        from gguf.quants import dequantize

        found = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", name)
        assert found is not None
        parameter, slot = found[1], found[2]
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        parts = []
        for piece in self._layout.pieces(parameter):
            tensor = tensors[piece.name]
            held = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            parts.append((piece.rows, held if slot is None else held[int(slot)]))
        if parts[0][0] is None:
            return parts[0][1]
        axis = max(parts[0][1].ndim - 2, 0)  # of outputs: a bias has them alone, experts have them inside
        shape = list(parts[0][1].shape)
        shape[axis] = sum(part.shape[axis] for _, part in parts)
        whole = torch.empty(shape)
        for rows, part in parts:
            whole.index_copy_(axis, torch.as_tensor(rows), part)
        return whole

    def logits(self, input_ids: Tensor) -> Tensor:
        return torch.stack([self._decode(row) for row in self._rows(input_ids)])

    def generate(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """Int64[new_tokens], greedy, with the cache, from Int64[1, T]."""
        made: list[int] = []
        given = self._rows(prompt)[0]
        self._make_place(len(given) + new_tokens)
        self._forget()
        while len(made) < new_tokens:
            made.append(int(self._step(given)[-1].argmax()))
            given = made[-1:]
        return torch.tensor(made)

    def speed(self, prompt: Tensor, settings: Speed) -> dict[str, float]:
        given = self._rows(prompt)[0]
        self._make_place(len(given) + settings.new_tokens)

        def prefill() -> None:
            self._forget()
            self._step(given)

        return rates(lambda new_tokens: self.generate(prompt, new_tokens), prefill, len(given), settings)

    def tokenize(self, text: str) -> list[int]:
        """As the file says: with the tokens it says begin or end a text, special tokens known by their names."""
        return tokenized(self._model, text)

    def _rows(self, input_ids: Tensor) -> list[list[int]]:
        rows: list[list[int]] = input_ids.tolist()
        for row in rows:
            if not row or not all(0 <= token < self._vocabulary for token in row):
                raise Refusal(f"llama.cpp: a token is not one of the {self._vocabulary} of {self.path}")
        return rows

    def _decode(self, row: list[int]) -> Tensor:
        self._make_place(len(row))
        self._forget()
        parts = [self._step(row[at : at + _AT_ONCE], every=True) for at in range(0, len(row), _AT_ONCE)]
        return torch.cat(parts)

    def _step(self, row: list[int], every: bool = False) -> Tensor:
        """Float32[tokens | 1, V]: logits of every token or of the last one. It goes on where the cache ends."""
        if not every and len(row) > _AT_ONCE:  # only the last part's are wanted
            for first in range(0, len(row), _AT_ONCE):
                last = self._step(row[first : first + _AT_ONCE])
            return last
        lib, count = llama(), len(row)
        tokens = (ctypes.c_int32 * count)(*row)
        wanted = (ctypes.c_int8 * count)(*([1] * count if every else [0] * (count - 1) + [1]))
        batch = Batch(n_tokens=count, token=tokens, logits=wanted)  # places and sequence: llama.cpp's own count
        status = lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp: decode gave {status}: {reason()}")
        rows = count if every else 1
        found = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (rows, self._vocabulary))
        return torch.from_numpy(found.copy())

    def _make_place(self, tokens: int) -> None:
        if self._context is not None and self._tokens >= tokens:
            return
        lib = llama()
        if self._context is not None:
            lib.llama_free(self._context)
        self._tokens = max(_CONTEXT, -(-tokens // 256) * 256)  # llama.cpp rounds up to 256 itself
        threads = torch.get_num_threads()
        wanted = {
            "n_ctx": self._tokens, "n_batch": _AT_ONCE, "n_ubatch": _AT_ONCE, "n_threads": threads,
            "n_threads_batch": threads, "type_k": self._cache, "type_v": self._cache,
        }  # fmt: skip
        if self._cache == CACHES["f32"]:
            wanted["flash_attn_type"] = 0  # which computes in half precision whatever the cache is
        parameters = lib.llama_context_default_params()
        for name, value in wanted.items():
            field_at(parameters, CONTEXT_FIELDS[name][0]).value = value
        forget_words()
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            self._context = None
            raise Refusal(f"{self.path}: llama.cpp makes no context of {self._tokens} tokens: {reason()}")
        made = (lib.llama_n_ctx(self._context), lib.llama_n_batch(self._context), lib.llama_n_threads(self._context))
        if made != (self._tokens, _AT_ONCE, threads):
            raise Refusal(
                f"llama.cpp: asked for {self._tokens, _AT_ONCE, threads} it made {made}; check the version of xllamacpp"
            )

    def _forget(self) -> None:
        llama().llama_memory_clear(llama().llama_get_memory(self._context), True)
