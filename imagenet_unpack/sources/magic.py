"""What a file is that is not a tar, from its first bytes, as in file(1)."""

from __future__ import annotations

from imagenet_unpack.errors import ArchiveError

HEAD_BYTES = 512
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
"""Magic bytes of the compressions that a tar may come in, and their names."""
_SKIPPABLE = b"\x2a\x4d\x18"  # RFC 8878, 3.1.2; behind 0x50 to 0x5f

_MAGIC = {
    **{magic: f"compressed with {name}" for magic, name in COMPRESSED.items()},
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"PAR1": "a parquet file",
    b"PARE": "an encrypted parquet file",
    b"hsqs": "a squashfs image",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"\x89HDF\r\n": "an HDF5 file",
}


class ImageKinds:
    """Counts members that begin neither like a JPEG nor like a PNG image; ImageNet-21K has some."""

    def __init__(self) -> None:
        self._gzipped = self._others = 0

    def add(self, head: bytes) -> None:
        """Count a member that begins with `head`."""
        if compression(head) == "gzip":
            self._gzipped += 1
        elif not head.startswith((b"\xff\xd8", b"\x89PNG")):
            self._others += 1

    def notes(self) -> tuple[str, ...]:
        """Say how many there are."""
        kinds = ((self._gzipped, "compressed with gzip"), (self._others, "neither JPEG nor PNG"))
        return tuple(f"{count:,} members are {what}: taken as they are" for count, what in kinds if count)


def compression(head: bytes) -> str:
    """Return `gzip`, `zstd`, `xz` or `bzip2` for bytes that begin like it, else ""."""
    if head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50:  # a skippable frame, with which pzstd's files begin
        return "zstd"
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")


def describe(head: bytes) -> str:
    """Say what a file is whose first bytes these are (`HEAD_BYTES` of them, if it has that many), or ""."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<body")):
        return "a web page (HTML)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself with `git lfs pull`"
    # A character of several bytes may be cut off at the end.
    text = head.decode("utf-8", "ignore")
    if text and len(head) - len(text.encode()) <= 3 and all(char.isprintable() or char in "\t\r\n" for char in text):
        return "a text file"
    return ""


def refuse(head: bytes, archive: str) -> None:
    """Raise an error that says what a file is that is not a tar, as far as these first bytes show.

    Raises:
        ArchiveError: it is something else.
    """
    what = describe(head)
    if what:
        raise ArchiveError(f"{archive}: not an archive of ImageNet images, but {what}")
