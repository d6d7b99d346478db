"""A real Slurm for the tests: munge, a controller and two pretended nodes of this machine, in a folder of their own.

The nodes are called 127.0.0.1 and 127.0.0.2, so that the name of the first is an address the ranks can meet at.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NODES = ("127.0.0.1", "127.0.0.2")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

_CONF = """\
ClusterName=retort
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits as long as its old credential lives, 120 s by default
AuthInfo=socket={home}/munge.sock,cred_expire=2
CommunicationParameters={communication}
StateSaveLocation={home}/controller
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
# no cgroups, no accounting: nothing of this machine is touched
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=1,batch_sched_delay=0
KillWait=2
ReturnToService=2
# the port at which the ranks meet follows from the job id: two clusters on one machine must not share it
FirstJobId={first}
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=64000 Gres=gpu:4
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=64000 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    env: dict[str, str]

    def command(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path) -> str:
        """`sbatch WORDS` in the folder `cwd` → the job's id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows, e.g. JobState, ExitCode, Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", job)))

    def wait(self, job: str, until: Callable[[], bool], seconds: float) -> dict[str, str]:
        """Poll until `until` is met or the job has ended; gives the job's last record."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            record = self.job(job)
            if until() or record["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return record
            time.sleep(0.2)
        raise AssertionError(f"job {job} after {seconds:.0f} s: {record}\n{log(record)}")


def log(record: dict[str, str]) -> str:
    path = Path(record["StdOut"])
    return path.read_text() if path.exists() else f"{path} was not written"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(name, path=_PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    home = tmp_path_factory.mktemp("slurm")
    _configure(home)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
    env |= {"PATH": _PATH, "SLURM_CONF": str(home / "slurm.conf")}
    found = Cluster(env)
    daemons = [_start(home, env, "munged", "--foreground", "--force", f"--key-file={home}/munge.key",
                      f"--socket={home}/munge.sock", f"--pid-file={home}/munged.pid", f"--seed-file={home}/munge.seed",
                      f"--log-file={home}/munged.log")]
    try:
        _until(home, (home / "munge.sock").exists)
        daemons.append(_start(home, env, "slurmctld", "-D"))
        daemons += [_start(home, env, "slurmd", "-D", "-N", node) for node in NODES]
        _until(home, lambda: _idle(found))
        yield found
        subprocess.run(["scancel", "--user", getpass.getuser()], env=env, timeout=30)
        _until(home, lambda: not found.command("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _configure(home: Path) -> None:
    key = home / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    (home / "controller").mkdir()
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    conf = _CONF.format(home=home, user=getpass.getuser(), nodes=NODES, first=random.randrange(1, 9000),
                        ports=[server.getsockname()[1] for server in free], communication="")
    for server in free:
        server.close()
    (home / "slurm.conf").write_text(conf)
    for index in range(4):
        (home / f"gpu{index}").touch()
    (home / "gres.conf").write_text(f"Name=gpu File={home}/gpu[0-3]\n")
    # slurmd looks for cgroups though nothing here uses them; "disabled" exists since 24.05, v1 does nothing unused.
    version = re.search(r"(\d+)\.(\d+)", subprocess.check_output(["slurmd", "-V"], text=True, env={"PATH": _PATH}))
    assert version is not None
    old = (int(version[1]), int(version[2])) < (24, 5)
    (home / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")


def _start(home: Path, env: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    with open(home / "daemons.log", "ab") as out:
        return subprocess.Popen(words, env=env, cwd=home, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                start_new_session=True,
                                preexec_fn=lambda: libc.prctl(1, signal.SIGTERM))  # they end with the tests


def _idle(cluster: Cluster) -> bool:
    shown = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.env, capture_output=True, text=True)
    return shown.stdout.split() == ["idle"] * len(NODES)


def _until(home: Path, met: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not met():
        if time.monotonic() > end:
            raise RuntimeError(f"Slurm is not ready:\n{(home / 'daemons.log').read_text()[-4000:]}")
        time.sleep(0.1)
