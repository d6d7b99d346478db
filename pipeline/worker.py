"""The process of one stage, or of one of its ranks; and the check before all of them.

python -m pipeline.worker check SPEC     every selected stage refuses what it can; prints the plan as JSON
python -m pipeline.worker prepare SPEC   the single-process part of a stage
python -m pipeline.worker run SPEC       a rank of the rest
python -m pipeline.worker stage SPEC     both, in one process
python -m pipeline.worker serve FD       forks into these, one after the other (pipeline/prefork.py)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.errors import NOT_FINITE, STOPPED, NotFinite, Refusal, Stopped, of_storage
from pipeline import artifact, hashes, logs, run_folder, shared
from pipeline.launch import die_with
from pipeline.notice import notice
from pipeline.run_folder import SCRATCH

_OF_SEVERAL = "run"  # the mode of a stage that has several ranks
_END_SECONDS = 10  # from the end of one rank to that of the others, at most


def main(arguments: Sequence[str]) -> int:
    mode, told = arguments
    _quiet()
    if mode == "serve":
        from pipeline.prefork import serve

        return serve(int(told), main)
    if mode != "check":
        notice.listen()
    spec = artifact.checked(json.loads(Path(told).read_text()))
    die_with(os.getppid())
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if mode == _OF_SEVERAL else 0
    if mode != "check":
        logs.keep(rank)
    for folder in (shared.root(spec["config"]), Path(spec["config"]["run_dir"])):
        hashes.remember_in(run_folder.hashes(folder))
    context = None
    try:
        if mode == "check":
            from pipeline.check import check

            answer = check(spec, Path(told).parent)
            print(json.dumps({**answer, "hashes": hashes.known()}))
            return 0
        from pipeline.building import build
        from pipeline.context import Context
        from pipeline.tracked import tracked

        context = Context(**spec)
        stage: Any = build(context.config, context.stage)
        if context.config.get("doctor"):
            from pipeline.doctor.examined import Examined

            stage = Examined(stage, context)
        if mode in ("prepare", "stage"):
            stage.prepare(context)
        if mode in ("run", "stage"):
            with tracked(context, partial(_kept, spec, rank, context)):
                stage.run(context)
        return 0
    except Stopped as stopped:
        if context is not None and context.rank == 0:
            why = "notice was given" if stopped.status == STOPPED else "SIGTERM came"
            print(f"{spec['stage']}: {why}, stopped after step {stopped.step}, its checkpoint is saved", flush=True)
        return stopped.status
    except Exception as problem:
        status, said, known = _end_of(problem, spec, context)
        if mode != "check":
            _kept(spec, rank, context, problem)
        if _tells(mode, spec, knows=known):
            if not known:
                raise
            _refuse(mode, said)
        return status


def _end_of(problem: BaseException, spec: dict[str, Any], context: Any) -> tuple[int, str, bool]:
    """The exit status, what is said of it, and whether a person can mend it by that."""
    if isinstance(problem, Refusal):
        return 2, str(problem) if context is None else context.in_its_words(str(problem)), True
    if isinstance(problem, NotFinite):
        return NOT_FINITE, str(problem), True
    line = of_storage(problem, Path(spec["config"]["run_dir"])) if isinstance(problem, Exception) else None
    return (1, f"{type(problem).__name__}: {problem}", False) if line is None else (2, line, True)


def _kept(spec: dict[str, Any], rank: int, context: Any, problem: BaseException) -> int:
    """The status that this rank ends with, once it is written why; once, as the first of several ranks is looked for.
    What has stopped in good order has not failed."""
    if isinstance(problem, Stopped):
        return problem.status
    status, said, _ = _end_of(problem, spec, context)
    if isinstance(problem, Exception) and not getattr(problem, "_kept", False):
        logs.failed(spec["stage"], rank, status, said, problem)
        problem._kept = True  # type: ignore[attr-defined]
    return status


def _tells(mode: str, spec: dict[str, Any], knows: bool = True) -> bool:
    """Whether this rank says why it failed: of several, the first that knows in one line. The others fail for the same
    reason, or because that one is gone; they wait here, and are ended with it."""
    if mode != _OF_SEVERAL:
        return True
    # in the temporary folder, as the run's may be full; what is left there is swept by a later command
    told = Path(tempfile.gettempdir()) / f"{SCRATCH}{spec['attempt']}-{spec['restart']}"
    try:
        if knows:
            told.mkdir()
            return True
    except FileExistsError:
        pass
    except OSError:
        return True
    time.sleep(_END_SECONDS)
    return not knows and not told.exists()


def _refuse(mode: str, message: str) -> None:
    """The check answers its parent; a stage tells the person."""
    if mode == "check":
        print(json.dumps({"refusal": message}), flush=True)
    else:
        print(Refusal(message).told, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Chatter of libraries that says nothing a person could act on."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a faster kernel for the CPU


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status and sys.argv[1] == _OF_SEVERAL:
        if (nvme := sys.modules.get("models.nvme")) is not None:
            nvme.remove()  # exit handlers do not run
        sys.stdout.flush()
        os._exit(status)  # at once: taking a process group apart waits for ranks that have failed, too
    sys.exit(status)
