"""Rows of path, class index, wnid, bytes and digest: one a line, tab-separated, sorted by path, below one header.

Rows stay bytes wherever possible: a train manifest has 1.28 million of them (96 MB). A tab sorts before every
character that a name may hold, so rows sorted as bytes are sorted by path, and the rows of a class folder stand
together.
"""

from __future__ import annotations

import heapq
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import xxhash

from imagenet_unpack.errors import CheckError
from imagenet_unpack.model import SplitName

HEADER = b"path\tclass_index\twnid\tbytes\txxh3_64\n"
_ROW = re.compile(rb"([^/\t\n]+/[^/\t\n]+/[^/\t\n]+)\t([0-9]{1,9})\t(n[0-9]{8})\t([0-9]{1,18})\t([0-9a-f]{16})\n?")
_LOOK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image: its path relative to the target, its class, its size and the xxh3-64 digest of its bytes."""

    path: str
    class_index: int
    wnid: str
    size_bytes: int
    digest: int


def manifest_name(split: SplitName) -> str:
    """Name of a split's manifest in the target."""
    return f"{split}.manifest.tsv"


def row(path: str, class_index: int, wnid: str, size_bytes: int, digest: int) -> bytes:
    """Return one line; called once an image, so it trusts what it is given."""
    return f"{path}\t{class_index}\t{wnid}\t{size_bytes}\t{digest:016x}\n".encode()


def parse_row(line: bytes) -> Row:
    """Read one line, with its newline or without.

    Raises:
        CheckError: the line is no row of a manifest.
    """
    match = _ROW.fullmatch(line)
    if match is None:
        raise CheckError(f"this is no row of a manifest: {_shown(line)}")
    path, class_index, wnid, size_bytes, digest = match.groups()
    try:
        text = path.decode()
    except UnicodeDecodeError as error:
        raise CheckError(f"this row of a manifest is not UTF-8: {_shown(line)}") from error
    return Row(
        path=text, class_index=int(class_index), wnid=wnid.decode(), size_bytes=int(size_bytes), digest=int(digest, 16)
    )


def rows(path: Path) -> Iterator[bytes]:
    """Yield the lines of a manifest below its header.

    Raises:
        CheckError: the header is not a manifest's.
    """
    with open(path, "rb") as file:
        if file.readline(len(HEADER)) != HEADER:
            raise CheckError(_bad_header(path))
        yield from file


def part_streams(parts: Iterable[Path]) -> list[Iterator[bytes]]:
    """Chain manifest parts (sorted, without a header) into as few sorted streams as possible, for `merge`.

    Parts of train do not overlap, so a thousand of them become one stream with one open file, and a plain copy.
    """
    spans = []
    for path in parts:
        data = path.read_bytes()
        if data:
            spans.append((data[: data.find(b"\n") + 1], data[data.rfind(b"\n", 0, -1) + 1 :], path))
    chains: list[tuple[bytes, list[Path]]] = []
    for first, last, path in sorted(spans):
        for number, (end, paths) in enumerate(chains):
            if end < first:
                chains[number] = (last, [*paths, path])
                break
        else:
            chains.append((last, [path]))
    return [_lines(paths) for _, paths in chains]


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            yield from file


def merge(target: BinaryIO, streams: Iterable[Iterable[bytes]]) -> None:
    """Write one manifest from sorted streams of rows: of parts (`part_streams`) and of an older manifest (`rows`)."""
    target.write(HEADER)
    target.writelines(heapq.merge(*streams))
