from __future__ import annotations

import io
import os
import random
import zipfile

import pytest

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources.zipmember import PATCHED_NAME, MemberStream, find_patched

BODY = random.Random(0).randbytes(700_000) + bytes(2_000_000)


def archive(method: int, name: str = PATCHED_NAME.decode()) -> bytearray:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        made.writestr("LOC_val_solution.csv", b"x")
        made.writestr(name, BODY)
    return bytearray(out.getvalue())


def content(data: bytes | bytearray, piece: int = 100_000) -> bytes:
    found = find_patched(lambda offset, size: bytes(data[offset : offset + size]), len(data), "k.zip")
    assert found is not None
    entry, offset = found
    raw = io.FileIO(memfd(data))
    raw.seek(offset)
    with MemberStream(raw, entry, "k.zip") as stream:
        return b"".join(iter(lambda: stream.read(piece) or b"", b""))


def memfd(data: bytes | bytearray) -> int:
    fd = os.memfd_create("zip")
    os.write(fd, data)
    return fd


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("piece", [512, 100_000, 10_000_000])
def test_the_content_of_a_member(method: int, piece: int) -> None:
    assert content(archive(method), piece) == BODY


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_is_found(method: int) -> None:
    data = archive(method)
    for at in (5_000, 300_000, 690_000):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(ArchiveError, match="the zip is damaged"):
            content(damaged)


def test_sizes_that_are_not_true() -> None:
    data = archive(zipfile.ZIP_DEFLATED)
    at = data.rindex(b"PK\1\2")
    local = data.rindex(b"PK\3\4")
    for claimed in (10, len(BODY) - 1, len(BODY) + 1):
        data[at + 24 : at + 28] = data[local + 22 : local + 26] = claimed.to_bytes(4, "little")
        with pytest.raises(ArchiveError, match="than the directory states"):
            content(data)


def test_other_zips_do_not_hold_it() -> None:
    data = archive(zipfile.ZIP_STORED, "other.tar.gz")
    assert find_patched(lambda offset, size: bytes(data[offset : offset + size]), len(data), "k.zip") is None
