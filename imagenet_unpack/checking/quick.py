"""Compare the names of a published tree with its manifest by light worker processes.

A pool of the package's own workers is ready after a time in which one of these has listed a million files.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from imagenet_unpack.checking import lister

_END_S = 2.0

Span = tuple[int, int]
Agreeing = Iterator[tuple[Span, list[lister.Class]]]
"""Each byte range of the manifest whose class folders hold exactly what it lists, with those classes."""


@contextmanager
def listing(root: Path, manifest: Path, spans: list[Span], workers: int) -> Iterator[Agreeing]:
    """Begin to compare class folders with byte ranges of a manifest; the iterator waits for the results.

    What it does not yield differs, or could not be compared: of that the caller finds out more. Workers that cannot be
    started, or die, leave their share to it likewise.

    Args:
        root: folder of the split.
        manifest: what `root` is compared with, believed to be as it was written.
        spans: as `targets.manifest.class_ranges` returns them.
        workers: processes to share the work; 1: this process does it, as the results are asked for.
    """
    arguments = (os.fsencode(root), os.fsencode(manifest))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with ExitStack() as stack:
            agreeing = None
            if workers > 1:
                with suppress(OSError):
                    lines = stack.enter_context(_start(arguments, spans, min(workers, len(spans)), processes))
                    agreeing = _collect(lines, dict(spans)) if processes else None
            yield agreeing or _here(*arguments, spans)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # a file system that hangs can hold it
                process.wait(_END_S)


def _start(
    arguments: tuple[bytes, bytes], spans: list[Span], workers: int, processes: list[subprocess.Popen[bytes]]
) -> BinaryIO:
    """Start workers, as many as can be started, and return the pipe that all of them write to.

    Raises:
        OSError: there are no descriptors or no memory for it.
    """
    command: list[str | bytes] = [sys.executable or "", "-I", "-S", lister.__file__, *arguments]
    reading, writing = os.pipe()
    lines = open(reading, "rb")  # noqa: SIM115 - closed by the caller
    try:
        tasks = os.memfd_create("imagenet_unpack-spans", os.MFD_CLOEXEC)
        try:
            os.pwrite(tasks, b"".join(struct.pack(lister.SPAN, *span) for span in spans), 0)
            with suppress(OSError):
                for _ in range(workers):
                    process = subprocess.Popen(command, stdin=tasks, stdout=writing, stderr=subprocess.DEVNULL)
                    processes.append(process)
        finally:
            os.close(tasks)
    except OSError:
        lines.close()
        raise
    finally:
        os.close(writing)
    return lines


def _here(root: bytes, manifest: bytes, spans: list[Span]) -> Agreeing:
    for start, end in spans:
        with suppress(OSError, ValueError):
            classes = lister.agreeing(root, manifest, start, end)
            if classes is not None:
                yield (start, end), classes


def _collect(lines: Iterable[bytes], ends: dict[int, int]) -> Agreeing:
    """Put together what the workers write, each in its own time."""
    begun: dict[int, list[lister.Class]] = {}
    for line in lines:
        number, _, rest = line[:-1].partition(b"\t")
        start = int(number)
        if rest:
            index, images, folder = rest.split(b"\t", 2)
            begun.setdefault(start, []).append((folder, int(index), int(images)))
        else:
            yield (start, ends[start]), begun.pop(start, [])
