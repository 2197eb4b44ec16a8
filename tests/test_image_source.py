"""Images as sources: the same tree and manifests as from the archives that they were made of."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from factory import WNIDS

from imagenet_unpack.cli import main as cli
from imagenet_unpack.errors import ArchiveError, ExitCode
from imagenet_unpack.extract.extractor import manifest_rows
from imagenet_unpack.model import TEST_CLASS, class_refs
from imagenet_unpack.planning.imagefile import plan_image
from imagenet_unpack.sources.imagerun import record_of

SHAPE = ["--classes", "4", "--images", "7", "--val-images", "9", "--test-images", "5", "--mean-bytes", "3000"]
ALL = ("--splits", "train,val,test")
REFS = class_refs(WNIDS, "index")
Contents = dict[str, str]


def run(command: str, *options: str | Path) -> int:
    common = [] if command == "check" else ["--executor", "serial", "--min-free-space", "0"]
    return cli.main([command, *map(str, options), *common, "--progress", "none"])


def contents(target: Path) -> Contents:
    """Every file of a target but the program's own records; among them the manifests."""
    return {
        path.relative_to(target).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in target.rglob("*")
        if path.is_file() and ".imagenet_unpack" not in path.parts
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives with test images, the tree of them (`tree`), and images of them by layout."""
    folder = tmp_path_factory.mktemp("archives")
    assert cli.main(["synth", str(folder), *SHAPE]) == 0
    assert run("unpack", "--base-dir", folder, "--target-dir", folder / "tree", *ALL) == 0
    for layout in ("index", "padded", "wnid"):
        output = folder / f"{layout}.sqfs"
        assert run("image", "--base-dir", folder, *ALL, "--method", "copy", "--layout", layout, "--output", output) == 0
    return folder


@pytest.mark.parametrize("layout", ["index", "padded", "wnid"])
def test_the_tree_of_an_image_is_that_of_its_archives(place: Path, tmp_path: Path, layout: str) -> None:
    """Whatever names the image's own folders have; digests in the manifests included."""
    assert run("unpack", "--source", place / f"{layout}.sqfs", "--target-dir", tmp_path / "tree", *ALL) == 0
    found = contents(tmp_path / "tree")
    assert found == contents(place / "tree")
    assert len([path for path in found if path.startswith("test/")]) == 5
    assert run("check", tmp_path / "tree", "--deep") == 0


def test_classes_of_an_image(place: Path, tmp_path: Path) -> None:
    for name, source in (("image", ("--source", place / "index.sqfs")), ("archives", ("--base-dir", place))):
        target = tmp_path / name
        assert run("unpack", *source, "--target-dir", target, "--splits", "train", "--classes", "1,3") == 0
    assert contents(tmp_path / "image") == contents(tmp_path / "archives")
    missing = ("--splits", "train", "--classes", "3,17")
    assert run("unpack", "--source", place / "index.sqfs", "--target-dir", tmp_path / "c", *missing) == 5


def test_the_plan_of_an_image_is_exact(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--source", place / "index.sqfs", *ALL, "--json") == 0
    found = json.loads(capsys.readouterr().out)["splits"]
    assert {split: each["images"] for split, each in found.items()} == {"train": 28, "val": 9, "test": 5}


def test_an_image_made_of_an_image(place: Path, tmp_path: Path) -> None:
    """Its members are copied one after another: that is smaller, and reads the same."""
    again = tmp_path / "again.sqfs"
    assert run("image", "--source", place / "wnid.sqfs", *ALL, "--output", again, "--method", "reflink") == 5
    assert run("image", "--source", place / "wnid.sqfs", *ALL, "--output", again) == 0
    assert run("check", again, "--deep") == 0
    assert run("unpack", "--source", again, *ALL, "--target-dir", tmp_path / "tree") == 0
    assert contents(tmp_path / "tree") == contents(place / "tree")
    assert again.stat().st_size < (place / "wnid.sqfs").stat().st_size


def test_images_of_other_wnids(tmp_path: Path) -> None:
    kind = ["--kind", "winter21", "--classes", "3", "--images", "4", "--mean-bytes", "3000"]
    assert cli.main(["synth", str(tmp_path), *kind]) == 0
    shape = ("--any-wnids", "--splits", "train", "--layout", "wnid")
    assert run("image", "--base-dir", tmp_path, *shape, "--output", tmp_path / "a.sqfs") == 0
    assert run("unpack", "--base-dir", tmp_path, *shape, "--target-dir", tmp_path / "archive") == 0
    assert run("unpack", "--source", tmp_path / "a.sqfs", *shape, "--target-dir", tmp_path / "image") == 0
    assert contents(tmp_path / "image") == contents(tmp_path / "archive")


def test_images_of_zeros_in_a_sparse_file_are_not_taken_for_freed(tmp_path: Path) -> None:
    assert cli.main(["synth", str(tmp_path), *SHAPE, "--bodies", "holes"]) == 0
    output = tmp_path / "a.sqfs"
    assert run("image", "--base-dir", tmp_path, "--method", "copy", "--output", output) == 0
    data = output.read_bytes()
    with open(output, "wb") as file:  # with holes wherever there are zeros
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                file.seek(at)
                file.write(data[at : at + 4096])
    assert run("unpack", "--source", output, "--target-dir", tmp_path / "image") == 0
    assert run("unpack", "--base-dir", tmp_path, "--target-dir", tmp_path / "archives") == 0
    assert contents(tmp_path / "image") == contents(tmp_path / "archives")


def test_an_image_is_not_consumed(place: Path, tmp_path: Path) -> None:
    """Who mounts it would see zeros."""
    before = (place / "index.sqfs").read_bytes()
    command = ("--source", place / "index.sqfs", "--target-dir", tmp_path / "tree", "--consume", "--yes")
    assert run("unpack", *command) == ExitCode.CANNOT_START
    assert (place / "index.sqfs").read_bytes() == before


@pytest.mark.parametrize("run_bytes", [1, 4000, 1 << 30])
def test_runs_cover_every_file_once(place: Path, run_bytes: int) -> None:
    for split, digests in (("train", 28), ("val", 9), ("test", 5)):
        plan = plan_image(place / "index.sqfs", split, REFS, None, "index", run_bytes=run_bytes)  # type: ignore[arg-type]
        rows = sorted(row for shard in plan.shards for row in manifest_rows(shard))
        manifest = (place / "tree" / f"{split}.manifest.tsv").read_bytes().splitlines(keepends=True)
        assert rows == sorted(manifest[1:])
        assert len(rows) == plan.images == digests
        if split == "train":
            assert sorted(shard.id for shard in plan.shards) == sorted(WNIDS[:4])
        if split == "test":
            assert plan.classes == (TEST_CLASS,)


def test_all_damage_of_the_tables_is_found(place: Path, tmp_path: Path) -> None:
    whole = (place / "index.sqfs").read_bytes()
    damaged = tmp_path / "damaged.sqfs"
    start = record_of(place / "index.sqfs").start
    messages = []
    places = [*range(96), *range(start, len(whole), 331)]
    for at in places:
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            for split in ("train", "val", "test"):
                plan_image(damaged, split, REFS, None, "index")
        except ArchiveError as error:
            messages.append(str(error))
    assert len(messages) == len(places)
    assert all(str(damaged) in message for message in messages)


def test_what_is_refused_says_what_it_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (place / "index.sqfs").read_bytes()
    foreign = tmp_path / "foreign.sqfs"
    if shutil.which("mksquashfs"):
        subprocess.run(["mksquashfs", place / "tree", foreign, "-quiet", "-no-progress"], check=True)
    else:
        foreign.write_bytes(whole[:-4096])
    cut = tmp_path / "cut.sqfs"
    cut.write_bytes(whole[: len(whole) // 2])
    for path in (foreign, cut):
        for command in ("unpack", "plan", "image"):
            target = ("--output", tmp_path / "out") if command == "image" else ("--target-dir", tmp_path / "out")
            assert run(command, "--source", path, *target) == ExitCode.CANNOT_START
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1
            assert "mount it" in lines[0]
    assert not (tmp_path / "out").exists()
    assert run("unpack", "--val-archive", place / "index.sqfs", "--splits", "val", "--target-dir", tmp_path / "v") == 0
