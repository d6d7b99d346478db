"""A real Slurm: munge, a controller and pretended nodes of this machine, without root, systemd, cgroups or a network.

The nodes are called 127.0.0.1 and 127.0.0.2, so that the name of the first is an address at which ranks can meet.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
GPUS_PER_NODE = 8
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

_CONF = """\
ClusterName=retort
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its old credential is void: two minutes, unless that is made shorter (5 s at least)
AuthInfo=socket={home}/munge.sock,cred_expire=5
# without it, nothing resolves on a machine that has no network but loopback
CommunicationParameters=EnableIPv6
StateSaveLocation={home}/controller
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# believe what is said below of processors, memory and GPUs
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=1,batch_sched_delay=0
# between SIGTERM and SIGKILL
KillWait=15
ReturnToService=2
# ranks meet at a port that follows from the job's number: two clusters on one machine should not count alike
FirstJobId={first}
# jobs of `urgent` take the nodes of those of `all`, which get SIGTERM, and are queued again
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
NodeName=DEFAULT CPUs=64 RealMemory=64000 Gres=gpu:{gpus}
"""


def missing() -> list[str]:
    """Programs a cluster needs that are not here."""
    return [name for name in ("munged", "slurmctld", "slurmd", "srun", "sbatch") if not shutil.which(name, path=_PATH)]


@dataclass(frozen=True)
class Cluster:
    env: dict[str, str]
    start_node: Callable[[str], None] = lambda name: None  # its slurmd, again

    def command(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path) -> str:
        """`sbatch WORDS` in the folder `cwd`; gives the job's number."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, StdOut, …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", number)))

    def wait(self, number: str, seconds: float, until: Callable[[], bool] = lambda: False) -> dict[str, str]:
        """Poll until `until` holds or the job has ended; its record. Fails with the job's log when neither comes."""
        end = time.monotonic() + seconds
        while not until() and (record := self.job(number))["JobState"] not in _ENDED:
            assert time.monotonic() < end, f"job {number} is {record['JobState']} after {seconds:.0f} s:\n{log(record)}"
            time.sleep(0.1)
        return self.job(number)


def log(record: dict[str, str]) -> str:
    path = Path(record["StdOut"])
    return path.read_text() if path.exists() else f"there is no {path}"


@contextmanager
def cluster(home: Path) -> Iterator[Cluster]:
    """Up, with its files in `home`, and down again with the jobs it runs."""
    _configure(home)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
    env |= {"PATH": _PATH, "SLURM_CONF": str(home / "slurm.conf")}
    made = Cluster(env, lambda name: start("slurmd", "-D", "-N", name))
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        libc = ctypes.CDLL(None)
        daemons[:] = [each for each in daemons if list(each.args) != [*words]]  # type: ignore[call-overload]
        with open(home / "daemons.log", "ab") as out:
            daemons.append(
                subprocess.Popen(
                    words,
                    env=env,
                    cwd=home,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
                )
            )  # PR_SET_PDEATHSIG: they do not outlive the tests

    def until(met: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not met():
            dead = [str(daemon.args) for daemon in daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"Slurm is not up, ended: {dead}\n{(home / 'daemons.log').read_text()[-4000:]}")
            time.sleep(0.1)

    try:
        start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={home}/munge.key",
            f"--socket={home}/munge.sock",
            f"--pid-file={home}/munged.pid",
            f"--seed-file={home}/munge.seed",
            f"--log-file={home}/munged.log",
        )
        until((home / "munge.sock").exists)
        start("slurmctld", "-D")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        until(lambda: _states(env) == ["idle"] * len(NODES))
        try:
            yield made
        finally:
            made.command("scancel", "--user", getpass.getuser())
            until(lambda: not made.command("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _configure(home: Path) -> None:
    (home / "munge.key").touch(0o600)
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "controller").mkdir()
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
    port, *ports = (server.getsockname()[1] for server in taken)
    for server in taken:
        server.close()
    conf = _CONF.format(
        home=home, user=getpass.getuser(), port=port, first=random.randrange(1, 9000), gpus=GPUS_PER_NODE
    )
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={at}\n"
        for name, at in zip(NODES, ports, strict=True)
    ]
    (home / "slurm.conf").write_text(conf + "".join(nodes))
    for gpu in range(GPUS_PER_NODE):
        (home / f"gpu{gpu}").touch()
    (home / "gres.conf").write_text(f"Name=gpu File={home}/gpu[0-{GPUS_PER_NODE - 1}]\n")
    # slurmd opens its cgroup plugin though nothing here uses it: v1 stays idle then, and since 24.05 there is none.
    version = subprocess.run(["slurmd", "-V"], env={"PATH": _PATH}, capture_output=True, text=True).stdout
    new = tuple(map(int, re.findall(r"\d+", version)[:2])) >= (24, 5)
    (home / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if new else 'cgroup/v1'}\n")


def _states(env: dict[str, str]) -> list[str]:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"], env=env, capture_output=True, text=True
    )
    return shown.stdout.split()
