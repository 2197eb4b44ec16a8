"""Archives of ImageNet's shape, seeded: real wnids, names and header fields, sizes of the real distribution.

The images are JPEGs of one colour, which tells their class, in both splits alike; random bytes in comment segments
bring them to their size. For benchmarks the bodies can be holes instead.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from imagenet_unpack.dataset import ilsvrc2012, jpeg
from imagenet_unpack.errors import TargetError

BLOCK = tarfile.BLOCKSIZE
TarFormat = Literal["gnu", "ustar", "pax"]
Writer = Callable[[BinaryIO], None]
TEST_ARCHIVE_NAME = "ILSVRC2012_img_test_v10102019.tar"
_FORMATS: dict[TarFormat, Literal[0, 1, 2]] = {
    "gnu": tarfile.GNU_FORMAT,
    "ustar": tarfile.USTAR_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
_JUNE_2012 = 1_338_508_800
_POOL_BYTES = 32 << 20
# Of the sizes' logarithms: images of the real set spread about so; a few are far larger than the mean.
_SIGMA = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """What to make.

    Attributes:
        classes: how many, from class index 0 on.
        images_per_class: train images a class, or None for as many as the real class has.
        val_images: validation images; those of the chosen classes first, the other classes' behind. 0: no archive.
        test_images: images of the test split, which have no label. 0: no archive.
        seed: the same seed gives the same bytes.
        mean_bytes: mean size of an image; none is smaller than `jpeg.SMALLEST_BYTES`.
        tar_format: of both archives.
        bodies: `random` are JPEGs, incompressible; `holes` are zeros that take no room on the disk.
        label_files: write the class index and the validation labels too.
    """

    classes: int = 10
    images_per_class: int | None = 20
    val_images: int = 50
    test_images: int = 0
    seed: int = 0
    mean_bytes: int = 114_000
    tar_format: TarFormat = "gnu"
    bodies: Literal["random", "holes"] = "random"
    label_files: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthImage:
    """One image, whatever archive it goes into.

    Attributes:
        name: as in the data set, such as `n01440764_18.JPEG`.
        class_index: its class, and so its colour.
        size_bytes: length of its body.
        mtime_s: modification time, seconds since the epoch.
        position: where its random bytes begin in the pool of them.
    """

    name: str
    class_index: int
    size_bytes: int
    mtime_s: int
    position: int

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the JPEG in pieces; the same image gives the same bytes."""
        pool = _random_bytes()
        position = self.position

        def filler(length: int) -> memoryview:
            nonlocal position
            start = position % (len(pool) - length)
            position = start + length
            return pool[start:position]

        return jpeg.flat_jpeg(jpeg.class_colour(self.class_index), self.size_bytes, filler)

    def body(self) -> bytes:
        """Return the JPEG in one piece."""
        return b"".join(self.pieces())


def train_images(spec: SynthSpec, class_index: int) -> list[SynthImage]:
    """Return the train images of a class, in the order of the archive."""
    wnid = ilsvrc2012.WNIDS[class_index]
    count = spec.images_per_class or ilsvrc2012.train_images(class_index)
    chance = random.Random(f"{spec.seed} {wnid}")
    numbers = chance.sample(range(count * 12), count)
    return [_image(f"{wnid}_{number}.JPEG", class_index, number, chance, spec) for number in numbers]


def val_images(spec: SynthSpec) -> list[SynthImage]:
    """Return the validation images, in the order of the archive, which is not that of their names."""
    numbers = _val_numbers(spec)
    table = ilsvrc2012.val_class_indices()
    chance = random.Random(f"{spec.seed} val")
    return [
        _image(ilsvrc2012.val_name(number), table[number - 1], number, chance, spec)
        for number in chance.sample(numbers, len(numbers))
    ]


def test_images(spec: SynthSpec) -> list[SynthImage]:
    """Return the images of the test split; their colours are those of the chosen classes in turn."""
    chance = random.Random(f"{spec.seed} test")
    return [
        _image(f"ILSVRC2012_test_{number:08d}.JPEG", number % spec.classes, number, chance, spec)
        for number in range(1, spec.test_images + 1)
    ]


def _image(name: str, class_index: int, number: int, chance: random.Random, spec: SynthSpec) -> SynthImage:
    size = chance.lognormvariate(math.log(spec.mean_bytes) - _SIGMA**2 / 2, _SIGMA)
    return SynthImage(
        name=name,
        class_index=class_index,
        size_bytes=max(int(size), jpeg.SMALLEST_BYTES),
        mtime_s=_mtime_s(number),
        position=chance.getrandbits(32),
    )


def _mtime_s(salt: int) -> int:
    return _JUNE_2012 + salt * 7919 % (30 * 86_400)


def write_archives(folder: Path, spec: SynthSpec) -> tuple[Path, ...]:
    """Write the archives and label files into `folder` and return their paths.

    Raises:
        TargetError: the folder cannot be written, or holds one of the files already.
    """
    return write_files(folder, official_files(spec))


def official_files(spec: SynthSpec) -> dict[str, Writer]:
    """Return the official archives and label files by name, and what writes each."""
    numbers = _val_numbers(spec)
    files: dict[str, Writer] = {ilsvrc2012.TRAIN_ARCHIVE_NAME: functools.partial(_write_train, spec=spec)}
    if numbers:
        files[ilsvrc2012.VAL_ARCHIVE_NAME] = functools.partial(write_flat, images=val_images(spec), spec=spec)
    if spec.test_images:
        files[TEST_ARCHIVE_NAME] = functools.partial(write_flat, images=test_images(spec), spec=spec)
    if spec.label_files:
        files["ImageNet_class_index.json"] = _write_class_index
        files["ImageNet_val_label.txt"] = functools.partial(_write_val_labels, numbers=numbers)
    return files


def write_files(folder: Path, files: dict[str, Writer]) -> tuple[Path, ...]:
    """Write files, whole or not at all, and return their paths; the names may have folders in front.

    Raises:
        TargetError: the folder cannot be written, or holds one of the files already.
    """
    paths = [folder / name for name in files]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                raise TargetError(f"{path} exists: choose another folder or remove it")
        for path, write in zip(paths, files.values(), strict=True):
            with _whole_or_not(path) as file:
                write(file)
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written: {error.strerror} ({error.filename})") from error
    return tuple(paths)


@contextmanager
def _whole_or_not(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with open(partial, "wb", buffering=1 << 20) as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _val_numbers(spec: SynthSpec) -> list[int]:
    """Choose validation images: an equal share of each chosen class as far as that goes, then any others."""
    by_class: dict[int, list[int]] = {}
    for number, index in enumerate(ilsvrc2012.val_class_indices(), 1):
        by_class.setdefault(index, []).append(number)
    order = (
        number
        for indices in (range(spec.classes), range(spec.classes, len(ilsvrc2012.WNIDS)))
        for turn in range(ilsvrc2012.VAL_IMAGES_PER_CLASS)
        for number in (by_class[index][turn] for index in indices)
    )
    return sorted(itertools.islice(order, spec.val_images))


def _write_train(file: BinaryIO, spec: SynthSpec) -> None:
    for index in range(spec.classes):
        images = train_images(spec, index)
        file.write(_header(f"{ilsvrc2012.WNIDS[index]}.tar", flat_bytes(images, spec), _mtime_s(index), spec))
        write_flat(file, images=images, spec=spec)
    _close_tar(file, file.tell())


def write_flat(file: BinaryIO, *, images: list[SynthImage], spec: SynthSpec) -> None:
    """Write a tar of images, such as an inner tar or the validation archive."""
    start = file.tell()
    headers = [_header(image.name, image.size_bytes, image.mtime_s, spec) for image in images]
    _write_members(file, images, headers, spec)
    _close_tar(file, file.tell() - start)


def flat_bytes(images: list[SynthImage], spec: SynthSpec) -> int:
    """Return the length of what `write_flat` writes."""
    headers = (_header(image.name, image.size_bytes, image.mtime_s, spec) for image in images)
    return _closed(sum(map(len, headers)) + sum(_padded(image.size_bytes) for image in images))


def _write_members(file: BinaryIO, images: list[SynthImage], headers: list[bytes], spec: SynthSpec) -> None:
    for image, header in zip(images, headers, strict=True):
        file.write(header)
        if spec.bodies == "holes":
            file.seek(_padded(image.size_bytes), os.SEEK_CUR)
        else:
            file.writelines(image.pieces())
            file.write(bytes(-image.size_bytes % BLOCK))


def _write_class_index(file: BinaryIO) -> None:
    # As Keras has it: the first of the words, joined by underscores.
    names = (words.partition(",")[0].replace(" ", "_") for words in ilsvrc2012.class_names())
    entries = {str(index): pair for index, pair in enumerate(zip(ilsvrc2012.WNIDS, names, strict=True))}
    file.write(json.dumps(entries).encode())


def _write_val_labels(file: BinaryIO, numbers: list[int]) -> None:
    table = ilsvrc2012.val_class_indices()
    wnids = (ilsvrc2012.WNIDS[table[number - 1]] for number in numbers)
    file.writelines(f"{ilsvrc2012.val_name(n)} {wnid}\n".encode() for n, wnid in zip(numbers, wnids, strict=True))


@functools.cache
def _random_bytes() -> memoryview:
    """Return what the comments of all images are cut from: made once, as random bytes are slow to make."""
    return memoryview(random.Random("pool").randbytes(_POOL_BYTES))


def _header(name: str, size_bytes: int, mtime_s: int, spec: SynthSpec) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uid, info.gid, info.gname = size_bytes, 0o644, 2016, 2016, "imagenet"
    info.mtime = mtime_s
    if spec.tar_format == "pax":
        info.mtime += 0.25  # what fits no ustar field gets a pax record, as pax tars have
    return info.tobuf(_FORMATS[spec.tar_format])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _closed(length: int) -> int:
    """Return the length of a tar with its end-of-archive blocks, filled up to a whole record."""
    return -(-(length + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _close_tar(file: BinaryIO, length: int) -> None:
    file.write(bytes(_closed(length) - length))
    file.flush()
