"""Retort's front door: compose the configuration, refuse what is wrong with it, hand it to the pipeline.

python train.py                                   the quickstart, offline
python train.py +experiment=distill_7b_to_1b      the production run
python train.py +experiment=… dry_run=true        the plan: what would be run, checked
python train.py status run_dir=FOLDER             what has become of a run; `cancel` ends its jobs
python train.py --help                            experiments, choices, examples
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from models.errors import STOPPED, TERMINATED, Refusal, StageFailed
from pipeline.command_line import arguments, explain, settings, takers
from pipeline.config import Config, parse
from pipeline.notice import notice

failed: list[int] = []  # exit statuses of the runs of a sweep
submitting: list[Any] = []  # runs that are to be submitted: of a sweep together
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors arrive here, to be said in one line
ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    # Leaving by SystemExit, because Hydra would put a line of its own before any other error.
    if code := _told(lambda: _run(composed)):
        if HydraConfig.get().mode is not RunMode.MULTIRUN or code in (130, STOPPED, TERMINATED):
            sys.exit(code)
        failed.append(code)  # the other runs of a sweep go on


def _run(composed: DictConfig) -> None:
    config, typed = configuration(composed)
    from pipeline.run import run  # rich and the report: not for `--cfg job`

    if (jobs := run(config, typed, settings(sys.argv[1:], HydraConfig.get().overrides.task))) is not None:
        submitting.append(jobs)


def configuration(composed: DictConfig) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What Hydra composed of this command line, resolved; and each choice on it with the stages that take it. Raises
    Refusal."""
    typed = takers(composed, sys.argv[1:])
    return parse(composed), typed


def _told(work: Callable[[], None]) -> int:
    """Exit status of `work`; what a person can mend is told in one line."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Refusal as problem:
        print(problem.told, file=sys.stderr)
        return 2
    except StageFailed as problem:
        if str(problem):
            print(f"error: {problem}", file=sys.stderr)
        return problem.code
    except (HydraException, OmegaConfBaseException) as problem:
        print(f"error: {explain(problem, sys.argv[1:])}", file=sys.stderr)
        return 2


def front_door() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        from pipeline.help import page

        try:
            print(page(), flush=True)
        except BrokenPipeError:  # as of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if sys.argv[1:2] in (["status"], ["cancel"]):
        from pipeline.status import command

        command(sys.argv[1:])
        return
    sys.argv[1:] = arguments(sys.argv[1:])
    try:
        main()
    except ValueError as problem:
        if "Config group override" not in str(problem):  # as of `logger=null`, where Hydra raises no error of its own
            raise
        raise Refusal(f"{problem}; name one of the files in conf/") from None
    if submitting:
        from pipeline.run import submit

        submit(submitting)
    if failed:
        raise StageFailed(
            f"{len(failed)} of the runs of this sweep were not finished or not submitted; see above", failed[0]
        )


if __name__ == "__main__":
    notice.listen()
    sys.exit(_told(front_door))
