"""Retort's front door: compose the configuration, refuse what is wrong with it, hand it to the pipeline.

python train.py                                   the quickstart, offline
python train.py +experiment=distill_7b_to_1b      the production run
python train.py --cfg job                         what would be run, without running it
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.errors import Refusal, StageFailed
from pipeline.config import Config, nearest, parse

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors arrive here, to be said in one line
ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    # Leaving by SystemExit, because Hydra would put a line of its own before any other error.
    if code := _told(lambda: _run(composed)):
        sys.exit(code)


def _run(composed: DictConfig) -> None:
    config = parse(composed)
    from pipeline.run import run  # rich and the report: not for `--cfg job`

    run(config)


def _told(work: Callable[[], None]) -> int:
    """Exit status of `work`; what a person can mend is told in one line."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Refusal as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except StageFailed as problem:
        if str(problem):
            print(f"error: {problem}", file=sys.stderr)
        return problem.code
    except (HydraException, OmegaConfBaseException) as problem:
        print(f"error: {explain(problem)}", file=sys.stderr)
        return 2


def arguments(given: list[str]) -> list[str]:
    """The command line as Hydra wants it: quickstart where no experiment is named, `stages=[…]` as a selection."""
    words = []
    for word in given:
        if re.match(r"experiment=", word):
            raise Refusal(f"{word}: write +{word} (an experiment is added to the configuration)")
        words.append(re.sub(r"^stages=(\[?)", lambda m: "only=" + m[1], word))
    words = [re.sub(r"^(only|force)=(?!null$)([^\[].*)$", r"\1=[\2]", word) for word in words]
    if not any(word.startswith("+experiment=") for word in words) and not {"--help", "--hydra-help"} & set(words):
        # beside the other overrides: argparse wants them all in one place
        at = next((i for i, word in enumerate(words) if "=" in word and not word.startswith("-")), len(words))
        words.insert(at, "+experiment=quickstart")
    return words


def explain(problem: Exception) -> str:
    """Hydra's and OmegaConf's errors in one line."""
    text = " ".join(str(problem).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"unknown config key {found[1]!r}{_suggestion(found[1])}"
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?) Config search path", text
    ):
        return f"{found[1]}={found[2]}: no such choice{nearest(found[2], found[3].split())}"
    return text


def _suggestion(key: str) -> str:
    """The nearest known neighbour of a key that is not there."""
    here = os.path.dirname(os.path.abspath(__file__))
    with hydra.initialize_config_dir(os.path.join(here, "conf"), version_base="1.3"):
        node = hydra.compose("config", [word for word in sys.argv if word.startswith("+experiment=")])
    for part in key.lstrip("+~").split("."):
        if not OmegaConf.is_dict(node):
            return ""
        if part not in node:
            known = [str(name) for name in node]
            return nearest(part, known) if known else f"; nothing is set there yet: +{key}=…"
        node = node[part]
    return ""


def front_door() -> None:
    sys.argv[1:] = arguments(sys.argv[1:])
    try:
        main()
    except ValueError as problem:
        if "Config group override" not in str(problem):  # as of `logger=null`, where Hydra raises no error of its own
            raise
        raise Refusal(f"{problem}; name one of the files in conf/") from None


if __name__ == "__main__":
    sys.exit(_told(front_door))
