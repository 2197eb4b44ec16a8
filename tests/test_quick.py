from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from imagenet_unpack.checking import quick
from imagenet_unpack.targets import manifest

CLASSES = 23


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A split of classes of 1 to 23 images, with its manifest beside it."""
    rows = []
    for index in range(CLASSES):
        folder = tmp_path / "train" / str(index)
        folder.mkdir(parents=True)
        for number in range(index + 1):
            (folder / f"n_{number}.JPEG").touch()
            rows.append(manifest.row(f"train/{index}/n_{number}.JPEG", index, "n01440764", 0, 2))
    manifest.write(tmp_path / "train.manifest.tsv", [sorted(rows)])
    return tmp_path / "train"


def agreeing(root: Path, *, parts: int = 10, workers: int = 2) -> tuple[dict[str, tuple[int, int]], set[quick.Span]]:
    """Return class index and images of the folders that agree, and the spans that do not."""
    path = root.with_name("train.manifest.tsv")
    spans = manifest.class_ranges(path, parts)
    left, found = set(spans), {}
    with quick.listing(root, path, spans, workers) as results:
        for span, classes in results:
            left.remove(span)
            found.update({folder.decode(): (index, images) for folder, index, images in classes})
    return found, left


@pytest.mark.parametrize("workers", [1, 2, 40])
@pytest.mark.parametrize("parts", [1, 10, 100])
def test_a_whole_tree_agrees(root: Path, parts: int, workers: int) -> None:
    found, left = agreeing(root, parts=parts, workers=workers)
    assert found == {str(index): (index, index + 1) for index in range(CLASSES)}
    assert not left


def test_no_span_is_compared_twice(tmp_path: Path) -> None:
    rows = []
    for index in range(500):
        (tmp_path / "train" / f"{index:04}").mkdir(parents=True)
        (tmp_path / "train" / f"{index:04}" / "a.JPEG").touch()
        rows.append(manifest.row(f"train/{index:04}/a.JPEG", index, "n01440764", 0, 2))
    path = tmp_path / "train.manifest.tsv"
    manifest.write(path, [rows])
    spans = manifest.class_ranges(path, 10_000)
    for _ in range(5):
        with quick.listing(tmp_path / "train", path, spans, 8) as results:
            assert sorted(span for span, _ in results) == spans


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "link", "folder", "fifo", "class", "class link"])
def test_what_differs_is_left_to_the_caller(root: Path, tmp_path: Path, workers: int, damage: str) -> None:
    victim = root / "7" / "n_3.JPEG"
    if damage == "extra":
        victim.with_name("x").touch()
    elif damage == "renamed":
        victim.rename(victim.with_name("x"))
    elif damage == "class link":
        victim.parent.rename(tmp_path / "elsewhere")
        victim.parent.symlink_to(tmp_path / "elsewhere")
    elif damage == "class":
        victim.parent.rename(tmp_path / "elsewhere")
    else:
        victim.unlink()
        if damage == "link":
            victim.symlink_to(root / "7" / "n_2.JPEG")
        elif damage == "folder":
            victim.mkdir()
        elif damage == "fifo":
            os.mkfifo(victim)
    found, left = agreeing(root, parts=100, workers=workers)
    assert len(left) == 1
    assert found == {str(index): (index, index + 1) for index in range(CLASSES) if index != 7}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_manifest_agrees_with_nothing_and_ends_no_worker(root: Path, workers: int) -> None:
    path = root.with_name("train.manifest.tsv")
    data = path.read_bytes()
    at = data.index(b"n_3")
    for byte in (b"\0", b"\t", b"\n", b"/"):
        path.write_bytes(data[:at] + byte + data[at + 1 :])
        found, left = agreeing(root, workers=workers)
        assert left
        assert found
    path.write_bytes(data[: len(manifest.HEADER)] + os.urandom(400))
    assert agreeing(root, workers=workers)[0] == {}


@pytest.mark.parametrize("executable", ["/nonexistent/python", ""])
def test_where_no_worker_can_be_started_this_process_compares(
    root: Path, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert not agreeing(root)[1]


def test_what_workers_that_die_do_not_compare_is_left_to_the_caller(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    found, left = agreeing(root, parts=100)
    assert not found
    assert left == set(manifest.class_ranges(root.with_name("train.manifest.tsv"), 100))


def test_an_end_in_the_middle_leaves_no_worker(root: Path) -> None:
    path = root.with_name("train.manifest.tsv")
    spans = manifest.class_ranges(path, 10)
    with quick.listing(root, path, spans * 5000, 2) as results:  # more than fits into the pipe of the results
        next(results)
        assert len(listers()) == 2
    assert not listers()


def listers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if any("lister" in word for word in each.cmdline())]
