"""Published facts about ILSVRC2012 as constants; sources in `data/README.md`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

TRAIN_IMAGES = 1_281_167
VAL_IMAGES = 50_000
VAL_IMAGES_PER_CLASS = 50
TEST_IMAGES = 100_000
TRAIN_ARCHIVE_NAME = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE_NAME = "ILSVRC2012_img_val.tar"
TEST_ARCHIVE_NAME = "ILSVRC2012_img_test_v10102019.tar"
TRAIN_INNER_TAR_INEXACT = frozenset({62, 188, 221, 596, 676})
_USUAL_TRAIN_IMAGES = 1300
_RECORD_BYTES = 10_240


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The published figures of an archive; digests in hex, `size_bytes` None where the exact size is not known.

    Attributes:
        members: how many members it holds.
        member_kind: what they are.
    """

    name: str
    size_bytes: int | None
    md5: str
    sha256: str
    members: int
    member_kind: str


TRAIN_ARCHIVE = Published(
    name=TRAIN_ARCHIVE_NAME,
    size_bytes=147_897_477_120,
    md5="1d675b47d978889d74fa0da5fadfb00e",
    sha256="b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb",
    members=1000,
    member_kind="inner tars",
)
VAL_ARCHIVE = Published(
    name=VAL_ARCHIVE_NAME,
    size_bytes=6_744_924_160,
    md5="29b22e2961454d5413ddabcf34fc5622",
    sha256="c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0",
    members=VAL_IMAGES,
    member_kind="images",
)
TEST_ARCHIVE = Published(
    name=TEST_ARCHIVE_NAME,
    size_bytes=None,
    md5="e1b8681fff3d63731c599df9b4b6fc02",
    sha256="9cf7f8249639510f17d3d8a0deb47cd22a435886ba8e29e2b3223e65a4079eb4",
    members=TEST_IMAGES,
    member_kind="images",
)


def _data(name: str) -> str:
    return resources.files("imagenet_unpack.dataset").joinpath("data").joinpath(name).read_text(encoding="utf-8")


WNIDS: tuple[str, ...] = tuple(_data("wnids.txt").split())
"""The 1000 wnids in class-index order."""

DOGS = frozenset(WNIDS[151:269] + WNIDS[273:276])
"""Wnids of dogs: the breeds, from n02085620 (Chihuahua) to n02113978 (Mexican hairless), dingo, dhole, hunting dog."""

TASK_3_CLASSES = 120
TASK_3_MEGABYTES = 728
"""Of `ILSVRC2012_img_train_t3.tar`: the download page gives its size so; it may mean 10^6 or 2^20 bytes."""

PNG_IMAGE = "n02105855_2933.JPEG"
"""The one image of the published train split that is a PNG."""


@functools.cache
def cmyk_images() -> frozenset[str]:
    """Return the names of the train images that are CMYK JPEGs in the published data set."""
    return frozenset(_data("cmyk_images.txt").split())


@functools.cache
def class_names() -> tuple[str, ...]:
    """Return the names of each class as WordNet has them, comma-separated; two classes can share a name."""
    return tuple(_data("class_names.txt").splitlines())


def val_name(number: int) -> str:
    """Return the file name of validation image `number`, from 1."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def test_name(number: int) -> str:
    """Return the file name of test image `number`, from 1."""
    return f"ILSVRC2012_test_{number:08d}.JPEG"


@functools.cache
def val_class_indices() -> tuple[int, ...]:
    """Return the class indices of validation images 1 to 50,000."""
    return tuple(map(int, _data("val_class_indices.txt").split()))


@functools.cache
def _unusual_train_images() -> dict[int, int]:
    return {int(index): int(images) for index, images in map(str.split, _data("train_images.txt").splitlines())}


def train_images(class_index: int) -> int:
    """Return how many train images a class has."""
    return _unusual_train_images().get(class_index, _USUAL_TRAIN_IMAGES)


@functools.cache
def train_inner_tar_bytes() -> tuple[int, ...]:
    """Return the size in bytes of each inner train tar; those in `TRAIN_INNER_TAR_INEXACT` are approximate."""
    return tuple(int(records) * _RECORD_BYTES for records in _data("train_records.txt").split())
