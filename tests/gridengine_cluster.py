"""A Grid Engine of one host on this machine, thrown away afterwards; needs root and Debian's gridengine packages.

Grid Engine identifies hosts by the names that their addresses resolve to, and its daemons listen on all addresses. So
it runs in a network namespace of its own, with nothing but loopback, on a host called localhost.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

BINARIES = Path("/usr/lib/gridengine")
SHARED = Path("/usr/share/gridengine")
INSTALLED = Path("/var/lib/gridengine")
# bootstrap(5).
BOOTSTRAP = """\
admin_user none
default_domain none
ignore_fqdn true
spooling_method berkeleydb
spooling_lib libspoolb
spooling_params {folder}/db
binary_path {binaries}
qmaster_spool_dir {folder}/qmaster
security_mode none
listener_threads 1
worker_threads 1
scheduler_threads 1
"""
# sge_pe(5).
PARALLEL_ENVIRONMENT = """\
pe_name smp
slots 99
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule $pe_slots
control_slaves FALSE
job_is_first_task TRUE
urgency_slots min
accounting_summary FALSE
qsort_args NONE
"""
# What differs from Grid Engine's own values: root may submit; a job's environment is what it was submitted with (no
# login shell); jobs start at once and whatever the machine's load is; they are told 10 s before they are killed.
CONFIGURATION = {
    "min_uid": "0", "min_gid": "0", "load_report_time": "00:00:01", "administrator_mail": "none",
    "login_shells": "none",
}  # fmt: skip
SCHEDULER = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
QUEUE = {
    "qname": "test", "hostlist": "localhost", "slots": "8", "load_thresholds": "NONE", "pe_list": "smp",
    "rerun": "TRUE", "notify": "00:00:10",
}  # fmt: skip


def missing() -> str | None:
    """Say what keeps a Grid Engine from being started here, or None."""
    if os.geteuid():
        return "needs root"
    if not all((BINARIES / name).exists() for name in ("sge_qmaster", "sge_execd", "qsub")):
        return "needs Grid Engine (Debian: gridengine-master, gridengine-exec, gridengine-client)"
    absent = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: util-linux, iproute2)"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"needs network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class GridEngine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}", "SGE_ROOT": str(folder / "root"),
            "SGE_CELL": "tests", "SGE_QMASTER_PORT": "6444", "SGE_EXECD_PORT": "6445", "SGE_ND": "1",
        }  # fmt: skip

        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        common = self.folder / "root" / "tests" / "common"
        common.mkdir(parents=True)
        for name in ("db", "qmaster", "execd"):
            (self.folder / name).mkdir()
        for name in ("bin", "lib", "util", "utilbin"):
            (self.folder / "root" / name).symlink_to(INSTALLED / name)
        (common / "bootstrap").write_text(BOOTSTRAP.format(folder=self.folder, binaries=BINARIES))
        (common / "act_qmaster").write_text("localhost\n")
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", "hostname localhost && ip link set lo up && echo up && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"

        settings = (SHARED / "default-configuration").read_text()
        configuration = _edited(settings, {**CONFIGURATION, "execd_spool_dir": str(self.folder / "execd")})
        self.run(BINARIES / "spoolinit", "berkeleydb", "libspoolb", self.folder / "db", "init")
        for kind, source in (
            ("configuration", self._file("configuration", configuration)),
            ("complexes", SHARED / "util" / "resources" / "centry"),
            ("usersets", SHARED / "util" / "resources" / "usersets"),
            ("managers", "root"),
        ):
            self.run(BINARIES / "spooldefaults", kind, source)
        self._spawn("sge_qmaster")
        self._until(lambda: self.call("qconf", "-sh") == "localhost", "sge_qmaster")
        self.run("qconf", "-as", "localhost")
        self.run("qconf", "-Ap", self._file("pe", PARALLEL_ENVIRONMENT))
        self.run("qconf", "-Aq", self._file("queue", _edited(self.run("qconf", "-sq"), QUEUE)))
        self.run("qconf", "-Msconf", self._file("scheduler", _edited(self.run("qconf", "-ssconf"), SCHEDULER)))
        self._spawn("sge_execd")
        # Until the host has reported once, its queue is in the state u (unknown).
        self._until(lambda: re.search(r"(?m)^test@localhost .*amd64 *$", self.call("qstat", "-f")), "sge_execd")

    def _file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def _enter(self, *command: str | Path) -> list[str]:
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--uts", *map(str, command)]

    def _spawn(self, name: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            daemon = subprocess.Popen(
                self._enter(BINARIES / name), env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _until(self, ready: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come up: {(self.folder / 'daemons.log').read_text()[-1500:]}")
            time.sleep(0.1)

    def call(self, *command: str | Path, environ: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            self._enter(*command), env={**self.environ, **(environ or {})}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stdout}{done.stderr}"

    def run(self, *command: str | Path, environ: Mapping[str, str] | None = None) -> str:
        out = self.call(*command, environ=environ)
        if out.startswith("failed: "):
            raise RuntimeError(f"{command[0]} {out}")
        return out

    def unfinished(self, job: str) -> list[tuple[str, str]]:
        """Return state and tasks of what is left of a job."""
        rows = [line.split() for line in self.run("qstat").splitlines()[2:]]
        return [(row[4], row[-1]) for row in rows if row[0] == job]

    def wait(self, job: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while left := self.unfinished(job):
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {job} has not ended: {left}")
            time.sleep(0.2)

    def end(self) -> None:
        """End everything in the namespace."""
        namespace = f"/proc/{self._holder.pid}/ns/net"
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.call("qconf", "-ke", "all")
            self.call("qconf", "-km")
            mine = os.readlink(namespace)
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):
                    if os.readlink(f"/proc/{process.pid}/ns/net") == mine and process.pid != self._holder.pid:
                        process.kill()
        for child in *self._daemons, self._holder:
            child.communicate(timeout=10)


def _edited(text: str, changes: Mapping[str, str]) -> str:
    """Return settings, a name and a value on each line, with other values; those that go on in more lines as they are.

    Raises:
        KeyError: there is no such setting.
    """
    for name, value in changes.items():
        text, found = re.subn(rf"(?m)^{name}(\s+).*$", rf"{name}\g<1>{value}", text)
        if found != 1:
            raise KeyError(name)
    return text
