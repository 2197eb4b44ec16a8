"""What this host and this job's cgroup leave to us."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What a batch system gave this job on this host; each is a plain number where it is set.
_BATCH_CPUS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a job needs of the target's file system and what that has left; `files_free` None: it does not count."""

    path: str
    bytes_needed: int
    bytes_free: int
    files_needed: int
    files_free: int | None

    @property
    def fault(self) -> str | None:
        """Say what there is too little of, or None."""
        if self.bytes_needed > self.bytes_free:
            return f"{self.path}: needs about {self.bytes_needed:,} bytes, {self.bytes_free:,} are free"
        if self.files_free is not None and self.files_needed > self.files_free:
            return f"{self.path}: needs about {self.files_needed:,} files, {self.files_free:,} inodes are free"
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
        files_needed=files,
        files_free=stat.f_favail if stat.f_files else None,
    )


def usable_cpus(environ: Mapping[str, str], root: Path = Path("/")) -> int:
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
