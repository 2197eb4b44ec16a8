from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import imagenet_unpack
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import UsageError
from imagenet_unpack.model import Problem


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_archives(tmp_path, SynthSpec(classes=3, images_per_class=4, val_images=9, mean_bytes=9000))
    command = ["--base-dir", str(tmp_path), "--target-dir", str(tmp_path / "t"), "--executor", "serial"]
    assert cli.main([*command, "--progress", "none"]) == 0
    return tmp_path / "t"


def encoded(kind: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (16, 16)).save(out, kind)
    return out.getvalue()


def problems(target: Path, workers: int = 1) -> tuple[Problem, ...]:
    return imagenet_unpack.check(target, contents=True, workers=workers).splits["train"].problems


def test_synthetic_images_are_whole(target: Path) -> None:
    found = imagenet_unpack.check(target, contents=True, workers=1)
    assert found.ok
    assert not any(check.notes for check in found.splits.values())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (encoded("JPEG")[:-2], "truncated"),
        (encoded("JPEG") + bytes(100), ""),
        (encoded("PNG"), "PNG"),
        (encoded("PNG")[:-6], "PNG, truncated"),
        (encoded("GIF"), "GIF"),
        (bytes(5000), "zeros"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x1f\x8b\x08 ", "gzip"),
        (b"abc", "no image"),
        (encoded("JPEG", "L"), ""),
    ],
)
def test_what_an_image_holds(target: Path, data: bytes, words: str) -> None:
    image = next((target / "train" / "1").iterdir())
    image.write_bytes(data)
    found = problems(target)
    assert len(found) == bool(words)
    for problem in found:
        assert (problem.class_name, problem.path, problem.kind) == ("1", f"train/1/{image.name}", "unreadable")
        assert words in str(problem.found)


def test_published_oddities_are_notes(target: Path) -> None:
    cmyk = sorted(ilsvrc2012.cmyk_images())
    assert len(cmyk) == 22
    folder = target / "train" / "0"
    for name in cmyk:
        (folder / name).write_bytes(encoded("JPEG", "CMYK"))
    (folder / ilsvrc2012.PNG_IMAGE).write_bytes(encoded("PNG"))
    check = imagenet_unpack.check(target, contents=True, workers=1).splits["train"]
    assert {problem.kind for problem in check.problems} == {"extra"}
    assert any(ilsvrc2012.PNG_IMAGE in note and "published" in note for note in check.notes)
    assert any("22 CMYK images: 22 of the 22" in note for note in check.notes)


def test_another_cmyk_image_is_named(target: Path) -> None:
    image = next((target / "train" / "2").iterdir())
    image.write_bytes(encoded("JPEG", "CMYK"))
    check = imagenet_unpack.check(target, contents=True, workers=1).splits["train"]
    assert not check.problems
    assert image.name in check.notes[0]


def test_the_command_lists_by_class(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for image in (target / "train" / "1").iterdir():
        image.write_bytes(b"")
    assert cli.main(["check", str(target), "--contents", "--progress", "none"]) == 4
    out = capsys.readouterr().out
    assert "4 unreadable" in out
    assert "an empty file" in out
    assert cli.main(["check", str(target), "--contents", "--json", "--progress", "none"]) == 4
    value = json.loads(capsys.readouterr().out)
    assert [problem["class"] for problem in value["splits"]["train"]["problems"]] == ["1"] * 4
    with pytest.raises(UsageError, match="mount"):
        imagenet_unpack.check(target / "train.manifest.tsv", contents=True)


def test_many_folders_are_shared_among_workers(tmp_path: Path) -> None:
    write_archives(tmp_path, SynthSpec(classes=30, images_per_class=2, val_images=0, mean_bytes=300))
    command = ["--base-dir", str(tmp_path), "--target-dir", str(tmp_path / "t"), "--executor", "serial"]
    assert cli.main([*command, "--progress", "none"]) == 0
    image = next((tmp_path / "t" / "train" / "29").iterdir())
    image.write_bytes(b"")
    (problem,) = problems(tmp_path / "t", workers=2)
    assert problem.path == f"train/29/{image.name}"
