from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from imagenet_unpack.cli.arguments import build_parsers
from imagenet_unpack.dataset import kinds, synth
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.errors import UsageError

SPEC = SynthSpec(classes=3, images_per_class=7, val_images=9, test_images=4, mean_bytes=3000)
Images = dict[str, str]


def write_kind(folder: Path, kind: str, spec: SynthSpec = SPEC) -> Path:
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
