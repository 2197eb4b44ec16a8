"""Which entries of a tar are members that are taken, and under which names.

Taken is every regular file with a bare name. A leading `./` is dropped, and one leading folder that all members share;
folder headers are skipped. What macOS, Windows and NAS devices leave beside files is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from imagenet_unpack.dataset.names import is_leftover
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources.tarindex import EndOfArchive, Entry, ReadAt, iter_entries

_BAD_NAME = re.compile(r"[/\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_NAME_BYTES = 255
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a FIFO",
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
    b"V": "a volume label",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file that is taken; offsets and sizes as in `Entry`.

    Attributes:
        name: bare.
        folder: the folder before it in the archive, with a slash at its end, or "".
    """

    name: str
    folder: str
    header_offset: int
    data_offset: int
    size_bytes: int
    mtime_s: float
    end: int


def name_fault(name: str) -> str | None:
    """Say what keeps `name` from being a bare file name, or None.

    The rules: not empty, UTF-8, at most 255 bytes, no `/`, NUL or control character.
    """
    if name in ("", ".", ".."):
        return f"its name is {name!r}, which no file can have"
    if _BAD_NAME.search(name):
        return "its name holds a slash or a control character"
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        return f"its name is longer than {_MAX_NAME_BYTES} bytes"
    return None


class Members:
    """Takes or refuses the entries of one tar.

    Attributes:
        folder: the leading folder that the members so far share, with a slash at its end, or ""; None: none so far.
        leftovers: how many files were left out.
    """

    def __init__(self, archive: str) -> None:
        self.folder: str | None = None
        self.leftovers = 0
        self._first_leftover = ""
        self._archive = archive

    def take(self, entry: Entry) -> Member | None:
        """Return the member that an entry is, or None for a folder or a leftover.

        Raises:
            ArchiveError: it is neither a regular file nor a folder, or its name is refused.
        """
        path = entry.path
        while path.startswith("./"):
            path = path[2:]
        folder, slash, name = path.rpartition("/")
        if entry.kind == b"5" or (entry.kind == b"0" and path in ("", ".") and not entry.size_bytes):
            if entry.size_bytes or ".." in path.split("/"):
                raise self._refused(entry, "is a damaged folder header")
            return None
        if entry.kind not in (b"0", b"7"):  # 7: contiguous file, to be treated as a regular one (POSIX)
            kind = _KINDS.get(entry.kind, f"of the unknown type {entry.kind!r}")
            raise self._refused(entry, f"is {kind}: only files are taken")
        fault = name_fault(name) or (name_fault(folder) if slash else None)
        if any(map(is_leftover, path.split("/"))):
            self.leftovers += 1
            self._first_leftover = self._first_leftover or path
            return None
        if fault:
            raise self._refused(entry, f"is refused: {fault}")
        if self.folder is None:
            self.folder = folder + slash
        elif self.folder != folder + slash:
            raise self._refused(entry, f"is refused: it does not lie in {self.folder or './'!r} like those before it")
        return Member(
            name=name,
            folder=folder + slash,
            header_offset=entry.header_offset,
            data_offset=entry.data_offset,
            size_bytes=entry.size_bytes,
            mtime_s=entry.mtime_s,
            end=entry.end,
        )

    def notes(self) -> tuple[str, ...]:
        """Count what was left out, if anything was."""
        if not self.leftovers:
            return ()
        what = "file" if self.leftovers == 1 else "files"
        return (f"left out {self.leftovers:,} {what} of macOS, Windows or a NAS, such as {self._first_leftover!r}",)

    def _refused(self, entry: Entry, why: str) -> ArchiveError:
        return ArchiveError(f"{self._archive}: member {entry.path[:300]!r} at byte {entry.header_offset} {why}")


def iter_members(
    read_at: ReadAt, offset: int, end: int, archive: str, members: Members | None = None
) -> Iterator[Member | EndOfArchive]:
    """Yield every member of the tar in `[offset, end)`, then its `EndOfArchive`.

    Raises:
        ArchiveError: the tar is damaged or cut off, or an entry is refused.
    """
    members = members or Members(archive)
    for entry in iter_entries(read_at, offset, end, archive):
        if isinstance(entry, EndOfArchive):
            yield entry
        else:
            member = members.take(entry)
            if member is not None:
                yield member
