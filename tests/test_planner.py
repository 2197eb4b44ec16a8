from __future__ import annotations

import os
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from factory import END, WNIDS, header, images, member, tar, train_plan, train_tar, val_index, val_name, val_plan, write
from hypothesis import given
from hypothesis import strategies as st

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import ValLabels, load_val_labels
from imagenet_unpack.errors import ArchiveError, LabelError, UsageError
from imagenet_unpack.model import SplitPlan, class_refs
from imagenet_unpack.planning import official, planner
from imagenet_unpack.planning.flat import plan_val
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.tar import TarRun


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("0", (0,)), ("2-4,1", (1, 2, 3, 4)), (" 7 , n01440764 ", (0, 7)), ("999", (999,)), ("3,3,n01484850", (2, 3))],
)
def test_classes(spec: str, expected: tuple[int, ...]) -> None:
    assert planner.parse_classes(spec, WNIDS) == expected


@pytest.mark.parametrize("spec", ["", ",", "1000", "-1", "3-1", "0-1000", "tench", "n00000000", "1.5", "@/none", "٣"])
def test_what_names_no_class(spec: str) -> None:
    with pytest.raises(UsageError):
        planner.parse_classes(spec, WNIDS)


sizes = st.lists(st.integers(0, 2000), min_size=1, max_size=12)


@given(st.dictionaries(st.sampled_from(WNIDS[:30]), sizes, min_size=1, max_size=8))
def test_a_train_plan_covers_every_member_once(classes: dict[str, list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        inner = {wnid: tar(images(wnid, [bytes(n) for n in each])) for wnid, each in classes.items()}
        path = write(Path(folder, "train.tar"), train_tar(inner))
        plan = train_plan(path)
        data = path.read_bytes()
    assert {shard.id for shard in plan.shards} == set(classes)
    assert sum(shard.size_bytes for shard in plan.shards) == sum(map(len, inner.values()))
    for shard in plan.shards:
        assert data[shard.offset : shard.end] == inner[shard.id]
        assert shard.classes[0].wnid == shard.id
    assert [shard.size_bytes for shard in plan.shards] == sorted((len(each) for each in inner.values()), reverse=True)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3000)), min_size=1, max_size=30, unique_by=lambda x: x[0]),
    st.integers(1, 9000),
)
def test_a_val_plan_covers_every_member_once(entries: list[tuple[int, int]], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = tar((val_name(number), bytes(size)) for number, size in entries)
        plan = val_plan(write(Path(folder, "val.tar"), data), run_bytes=shard_bytes)
    every = [m for m in iter_members(lambda at, n: data[at : at + n], 0, len(data), "") if isinstance(m, Member)]
    spans = sorted((shard.offset, shard.end) for shard in plan.shards)
    assert spans[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    taken: Counter[str] = Counter()
    for shard in plan.shards:
        assert isinstance(shard.payload, TarRun)
        labels = shard.payload.labels
        assert labels is not None
        inside = [m.name for m in every if shard.offset <= m.header_offset < shard.end]
        assert set(inside) == set(labels)
        taken.update(inside)
        assert all(shard.classes[labels[name]].index == val_index(int(name[15:23])) for name in inside)
        assert shard.size_bytes <= shard_bytes or len(inside) == 1
    assert taken == Counter(val_name(number) for number, _ in entries)
    assert plan.images == len(entries)
    assert plan.content_bytes == sum(size for _, size in entries)


def test_val_of_some_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "v", tar((val_name(n), b"x" * n) for n in (1, 2, 3)))
    index = val_index(2)
    plan = val_plan(path, asked=(index,))
    assert [ref.index for ref in plan.classes] == [index]
    assert plan.images == sum(val_index(n) == index for n in (1, 2, 3))
    with pytest.raises(ArchiveError, match="n0"):
        val_plan(path, asked=(index, next(i for i in range(1000) if i not in {val_index(n) for n in (1, 2, 3)})))


def plan_of(tmp_path: Path, data: bytes) -> SplitPlan:
    return train_plan(write(tmp_path / "a.tar", data))


INNER = tar(images(WNIDS[0], [b"x"]))


class TestFaultsOfTheTrainArchive:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "empty"),
            (END, "no class"),
            (train_tar({WNIDS[0]: INNER})[:-10240], "cut off"),
            (train_tar({WNIDS[0]: INNER})[:700], "more than the archive holds"),
            (train_tar({WNIDS[0]: INNER}) + b"garbage" + bytes(505), "behind its end"),
            (train_tar({"n99999999": INNER}), "n99999999"),
            (train_tar({WNIDS[0]: b""}), "is empty"),
            (tar([(f"{WNIDS[0]}.tar", INNER), (f"{WNIDS[0]}.tar", INNER)]), "twice"),
            (tar([(f"{WNIDS[0]}_1.JPEG", b"x")]), "inner tar"),
            (tar([(val_name(1), b"x")]), "validation archive"),
            (member(b"../n01440764.tar", INNER) + END, "refused"),
            (member(b"n01440764.tar", b"", kind=b"2", link=b"/etc/passwd") + END, "symbolic link"),
            (b"\x1f\x8b" + bytes(2000), "gzip"),
            (b"not a tar at all" * 100, "a text file"),
            (b"\1\2\3" * 1000, "no valid tar header"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_are_named(self, tmp_path: Path, data: bytes, words: str) -> None:
        with pytest.raises(ArchiveError, match=words) as caught:
            plan_of(tmp_path, data)
        assert "a.tar" in str(caught.value)

    def test_no_file_a_folder_and_a_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path / "none", tmp_path, tmp_path / "fifo"):
            with pytest.raises(ArchiveError, match=str(path)):
                train_plan(path)

    def test_a_cut_off_download_is_told_by_class(self, tmp_path: Path) -> None:
        """With the published sizes, the byte where the file ends says which class was being downloaded."""
        sizes = ilsvrc2012.train_inner_tar_bytes()
        path = tmp_path / "t.tar"
        with open(path, "wb") as file:
            for index in range(3):
                file.write(header(f"{WNIDS[index]}.tar".encode(), size=b"%011o\0" % sizes[index]))
                file.seek(sizes[index], os.SEEK_CUR)
            file.truncate(file.tell() - 5000)
        with pytest.raises(ArchiveError, match=f"998 classes, from {WNIDS[2]}"):
            train_plan(path)

    def test_a_fault_inside_an_inner_tar_is_not_met_here(self, tmp_path: Path) -> None:
        assert plan_of(tmp_path, train_tar({WNIDS[0]: b"\1" * 2048})).images >= 0


class TestValArchive:
    def test_a_member_without_a_label(self, tmp_path: Path) -> None:
        path = write(tmp_path / "v.tar", tar([(val_name(1), b"x"), ("other.JPEG", b"y")]))
        labels = ValLabels(by_name={val_name(1): 0}, source="labels.txt")
        with pytest.raises(LabelError, match=r"labels\.txt.*other\.JPEG"):
            plan_val(path, class_refs(WNIDS, "index"), None, "index", labels)

    @pytest.mark.parametrize("extension", [".jpeg", ".JPG"])
    def test_another_extension_is_told_or_labelled(self, tmp_path: Path, extension: str) -> None:
        names = [val_name(number).replace(".JPEG", extension) for number in (1, 2)]
        path = write(tmp_path / "v.tar", tar([(name, b"x") for name in names]))
        with pytest.raises(LabelError, match="extension"):
            val_plan(path)
        for listed in (names, [name.removesuffix(extension) for name in names]):
            labels = load_val_labels(write(tmp_path / "l", "".join(f"{name} 7\n" for name in listed).encode()), WNIDS)
            assert plan_val(path, class_refs(WNIDS, "index"), None, "index", labels).images == 2

    def test_wrong_labels_of_any_archive_are_a_note(self, tmp_path: Path) -> None:
        path = write(tmp_path / "v.tar", tar([(val_name(number), b"x") for number in (1, 2)]))
        wrong = {val_name(number): (val_index(number) * 7 + 13) % 1000 for number in (1, 2)}
        labels = ValLabels(by_name=wrong, source="labels.txt")
        notes = plan_val(path, class_refs(WNIDS, "index"), None, "index", labels).notes
        assert any("not the published" in note for note in notes)

    def test_the_same_name_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError, match="twice"):
            val_plan(write(tmp_path / "v.tar", tar([(val_name(1), b"x"), (val_name(1), b"x")])))

    def test_a_train_archive(self, tmp_path: Path) -> None:
        with pytest.raises(LabelError, match="train archive"):
            val_plan(write(tmp_path / "v.tar", train_tar({WNIDS[0]: INNER})))


def test_the_estimate_of_images_is_near(tmp_path: Path) -> None:
    inner = {wnid: tar(images(wnid, [bytes(700 + 13 * n) for n in range(50)])) for wnid in WNIDS[:20]}
    plan = plan_of(tmp_path, train_tar(inner))
    assert not plan.images_exact
    assert plan.images == pytest.approx(1000, rel=0.2)


def test_the_fingerprint_follows_the_headers_and_the_labels(tmp_path: Path) -> None:
    one = plan_of(tmp_path, train_tar({WNIDS[0]: INNER, WNIDS[1]: INNER}))
    other = plan_of(tmp_path, train_tar({WNIDS[1]: INNER, WNIDS[0]: INNER}))
    assert one.archive.size_bytes == other.archive.size_bytes
    assert one.archive.headers != other.archive.headers
    assert one.labels_digest == other.labels_digest


def test_verify_digest_refuses_what_is_not_official(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, train_tar({WNIDS[0]: INNER}))
    with pytest.raises(ArchiveError, match="not the published"):
        official.verify_digest(plan)
