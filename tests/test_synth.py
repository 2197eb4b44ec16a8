from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.synth import SynthSpec, TarFormat, train_images, val_images, write_archives
from imagenet_unpack.errors import TargetError

SMALL = SynthSpec(classes=3, images_per_class=40, val_images=30, mean_bytes=2000)
TRAIN, VAL = ilsvrc2012.TRAIN_ARCHIVE_NAME, ilsvrc2012.VAL_ARCHIVE_NAME


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "pax"])
def test_the_shape_is_the_real_one(tmp_path: Path, tar_format: TarFormat) -> None:
    write_archives(tmp_path, SynthSpec(classes=2, images_per_class=3, mean_bytes=900, tar_format=tar_format))
    with tarfile.open(tmp_path / TRAIN) as outer:
        assert outer.getnames() == [f"{wnid}.tar" for wnid in ilsvrc2012.WNIDS[:2]]
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                names = inner.getnames()
                assert len(names) == 3
                assert all(name.startswith(member.name[:-4] + "_") and name.endswith(".JPEG") for name in names)
    with tarfile.open(tmp_path / VAL) as flat:
        names = flat.getnames()
    assert len(names) == 50
    assert names != sorted(names)
    listing = subprocess.run(["tar", "-tf", tmp_path / VAL], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == names
    assert listing.stderr == ""


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_archives(tmp_path / name, SynthSpec(classes=1, images_per_class=2, val_images=2, seed=seed))
    assert (tmp_path / "a" / TRAIN).read_bytes() == (tmp_path / "b" / TRAIN).read_bytes()
    assert (tmp_path / "a" / TRAIN).read_bytes() != (tmp_path / "c" / TRAIN).read_bytes()


def bodies(archive: tarfile.TarFile) -> dict[str, bytes]:
    return {member.name: file.read() for member in archive if (file := archive.extractfile(member)) is not None}


def train_bodies(folder: Path) -> dict[str, dict[str, bytes]]:
    with tarfile.open(folder / TRAIN) as outer:
        inner = bodies(outer)
    return {name.removesuffix(".tar"): bodies(tarfile.open(fileobj=io.BytesIO(data))) for name, data in inner.items()}


def val_bodies(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / VAL) as archive:
        return bodies(archive)


def colour(body: bytes) -> object:
    with Image.open(io.BytesIO(body)) as image:
        colours = image.getcolors()
    assert colours is not None
    ((_, found),) = colours
    return found


def test_images_show_their_class_in_both_splits(tmp_path: Path) -> None:
    write_archives(tmp_path, SMALL)
    of_class = {wnid: {colour(body) for body in images.values()} for wnid, images in train_bodies(tmp_path).items()}
    assert len(of_class) == len(set().union(*of_class.values())) == SMALL.classes
    labels = dict(line.split() for line in (tmp_path / "ImageNet_val_label.txt").read_text().splitlines())
    val = val_bodies(tmp_path)
    assert val.keys() == labels.keys()
    assert all({colour(body)} == of_class[labels[name]] for name, body in val.items())


def test_images_of_other_archive_kinds_are_these(tmp_path: Path) -> None:
    write_archives(tmp_path, SMALL)
    assert {image.name: image.body() for image in val_images(SMALL)} == val_bodies(tmp_path)
    train = {ilsvrc2012.WNIDS[k]: {image.name: image.body() for image in train_images(SMALL, k)} for k in range(3)}
    assert train == train_bodies(tmp_path)


def test_sizes_spread_about_the_mean(tmp_path: Path) -> None:
    write_archives(tmp_path, SynthSpec(classes=1, images_per_class=1500, val_images=0, mean_bytes=1000))
    with tarfile.open(tmp_path / TRAIN) as outer:
        first = outer.next()
        assert first is not None
        with tarfile.open(fileobj=outer.extractfile(first)) as inner:
            sizes = sorted(member.size for member in inner)
    assert sum(sizes) / len(sizes) == pytest.approx(1000, rel=0.1)
    assert sizes[-1] > 3 * sizes[len(sizes) // 2]


def test_bodies_are_incompressible_or_holes(tmp_path: Path) -> None:
    zlib = pytest.importorskip("zlib")
    for bodies in ("random", "holes"):
        spec = SynthSpec(classes=1, images_per_class=20, val_images=0, bodies=bodies)
        write_archives(tmp_path / bodies, spec)
    data = (tmp_path / "random" / TRAIN).read_bytes()
    assert len(zlib.compress(data)) > 0.9 * len(data)
    stat = (tmp_path / "holes" / TRAIN).stat()
    assert stat.st_blocks * 512 < stat.st_size / 4


def test_real_counts() -> None:
    assert sum(ilsvrc2012.train_images(index) for index in range(1000)) == ilsvrc2012.TRAIN_IMAGES
    assert SynthSpec(images_per_class=None).images_per_class is None


def test_val_images_are_of_the_chosen_classes_first(tmp_path: Path) -> None:
    write_archives(tmp_path, SMALL)
    labels = dict(line.split() for line in (tmp_path / "ImageNet_val_label.txt").read_text().splitlines())
    counts = {wnid: list(labels.values()).count(wnid) for wnid in ilsvrc2012.WNIDS[:3]}
    assert set(counts.values()) == {10}


def test_existing_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / VAL).write_text("mine")
    with pytest.raises(TargetError, match=VAL):
        write_archives(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [VAL]
    assert (tmp_path / VAL).read_text() == "mine"
