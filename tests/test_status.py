from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from imagenet_unpack.host.status import Monitor, Progress, StatusFile


class Told:
    """What a monitor tells."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.images = 0
        self.reasons: list[str | None] = []

    def advance(self, size_bytes: int, images: int) -> None:
        self.size_bytes += size_bytes
        self.images += images


def monitored() -> tuple[StatusFile, Monitor, Told]:
    file, told = StatusFile.create(), Told()
    return file, Monitor(file, told.advance, told.reasons.append), told


def test_what_a_worker_writes_is_read_by_slot() -> None:
    file = StatusFile.create()
    worker = StatusFile.open(file.path)
    for slot in (0, 7, 20_000):
        worker.write(slot, Progress(size_bytes=slot + 1, images=2, waiting="free memory: é" * 20))
    assert file.read(20_000).size_bytes == 20_001
    assert file.read(7).images == 2
    assert file.read(7).waiting.startswith("free memory: é")
    assert file.read(8) == Progress()
    assert file.read(30_000) == Progress()
    worker.close()
    file.close()


def test_it_is_found_by_another_process_and_leaves_no_file() -> None:
    before = set(os.listdir("/dev/shm"))
    file = StatusFile.create()
    code = (
        "import sys; from imagenet_unpack.host.status import Progress, StatusFile\n"
        "StatusFile.open(sys.argv[1]).write(3, Progress(size_bytes=5, images=1))"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, file.path], check=True, env=environ)
    assert file.read(3) == Progress(size_bytes=5, images=1)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "imagenet_unpack" in name} == set()
    file.close()


def test_a_path_that_leads_to_another_file_is_not_opened(tmp_path: Path) -> None:
    """In another process namespace the same path is a file of somebody else."""
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    fd = os.open(other, os.O_RDWR)
    worker = StatusFile.open(f"/proc/{os.getpid()}/fd/{fd}:imagenet_unpack-0123456789abcdef")
    worker.write(0, Progress(size_bytes=1, images=1))
    os.close(fd)
    assert other.read_bytes() == b"kept"
    for path in ("", "/proc/1/fd/999:imagenet_unpack-0", "nonsense"):
        assert StatusFile.open(path).read(0) == Progress()


def test_the_monitor_tells_what_has_changed_since() -> None:
    file, monitor, told = monitored()
    monitor.begin(0)
    monitor.begin(1)
    monitor.look()
    assert (told.size_bytes, told.images) == (0, 0)
    file.write(0, Progress(size_bytes=100, images=2))
    file.write(1, Progress(size_bytes=10, images=1))
    file.write(2, Progress(size_bytes=1000, images=9))  # not handed out
    monitor.look()
    file.write(0, Progress(size_bytes=150, images=3))
    monitor.look()
    assert (told.size_bytes, told.images) == (160, 4)
    assert monitor.end(0) == Progress(size_bytes=150, images=3)
    assert monitor.end(0) == Progress()
    monitor.look()
    assert (told.size_bytes, told.images) == (160, 4)


def test_a_shard_that_begins_again_is_taken_back() -> None:
    file, monitor, told = monitored()
    monitor.begin(0)
    file.write(0, Progress(size_bytes=100, images=5))
    monitor.look()
    file.write(0, Progress(size_bytes=20, images=1))
    monitor.look()
    assert (told.size_bytes, told.images) == (20, 1)


def test_waiting_is_told_only_when_all_at_work_wait() -> None:
    file, monitor, told = monitored()
    for slot in range(3):
        monitor.begin(slot)
    file.write(0, Progress(size_bytes=1, images=1, waiting="free space"))
    file.write(1, Progress(size_bytes=1, images=1))
    monitor.look()
    assert told.reasons == []
    file.write(1, Progress(size_bytes=1, images=1, waiting="free space"))  # slot 2 has not begun
    monitor.look()
    monitor.look()
    assert told.reasons == ["free space"]
    file.write(0, Progress(size_bytes=2, images=1))
    monitor.look()
    assert told.reasons == ["free space", None]


def test_the_thread_ends_with_the_block() -> None:
    _, monitor, told = monitored()
    with monitor.running():
        monitor.begin(0)
    assert told.size_bytes == 0
