"""Where the images of official archives are while a run consumes these: in the archive, or known to be on the disk."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from imagenet_unpack.targets import journal
from imagenet_unpack.targets.paths import STATE_FOLDER, SplitPaths


class Place(NamedTuple):
    archive: str
    shard: str
    offset: int
    size_bytes: int
    digest: str


def places(base: Path) -> dict[str, Place]:
    """Return where each image of these archives lies, by its name; read by the standard library."""
    return {name: place for path in sorted(base.glob("ILSVRC2012_img_*.tar")) for name, place in _places(path)}


def _places(path: Path) -> Iterator[tuple[str, Place]]:
    data = path.read_bytes()
    with tarfile.open(path) as outer:
        for member in outer:
            if not member.name.endswith(".tar"):
                yield member.name, _place(data, path.name, "val-00000", member.offset_data, member.size)
                continue
            body = data[member.offset_data : member.offset_data + member.size]
            with tarfile.open(fileobj=io.BytesIO(body)) as inner:
                for each in inner:
                    at = member.offset_data + each.offset_data
                    yield each.name, _place(data, path.name, member.name.removesuffix(".tar"), at, each.size)


def _place(data: bytes, archive: str, shard: str, offset: int, size: int) -> Place:
    return Place(archive, shard, offset, size, _digest(data[offset : offset + size]))


def lost(images: dict[str, Place], base: Path, target: Path) -> list[str]:
    """Return the images that are neither in the archives nor journaled or published with all their bytes."""
    found: set[tuple[str, str]] = set()
    for split in ("train", "val"):
        paths = SplitPaths(target, split)
        known = journal.read(paths.home, paths.split) if paths.home.is_dir() else {}
        for path in paths.tree.glob("*/*"):
            if images[path.name].shard in known:
                found.add((path.name, _digest(path.read_bytes())))
        found |= {(path.name, _digest(path.read_bytes())) for path in (target / split).glob("*/*")}
    missing = []
    files = {name: os.open(base / name, os.O_RDONLY) for name in {place.archive for place in images.values()}}
    try:
        for name, place in images.items():
            there = _digest(os.pread(files[place.archive], place.size_bytes, place.offset)) == place.digest
            if not there and (name, place.digest) not in found:
                missing.append(name)
    finally:
        for fd in files.values():
            os.close(fd)
    return missing


def unfinished(target: Path) -> bool:
    return any(target.glob(f"{STATE_FOLDER}/*/plan.json"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data).hexdigest()
