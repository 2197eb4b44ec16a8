from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from factory import END, header
from hypothesis import given
from hypothesis import strategies as st

from imagenet_unpack.dataset.names import is_leftover
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.tarindex import BLOCK, EndOfArchive, plain_header

FORMATS = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}
NAME = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1)
names = NAME.filter(lambda name: name not in (".", "..") and len(name.encode()) <= 255 and not is_leftover(name))


def members(data: bytes) -> list[Member | EndOfArchive]:
    return list(iter_members(lambda offset, size: data[offset : offset + size], 0, len(data), "a.tar"))


def tar(entries: list[tuple[str, bytes]], tar_format: int, mtime: float = 1340000000) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, body in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(body), mtime
            archive.addfile(info, io.BytesIO(body))
    return out.getvalue()


def raw(name: bytes = b"a.JPEG", **fields: bytes) -> bytes:
    return header(name, **fields)


BODY = b"abc".ljust(BLOCK, b"\0")


@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6), st.sampled_from(["gnu", "pax"]))
def test_reads_what_tarfile_writes(entries: list[tuple[str, bytes]], tar_format: str) -> None:
    data = tar(entries, FORMATS[tar_format], mtime=1340000000.5 if tar_format == "pax" else 1340000000)
    *found, end = members(data)
    assert end == EndOfArchive()
    read = [(m.name, data[m.data_offset : m.data_offset + m.size_bytes]) for m in found if isinstance(m, Member)]
    assert read == entries


def test_ustar_and_v7_headers_are_read() -> None:
    assert [m.name for m in members(tar([("x.JPEG", b"1")], FORMATS["ustar"])) if isinstance(m, Member)] == ["x.JPEG"]
    old = members(raw(magic=b"", kind=b"\0") + BODY + END)
    assert isinstance(old[0], Member)
    assert (old[0].name, old[0].size_bytes) == ("a.JPEG", 3)


def test_plain_header_is_taken_fast_and_its_checksum_verified() -> None:
    assert plain_header(raw()) == ("a.JPEG", 3, 0)
    damaged = bytearray(raw())
    damaged[3] ^= 1
    assert plain_header(bytes(damaged)) is None


def test_base256_size_is_read() -> None:
    found = members(raw(size=b"\x80" + (3).to_bytes(11, "big")) + BODY + END)
    assert isinstance(found[0], Member)
    assert found[0].size_bytes == 3


def test_the_folder_dot_and_a_leading_dot_slash_are_dropped() -> None:
    data = raw(name=b"./", kind=b"5", size=b"00000000000\0") + raw(name=b"./a.JPEG") + BODY + END
    assert [m.name for m in members(data) if isinstance(m, Member)] == ["a.JPEG"]


@pytest.mark.parametrize(
    "name", [b"", b"..", b"../a", b"/etc/passwd", b"a/b/c", b"a\nb", b"a\tb", b"\xff\xfe", b"a\x7f", b"./../a", b"/a"]
)
def test_names_that_are_no_bare_file_names_are_refused(name: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"a\.tar"):
        members(raw(name=name) + BODY + END)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"M", b"V", b"Z"])
def test_members_that_are_no_regular_files_are_refused(kind: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"a\.JPEG"):
        members(raw(kind=kind) + BODY + END)


@pytest.mark.parametrize(
    "size",
    [b"-0000000003\0", b"0000000000x\0", b"1_0\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"0o3\0"],
)
def test_sizes_that_cannot_be_are_refused(size: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"a\.tar"):
        members(raw(size=size) + BODY + END)


def test_every_cut_is_found() -> None:
    data = tar([("a.JPEG", b"x" * 700), ("b.JPEG", b"y" * 10)], tarfile.GNU_FORMAT)
    content = 2 * BLOCK + 1024 + BLOCK
    for cut in range(1, content + 1):
        with pytest.raises(ArchiveError):
            members(data[:cut])
    assert members(data[: content + BLOCK])[-1] == EndOfArchive(
        note="it ends with one end-of-archive block instead of two"
    )
    assert members(data[: content + 2 * BLOCK])[-1] == EndOfArchive()


def test_trailing_garbage_is_found_and_padding_is_not() -> None:
    data = raw() + BODY + END
    assert members(data + bytes(8192))[-1] == EndOfArchive()
    with pytest.raises(ArchiveError, match="behind its end"):
        members(data + bytes(8191) + b"x")


def test_any_flipped_bit_of_a_header_is_found_or_harmless() -> None:
    data = raw() + BODY + END
    for bit in range(BLOCK * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = members(bytes(damaged))
        except ArchiveError:
            continue
        assert isinstance(found[0], Member)  # only bytes of the checksum field itself may change unseen
        assert (bit // 8 in range(148, 156), found[0].name, found[0].size_bytes) == (True, "a.JPEG", 3)


def test_gzip_is_called_by_its_name() -> None:
    with pytest.raises(ArchiveError, match="gzip"):
        members(b"\x1f\x8b" + bytes(2000))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"<html><body>log in</body></html>\n", "web page"),
        (b"\n <!DOCTYPE html>" + b"<p>x</p>" * 400, "web page"),
        (b"please log in", "text file"),
        ("ä".encode() * 400, "text file"),
        (b"PK\3\4" + bytes(2000), "zip"),
        (b"\xfd7zXZ\0" + bytes(2000), "xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "zstd"),
        (b"BZh91AY&SY" + bytes(2000), "bzip2"),
        (b"\xff\xd8\xff\xe0" + bytes(2000), "JPEG"),
    ],
)
def test_what_is_no_tar_is_called_by_its_name(head: bytes, words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        members(head)


def test_zeros_behind_the_end_are_told_and_holes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(raw() + BODY + END)
    os.truncate(path, 1 << 40)
    with opened(path) as (stat, read_at):
        *_, end = iter_members(read_at, 0, stat.st_size, "a.tar")
    assert isinstance(end, EndOfArchive)
    assert f"{(1 << 40) - 4 * BLOCK:,} bytes of zeros" in end.note
    with path.open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"x")
    with opened(path) as (stat, read_at), pytest.raises(ArchiveError, match="behind its end"):
        list(iter_members(read_at, 0, stat.st_size, "a.tar"))


def test_a_huge_extended_header_costs_no_memory() -> None:
    with pytest.raises(ArchiveError, match="claims"):
        members(raw(kind=b"x", size=b"77777777777\0") + BODY + END)


WHOLE = tar([("a.JPEG", b"x" * 700), ("ü" * 70, b"y"), ("c.JPEG", b"")], FORMATS["pax"])
WHOLE_GNU = tar([("a.JPEG", b"x" * 700), ("b" * 150, b"y"), ("c.JPEG", b"")], FORMATS["gnu"])


@given(
    st.sampled_from([WHOLE, WHOLE_GNU]),
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=12)), min_size=1, max_size=4),
    st.integers(0, len(WHOLE)),
)
def test_a_mutated_archive_is_read_as_gnu_tar_reads_it_or_refused(
    whole: bytes, changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(whole)
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    mutated = bytes(data[: max(cut, 512)])
    try:
        *found, _end = members(mutated)
    except ArchiveError:
        return
    listing = subprocess.run(["tar", "-tv"], input=mutated, capture_output=True, check=False)
    if listing.returncode == 0:  # it gives up on fields that nobody needs here, such as the mode
        sizes = [int(line.split()[2]) for line in listing.stdout.splitlines()]
        assert [entry.size_bytes for entry in found if isinstance(entry, Member)] == sizes


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, tar_format: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    bodies = {"a.JPEG": b"x" * 700, "b" * 97: b"", "ILSVRC2012_val_00000001.JPEG": b"z" * 3000}
    if tar_format not in ("v7", "ustar"):
        bodies["ü" * 80] = b"long"
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    path = tmp_path / "a.tar"
    for names in (["."], sorted(bodies)):
        subprocess.run(["tar", "-cf", path, f"--format={tar_format}", "-C", folder, *names], check=True)
        data = path.read_bytes()
        *found, end = members(data)
        assert end == EndOfArchive()
        read = {m.name: data[m.data_offset : m.data_offset + m.size_bytes] for m in found if isinstance(m, Member)}
        assert read == bodies


@given(st.binary(max_size=3000))
def test_noise_is_refused_in_order(data: bytes) -> None:
    with contextlib.suppress(ArchiveError):  # anything else would be a defect
        assert isinstance(members(data)[-1], EndOfArchive)
