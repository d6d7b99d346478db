"""Low-rank adapters on a frozen model, by PEFT: attached before training, merged after it (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.representations import decoder_layers


@dataclass(frozen=True)
class Lora:
    """W stays as it is, and alpha / r · B A is learnt beside it. The numbers are LLM-Pruner's (arXiv:2305.11627)."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: Sequence[str] | None = None  # names of modules, as q_proj; None: all linear ones of the layers

    def __post_init__(self) -> None:
        if self.r < 1:
            raise Refusal(f"lora.r={self.r}: need at least 1")
        if not 0 <= self.dropout < 1:
            raise Refusal(f"lora.dropout={self.dropout}: need [0, 1)")
        if not self.alpha > 0:
            raise Refusal(f"lora.alpha={self.alpha}: need a number above 0; twice r is usual")

    def attach(self, model: Any, seed: int) -> Any:
        """The model with adapters in place, which alone are trained; the same ones on every rank."""
        from peft import inject_adapter_in_model

        config = self.config(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    def config(self, model: Any) -> Any:
        from peft import LoraConfig, TaskType

        there = {name.rpartition(".")[2]: module for name, module in _linear(model)}
        names = list(there) if self.targets is None else list(self.targets)
        if odd := [name for name in names if name not in there]:
            raise Refusal(f"lora.targets: the layers have no linear {odd[0]}; they have {', '.join(there)}")
        transposed = any(type(there[name]).__name__ == "Conv1D" for name in names)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            fan_in_fan_out=transposed,
            task_type=TaskType.CAUSAL_LM,
        )


def write_adapter(config: Any, base: str, state: dict[str, Tensor], folder: Path) -> None:
    """What `PeftModel.from_pretrained` opens on top of `base`; `config` is PEFT's, `state` the adapted model's."""
    from safetensors.torch import save_file

    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    adapters = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge(model: Any) -> Any:
    """The plain model again, each adapter added to the weight beside it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    return model


def _linear(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in decoder_layers(model).named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module
