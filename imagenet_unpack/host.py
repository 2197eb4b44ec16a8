"""What this host and this job's cgroup leave to us."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# What a batch system gave this job on this host; each is a plain number where it is set.
_BATCH_CPUS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")


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
