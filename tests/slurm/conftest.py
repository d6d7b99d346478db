"""One throw-away Slurm for all tests of a session that ask for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.slurm import throwaway


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[throwaway.Cluster]:
    if absent := throwaway.missing():
        pytest.skip(f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    with throwaway.cluster(tmp_path_factory.mktemp("slurm")) as up:
        up.env.update(RETORT_PYTHON=sys.executable, OMP_NUM_THREADS="1")  # what sbatch hands on to the jobs
        yield up
