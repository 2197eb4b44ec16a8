"""Images that are damaged, cut off or forged: `check` finds what differs, and never ends with a traceback."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from test_kinds import write_kind

from imagenet_unpack.checking.image import check_image
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.errors import UnpackError
from imagenet_unpack.sources.imagerecord import RECORD_BYTES, ImageRecord, read_record

SPEC = SynthSpec(classes=3, images_per_class=5, val_images=6, mean_bytes=2_000)
MAGIC_BYTES = len(b"imagenet_unpack image\n")


class Whole:
    """The content of a whole image, and where damaged ones may be written; no dataclass, which is shown in full."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content = content
        self.path = path


@pytest.fixture(scope="module", params=["copy", "in-place"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp(f"damage-{request.param}")
    base = write_kind(folder / "archives", "official", SPEC)
    command = ["image", "--base-dir", str(base), "--executor", "serial", "--method", request.param]
    in_place = ["--yes", "--splits", "train"]
    copy = ["--output", str(folder / "image"), "--layout", "index", "--layout", "wnid"]
    assert cli.main([*command, *(in_place if request.param == "in-place" else copy)]) == 0
    made = base / "ILSVRC2012_img_train.tar" if request.param == "in-place" else folder / "image"
    return Whole(made.read_bytes(), folder / "damaged")


def problems(path: Path, content: bytes, *, deep: bool = True) -> int | None:
    """Return how many differences are found; None: it is refused as no image."""
    path.write_bytes(content)
    try:
        return sum(len(split.problems) for split in check_image(path, deep=deep, workers=1))
    except UnpackError:
        return None


def record_of(path: Path, content: bytes) -> ImageRecord:
    path.write_bytes(content)
    record = read_record(path)
    assert record is not None
    return record


def flipped(content: bytes, places: list[tuple[float, int]], start: int, end: int) -> bytearray:
    """Flip bits in a range of bytes; places are given as fractions of it."""
    damaged = bytearray(content)
    for fraction, bit in places:
        damaged[start + int(fraction * (end - start))] ^= 1 << bit
    return damaged


BITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    min_size=1,
    max_size=4,
    unique_by=lambda bit: bit[0],
)


@given(bits=BITS)
def test_any_flipped_bit_of_the_tables_is_found(image: Whole, bits: list[tuple[float, int]]) -> None:
    content, path = image.content, image.path
    record = record_of(path, content)
    damaged = flipped(content, bits, record.start, len(content))
    assert bytes(damaged) == content or problems(path, bytes(damaged), deep=False) != 0


@given(place=st.integers(0, 95), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_superblock_is_found(image: Whole, place: int, bit: int) -> None:
    content, path = image.content, image.path
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    assert problems(path, bytes(damaged), deep=False) != 0


@given(length=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=5000))
def test_a_cut_off_or_longer_file_is_found(image: Whole, length: float, more: bytes) -> None:
    content, path = image.content, image.path
    assert problems(path, content[: int(length * len(content))]) != 0
    if more:
        assert problems(path, content + more) != 0


@given(bits=BITS, superblock=st.booleans())
def test_tables_that_are_forged_with_their_digest_end_in_no_traceback(
    image: Whole, bits: list[tuple[float, int]], superblock: bool
) -> None:
    content, path = image.content, image.path
    record = record_of(path, content)
    start, end = (0, 96) if superblock else (record.start, record.end)
    damaged = flipped(content, bits, start, end)
    digest = xxhash.xxh3_64_hexdigest(damaged[record.start : record.end])
    forged = replace(record, superblock=bytes(damaged[:96]), digest=digest).to_block()
    problems(path, bytes(damaged[: record.end]) + forged)


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
KEYS = (
    "schema", "method", "identity", "layouts", "splits", "official", "superblock", "start", "end", "xxh3_64",
    "archives", "original",
)  # fmt: skip


@given(key=st.sampled_from(KEYS), value=VALUES, whole=st.booleans())
def test_a_forged_record_ends_in_no_traceback(image: Whole, key: str, value: Any, whole: bool) -> None:
    content, path = image.content, image.path
    block = content[-RECORD_BYTES:]
    (length,) = struct.unpack_from("<I", block, MAGIC_BYTES)
    fields = json.loads(block[MAGIC_BYTES + 4 : MAGIC_BYTES + 4 + length])
    assert sorted(fields) == sorted(KEYS)
    text = json.dumps(value if whole else fields | {key: value}).encode()
    data = (block[:MAGIC_BYTES] + struct.pack("<I", len(text)) + text).ljust(RECORD_BYTES - 8, b"\0")[
        : RECORD_BYTES - 8
    ]
    problems(path, content[:-RECORD_BYTES] + data + xxhash.xxh3_64_digest(data))
