"""Whether class folders hold exactly the images that a manifest lists, as fast as folders can be listed.

Run as a script, this is a worker of `quick`. It imports little of the standard library and nothing of this package,
so that a worker is ready 20 ms after it was started:

    python -I -S lister.py ROOT MANIFEST < SPANS > RESULTS

SPANS is a file of `SPAN` records, start and end of a byte range of the manifest that splits no class folder. All
workers have it open through one file description, so each read takes the next one, under a lock: read(2) does not move
the position of a file without a name (memfd_create(2)) atomically. RESULTS is one pipe for all: a
line for each class folder (start of the span, class index, images, folder), and a line with the start alone when the
whole span agrees. Of a span that does not agree, or cannot be compared, there is no such line.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from fcntl import LOCK_EX, LOCK_UN, lockf
from stat import S_ISDIR
from struct import calcsize, unpack

TYPE_CHECKING = False  # typing takes longer to import than everything else here
if TYPE_CHECKING:
    from collections.abc import Iterator

SPAN = "<qq"
_PIPE_BUF = 4096  # what write(2) puts into a pipe in one piece (pipe(7))

Class = tuple[bytes, int, int]
"""Class folder, class index, images."""


def agreeing(root: bytes, manifest: bytes, start: int, end: int) -> list[Class] | None:
    """Return the classes that a range of a manifest lists, or None where they are not exactly what is below `root`.

    Args:
        root: folder of the split.
        manifest: a manifest that is known, or will be known, to be as it was written: its rows are not parsed.
        start: where the first row of a class begins in it.
        end: where the last row of a class ends.

    Raises:
        OSError: a folder or the manifest cannot be read.
        ValueError: these are not rows of a manifest.
    """
    classes = []
    for folder, index, names in _name_groups(manifest, start, end):
        if not _holds_exactly(root + b"/" + folder, names):
            return None
        classes.append((folder, index, len(names)))
    return classes


def _name_groups(manifest: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, list[bytes]]]:
    """Yield class folder, class index and file names of each class."""
    with open(manifest, "rb", buffering=0) as file:
        file.seek(start)
        lines = file.read(end - start)[:-1].split(b"\n")
    at = 0
    while at < len(lines):
        first = lines[at]
        path_end = first.index(b"\t")
        cut = first.rindex(b"/", 0, path_end) + 1
        stop = bisect_left(lines, first[: cut - 1] + b"0", at)  # 0 sorts next behind /
        if stop <= at:
            raise ValueError
        names = [line[cut : line.index(b"\t", cut)] for line in lines[at:stop]]
        index = int(first[path_end + 1 : first.index(b"\t", path_end + 1)])
        yield first[:cut].split(b"/")[1], index, names
        at = stop


def _holds_exactly(folder: bytes, names: list[bytes]) -> bool:
    """Say whether a folder holds regular files of these names and nothing else."""
    if not S_ISDIR(os.lstat(folder).st_mode):  # a link to a folder is not a folder of this tree
        return False
    with os.scandir(folder) as entries:
        found = [entry.name if entry.is_file(follow_symlinks=False) else b"" for entry in entries]
    return len(found) == len(names) and set(names).issuperset(found)


def _next_span() -> tuple[int, int] | None:
    size = calcsize(SPAN)
    lockf(0, LOCK_EX)
    record = os.read(0, size)
    lockf(0, LOCK_UN)
    if len(record) != size:
        return None
    start, end = unpack(SPAN, record)
    return start, end


def _work(root: bytes, manifest: bytes) -> None:
    while (span := _next_span()) is not None:
        start, end = span
        try:
            classes = agreeing(root, manifest, start, end)
        except (OSError, ValueError):
            continue
        if classes is None:
            continue
        lines = [b"%d\t%d\t%d\t%s\n" % (start, index, images, folder) for folder, index, images in classes]
        piece = b""
        for line in [*lines, b"%d\n" % start]:
            if len(piece) + len(line) > _PIPE_BUF:
                os.write(1, piece)
                piece = b""
            piece += line
        os.write(1, piece)


if __name__ == "__main__":
    _work(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]))
