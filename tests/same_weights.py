"""Whether this checkout makes the weights that another commit makes, to the bit: the reduced quickstart by both.

    .venv/bin/python -m tests.same_weights COMMIT

A change of form must leave every hash as it is. Both runs use this machine and this .venv, one thread, seed 0. Exits
with 1 where a hash differs, and names the files.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REDUCED = [
    f"stages.{stage}.training.max_steps={steps}"
    for stage, steps in (("pretrain", 40), ("distill", 20), ("recover", 10), ("qat", 10))
]
ALL_BUT_EVALUATE = "stop=export"


def weights(checkout: Path, run_dir: Path) -> dict[str, str]:
    """Stage/file → sha256 of every model's weights that the quickstart writes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    subprocess.run(
        [sys.executable, "train.py", f"run_dir={run_dir}", *REDUCED, ALL_BUT_EVALUATE],
        cwd=checkout,
        env=env,
        check=True,
    )
    found = {
        path.relative_to(run_dir): path for pattern in ("*/model*", "*/*/model*") for path in run_dir.glob(pattern)
    }
    files = {str(name): path for name, path in sorted(found.items()) if path.is_file() and name.parts[0] != "work"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def main() -> int:
    commit = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(other), commit], check=True)
        try:
            before, now = weights(other, Path(folder) / "before"), weights(ROOT, Path(folder) / "now")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(other)], check=True)
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    for name in sorted({*before, *now}):
        print("differs" if name in differing else "same   ", name, (now.get(name) or "absent")[:16])
    return 1 if differing or not now else 0


if __name__ == "__main__":
    sys.exit(main())
