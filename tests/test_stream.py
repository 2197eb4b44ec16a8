from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import factory
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import ClassRef
from imagenet_unpack.sources import compressed, stream
from imagenet_unpack.sources.compressed import Decompressed, RawStream, StreamCutError, peek
from imagenet_unpack.sources.members import Members
from imagenet_unpack.sources.stream import Buffers, Cutter, Fault, Place, Stretch, Window
from imagenet_unpack.sources.tarindex import Entry

REF = ClassRef(index=0, wnid="n01440764", folder="0")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
Found = list[tuple[str, str, bytes]]


class Pieces:
    """A source that gives its bytes in pieces of any size."""

    def __init__(self, data: bytes, largest: int, seed: int = 0) -> None:
        self._data = memoryview(data)  # slices of it are no copies
        self._largest = largest
        self._chance = random.Random(seed)

    def readinto(self, view: memoryview) -> int:
        piece = self._data[: min(len(view), self._chance.randint(1, self._largest))]
        self._data = self._data[len(piece) :]
        view[: len(piece)] = piece
        return len(piece)


def cutter(source: stream.Source, wanted: Callable[[Place], bool] = lambda _: True) -> Cutter:
    return Cutter(Window(source, Buffers(1000), "a.tar"), "a.tar", wanted, stretch_bytes=8192)


def flat_placing() -> stream.Placing:
    members = Members("a.tar")

    def placing(entry: Entry) -> Place | None:
        member = members.take(entry)
        return None if member is None else Place(split="train", ref=REF, name=member.name)

    return placing


def nested_placing(entry: Entry) -> Place | None:
    wnid = entry.path.removesuffix(".tar")
    return Place(split="train", ref=ClassRef(index=0, wnid=wnid, folder=wnid), name="")


def members_of(stretch: Stretch) -> Found:
    view = stretch.buffer.view
    return [
        (stretch.id, member.place.name, bytes(view[member.start : member.start + member.size_bytes]))
        for member in stretch.members
    ]


def read_flat(source: stream.Source, wanted: Callable[[Place], bool] = lambda _: True) -> Found:
    return [found for each in cutter(source, wanted).flat(flat_placing()) for found in members_of(each)]


def read_nested(source: stream.Source) -> tuple[Found, list[Fault]]:
    found: Found = []
    faults = []
    for each in cutter(source).nested(nested_placing):
        if isinstance(each, Fault):
            faults.append(each)
        else:
            found += members_of(each)
    return found, faults


sizes = st.lists(st.integers(0, 4000), min_size=1, max_size=30)


@settings(max_examples=40)
@given(sizes=sizes, largest=st.sampled_from([1, 511, 512, 5000, 1 << 20]), seed=st.integers(0, 9))
def test_stretches_cover_every_member_once_and_do_not_depend_on_pieces(
    sizes: list[int], largest: int, seed: int
) -> None:
    images = [(f"{number}.JPEG", os.urandom(size)) for number, size in enumerate(sizes)]
    data = factory.tar(images)
    found = read_flat(Pieces(data, largest, seed))
    assert [(name, body) for _, name, body in found] == images
    assert found == read_flat(Pieces(data, 1 << 20))
    assert len({stretch for stretch, _, _ in found}) >= sum(-(-size // 512) * 512 + 512 for size in sizes) // 8192


@settings(max_examples=40)
@given(sizes=sizes, wanted=st.sets(st.integers(0, 29)))
def test_stretches_are_cut_at_the_same_places_whatever_is_wanted(sizes: list[int], wanted: set[int]) -> None:
    images = [(f"{number}.JPEG", os.urandom(size)) for number, size in enumerate(sizes)]
    data = factory.tar(images)
    names = {f"{number}.JPEG" for number in wanted}
    some = read_flat(Pieces(data, 3000), lambda place: place.name in names)
    assert some == [found for found in read_flat(Pieces(data, 3000)) if found[1] in names]


@given(cut=st.integers(0, 11_000), largest=st.sampled_from([512, 1 << 20]))
def test_a_stream_that_ends_early_is_a_fault_at_any_byte(cut: int, largest: int) -> None:
    images = [(f"{number}.JPEG", bytes([number]) * 900) for number in range(7)]
    data = factory.tar(images)  # 7 members of 1536 bytes, then 10,240 - 7 * 1536 % 10,240 bytes of zeros
    end = 7 * 1536 + 512
    cut = min(cut, end - 1)
    with pytest.raises(ArchiveError):
        read_flat(Pieces(data[:cut], largest))


def test_one_end_block_is_taken_with_a_note() -> None:
    data = factory.tar([("1.JPEG", b"abc")])[:1536]
    reader = cutter(Pieces(data, 100))
    assert len(list(reader.flat(flat_placing()))) == 1
    assert "one end-of-archive block" in reader.notes[0]


def test_members_larger_than_a_stretch_are_whole() -> None:
    images = [("1.JPEG", os.urandom(20_000)), ("2.JPEG", b"abc"), ("3.JPEG", os.urandom(30_000))]
    found = read_flat(Pieces(factory.tar(images), 700))
    assert [(name, body) for _, name, body in found] == images


def test_a_member_that_no_image_can_be_is_refused_before_memory_is_taken_for_it() -> None:
    huge = factory.header(b"1.JPEG", size=b"%011o\0" % (7 << 30))
    with pytest.raises(ArchiveError, match="no image is so large"):
        read_flat(Pieces(huge + bytes(4096), 4096))


@pytest.mark.slow
def test_an_inner_tar_of_any_size_goes_through_few_buffers() -> None:
    """1.2 GiB, in the memory of two stretches."""
    images, image_bytes = 1200, 1 << 20

    def pieces() -> Iterator[bytes]:
        body = bytes(image_bytes)
        size = images * (512 + image_bytes) + 1024
        yield factory.header(f"{REF.wnid}.tar".encode(), size=b"%011o\0" % size)
        for number in range(images):
            yield factory.header(f"{REF.wnid}_{number}.JPEG".encode(), size=b"%011o\0" % image_bytes)
            yield body
        yield bytes(2048)

    class Source:
        def __init__(self) -> None:
            self._pieces = pieces()
            self._left = memoryview(b"")

        def readinto(self, view: memoryview) -> int:
            self._left = self._left or memoryview(next(self._pieces, b""))
            piece, self._left = self._left[: len(view)], self._left[len(view) :]
            view[: len(piece)] = piece
            return len(piece)

    buffers = Buffers(2, lambda: pytest.fail("waits for memory that nobody has"))
    count = 0
    for each in Cutter(Window(Source(), buffers, "a.tar"), "a.tar", lambda _: True).nested(nested_placing):
        assert isinstance(each, Stretch)
        count += len(each.members)
        buffers.release(each.buffer)
    assert count == images


def test_members_that_appear_twice_are_refused_even_in_another_stretch() -> None:
    images = [(f"{number}.JPEG", bytes(3000)) for number in (1, 2, 3, 4, 1)]
    with pytest.raises(ArchiveError, match="twice"):
        read_flat(Pieces(factory.tar(images), 5000))


def test_memory_is_given_back_so_that_any_number_of_stretches_and_streams_fit_into_few_buffers() -> None:
    images = [(f"{number}.JPEG", bytes(5000)) for number in range(20)]

    def check() -> None:
        pytest.fail("waits for memory that nobody has")

    buffers = Buffers(2, check)
    for _ in range(2):
        window = Window(Pieces(factory.tar([*images, ("large.JPEG", bytes(70 << 20))]), 1 << 20), buffers, "a.tar")
        for each in Cutter(window, "a.tar", lambda _: True, stretch_bytes=8192).flat(flat_placing()):
            buffers.release(each.buffer)
        window.close()


def test_zeros_behind_the_end_take_no_memory() -> None:
    data = factory.tar([("1.JPEG", b"abc")])

    class Zeros(Pieces):
        left = 300 << 20

        def readinto(self, view: memoryview) -> int:
            size = super().readinto(view) if self._data else min(len(view), self.left)
            if not self._data:
                self.left -= size
            return size

    found = []
    for each in cutter(Zeros(data, 512)).flat(flat_placing()):
        found += members_of(each)
        assert len(each.buffer.view) < 100 << 20
    assert len(found) == 1


def test_bytes_behind_the_end_are_a_fault() -> None:
    with pytest.raises(ArchiveError, match="trailing garbage"):
        read_flat(Pieces(factory.tar([("1.JPEG", b"abc")]) + b"x" * 512, 512))


def nested_tar(damage: Callable[[str, bytes], bytes] = lambda _, inner: inner) -> bytes:
    inner = {
        wnid: factory.tar(factory.images(wnid, [bytes([number]) * 3000 for number in range(6)]))
        for wnid in factory.WNIDS[:3]
    }
    return factory.train_tar({wnid: damage(wnid, data) for wnid, data in inner.items()})


def test_an_inner_tar_is_cut_into_stretches_of_its_own() -> None:
    found, faults = read_nested(Pieces(nested_tar(), 900))
    assert not faults
    assert len(found) == 18
    for wnid in factory.WNIDS[:3]:
        ids = [stretch for stretch, name, _ in found if name.startswith(wnid)]
        assert ids == [f"{wnid}-{number}" for number in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (gzip.compress, "gzip"),
        (lambda inner: inner[:4000], "cut off"),
        (lambda inner: bytes(10240), "no image"),
        (lambda inner: inner[:-10240] + b"x" * 10240, "byte"),
    ],
    ids=["gzip", "cut", "empty", "garbage"],
)
def test_a_damaged_inner_tar_is_one_class_lost(damage: Callable[[bytes], bytes], word: str) -> None:
    second = factory.WNIDS[1]
    found, faults = read_nested(Pieces(nested_tar(lambda wnid, data: damage(data) if wnid == second else data), 999))
    assert [fault.id for fault in faults] == [second]
    assert word in faults[0].message
    assert {name.partition("_")[0] for _, name, _ in found} >= {factory.WNIDS[0], factory.WNIDS[2]}


@settings(max_examples=40)
@given(part=st.floats(0, 0.999))
def test_a_nested_stream_that_ends_early_is_a_fault_of_the_whole(part: float) -> None:
    data = nested_tar()
    with pytest.raises(ArchiveError):
        read_nested(Pieces(data[: int(part * (len(data) - 10_240))], 4096))


def open_bytes(path: Path, head: bytes = b"") -> tuple[RawStream, Decompressed]:
    kind, _ = peek(path, 1)
    raw = RawStream(os.open(path, os.O_RDONLY), "a.tar.x", head=head)
    return raw, Decompressed(raw, kind, "a.tar.x")


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_each_compression_gives_the_same_members(kind: str, tmp_path: Path) -> None:
    images = [(f"{number}.JPEG", os.urandom(3000)) for number in range(40)]
    path = factory.write(tmp_path / "a.tar.x", COMPRESSORS[kind](factory.tar(images)))
    raw, source = open_bytes(path)
    with raw:
        assert [(name, body) for _, name, body in read_flat(source)] == images
        assert raw.taken_bytes == path.stat().st_size
    assert peek(path, 600) == (kind, factory.tar(images)[:600])


def test_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    data = factory.tar([("1.JPEG", os.urandom(70_000)), ("2.JPEG", b"abc")])
    path = factory.write(tmp_path / "a.tar.gz", gzip.compress(data[:30_000]) + gzip.compress(data[30_000:]))
    raw, source = open_bytes(path)
    with raw:
        assert len(read_flat(source)) == 2


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
@pytest.mark.parametrize("zeros", [4096, 3 << 20])
def test_zeros_behind_compressed_data_are_padding(kind: str, zeros: int, tmp_path: Path) -> None:
    images = [("1.JPEG", os.urandom(70_000)), ("2.JPEG", b"abc")]
    raw, source = open_bytes(factory.write(tmp_path / "a", COMPRESSORS[kind](factory.tar(images)) + bytes(zeros)))
    with raw:
        assert [(name, body) for _, name, body in read_flat(source)] == images


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
@settings(max_examples=25)
@given(part=st.floats(0.05, 0.999))
def test_compressed_data_that_ends_early_is_called_so(kind: str, part: float) -> None:
    packed = COMPRESSORS[kind](factory.tar([(f"{number}.JPEG", os.urandom(900)) for number in range(9)]))
    read, write = os.pipe()
    os.write(write, packed[: int(part * len(packed))])
    os.close(write)
    with RawStream(read, "pipe") as raw, pytest.raises(ArchiveError) as fault:
        read_flat(Decompressed(raw, kind, "pipe"))
    assert isinstance(fault.value, StreamCutError) or "damaged" in str(fault.value)
    assert fault.value.exit_code == 5


@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_what_comes_before_the_end_of_cut_off_gzip_data_is_given(tmp_path: Path, library: str) -> None:
    data = os.urandom(600_000)
    packed = gzip.compress(data)
    path = factory.write(tmp_path / "a.gz", packed[: len(packed) // 2])
    script = f"""
import os, sys
if {library == "zlib"}:
    sys.modules["isal"] = None
from imagenet_unpack.sources.compressed import Decompressed, RawStream, StreamCutError
source = Decompressed(RawStream(os.open({str(path)!r}, os.O_RDONLY), "a.gz"), "gzip", "a.gz")
found, buffer = b"", memoryview(bytearray(1 << 20))
try:
    while size := source.readinto(buffer):
        found += bytes(buffer[:size])
except StreamCutError as error:
    assert f"{{len(found):,}} decompressed" in str(error), error
    print(len(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) > 250_000


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_damaged_compressed_data_is_a_fault(kind: str, tmp_path: Path) -> None:
    packed = bytearray(COMPRESSORS[kind](factory.tar([(f"{number}.JPEG", os.urandom(900)) for number in range(99)])))
    packed[len(packed) // 2] ^= 0xFF
    raw, source = open_bytes(factory.write(tmp_path / "a.tar.x", bytes(packed)))
    with raw, pytest.raises(ArchiveError):
        read_flat(source)


def test_a_damaged_checksum_of_gzip_is_a_fault(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(factory.tar([("1.JPEG", os.urandom(900))])))
    packed[-6] ^= 0xFF
    raw, source = open_bytes(factory.write(tmp_path / "a.tar.gz", bytes(packed)))
    with raw, pytest.raises(ArchiveError, match="damaged"):
        read_flat(source)


def test_zstd_where_there_is_a_library_for_it(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra [zstd]")
    images = [(f"{number}.JPEG", os.urandom(3000)) for number in range(40)]
    packed = zstandard.ZstdCompressor().compress(factory.tar(images))
    raw, source = open_bytes(factory.write(tmp_path / "a.tar.zst", packed))
    with raw:
        assert [(name, body) for _, name, body in read_flat(source)] == images
    raw, source = open_bytes(factory.write(tmp_path / "b.tar.zst", packed[: len(packed) // 2]))
    with raw, pytest.raises(ArchiveError):
        read_flat(source)


@pytest.mark.parametrize("how", ["long", "skippable"])
def test_zstd_of_a_long_window_and_with_a_skippable_frame_before_it(tmp_path: Path, how: str) -> None:
    """As `zstd --long=28` and pzstd make it."""
    zstandard = pytest.importorskip("zstandard", reason="needs the extra [zstd]")
    images = [(f"{number}.JPEG", os.urandom(3000)) for number in range(4)]
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28 if how == "long" else 20)
    out = io.BytesIO(b"" if how == "long" else b"\x5a\x2a\x4d\x18\x04\0\0\0skip")
    out.seek(0, os.SEEK_END)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as writer:
        writer.write(factory.tar(images))
    raw, source = open_bytes(factory.write(tmp_path / "a.tar.zst", out.getvalue()))
    with raw:
        assert [(name, body) for _, name, body in read_flat(source)] == images


def test_reading_ahead_gives_the_same_bytes_then_the_end_or_the_fault_again_and_again(tmp_path: Path) -> None:
    data = os.urandom(11 << 20)
    packed = gzip.compress(data, 1)
    for whole in (True, False):
        path = factory.write(tmp_path / "a.gz", packed if whole else packed[:-5])
        raw, source = open_bytes(path)
        found = bytearray()
        buffer = memoryview(bytearray(700_000))
        with raw, contextlib.closing(compressed.ReadAhead(source)) as ahead:
            try:
                while size := ahead.readinto(buffer):
                    found += buffer[:size]
                assert whole
                assert ahead.readinto(buffer) == 0
            except StreamCutError:
                assert not whole
                with pytest.raises(StreamCutError):
                    ahead.readinto(buffer)
        assert data.startswith(found)
        assert not whole or len(found) == len(data)


def test_reading_ahead_ends_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    raw, source = open_bytes(factory.write(tmp_path / "a.gz", gzip.compress(bytes(64 << 20), 1)))
    with raw:
        ahead = compressed.ReadAhead(source)
        assert ahead.readinto(memoryview(bytearray(100))) == 100
        began = threading.active_count()
        ahead.close()
        assert threading.active_count() == began - 1


def test_what_was_read_to_recognise_a_pipe_is_read_again() -> None:
    data = factory.tar([("1.JPEG", os.urandom(70_000))])
    read, write = os.pipe()
    os.write(write, data[1000:50_000])
    os.close(write)
    with RawStream(read, "pipe", head=data[:1000]) as raw:
        assert io.BufferedReader(raw).read() == data[:50_000]


def test_a_pipe_without_a_writer_is_waited_for_in_steps_that_can_end_it() -> None:
    class EndedError(Exception):
        pass

    def check(nbytes: int) -> None:
        if not nbytes:
            raise EndedError

    read, write = os.pipe()
    with RawStream(read, "pipe", before_read=check) as raw, pytest.raises(EndedError):
        raw.read(1)
    os.close(write)


def test_a_file_that_cannot_be_read_is_a_read_error_not_damage(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # read(2) of a folder: EISDIR
    with RawStream(fd, "a.tar.gz") as raw, pytest.raises(compressed.StreamReadError, match="directory"):
        Decompressed(raw, "gzip", "a.tar.gz").readinto(memoryview(bytearray(10)))
