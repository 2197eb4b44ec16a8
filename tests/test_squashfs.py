"""The tables of an image: the writer against the independent reader, and against the tools that everybody has."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from shutil import which

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import paths, read_tree, write_image

from imagenet_unpack.sources.squashfs import Image
from imagenet_unpack.sources.squashfs_tables import ImageError
from imagenet_unpack.targets.squashfs import BLOCK_SIZE

BLOCK = BLOCK_SIZE
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {b"/"[0], 0} & set(name) and name not in (b".", b"..")
)
FOLDERS = st.dictionaries(NAMES, st.dictionaries(NAMES, st.binary(max_size=9000), max_size=30), max_size=6)


@given(folders=FOLDERS, links=st.dictionaries(NAMES.filter(lambda name: name != b"train"), NAMES, max_size=3))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[bytes, dict[bytes, bytes]], links: dict[bytes, bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "image"
    first = write_image(path, folders, links, block_size=4096)
    assert read_tree(path) == (paths(folders), links)
    assert write_image(path, folders, links, block_size=4096) == first


@pytest.mark.parametrize("block_size", [4096, BLOCK, 1 << 20])
def test_sizes_around_a_block(tmp_path: Path, block_size: int) -> None:
    sizes = [0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size]
    folders = {b"0": {b"%d" % size: random.Random(size).randbytes(size) for size in sizes}}
    write_image(tmp_path / "image", folders, block_size=block_size)
    assert read_tree(tmp_path / "image")[0] == paths(folders)


def large() -> dict[bytes, dict[bytes, bytes]]:
    """65,536 names in a folder, names of 255 bytes over many metadata blocks, and the sizes that are special."""
    return {
        b"many": {b"n01440764_%d.JPEG" % number: b"%d" % number for number in range(65_536)},
        b"long": {b"%0255d" % number: b"x" * (number % 3) for number in range(700)},
        b"sizes": {b"%d" % size: random.Random(size).randbytes(size) for size in (0, 4096, BLOCK, 9 * BLOCK + 1)},
    }


def test_a_large_folder_has_an_index_that_is_right(tmp_path: Path) -> None:
    write_image(tmp_path / "image", large())
    with Image(tmp_path / "image") as image:
        assert {folder.path[-1]: len(folder.files) for folder in image.walk() if len(folder.path) == 2} == {
            b"many": 65_536, b"long": 700, b"sizes": 4,
        }  # fmt: skip


def test_any_changed_byte_gives_a_finding_or_another_tree_but_no_crash(tmp_path: Path) -> None:
    folders = {b"0": {b"n0_%d.JPEG" % number: b"%d" % number for number in range(300)}, b"1": {b"a": b"b"}}
    content = write_image(tmp_path / "image", folders, {b"link": b"train/0"})
    chance = random.Random(0)
    places = [*range(96), *chance.sample(range(4096, len(content)), 1000)]
    found = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "image").write_bytes(damaged)
        try:
            read_tree(tmp_path / "image")
        except (ImageError, AssertionError):
            found += 1
    # Only a digest finds a changed body or time; the structure shows the rest.
    assert found > len(places) / 3


def test_inodes_of_all_kinds_cross_metadata_blocks(tmp_path: Path) -> None:
    folders = {b"%d" % number: {b"%d" % file: b"x" for file in range(number % 7)} for number in range(1500)}
    links = {b"link%d" % number: b"t" * (1 + number % 50) for number in range(1500)}
    write_image(tmp_path / "image", folders, links)
    assert read_tree(tmp_path / "image") == (paths(folders), links)


@pytest.mark.parametrize("left", [0, 1, 95, 96, 4096, 5000])
def test_a_cut_off_image_is_refused(tmp_path: Path, left: int) -> None:
    write_image(tmp_path / "image", {b"0": {b"a": b"b"}})
    os.truncate(tmp_path / "image", left if left < 5000 else (tmp_path / "image").stat().st_size - 4096)
    with pytest.raises(ImageError):
        read_tree(tmp_path / "image")


@pytest.mark.skipif(which("unsquashfs") is None, reason="unsquashfs (squashfs-tools) is not installed")
def test_unsquashfs_extracts_the_same_bytes(tmp_path: Path) -> None:
    folders = large() | {b"many": {b"n01440764_%d.JPEG" % number: b"%d" % number for number in range(3000)}}
    write_image(tmp_path / "image", folders, {b"link": b"train/sizes"})
    command = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(tmp_path / "tree"), str(tmp_path / "image")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {os.fsencode(path.relative_to(tmp_path / "tree")): path for path in (tmp_path / "tree").rglob("*/*/*")}
    assert {name: path.read_bytes() for name, path in found.items()} == paths(folders)
    assert (tmp_path / "tree" / "link").readlink() == Path("train/sizes")
