"""An ordinary checkpoint in safetensors, with dequantized values where the model is quantized."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.formats.checkpoint import dtype_of, in_dtype, rewritten
from models.formats.format import Finished, Format, Plan, Runtime, Written
from models.formats.loaded import loaded
from models.load import empty_model, load_config
from models.matrices import Matrix, matrices


@dataclass(frozen=True)
class HuggingFace(Format):
    """Quantized weights are written as their dequantized values: larger, and opened by everything."""

    def check(self, plan: Plan) -> None:
        """Any model."""

    def write(self, finished: Finished, folder: Path) -> Written:
        quantized = finished.quantized or finished.blocks
        held = quantized.matrices if quantized else {}
        taken: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in matrices(empty_model(load_config(str(finished.folder)))) if held else ():
            if str(matrix) in held:
                taken[matrix.parameter].append(matrix)

        def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
            # From the integers: the checkpoint has rounded their dequantized values to its own dtype.
            exact = tensor.float() if taken[name] else tensor
            for matrix in taken[name]:
                matrix.of(exact).copy_(held[str(matrix)].dequantized())
            return {name: in_dtype(exact, finished.dtype)}

        bits = rewritten(finished.folder, folder, change, {"dtype": finished.dtype})
        if finished.quantized is None or finished.quantized.scheme.activations is None:
            return Written(bits)
        return Written(bits, {"activations": "no runtime that opens this rounds activations"})

    def open(self, folder: Path, device: str) -> Runtime:
        return loaded(folder, device)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        named, dtype = shlex.quote(path), dtype_of(load_config(str(folder)))
        half = "bfloat16" if dtype == "bfloat16" else "float16"  # TGI has no other
        return [
            ("transformers", f"transformers serve {named} --dtype {dtype}"),
            ("vLLM", f"vllm serve {named} --dtype {dtype}"),
            ("TGI", f"text-generation-launcher --model-id {named} --dtype {half}"),
            ("TensorRT-LLM", f"trtllm-serve {named}"),
            ("DeepSpeed-Inference, one answer", f"python -c {shlex.quote(_deepspeed(path, dtype))}"),
        ]


def _deepspeed(path: str, dtype: str) -> str:
    return (
        f"import deepspeed, torch, transformers as t; path = {path!r}; k = t.AutoTokenizer.from_pretrained(path); "
        f"d = torch.{dtype}; "
        "m = deepspeed.init_inference(t.AutoModelForCausalLM.from_pretrained(path, dtype=d), dtype=d).module; "
        'x = k("Once upon a time", return_tensors="pt").to(m.device); '
        "print(k.decode(m.generate(input_ids=x.input_ids, max_new_tokens=64)[0]))"
    )
