"""The command lines a stage becomes, without Slurm."""

from __future__ import annotations

import sys

import pytest

from pipeline.launch import Slurm


def options(command: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in command[1 : command.index(sys.executable)])


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (2, 1), (2, 8)])
def test_srun_starts_one_task_per_device_on_every_node(nodes: int, per_node: int) -> None:
    ranks = nodes * per_node
    command = Slurm().command(["pipeline.worker", "run", "stage.json"], ranks=ranks, nodes=nodes)
    told = options(command)
    assert command[0] == "srun"
    assert (told["nodes"], told["ntasks"], told["ntasks-per-node"]) == (str(nodes), str(ranks), str(per_node))
    assert command[command.index(sys.executable) + 1 :] == ["-u", "-m", "pipeline.worker", "run", "stage.json"]


def test_a_stage_of_one_process_takes_one_node_of_many() -> None:
    told = options(Slurm().command(["pipeline.worker", "prepare", "stage.json"], ranks=1, nodes=4))
    assert (told["nodes"], told["ntasks"], told["ntasks-per-node"]) == ("1", "1", "1")


def test_a_rank_that_asks_to_go_on_later_does_not_have_its_peers_killed() -> None:
    told = options(Slurm().command(["pipeline.worker", "run", "stage.json"], ranks=2, nodes=2))
    assert told["kill-on-bad-exit"] == "0"
    assert int(told["wait"]) > 0  # but a dead rank's peers do not wait for it for ever


def test_words_for_srun_stand_before_the_program_and_win() -> None:
    words = ["--container-image=/images/retort.sqsh", "--wait=5"]
    told = options(Slurm(words).command(["pipeline.worker", "run", "stage.json"], ranks=2, nodes=1))
    assert told["container-image"] == "/images/retort.sqsh"
    assert told["wait"] == "5"
