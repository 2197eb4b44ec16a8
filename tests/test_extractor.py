from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from factory import END, WNIDS, header, images, member, tar, train_plan, train_tar, val_index, val_name, val_plan, write
from place import CountingPace, Place

from imagenet_unpack.errors import FATAL_TARGET_ERRNOS, ArchiveError
from imagenet_unpack.extract.extractor import extract_shard, read_fragment
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Copy, Unpaced
from imagenet_unpack.model import ClassRef, Shard
from imagenet_unpack.sources.reader import WINDOW_BYTES, SourceError
from imagenet_unpack.sources.tar import WholeTar
from imagenet_unpack.sources.windows import RWF_DONTCACHE

WNID = WNIDS[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def one_class(tmp_path: Path, inner: bytes) -> Shard:
    return train_plan(write(tmp_path / "t.tar", train_tar({WNID: inner}))).shards[0]


def body(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.mark.parametrize("window", [512, 4096, 1 << 20])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_images_smaller_and_larger_than_the_window(place: Place, tmp_path: Path, window: int, tar_format: int) -> None:
    place.pace.window_bytes = window
    entries = images(WNID, [body(size) for size in (0, 1, 511, 512, 513, 4095, 4096, 20_000, 3)])
    if tar_format != tarfile.USTAR_FORMAT:
        entries.append(("ü" * 60 + ".JPEG", b"a long name that is not ASCII"))
    shard = one_class(tmp_path, tar(entries, tar_format))
    done = place.extract(shard)
    assert place.files() == {f"0/{name}": data for name, data in entries}
    assert (done.images, done.size_bytes) == (len(entries), sum(len(data) for _, data in entries))
    rows = [line.split("\t") for line in place.fragment.read_text().splitlines()]
    assert rows == sorted(
        [f"train/0/{name}", "0", WNID, str(len(data)), xxhash.xxh3_64_hexdigest(data)] for name, data in entries
    )
    assert read_fragment(shard, place.fragment) == replace(done, notes=())
    assert max(place.pace.windows) <= window
    assert (place.pace.created, place.pace.written) == (done.images, done.size_bytes)


def test_every_byte_of_a_shard_is_read_once(place: Place, tmp_path: Path) -> None:
    place.pace.window_bytes = 4096
    shard = one_class(tmp_path, tar(images(WNID, [body(3000)] * 20)))
    place.extract(shard)
    assert sum(place.pace.windows) <= shard.size_bytes


def test_val_members_go_to_their_classes_and_others_are_left_out(place: Place, tmp_path: Path) -> None:
    numbers = range(1, 9)
    path = write(tmp_path / "v.tar", tar((val_name(n), body(n * 100)) for n in numbers))
    asked = tuple(sorted({val_index(n) for n in (1, 4, 5)}))
    (shard,) = val_plan(path, "padded", asked).shards
    place.extract(shard)
    chosen = [n for n in numbers if val_index(n) in asked]
    assert place.files() == {f"{val_index(n):04d}/{val_name(n)}": body(n * 100) for n in chosen}


def test_a_second_attempt_starts_from_nothing(place: Place, tmp_path: Path) -> None:
    shard = one_class(tmp_path, tar(images(WNID, [b"one", b"two"])))
    (place.tree / "0").mkdir()
    (place.tree / "0" / f"{WNID}_0.JPEG").write_bytes(b"half")
    (place.tree / "0" / "of an earlier archive").write_bytes(b"x")
    place.fragment.write_bytes(b"old")
    place.extract(shard)
    assert place.files() == {f"0/{WNID}_0.JPEG": b"one", f"0/{WNID}_1.JPEG": b"two"}


GOOD = member(b"good.JPEG")


class TestFaultsOfAnInnerTar:
    @pytest.mark.parametrize(
        ("inner", "words"),
        [
            (END, "no image"),
            (GOOD, "cut off"),
            (GOOD + member(b"../evil") + END, "refused"),
            (GOOD + member(b"/etc/evil") + END, "refused"),
            (GOOD + member(b"a/b.JPEG") + END, "refused"),
            (member(b"a/b.JPEG") + GOOD + END, "refused"),
            (member(b"a/b.JPEG") + member(b"c/d.JPEG") + END, "refused"),
            (member(b"a/b/c.JPEG") + END, "refused"),
            (GOOD + member(b"..") + END, "refused"),
            (GOOD + member(b"") + END, "refused"),
            (GOOD + member(b"a\nb") + END, "refused"),
            (GOOD + member(b"\xff\xfe") + END, "not UTF-8"),
            (GOOD + member(b"good.JPEG") + END, "twice"),
            (GOOD + member(b"l", b"", kind=b"2", link=b"good.JPEG") + END, "symbolic link"),
            (GOOD + member(b"l", b"", kind=b"1", link=b"good.JPEG") + END, "hard link"),
            (GOOD + member(b"d", b"", kind=b"3") + END, "character device"),
            (GOOD + member(b"f", b"", kind=b"6") + END, "FIFO"),
            (GOOD + member(b"d/", b"x", kind=b"5") + END, "folder"),
            (GOOD + member(b"._good.JPEG")[:-512], "more than the archive holds"),
            (member(b"._good.JPEG") + member(b"d/", b"", kind=b"5") + END, "no image"),
            (b"\x1f\x8b" + bytes(2000), "gzip"),
            (GOOD + member(b"s", b"", kind=b"S") + END, "sparse"),
            (GOOD + b"\1" * 512 + END, "no valid tar header"),
            (GOOD + END + b"x" * 512, "behind its end"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_fail_the_shard_and_leave_no_fragment(self, place: Place, tmp_path: Path, inner: bytes, words: str) -> None:
        shard = one_class(tmp_path, inner)
        beside = set(tmp_path.parent.iterdir())
        before = set(tmp_path.rglob("*"))
        with pytest.raises(ArchiveError, match=words) as caught:
            place.extract(shard)
        assert WNID in str(caught.value)
        assert not place.fragment.exists()
        assert set(tmp_path.parent.iterdir()) == beside
        written = set(tmp_path.rglob("*")) - before - {place.tree / "0"}
        assert {path.parent for path in written} <= {place.tree / "0"}
        assert {path.name for path in written} <= {"good.JPEG", "b.JPEG"}

    def test_one_end_block_is_a_note(self, place: Place, tmp_path: Path) -> None:
        done = place.extract(one_class(tmp_path, GOOD + bytes(512)))
        assert done.images == 1
        assert "one end-of-archive block" in done.notes[0]


def test_zeros_behind_the_end_are_told_paced_and_skipped_in_holes(place: Place, tmp_path: Path) -> None:
    path = write(tmp_path / "n01440764.tar", GOOD + END)
    written = b"\0" * (5 << 20)
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(written)
    os.truncate(path, 1 << 40)
    outer = train_plan(write(tmp_path / "t.tar", train_tar({WNID: GOOD + END}))).shards[0]
    stat = path.stat()
    archive = replace(outer.archive, path=str(path), size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
    done = place.extract(replace(outer, archive=archive, offset=0, end=stat.st_size))
    assert f"{stat.st_size - len(GOOD) - len(END):,} bytes of zeros" in done.notes[0]
    assert len(written) <= sum(place.pace.windows) < len(written) + 3 * WINDOW_BYTES


def test_a_member_that_does_not_look_like_an_image_is_taken_and_named(place: Place, tmp_path: Path) -> None:
    done = place.extract(
        one_class(tmp_path, tar([*images(WNID, [b"x"]), ("README", b"y"), (f"{WNIDS[1]}_7.JPEG", b"z")]))
    )
    assert set(place.files()) | {"0/README"} == {f"0/{WNID}_0.JPEG", f"0/{WNIDS[1]}_7.JPEG", "0/README"}
    assert done.images == 3
    (note,) = done.notes
    assert "2 members" in note
    assert "'README'" in note


def test_a_link_in_place_of_a_class_folder_is_not_followed(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (place.tree / "0").symlink_to(outside)
    with pytest.raises(OSError, match="directory"):
        place.extract(one_class(tmp_path, tar(images(WNID, [b"x"]))))
    assert not any(outside.iterdir())


def test_leftovers_and_a_leading_folder(place: Place, tmp_path: Path) -> None:
    leftovers = member(b"x/._a.JPEG") + member(b"x/.DS_Store") + member(b"x/@eaDir/a.JPEG@SynoEAStream")
    inner = member(b"x/", b"", b"5") + leftovers + member(b"x/a.JPEG", b"a") + member(b"x/Thumbs.db") + END
    done = place.extract(one_class(tmp_path, inner))
    assert place.files() == {"0/a.JPEG": b"a"}
    assert any("4 files" in note for note in done.notes)


def test_val_below_a_leading_folder(place: Place, tmp_path: Path) -> None:
    path = write(tmp_path / "v.tar", tar((f"./val/{val_name(n)}", body(n)) for n in range(1, 9)))
    (shard,) = val_plan(path).shards
    place.extract(shard)
    assert place.files() == {f"{val_index(n)}/{val_name(n)}": body(n) for n in range(1, 9)}


def test_an_official_class_must_have_the_published_number_of_images(place: Place, tmp_path: Path) -> None:
    shard = one_class(tmp_path, tar(images(WNID, [b"x", b"y"])))
    place.extract(replace(shard, payload=WholeTar(images=2)))
    with pytest.raises(ArchiveError, match="holds 2 images, but the official archive has 3"):
        place.extract(replace(shard, payload=WholeTar(images=3)))
    assert not place.fragment.exists()
    done = place.extract(replace(shard, payload=WholeTar(images=3, demand_images=False)))
    assert any("--verify-archives none" in note for note in done.notes)


def test_members_that_are_no_images_are_counted_where_asked(place: Place, tmp_path: Path) -> None:
    bodies = [b"\xff\xd8\xff", b"\x89PNG\r\n", b"\x1f\x8b\x08", b"\x1f\x8b\x08", b"text", b""]
    shard = one_class(tmp_path, tar(images(WNID, bodies)))
    done = place.extract(replace(shard, payload=WholeTar(count_kinds=True)))
    assert done.images == len(bodies)
    assert any("2 members are compressed with gzip" in note for note in done.notes)
    assert any("2 members are neither JPEG nor PNG" in note for note in done.notes)


@pytest.mark.parametrize("mtime", [1 << 62, 1 << 70, -(1 << 70), 1_340_000_000])
def test_modification_times_that_no_file_can_have(place: Place, tmp_path: Path, mtime: int) -> None:
    block = bytearray(header(f"{WNID}_0.JPEG".encode()))
    block[136:148] = (
        b"\xff" + mtime.to_bytes(11, "big", signed=True) if mtime < 0 else b"\x80" + mtime.to_bytes(11, "big")
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    shard = one_class(tmp_path, bytes(block) + b"abc".ljust(512, b"\0") + END)
    extract_shard(shard, FolderSink(place.tree, Unpaced(), keep_mtime=True), place.fragment, pace=Unpaced())
    if mtime == 1_340_000_000:
        assert (place.tree / "0" / f"{WNID}_0.JPEG").stat().st_mtime == mtime


class TestNamesThatAreKnown:
    """A run of validation images: nothing is removed unless something is in the way."""

    def shard(self, tmp_path: Path) -> Shard:
        path = write(tmp_path / "v.tar", tar((val_name(n), body(n)) for n in range(1, 30)))
        return val_plan(path).shards[0]

    def test_leftovers_of_an_earlier_attempt_are_replaced(self, place: Place, tmp_path: Path) -> None:
        shard = self.shard(tmp_path)
        for number in (1, 20):
            folder = place.tree / str(val_index(number))
            folder.mkdir()
            (folder / val_name(number)).write_bytes(b"half")
        (place.tree / str(val_index(1)) / "of another shard").write_bytes(b"kept")
        place.extract(shard)
        expected = {f"{val_index(n)}/{val_name(n)}": body(n) for n in range(1, 30)}
        files = {path.relative_to(place.tree).as_posix(): path.read_bytes() for path in place.tree.glob("*/*")}
        assert files == {**expected, f"{val_index(1)}/of another shard": b"kept"}
        assert len(place.fragment.read_bytes().splitlines()) == 29

    def test_on_a_fresh_tree_nothing_is_unlinked(self, place: Place, tmp_path: Path) -> None:
        removed: list[object] = []

        class Watching(FolderSink):
            def remove(self, shard: Shard, names: object) -> None:
                removed.append(names)

        extract_shard(self.shard(tmp_path), Watching(place.tree, Unpaced()), place.fragment, pace=Unpaced())
        assert removed == []


class TestAnArchiveThatIsNotTheOnePlanned:
    def test_another_size_or_time(self, place: Place, tmp_path: Path) -> None:
        shard = one_class(tmp_path, tar(images(WNID, [b"x"])))
        os.utime(shard.archive.path, (1, 1))
        with pytest.raises(SourceError, match="changed"):
            place.extract(shard)

    def test_it_shrinks_while_it_is_read(self, place: Place, tmp_path: Path) -> None:
        shard = one_class(tmp_path, tar(images(WNID, [body(5000)] * 10)))

        class Cutter(CountingPace):
            def window(self, nbytes: int) -> None:
                os.truncate(shard.archive.path, 20_000)

        with pytest.raises(SourceError, match=r"cut off|changed"):
            extract_shard(shard, FolderSink(place.tree, Unpaced()), place.fragment, pace=Cutter())
        assert not place.fragment.exists()

    def test_it_is_gone(self, place: Place, tmp_path: Path) -> None:
        shard = one_class(tmp_path, tar(images(WNID, [b"x"])))
        Path(shard.archive.path).unlink()
        with pytest.raises(SourceError, match="cannot be opened"):
            place.extract(shard)


def test_a_kernel_without_uncached_reads(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flags = os.preadv, []

    def old_kernel(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        if flag:
            raise OSError(95, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", old_kernel)
    place.extract(one_class(tmp_path, tar(images(WNID, [b"x"]))))
    assert place.files() == {f"0/{WNID}_0.JPEG": b"x"}
    assert flags == [RWF_DONTCACHE, 0]


def test_uncached_writes(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.pace.window_bytes = 4096
    entries = images(WNID, [body(size) for size in (0, 5, 4096, 30_000)])
    place.extract(one_class(tmp_path, tar(entries)), uncached_writes=True)
    assert place.files() == {f"0/{name}": data for name, data in entries}

    def old_kernel(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "pwritev", old_kernel)
    place.extract(one_class(tmp_path, tar(entries)), uncached_writes=True)
    assert place.files() == {f"0/{name}": data for name, data in entries}


def test_short_reads_and_writes_are_continued(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write_ = os.preadv, os.write
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flag=0: read(fd, [buffers[0][:700]], at, flag))
    monkeypatch.setattr(os, "write", lambda fd, data: write_(fd, data[:300]))
    place.extract(one_class(tmp_path, tar(images(WNID, [body(2000)]))))
    assert place.files() == {f"0/{WNID}_0.JPEG": body(2000)}


class TestNamesInTheWay:
    class Racing(FolderSink):
        """Another process writes the same names."""

        def add(self, ref: ClassRef, name: str, size_bytes: int, mtime_s: float, copy: Copy) -> int:
            (self._tree / ref.folder / name).write_bytes(b"another's")
            return super().add(ref, name, size_bytes, mtime_s, copy)

    def test_another_run_is_named(self, place: Place, tmp_path: Path) -> None:
        for shard in (one_class(tmp_path, tar(images(WNID, [b"a", b"b"]))), TestNamesThatAreKnown().shard(tmp_path)):
            with pytest.raises(OSError, match="another run") as caught:
                extract_shard(shard, self.Racing(place.tree, Unpaced()), place.fragment, pace=Unpaced())
            assert caught.value.errno in FATAL_TARGET_ERRNOS
            assert not place.fragment.exists()

    def test_a_member_that_appears_twice_is_the_archives_fault(self, place: Place, tmp_path: Path) -> None:
        shard = one_class(tmp_path, tar([("a.JPEG", b"x"), ("b.JPEG", b"x"), ("a.JPEG", b"y")]))
        with pytest.raises(ArchiveError, match="appears twice"):
            place.extract(shard)
