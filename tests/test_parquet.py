from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from factory import WNIDS, val_index, val_name, write
from place import Place

from imagenet_unpack.dataset.labels import ValLabels
from imagenet_unpack.errors import ArchiveError, CancelledError, LabelError
from imagenet_unpack.model import SplitName, SplitPlan, class_refs
from imagenet_unpack.planning.parquetfiles import plan_parquet
from imagenet_unpack.sources.parquet import split_of_parquet
from imagenet_unpack.sources.reader import SourceError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

REFS = class_refs(WNIDS, "index")
Row = tuple[str | None, bytes | None, int | None]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def train_rows(classes: int = 3, images: int = 4, size: int = 3000) -> list[Row]:
    rows: list[Row] = [
        (f"{wnid}_{number}_{wnid}.JPEG", noise(size + number, number), index)
        for index, wnid in enumerate(WNIDS[:classes])
        for number in range(images)
    ]
    random.Random(0).shuffle(rows)
    return rows


def val_rows(*numbers: int) -> list[Row]:
    return [
        (f"{val_name(n).removesuffix('.JPEG')}_{WNIDS[val_index(n)]}.JPEG", noise(900, n), val_index(n))
        for n in numbers
    ]


def parquet(path: Path, rows: list[Row], group: int = 5, image: Any = IMAGE, **options: Any) -> Path:
    schema = pa.schema([("image", image), ("label", pa.int64())])
    values = [{"image": {"bytes": body, "path": name}, "label": label} for name, body, label in rows]
    pq.write_table(pa.Table.from_pylist(values, schema), path, row_group_size=group, **options)
    return path


def plan(*paths: Path, split: SplitName = "train", asked: tuple[int, ...] | None = None, **options: Any) -> SplitPlan:
    return plan_parquet(paths, split, REFS, asked, "index", **options)


def extracted(place: Place, planned: SplitPlan) -> dict[str, bytes]:
    for shard in planned.shards:
        place.extract(shard)
    return place.files()


def expected(rows: list[Row]) -> dict[str, bytes | None]:
    own = {f"_{wnid}.JPEG": ".JPEG" for wnid in WNIDS[:10]}
    named = ((next((name.replace(*each) for each in own.items() if name.endswith(each[0])), name), row)
             for row in rows for name in [row[0] or ""])  # fmt: skip
    return {f"{row[2]}/{name}": row[1] for name, row in named}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("image", [IMAGE, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])])
def test_train_images_under_their_own_names(place: Place, tmp_path: Path, compression: str, image: Any) -> None:
    rows = train_rows()
    planned = plan(parquet(tmp_path / "a.parquet", rows, compression=compression, image=image))
    assert (planned.images, planned.images_exact) == (12, True)
    assert planned.content_bytes >= sum(len(row[1] or b"") for row in rows)
    assert pickle.loads(pickle.dumps(planned.shards)) == planned.shards
    assert extracted(place, planned) == expected(rows)
    assert place.pace.created == 12
    assert sum(place.pace.windows) > 0


def test_several_files_make_one_split(place: Place, tmp_path: Path) -> None:
    rows = train_rows()
    paths = [parquet(tmp_path / f"train-{n:05d}-of-00003.parquet", rows[n::3]) for n in range(3)]
    planned = plan(*paths[::-1])
    assert len(planned.files) == 3
    assert planned.archive.headers == plan(*paths).archive.headers
    assert extracted(place, planned) == expected(rows)
    with pytest.raises(ArchiveError, match=r"train-00001-of-00003\.parquet: no such file"):
        plan(paths[0], paths[2])


def test_validation_and_test_images(place: Place, tmp_path: Path) -> None:
    planned = plan(parquet(tmp_path / "v.parquet", val_rows(3, 1, 8)), split="val")
    assert extracted(place, planned) == {f"{val_index(n)}/{val_name(n)}": noise(900, n) for n in (3, 1, 8)}
    rows: list[Row] = [("ILSVRC2012_test_00000001.JPEG", b"x", -1)]
    planned = plan(parquet(tmp_path / "t.parquet", rows), split="test")
    assert ([ref.index for ref in planned.classes], planned.images) == ([-1], 1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_split_is_that_of_the_names(tmp_path: Path, split: SplitName) -> None:
    rows: dict[str, list[Row]] = {
        "train": train_rows(),
        "val": val_rows(1),
        "test": [("ILSVRC2012_test_00000001.JPEG", b"x", -1)],
    }
    assert split_of_parquet(str(parquet(tmp_path / "x.parquet", rows[split]))) == split


def test_something_else_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"something else.*beach.jpg"):
        split_of_parquet(str(parquet(tmp_path / "x.parquet", [("beach.jpg", b"x", 0)])))
    with pytest.raises(ArchiveError, match=r"something else.*beach.jpg"):  # whatever the file is called
        plan(parquet(tmp_path / "train-00000-of-00001.parquet", [("beach.jpg", b"x", 0)]))
    with pytest.raises(ArchiveError, match="contains no images"):
        split_of_parquet(str(parquet(tmp_path / "x.parquet", [])))
    pq.write_table(pa.table({"label": [1]}), tmp_path / "y.parquet")
    with pytest.raises(ArchiveError, match=r"no column image\.bytes"):
        split_of_parquet(str(tmp_path / "y.parquet"))


def test_labels_that_are_no_class_indices_are_shown(tmp_path: Path) -> None:
    values = [{"image": {"bytes": b"x", "path": "n01440764_1.JPEG"}, "label": "n01440764"}]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    with pytest.raises(ArchiveError, match=r"label 'n01440764' is not a class index"):
        plan(tmp_path / "a.parquet")


def test_a_path_that_is_not_unicode(place: Place, tmp_path: Path) -> None:
    rows = train_rows()
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    assert extracted(place, plan(parquet(tmp_path / "a.parquet", rows).rename(folder / "a.parquet"))) == expected(rows)


def test_planning_can_be_cancelled(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", train_rows())

    def check() -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        plan_parquet([path], "train", REFS, None, "index", check=check)


def test_only_the_classes_asked_for(place: Place, tmp_path: Path) -> None:
    rows = train_rows(5)
    path = parquet(tmp_path / "a.parquet", rows)
    planned = plan(path, asked=(1, 4))
    assert planned.images == 8
    assert planned.content_bytes < plan(path).content_bytes
    assert extracted(place, planned) == expected([row for row in rows if row[2] in (1, 4)])
    with pytest.raises(ArchiveError, match=WNIDS[7]):
        plan(path, asked=(7,))


def test_runs_of_row_groups(place: Place, tmp_path: Path) -> None:
    rows = train_rows()
    planned = plan(parquet(tmp_path / "a.parquet", rows, group=2), run_bytes=40_000)
    assert 1 < len(planned.shards) < 6
    assert extracted(place, planned) == expected(rows)


def test_a_row_group_larger_than_the_window(place: Place, tmp_path: Path) -> None:
    place.pace.window_bytes = 4096
    rows = train_rows(2, 20)
    assert extracted(place, plan(parquet(tmp_path / "a.parquet", rows, group=40))) == expected(rows)
    assert max(place.pace.windows) < 8192


def test_a_shard_is_repeated_over_what_an_earlier_attempt_left(place: Place, tmp_path: Path) -> None:
    rows = train_rows()
    planned = plan(parquet(tmp_path / "a.parquet", rows))
    extracted(place, planned)
    next(place.tree.rglob("*.JPEG")).write_bytes(b"half")
    assert extracted(place, planned) == expected(rows)


@pytest.mark.parametrize(
    "row",
    [
        ("../../x.JPEG", b"x", 0),
        ("a/x.JPEG", b"x", 0),
        ("", b"x", 0),
        (None, b"x", 0),
        ("a\n.JPEG", b"x", 0),
        ("a" * 256, b"x", 0),
        (f"{WNIDS[0]}_1.JPEG", b"x", None),
    ],
)
def test_names_and_labels_that_are_refused(tmp_path: Path, row: Row) -> None:
    with pytest.raises(ArchiveError, match="is refused"):
        plan(parquet(tmp_path / "a.parquet", [*train_rows(), row]))


@pytest.mark.parametrize(
    "row",
    [
        (f"{WNIDS[0]}_99_{WNIDS[0]}.JPEG", b"x", 1),
        (f"{WNIDS[0]}_99_{WNIDS[1]}.JPEG", b"x", 1),
        (f"{WNIDS[0]}_99_{WNIDS[1]}.JPEG", b"x", 0),
        (f"{WNIDS[0]}_99.JPEG", b"x", 1),
        (f"{WNIDS[0]}_99_{WNIDS[0]}.JPEG", b"x", 1000),
        (f"{WNIDS[0]}_99_{WNIDS[0]}.JPEG", b"x", -1),
        (f"{WNIDS[0]}_99_{WNIDS[0]}.JPEG", b"x", 1 << 40),
    ],
)
def test_a_label_that_contradicts_the_name(tmp_path: Path, row: Row) -> None:
    with pytest.raises(LabelError, match=WNIDS[0]):
        plan(parquet(tmp_path / "a.parquet", [*train_rows(), row]))


def test_labels_that_were_given_must_agree(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", val_rows(1, 2))
    given = {val_name(1): val_index(1)}
    assert plan(path, split="val", labels=ValLabels(by_name=given, source="x")).images == 2
    with pytest.raises(LabelError, match="--val-labels"):
        plan(path, split="val", labels=ValLabels(by_name=given | {val_name(2): 0}, source="x"))


def test_images_of_another_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="of the val split, not of train"):
        plan(parquet(tmp_path / "a.parquet", val_rows(1)))


def test_test_images_have_no_label(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="label 3"):
        plan(parquet(tmp_path / "a.parquet", [("ILSVRC2012_test_00000001.JPEG", b"x", 3)]), split="test")


def test_an_image_that_appears_twice(tmp_path: Path) -> None:
    rows = train_rows()
    first, second = parquet(tmp_path / "a.parquet", rows), parquet(tmp_path / "b.parquet", rows[:1])
    with pytest.raises(ArchiveError, match="appears twice"):
        plan(first, second)


def test_a_row_without_an_image(place: Place, tmp_path: Path) -> None:
    planned = plan(parquet(tmp_path / "a.parquet", [*train_rows(), (f"{WNIDS[0]}_99.JPEG", None, 0)]))
    with pytest.raises(ArchiveError, match="has no image"):
        extracted(place, planned)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(tmp_path: Path, keep: float) -> None:
    data = parquet(tmp_path / "a.parquet", train_rows()).read_bytes()
    path = write(tmp_path / "a.parquet", data[: int(len(data) * keep)])
    with pytest.raises(ArchiveError, match="cut off"):
        plan(path)
    with pytest.raises(ArchiveError, match="damaged or not a parquet file"):
        split_of_parquet(str(path))


def test_damage_is_found_or_changes_nothing(place: Place, tmp_path: Path) -> None:
    rows = train_rows(2, 3, 300)
    # With checksums: without them, a changed image is as good as any other to a reader of parquet files.
    whole = parquet(tmp_path / "a.parquet", rows, write_page_checksum=True).read_bytes()
    found = 0
    for at in range(0, len(whole), 41):
        data = bytearray(whole)
        data[at] ^= 0x55
        place.fragment.unlink(missing_ok=True)
        for file in place.tree.rglob("*.JPEG"):
            file.unlink()
        try:
            assert extracted(place, plan(write(tmp_path / "a.parquet", bytes(data)))) == expected(rows)
        except (ArchiveError, LabelError):
            found += 1
    assert found > 50


def test_a_file_that_changes_while_it_is_read(place: Place, tmp_path: Path) -> None:
    planned = plan(parquet(tmp_path / "a.parquet", train_rows()))
    parquet(tmp_path / "a.parquet", train_rows(4))
    with pytest.raises(SourceError, match="changed"):
        extracted(place, planned)
