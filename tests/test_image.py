"""Images from the command line: what is in them, by the independent reader; in place and back; refusals."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factory import WNIDS, tar, val_name
from program import SLOW, Run

import imagenet_unpack
from imagenet_unpack.cli import main as cli
from imagenet_unpack.errors import ExitCode, TargetError
from imagenet_unpack.run.imageclaim import claimed
from imagenet_unpack.sources.imagerecord import read_record
from imagenet_unpack.sources.squashfs import Image
from imagenet_unpack.targets import archivelock
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.imagefile import ImageState

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def image(base: Path, *options: str, executor: str = "serial") -> int:
    return cli.main(["image", "--base-dir", str(base), "--executor", executor, "--progress", "none", *options])


def contents(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the files and targets of the links in an image, by path."""
    files: dict[str, str] = {}
    links: dict[str, str] = {}
    with Image(path) as opened:
        for folder in opened.walk():
            prefix = b"".join(part + b"/" for part in folder.path).decode()
            for file in folder.files:
                files[prefix + file.name.decode()] = hashlib.blake2b(b"".join(opened.read(file))).hexdigest()
            links |= {prefix + name.decode(): target.decode() for name, target in folder.links}
    return files, links


def split_files(files: dict[str, str]) -> dict[str, str]:
    return {path: digest for path, digest in files.items() if "/" in path}


@pytest.fixture
def archives(base: Path, tmp_path: Path) -> Path:
    """A copy of the archives, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "archives"))


def test_a_copied_image_holds_the_tree_and_its_manifests(base: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert image(base, "--output", str(tmp_path / "a.sqfs"), "--method", "copy", executor="local") == 0
    files, links = contents(tmp_path / "a.sqfs")
    assert split_files(files) == expected
    assert not links
    assert cli.main(["--base-dir", str(base), "--target-dir", str(tmp_path / "tree"), "--progress", "none"]) == 0
    for split in ("train", "val"):
        manifest = (tmp_path / "tree" / f"{split}.manifest.tsv").read_bytes()
        assert files[f"{split}.manifest.tsv"] == hashlib.blake2b(manifest).hexdigest()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.sqfs", "tree"]


def test_the_same_archives_and_options_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name, executor in (("a", "serial"), ("b", "local")):
        assert image(base, "--output", str(tmp_path / name), "--method", "copy", executor=executor) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_further_layouts_are_links(base: Path, expected: dict[str, str], tmp_path: Path) -> None:
    options = ("--method", "copy", "--layout", "index", "--layout", "wnid", "--layout", "padded")
    assert image(base, "--output", str(tmp_path / "a"), *options) == 0
    _, links = contents(tmp_path / "a")
    assert links["by-wnid/train/n01440764"] == "../../train/0"
    assert links["by-padded/val/0007"] == "../../val/7"
    folders = {os.path.dirname(path) for path in expected}
    for link, target in links.items():
        assert os.path.normpath(os.path.join(os.path.dirname(link), target)) in folders


def test_some_classes_of_a_copied_image_take_the_room_of_these(
    base: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    assert image(base, "--output", str(tmp_path / "a"), "--method", "copy", "--classes", "2,5") == 0
    files = split_files(contents(tmp_path / "a")[0])
    assert files == {path: digest for path, digest in expected.items() if path.split("/")[1] in ("2", "5")}
    assert (tmp_path / "a").stat().st_size < (base / TRAIN).stat().st_size


def test_the_same_command_again_finds_nothing_to_do_and_another_one_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--output", str(tmp_path / "a"), "--method", "copy", "--json")
    assert image(base, *command) == 0
    first = json.loads(capsys.readouterr().out)
    before = (tmp_path / "a").stat()
    assert image(base, *command) == 0
    again = json.loads(capsys.readouterr().out)
    after = (tmp_path / "a").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again["splits"]["train"]["images"] == first["splits"]["train"]["images"] == 240
    assert again["splits"]["train"]["shards_skipped"] == again["splits"]["train"]["shards"]
    assert first["images"] == [str(tmp_path / "a")]
    assert image(base, *command, "--layout", "wnid") == ExitCode.CANNOT_START
    assert image(base, *command, "--layout", "wnid", "--restart") == 0
    assert "train/n01440764" in {os.path.dirname(path) for path in contents(tmp_path / "a")[0]}


def test_what_is_in_the_way_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    assert image(base, "--output", str(tmp_path / "a"), "--method", "copy") == ExitCode.CANNOT_START
    assert (tmp_path / "a").read_bytes() == b"mine"
    (tmp_path / ".b.imagenet_unpack").mkdir()
    (tmp_path / ".b.imagenet_unpack" / "mine").write_bytes(b"mine")
    assert image(base, "--output", str(tmp_path / "b"), "--method", "copy") == ExitCode.CANNOT_START
    assert (tmp_path / ".b.imagenet_unpack" / "mine").read_bytes() == b"mine"


class TestInPlace:
    def test_the_archive_is_the_image_and_restore_brings_it_back(
        self, archives: Path, expected: dict[str, str]
    ) -> None:
        before = {name: ((archives / name).read_bytes(), (archives / name).stat().st_mtime_ns) for name in (TRAIN, VAL)}
        names = sorted(entry.name for entry in archives.iterdir())
        assert image(archives, "--method", "in-place", "--yes", "--layout", "index", "--layout", "wnid") == 0
        for name, split in ((TRAIN, "train"), (VAL, "val")):
            files, links = contents(archives / name)
            found = {f"{split}/{path}": digest for path, digest in files.items() if "/" in path}
            assert found == {path: digest for path, digest in expected.items() if path.startswith(f"{split}/")}
            assert links["by-wnid/n01440764"] == "../0"
            assert image(archives, "--method", "in-place", "--yes", "--splits", split) == 0
        assert sorted(entry.name for entry in archives.iterdir()) == names
        for name in (TRAIN, VAL):
            assert cli.main(["restore", str(archives / name)]) == 0
            assert ((archives / name).read_bytes(), (archives / name).stat().st_mtime_ns) == before[name]
            assert cli.main(["restore", str(archives / name)]) == 0  # as after a crash before the first change
            assert ((archives / name).read_bytes(), (archives / name).stat().st_mtime_ns) == before[name]
        assert sorted(entry.name for entry in archives.iterdir()) == names

    def test_the_image_is_still_a_source(
        self, archives: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["plan", "--base-dir", str(archives), "--json"]
        assert cli.main(command) == 0
        before = json.loads(capsys.readouterr().out)["splits"]
        assert image(archives, "--method", "in-place", "--yes") == 0
        assert cli.main(command) == 0
        assert json.loads(capsys.readouterr().out)["splits"] == before
        target = archives / "tree"
        assert cli.main(["--base-dir", str(archives), "--target-dir", str(target), "--progress", "none"]) == 0
        found = {
            path.relative_to(target).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
            for path in target.rglob("*/*/*.JPEG")
        }
        assert {path: found[path] for path in expected} == expected

    @pytest.mark.parametrize("name", [TRAIN, VAL])
    def test_refused_where_more_than_the_archive_would_change(self, archives: Path, name: str) -> None:
        before = (archives / name).read_bytes()
        split = "train" if name == TRAIN else "val"
        command = ("--method", "in-place", "--splits", split)
        assert image(archives, *command) == ExitCode.USAGE  # nobody was asked
        os.link(archives / name, archives / "link")
        assert image(archives, *command, "--yes") == ExitCode.CANNOT_START
        (archives / "link").unlink()
        (archives / name).chmod(0o444)
        assert image(archives, *command, "--yes") == ExitCode.CANNOT_START
        (archives / name).chmod(0o644)
        with open(archives / name, "rb"):
            assert image(archives, *command, "--yes") == ExitCode.CANNOT_START
        assert (archives / name).read_bytes() == before
        assert not [entry for entry in archives.iterdir() if entry.name.startswith(".")]

    def test_restore_refuses_what_was_not_made_in_place(self, archives: Path) -> None:
        (archives / "text").write_bytes(b"text")
        assert cli.main(["restore", str(archives / "text")]) == ExitCode.CANNOT_START
        assert (archives / "text").read_bytes() == b"text"
        assert image(archives, "--method", "copy", "--output", str(archives / "a")) == 0
        copied = (archives / "a").read_bytes()
        assert cli.main(["restore", str(archives / "a")]) == ExitCode.CANNOT_START
        assert cli.main(["restore", str(archives / "missing")]) == ExitCode.CANNOT_START
        assert (archives / "a").read_bytes() == copied


def check(path: Path, *options: str) -> int:
    return cli.main(["check", str(path), "--workers", "1", "--progress", "none", *options])


class TestCheck:
    @pytest.mark.parametrize("options", [(), ("--deep",)])
    def test_a_whole_image_has_no_differences(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
    ) -> None:
        layouts = ("--layout", "index", "--layout", "wnid")
        assert image(base, "--output", str(tmp_path / "a"), "--method", "copy", *layouts) == 0
        assert check(tmp_path / "a", "--json", *options) == 0
        found = json.loads(capsys.readouterr().out)
        train, val = found["splits"]["train"], found["splits"]["val"]
        assert (train["classes"], train["images"], train["problems"]) == (8, 240, [])
        assert (val["classes"], val["images"], val["problems"]) == (8, 60, [])
        assert found["status"] == "ok"

    def test_in_place_too(self, archives: Path) -> None:
        assert image(archives, "--method", "in-place", "--yes") == 0
        for name in (TRAIN, VAL):
            assert check(archives / name, "--deep") == 0
            with open(archives / name, "r+b") as file:
                file.seek(300)
                file.write(b"x")
            assert check(archives / name) == ExitCode.CHECK_DIFFERS

    def test_any_damage_of_the_tables_is_found(self, archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = archives / "a"
        assert image(archives, "--output", str(path), "--method", "copy", "--classes", "0-1") == 0
        content = path.read_bytes()
        record = read_record(path)
        assert record is not None
        start = record.start
        chance = random.Random(0)
        places = [0, 50, 95, *chance.sample(range(start, len(content)), 5), len(content) - 1]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            assert check(path, "--json") == ExitCode.CHECK_DIFFERS, place
            assert json.loads(capsys.readouterr().out)["status"] == "differs"
        for length in (100, 4096, len(content) // 2, start, len(content) - 4096, len(content) - 1):
            path.write_bytes(content[:length])
            assert check(path) == ExitCode.CHECK_DIFFERS, length

    def test_a_damaged_image_file_is_found_by_its_digest(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "a"
        assert image(base, "--output", str(path), "--method", "copy") == 0
        with Image(path) as opened:
            folder = next(each for each in opened.walk() if each.path == (b"val", b"3"))
        with open(path, "r+b") as file:
            file.seek(folder.files[2].start + 50)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        assert check(path) == 0
        assert check(path, "--deep", "--json") == ExitCode.CHECK_DIFFERS
        (problem,) = json.loads(capsys.readouterr().out.splitlines()[-1])["splits"]["val"]["problems"]
        assert (problem["kind"], problem["class"], problem["path"]) == (
            "digest", "3", f"val/3/{folder.files[2].name.decode()}",
        )  # fmt: skip

    def test_what_is_no_image_is_refused(self, base: Path, tmp_path: Path) -> None:
        assert check(base / TRAIN) == ExitCode.CANNOT_START
        (tmp_path / "empty").touch()
        assert check(tmp_path / "empty") == ExitCode.CANNOT_START


def test_an_archive_that_a_run_reads_is_not_converted(archives: Path) -> None:
    before = (archives / TRAIN).read_bytes()
    with archivelock.shared([str(archives / TRAIN)]):
        assert image(archives, "--method", "in-place", "--yes", "--splits", "train") == ExitCode.CANNOT_START
    run = Run(archives, archives / "tree", *SLOW).at_work()
    try:
        assert image(archives, "--method", "in-place", "--yes", "--splits", "train") == ExitCode.CANNOT_START
    finally:
        run.process.terminate()
        run.end()
    assert (archives / TRAIN).read_bytes() == before
    with archivelock.exclusive(archives / TRAIN), pytest.raises(TargetError):
        archivelock.shared([str(archives / TRAIN)]).__enter__()


def test_a_mounted_image_is_what_training_code_reads(base: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Its files as a mount shows them: `samples` and `check` need the manifests alone."""
    assert image(base, "--output", str(tmp_path / "a"), "--method", "copy", "--layout", "wnid") == 0
    root = tmp_path / "mounted"
    with Image(tmp_path / "a") as opened:
        for folder in opened.walk():
            where = root.joinpath(*map(os.fsdecode, folder.path))
            where.mkdir(parents=True)
            for file in folder.files:
                (where / os.fsdecode(file.name)).write_bytes(b"".join(opened.read(file)))
    found = imagenet_unpack.samples(root, "train")
    assert len(found) == 240
    assert {hashlib.blake2b(Path(path).read_bytes()).hexdigest() for path, index in found if index == 3} == {
        digest for path, digest in expected.items() if path.startswith("train/3/")
    }
    assert check(root, "--deep") == 0


def require_the_same_image(kind: str, tmp_path: Path) -> None:
    """Make images of archives of a kind and of the official ones: they hold the same, each time the same bytes."""
    options = ["--classes", "3", "--images", "4", "--val-images", "6", "--mean-bytes", "3000"]
    for each in ("official", kind):
        assert cli.main(["synth", str(tmp_path / each), "--kind", each, *options]) == 0
        assert image(tmp_path / each, "--method", "copy", "--output", str(tmp_path / f"{each}.sqfs")) == 0
    assert contents(tmp_path / f"{kind}.sqfs") == contents(tmp_path / "official.sqfs")
    assert check(tmp_path / f"{kind}.sqfs", "--deep") == 0
    assert image(tmp_path / kind, "--output", str(tmp_path / "again.sqfs")) == 0
    assert (tmp_path / "again.sqfs").read_bytes() == (tmp_path / f"{kind}.sqfs").read_bytes()
    assert image(tmp_path / kind, "--output", str(tmp_path / "again.sqfs")) == 0  # nothing to do


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_members_of_other_archives_are_packed(kind: str, tmp_path: Path) -> None:
    if kind == "hf-parquet":
        pytest.importorskip("pyarrow")
    require_the_same_image(kind, tmp_path)
    assert image(tmp_path / kind, "--method", "reflink", "--restart") == ExitCode.CANNOT_START
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []


@pytest.mark.parametrize("kind", ["official-targz", "hf-targz", "kaggle-targz", "kaggle-zip-targz"])
def test_members_of_streams_are_copied_one_after_another(kind: str, tmp_path: Path) -> None:
    require_the_same_image(kind, tmp_path)
    for method in ("reflink", "in-place"):
        assert image(tmp_path / kind, "--method", method, "--yes") == ExitCode.CANNOT_START
    assert image(tmp_path / kind, "--output", str(tmp_path / "c"), "--classes", "1", "--splits", "train") == 0
    assert image(tmp_path / kind, "--output", str(tmp_path / "d"), "--classes", "1,9", "--splits", "train") == 5
    assert {path.split("/")[1] for path in split_files(contents(tmp_path / "c")[0])} == {"1"}


def test_a_pipe_and_a_plain_tar_in_one_image(base: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--source", "-", "--val-archive", str(base / VAL), "--output",
        str(tmp_path / "a.sqfs"), "--progress", "none", "--workers", "1",
    ]  # fmt: skip
    with open(base / TRAIN, "rb") as archive:
        assert subprocess.run(command, stdin=archive, check=False).returncode == 0
    assert image(base, "--method", "copy", "--output", str(tmp_path / "b.sqfs")) == 0
    assert contents(tmp_path / "a.sqfs") == contents(tmp_path / "b.sqfs")


def test_a_stream_of_several_splits_is_longer_than_the_memory_for_it(tmp_path: Path) -> None:
    names = [f"train/{WNIDS[0]}/{WNIDS[0]}_{number}.JPEG" for number in range(4)]
    names += [f"val/{val_name(number)}" for number in range(1, 5)]
    names.sort(key=lambda name: name[-6])  # train and val in turn
    members = [(f"ILSVRC/Data/CLS-LOC/{name}", bytes(20 << 20)) for name in names]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar(members), 1))
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--source", "a.tar.gz", "--output", "a.sqfs", "--progress",
        "none", "--workers", "1",
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    assert subprocess.run(command, cwd=tmp_path, env=environ, timeout=60, check=False).returncode == 0
    with Image(tmp_path / "a.sqfs") as opened:
        sizes = [file.size_bytes for folder in opened.walk() if len(folder.path) == 2 for file in folder.files]
    assert sizes == [20 << 20] * 8


def test_a_damaged_stream_makes_no_image(archives: Path, tmp_path: Path) -> None:
    whole = gzip.compress((archives / TRAIN).read_bytes(), 1)
    (archives / TRAIN).unlink()
    packed = archives / f"{TRAIN}.gz"
    packed.write_bytes(whole[: len(whole) * 2 // 3])
    assert image(archives) == ExitCode.SHARDS_FAILED
    assert not (archives / "ImageNet.sqfs").exists()
    packed.write_bytes(whole)
    assert image(archives) == ExitCode.CANNOT_START  # val is done, and train is another archive now
    assert image(archives, "--restart") == 0
    assert check(archives / "ImageNet.sqfs", "--deep") == 0


def test_what_was_packed_is_not_packed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    options = ["--classes", "3", "--images", "4", "--val-images", "6", "--mean-bytes", "3000"]
    assert cli.main(["synth", str(tmp_path), "--kind", "hf-parquet", *options]) == 0
    damaged = next(tmp_path.glob("validation-*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:4] + bytes(40) + whole[44:])  # the header of the first page, which holds images
    assert image(tmp_path, "--json") == ExitCode.SHARDS_FAILED
    assert not (tmp_path / "ImageNet.sqfs").exists()
    damaged.write_bytes(whole)
    capsys.readouterr()
    assert image(tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["splits"]
    assert [found[split]["shards_skipped"] for split in ("train", "val")] == [1, 0]
    assert check(tmp_path / "ImageNet.sqfs", "--deep") == 0


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", ExitCode.USAGE), (b"\n", ExitCode.USAGE), (b"y\n", ExitCode.OK)])
def test_in_place_asks_on_a_terminal(archives: Path, answer: bytes, code: ExitCode) -> None:
    before = (archives / VAL).read_bytes()
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--base-dir", str(archives), "--method", "in-place",
        "--splits", "val", "--executor", "serial", "--progress", "none",
    ]  # fmt: skip
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=subprocess.PIPE)
    os.close(its_end)
    try:
        os.write(terminal, answer)
        _, err = process.communicate(timeout=30)
    finally:
        os.close(terminal)
    assert process.returncode == code
    assert b"[y/N]" in err
    assert ((archives / VAL).read_bytes() == before) == (code != ExitCode.OK)


def test_restart_replaces_nothing_but_a_copied_image(archives: Path, tmp_path: Path) -> None:
    """Neither an archive, of this image or another one, nor an image that holds one, nor a file of the user's."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("mine")
    shutil.copytree(archives, tmp_path / "converted")
    assert image(tmp_path / "converted", "--method", "in-place", "--yes") == 0
    assert image(archives, "--method", "copy", "--output", str(tmp_path / "source")) == 0
    kept = [
        *(archives / name for name in (TRAIN, VAL)),
        *(tmp_path / "converted" / name for name in (TRAIN, VAL)),
        tmp_path / "mine",
        tmp_path / "link",
    ]
    before = [path.read_bytes() for path in kept]
    for path in kept:
        for options in ((), ("--restart",)):
            assert image(archives, "--method", "copy", "--output", str(path), *options) == ExitCode.CANNOT_START
    assert [path.read_bytes() for path in kept] == before
    source = ("--source", str(tmp_path / "source"), "--output", str(tmp_path / "source"))
    assert image(archives, *source, "--restart") == ExitCode.CANNOT_START
    assert image(archives, "--method", "copy", "--output", str(tmp_path / "source"), "--restart") == 0
    assert check(tmp_path / "source", "--deep") == 0


def test_a_damaged_class_fails_and_is_tried_again(archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (archives / TRAIN).read_bytes()
    at = whole.index(b"n01484850_")  # in the header of an image of class 2
    (archives / TRAIN).write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    command = ("--method", "copy", "--json")
    assert image(archives, *command) == ExitCode.SHARDS_FAILED
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["status"] == "failed"
    assert [(failure["shard"], failure["kind"]) for failure in found["failures"]] == [("n01484850", "archive")]
    assert not (archives / "ImageNet.sqfs").exists()
    (archives / TRAIN).write_bytes(whole)
    assert image(archives, *command) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["splits"]["train"]["shards_skipped"] < found["splits"]["train"]["shards"]
    assert check(archives / "ImageNet.sqfs", "--deep") == 0


def test_a_damaged_class_fails_where_shards_are_read_together(
    archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (archives / TRAIN).read_bytes()
    at = before.index(b"n01484850_")
    (archives / TRAIN).write_bytes(before[:at] + b"X" + before[at + 1 :])
    assert image(archives, "--method", "in-place", "--yes", "--json", executor="local") == ExitCode.SHARDS_FAILED
    found = json.loads(capsys.readouterr().out)
    assert [(failure["shard"], failure["kind"]) for failure in found["failures"]] == [("n01484850", "archive")]
    assert (archives / TRAIN).read_bytes() == before[:at] + b"X" + before[at + 1 :]
    (archives / TRAIN).write_bytes(before)
    assert image(archives, "--method", "in-place", "--yes", executor="local") == 0
    assert check(archives / TRAIN, "--deep") == 0


def test_a_signal_ends_a_copy_and_the_same_command_goes_on(archives: Path) -> None:
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--base-dir", str(archives), "--workers", "2", "--progress",
        "none", "--method", "copy", "--json", "--max-write-rate", "2MB", "--rate-dir", str(archives.parent),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(archives.glob(".ImageNet.sqfs.imagenet_unpack/*.members")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.SIGTERM, err
    assert "SIGTERM" in err
    assert json.loads(out)["status"] == "interrupted"
    assert not (archives / "ImageNet.sqfs").exists()
    assert image(archives, "--method", "copy") == 0
    assert check(archives / "ImageNet.sqfs", "--deep") == 0


def test_a_converted_archive_is_copied_as_the_archive_it_was(archives: Path, tmp_path: Path) -> None:
    assert image(archives, "--method", "copy", "--output", str(tmp_path / "before")) == 0
    assert image(archives, "--method", "in-place", "--yes") == 0
    assert image(archives, "--method", "copy", "--output", str(tmp_path / "after")) == 0
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_an_image_that_is_being_made_is_left_alone(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.sqfs"
    with claimed(ImageState(output, Disk())):
        assert image(base, "--method", "copy", "--output", str(output)) == ExitCode.CANNOT_START
    assert not output.exists()
    assert image(base, "--method", "copy", "--output", str(output)) == 0


def test_a_signal_ends_the_wait_for_a_pipe(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--source", "-", "--output", str(tmp_path / "a"), "--json",
        "--progress", "none", "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(gzip.compress(bytes(512)))
    process.stdin.flush()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=8) == ExitCode.SIGTERM  # sooner than a run that hangs is left alone
    finally:
        process.kill()
        out, _ = process.communicate()
    assert json.loads(out)["status"] == "interrupted"
    assert not list(tmp_path.iterdir())


def test_an_image_made_in_place_is_mounted_as_its_split(archives: Path, expected: dict[str, str]) -> None:
    """Mounted at DIR/train, its manifest and links are in DIR/train itself."""
    assert image(archives, "--method", "in-place", "--yes", "--layout", "index", "--layout", "wnid") == 0
    root = archives / "mounted"
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        with Image(archives / name) as opened:
            for folder in opened.walk():
                where = root.joinpath(split, *map(os.fsdecode, folder.path))
                where.mkdir(parents=True)
                for file in folder.files:
                    (where / os.fsdecode(file.name)).write_bytes(b"".join(opened.read(file)))
                for link, link_target in folder.links:
                    (where / os.fsdecode(link)).symlink_to(os.fsdecode(link_target))
    assert check(root, "--deep") == 0
    assert len(imagenet_unpack.samples(root, "val")) == 60
    (root / "train" / "3" / "n01491361_extra.JPEG").touch()
    assert check(root) == ExitCode.CHECK_DIFFERS
