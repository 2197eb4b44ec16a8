"""`--consume` on every kind of source that it can free, and what becomes of archives that were consumed."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import factory
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import Tree, tree
from test_kinds import write_kind

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.sources.mark import is_marked, marked, unmarked
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths

SPEC = SynthSpec(classes=3, images_per_class=8, val_images=12, test_images=6, mean_bytes=30_000)
CONSUME = ("--consume", "--yes")
ALL = ("--splits", "train,val,test")
ANY_WNIDS = ("--any-wnids", "--splits", "train", "--layout", "wnid")
TRAIN = "ILSVRC2012_img_train.tar"
OPTIONS = {"official": ALL, "folder": ALL, "winter21": ANY_WNIDS, "kaggle-zip": ALL, "hf-parquet": ALL}
SUBSETS = [kind for kind in OPTIONS if kind not in ("winter21", "hf-parquet")]  # takes all; mixes classes


def run(base: Path, target: Path, *options: str, command: str = "unpack") -> int:
    extra = ("--executor", "serial") if command == "unpack" else ()
    try:
        return cli.main([command, "--base-dir", str(base), "--target-dir", str(target), *extra, *options])
    except SystemExit as stop:
        return int(stop.code or 0)


def archives(base: Path) -> list[Path]:
    return [path for path in base.rglob("*") if path.suffix in (".tar", ".zip", ".parquet")]


def used_bytes(base: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in archives(base))


def contents(folder: Path) -> Tree:
    """The images of all splits, whatever their folders are called."""
    return tree(folder) | {path.name: path.read_bytes().hex() for path in (folder / "test").glob("*")}


def write_at(path: Path, offset: int, data: bytes) -> bytes:
    """Overwrite bytes of a file and return what was there."""
    with open(path, "r+b") as file:
        before = os.pread(file.fileno(), len(data), offset)
        os.pwrite(file.fileno(), data, offset)
    return before


def full_copy(base: Path, to: Path) -> Path:
    """Copy archives without their holes, as rsync does."""
    for path in archives(base):
        (to / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (to / path.relative_to(base)).write_bytes(path.read_bytes())
    return to


@pytest.fixture(params=list(OPTIONS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(tmp_path: Path, kind: str) -> Path:
    return write_kind(tmp_path / "archives", kind, SPEC)


def test_frees_all_images_and_the_same_command_finds_everything_done(base: Path, tmp_path: Path, kind: str) -> None:
    options = OPTIONS[kind]
    assert run(base, tmp_path / "plain", *options) == 0
    expected, before = contents(tmp_path / "plain"), used_bytes(base)
    sizes = {path: path.stat().st_size for path in archives(base)}

    target = tmp_path / "consumed"
    assert run(base, target, *options, *CONSUME) == 0
    assert contents(target) == expected
    assert {path: path.stat().st_size for path in archives(base)} == sizes
    assert used_bytes(base) < 0.4 * before  # of each image in a flat tar, two blocks of 4 KiB stay
    assert run(base, target, *options, *CONSUME) == 0
    assert run(base, target, *options) == 0
    assert cli.main(["check", str(target), "--deep"]) == 0

    assert run(base, tmp_path / "other", *options) == 5
    if kind not in ("kaggle-zip", "hf-parquet"):  # these may be planned: their own checks find it later
        assert run(base, tmp_path / "other", *options, command="plan") == 5
    code = run(full_copy(base, tmp_path / "copy"), tmp_path / "other", *options)
    assert code in ((3, 5) if kind in ("kaggle-zip", "hf-parquet") else (5,))
    assert contents(tmp_path / "other") == {}


def test_what_was_not_asked_for_stays(base: Path, tmp_path: Path, kind: str) -> None:
    if kind not in SUBSETS:
        assert run(base, tmp_path / "t", *OPTIONS[kind], "--classes", "0", *CONSUME) == 2
        return
    assert run(base, tmp_path / "plain") == 0
    expected = tree(tmp_path / "plain")
    assert run(base, tmp_path / "some", "--classes", "0-1", *CONSUME) == 0
    if kind != "kaggle-zip":
        assert any(map(is_marked, archives(base)))
    rest = sorted({name.split("/")[1] for name in expected} - {"0", "1"})
    assert run(base, tmp_path / "rest", "--classes", ",".join(rest)) == 0
    some, others = tree(tmp_path / "some"), tree(tmp_path / "rest")
    assert some | others == expected
    assert not some.keys() & others.keys()
    assert run(base, tmp_path / "all") == 5
    assert run(base, tmp_path / "some") == 0  # to what is published the others are added
    assert tree(tmp_path / "some") == expected


@pytest.mark.parametrize("kind", ["official", "kaggle-zip"])  # two files, and one for both
def test_splits_that_were_not_asked_for_stay(base: Path, tmp_path: Path) -> None:
    assert run(base, tmp_path / "plain") == 0
    assert run(base, tmp_path / "t", "--splits", "val", *CONSUME) == 0
    assert run(base, tmp_path / "t", "--splits", "train") == 0
    assert tree(tmp_path / "t") == tree(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["official-targz", "kaggle-zip-targz"])
def test_what_can_only_be_read_as_a_whole_is_refused(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path / "archives", kind, SPEC)
    assert run(base, tmp_path / "t", *CONSUME) == 2
    assert not (tmp_path / "t").exists()


class TestOfficial:
    """An unfinished run whose archive is consumed in part, as a failing class leaves it."""

    @pytest.fixture
    def kind(self) -> str:
        return "official"

    @pytest.fixture
    def unfinished(self, base: Path, tmp_path: Path) -> tuple[Path, Tree, Path]:
        assert run(base, tmp_path / "plain", "--splits", "train") == 0
        with tarfile.open(base / TRAIN) as tar:
            at = tar.getmembers()[1].offset_data
        good = write_at(base / TRAIN, at, b"?" * 512)
        target = tmp_path / "t"
        assert run(base, target, "--splits", "train", *CONSUME) == 3
        write_at(base / TRAIN, at, good)
        assert len(journal.read(SplitPaths(target, "train").home, "train")) == 2
        return target, tree(tmp_path / "plain"), base

    def test_is_continued(self, unfinished: tuple[Path, Tree, Path]) -> None:
        target, expected, base = unfinished
        assert run(base, target, "--splits", "train", *CONSUME) == 0
        assert tree(target) == expected

    def test_is_continued_with_a_copy_of_the_archive(self, unfinished: tuple[Path, Tree, Path], tmp_path: Path) -> None:
        target, expected, base = unfinished
        assert run(full_copy(base, tmp_path / "copy"), target, "--splits", "train") == 0
        assert tree(target) == expected

    def test_is_not_given_up(self, unfinished: tuple[Path, Tree, Path]) -> None:
        target, expected, base = unfinished
        for options in (
            ("--restart",),
            ("--durability", "none"),
            ("--layout", "wnid"),
            ("--verify-archives", "digest"),
        ):
            assert run(base, target, "--splits", "train", *options) == 5
        assert run(base, target, "--splits", "train", "--part", "0/2") == 0
        assert run(base, target, "--splits", "train", "--restart") == 5
        assert run(base, target, "--splits", "train", "--part", "1/2") == 0
        assert run(base, target, "--splits", "train") == 0
        assert tree(target) == expected

    def test_cannot_be_unpacked_elsewhere(self, unfinished: tuple[Path, Tree, Path], tmp_path: Path) -> None:
        _, _, base = unfinished
        assert run(base, tmp_path / "other", "--splits", "train") == 5
        assert run(base, tmp_path / "other", "--splits", "train", *CONSUME) == 5
        assert run(base, tmp_path / "other", "--splits", "train", "--classes", "1") == 0

    def test_makes_no_image_and_is_of_no_use_for_trials(
        self, unfinished: tuple[Path, Tree, Path], tmp_path: Path
    ) -> None:
        _, _, base = unfinished
        before = (base / TRAIN).read_bytes()
        for method in ("copy", "in-place", "auto"):
            command = ["image", "--base-dir", str(base), "--method", method, "--splits", "train", "--yes"]
            assert cli.main(command) == 5
        assert (base / TRAIN).read_bytes() == before
        assert not (base / "ImageNet.sqfs").exists()
        assert cli.main(["tune", "--base-dir", str(base), "--target-dir", str(tmp_path), "--workers", "1"]) == 5

    def test_is_not_repaired(self, base: Path, tmp_path: Path) -> None:
        fresh = Path(shutil.copytree(base, tmp_path / "fresh"))
        target = tmp_path / "t"
        assert run(base, target, *CONSUME) == 0
        expected = tree(target)
        for name in sorted(expected)[:: len(expected) // 3]:
            (target / name).write_bytes(b"damaged")
        assert run(base, target, "--repair") == 5
        assert run(fresh, target, "--repair") == 0
        assert tree(target) == expected

    def test_what_is_added_without_a_sync_is_refused(self, base: Path, tmp_path: Path) -> None:
        target = tmp_path / "t"
        assert run(base, target, "--splits", "train", "--classes", "0", *CONSUME) == 0
        assert run(base, target, "--splits", "train", "--durability", "none") == 5
        assert run(base, target, "--splits", "train") == 0

    def test_an_image_made_in_place_is_not_destroyed(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["image", "--base-dir", str(base), "--method", "in-place", "--splits", "train", "--yes"]) == 0
        image = (base / TRAIN).read_bytes()
        assert run(base, tmp_path / "t", "--splits", "train", *CONSUME) == 5
        assert "restore" in capsys.readouterr().err
        assert (base / TRAIN).read_bytes() == image


@pytest.mark.parametrize("kind", ["official", "folder"])  # of the others, a shard holds all of these few
def test_preflight_counts_with_what_is_freed(
    base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def needed(*options: str) -> int:
        capsys.readouterr()
        cli.main(["plan", "--base-dir", str(base), "--target-dir", str(tmp_path / "t"), "--json", *options])
        return int(json.loads(capsys.readouterr().out)["bytes_needed"])

    options = OPTIONS[kind]
    assert needed(*options, "--workers", "1", *CONSUME) < needed(*options)


@given(mtime=st.integers(0, 0o77777777777), size=st.integers(0, 0o7777777), padded=st.booleans())
def test_a_marked_header_is_a_valid_one_and_the_mark_comes_off(mtime: int, size: int, padded: bool) -> None:
    block = factory.header(b"n01440764.tar", size=b"%011o\0" % size)
    block = block[:136] + b"%011o\0" % mtime + block[148:]
    total = sum(block[:148] + b" " * 8 + block[156:])
    block = block[:148] + (b"%6o\0 " if padded else b"%06o\0 ") % total + block[156:]
    made = marked(block)
    assert made is not None
    assert unmarked(made) == block
    assert unmarked(block) is None
    assert marked(made) is None
    info = tarfile.TarInfo.frombuf(made, "ascii", "strict")  # verifies the checksum
    assert (info.name, info.size, info.mtime) == ("n01440764.tar", size, mtime)


def test_sync_tree_covers_files_that_nobody_synced(tmp_path: Path) -> None:
    class Recording(Disk):
        paths: set[Path] = set()  # noqa: RUF012 - of this one test

        def synced(self, path: Path, *, everything: bool = False) -> None:
            self.paths.add(path)

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x")
    disk = Recording(sync_each_file=True)
    disk.sync_tree(tmp_path)
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "file"} <= disk.paths
