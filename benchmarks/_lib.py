"""What every benchmark here needs: fresh file systems, a known cache, one measured process, trees to compare, facts.

Nothing in here is part of the package or uses it. Linux only; without root, fresh folders stand in for fresh file
systems and the archive alone is evicted from the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import hashlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import xxhash

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.03
ORPHANS_S = 15.0
CHUNK_BYTES = 8 << 20
MKFS = {
    # Not lazy: what mkfs puts off, the kernel would do while a candidate is timed.
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
FILE_SYSTEMS = (*MKFS, "tmpfs", "folder")


# --- places -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fresh_place(kind: str, scratch: Path, size_bytes: int) -> Iterator[Path]:
    """Give an empty folder on a file system of its own, and take everything away afterwards.

    Deleting the last output and running again would measure the deletion: ext4 does not take inodes again that were
    freed a moment ago, and looks past them. `folder` is a new folder that stays until the whole of `scratch` goes.

    Args:
        kind: one of `FILE_SYSTEMS`; all but `folder` need root.
        scratch: where the (sparse) image and the mount point are made.
        size_bytes: size of the file system.
    """
    place = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=scratch))
    if kind == "folder":
        yield place
        return
    with contextlib.ExitStack() as undo:
        undo.callback(place.rmdir)
        if kind == "tmpfs":
            call("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place))
        else:
            image = place.with_suffix(".img")
            undo.callback(image.unlink)
            with image.open("wb") as file:
                file.truncate(size_bytes)
            # Direct: else the image's pages fill the cache a second time, and a flush ends before the disk has it.
            device = call("losetup", "--direct-io=on", "--find", "--show", str(image))
            undo.callback(call, "losetup", "--detach", device)
            call(*MKFS[kind], device)
            call("mount", device, str(place))
        undo.callback(unmount, place)
        yield place


def unmount(place: Path) -> None:
    """Unmount, once the last process that was killed has let go of it."""
    for _ in range(20):
        if subprocess.run(["umount", place], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
        time.sleep(0.25)
    call("umount", str(place))


def call(*command: str) -> str:
    """Run a program and return what it prints, stripped; its own message is raised when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


# --- cache ------------------------------------------------------------------------------------------------------------


def prepare_cache(archive: Path, *, warm: bool) -> str:
    """Bring the page cache into a known state and return that state's name."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    with archive.open("rb") as source:
        if not warm:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return "cold" if os.geteuid() == 0 else "archive evicted, else warm"
        while source.read(CHUNK_BYTES):
            pass
    return "warm"


# --- one measured process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one command took.

    Attributes:
        elapsed_s: until the command had ended and `sync -f` on its target had too.
        sync_s: the part of it that was `sync -f`.
        user_s: user time of the command, all its descendants and `sync`.
        system_s: likewise system time; writing back is done by the kernel's own threads and is not in here.
        machine_busy_s: time that all processors together were not idle, the kernel's threads and neighbours included.
        steal_s: time that the hypervisor gave to others.
        peak_process_bytes: peak RSS of the largest process.
        peak_tree_bytes: peak of the sum over all processes, sampled; shared pages count for each process.
        error: the last line on stderr if the command failed, else None.
    """

    elapsed_s: float
    sync_s: float
    user_s: float
    system_s: float
    machine_busy_s: float
    steal_s: float
    peak_process_bytes: int
    peak_tree_bytes: int
    error: str | None

    @property
    def cpu_s(self) -> float:
        """User and system time."""
        return self.user_s + self.system_s


def measure(command: Sequence[str], target: Path, cwd: Path) -> Usage:
    """Run `command` and flush the file system of `target`; nothing that it started is left alive."""
    _become_subreaper()
    busy_before_s, steal_before_s = _machine_times()
    with tempfile.TemporaryFile() as errors:
        try:
            with _MemorySampler() as memory:
                started = time.perf_counter()
                status, user_s, system_s = _run(command, cwd, errors)
                ended = time.perf_counter()
                _, sync_user_s, sync_system_s = _run(["sync", "-f", str(target)], cwd, errors)
                flushed = time.perf_counter()
            busy_s, steal_s = _machine_times()
            orphans_user_s, orphans_system_s = _reap_orphans()
        finally:
            _kill_descendants()
        error = None
        if status:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            error = f"exit {status}: {lines[-1] if lines else 'no message'}"
    return Usage(
        elapsed_s=flushed - started,
        sync_s=flushed - ended,
        user_s=user_s + sync_user_s + orphans_user_s,
        system_s=system_s + sync_system_s + orphans_system_s,
        machine_busy_s=busy_s - busy_before_s,
        steal_s=steal_s - steal_before_s,
        peak_process_bytes=memory.peak_process_bytes,
        peak_tree_bytes=memory.peak_tree_bytes,
        error=error,
    )


def _run(command: Sequence[str], cwd: Path, errors: IO[bytes]) -> tuple[int, float, float]:
    """Return exit status, user and system seconds of a command and those of its descendants that it waited for."""
    process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime, usage.ru_stime


def _reap_orphans() -> tuple[float, float]:
    """Wait for processes that outlive the command, so that their CPU time counts too."""
    user_s = system_s = 0.0
    deadline = time.monotonic() + ORPHANS_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
            user_s, system_s = user_s + usage.ru_utime, system_s + usage.ru_stime
            if not pid:
                time.sleep(0.02)
    return user_s, system_s


def _kill_descendants() -> None:
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait4(-1, 0)


def _become_subreaper() -> None:
    """Have orphaned descendants become our children, where they can be waited for."""
    pr_set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _descendants(pid: int) -> list[int]:
    """Return all living descendants; `psutil` would read every process of the machine for it."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it may end at any moment
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_bytes().split())
    return [descendant for child in children for descendant in (child, *_descendants(child))]


def _machine_times() -> tuple[float, float]:
    """Return seconds that the processors were busy, and that were stolen, since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq, times.steal


class _MemorySampler:
    """Samples the RSS of all descendants of this process in a thread, for the length of a `with` block."""

    def __init__(self) -> None:
        self.peak_process_bytes = 0
        self.peak_tree_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            tree_bytes = 0
            for pid in _descendants(os.getpid()):
                peak_bytes, now_bytes = _rss(pid)
                self.peak_process_bytes = max(self.peak_process_bytes, peak_bytes)
                tree_bytes += now_bytes
            self.peak_tree_bytes = max(self.peak_tree_bytes, tree_bytes)


def _rss(pid: int) -> tuple[int, int]:
    """Return the peak and the present resident size of a process, 0 if it is gone."""
    sizes = {b"VmHWM": 0, b"VmRSS": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            key, _, value = line.partition(b":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) << 10
    return sizes[b"VmHWM"], sizes[b"VmRSS"]


# --- trees ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What a split holds: two are equal when all names and sizes (and, if they were read, contents) are."""

    files: int
    size_bytes: int
    digest: str


def tree_of_folder(folder: Path, *, contents: bool) -> Tree:
    """Describe the files <wnid>/<name> under `folder`; anything at another depth makes the tree another one."""

    def entries() -> Iterator[tuple[str, int, str]]:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                with path.open("rb") if contents else contextlib.nullcontext() as file:
                    yield str(path.relative_to(folder)), path.lstat().st_size, _digest(file) if file else ""

    return _tree(entries())


def tree_of_archive(archive: Path, *, contents: bool) -> Tree:
    """Describe what unpacking the train archive must give, by the standard library's reader."""

    def entries() -> Iterator[tuple[str, int, str]]:
        with tarfile.open(archive, "r:") as outer, archive.open("rb") as raw:
            for inner in outer:
                raw.seek(inner.offset_data)
                with tarfile.open(fileobj=raw, mode="r:") as tar:
                    for member in tar:
                        body = tar.extractfile(member) if contents else None
                        name = f"{inner.name.removesuffix('.tar')}/{member.name}"
                        yield name, member.size, _digest(body) if body else ""

    return _tree(entries())


def _tree(entries: Iterable[tuple[str, int, str]]) -> Tree:
    rows = sorted(entries)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return Tree(files=len(rows), size_bytes=sum(size for _, size, _ in rows), digest=digest.hexdigest())


def _digest(file: IO[bytes]) -> str:
    digest = xxhash.xxh3_128()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


# --- facts ------------------------------------------------------------------------------------------------------------


def facts() -> dict[str, object]:
    """Return what a reader of the figures must know about the machine and the programs."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "when": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu[0] if cpu else platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "kernel": platform.release(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("joblib", "xxhash")},
            **{name: _first_line(name, "--version") for name in ("tar", "bsdtar", "dd", "gcc")},
        },
        "commit": _first_line("git", "--no-optional-locks", "-C", str(REPOSITORY), "describe", "--always", "--dirty"),
    }


def file_system_of(path: Path) -> str:
    """Return type and device of the file system that holds `path`."""
    return _first_line("findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", str(path))


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else "unknown"


def stop_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that it cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
