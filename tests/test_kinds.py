from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.cli.arguments import build_parsers
from imagenet_unpack.dataset import kinds, synth
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.errors import UsageError
from imagenet_unpack.targets.paths import STATE_FOLDER

SPEC = SynthSpec(classes=3, images_per_class=7, val_images=9, test_images=4, mean_bytes=3000)
Images = dict[str, str]


def write_kind(folder: Path, kind: str, spec: SynthSpec = SPEC) -> Path:
    if kind == "hf-parquet":
        pytest.importorskip("pyarrow")
    synth.write_files(folder, kinds.files_of(kind, spec))
    return folder


def in_tar(file: BinaryIO | None) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a tar, of the tars in it and of the tar.gz in it, by the standard library."""
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        for member in tar:
            body = tar.extractfile(member)
            if body is not None:
                yield from in_tar(cast("BinaryIO", body)) if ".tar" in member.name else [(member.name, body.read())]


def in_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            body = archive.read(name)
            yield from in_tar(io.BytesIO(body)) if ".tar" in name else [(name, body)]


def in_parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    for row in parquet.ParquetFile(path).read().to_pylist():
        yield row["image"]["path"], row["image"]["bytes"]


def images_of(folder: Path) -> Images:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, bytes]]]] = {
        ".zip": in_zip,
        ".parquet": in_parquet,
        ".tar": lambda path: in_tar(io.BytesIO(path.read_bytes())),
        ".gz": lambda path: in_tar(io.BytesIO(path.read_bytes())),
    }
    found: Images = {}
    for path in folder.rglob("*"):
        if path.suffix in readers:
            for name, body in readers[path.suffix](path):
                if name.endswith(".JPEG"):
                    parts = Path(name).stem.split("_")
                    own = "_".join(parts[: 2 if parts[0].startswith("n") else 3])
                    assert own not in found
                    found[own] = hashlib.blake2b(body).hexdigest()
    return found


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return images_of(write_kind(tmp_path_factory.mktemp("official"), "official"))


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "official"])
def test_every_kind_holds_the_same_images(tmp_path: Path, kind: str, official: Images) -> None:
    found = images_of(write_kind(tmp_path, kind))
    assert len(official) == 3 * 7 + 9 + 4
    if kind == "winter21":
        assert found == {name: digest for name, digest in official.items() if name.startswith("n")}
    else:
        assert found == official


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    first, second = (write_kind(tmp_path / name, kind) for name in "ab")
    for path in first.rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_holes_are_refused_where_there_are_none() -> None:
    spec = SynthSpec(classes=1, images_per_class=1, val_images=1, bodies="holes")
    with pytest.raises(UsageError, match="holes"):
        kinds.files_of("kaggle-zip", spec)
    assert kinds.files_of("folder", spec)


def test_the_command_line_offers_every_kind() -> None:
    options = {action.dest: action for action in build_parsers()["synth"]._actions}
    assert options["kind"].choices == kinds.KINDS


# --- through the command line -----------------------------------------------------------------------------------------


def unpacked(base: Path, target: Path, *options: str) -> dict[str, bytes]:
    """Return every file of the published tree and the manifests."""
    assert cli.main(["--base-dir", str(base), "--target-dir", str(target), "--progress", "none", *options]) == 0
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and STATE_FOLDER not in path.parts
    }


OTHERS = tuple(kind for kind in kinds.KINDS if kind not in ("official", "winter21"))
SERIAL = ("--executor", "serial", "--splits", "train,val,test")


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    base = write_kind(tmp_path_factory.mktemp("base"), "official")
    return unpacked(base, base / "out", *SERIAL)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_gives_the_same_tree_and_manifests(tmp_path: Path, kind: str, expected: dict[str, bytes]) -> None:
    assert len(expected) == 3 * 7 + 9 + 4 + 3
    assert unpacked(write_kind(tmp_path, kind), tmp_path / "out", *SERIAL) == expected


def test_imagenet_21k_gives_the_same_train_split(tmp_path: Path) -> None:
    options = ("--executor", "serial", "--splits", "train", "--layout", "wnid")
    expected = unpacked(write_kind(tmp_path / "a", "official"), tmp_path / "a/out", *options)
    assert unpacked(write_kind(tmp_path / "b", "winter21"), tmp_path / "b/out", *options, "--any-wnids") == expected


@pytest.mark.parametrize(
    "kind", ["kaggle-zip", "hf-parquet", "official-targz", "kaggle-targz", "kaggle-zip-targz", "hf-targz"]
)
def test_classes_are_added_later(tmp_path: Path, kind: str, expected: dict[str, bytes]) -> None:
    base = write_kind(tmp_path, kind)
    options = (*SERIAL, "--splits", "train,val")
    some = unpacked(base, tmp_path / "out", *options, "--classes", "1")
    assert {name.split("/")[1] for name in some if name.endswith(".JPEG")} == {"1"}
    for asked in (("--classes", "0-2"), ()):
        assert unpacked(base, tmp_path / "out", *options, *asked) == {
            name: body for name, body in expected.items() if not name.startswith("test")
        }


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_parts_of_a_plan(tmp_path: Path, kind: str, expected: dict[str, bytes]) -> None:
    base = write_kind(tmp_path, kind)
    for part in ("1/2", "0/2"):
        options = ["--base-dir", str(base), "--target-dir", str(tmp_path / "out"), "--progress", "none", "--part", part]
        assert cli.main([*options, *SERIAL]) == 0
        assert not (tmp_path / "out" / "train").exists()
    assert unpacked(base, tmp_path / "out", *SERIAL) == expected


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_damage_of_an_image_fails_its_split_alone(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path, kind)
    if kind == "kaggle-zip":
        path = next(base.glob("*.zip"))
        with zipfile.ZipFile(path) as archive:
            at = 200 + min(info.header_offset for info in archive.infolist() if "Data/CLS-LOC/train/" in info.filename)
    else:
        path, at = next(base.glob("train-*.parquet")), 4  # the header of the first page of images
    data = bytearray(path.read_bytes())
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    options = ["--base-dir", str(base), "--target-dir", str(tmp_path / "out"), "--progress", "none"]
    assert cli.main([*options, *SERIAL]) == 3
    assert not (tmp_path / "out" / "train").exists()
    assert (tmp_path / "out" / "val").exists()


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_another_archive_is_not_mixed_in(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path / "a", kind)
    other = write_kind(tmp_path / "b", kind, replace(SPEC, seed=1))
    options = ["--target-dir", str(tmp_path / "out"), "--progress", "none", *SERIAL]
    assert cli.main(["--base-dir", str(base), *options, "--classes", "1"]) == 0
    assert cli.main(["--base-dir", str(other), *options, "--classes", "0-1"]) == 5


def test_a_zip_whose_directory_is_damaged_cannot_start(tmp_path: Path) -> None:
    path = next(write_kind(tmp_path, "kaggle-zip").glob("*.zip"))
    path.write_bytes(path.read_bytes()[:-100])
    assert cli.main(["--base-dir", str(tmp_path), "--target-dir", str(tmp_path / "out"), *SERIAL]) == 5


def test_labels_of_the_solution_in_the_zip_are_taken(tmp_path: Path) -> None:
    """A label that is not the published one shows which were taken."""
    path = next(write_kind(tmp_path / "a", "kaggle-zip").glob("*.zip"))
    again = tmp_path / path.name
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            new.writestr(name, body.replace(b"n01440764 ", b"n01443537 ") if name.startswith("LOC_val") else body)
    found = unpacked(tmp_path, tmp_path / "out", *SERIAL)
    assert {name.split("/")[1] for name in found if name.startswith("val/")} == {"1", "2"}


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_no_digest_is_published_for_other_forms(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_kind(tmp_path, kind)
    assert (
        cli.main(["--base-dir", str(base), "--target-dir", str(tmp_path / "out"), "--verify-archives", "digest"]) == 5
    )
    assert "no SHA-256 is published" in capsys.readouterr().err


def test_parquet_files_need_pyarrow(tmp_path: Path) -> None:
    """Where it cannot be imported, one line says how to install it."""
    base = write_kind(tmp_path, "hf-parquet")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "pyarrow.py").write_text("raise ImportError('not here')")
    package = str(Path(cli.__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), package])}
    command = [sys.executable, "-m", "imagenet_unpack", "--base-dir", str(base), "--target-dir", str(tmp_path / "out")]
    done = subprocess.run([*command, "--progress", "none"], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 5
    assert "pip install 'imagenet_unpack[parquet]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["kaggle-targz", "kaggle-zip-targz"])
def test_labels_that_come_with_a_tar_gz_are_taken(tmp_path: Path, kind: str) -> None:
    base = write_kind(tmp_path / "a", kind)
    swapped = (b"n01440764 ", b"n01443537 ")
    if kind == "kaggle-targz":
        path = base / "LOC_val_solution.csv"
        path.write_bytes(path.read_bytes().replace(*swapped))
    else:
        path = next(base.glob("*.zip"))
        with zipfile.ZipFile(path) as old:
            members = [(name, old.read(name)) for name in old.namelist()]
        with zipfile.ZipFile(path, "w") as new:
            for name, body in members:
                new.writestr(name, body.replace(*swapped) if name.startswith("LOC_val") else body)
    found = unpacked(base, tmp_path / "out", *SERIAL)
    assert {name.split("/")[1] for name in found if name.startswith("val/")} == {"1", "2"}


def test_damage_of_a_tar_gz_in_a_zip_is_found(tmp_path: Path) -> None:
    path = next(write_kind(tmp_path, "kaggle-zip-targz").glob("*.zip"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    options = ["--base-dir", str(tmp_path), "--target-dir", str(tmp_path / "out"), "--progress", "none"]
    assert cli.main([*options, *SERIAL]) == 3
    assert not (tmp_path / "out" / "train").exists()
