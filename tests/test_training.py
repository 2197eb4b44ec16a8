from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import factory
import pytest
from PIL import Image

import imagenet_unpack
from imagenet_unpack import training
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012, jpeg
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import CheckError, TargetError, UsageError
from imagenet_unpack.lists import write_lists
from imagenet_unpack.model import LAYOUTS, SplitName
from imagenet_unpack.targets import manifest

SPEC = SynthSpec(classes=12, images_per_class=4, val_images=30, mean_bytes=400)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SPEC)
    return folder


def unpacked(archives: Path, target: Path, *options: str) -> Path:
    arguments = ["--base-dir", str(archives), "--target-dir", str(target), "--executor", "serial", "--progress", "none"]
    assert cli.main([*arguments, *options]) == 0
    return target


@pytest.fixture(scope="module", params=LAYOUTS)
def target(request: pytest.FixtureRequest, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(archives, tmp_path_factory.mktemp("target"), "--layout", request.param)


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_has_its_published_index_in_every_layout(target: Path, split: SplitName) -> None:
    found = training.samples(target, split)
    paths = {path for path, _ in found}
    assert paths == {str(path) for path in (target / split).rglob("*.JPEG")}
    assert len(found) == len(paths)
    assert all(index == factory.published_class(Path(path).name) for path, index in found)
    keys = [(index, Path(path).name) for path, index in found]
    assert keys == sorted(keys)
    assert all(found.wnids[index] == ilsvrc2012.WNIDS[index] for _, index in found)


def test_samples_are_a_sequence(target: Path) -> None:
    found = training.samples(target, "train")
    listed = list(found)
    assert [found[number] for number in range(len(found))] == listed
    assert found[-1] == listed[-1]
    assert found[3:40:7] == listed[3:40:7]
    assert found.targets() == [index for _, index in listed]
    assert list(pickle.loads(pickle.dumps(found))) == listed
    for number in (len(found), -len(found) - 1):
        with pytest.raises(IndexError):
            found[number]


def test_a_subset_keeps_the_indices(archives: Path, tmp_path: Path) -> None:
    target = unpacked(archives, tmp_path, "--classes", "2,5,10-11")
    data = training.ImageNet(target, "train")
    assert sorted(set(data.targets)) == [2, 5, 10, 11]
    assert data.targets == [index for _, index in data.samples]
    assert len(data.classes) == len(data.wnids) == 1000
    assert all(data.class_to_idx[wnid] == index for index, wnid in enumerate(data.wnids))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_images_are_those_of_their_class(target: Path, split: SplitName) -> None:
    data = training.ImageNet(str(target), split)
    assert len(data) == (SPEC.val_images if split == "val" else 48)
    for number in range(len(data)):
        image, index = data[number]
        assert image.mode == "RGB"
        assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((0, 0)), jpeg.class_colour(index), strict=True))


def test_the_transform_is_applied(target: Path) -> None:
    sizes = training.ImageNet(target, "val", transform=lambda image: image.size)
    assert sizes[0][0] == (8, 8)


def test_what_is_odd_in_the_data_set_is_decoded_as_rgb(tmp_path: Path) -> None:
    for name, mode, kind in (("cmyk", "CMYK", "JPEG"), ("grey", "L", "JPEG"), ("png", "RGBA", "PNG")):
        path = str(tmp_path / name)
        Image.new(mode, (9, 9)).save(path, kind)
        assert training.load_image(path).mode == "RGB"


@pytest.mark.parametrize(
    "data", [b"", b"no image", jpeg.flat_jpeg((9, 9, 9), 400, os.urandom), b"\x89PNG\r\n\x1a\n123"]
)
def test_what_cannot_be_decoded_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.JPEG"
    path.write_bytes(data if isinstance(data, bytes) else b"".join(data)[:-20])
    with pytest.raises(OSError, match=r"broken\.JPEG"):
        training.load_image(str(path))


def test_classes_that_are_not_of_imagenet_1k(tmp_path: Path) -> None:
    rows = [manifest.row(f"train/n0000000{k}/n0000000{k}_1.JPEG", k, f"n0000000{k}", 3, 7) for k in range(3)]
    manifest.write(tmp_path / "train.manifest.tsv", [rows])
    (tmp_path / "train").mkdir()
    found = training.samples(tmp_path, "train")
    assert found.wnids == ("n00000000", "n00000001", "n00000002")
    assert [index for _, index in found] == [0, 1, 2]


def test_the_class_folders_of_an_image_made_in_place_are_at_its_root(target: Path, tmp_path: Path) -> None:
    shutil.copytree(target / "train", tmp_path, dirs_exist_ok=True)
    shutil.copy(target / "train.manifest.tsv", tmp_path)
    found = training.samples(tmp_path, "train")
    assert len(found) == 48
    assert all(Path(path).is_file() and Path(path).parents[1] == tmp_path for path, _ in found)
    (first, *_) = write_lists(tmp_path, "dali", tmp_path / "lists")
    assert all((tmp_path / line.split()[0]).is_file() for line in first.read_text().splitlines())


def test_what_is_missing_is_named(target: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"train\.manifest\.tsv"):
        training.samples(tmp_path, "train")
    shutil.copy(target / "train.manifest.tsv", tmp_path)
    with pytest.raises(TargetError, match=str(tmp_path / "train")):
        training.samples(tmp_path, "train")
    with pytest.raises(UsageError, match="validation"):
        training.samples(target, "validation")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"), [(b"\t0\tn0", b"\t1\tn0"), (b"\tn01440764\t", b"\tn01440765\t"), (b"path", b"p")]
)
def test_a_damaged_manifest_gives_no_labels(target: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    (tmp_path / "train").mkdir()
    data = (target / "train.manifest.tsv").read_bytes()
    where = data.rindex(old)
    (tmp_path / "train.manifest.tsv").write_bytes(data[:where] + new + data[where + len(old) :])
    with pytest.raises(CheckError):
        training.samples(tmp_path, "train")


def test_a_full_split_is_ready_soon_and_small(tmp_path: Path) -> None:
    rows = sorted(
        manifest.row(f"train/{k}/{wnid}_{number}.JPEG", k, wnid, 114_000, number)
        for k, wnid in enumerate(ilsvrc2012.WNIDS)
        for number in range(ilsvrc2012.train_images(k))
    )
    manifest.write(tmp_path / "train.manifest.tsv", [rows])
    (tmp_path / "train").mkdir()
    code = (
        "import json, re, sys, time\nfrom imagenet_unpack.training import samples\nbegan = time.process_time()\n"
        "found = samples(sys.argv[1], 'train')\ncpu_s = time.process_time() - began\n"
        "peak_kib = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(json.dumps([len(found), cpu_s, int(peak_kib) / 1024]))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    images, cpu_s, peak_mib = json.loads(run.stdout)
    assert images == ilsvrc2012.TRAIN_IMAGES
    assert cpu_s < 2
    assert peak_mib < 200


def test_nothing_but_the_package_is_imported() -> None:
    code = (
        "import sys\nfrom imagenet_unpack.training import ImageNet\n"
        "print([name for name in ('PIL', 'torch', 'numpy', 'joblib') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_package_exports_them() -> None:
    assert imagenet_unpack.samples is training.samples
    assert imagenet_unpack.ImageNet is training.ImageNet
