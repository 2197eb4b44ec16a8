from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import WNIDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagenet_unpack.checking import checker, findings
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import Layout, SplitCheck, class_refs
from imagenet_unpack.targets import records
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths

SPEC = SynthSpec(classes=3, images_per_class=4, val_images=6, mean_bytes=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_archives(folder, SPEC)
    assert cli.main(["--base-dir", str(folder), "--executor", "serial", "--progress", "none"]) == 0
    return folder / "ImageNet"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tree"))


def check(target: Path, depth: findings.Depth = "digests") -> dict[str, SplitCheck]:
    return {each.split: each for each in checker.check_target(target, depth=depth, workers=1)}


def found(target: Path, depth: findings.Depth = "digests") -> set[tuple[str, str, str | None]]:
    return {(p.class_name, p.kind, p.path) for each in check(target, depth).values() for p in each.problems}


def image(target: Path, split: str = "train", folder: str = "1") -> Path:
    return min((target / split / folder).iterdir())


def test_a_whole_tree_is_whole(whole: Path) -> None:
    result = check(whole)
    assert not found(whole)
    assert (result["train"].classes, result["train"].images) == (3, 12)
    assert (result["val"].classes, result["val"].images) == (3, 6)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


class TestDamages:
    def test_missing(self, copy: Path) -> None:
        victim = image(copy)
        victim.unlink()
        assert found(copy, "names") == {("1", "missing", f"train/1/{victim.name}")}

    def test_extra(self, copy: Path) -> None:
        (copy / "val" / "2" / "x.JPEG").touch()
        assert found(copy, "names") == {("2", "extra", "val/2/x.JPEG")}

    def test_renamed(self, copy: Path) -> None:
        victim = image(copy)
        victim.rename(victim.with_name("other.JPEG"))
        assert found(copy, "names") == {
            ("1", "missing", f"train/1/{victim.name}"),
            ("1", "extra", "train/1/other.JPEG"),
        }

    def test_in_another_class(self, copy: Path) -> None:
        victim = image(copy)
        victim.rename(copy / "train" / "2" / victim.name)
        assert {kind for _, kind, _ in found(copy, "names")} == {"missing", "extra"}

    def test_an_empty_and_a_missing_class_folder(self, copy: Path) -> None:
        shutil.rmtree(copy / "train" / "0")
        assert ("0", "missing", "train/0") in found(copy, "names")
        (copy / "train" / "0").mkdir()
        assert len(found(copy, "names")) == 4

    def test_a_foreign_folder_and_file(self, copy: Path) -> None:
        (copy / "train" / "77").mkdir()
        (copy / "val" / "notes.txt").touch()
        assert found(copy, "names") == {("77", "extra", "train/77"), ("notes.txt", "extra", "val/notes.txt")}

    def test_size_needs_deep(self, copy: Path) -> None:
        victim = image(copy)
        victim.write_bytes(victim.read_bytes() + b"x")
        assert not found(copy, "names")
        assert found(copy) == {("1", "size", f"train/1/{victim.name}")}

    def test_a_flipped_bit_needs_deep(self, copy: Path) -> None:
        flip(image(copy))
        assert not found(copy, "sizes")
        assert {kind for _, kind, _ in found(copy)} == {"digest"}

    def test_a_link_and_a_folder_in_place_of_an_image(self, copy: Path) -> None:
        victim = image(copy)
        victim.rename(copy / "elsewhere")
        victim.symlink_to(copy / "elsewhere")
        assert ("1", "missing", f"train/1/{victim.name}") in found(copy, "names")
        victim.unlink()
        victim.mkdir()
        assert ("1", "missing", f"train/1/{victim.name}") in found(copy, "names")

    def test_the_whole_split(self, copy: Path) -> None:
        shutil.rmtree(copy / "val")
        assert ("", "missing", "val") in found(copy, "names")

    def test_the_manifest(self, copy: Path) -> None:
        path = copy / "train.manifest.tsv"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))
        kinds = {kind for _, kind, _ in found(copy, "names")}
        assert {"digest", "extra"} <= kinds
        path.unlink()
        assert ("", "missing", "train.manifest.tsv") in found(copy, "names")


def fifo_as_image(target: Path) -> None:
    victim = image(target)
    victim.unlink()
    os.mkfifo(victim)


def link_as_class(target: Path) -> None:
    (target / "train" / "1").rename(target / "elsewhere")
    (target / "train" / "1").symlink_to(target / "elsewhere")


def file_as_class(target: Path) -> None:
    shutil.rmtree(target / "train" / "1")
    (target / "train" / "1").touch()


def fifo_as(name: str) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        (target / name).unlink()
        os.mkfifo(target / name)

    return make


def folder_as(name: str) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        (target / name).unlink()
        (target / name).mkdir()

    return make


def control_characters(target: Path) -> None:
    (target / "train" / "1" / "a\nb\x1b[31m.JPEG").touch()


def not_utf8(target: Path) -> None:
    Path(os.fsdecode(os.fsencode(target / "train" / "1") + b"/\xff.JPEG")).touch()


def newer_record(target: Path) -> None:
    path = SplitPaths(target, "train").record
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))


def without_record(target: Path) -> None:
    shutil.rmtree(target / ".imagenet_unpack")
    for split in ("train", "val"):
        (target / f"{split}.manifest.tsv").unlink()


def file_as_split(target: Path) -> None:
    without_record(target)
    shutil.rmtree(target / "train")
    (target / "train").touch()


STATE = ".imagenet_unpack/train.json"
MANIFEST = "train.manifest.tsv"


@pytest.mark.parametrize("depth", [[], ["--deep"], ["--contents"]], ids=["names", "deep", "contents"])
@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (fifo_as_image, 4, "not a regular file"),
        (link_as_class, 4, "train/1: unreadable (found a symbolic link)"),
        (file_as_class, 4, "train/1: unreadable (found not a folder)"),
        (control_characters, 4, r"train/1/a\nb\x1b[31m.JPEG: extra"),
        (not_utf8, 4, r"train/1/\xff.JPEG: extra"),
        (fifo_as(MANIFEST), 4, "move train/ away"),
        (folder_as(MANIFEST), 4, "move train/ away"),
        (fifo_as(STATE), 5, "train.json is damaged"),
        (folder_as(STATE), 5, "train.json cannot be read"),
        (newer_record, 5, "newer version"),
        (without_record, 4, "no manifest"),
        (file_as_split, 4, "train: unreadable"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_what_others_made_of_a_tree_has_a_line_and_a_code(
    copy: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    code: int,
    said: str,
    depth: list[str],
) -> None:
    damage(copy)
    assert cli.main(["check", str(copy), "--progress", "none", *depth]) == code
    out, err = capfd.readouterr()
    assert said in (out if code == 4 else err)
    assert "Traceback" not in err


def test_a_split_as_target_is_told_its_parent(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(copy / "train")]) == 5
    assert capfd.readouterr().err.rstrip().endswith(f"give {copy}")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_damage_is_found(whole: Path, data: st.DataObject) -> None:
    """Damage, look, mend; the tree is whole again after each."""
    every = sorted(path for path in whole.rglob("*") if ".imagenet_unpack" not in path.parts and path.is_file())
    victim = data.draw(st.sampled_from([path for path in every if path.stat().st_size]))
    before = victim.read_bytes()
    position = data.draw(st.integers(0, len(before) - 1))
    changed = before[:position] + bytes([before[position] ^ 1]) + before[position + 1 :]
    damages: dict[str, Callable[[], object]] = {
        "removed": victim.unlink,
        "cut": lambda: os.truncate(victim, position),
        "longer": lambda: victim.write_bytes(before + b"\0"),
        "changed": lambda: victim.write_bytes(changed),
    }
    damages[data.draw(st.sampled_from(sorted(damages)))]()
    try:
        problems = found(whole)
        assert problems
        relative = victim.relative_to(whole).as_posix()
        assert any(path == relative or (path or "").startswith(relative.split(".")[0]) for _, _, path in problems)
    finally:
        victim.write_bytes(before)
    assert not found(whole)


def test_a_pool_finds_the_same(tmp_path: Path) -> None:
    """The manifest is long enough to be cut into ranges for several workers."""
    write_archives(tmp_path, SynthSpec(classes=4, images_per_class=300, val_images=6, mean_bytes=300))
    assert cli.main(["--base-dir", str(tmp_path), "--executor", "serial", "--progress", "none"]) == 0
    target = tmp_path / "ImageNet"
    flip(image(target))
    image(target, "val", "0").unlink()
    alone = check(target)
    shared = {each.split: each for each in checker.check_target(target, depth="digests", workers=2)}
    assert shared == alone
    assert len(found(target)) == 2


def test_an_unfinished_split_is_not_whole(whole: Path, copy: Path) -> None:
    paths = SplitPaths(copy, "train")
    record = records.load(paths.record, records.SplitRecord)
    assert record is not None
    paths.home.mkdir()
    plan = records.PlanRecord(identity=record.identity, classes=(0,), parts=1, shards="")
    records.save(Disk(), paths.plan, plan)
    assert check(copy)["train"].problems == ()  # classes are being added: what is published is whole
    paths.record.unlink()
    paths.manifest.unlink()
    shutil.rmtree(paths.published)
    assert ("", "missing", "train") in found(copy)
    paths.plan.write_text("{}")
    with pytest.raises(TargetError, match="damaged"):
        check(copy)


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        check(tmp_path)


class TestTreesOfOthers:
    """No manifest, no record: the published facts are what there is to compare with."""

    def make(self, target: Path, layout: Layout) -> None:
        for number, index in enumerate(ilsvrc2012.val_class_indices(), 1):
            if index in (0, 134, 999):
                folder = target / "val" / class_refs(WNIDS, layout)[index].folder
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ilsvrc2012.val_name(number)).write_bytes(b"x")

    @pytest.mark.parametrize("layout", ["index", "padded", "wnid"])
    def test_layout_is_seen_and_published_names_are_compared(self, tmp_path: Path, layout: Layout) -> None:
        self.make(tmp_path, layout)
        result = check(tmp_path, "names")["val"]
        assert (result.classes, result.images) == (3, 150)
        assert len(result.problems) == 997
        assert {problem.kind for problem in result.problems} == {"missing"}
        folder = class_refs(WNIDS, layout)[134].folder
        victim = image(tmp_path, "val", folder)
        victim.rename(tmp_path / "val" / class_refs(WNIDS, layout)[999].folder / victim.name)
        mine = {(p.class_name, p.kind) for p in check(tmp_path, "names")["val"].problems if p.kind != "missing"}
        other = class_refs(WNIDS, layout)[999].folder
        assert mine == {(folder, "count"), (other, "count"), (other, "extra")}

    def test_train_counts(self, tmp_path: Path) -> None:
        folder = tmp_path / "train" / WNIDS[3]
        folder.mkdir(parents=True)
        for number in range(5):
            (folder / f"{WNIDS[3]}_{number}.JPEG").write_bytes(b"x")
        problems = check(tmp_path, "names")["train"].problems
        (mine,) = (problem for problem in problems if problem.class_name == WNIDS[3])
        assert (mine.kind, mine.expected, mine.found) == ("count", ilsvrc2012.train_images(3), 5)

    def test_empty_images_are_found(self, tmp_path: Path) -> None:
        self.make(tmp_path, "wnid")
        victim = image(tmp_path, "val", WNIDS[0])
        victim.write_bytes(b"")
        assert (WNIDS[0], "size", f"val/{WNIDS[0]}/{victim.name}") in found(tmp_path, "names")
