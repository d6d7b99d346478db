"""An ordinary checkpoint in safetensors: every weight as a number, quantized or not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from models.formats.checkpoint import in_dtype, rewritten
from models.formats.format import Finished, Plan, Runtime, Written
from models.formats.loaded import loaded
from models.layerwise import Matrix, matrices
from models.load import empty_model, load_config


@dataclass(frozen=True)
class HuggingFace:
    """Weights that are on a grid are written as the numbers that they stand for: larger, and opened by everything."""

    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, plan: Plan) -> None:
        """Any model."""

    def write(self, finished: Finished, folder: Path) -> Written:
        record = finished.record or finished.blocks
        held = record.matrices if record else {}
        taken: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in matrices(empty_model(load_config(str(finished.folder)))) if held else ():
            if str(matrix) in held:
                taken[matrix.parameter].append(matrix)

        def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
            # Of the integers: the checkpoint has rounded what they stand for to a dtype of its own.
            exact = tensor.float() if taken[name] else tensor
            for matrix in taken[name]:
                matrix.of(exact).copy_(held[str(matrix)].dequantized())
            return {name: in_dtype(exact, finished.dtype)}

        return Written(rewritten(finished.folder, folder, change, {"dtype": finished.dtype}))

    def open(self, folder: Path, device: str) -> Runtime:
        return loaded(folder, device)

    def serving(self, folder: str) -> list[tuple[str, str]]:
        return [
            ("transformers", f"transformers serve {folder}"),
            ("vLLM", f"vllm serve {folder}"),
            ("TGI", f"text-generation-launcher --model-id {folder}"),
            ("TensorRT-LLM", f"trtllm-serve {folder}"),
            ("DeepSpeed-Inference", _deepspeed(folder)),
        ]


def _deepspeed(folder: str) -> str:
    return (
        "python -c \"import deepspeed, torch, transformers as t; m = t.AutoModelForCausalLM.from_pretrained('"
        f"{folder}', dtype=torch.float16); deepspeed.init_inference(m, dtype=torch.float16)\""
    )
