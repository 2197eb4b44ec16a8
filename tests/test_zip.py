from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from factory import WNIDS, val_index, val_name, write
from place import Place

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import load_val_labels, parse_val_labels
from imagenet_unpack.errors import ArchiveError, CancelledError, LabelError
from imagenet_unpack.extract.extractor import extract_shard
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.model import SplitName, SplitPlan, class_refs
from imagenet_unpack.planning.kagglezip import KaggleZip
from imagenet_unpack.sources.reader import SourceError

ROOT = "ILSVRC/Data/CLS-LOC"
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
REFS = class_refs(WNIDS, "index")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def train_members(classes: int = 2, images: int = 4, size: int = 3000) -> list[tuple[str, bytes]]:
    return [
        (f"{ROOT}/train/{wnid}/{wnid}_{number}.JPEG", noise(size + number, number) + bytes(500))
        for wnid in WNIDS[:classes]
        for number in range(images)
    ]


def archive(members: Iterable[tuple[str, bytes]], method: int = DEFLATED, *, streamed: bool = False) -> bytes:
    """A zip by the standard library; `streamed`: with data descriptors, as a pipe gets it."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise OSError

        def tell(self) -> int:
            raise OSError

    out: io.BytesIO = Pipe() if streamed else io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as made:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, body in members:
            made.writestr(name, body)
    return out.getvalue()


def plan(path: Path, split: SplitName = "train", asked: tuple[int, ...] | None = None) -> SplitPlan:
    return KaggleZip(path, WNIDS).plan(split, REFS, asked, "index", load_val_labels(None, WNIDS))


def extracted(place: Place, planned: SplitPlan) -> dict[str, bytes]:
    for shard in planned.shards:
        place.extract(shard)
    return place.files()


def expected(members: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    parts = ((name.split("/"), body) for name, body in members)
    return {f"{WNIDS.index(path[4])}/{path[5]}": body for path, body in parts}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("method", [STORED, DEFLATED])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("window", [512, 4096, 8 << 20])
def test_train_members_of_several_classes(
    place: Place, tmp_path: Path, method: int, streamed: bool, window: int
) -> None:
    place.pace.window_bytes = window
    members = train_members(3)
    noted = [("ILSVRC/", b""), (f"{ROOT}/train/", b""), ("ILSVRC/Annotations/CLS-LOC/val/x.xml", b"<a/>")]
    planned = plan(write(tmp_path / "k.zip", archive([*noted, *members], method, streamed=streamed)))
    assert (planned.images, planned.images_exact) == (12, True)
    assert planned.content_bytes == sum(len(body) for _, body in members)
    assert pickle.loads(pickle.dumps(planned.shards)) == planned.shards
    assert extracted(place, planned) == expected(members)
    assert place.pace.created == 12


def test_validation_images_go_where_their_labels_say(place: Place, tmp_path: Path) -> None:
    members = [(f"{ROOT}/val/{val_name(number)}", noise(900, number)) for number in (5, 1, 3)]
    planned = plan(write(tmp_path / "k.zip", archive([*train_members(), *members])), "val")
    assert extracted(place, planned) == {
        f"{val_index(number)}/{val_name(number)}": body for number, (_, body) in zip((5, 1, 3), members, strict=True)
    }


def test_test_images_have_no_class(tmp_path: Path) -> None:
    path = write(tmp_path / "k.zip", archive([(f"{ROOT}/test/ILSVRC2012_test_00000001.JPEG", b"x")]))
    planned = plan(path, "test")
    assert [ref.index for ref in planned.classes] == [-1]
    assert planned.images == 1


def test_the_solution_in_the_zip_gives_labels(tmp_path: Path) -> None:
    text = f"ImageId,PredictionString\n{val_name(7)[:-5]},{WNIDS[3]} 85 1 499 272\n"
    path = write(
        tmp_path / "k.zip", archive([(f"{ROOT}/val/{val_name(7)}", b"x"), ("LOC_val_solution.csv", text.encode())])
    )
    found = KaggleZip(path, WNIDS)
    assert found.solution is not None
    labels = parse_val_labels(found.solution, "k.zip", WNIDS)
    assert [ref.index for ref in found.plan("val", REFS, None, "index", labels).classes] == [3]


def test_only_the_classes_asked_for(place: Place, tmp_path: Path) -> None:
    members = train_members(5)
    path = write(tmp_path / "k.zip", archive(members))
    planned = plan(path, asked=(1, 4))
    assert planned.images == 8
    assert extracted(place, planned) == expected(
        each for each in members if each[0].split("/")[4] in (WNIDS[1], WNIDS[4])
    )
    with pytest.raises(ArchiveError, match=WNIDS[7]):
        plan(path, asked=(7,))


def test_a_directory_in_another_order_than_the_members(place: Place, tmp_path: Path) -> None:
    members = train_members(3)
    planned = plan(write(tmp_path / "k.zip", reordered(archive(members))))
    assert extracted(place, planned) == expected(members)


def reordered(data: bytes) -> bytes:
    """The same zip with its directory back to front."""
    end = data.rindex(b"PK\5\6")
    size, offset = struct.unpack_from("<2L", data, end + 12)
    entries = [b"PK\1\2" + rest for rest in data[offset : offset + size].split(b"PK\1\2")[1:]]
    return data[:offset] + b"".join(reversed(entries)) + data[end:]


def test_runs_are_cut_and_cover_every_member(place: Place, tmp_path: Path) -> None:
    members = train_members(3)
    path = write(tmp_path / "k.zip", archive(members))
    planned = KaggleZip(path, WNIDS, run_bytes=10_000).plan("train", REFS, None, "index")
    assert len(planned.shards) > 3
    assert extracted(place, planned) == expected(members)


def test_a_shard_is_repeated_over_what_an_earlier_attempt_left(place: Place, tmp_path: Path) -> None:
    members = train_members()
    planned = plan(write(tmp_path / "k.zip", archive(members)))
    extracted(place, planned)
    next(place.tree.rglob("*.JPEG")).write_bytes(b"half")
    assert extracted(place, planned) == expected(members)


def test_a_leading_folder_and_leftovers_of_operating_systems(place: Place, tmp_path: Path) -> None:
    members = train_members()
    wnid = WNIDS[0]
    leftovers = [(f"{ROOT}/train/{wnid}/._{wnid}_0.JPEG", b"x"), (f"{ROOT}/train/{wnid}/.DS_Store", b"x")]
    leftovers += [(f"__MACOSX/{ROOT}/train/{wnid}/._x", b"x")]
    moved = [(name if name.startswith("__MACOSX") else f"kaggle/{name}", body) for name, body in [*leftovers, *members]]
    planned = plan(write(tmp_path / "k.zip", archive(moved)))
    assert extracted(place, planned) == expected(members)
    assert any("2 files" in note for note in planned.notes)


def test_zip64_sizes_and_offsets(place: Place, tmp_path: Path) -> None:
    members = train_members(1)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", DEFLATED) as made:
        for name, body in members:
            with made.open(name, "w", force_zip64=True) as file:
                file.write(body)
    data = with_zip64_entries(out.getvalue())
    assert extracted(place, plan(write(tmp_path / "k.zip", data))) == expected(members)


def with_zip64_entries(data: bytes) -> bytes:
    """The same zip, sizes and offsets of its directory in zip64 fields, behind a zip64 end record."""
    end = data.rindex(b"PK\5\6")
    count, size, offset = struct.unpack_from("<H2L", data, end + 10)
    directory = b""
    for rest in data[offset : offset + size].split(b"PK\1\2")[1:]:
        entry = bytearray(b"PK\1\2" + rest)
        compressed, plain, name, extra = struct.unpack_from("<2L2H", entry, 20)
        (at,) = struct.unpack_from("<L", entry, 42)
        struct.pack_into("<2L", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
        struct.pack_into("<H", entry, 30, 28)
        directory += bytes(entry[: 46 + name]) + struct.pack("<2H3Q", 1, 24, plain, compressed, at)
        assert extra == 0
    at = offset + len(directory)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:offset] + directory + record + locator + last


# --- refused by the plan ------------------------------------------------------------------------------------------


def patched(data: bytes, at: int, field: bytes) -> bytes:
    """A zip with a field of its first directory entry changed."""
    offset = data.index(b"PK\1\2") + at
    return data[:offset] + field + data[offset + len(field) :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: patched(data, 8, b"\x01\0"), "is encrypted"),
        (lambda data: patched(data, 10, b"\x0e\0"), "compression method 14"),
        (lambda data: patched(data, 38, struct.pack("<L", 0o120777 << 16)), "symbolic link"),
        (lambda data: patched(data, 38, struct.pack("<L", 0o010777 << 16)), "not a regular file"),
        (lambda data: patched(data, 42, struct.pack("<L", 1 << 30)), "overlap"),
        (lambda data: patched(data, 20, struct.pack("<L", 1 << 20)), "overlap"),
        (lambda data: patched(data, 0, b"XX"), "no directory entry"),
        (lambda data: patched(data, 28, b"\xff\xff"), "cut off|no directory entry"),
        (lambda data: data[:-30], "no zip directory at its end"),
        (lambda data: data[: len(data) // 2], "no zip directory at its end"),
        (lambda data: b"bytes before it" + data, "put before it"),
        (lambda data: data[:-12] + b"\xff\xff" + data[-10:], "entries instead of"),
    ],
    ids=[
        "encrypted",
        "method",
        "link",
        "fifo",
        "outside",
        "overlap",
        "entry",
        "name",
        "end",
        "half",
        "before",
        "count",
    ],
)
def test_what_is_damaged_or_hostile_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = write(tmp_path / "k.zip", spoil(archive(train_members())))
    with pytest.raises(ArchiveError, match=message) as caught:
        plan(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        f"{ROOT}/train/{WNIDS[0]}/../../../../x.JPEG",
        f"{ROOT}/train/{WNIDS[0]}/..",
        f"{ROOT}/train/{WNIDS[0]}/a\x07.JPEG",
        f"{ROOT}/train/{WNIDS[0]}/" + "a" * 256,
        f"{ROOT}/train/n99999999/n99999999_1.JPEG",
        f"{ROOT}/train/n01440764_1.JPEG",
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "k.zip", archive([*train_members(), (name, b"x")]))
    with pytest.raises(ArchiveError, match=r"member|name"):
        plan(path)


@pytest.mark.parametrize(
    "folder",
    ["ILSVRC/Data/CLS-LOX/train/n01440764/", "ILSVRC/Data/", "other/", "ILSVRC\\Data\\CLS-LOC\\train\\n01440764\\"],
)
def test_an_image_in_another_place_is_refused(tmp_path: Path, folder: str) -> None:
    path = write(tmp_path / "k.zip", archive([*train_members(), (f"{folder}n01440764_18.JPEG", b"x")]))
    with pytest.raises(ArchiveError, match=r"n01440764_18.* is not where"):
        plan(path)


def test_other_numbers_of_images_than_published_are_noted(tmp_path: Path) -> None:
    members = [(f"{ROOT}/train/{wnid}/{wnid}_1.JPEG", b"x") for wnid in WNIDS]
    assert any("1 instead of 1300" in note for note in plan(write(tmp_path / "k.zip", archive(members))).notes)
    assert not plan(write(tmp_path / "k.zip", archive(members[1:]))).notes


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    data = archive([(f"{ROOT}/train/{WNIDS[0]}/{WNIDS[0]}_aé.JPEG", b"x")]).replace("é".encode(), b"\xe9\xe9")
    with pytest.raises(ArchiveError, match="not UTF-8"):
        plan(write(tmp_path / "k.zip", data))


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    members = [
        *train_members(),
        ("LOC_val_solution.csv", b"a"),
        ("imagenet_object_localization_patched2019.tar.gz", b"b"),
    ]
    for twice in (members[2], *members[-2:]):
        path = write(tmp_path / "k.zip", archive([*members, twice]))
        with pytest.raises(ArchiveError, match="appears twice"):
            plan(path)
    assert (
        KaggleZip(write(tmp_path / "k.zip", archive([("a/LOC_val_solution.csv", b"c"), *members])), WNIDS).solution
        == b"a"
    )


def test_reading_the_directory_can_be_cancelled(tmp_path: Path) -> None:
    def check() -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        KaggleZip(write(tmp_path / "k.zip", archive(train_members())), WNIDS, check=check)


def test_a_zip_of_something_else_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"something else.*holiday"):
        plan(write(tmp_path / "k.zip", archive([("holiday/beach.jpg", b"x")])))
    with pytest.raises(ArchiveError, match="contains no file"):
        plan(write(tmp_path / "k.zip", archive([])))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no val split"):
        plan(write(tmp_path / "k.zip", archive(train_members())), "val")


def test_a_validation_image_without_a_label(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="ILSVRC2012_val_99999999"):
        plan(write(tmp_path / "k.zip", archive([(f"{ROOT}/val/ILSVRC2012_val_99999999.JPEG", b"x")])), "val")


@pytest.mark.slow
def test_a_directory_of_the_real_size_in_bounded_memory(tmp_path: Path) -> None:
    """1.4 million entries, with holes for data; a process of its own, so that its memory can be told."""
    names = [
        *(f"train/{wnid}/{wnid}_{n}.JPEG" for k, wnid in enumerate(WNIDS) for n in range(ilsvrc2012.train_images(k))),
        *(f"val/{val_name(number)}" for number in range(1, 50_001)),
        *(f"test/ILSVRC2012_test_{number:08d}.JPEG" for number in range(1, 100_001)),
    ]
    path = tmp_path / "imagenet-object-localization-challenge.zip"
    size, offset = 114_000, 0
    directory = bytearray()
    for name in names:
        raw = f"{ROOT}/{name}".encode()
        extra = struct.pack("<2HQ", 1, 8, offset)
        fields = (b"PK\1\2", 0x031E, 45, 0, 8, 0, 0x4000, 1, size, size, len(raw), len(extra), 0, 0, 0, 0o100644 << 16)
        directory += struct.pack("<4s6H3L5H2L", *fields, 0xFFFFFFFF) + raw + extra
        offset += 30 + len(raw) + size
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(names), len(names), len(directory), offset)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(offset)
        file.write(directory + end)
    code = (
        "import sys; from imagenet_unpack.cli.main import main; main(sys.argv[1:]);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    command = ["plan", "--json", "--base-dir", str(tmp_path), "--splits", "train,val,test"]
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, env=environ, check=True
    )
    *lines, peak_kib = done.stdout.splitlines()
    splits = json.loads("".join(lines))["splits"]
    assert {name: split["images"] for name, split in splits.items()} == {
        "train": 1_281_167, "val": 50_000, "test": 100_000,
    }  # fmt: skip
    assert int(peak_kib) < 300 << 10


# --- found while extracting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_flipped_bit_is_found_or_changes_nothing(place: Place, tmp_path: Path, method: int) -> None:
    members = [(name, noise(150)) for name, _ in train_members(1, 2)]
    whole = archive(members, method)
    found = 0
    for at in range(0, whole.index(b"PK\1\2"), 11):
        data = bytearray(whole)
        data[at] ^= 0x10
        place.fragment.unlink(missing_ok=True)
        for file in place.tree.rglob("*.JPEG"):
            file.unlink()
        try:  # times and versions in local headers, and padding bits of deflate, say nothing about the content
            assert extracted(place, plan(write(tmp_path / "k.zip", bytes(data)))) == expected(members)
        except ArchiveError:
            found += 1
            assert not place.fragment.exists()
    assert found > 30


@pytest.mark.parametrize("claimed", [10, 1_999_999, 2_000_001, 5_000_000])
def test_decompression_stops_at_the_stated_size(place: Place, tmp_path: Path, claimed: int) -> None:
    name = f"{ROOT}/train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG"
    data = bytearray(archive([(name, bytes(2_000_000))]))
    for at in (22, data.index(b"PK\1\2") + 24):
        struct.pack_into("<L", data, at, claimed)
    with pytest.raises(ArchiveError, match=WNIDS[0]):
        extracted(place, plan(write(tmp_path / "k.zip", bytes(data))))
    assert sum(len(body) for body in place.files().values()) <= min(claimed, 2_000_000)


def test_a_zip_that_changes_while_it_is_read(place: Place, tmp_path: Path) -> None:
    planned = plan(write(tmp_path / "k.zip", archive(train_members())))
    write(tmp_path / "k.zip", archive(train_members(3)))
    with pytest.raises(SourceError, match="changed"):
        extract_shard(planned.shards[0], FolderSink(place.tree, place.pace), place.fragment, pace=place.pace)
