from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import LAYOUTS, SPLITS, ClassRef
from imagenet_unpack.targets import records
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.records import Identity, PlanRecord, SplitRecord, TargetRecord

TEXT = st.text(max_size=20)
NUMBER = st.integers(min_value=0, max_value=1 << 62)
IDENTITIES = st.builds(
    Identity,
    split=st.sampled_from(SPLITS),
    layout=st.sampled_from(LAYOUTS),
    size_bytes=NUMBER,
    mtime_ns=st.integers(min_value=-(1 << 62), max_value=1 << 62),
    headers=TEXT,
    labels=TEXT,
)
PLANS = st.builds(
    PlanRecord,
    identity=IDENTITIES,
    classes=st.lists(st.integers(min_value=-1, max_value=1000)).map(tuple),
    parts=NUMBER,
    shards=TEXT,
    repair=st.booleans(),
)
SPLIT_RECORDS = st.builds(
    SplitRecord,
    identity=IDENTITIES,
    official=st.booleans(),
    classes=st.lists(
        st.builds(ClassRef, index=st.integers(-1, 1000), wnid=TEXT, folder=st.sampled_from(["", "0", "n00000001"])),
        max_size=3,
    ).map(tuple),
    images=NUMBER,
    size_bytes=NUMBER,
    manifest_xxh3=TEXT,
    archive_classes=st.none() | st.lists(st.integers(min_value=-1, max_value=1000)).map(tuple),
    durability=st.just("none"),
    boot_id=TEXT,
)


@given(record=st.one_of(PLANS, SPLIT_RECORDS, st.just(TargetRecord())))
def test_comes_back_as_it_was(record: PlanRecord | SplitRecord | TargetRecord) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


def whole() -> dict[str, object]:
    identity = Identity(split="val", layout="wnid", size_bytes=1, mtime_ns=2, headers="h", labels="l")
    record = SplitRecord(
        identity=identity,
        official=True,
        classes=(ClassRef(index=0, wnid="n00000000", folder="0"),),
        images=1,
        size_bytes=5,
        manifest_xxh3="f",
    )
    return dict(record.to_json())


@pytest.mark.parametrize("key", sorted(whole()))
@pytest.mark.parametrize("value", [None, "", -1, [], {}, True, "../x", [None], [{"index": True}]])
def test_each_member_has_its_type(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "val.json"
    good = whole()
    path.write_text(json.dumps({name: member for name, member in good.items() if name != key}))
    with pytest.raises(TargetError, match="damaged"):
        records.load(path, SplitRecord)
    fits = (type(value) is type(good[key]) and value not in (-1, [None], [{"index": True}], "../x")) or (
        key == "mtime_ns" and value == -1
    )
    if isinstance(value, str) and key in ("headers", "labels", "manifest_xxh3"):
        fits = True
    if key in ("split", "layout"):
        fits = False
    path.write_text(json.dumps(good | {key: value}))
    if fits:
        assert records.load(path, SplitRecord) is not None
    else:
        with pytest.raises(TargetError, match=str(path)):
            records.load(path, SplitRecord)


@pytest.mark.parametrize("folder", ["a/b", "..", "."])
def test_a_class_folder_is_a_bare_name(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(whole() | {"classes": [{"index": 0, "wnid": "n00000000", "folder": folder}]}))
    with pytest.raises(TargetError, match="classes"):
        records.load(path, SplitRecord)


def test_absent_is_none(tmp_path: Path) -> None:
    assert records.load(tmp_path / "train.json", SplitRecord) is None
    assert records.load(tmp_path / "no" / "train.json", SplitRecord) is None


def test_a_record_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"program": "another", "schema": 1}')
    with pytest.raises(TargetError, match="program"):
        records.load(path, TargetRecord)
    records.save(Disk(), path, TargetRecord())
    assert records.load(path, TargetRecord) == TargetRecord()


def test_the_boot_has_an_id() -> None:
    assert records.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
