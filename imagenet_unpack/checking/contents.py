"""Whether every image begins and ends as an image does; reads a few kilobytes of each.

A JPEG begins with SOI (`ff d8 ff`) and ends with EOI (`ff d9`): ITU-T T.81, annex B. A few bytes behind EOI are no
fault: decoders ignore them. A PNG begins with its signature and ends with IEND
(https://www.w3.org/TR/png-3/#5PNG-file-signature).
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import reason
from imagenet_unpack.host import pool
from imagenet_unpack.model import Problem, SplitCheck
from imagenet_unpack.reporter import Reporter

_READ_BYTES = 4096
_INLINE_FOLDERS = 20
_SEGMENTS = 1000
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xae\x42\x60\x82"
# First bytes of what is found under the name of an image (the magic numbers of file(1)).
_OTHERS = {
    _PNG: "a PNG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"\x1f\x8b": "compressed with gzip",
    b"<": "text, such as a web page",
    bytes(64): "zeros",
}
_SHOWN = 3


@dataclass(slots=True)
class _Found:
    images: int = 0
    problems: list[Problem] = field(default_factory=list)
    pngs: list[str] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)


def check_contents(
    target: Path, checks: Iterable[SplitCheck], *, workers: int, reporter: Reporter
) -> tuple[SplitCheck, ...]:
    """Add to what a check found the images that are empty, truncated or none, and notes on the published oddities.

    Args:
        target: the folder that was checked.
        checks: what the check of its names found.
        workers: processes to share the work.
        reporter: shows the progress: a phase for each split.
    """
    return tuple(_with_contents(target, check, workers, reporter) for check in checks)


def _with_contents(target: Path, check: SplitCheck, workers: int, reporter: Reporter) -> SplitCheck:
    root = target / check.split
    if check.basis == "unfinished" or not root.is_dir():
        return check
    reporter.phase(f"reading {check.split}", None, check.images)
    folders = ["", *sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))]
    look = functools.partial(_check_folder, str(root), check.split)
    total = _Found()
    here = workers == 1 or len(folders) <= _INLINE_FOLDERS
    for found in map(look, folders) if here else pool.map_unordered(look, folders, workers, __name__):
        total.problems += found.problems
        total.pngs += found.pngs
        total.cmyk += found.cmyk
        reporter.advance(nbytes=0, images=found.images, shards=0)
    problems = sorted(
        [*check.problems, *total.problems], key=lambda each: (each.class_name, each.path or "", each.kind)
    )
    return replace(check, problems=tuple(problems), notes=(*check.notes, *_notes(total)))


def _notes(found: _Found) -> Iterator[str]:
    for name in found.pngs:
        yield f"{name} is a PNG: it is so in the published data set"
    if found.cmyk:
        others = sorted(set(found.cmyk) - ilsvrc2012.cmyk_images())
        text = f"{len(found.cmyk)} CMYK images: {len(found.cmyk) - len(others)} of the 22 in the published data set"
        if others:
            text += f", and {len(others)} more, such as {', '.join(others[:_SHOWN])}"
        yield f"{text}; decode with .convert('RGB')"


def _check_folder(root: str, split: str, folder: str) -> _Found:
    """Look at the images of one class folder, or ("") at those that lie in the split's folder itself."""
    result = _Found()
    where = f"{split}/{folder}".rstrip("/")
    try:
        fd = os.open(os.path.join(root, folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return result  # the check of the names says so
    try:
        for name in sorted(os.listdir(fd)):
            _check_image(fd, name, f"{where}/{os.fsencode(name).decode('utf-8', 'backslashreplace')}", folder, result)
    finally:
        os.close(fd)
    return result


def _check_image(folder_fd: int, name: str, path: str, class_name: str, result: _Found) -> None:
    try:
        # A FIFO must not make the open wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link: the check of the names says so
            result.problems.append(Problem(class_name=class_name, kind="unreadable", path=path, found=reason(error)))
        return
    try:
        stat = os.fstat(fd)
        if not S_ISREG(stat.st_mode):
            return
        result.images += 1
        fault = _fault_of(fd, stat.st_size, name, result)
    except OSError as error:
        fault = reason(error)
    finally:
        os.close(fd)
    if fault:
        result.problems.append(
            Problem(class_name=class_name, kind="unreadable", path=path, expected="a JPEG", found=fault)
        )


def _fault_of(fd: int, size: int, name: str, result: _Found) -> str:
    """Return what is wrong with an image, or ""; note what is odd about it."""
    head = os.pread(fd, _READ_BYTES, 0)
    tail = head if size <= _READ_BYTES else os.pread(fd, _READ_BYTES, size - _READ_BYTES)
    if not size:
        return "an empty file"
    if head.startswith(b"\xff\xd8\xff"):
        if b"\xff\xd9" not in tail:
            return "a truncated JPEG"
        if _components(fd, head) == 4:
            result.cmyk.append(name)
        return ""
    if head.startswith(_PNG) and name == ilsvrc2012.PNG_IMAGE and _PNG_END in tail:
        result.pngs.append(name)
        return ""
    what = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), "no image")
    return f"{what}, truncated" if what == "a PNG" and _PNG_END not in tail else what


def _components(fd: int, head: bytes) -> int:
    """Return the number of colour components that a JPEG's frame header states, or 0 where it is not found."""
    offset = 2
    for _ in range(_SEGMENTS):
        segment = head[offset : offset + 10]
        if len(segment) < 10:
            segment = os.pread(fd, 10, offset)
        if len(segment) < 10 or segment[0] != 0xFF:
            return 0
        marker = segment[1]
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0 to SOF15
            return segment[9]
        elif marker == 0xDA:
            return 0
        else:
            offset += 2 + int.from_bytes(segment[2:4], "big")
    return 0
