"""A Slurm on this machine, on loopback, thrown away afterwards; needs root, slurm-wlm and munge.

Its nodes are daemons of one machine: they share its CPUs, but each has a disk of its own, a folder that TMPDIR names.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH = "/usr/sbin:/sbin:" + os.environ.get("PATH", "")
# What differs from Slurm's own values keeps the tests short: schedule every two seconds, and let a requeued job start
# after 5 s (cred_expire) instead of 120.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
TaskProlog={folder}/task_prolog
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=1,bf_interval=1
ReturnToService=2
KillWait=30
PropagateResourceLimits=NONE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 State=UNKNOWN\n"
# What it prints as `export ...` is set in the environment of every task, and of a batch script.
TASK_PROLOG = """#!/bin/sh
echo "export TMPDIR={folder}/disk/$SLURMD_NODENAME"
"""


def missing() -> str | None:
    """Say what keeps a Slurm from being started here, or None."""
    if os.geteuid():
        return "needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm and munge)" if absent else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Slurm:
    """The cluster; its folder's path must be short, as sockets lie in it."""

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(nodes)]
        self.environ = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool", "disk"):
            (self.folder / name).mkdir()
        for node in self.nodes:
            self.disk(node).mkdir()
        self.folder.chmod(0o755)
        prolog = self.folder / "task_prolog"
        prolog.write_text(TASK_PROLOG.format(folder=self.folder))
        prolog.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, folder=self.folder, controller_port=free_port())
        text += "".join(NODE.format(name=node, host=host, port=free_port()) for node in self.nodes)
        (self.folder / "slurm.conf").write_text(text)
        files = [
            f"--{name}={self.folder}/munge.{name.replace('-file', '')}" for name in ("socket", "pid-file", "log-file")
        ]
        self._spawn("munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={self.folder}/seed", *files)
        self._until((self.folder / "munge.socket").exists, "munged")
        self._spawn("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-N", node)
        self._until(lambda: self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == self.nodes, "the nodes")

    def disk(self, node: str) -> Path:
        """Return what TMPDIR is in the tasks of a node."""
        return self.folder / "disk" / node

    def _spawn(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, start_new_session=True)
            )

    def _until(self, ready: object, what: str) -> None:
        assert callable(ready)
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come up: {(self.folder / 'daemons.log').read_text()[-1500:]}")
            time.sleep(0.1)

    def call(self, *command: str, text: str | None = None, environ: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env={**self.environ, **(environ or {})}, input=text, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr.strip()}"

    def state(self, job: str) -> str:
        """State of a job, or of all elements of an array, while Slurm remembers it (5 minutes)."""
        text = self.call("scontrol", "-o", "show", "job", job)
        return ",".join(sorted({word.partition("=")[2] for word in text.split() if word.startswith("JobState=")}))

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {job} is {state}, not {states}: {self.call('scontrol', 'show', 'job', job)}")
            time.sleep(0.2)
        return state

    def end(self) -> None:
        for job in self.call("squeue", "-h", "-o", "%A").split():
            self.call("scancel", "--full", "--signal=KILL", job)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
