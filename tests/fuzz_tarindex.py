"""Fuzz the header parser and the planner with atheris: python tests/fuzz_tarindex.py -max_total_time=3600 CORPUS

Whatever the bytes, reading ends with members or with an `ArchiveError`, asks for nothing absurd, and what it takes has
bare names and lies inside the archive without overlaps. (Against GNU tar: `tests/test_tarindex.py`.) Needs
`pip install atheris`; is no part of the test runs.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["imagenet_unpack"]):
    from imagenet_unpack.errors import ArchiveError
    from imagenet_unpack.sources.members import Member, iter_members
    from imagenet_unpack.sources.tarindex import plain_header


def repair(data: bytes) -> bytes:
    """Make every block's checksum right where it could be a header, or the fuzzer never gets past it."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        block = blocks[at : at + 512]
        if block[148:156] == b"CHECKSUM":
            block[148:156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(blocks)


def test_one(data: bytes) -> None:
    data = repair(data)

    def read_at(offset: int, size: int) -> bytes:
        assert offset >= 0
        assert 0 <= size <= 2 << 20
        return data[offset : offset + size]

    if len(data) >= 512:
        plain_header(data[:512])
    try:
        found = [entry for entry in iter_members(read_at, 0, len(data), "a.tar") if isinstance(entry, Member)]
    except ArchiveError:
        return
    for member in found:
        assert "/" not in member.name
        assert member.name not in ("", ".", "..")
        assert member.data_offset + member.size_bytes <= len(data)
    # No gap, no overlap: every byte up to the end is a header, a body or its padding.
    at = 0
    for member in found:
        assert at <= member.header_offset < member.data_offset
        assert (member.header_offset - at) % 512 == 0
        at = member.end


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
