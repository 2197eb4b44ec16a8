"""Archives of ImageNet's shape, seeded: real wnids, names and header fields, sizes of the real distribution.

The bodies begin and end like a JPEG; between them stand random bytes, or nothing (holes), so they are no pictures.
"""

from __future__ import annotations

import functools
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

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import TargetError

BLOCK = tarfile.BLOCKSIZE
TarFormat = Literal["gnu", "ustar", "pax"]
_FORMATS: dict[TarFormat, Literal[0, 1, 2]] = {
    "gnu": tarfile.GNU_FORMAT,
    "ustar": tarfile.USTAR_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
_JUNE_2012 = 1_338_508_800
_POOL_BYTES = 32 << 20
# Of the sizes' logarithms: images of the real set spread about so; a few are far larger than the mean.
_SIGMA = 0.6
_HEAD = bytes.fromhex("ffd8ffe000104a46494600010100000100010000")
_TAIL = bytes.fromhex("ffd9")


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """What to make.

    Attributes:
        classes: how many, from class index 0 on.
        images_per_class: train images a class, or None for as many as the real class has.
        val_images: validation images; those of the chosen classes first, the other classes' behind. 0: no archive.
        seed: the same seed gives the same bytes.
        mean_bytes: mean size of an image.
        tar_format: of both archives.
        bodies: `random` is incompressible; `holes` takes no room on the disk.
        label_files: write the class index and the validation labels too.
    """

    classes: int = 10
    images_per_class: int | None = 20
    val_images: int = 50
    seed: int = 0
    mean_bytes: int = 114_000
    tar_format: TarFormat = "gnu"
    bodies: Literal["random", "holes"] = "random"
    label_files: bool = True


def write_archives(folder: Path, spec: SynthSpec) -> tuple[Path, ...]:
    """Write the archives and label files into `folder` and return their paths.

    Raises:
        TargetError: the folder cannot be written, or holds one of the files already.
    """
    numbers = _val_numbers(spec)
    writers: dict[str, Callable[[BinaryIO], None]] = {
        ilsvrc2012.TRAIN_ARCHIVE_NAME: functools.partial(_write_train, spec=spec),
    }
    if numbers:
        writers[ilsvrc2012.VAL_ARCHIVE_NAME] = functools.partial(_write_val, spec=spec, numbers=numbers)
    if spec.label_files:
        writers["ImageNet_class_index.json"] = _write_class_index
        writers["ImageNet_val_label.txt"] = functools.partial(_write_val_labels, numbers=numbers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in writers:
            if os.path.lexists(folder / name):
                raise TargetError(f"{folder / name} exists: choose another folder or remove it")
        for name, write in writers.items():
            with _whole_or_not(folder / name) as file:
                write(file)
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written: {error.strerror} ({error.filename})") from error
    return tuple(folder / name for name in writers)


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
    order = [
        number
        for indices in (range(spec.classes), range(spec.classes, len(ilsvrc2012.WNIDS)))
        for turn in range(ilsvrc2012.VAL_IMAGES_PER_CLASS)
        for number in (by_class[index][turn] for index in indices)
    ]
    return sorted(order[: spec.val_images])


def _write_train(file: BinaryIO, spec: SynthSpec) -> None:
    for index in range(spec.classes):
        wnid = ilsvrc2012.WNIDS[index]
        count = spec.images_per_class or ilsvrc2012.train_images(index)
        chance = random.Random(f"{spec.seed} {wnid}")
        numbers = chance.sample(range(count * 12), count)
        sizes = [_size(chance, spec) for _ in numbers]
        headers = [
            _header(f"{wnid}_{number}.JPEG", size, spec, number) for number, size in zip(numbers, sizes, strict=True)
        ]
        length = sum(len(header) + _padded(size) for header, size in zip(headers, sizes, strict=True))
        file.write(_header(f"{wnid}.tar", _closed(length), spec, index))
        _write_members(file, headers, sizes, chance, spec)
        _close_tar(file, length)
    _close_tar(file, file.tell())


def _write_val(file: BinaryIO, spec: SynthSpec, numbers: list[int]) -> None:
    chance = random.Random(f"{spec.seed} val")
    shuffled = chance.sample(numbers, len(numbers))
    sizes = [_size(chance, spec) for _ in shuffled]
    headers = [
        _header(ilsvrc2012.val_name(number), size, spec, number) for number, size in zip(shuffled, sizes, strict=True)
    ]
    _write_members(file, headers, sizes, chance, spec)
    _close_tar(file, file.tell())


def _write_members(
    file: BinaryIO, headers: list[bytes], sizes: list[int], chance: random.Random, spec: SynthSpec
) -> None:
    pool = _random_bytes(spec.seed) if spec.bodies == "random" else b""
    for header, size in zip(headers, sizes, strict=True):
        file.write(header)
        if pool:
            file.write(_HEAD)
            left = size - len(_HEAD) - len(_TAIL)
            while left > 0:  # an image larger than the pool takes several slices of it
                start = chance.randrange(len(pool) // 2)
                piece = pool[start : start + left]
                file.write(piece)
                left -= len(piece)
            file.write(_TAIL + bytes(-size % BLOCK))
        else:
            file.seek(_padded(size), os.SEEK_CUR)


def _write_class_index(file: BinaryIO) -> None:
    # The second field is a name for people; the real names are not needed and not unique.
    file.write(json.dumps({str(index): [wnid, wnid] for index, wnid in enumerate(ilsvrc2012.WNIDS)}).encode())


def _write_val_labels(file: BinaryIO, numbers: list[int]) -> None:
    table = ilsvrc2012.val_class_indices()
    wnids = (ilsvrc2012.WNIDS[table[number - 1]] for number in numbers)
    file.writelines(f"{ilsvrc2012.val_name(n)} {wnid}\n".encode() for n, wnid in zip(numbers, wnids, strict=True))


@functools.lru_cache(maxsize=1)
def _random_bytes(seed: int) -> memoryview:
    return memoryview(random.Random(f"{seed} pool").randbytes(_POOL_BYTES))


def _size(chance: random.Random, spec: SynthSpec) -> int:
    """Draw a size from a log-normal distribution with the mean asked for."""
    size = chance.lognormvariate(math.log(spec.mean_bytes) - _SIGMA**2 / 2, _SIGMA)
    return max(int(size), len(_HEAD) + len(_TAIL))


def _header(name: str, size: int, spec: SynthSpec, salt: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uid, info.gid, info.gname = size, 0o644, 2016, 2016, "imagenet"
    info.mtime = _JUNE_2012 + salt * 7919 % (30 * 86_400)
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
