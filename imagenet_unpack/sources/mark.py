"""The mark of a tar of which `--consume` has freed bytes.

Holes read as zeros, and nothing tells zeros that were freed from an image that consists of zeros. So a tar is marked
before the first byte of it is freed: in 12 bytes of padding at the end of its first header, which every format of tar
leaves unused, and in the header's checksum, which goes with them. The tar stays valid, and copies of it have the mark.
"""

from __future__ import annotations

import re
from pathlib import Path

from imagenet_unpack.sources.tarindex import BLOCK

_MARK = b"IUP consumed"
_MARK_AT = BLOCK - len(_MARK)
_CHECKSUM = slice(148, 156)
_OCTAL = re.compile(rb"([ ]*)([0-7]+)([ \0]*)")


def is_marked(path: Path) -> bool:
    """Say whether a tar is marked; anything else is not."""
    try:
        with open(path, "rb") as file:
            return unmarked(file.read(BLOCK)) is not None
    except OSError:
        return False  # whoever reads it says so


def marked(block: bytes) -> bytes | None:
    """Return the first header of a tar with the mark, or None where it cannot be marked."""
    if len(block) != BLOCK or any(block[_MARK_AT:]):
        return None
    made = _with_tail(block, _MARK)
    return made if made is not None and unmarked(made) == block else None


def unmarked(block: bytes) -> bytes | None:
    """Return the first header of a tar as it was before it was marked, or None where it has no mark."""
    return _with_tail(block, bytes(len(_MARK))) if block[_MARK_AT:] == _MARK else None


def _with_tail(block: bytes, tail: bytes) -> bytes | None:
    """Put other bytes at the end of a header and change its checksum by as much, in the form that it has."""
    match = _OCTAL.fullmatch(block[_CHECKSUM])
    if match is None:
        return None
    pad, digits, rest = match.groups()
    total = int(digits, 8) + sum(tail) - sum(block[_MARK_AT:])
    number = (b"%o" % max(0, total)).rjust(len(pad + digits), b" " if pad else b"0") + rest
    return None if len(number) != 8 else block[:148] + number + block[156:_MARK_AT] + tail
