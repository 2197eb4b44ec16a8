"""The states of a split, and what a crash after each single operation leaves of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import xxhash
from crashing import Contents, CrashError, CrashingDisk, Kind, contents

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import ClassRef, Part, ShardDone
from imagenet_unpack.targets import journal, manifest, records
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import STATE_FOLDER, SplitPaths
from imagenet_unpack.targets.records import Identity, PlanRecord, SplitRecord
from imagenet_unpack.targets.split import Split, commit
from imagenet_unpack.targets.states import Found, State

IDENTITY = Identity(split="train", layout="index", size_bytes=10, mtime_ns=5, headers="h", labels="l")
PART = Part()
KINDS = get_args(Kind)


def ref(index: int) -> ClassRef:
    return ClassRef(index=index, wnid=f"n{index:08d}", folder=str(index))


def images(index: int) -> dict[str, bytes]:
    return {f"n{index:08d}_{number}.JPEG": f"{index} {number} ".encode() * 9 for number in range(3)}


def plan_record(classes: tuple[int, ...], *, repair: bool = False) -> PlanRecord:
    return PlanRecord(identity=IDENTITY, classes=classes, parts=1, shards="s", repair=repair)


def split_record(classes: tuple[int, ...]) -> SplitRecord:
    files = [body for index in classes for body in images(index).values()]
    return SplitRecord(
        identity=IDENTITY,
        official=False,
        classes=tuple(map(ref, classes)),
        images=len(files),
        size_bytes=sum(map(len, files)),
        manifest_xxh3="",
    )


def rows(index: int) -> list[bytes]:
    return sorted(
        manifest.row(f"train/{index}/{name}", index, ref(index).wnid, len(body), xxhash.xxh3_64_intdigest(body))
        for name, body in images(index).items()
    )


def extract(split: Split, index: int) -> ShardDone:
    """Write what a worker writes of one class; synced by nobody but `commit`."""
    folder = split.paths.tree / str(index)
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, body in images(index).items():
        (folder / name).write_bytes(body)
    split.paths.fragment(ref(index).wnid).write_bytes(b"".join(rows(index)))
    bytes_written = sum(map(len, images(index).values()))
    return ShardDone(shard=ref(index).wnid, split="train", images=3, size_bytes=bytes_written)


def open_split(target: Path, disk: Disk) -> Split:
    split = Split(SplitPaths(target, "train"), disk)
    split.look()
    split.recover()
    return split


def finish(target: Path, disk: Disk, classes: tuple[int, ...]) -> Split:
    """Do what a run does until these classes are published."""
    split = open_split(target, disk)
    have = {each.index for each in split.record.classes} if split.record else set()
    missing = tuple(index for index in classes if index not in have)
    if missing:
        done = split.begin(plan_record(missing), part=PART)
        for index in missing:
            if ref(index).wnid not in done:
                commit({"train": (split, PART.name, [extract(split, index)])})
        split.stage_manifest(ref(index).wnid for index in missing)
        split.publish(split_record(missing))
    return split


def expected(classes: tuple[int, ...]) -> Contents:
    tree: Contents = {"train": None}
    for index in classes:
        tree[f"train/{index}"] = None
        tree |= {f"train/{index}/{name}": body for name, body in images(index).items()}
    tree["train.manifest.tsv"] = manifest.HEADER + b"".join(row for index in sorted(classes) for row in rows(index))
    return tree


def published(target: Path) -> Contents:
    return {name: body for name, body in contents(target).items() if not name.startswith(STATE_FOLDER)}


@pytest.mark.parametrize("kind", KINDS)
class TestCrashes:
    def test_begin_commit_publish(self, tmp_path: Path, kind: Kind) -> None:
        target = tmp_path / "t"
        numbers = iter(range(10**6))

        def prepare() -> None:
            nonlocal target
            target = tmp_path / str(next(numbers))
            (target / STATE_FOLDER).mkdir(parents=True)

        classes = (0, 3)
        for _ in crashes_in(lambda: target, kind, prepare, lambda disk: finish(target, disk, classes)):
            if (target / "train").exists():
                assert published(target)["train.manifest.tsv"] == expected(classes)["train.manifest.tsv"]
                assert published(target) == expected(classes)
            assert_journal_is_true(target)
            split = finish(target, Disk(), classes)
            assert split.state is State.PUBLISHED
            assert published(target) == expected(classes)
            assert_nothing_left(target)

    def test_extend(self, tmp_path: Path, kind: Kind) -> None:
        target = tmp_path / "t"
        numbers = iter(range(10**6))
        before = tmp_path / "before"
        (before / STATE_FOLDER).mkdir(parents=True)
        finish(before, Disk(), (1, 3))

        def prepare() -> None:
            nonlocal target
            target = Path(shutil.copytree(before, tmp_path / str(next(numbers))))

        for _ in crashes_in(lambda: target, kind, prepare, lambda disk: finish(target, disk, (0, 1, 2, 3))):
            found, whole = published(target), expected((0, 1, 2, 3))
            assert expected((1, 3)).keys() <= found.keys()
            classes = {name.split("/")[1] for name in found if name.count("/") == 1}
            for name, body in whole.items():
                if name.count("/") and name.split("/")[1] in classes:
                    assert found[name] == body
            assert_journal_is_true(target)
            again = open_split(target, Disk())
            assert again.record is not None
            assert published(target) == expected(tuple(each.index for each in again.record.classes))
            finish(target, Disk(), (0, 1, 2, 3))
            assert published(target) == whole
            assert_nothing_left(target)

    def test_repair(self, tmp_path: Path, kind: Kind) -> None:
        target = tmp_path / "t"
        numbers = iter(range(10**6))
        damaged = ["1/n00000001_0.JPEG", "1/n00000001_2.JPEG"]
        before = tmp_path / "before"
        (before / STATE_FOLDER).mkdir(parents=True)
        finish(before, Disk(), (1, 3))
        (before / "train" / damaged[0]).write_bytes(b"damaged")
        (before / "train" / damaged[1]).unlink()
        (before / "train" / "1" / "mine.txt").write_bytes(b"mine")

        def prepare() -> None:
            nonlocal target
            target = Path(shutil.copytree(before, tmp_path / str(next(numbers))))

        def repair(disk: Disk) -> None:
            split = open_split(target, disk)
            done = split.begin(plan_record((1,), repair=True), part=PART)
            if not done:
                commit({"train": (split, PART.name, [extract(split, 1)])})
            split.repair(name for name in damaged if not is_right(target, name))

        for _ in crashes_in(lambda: target, kind, prepare, repair):
            for name in damaged:  # as it was, or repaired
                path = target / "train" / name
                assert not path.exists() or path.read_bytes() in (b"damaged", images(1)[path.name])
            if open_split(target, Disk()).state is State.EXTENDING or not all(is_right(target, n) for n in damaged):
                repair(Disk())
            found = published(target)
            assert found.pop("train/1/mine.txt") == b"mine"
            assert found == expected((1, 3))
            assert_nothing_left(target)


def is_right(target: Path, name: str) -> bool:
    path = target / "train" / name
    return path.exists() and path.read_bytes() == images(1)[path.name]


def crashes_in(
    target: Callable[[], Path], kind: Kind, prepare: Callable[[], None], work: Callable[[Disk], object]
) -> Iterator[int]:
    for after in range(500):
        prepare()
        try:
            work(CrashingDisk(target(), kind, after))
        except CrashError:
            yield after
        else:
            assert after > 8
            return
    raise AssertionError("the work has no end")


def assert_journal_is_true(target: Path) -> None:
    """What the journal names is on the disk, byte by byte."""
    paths = SplitPaths(target, "train")
    for shard in journal.read(paths.home, "train"):
        index = int(shard[1:])
        staged = paths.tree / str(index)
        if not staged.exists():  # being published
            staged = paths.published / str(index)
        assert {path.name: path.read_bytes() for path in staged.iterdir()} == images(index)


def assert_nothing_left(target: Path) -> None:
    """No folder and no temporary file is left in the state folder."""
    left = [path for path in (target / STATE_FOLDER).iterdir() if path.is_dir()]
    assert left == []


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / STATE_FOLDER).mkdir()
    return tmp_path


RECORD = split_record((0,))


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (Found(), State.ABSENT),
        (Found(record=RECORD), State.ABSENT),
        (Found(plan=plan_record((0,))), State.STAGED),
        (Found(plan=plan_record((0,)), intent=RECORD), State.PUBLISHING),
        (Found(published=True, manifest=True, intent=RECORD), State.PUBLISHING),
        (Found(published=True, manifest=True, record=RECORD), State.PUBLISHED),
        (Found(published=True, record=RECORD, plan=plan_record((1,))), State.EXTENDING),
        (Found(published=True), State.FOREIGN),
        (Found(manifest=True), State.FOREIGN),
    ],
)
def test_states(found: Found, state: State) -> None:
    assert found.state is state


def test_an_empty_folder_made_beforehand_is_no_obstacle(target: Path) -> None:
    (target / "train").mkdir()
    assert finish(target, Disk(), (0,)).state is State.PUBLISHED
    assert published(target) == expected((0,))


def test_what_others_made_is_refused(target: Path) -> None:
    (target / "train").mkdir()
    (target / "train" / "mine").touch()
    split = open_split(target, Disk())
    assert split.state is State.FOREIGN
    with pytest.raises(TargetError, match="not made by this program"):
        split.begin(plan_record((0,)), part=PART)


@pytest.mark.parametrize("where", ["", "train", "train/tree"])
def test_links_in_the_state_are_refused(target: Path, tmp_path_factory: pytest.TempPathFactory, where: str) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = target / STATE_FOLDER / where
    if where:
        path.parent.mkdir(exist_ok=True)
    else:
        path.rmdir()
    path.symlink_to(elsewhere)
    with pytest.raises(TargetError, match="link"):
        open_split(target, Disk())
    assert list(elsewhere.iterdir()) == []


def test_a_record_that_is_a_link_is_refused(target: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    finish(target, Disk(), (0,))
    record = target / STATE_FOLDER / "train.json"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train.json"
    record.rename(elsewhere)
    record.symlink_to(elsewhere)
    with pytest.raises(TargetError):
        open_split(target, Disk())


def test_a_published_link_is_not_added_to(target: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    finish(target, Disk(), (0,))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "train"
    (target / "train").rename(elsewhere)
    (target / "train").symlink_to(elsewhere)
    with pytest.raises(TargetError, match="symbolic link"):
        finish(target, Disk(), (0, 1))


def begun(target: Path) -> Split:
    split = open_split(target, Disk())
    split.begin(plan_record((0, 1)), part=PART)
    commit({"train": (split, PART.name, [extract(split, 0)])})
    return split


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size_bytes": 11}, "size"),
        ({"mtime_ns": 6}, "modification time"),
        ({"headers": "x"}, "contents"),
        ({"labels": "x"}, "labels"),
        ({"layout": "wnid"}, "--layout"),
    ],
)
def test_another_archive_is_refused(target: Path, change: dict[str, object], word: str) -> None:
    begun(target)
    plan = replace(plan_record((0, 1)), identity=replace(IDENTITY, **change))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=word):
        open_split(target, Disk()).begin(plan, part=PART)
    assert list(journal.read(target / STATE_FOLDER / "train", "train")) == ["n00000000"]
    done = open_split(target, Disk()).begin(plan_record((0, 1)), part=PART)
    assert list(done) == ["n00000000"]
    if word == "modification time":
        assert open_split(target, Disk()).begin(plan, part=PART, time_counts=False) == done


@pytest.mark.parametrize("data", [b"{}", b"", b"null", b"[" * 200_000, b"\xff", b'{"schema": "x"}', b'{"schema": 99}'])
@pytest.mark.parametrize("name", ["train/plan.json", "train.json", "train/publish.json"])
def test_a_damaged_or_newer_record_is_not_an_absent_one(target: Path, name: str, data: bytes) -> None:
    begun(target)
    path = target / STATE_FOLDER / name
    path.write_bytes(data)
    with pytest.raises(TargetError, match=str(path)) as caught:
        open_split(target, Disk())
    assert ("newer version" in str(caught.value)) == (b"99" in data)
    assert (target / STATE_FOLDER / "train" / "tree" / "0").is_dir()


def test_a_lost_fragment_is_not_an_absent_shard(target: Path) -> None:
    split = begun(target)
    split.paths.fragment("n00000000").unlink()
    with pytest.raises(TargetError, match="n00000000"):
        open_split(target, Disk()).begin(plan_record((0, 1)), part=PART)


def test_discard_throws_away_what_is_damaged_but_nothing_published(target: Path) -> None:
    finish(target, Disk(), (3,))
    begun(target)
    (target / STATE_FOLDER / "train" / "plan.json").write_bytes(b"{}")
    split = Split(SplitPaths(target, "train"), Disk())
    split.discard()
    assert split.state is State.PUBLISHED
    assert published(target) == expected((3,))
    assert_nothing_left(target)


class TestAnotherBoot:
    """What was not synced is believed in the boot in which it was written only."""

    def open(self, target: Path, boot: str) -> Split:
        split = Split(SplitPaths(target, "train"), Disk(durable=False), boot_id=boot)
        split.look()
        split.recover()
        return split

    def test_an_unfinished_run_begins_anew(self, target: Path) -> None:
        split = self.open(target, "first")
        split.begin(plan_record((0, 1)), part=PART)
        commit({"train": (split, PART.name, [extract(split, 0)])})
        assert list(self.open(target, "first").begin(plan_record((0, 1)), part=PART)) == ["n00000000"]
        assert self.open(target, "second").state is State.ABSENT

    def test_a_published_split_says_so(self, target: Path) -> None:
        split = self.open(target, "first")
        split.begin(plan_record((0,)), part=PART)
        commit({"train": (split, PART.name, [extract(split, 0)])})
        split.stage_manifest(["n00000000"])
        split.publish(split_record((0,)))
        again = self.open(target, "second")
        assert again.record is not None
        assert self.open(target, "first").believed(again.record)
        assert not again.believed(again.record)
        again.believe()
        assert again.record is not None
        assert again.believed(again.record)

    def test_a_split_that_is_not_believed_can_be_removed(self, target: Path) -> None:
        finish(target, Disk(), (0,))
        split = open_split(target, Disk())
        split.unpublish()
        assert split.state is State.ABSENT
        assert published(target) == {}
        assert finish(target, Disk(), (0,)).state is State.PUBLISHED


def test_half_a_renamed_folder_is_merged(target: Path) -> None:
    """Object stores rename a folder object by object: killed in between, the same command finishes it."""
    split = begun(target)
    commit({"train": (split, PART.name, [extract(split, 1)])})
    split.stage_manifest(["n00000000", "n00000001"])
    streams = [manifest.rows(split.paths.staged_manifest)]
    manifest.write(split.paths.new_manifest, streams)
    records.save(Disk(), split.paths.intent, split_record((0, 1)))
    half = target / "train" / "1"
    half.mkdir(parents=True)
    moved = next((split.paths.tree / "1").iterdir())
    moved.rename(half / moved.name)
    assert open_split(target, Disk()).state is State.PUBLISHED
    assert published(target) == expected((0, 1))
    assert_nothing_left(target)


def test_a_record_of_version_0_1_0_is_read(target: Path) -> None:
    """Keys as that version wrote them."""
    (target / STATE_FOLDER / "train").mkdir()
    plan = {"schema": 1, "split": "train", "layout": "index", "size": 10, "mtime_ns": 5, "headers": "h", "labels": "l"}
    plan |= {"classes": [0, 1], "parts": 1, "shards": "s"}
    (target / STATE_FOLDER / "train" / "plan.json").write_text(json.dumps(plan))
    (target / STATE_FOLDER / "train" / "tree" / "0").mkdir(parents=True)
    (target / STATE_FOLDER / "train" / "parts").mkdir()
    (target / STATE_FOLDER / "train" / "0-of-1.journal").write_text('\n["n00000000", 3, 54]\n')
    split = open_split(target, Disk())
    extract(split, 0)
    assert list(split.begin(plan_record((0, 1)), part=PART)) == ["n00000000"]
