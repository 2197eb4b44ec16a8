"""Label files as text: encodings, and what is given by mistake."""

from __future__ import annotations

import re
from pathlib import Path

from imagenet_unpack.errors import LabelError

# First bytes of files that are mistaken for label files (the magic numbers of file(1)).
_BINARY = {
    b"MATLAB": "a MATLAB file, such as the devkit's meta.mat, whose ILSVRC2012_IDs are another order of the classes",
    b"\x1f\x8b": "a gzip file: extract the label file from it first",
    b"PK\x03\x04": "a zip file: extract the label file from it first",
}
_SHELL_COMMAND = re.compile(r"#!|(?:\s*#[^\n]*\n|\s)*(?:mkdir|mv|cp|ln|cd|for|find|wget|curl) ")


def read_bytes(path: Path, remedy: str) -> bytes:
    """Return the contents of a label file.

    Raises:
        LabelError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabelError(f"{path}: cannot be read: {error.strerror}: {remedy}") from None


def decode(data: bytes, source: str, remedy: str) -> str:
    """Return the text of a label file, UTF-8 or UTF-16 with a byte order mark, with line feeds.

    Raises:
        LabelError: it is not text; the message names `source`.
    """
    for magic, what in _BINARY.items():
        if data.startswith(magic):
            raise LabelError(f"{source}: this is {what}: {remedy}")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise LabelError(f"{source}: this is not text in UTF-8 or UTF-16: {remedy}") from None


def is_shell_script(text: str) -> bool:
    """Say whether a text is a list of commands rather than of labels."""
    return _SHELL_COMMAND.match(text) is not None
