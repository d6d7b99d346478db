"""Prune a model, recover it, and export it for llama.cpp and vLLM.

    python examples/prune_recover_export.py MODEL text.jsonl          makes runs/small/… and runs/small-export/export/…

MODEL is a model folder or a hub id; the text is a .txt, .jsonl or .parquet file (column `text`), a folder, or a hub
dataset. Both commands continue where they stopped: run the script again after an interruption.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RUN, EXPORT = "runs/small", "runs/small-export"


def main(model: str, text: str, *further: str) -> int:
    train = [sys.executable, str(CHECKOUT / "train.py")]

    # A quarter of the heads and MLP channels of every layer goes; LoRA adapters recover the rest, the unpruned model
    # being the teacher.
    prune = [
        "+experiment=prune_recover", f"model.path={model}", f"data.train={text}",
        "importance=taylor", "stages.prune.kept_fraction=0.75",
        f"run_dir={RUN}",
    ]  # fmt: skip
    if code := subprocess.call([*train, *prune, *further]):
        return code

    # 16 bits for everything that reads plain checkpoints, and 8 bits for llama.cpp; no calibration text is needed.
    export = [
        "+experiment=export_only", f"model.path={RUN}/recover",
        "format=[huggingface,gguf]", "formats.gguf.type=q8_0",
        f"run_dir={EXPORT}",
    ]  # fmt: skip
    if code := subprocess.call([*train, *export]):
        return code

    for folder in sorted(Path(EXPORT, "export").glob("*/manifest.json")):
        measured = json.loads(folder.read_text())["certificates"]
        print(f"{folder.parent}: {measured['bits_per_weight']:.1f} bits per weight, KL {measured['kl']:.2g}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
