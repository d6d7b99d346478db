"""An export that transformers has opened: the runtime of most formats."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.load import DTYPES, empty_model, load_config, load_model
from models.matrices import matrices
from models.measure import Speed, speed

# B sequences, T tokens, V vocabulary, O outputs of a matrix, I its inputs


class Loaded:
    """`dense`: dequantizes a parameter that is not held as a plain tensor."""

    name: ClassVar[str] = "transformers"
    serves: ClassVar[bool] = True

    def __init__(self, model: Any, dense: Callable[[Tensor], Tensor] = lambda held: held) -> None:
        self.model = model.eval()
        self._dense = dense
        config = type(model.config).from_dict(
            {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        )
        self._matrices = {str(matrix): matrix for matrix in matrices(empty_model(config))}

    @property
    def limit(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        matrix = self._matrices.get(name)
        held = self._dense(self.model.get_parameter(name if matrix is None else matrix.parameter).detach())
        return (held if matrix is None else matrix.of(held)).float()

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        found: Tensor = self.model(input_ids=input_ids.to(device), use_cache=False).logits
        return found.float().cpu()

    def speed(self, prompt: Tensor, settings: Speed) -> dict[str, float]:
        return speed(self.model, prompt, settings)

    def close(self) -> None:
        del self.model


class Unpacked(Loaded):
    """Files whose own runtime cannot be had here, unpacked by the rules that are published for them."""

    name: ClassVar[str] = "transformers, unpacked by the layout's rules"
    serves: ClassVar[bool] = False  # speed and memory are those of floats


def loaded(folder: Path, device: str, dense: Callable[[Tensor], Tensor] = lambda held: held) -> Loaded:
    """As AutoModelForCausalLM opens the folder, in the dtype of its config."""
    config = load_config(str(folder))
    dtype = DTYPES[str(config.dtype or "float32").removeprefix("torch.")]
    with contextlib.redirect_stderr(io.StringIO()):  # bars of other libraries
        try:
            model = load_model(str(folder), dtype=dtype, role="export").to(device)
            # compressed-tensors unpacks at the first forward
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        except RuntimeError as problem:
            raise Refusal(f"{folder} does not open: {str(problem).strip().splitlines()[0]}") from None
    return Loaded(model, dense)
