from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from factory import tar, val_name, write

from imagenet_unpack.sources.archive import ArchiveFile, opened
from imagenet_unpack.sources.members import Member, iter_members

STEP_BYTES = 100_000


class Clock:
    """Tells a later time at each call, as if every read took so long."""

    def __init__(self, read_s: float) -> None:
        self.read_s, self.now_s = read_s, 0.0

    def __call__(self) -> float:
        self.now_s += self.read_s / 2
        return self.now_s


@contextmanager
def archive_file(path: Path, read_s: float) -> Iterator[tuple[ArchiveFile, Path]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield ArchiveFile(path, fd, clock=Clock(read_s)), path
    finally:
        os.close(fd)


def reads(file: ArchiveFile, path: Path, steps: range) -> list[bytes]:
    """Read 8 bytes every so often, and let the file shrink to nothing after some: what is still read was buffered."""
    found = []
    for number in steps:
        if number == 30:
            os.truncate(path, 0)
        found.append(file(number * STEP_BYTES, 8))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a", b"".join(b"%08d" % number + bytes(STEP_BYTES - 8) for number in range(40)))


def test_headers_are_read_one_by_one_where_a_read_is_fast(path: Path) -> None:
    with archive_file(path, 10e-6) as (file, _):
        found = reads(file, path, range(40))
    assert found[:30] == [b"%08d" % number for number in range(30)]
    assert found[30:] == [b""] * 10


def test_large_reads_where_a_read_takes_longer_than_what_lies_between(path: Path) -> None:
    with archive_file(path, 16e-3) as (file, _):
        found = reads(file, path, range(40))
    assert found == [b"%08d" % number for number in range(40)]


def test_a_plan_reads_the_same_either_way(tmp_path: Path) -> None:
    entries = [(val_name(number), bytes(number * 700)) for number in range(1, 60)]
    path = write(tmp_path / "v.tar", tar(entries))
    for read_s in (1e-6, 1.0):
        with archive_file(path, read_s) as (file, _):
            found = [m for m in iter_members(file, 0, path.stat().st_size, "") if isinstance(m, Member)]
        assert [(m.name, m.size_bytes) for m in found] == [(name, len(body)) for name, body in entries]


def test_holes_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"x" * 4096)
    os.truncate(path, 1 << 30)
    with opened(path) as (stat, file):
        assert file.next_data(0) == 0
        assert file.next_data(1 << 20) == stat.st_size
