from __future__ import annotations

import tarfile

import pytest
from factory import END, member, tar

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources.members import Member, Members, iter_members

FOLDER = b"5"


def read(data: bytes) -> tuple[list[str], Members]:
    rules = Members("a.tar")
    entries = iter_members(lambda offset, size: data[offset : offset + size], 0, len(data), "a.tar", rules)
    return [entry.name for entry in entries if isinstance(entry, Member)], rules


@pytest.mark.parametrize("folder", ["winter21_whole/", "./", "./val/", "@/"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_leading_folder_that_all_share_is_dropped(folder: str, tar_format: int) -> None:
    names, rules = read(tar([(f"{folder}a.JPEG", b"1"), (f"{folder}{'b' * 120}", b"2")], tar_format))
    assert names == ["a.JPEG", "b" * 120]
    assert rules.folder == folder.removeprefix("./")


def test_folder_headers_are_skipped() -> None:
    headers = [member(name, b"", FOLDER) for name in (b"./", b"train/", b"empty/")]
    names, _ = read(b"".join(headers) + member(b"train/a") + member(b"train/b") + END)
    assert names == ["a", "b"]


@pytest.mark.parametrize(
    "paths", [(b"a", b"x/b"), (b"x/a", b"b"), (b"x/a", b"y/b"), (b"x/y/a",), (b"/x/a",), (b"x/../a",), (b"../a",)]
)
def test_members_of_several_folders_are_refused(paths: tuple[bytes, ...]) -> None:
    with pytest.raises(ArchiveError, match=r"a\.tar: member .* is refused"):
        read(b"".join(map(member, paths)) + END)


def test_leftovers_are_left_out_and_counted() -> None:
    leftovers = [b"._a", b".DS_Store", b"Thumbs.db", b"@eaDir/a/b", b"__MACOSX/x", b"x/._a", b"./._b"]
    names, rules = read(b"".join(map(member, leftovers)) + member(b"a") + END)
    assert names == ["a"]
    assert rules.leftovers == len(leftovers)
    (note,) = rules.notes()
    assert str(len(leftovers)) in note
    assert "._a" in note


@pytest.mark.parametrize("path", ["a.JPEG", "x/a", "The.JPEG", "_a", "@a", ".hidden", "Thumbs.db.JPEG", "a._b"])
def test_what_only_resembles_a_leftover_is_taken(path: str) -> None:
    assert read(member(path.encode()) + END)[0] == [path.rpartition("/")[2]]


def test_a_link_is_refused_whatever_its_name() -> None:
    with pytest.raises(ArchiveError, match="symbolic link"):
        read(member(b"._a", b"", kind=b"2", link=b"/etc/passwd") + END)
