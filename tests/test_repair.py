"""`unpack --repair`: what is damaged comes back, and nothing else is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from program import Tree, serial, tree

from imagenet_unpack.targets.paths import STATE_FOLDER


@pytest.fixture
def target(base: Path, tmp_path: Path) -> Path:
    assert serial(base, tmp_path / "t") == 0
    return tmp_path / "t"


def images(target: Path, split: str) -> list[Path]:
    return sorted((target / split).glob("*/*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: os.truncate(path, 3), lose_folder, link])
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_damaged_comes_back(
    base: Path, target: Path, expected: Tree, split: str, damage: Callable[[Path], object]
) -> None:
    before = {path: path.stat() for name in ("train", "val") for path in images(target, name)}
    victim = images(target, split)[7]
    damage(victim)
    changed = {path for path in before if damage is lose_folder and path.parent == victim.parent} | {victim}
    assert serial(base, target, "--repair") == 0
    assert tree(target) == expected
    assert not victim.is_symlink()
    for path in before.keys() - changed:  # not even written anew
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before[path].st_ino, before[path].st_mtime_ns)
    assert [path for path in (target / STATE_FOLDER).iterdir() if path.is_dir()] == []
    assert serial(base, target) == 0


def test_files_of_others_are_left_and_named(
    base: Path, target: Path, expected: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = images(target, "train")[0]
    victim.unlink()
    mine = victim.with_name("mine.txt")
    mine.write_text("mine")
    assert serial(base, target, "--repair") == 4
    assert "mine.txt" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert tree(target) == expected
    assert serial(base, target) == 0


def test_a_whole_tree_is_left_alone(base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serial(base, target, "--repair") == 0
    assert "nothing to repair" in capsys.readouterr().err


def test_without_an_archive(base: Path, target: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert serial(empty, target, "--repair") == 0
    images(target, "val")[0].unlink()
    assert serial(empty, target, "--repair") == 5
    assert serial(base, target, "--repair") == 0


def test_an_archive_with_other_bytes_replaces_nothing(base: Path, tmp_path: Path) -> None:
    own, target = tmp_path / "own", tmp_path / "t"
    shutil.copytree(base, own)
    assert serial(own, target) == 0
    victim = images(target, "val")[3]
    body = victim.read_bytes()
    flip(victim)
    archive = own / "ILSVRC2012_img_val.tar"
    times = archive.stat().st_mtime_ns
    archive.write_bytes(archive.read_bytes().replace(body, bytes(len(body))))
    os.utime(archive, ns=(times, times))
    damaged = victim.read_bytes()
    assert serial(own, target, "--repair") == 4
    assert victim.read_bytes() == damaged
    assert serial(base, target, "--repair", "--same-archive") == 0
    assert victim.read_bytes() == body


def test_a_damaged_manifest_repairs_nothing(base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(target / "train.manifest.tsv")
    assert serial(base, target, "--repair") == 5
    assert "train.manifest.tsv" in capsys.readouterr().err


def test_nothing_published(base: Path, tmp_path: Path) -> None:
    assert serial(base, tmp_path / "new", "--repair") == 5
    assert serial(base, tmp_path / "new", "--repair", "--part", "0/2") == 2


def test_folders_in_the_way_are_named(base: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = images(target, "train")[0]
    victim.unlink()
    victim.mkdir()
    assert serial(base, target, "--repair") == 5
    assert str(victim) in capsys.readouterr().err
