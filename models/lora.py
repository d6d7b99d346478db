"""Low-rank adapters on a frozen model, by PEFT: attached before training, merged after it (arXiv:2106.09685)."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.matrices import is_linear, is_transposed
from models.representations import decoder_layers

BASES = ("nf4",)


@dataclass(frozen=True)
class Lora:
    """W stays as it is, and alpha / r · B A is learnt beside it. The numbers are LLM-Pruner's (arXiv:2305.11627)."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: Sequence[str] | None = None  # names of modules, as q_proj; None: all linear ones of the layers
    base: str | None = None  # of BASES: the frozen weights of the layers in fewer bits, while adapters are trained

    def __post_init__(self) -> None:
        if self.r < 1:
            raise Refusal(f"lora.r={self.r}: need at least 1")
        if not 0 <= self.dropout < 1:
            raise Refusal(f"lora.dropout={self.dropout}: need [0, 1)")
        if not self.alpha > 0:
            raise Refusal(f"lora.alpha={self.alpha}: need a number above 0; twice r is usual")
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise Refusal(f"lora.targets={self.targets}: need a list of modules' names, e.g. [q_proj,v_proj], or null")
        if self.base is not None and self.base not in BASES:
            raise Refusal(f"lora.base={self.base}: need one of {', '.join(BASES)}, or null")
        if self.base is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise Refusal(f"lora.base={self.base}: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50'")

    def attach(self, model: Any, seed: int, compute: torch.dtype | None = torch.float32) -> Any:
        """The model with adapters in place, which alone are trained; the same ones on every rank.

        `compute`: of products with packed weights (`base`). None: they shall be merged, not trained; then
        quantized weights are in floating point, each its dequantized value, as merging into bits would round again.
        """
        from peft import inject_adapter_in_model

        config = self.config(model)
        if self.base is not None and compute is not None:
            _pack(model, compute)
        elif self.base is not None:
            _round(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    def parameters(self, model: Any) -> int:
        """How many are trained at most: as if all linear modules of the layers had adapters."""
        return sum(self.r * sum(module.weight.shape) for _, module in _linear(model))

    def config(self, model: Any) -> Any:
        from peft import LoraConfig, TaskType

        there = {name.rpartition(".")[2]: module for name, module in _linear(model)}
        names = list(there) if self.targets is None else list(self.targets)
        if odd := [name for name in names if name not in there]:
            raise Refusal(f"lora.targets: the layers have no linear {odd[0]}; they have {', '.join(there)}")
        for name, module in there.items() if self.base is not None else ():
            _check_packable(name, module)
        transposed = any(is_transposed(there[name]) for name in names)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            fan_in_fan_out=transposed,
            task_type=TaskType.CAUSAL_LM,
        )


def _pack(model: Any, compute: torch.dtype) -> None:
    """The linear modules of the layers in NF4 with doubly quantized scales (QLoRA, arXiv:2305.14314).

    Packed here, wherever the model goes then: every rank and device has the same bits.
    """
    layers = decoder_layers(model)
    for name, module in list(_linear(model)):
        packed = _bitsandbytes().nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute, quant_type="nf4", device="meta"
        )
        packed.weight, packed.bias = _nf4(module.weight), module.bias
        packed.quant_state = packed.weight.quant_state
        # Evaluated on a CPU it would rearrange its bits in place, not for all widths, and could not be trained on.
        packed.support_avx512bf16_for_cpu = False
        layers.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], packed)


@torch.no_grad()
def _round(model: Any) -> None:
    """Every weight that `_pack` would quantize, as its dequantized value."""
    for _, module in _linear(model):
        packed = _nf4(module.weight)
        module.weight.copy_(_bitsandbytes().functional.dequantize_4bit(packed.data, packed.quant_state))


def _nf4(weight: Tensor) -> Any:
    plain = weight.detach().cpu()
    return _bitsandbytes().nn.Params4bit(plain, requires_grad=False, quant_type="nf4").to("cpu")


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")


def _check_packable(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear):
        raise Refusal(f"lora.base=nf4: {name} is a {type(module).__name__}; bitsandbytes packs linear modules alone")


def write_adapter(config: Any, base: str, state: dict[str, Tensor], folder: Path) -> None:
    """What `PeftModel.from_pretrained` opens on top of `base`; `config` is PEFT's, `state` the adapted model's."""
    from safetensors.torch import save_file

    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    written = folder / "adapter_config.json"
    said = json.loads(written.read_text())
    said["target_modules"] = sorted(said["target_modules"])  # a set, whose order is another one in every process
    written.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
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


def _linear(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in decoder_layers(model).named_modules():
        if is_linear(module):
            yield name, module
