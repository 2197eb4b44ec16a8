"""The tree of an image: class folders, links and manifests, from the members that the archives hold.

Everything here is appended to one file: first the manifests, compressed, then the tables. The archives' bytes lie
before it and are not touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from imagenet_unpack.model import ClassRef, Layout, SplitName, folder_name
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.squashfs import BLOCK_SIZE, TableWriter, pack_block

DEVICE_BLOCK_BYTES = 4096

Placed = tuple[bytes, int, int, int, int | None]
"""Name, offset in the image, size, modification time in seconds, xxh3-64 digest or None."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """What an image holds of one split."""

    classes: int = 0
    images: int = 0
    size_bytes: int = 0


class ImageTree:
    """Writes the tree of an image; a context manager that owns two temporary files.

    Splits are begun and ended one after another, and the classes of a split are added sorted by folder name.

    Args:
        file: receives manifests and tables, from where it stands.
        start: where in the image that is.
        spool: folder for the temporary files.
        bare: there is one split, and its class folders are in the root.
        block_size: of data blocks.
    """

    def __init__(
        self, file: BinaryIO, start: int, spool: Path, *, bare: bool = False, block_size: int = BLOCK_SIZE
    ) -> None:
        self._out = _Appended(file, start)
        self._bare = bare
        self._block_size = block_size
        self._stack = ExitStack()
        inodes = self._stack.enter_context(tempfile.TemporaryFile(dir=spool))  # noqa: SIM115 - closed by __exit__
        listings = self._stack.enter_context(tempfile.TemporaryFile(dir=spool))  # noqa: SIM115 - closed by __exit__
        self._tables = TableWriter(inodes, listings, block_size=block_size)
        self._split: SplitName = "train"
        self._manifest = _Packed(self._out, block_size)
        self._mtime_s = 0
        self._folders: list[tuple[SplitName, ClassRef]] = []
        self._manifests: list[tuple[SplitName, _Packed, int]] = []
        self.figures: dict[SplitName, Figures] = {}

    def __enter__(self) -> ImageTree:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def begin_split(self, split: SplitName) -> None:
        """Begin a split and its manifest."""
        self._split, self._mtime_s = split, 0
        self.figures[split] = Figures()
        self._manifest = _Packed(self._out, self._block_size)
        self._manifest.write(manifest.HEADER)
        if not self._bare:
            self._tables.open_folder(split.encode())

    def add_class(self, ref: ClassRef, members: Iterable[Placed]) -> None:
        """Add a class folder; files of a class without a folder name are put into the split's folder itself.

        Args:
            ref: the class.
            members: its images, sorted by name.
        """
        files: list[tuple[bytes, int, int, int]] = []
        rows: list[bytes] = []
        prefix = f"{self._split}/{ref.folder}/" if ref.folder else f"{self._split}/"
        total = 0
        for name, offset, size, mtime_s, digest in members:
            files.append((name, offset, size, mtime_s))
            rows.append(manifest.row(prefix + name.decode(), ref.index, ref.wnid, size, digest))
            total += size
        self._manifest.write(b"".join(rows))
        if ref.folder:
            self._tables.open_folder(ref.folder.encode())
        self._tables.add_files(files)
        if ref.folder:
            self._tables.close_folder()
            self._folders.append((self._split, ref))
        self._mtime_s = max(self._mtime_s, max((file[3] for file in files), default=0))
        figures = self.figures[self._split]
        figures.classes += bool(ref.folder)  # test images lie in no class
        figures.images += len(files)
        figures.size_bytes += total

    def end_split(self) -> None:
        """End the split."""
        self._manifest.close()
        self._manifests.append((self._split, self._manifest, self._mtime_s))
        if not self._bare:
            self._tables.close_folder()

    def add_links(self, layout: Layout) -> None:
        """Add a folder `by-<layout>` with links to every class folder, by the names of another layout."""
        self._tables.open_folder(f"by-{layout}".encode())
        for split, _, mtime_s in self._manifests:
            refs = [ref for its_split, ref in self._folders if its_split == split]
            if not refs:
                continue
            if not self._bare:
                self._tables.open_folder(split.encode())
            up = "../" if self._bare else f"../../{split}/"
            for ref in refs:
                name = folder_name(ref.index, ref.wnid, layout)
                self._tables.add_link(name.encode(), f"{up}{ref.folder}".encode(), mtime_s)
            if not self._bare:
                self._tables.close_folder()
        self._tables.close_folder()

    def finish(self) -> tuple[bytes, int, str]:
        """Write the rest; return the superblock, the end in the image (of whole blocks) and a digest.

        The digest is the xxh3-64 of all bytes that were appended, in hex.
        """
        for split, packed, mtime_s in self._manifests:
            self._tables.add_packed_file(
                manifest.manifest_name(split).encode(), packed.start, packed.size_bytes, mtime_s, packed.stored
            )
        superblock, end = self._tables.finish(self._out, self._out.position)
        self._out.write(bytes(-end % DEVICE_BLOCK_BYTES))
        return superblock, self._out.position, self._out.digest.hexdigest()


class _Appended:
    """Counts and digests what is appended to a file."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self.position = start
        self.digest = xxhash.xxh3_64()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)


class _Packed:
    """A file that is stored in compressed blocks, one after another."""

    def __init__(self, out: _Appended, block_size: int) -> None:
        self._out = out
        self._block_size = block_size
        self._buffer = bytearray()
        self.start = out.position
        self.size_bytes = 0
        self.stored: list[int] = []

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.size_bytes += len(data)
        while len(self._buffer) >= self._block_size:
            self._pack(bytes(self._buffer[: self._block_size]))
            del self._buffer[: self._block_size]

    def close(self) -> None:
        if self._buffer:
            self._pack(bytes(self._buffer))
            self._buffer.clear()

    def _pack(self, content: bytes) -> None:
        data, word = pack_block(content)
        self._out.write(data)
        self.stored.append(word)
