"""Generation by a teacher that is sharded over ranks (`python -m tests.generating FOLDER` under torchrun)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from models.generation import Sampling
from models.teachers.sharded import Sharded
from models.teachers.teacher import Opening
from tests.fitting import VOCABULARY

WORDS: dict[str, Any] = {"pad_token": 0, "batch_size": 2}
ENDS = (7,)
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=12),
    "drawn": Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, samples=2, seed=3),
    "beams": Sampling(max_new_tokens=6, beams=3),
}


def prompts_of(rank: int) -> list[list[int]]:
    """As many on every rank, of other lengths."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(1, VOCABULARY, (3 + 4 * rank + n,), generator=generator).tolist() for n in range(3)]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    teacher: Any = Sharded(str(folder / "teacher")).open(Opening(VOCABULARY))
    torch.distributed.init_process_group("gloo")
    teacher.check()
    found = {}
    for name, sampling in SAMPLINGS.items():
        answers = dict(teacher.generate(prompts_of(rank), sampling, end_tokens=ENDS, **WORDS))
        pairs = [(prompt, answers[number][0].ids) for number, prompt in enumerate(prompts_of(rank))]
        told = teacher.log_probabilities(pairs, **WORDS)
        found[name] = ({n: [[*a.ids, a.finish_reason] for a in each] for n, each in answers.items()}, told)
    held = sum(parameter.numel() for parameter in teacher.model.parameters())
    torch.save({"found": found, "held": held}, folder / f"rank-{rank}.pt")
    teacher.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.generating", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


if __name__ == "__main__":
    main()
