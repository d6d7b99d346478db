"""The model that training starts from, as it is trained: with adapters, with its zeros kept, with rounded matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from models.load import empty_model, load_config, load_model, parameter_count, unsharded
from models.quantization.aware import Rounding
from models.sparsity import zeros
from pipeline import artifact
from pipeline.training.recipe import Recipe


@dataclass(frozen=True)
class Student:
    folder: str
    recipe: Recipe
    seed: int
    attention: str | None
    config: Any  # Hugging Face's
    parameters: int
    adapter: Any  # PEFT's config, or None
    rounding: Rounding | None

    @classmethod
    def read(cls, folder: str, recipe: Recipe, seed: int, attention: str | None) -> Student:
        """Without weights. To be called before the Trainer is made: once there is one under ZeRO-3, every model made is
        sharded, which takes all ranks."""
        config = load_config(folder)
        empty = empty_model(config)
        adapter = None if recipe.lora is None else recipe.lora.config(empty)
        rounding = None if recipe.qat is None else recipe.qat.open(Path(folder) / artifact.QUANTIZED, empty)
        return cls(folder, recipe, seed, attention, config, parameter_count(empty), adapter, rounding)

    @property
    def named_ends(self) -> GenerationConfig | None:
        """The start's generation config, which names its end tokens, if it has one."""
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except OSError:
            return None

    def load(self, device: str = "cpu") -> Any:
        """The start's weights, ready to be trained, on `device`, cpu or cuda. What is packed in NF4 may not fit there
        before: it comes to the CPU, and Lightning moves it."""
        lora = self.recipe.lora
        model = self._plain(self.attention, device if lora is None or lora.base is None else "cpu")
        if lora is not None:
            model = lora.attach(model, self.seed, self.recipe.saved)
        return self._wrapped(model)

    def load_to_merge(self) -> Any:
        """The same, whole on the CPU, to take what was learnt and become the plain model that is saved."""
        with unsharded():
            model = self._plain(None)  # on the CPU, where FlashAttention cannot run
            if self.recipe.lora is not None:
                model = self.recipe.lora.attach(model, self.seed, compute=None)
        return self._wrapped(model)

    def load_start(self) -> Any:
        """The start's weights alone, whole."""
        with unsharded():
            return self._plain(self.attention)

    def _plain(self, attention: str | None, device: str = "cpu") -> Any:
        return load_model(self.folder, dtype=torch.float32, attention=attention, role="student", device=device)

    def _wrapped(self, model: Any) -> Any:
        model = zeros.keep(model) if self.recipe.keep_zeros else model
        return model if self.rounding is None else self.rounding.attach(model)
