from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from imagenet_unpack.host import resources
from imagenet_unpack.host.resources import Memory

MB = 1 << 20


class Root:
    """A recorded `/proc` and `/sys` of some host."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def cgroup(self, lines: str, mounts: str) -> None:
        self.write("proc/self/cgroup", lines)
        self.write("proc/self/mountinfo", mounts)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MEMORY = "36 32 0:31 / /sys/fs/cgroup/memory rw shared:15 - cgroup cgroup rw,memory\n"
V1_CPU = "37 32 0:32 / /sys/fs/cgroup/cpu,cpuacct rw shared:16 - cgroup cgroup rw,cpu,cpuacct\n"
UNIFIED = "38 32 0:33 / /sys/fs/cgroup/unified rw shared:17 - cgroup2 cgroup2 rw\n"


def stat(**values: int) -> str:
    return "".join(f"{name} {value}\n" for name, value in values.items())


def test_v2_every_level_counts(root: Root) -> None:
    root.cgroup("0::/user.slice/job\n", V2)
    root.write("sys/fs/cgroup/user.slice/memory.max", f"{400 * MB}\n")
    root.write("sys/fs/cgroup/user.slice/memory.current", f"{350 * MB}\n")
    root.write("sys/fs/cgroup/user.slice/memory.stat", stat(inactive_file=20 * MB, active_file=10 * MB))
    root.write("sys/fs/cgroup/user.slice/job/memory.max", "max\n")
    root.write("sys/fs/cgroup/user.slice/job/memory.current", f"{10 * MB}\n")
    assert resources.memory(root.path) == Memory(available=80 * MB, total=400 * MB)


def test_v2_dirty_pages_are_not_free_and_high_is_a_limit_too(root: Root) -> None:
    root.cgroup("0::/job\n", V2)
    root.write("sys/fs/cgroup/job/memory.max", f"{900 * MB}\n")
    root.write("sys/fs/cgroup/job/memory.high", f"{500 * MB}\n")
    root.write("sys/fs/cgroup/job/memory.current", f"{450 * MB}\n")
    root.write(
        "sys/fs/cgroup/job/memory.stat",
        stat(inactive_file=300 * MB, active_file=100 * MB, file_dirty=250 * MB, file_writeback=50 * MB),
    )
    assert resources.memory(root.path) == Memory(available=150 * MB, total=500 * MB)


def test_v1_as_slurm_makes_it(root: Root) -> None:
    root.cgroup("5:memory:/slurm/uid_1000/job_7/step_0\n4:cpu,cpuacct:/slurm/uid_1000/job_7\n", V1_MEMORY + V1_CPU)
    job = "sys/fs/cgroup/memory/slurm/uid_1000/job_7"
    root.write(f"{job}/memory.limit_in_bytes", f"{256 * MB}\n")
    root.write(f"{job}/memory.usage_in_bytes", f"{200 * MB}\n")
    root.write(f"{job}/memory.stat", stat(total_inactive_file=150 * MB, inactive_file=1, total_dirty=30 * MB))
    root.write(f"{job}/step_0/memory.limit_in_bytes", "9223372036854771712\n")
    root.write(f"{job}/step_0/memory.usage_in_bytes", f"{200 * MB}\n")
    assert resources.memory(root.path) == Memory(available=176 * MB, total=256 * MB)
    root.write("sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_quota_us", "100000\n")
    root.write("sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_period_us", "100000\n")
    assert resources.usable_cpus({}, root.path) == 1


def test_hybrid_the_controllers_own_hierarchy_counts(root: Root) -> None:
    root.cgroup("4:memory:/a\n0::/b\n", V1_MEMORY + UNIFIED)
    root.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{64 * MB}\n")
    root.write("sys/fs/cgroup/memory/a/memory.usage_in_bytes", f"{60 * MB}\n")
    root.write("sys/fs/cgroup/unified/b/cgroup.procs", "")
    assert resources.memory(root.path) == Memory(available=4 * MB, total=64 * MB)


def test_a_container_sees_its_own_part_of_the_mount(root: Root) -> None:
    root.cgroup("0::/../../docker/abc\n", V2)
    root.write("sys/fs/cgroup/memory.max", f"{100 * MB}\n")
    root.write("sys/fs/cgroup/memory.current", f"{40 * MB}\n")
    root.write("sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert resources.memory(root.path) == Memory(available=60 * MB, total=100 * MB)
    assert resources.usable_cpus({}, root.path) == min(2, len(os.sched_getaffinity(0)))


def test_without_limits_the_host_counts(root: Root) -> None:
    root.cgroup("0::/\n", V2)
    assert resources.memory(root.path).total == psutil.virtual_memory().total
    assert resources.usable_cpus({}, root.path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environ", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"NSLOTS": "1"}, 1),
        ({"NCPUS": "x"}, None),
        ({"SLURM_CPUS_ON_NODE": "999"}, None),
    ],
)
def test_batch_variables(root: Root, environ: dict[str, str], cpus: int | None) -> None:
    assert resources.usable_cpus(environ, root.path) == (cpus or len(os.sched_getaffinity(0)))


def test_workers_that_fit() -> None:
    assert resources.workers_that_fit(16, Memory(available=64 << 30, total=64 << 30)) == 16
    assert 1 <= resources.workers_that_fit(16, Memory(available=230 * MB, total=256 * MB)) <= 4
    assert resources.workers_that_fit(16, Memory(available=0, total=256 * MB)) == 1


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stat:
        f_frsize, f_blocks, f_bavail, f_files, f_favail = 4096, 1000, 100, 50, 40

    monkeypatch.setattr(os, "statvfs", lambda _: Stat)
    fits = resources.room(tmp_path / "not" / "there", content_bytes=200_000, files=40)
    assert fits.fault is None
    assert (fits.bytes_free, fits.files_free) == (409_600, 40)
    assert "needs about" in str(resources.room(tmp_path, content_bytes=409_600, files=1).fault)
    assert "inodes" in str(resources.room(tmp_path, content_bytes=1, files=41).fault)
    Stat.f_files = Stat.f_favail = 0
    assert resources.room(tmp_path, content_bytes=1, files=41).fault is None


@pytest.mark.root
def test_a_real_cgroup() -> None:
    """A group made here limits a process started in it."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cgroup.controllers")
    if os.geteuid() or not (v1.is_dir() or v2.exists()):
        pytest.skip("needs root and a cgroup hierarchy with memory control")
    own = next(iter(resources.cgroups(Path("/"), "memory")))
    group = (v1 if v1.is_dir() else own.parent) / f"imagenet_unpack-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        name = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        (group / name).write_text(str(300 * MB))
        code = "from imagenet_unpack.host import resources; m = resources.memory(); print(m.available, m.total)"
        command = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
        out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()
        assert int(out[1]) == 300 * MB
        assert 100 * MB < int(out[0]) < 300 * MB
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("files", "available", "expected"), [(0, 0, None), (10**9, 0, None), (1000, 0, 0), (1000, 17, 17), (10**9, 5, 5)]
)
def test_free_files(files: int, available: int, expected: int | None) -> None:
    stat = os.statvfs_result((4096, 4096, 100, 50, 50, files, available, available, 0, 255))
    assert resources.free_files(stat) == expected
