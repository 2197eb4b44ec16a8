"""CPUs, memory and disk space available to this job: of the host, its cgroups and the target's file system."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.text import human_bytes

# What a batch system gave this job on this host; each is a plain number where it is set.
_BATCH_CPUS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")
_ROOT = Path("/")
# v1 writes the largest number of whole pages where there is no limit (mm/page_counter.c).
_NO_LIMIT = 1 << 62
# Resident and private to a process after a run: a worker with its window, and the parent with a plan of 1.3 million
# images; measured, with a margin.
_WORKER_BYTES = 48 << 20
_PARENT_BYTES = 80 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a job needs of the target's file system and what that has left; `files_free` None: it does not count."""

    path: str
    bytes_needed: int
    bytes_free: int
    bytes_total: int
    files_needed: int
    files_free: int | None

    @property
    def fault(self) -> str | None:
        """Say what there is too little of, or None."""
        if self.bytes_needed > self.bytes_free:
            needed, free = human_bytes(self.bytes_needed), human_bytes(self.bytes_free)
            return f"{self.path}: needs about {needed}, only {free} are free"
        if self.files_free is not None and self.files_needed > self.files_free:
            return f"{self.path}: needs about {self.files_needed:,} files, only {self.files_free:,} inodes are free"
        return None


def room(path: Path, *, content_bytes: int, files: int) -> Room:
    """Hold a job's needs against what the file system of `path`, which need not exist yet, has left.

    Each file is rounded up to whole blocks: half a block on average. A file system that reports no inodes at all
    (btrfs, some network file systems) has said nothing about them.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    stat = os.statvfs(existing)
    return Room(
        path=str(path),
        bytes_needed=content_bytes + files * stat.f_frsize // 2,
        bytes_free=stat.f_bavail * stat.f_frsize,
        bytes_total=stat.f_blocks * stat.f_frsize,
        files_needed=files,
        files_free=free_files(stat),
    )


def free_files(stat: os.statvfs_result) -> int | None:
    """Return how many files a file system has room for, or None where it says nothing of use.

    btrfs and some network file systems report no inodes at all; rclone reports a thousand million, none of them free.
    """
    unknown = not stat.f_files or (not stat.f_favail and stat.f_files >= 10**9)
    return None if unknown else stat.f_favail


def local_folders() -> Iterator[Path]:
    """Yield folders of this host alone for small files that processes share: in memory, or for temporary files."""
    yield Path("/dev/shm")  # noqa: S108 - whoever makes a file there sees to it that it is its own
    with suppress(OSError):
        yield Path(tempfile.gettempdir())


def free_bytes(path: Path) -> int:
    """Return what the file system of `path` leaves to this user."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What this job may still take and what it may use in all, in bytes."""

    available: int
    total: int


def memory(root: Path = _ROOT) -> Memory:
    """Return what the tightest of the host and the job's cgroups, up to the root, leaves.

    Page cache counts as free, since it goes when memory is wanted; dirty and writeback pages do not, since they must
    be written first.
    """
    levels = [_host_memory(root)]
    levels += filter(None, (_cgroup_memory(group) for group in cgroups(root, "memory")))
    return min(levels, key=lambda level: level.available)


def _host_memory(root: Path) -> Memory:
    """Read /proc/meminfo (proc_meminfo(5)); where that is hidden, ask the C library, which knows of no page cache."""
    found = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" in found and "MemTotal" in found:
        available, total = (int(found[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
        return Memory(available=available, total=total)
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return Memory(available=total, total=total)


def _cgroup_memory(group: Path) -> Memory | None:
    """Read one cgroup; None where it has no limit. Format: cgroup-v2.rst, cgroup-v1/memory.rst of the kernel."""
    v2 = [_number(group / "memory.max"), _number(group / "memory.high")]
    limits = [limit for limit in (*v2, _number(group / "memory.limit_in_bytes")) if limit is not None]
    used = _number(group / "memory.current")
    if used is None:
        used = _number(group / "memory.usage_in_bytes")
    if not limits or used is None or min(limits) >= _NO_LIMIT:
        return None
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)

    def amount(*names: str) -> int:
        return next((int(stat[name]) for name in names if stat.get(name, "").isdecimal()), 0)

    # v1 gives the sum over a group and those below it as total_*; v2 always means the sum.
    cache = amount("total_inactive_file", "inactive_file") + amount("total_active_file", "active_file")
    unwritten = amount("total_dirty", "file_dirty") + amount("total_writeback", "file_writeback")
    return Memory(available=max(0, min(limits) - used + max(0, cache - unwritten)), total=min(limits))


def worker_count(workers: int | None) -> int:
    """Return how many worker processes to start: those asked for or a CPU each, as far as memory allows."""
    return workers_that_fit(workers or usable_cpus(os.environ), memory())


def workers_that_fit(wanted: int, left: Memory) -> int:
    """Return how many of the worker processes wanted have room in memory; at least one."""
    return max(1, min(wanted, (left.available - _PARENT_BYTES) // _WORKER_BYTES))


def usable_cpus(environ: Mapping[str, str], root: Path = _ROOT) -> int:
    """Return the number of CPUs this job may use: the least of affinity, cgroup quota and what the batch system gave.

    Args:
        environ: the environment.
        root: folder in place of `/`, for tests.
    """
    limits = [float(len(os.sched_getaffinity(0)))]
    limits += (_cpu_quota(group) for group in cgroups(root, "cpu"))
    given = next((environ[name] for name in _BATCH_CPUS if environ.get(name, "").isdecimal()), None)
    if given is not None:
        limits.append(float(given))
    return max(1, math.ceil(min(limits)))


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and all its ancestors, in v2 and in `controller`'s v1 hierarchy.

    In a container the paths of /proc/self/cgroup may be those of the host, while the mount shows the container's part
    alone: the mount's own root is then what counts. Format: cgroups(7), proc_pid_mountinfo(5).
    """
    for mount, mount_root, names in _mounts(root, controller):
        for line in _text(root / "proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if (controller in controllers.split(",")) if names else not controllers:
                below = path.removeprefix(mount_root.rstrip("/")) if path.startswith(mount_root) else ""
                folder = mount / below.strip("/")
                while not folder.is_dir() and folder != mount:
                    folder = folder.parent
                yield folder
                while folder != mount:
                    folder = folder.parent
                    yield folder


def _mounts(root: Path, controller: str) -> Iterator[tuple[Path, str, bool]]:
    """Yield mount point, root within the hierarchy, and whether it is v1, of each cgroup mount of `controller`."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = [*right.split(" ", 2), "", ""][:3]
        fields = left.split(" ")
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            yield root / fields[4].lstrip("/"), fields[3], kind == "cgroup"


def _cpu_quota(group: Path) -> float:
    """Return the CPUs that one cgroup may use; infinity without a limit."""
    quota, period = [*_text(group / "cpu.max").split(), "max", "100000"][:2]  # v2
    if quota == "max":
        quota, period = _text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()  # v1
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return math.inf
    return int(quota) / int(period)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
