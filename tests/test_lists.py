from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import factory
import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import TargetError, UsageError
from imagenet_unpack.lists import ListFormat, write_lists

SPEC = SynthSpec(classes=11, images_per_class=3, val_images=22, mean_bytes=300)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    write_archives(folder, SPEC)
    command = ["--base-dir", str(folder), "--target-dir", str(folder / "t"), "--executor", "serial"]
    assert cli.main([*command, "--progress", "none"]) == 0
    return folder / "t"


@pytest.mark.parametrize(
    ("list_format", "name", "root"),
    [("caffe", "{}.txt", "{}"), ("dali", "{}.txt", ""), ("paddle", "{}_list.txt", "")],
)
def test_every_image_is_listed_once_with_its_index(
    target: Path, tmp_path: Path, list_format: ListFormat, name: str, root: str
) -> None:
    paths = write_lists(target, list_format, tmp_path / "lists")
    assert [path.name for path in paths] == [name.format("train"), name.format("val")]
    for split, path in zip(("train", "val"), paths, strict=True):
        listed = dict(line.rsplit(" ", 1) for line in path.read_text().splitlines())
        found = {target / root.format(split) / image: int(index) for image, index in listed.items()}
        assert found.keys() == set((target / split).rglob("*.JPEG"))
        for image, index in found.items():
            assert index == factory.published_class(image.name)


def test_the_command_writes_beside_the_splits(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lists", str(target)]) == 0
    assert cli.main(["lists", str(target)]) == 0  # the same again is no harm
    assert str(target / "val.txt") in capsys.readouterr().out
    assert cli.main(["lists", str(target), "--format", "dali"]) == 5
    assert cli.main(["check", str(target), "--progress", "none"]) == 0
    for path in target.glob("*.txt"):
        path.unlink()


def test_xxhsum_verifies_a_copy(target: Path, tmp_path: Path) -> None:
    program = shutil.which("xxhsum")
    if program is None:
        pytest.skip("needs xxhsum (Debian's package xxhash)")
    copy = tmp_path / "copy"
    shutil.copytree(target, copy)
    paths = write_lists(copy, "xxhsum", tmp_path)
    for path in paths:
        subprocess.run([program, "--quiet", "-c", path], cwd=copy, check=True)
    image = next((copy / "train" / "4").iterdir())
    image.write_bytes(image.read_bytes()[:-3] + b"\0\xff\xd9")
    failed = subprocess.run([program, "--quiet", "-c", paths[0]], cwd=copy, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert image.name in failed.stdout


def test_what_cannot_be_listed(target: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no manifest"):
        write_lists(tmp_path, "caffe", tmp_path)
    # Without torch it is the extra that is asked for, with it the layout.
    with pytest.raises(UsageError, match="layout wnid" if find_spec("torch") else "PyTorch"):
        write_lists(target, "torchvision", tmp_path)
    assert not list(tmp_path.iterdir())
