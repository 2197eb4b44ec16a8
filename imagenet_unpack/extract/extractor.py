"""One shard from its reader to a sink.

A shard is read front to back and its members are stored as they come, so memory does not grow with the shard or with
the largest image. The manifest fragment is written last, by a rename: where it exists, every file of the shard has
been written (which is not yet: is on the disk).
"""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.sink import Copy, LeftoverError, Pace, Sink, Unpaced
from imagenet_unpack.model import ClassRef, Shard, ShardDone
from imagenet_unpack.sources.imagerun import ImageReader
from imagenet_unpack.sources.parquet import ParquetReader
from imagenet_unpack.sources.reader import Reader, ReadPace
from imagenet_unpack.sources.stream import InMemoryReader
from imagenet_unpack.sources.tar import TarReader
from imagenet_unpack.sources.zip import ZipReader
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.durable import Disk


def open_reader(shard: Shard, pace: ReadPace) -> Reader:
    """Return the reader of the shard's format, yet to be entered."""
    readers: dict[str, Callable[[Shard, ReadPace], Reader]] = {
        "tar": TarReader,
        "zip": ZipReader,
        "parquet": ParquetReader,
        "image": ImageReader,
        "memory": InMemoryReader,
    }
    return readers[shard.format](shard, pace)


def extract_shard(shard: Shard, sink: Sink, fragment: Path, *, pace: Pace, disk: Disk | None = None) -> ShardDone:
    """Store the members of `shard` in `sink` and then write its manifest fragment; safe to repeat from any state.

    Args:
        shard: what to extract.
        sink: where its members go.
        fragment: where the shard's manifest rows go.
        pace: is asked before each window is read.
        disk: writes the fragment; synced at once only where files have to be synced one by one.

    Raises:
        ArchiveError: the archive is at fault (`SourceError`: reading it is).
        OSError: the target is at fault (EEXIST: another run writes the same files).
    """
    fragment.unlink(missing_ok=True)
    with sink:
        sink.prepare(shard)
        with open_reader(shard, pace) as reader:
            rows, size_bytes = _store(shard, reader, sink)
            found = reader.finish()
        sink.finish()
    rows.sort()
    notes = tuple(f"{shard.id}: {each}" for each in (*found, _odd_names(shard, rows)) if each)
    disk = disk or Disk()
    disk.write_file(fragment, b"".join(rows), sync=disk.sync_each_file)
    return ShardDone(shard=shard.id, split=shard.split, images=len(rows), size_bytes=size_bytes, notes=notes)


def remove_leftovers(shard: Shard, sink: Sink, fragment: Path) -> None:
    """Remove what earlier attempts at a shard left, without starting it; errors as in `extract_shard`."""
    fragment.unlink(missing_ok=True)
    with sink:
        sink.prepare(shard)
        with open_reader(shard, Unpaced()) as reader:
            sink.remove(shard, reader.names())


def manifest_rows(shard: Shard) -> list[bytes]:
    """Return the manifest rows of a shard without storing anything."""
    with open_reader(shard, Unpaced()) as reader:
        return _store_once(shard, reader, _Nowhere())[0]


class _Nowhere:
    """A sink that stores nothing; all that is wanted of it are digests."""

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def prepare(self, shard: Shard) -> None:
        pass

    def remove(self, shard: Shard, names: Iterable[tuple[int, str]] | None) -> None:
        pass

    def add(self, ref: ClassRef, name: str, size_bytes: int, mtime_s: float, copy: Copy) -> int:
        return copy(-1, lambda _fd, _view: None)

    def finish(self) -> None:
        pass


def read_fragment(shard: Shard, fragment: Path) -> ShardDone | None:
    """Return what a manifest fragment says of its shard, or None where there is none."""
    try:
        lines = fragment.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    size_bytes = sum(manifest.parse_row(line).size_bytes for line in lines)
    return ShardDone(shard=shard.id, split=shard.split, images=len(lines), size_bytes=size_bytes)


def _store(shard: Shard, reader: Reader, sink: Sink) -> tuple[list[bytes], int]:
    """Store all members, over what an earlier attempt left if there is anything; return rows and sum of the sizes.

    Where names are known beforehand, nothing is removed until one of them is met: on a fresh tree none is.
    """
    if reader.names() is None:
        sink.remove(shard, None)
    else:
        try:
            return _store_once(shard, reader, sink)
        except LeftoverError:
            sink.remove(shard, reader.names())
    try:
        return _store_once(shard, reader, sink)
    except LeftoverError as error:  # removed a moment ago, and there again
        raise OSError(errno.EEXIST, "another run works on the same target", str(error)) from None


def _store_once(shard: Shard, reader: Reader, sink: Sink) -> tuple[list[bytes], int]:
    placed = [(ref, f"{shard.split}/{ref.folder}/" if ref.folder else f"{shard.split}/") for ref in shard.classes]
    add, copy, row = sink.add, reader.copy, manifest.row
    rows: list[bytes] = []
    total_bytes = 0
    prefix = name = ""
    try:
        for position, name, size_bytes, mtime_s in reader.members():
            ref, prefix = placed[position]
            digest = add(ref, name, size_bytes, mtime_s, copy)
            rows.append(row(prefix + name, ref.index, ref.wnid, size_bytes, digest))
            total_bytes += size_bytes
    except LeftoverError:
        if _folded(prefix + name) in {_folded(row.partition(b"\t")[0].decode()) for row in rows}:
            raise ArchiveError(
                f"{shard.archive.path} ({shard.id}): member {name!r} appears twice, or differs from another one only "
                "in a way that the target's file system does not distinguish"
            ) from None
        raise
    return rows, total_bytes


def _folded(path: str) -> str:
    """Return what file systems that ignore case or the composition of letters may take for the same name."""
    return unicodedata.normalize("NFKC", path).casefold()


def _odd_names(shard: Shard, rows: list[bytes]) -> str:
    """Say which members do not look like images of their class, or nothing."""
    prefix = f"/{shard.classes[0].wnid}_".encode() if shard.split == "train" and len(shard.classes) == 1 else b"/"
    paths = (row.partition(b"\t")[0] for row in rows)
    odd = [path for path in paths if not path.endswith(b".JPEG") or prefix not in path]
    if not odd:
        return ""
    name = odd[0].rpartition(b"/")[2].decode()
    return f"{len(odd)} members do not look like images of their class, such as {name!r}: taken as they are"
