"""Class folders as they are on the disk, and how the names in them differ from those that are expected."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from imagenet_unpack.errors import reason
from imagenet_unpack.model import Problem, SplitName
from imagenet_unpack.text import counted

_READ_BYTES = 1 << 20


def list_files(folder: str, *, want_sizes: bool) -> tuple[dict[bytes, int], dict[bytes, str]]:
    """Return the size of each regular file by name (0 where sizes are not wanted), and what else there is.

    Raises:
        OSError: it cannot be read, or is no folder; a link to a folder is not a folder of this tree.
    """
    sizes: dict[bytes, int] = {}
    others: dict[bytes, str] = {}
    mode = os.lstat(folder).st_mode
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, "a symbolic link" if stat.S_ISLNK(mode) else "not a folder", folder)
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size if want_sizes else 0
            else:
                others[entry.name] = _kind_of(entry)
    return sizes, others


def _kind_of(entry: os.DirEntry[bytes]) -> str:
    return "a symbolic link" if entry.is_symlink() else "a folder" if entry.is_dir() else "not a regular file"


def differing_names(
    folder: str, path: str, expected: Iterable[bytes], found: Iterable[bytes], others: dict[bytes, str]
) -> Iterator[Problem]:
    """Yield what is missing in a folder, what is there beside what is expected, and what is no regular file."""
    expected, found = set(expected), set(found)
    for name in expected - found:
        yield Problem(class_name=folder, kind="missing", path=f"{path}/{os.fsdecode(name)}", found=others.get(name))
    for name in found - expected:
        yield Problem(class_name=folder, kind="extra", path=f"{path}/{shown(name)}")
    for name in others.keys() - expected:
        yield Problem(class_name=folder, kind="extra", path=f"{path}/{shown(name)}", found=others[name])


def digest_of(path: bytes) -> str:
    """Return the xxh3-64 of a file, in hex.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def shown(name: bytes) -> str:
    """Return a file name as it is shown; one that is not UTF-8 with its bytes escaped."""
    return name.decode("utf-8", "backslashreplace")


def unreadable(folder: str, path: str, error: OSError) -> Problem:
    """Make the problem of a file or folder that cannot be read."""
    return Problem(class_name=folder, kind="unreadable", path=path, found=reason(error))


def foreign(root: Path, split: SplitName, known: set[str]) -> Iterator[Problem]:
    """Yield what is in the split's folder beside the class folders; images that lie there directly as one."""
    try:
        with os.scandir(os.fsencode(root)) as entries:
            names = sorted(shown(entry.name) for entry in entries)
    except FileNotFoundError:
        yield Problem(class_name="", kind="missing", path=split)
        return
    except OSError as error:
        yield unreadable("", split, error)
        return
    images = sum(name.upper().endswith((".JPEG", ".JPG")) for name in names)
    if images:
        yield Problem(
            class_name="",
            kind="extra",
            path=split,
            expected="class folders",
            found=f"{counted(images, 'image')} directly in it",
        )
    for name in names:
        if name not in known and not name.upper().endswith((".JPEG", ".JPG")):
            yield Problem(class_name=name, kind="extra", path=f"{split}/{name}")
