"""The peers that are written in Python, one a process: `python loops.py NAME ARCHIVE TARGET WORKERS`.

They share no code with the package, so that they stay what they are while the package changes. All of them unpack the
train archive (a tar of a tar for each class) into TARGET/<wnid>/; TARGET is made.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WINDOW_BYTES = 8 << 20
BLOCK_BYTES = 512
RWF_DONTCACHE = 0x80  # Linux 6.14; the os module has no name for it yet


class Inner(NamedTuple):
    """An inner tar: where its bytes stand in the archive."""

    size: int
    offset: int
    wnid: str


def recipe(archive: str, target: str, workers: int) -> None:
    """Do what the usual unpack script does: the outer tar, then each inner tar, then delete it; one process."""
    del workers
    shutil.unpack_archive(archive, target)
    for inner in sorted(Path(target).glob("*.tar")):
        shutil.unpack_archive(inner, inner.with_suffix(""))
        inner.unlink()


def pool(archive: str, target: str, workers: int) -> None:
    """Let a process pool extract the inner tars with tarfile, straight from the archive."""
    with tarfile.open(archive, "r:") as outer:
        jobs = sorted((Inner(m.size, m.offset_data, m.name.removesuffix(".tar")) for m in outer), reverse=True)
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        processes.starmap(_extract_with_tarfile, [(archive, target, job) for job in jobs], chunksize=1)


def _extract_with_tarfile(archive: str, target: str, inner: Inner) -> None:
    folder = Path(target, inner.wnid)
    folder.mkdir()
    with open(archive, "rb") as raw:
        raw.seek(inner.offset)
        with tarfile.open(fileobj=raw, mode="r:") as tar:  # reads from here to the inner tar's own end
            for member in tar:
                body = tar.extractfile(member)
                if body is None:
                    raise ValueError(f"{member.name} is not a regular file")
                (folder / member.name).write_bytes(body.read())


def plain(archive: str, target: str, workers: int) -> None:
    """Read windows into one buffer and write the members from it: no digest, no check, no progress."""
    _run_loops(archive, target, workers, flags=0)


def plain_uncached(archive: str, target: str, workers: int) -> None:
    """Do as `plain`, with reads that leave no page cache behind."""
    _run_loops(archive, target, workers, flags=RWF_DONTCACHE)


def _run_loops(archive: str, target: str, workers: int, flags: int) -> None:
    fork = multiprocessing.get_context("fork")
    source = os.open(archive, os.O_RDONLY)
    jobs = _inner_tars(source)
    next_job = fork.Value("i", 0)

    def work() -> None:
        reader = _Reader(source, flags)
        while True:
            with next_job.get_lock():
                mine = next_job.value
                next_job.value += 1
            if mine >= len(jobs):
                return
            _extract_windows(reader, jobs[mine], target)

    processes = [fork.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)


class _Reader:
    """Fills one reused buffer from the archive, uncached where the kernel and file system can."""

    def __init__(self, source: int, flags: int) -> None:
        self.source = source
        self.flags = flags
        self.drop_behind = False
        self.window = memoryview(bytearray(WINDOW_BYTES))

    def fill(self, offset: int, length: int) -> None:
        done = 0
        while done < length:
            try:
                got = os.preadv(self.source, [self.window[done:length]], offset + done, self.flags)
            except OSError as error:
                if not self.flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.flags = 0
                self.drop_behind = True
                continue
            if not got:
                raise EOFError("the archive is cut off")
            done += got
        if self.drop_behind:
            os.posix_fadvise(self.source, offset, length, os.POSIX_FADV_DONTNEED)


def _extract_windows(reader: _Reader, inner: Inner, target: str) -> None:
    window = reader.window
    path = os.path.join(target, inner.wnid)
    os.mkdir(path)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    file, left = -1, 0  # the open file and the bytes it still lacks; members may go over several windows
    for start in range(0, inner.size, WINDOW_BYTES):
        length = min(WINDOW_BYTES, inner.size - start)
        reader.fill(inner.offset + start, length)
        at = 0
        while at < length:
            if file < 0:
                header = bytes(window[at : at + BLOCK_BYTES])
                if not header[0]:
                    os.close(folder)
                    return
                name, left = _parse(header)
                at += BLOCK_BYTES
                file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
            part = min(left, length - at)
            if os.write(file, window[at : at + part]) != part:
                raise OSError(errno.ENOSPC, "short write", name)
            at += _padded(part)
            left -= part
            if not left:
                os.close(file)
                file = -1
    raise EOFError(f"{inner.wnid} is cut off")


def _inner_tars(source: int) -> list[Inner]:
    """Read the outer headers; largest inner tar first, so that the tail is short."""
    jobs: list[Inner] = []
    offset = 0
    while (header := os.pread(source, BLOCK_BYTES, offset))[0]:
        name, size = _parse(header)
        jobs.append(Inner(size, offset + BLOCK_BYTES, name.removesuffix(b".tar").decode()))
        offset += BLOCK_BYTES + _padded(size)
    return sorted(jobs, reverse=True)


def _parse(header: bytes) -> tuple[bytes, int]:
    if header[156] not in b"0\0":
        raise ValueError("only plain regular-file headers are read here")
    return header[: header.index(0)], int(header[124:135], 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


LOOPS: dict[str, Callable[[str, str, int], None]] = {
    "recipe": recipe,
    "pool": pool,
    "plain": plain,
    "plain-uncached": plain_uncached,
}

if __name__ == "__main__":
    os.mkdir(sys.argv[3])
    LOOPS[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
