"""Runs on each kind of source: limits, interruptions, refusals, and what `plan` says of it."""

from __future__ import annotations

import gzip
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from program import Run, tree
from test_kinds import write_kind

import imagenet_unpack
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.model import Shard
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.paths import STATE_FOLDER

SPEC = SynthSpec(classes=3, images_per_class=20, val_images=9, test_images=4, mean_bytes=20_000)
LARGE = SynthSpec(classes=2, images_per_class=700, val_images=10, mean_bytes=100_000)
IN_PLACE = ("folder", "kaggle-zip", "hf-parquet")
STREAMS = ("official-targz", "kaggle-targz", "kaggle-zip-targz", "hf-targz")
CONTINUED = (*IN_PLACE, "official-targz")  # of the other streams, small ones are one shard


@pytest.fixture(scope="session")
def expected_tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = write_kind(tmp_path_factory.mktemp("official"), "official", SPEC)
    assert go(base) == 0
    return tree(base / "out")


def go(base: Path, *options: str) -> int:
    common = ("--base-dir", str(base), "--target-dir", str(base / "out"), "--progress", "none", "--executor", "serial")
    return cli.main([*common, *options])


def archives(base: Path) -> list[Path]:
    return [path for path in sorted(base.rglob("*")) if path.is_file() and "out" not in path.parts]


def touch(base: Path) -> None:
    for path in archives(base):
        os.utime(path, (1, 1))


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((kind, "--min-free-space") for kind in (*IN_PLACE, "official-targz")),
        *((kind, "--min-free-memory") for kind in ("kaggle-zip", "hf-parquet", "kaggle-zip-targz")),
    ],
)
def test_nothing_is_begun_without_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, option: str
) -> None:
    base = write_kind(tmp_path, kind)
    assert go(base, option, "900T", "--stall-timeout", "0") == 6
    assert option in capsys.readouterr().err
    assert not (base / "out" / "train").exists()
    assert go(base) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*IN_PLACE, "official-targz", "kaggle-zip-targz"])
@pytest.mark.parametrize("option", ["--max-read-rate=300k", "--max-write-rate=300k", "--max-create-rate=15"])
def test_rates_are_kept_by_all_workers_together(tmp_path: Path, kind: str, option: str) -> None:
    """1.4 MB in 69 images take 4.6 s, less a tenth of a second's worth; the start of a process takes about one."""
    base = write_kind(tmp_path, kind, SPEC)
    began_s = time.monotonic()
    code, result, err = Run(base, base / "out", option).end()
    assert code == 0, err
    assert result["splits"]["train"]["images"] == 60
    assert time.monotonic() - began_s > 4.3


# --- continued runs ---------------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, kind: str) -> Path:
    """Return a folder of archives and an unfinished run of some of them."""
    base = write_kind(tmp_path, kind, SPEC)
    if kind in IN_PLACE:
        assert go(base, "--part", "0/2") == 0
        return base
    path = base / "ILSVRC2012_img_train.tar.gz"
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data[:-8] + bytes(8))  # another checksum, far behind what identifies it
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert go(base) == 3
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not (base / "out" / "train").exists()
    return base


@pytest.mark.parametrize("kind", CONTINUED)
def test_an_unfinished_run_is_continued_with_the_same_archive_alone(
    tmp_path: Path, kind: str, expected_tree: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = interrupted(tmp_path / "a", kind)
    assert go(base, "--layout", "wnid") == 5
    assert go(base, "--classes", "1") == 5
    other = write_kind(tmp_path / "b", kind, replace(SPEC, seed=1))
    assert go(other, "--target-dir", str(base / "out")) == 5
    assert "archive" in capsys.readouterr().err
    touch(base)
    assert go(base) == 5
    assert "--same-archive" in capsys.readouterr().err
    assert go(base, "--same-archive") == 0
    assert tree(base / "out") == expected_tree


@pytest.mark.parametrize("kind", CONTINUED)
def test_an_unfinished_run_can_be_thrown_away(tmp_path: Path, kind: str, expected_tree: dict[str, str]) -> None:
    base = interrupted(tmp_path, kind)
    touch(base)
    assert go(base, "--restart") == 0
    assert tree(base / "out") == expected_tree


@pytest.mark.parametrize("kind", IN_PLACE)
def test_journaled_shards_are_not_read_again(tmp_path: Path, kind: str, expected_tree: dict[str, str]) -> None:
    """Their bytes in the archive are damaged meanwhile, and nobody sees it."""
    base = interrupted(tmp_path, kind)
    done = journal.read(base / "out" / STATE_FOLDER / "train", "train")
    assert done
    plan = imagenet_unpack.plan(base_dir=base, target_dir=base / "out")
    journaled = [shard for shard in plan.splits["train"].shards if shard.id in done]
    damage(journaled)
    assert go(base) == 0
    assert tree(base / "out") == expected_tree


def damage(shards: list[Shard]) -> None:
    for shard in shards:
        path = Path(shard.archive.path)
        times = path.stat()
        with open(path, "r+b") as file:
            file.seek((shard.offset + shard.end) // 2)
            file.write(bytes(20))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(("kind", "piece"), [("hf-parquet", "train-00001"), ("hf-targz", "train_images_2")])
def test_a_piece_that_is_missing_is_needed_until_its_split_is_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, piece: str
) -> None:
    base = write_kind(tmp_path, kind, replace(SPEC, images_per_class=401, mean_bytes=500))
    (path,) = base.glob(f"{piece}*")
    path.rename(tmp_path / "elsewhere")
    assert go(base) == 5
    assert f"{piece}" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(path)
    assert go(base) == 0
    path.unlink()
    assert go(base) == 0


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_has_no_parts_and_no_digest(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_kind(tmp_path, kind)
    assert go(base, "--part", "0/2") == 2
    assert "--part" in capsys.readouterr().err
    assert go(base, "--verify-archives", "digest") == 5
    assert "no SHA-256 is published" in capsys.readouterr().err
    assert not (base / "out" / "train").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_killed_run_is_continued(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path, kind, LARGE)
    run = Run(base, base / "out", "--workers", "1", "--max-write-rate", "15M").at_work()
    home = base / "out" / STATE_FOLDER / "train"
    deadline = time.monotonic() + 60
    while not journal.read(home, "train"):
        assert run.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.process.kill()
    run.process.communicate()
    done = journal.read(home, "train")
    plan = imagenet_unpack.plan(base_dir=base, target_dir=base / "out")
    damage([shard for shard in plan.splits["train"].shards if shard.id in done])
    run.wait_until_gone(20)
    code, result, err = Run(base, base / "out").end()
    assert code == 0, err
    assert result["splits"]["train"]["shards_skipped"] == len(done) < result["splits"]["train"]["shards"]
    assert cli.main(["check", str(base / "out"), "--deep", "--progress", "none"]) == 0
    shutil.rmtree(base)


# --- what plan says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("official", ("tar of inner tars", "flat tar of validation images")),
        ("folder", ("folder of inner tars",)),
        ("kaggle-zip", ("zip of Kaggle's shape",)),
        ("hf-parquet", ("parquet",)),
        ("official-targz", ("tar of inner tars, compressed with gzip",)),
        ("kaggle-targz", ("tar of Kaggle's shape, compressed with gzip",)),
        ("kaggle-zip-targz", ("tar.gz of Kaggle's shape in a zip",)),
        ("hf-targz", ("tar of Hugging Face's shape, compressed with gzip",)),
        ("winter21", ("tar of inner tars",)),
    ],
)
def test_the_plan_says_what_was_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: tuple[str, ...]
) -> None:
    base = write_kind(tmp_path, kind)
    options = ("--any-wnids", "--layout", "wnid", "--splits", "train") if kind == "winter21" else ()
    assert cli.main(["plan", "--base-dir", str(base), *options]) == 0
    shown = capsys.readouterr().out
    assert all(each in shown for each in words)
    assert not (base / "ImageNet").exists()


@pytest.mark.parametrize("kind", ["hf-parquet", "hf-targz", "kaggle-zip"])
def test_sources_are_found_in_the_folder_of_data(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / "data", kind)
    assert go(tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tsv")) == ["train.manifest.tsv", "val.manifest.tsv"]
    write_kind(tmp_path, kind)
    assert go(tmp_path, "--target-dir", str(tmp_path / "other")) == 5  # everything twice


@pytest.mark.parametrize("kind", ["hf-parquet", "hf-targz", "kaggle-zip", "kaggle-targz", "kaggle-zip-targz", "folder"])
def test_paths_of_any_bytes(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path / os.fsdecode(b"a b\xff\n"), kind)
    assert go(base) == 0


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "stream"])
def test_members_of_imagenet_21k_that_are_no_images_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    first, second = "n00004475", "n06470073"
    images = {
        first: [b"\xff\xd8\xff one", gzip.compress(b"\xff\xd8\xff two"), gzip.compress(b"\xff\xd8\xff three")],
        second: [b"<html>no image</html>", b"\x89PNG four"],
    }
    data = factory.train_tar({wnid: factory.tar(factory.images(wnid, bodies)) for wnid, bodies in images.items()})
    name = "fall11_whole.tar.gz" if packed else "fall11_whole.tar"
    factory.write(tmp_path / name, gzip.compress(data) if packed else data)
    options = ("--any-wnids", "--layout", "wnid", "--splits", "train", "--progress", "log")
    assert go(tmp_path, *options) == 0
    notes = capsys.readouterr().err
    assert f"{first}" in notes
    assert "2 members are compressed with gzip" in notes
    assert "1 members are neither JPEG nor PNG" in notes
    for wnid, bodies in images.items():
        for number, body in enumerate(bodies):
            assert (tmp_path / "out/train" / wnid / f"{wnid}_{number}.JPEG").read_bytes() == body
