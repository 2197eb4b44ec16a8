"""The kinds of archives in which people have ImageNet, made from the same synthetic images.

All kinds of one seed hold the same images under the data set's own names, so that all of them unpack to one tree.
The shapes are those that public documentation describes: official archives, the outer archive already unpacked,
ImageNet-21K's with a leading folder, Kaggle's zip and tar.gz, Hugging Face's tar.gz and parquet files.
"""

from __future__ import annotations

import functools
import gzip
import io
import random
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, BinaryIO

from imagenet_unpack.dataset import ilsvrc2012, synth
from imagenet_unpack.dataset.synth import SynthImage, SynthSpec, Writer
from imagenet_unpack.errors import UsageError

_KAGGLE_DATA = "ILSVRC/Data/CLS-LOC"
_KAGGLE_ZIP = "imagenet-object-localization-challenge.zip"
_KAGGLE_TARGZ = "imagenet_object_localization_patched2019.tar.gz"
_TRAIN_PIECES = 5
_ROW_GROUP_IMAGES = 100
_PARQUET_FILE_IMAGES = 1000
_COPY_BYTES = 1 << 20
_GZIP_LEVEL = 1  # the bodies do not compress
KINDS = (
    "official",
    "official-targz",
    "folder",
    "winter21",
    "kaggle-zip",
    "kaggle-zip-targz",
    "kaggle-targz",
    "hf-targz",
    "hf-parquet",
)
_WITH_HOLES = frozenset({"official", "folder"})


def files_of(kind: str, spec: SynthSpec) -> dict[str, Writer]:
    """Return the files of one of `KINDS` by name, and what writes each, for `synth.write_files`.

    Raises:
        UsageError: the kind has no holes, or pyarrow is missing.
    """
    if spec.bodies == "holes" and kind not in _WITH_HOLES:
        raise UsageError(f"--bodies holes: works for --kind {' and '.join(sorted(_WITH_HOLES))} alone")
    if kind == "official":
        return synth.official_files(spec)
    if kind == "official-targz":
        return _official_targz(spec)
    if kind == "folder":
        return _folder(spec)
    if kind == "winter21":
        return {"winter21_whole.tar": functools.partial(_write_winter21, spec=spec)}
    if kind.startswith("kaggle"):
        return _kaggle(kind, spec)
    return _hugging_face_parquet(spec) if kind == "hf-parquet" else _hugging_face_targz(spec)


def _official_targz(spec: SynthSpec) -> dict[str, Writer]:
    def compressed(write: Writer) -> Writer:
        def write_compressed(file: BinaryIO) -> None:
            # A file in between: the writer asks for its position, which a gzip stream does not have.
            with tempfile.TemporaryFile() as plain, _gzip(file) as packed:
                write(plain)
                plain.seek(0)
                shutil.copyfileobj(plain, packed, _COPY_BYTES)

        return write_compressed

    return {
        f"{name}.gz" if name.endswith(".tar") else name: compressed(write) if name.endswith(".tar") else write
        for name, write in synth.official_files(spec).items()
    }


def _folder(spec: SynthSpec) -> dict[str, Writer]:
    files = synth.official_files(spec)
    del files[ilsvrc2012.TRAIN_ARCHIVE_NAME]
    inner: dict[str, Writer] = {
        f"ILSVRC2012_img_train/{ilsvrc2012.WNIDS[index]}.tar": functools.partial(
            synth.write_flat, images=synth.train_images(spec, index), spec=spec
        )
        for index in range(spec.classes)
    }
    return inner | files


def _write_winter21(file: BinaryIO, spec: SynthSpec) -> None:
    """Write inner tars below a folder; within them are a folder header and GNU long names, as in fall11_whole.tar."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as outer:
        outer.addfile(_folder_info("winter21_whole"))
        for index in range(spec.classes):
            wnid = ilsvrc2012.WNIDS[index]
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as inner:
                inner.addfile(_folder_info(wnid))
                for image in synth.train_images(spec, index):
                    inner.addfile(_info(f"{wnid}/{image.name}", image), io.BytesIO(image.body()))
            info = tarfile.TarInfo(f"winter21_whole/{wnid}.tar")
            info.size = out.tell()
            out.seek(0)
            outer.addfile(info, out)


def _kaggle(kind: str, spec: SynthSpec) -> dict[str, Writer]:
    csv = {"LOC_val_solution.csv": _solution(spec), "LOC_synset_mapping.txt": _synset_mapping()}
    tables: dict[str, Writer] = {name: functools.partial(_write_bytes, data=data) for name, data in csv.items()}
    if kind == "kaggle-targz":
        return {_KAGGLE_TARGZ: functools.partial(_write_kaggle_targz, spec=spec), **tables}

    def write_zip(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_GZIP_LEVEL) as archive:
            for name, data in csv.items():
                _add_to_zip(archive, name, [data], 0)
            if kind == "kaggle-zip-targz":
                with archive.open(zipfile.ZipInfo(_KAGGLE_TARGZ), "w", force_zip64=True) as inner:
                    _write_kaggle_targz(inner, spec)
                return
            for image, path in _kaggle_paths(spec):
                _add_to_zip(archive, path, image.pieces(), image.mtime_s)
                if image.name.startswith("n"):
                    annotation = path.replace("/Data/", "/Annotations/").replace(".JPEG", ".xml")
                    _add_to_zip(archive, annotation, [b"<annotation/>\n"], image.mtime_s)

    return {_KAGGLE_ZIP: write_zip}


def _kaggle_paths(spec: SynthSpec) -> Iterator[tuple[SynthImage, str]]:
    for image in synth.test_images(spec):
        yield image, f"{_KAGGLE_DATA}/test/{image.name}"
    for image in _all_train_images(spec):
        yield image, f"{_KAGGLE_DATA}/train/{ilsvrc2012.WNIDS[image.class_index]}/{image.name}"
    for image in synth.val_images(spec):
        yield image, f"{_KAGGLE_DATA}/val/{image.name}"


def _add_to_zip(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], mtime_s: int) -> None:
    info = zipfile.ZipInfo(name, time.gmtime(max(mtime_s, 315_532_800))[:6])  # zip's time begins with 1980
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o100644 << 16
    with archive.open(info, "w") as member:
        for piece in pieces:
            member.write(piece)


def _write_kaggle_targz(file: IO[bytes], spec: SynthSpec) -> None:
    _write_targz(file, ((path, image) for image, path in _kaggle_paths(spec)))


def _solution(spec: SynthSpec) -> bytes:
    rows = (
        f"{image.name.removesuffix('.JPEG')},{ilsvrc2012.WNIDS[image.class_index]} 85 1 499 272 \n"
        for image in synth.val_images(spec)
    )
    return ("ImageId,PredictionString\n" + "".join(rows)).encode()


def _synset_mapping() -> bytes:
    names = zip(ilsvrc2012.WNIDS, ilsvrc2012.class_names(), strict=True)
    return "".join(f"{wnid} {words}\n" for wnid, words in names).encode()


def _hugging_face_targz(spec: SynthSpec) -> dict[str, Writer]:
    def writer(images: list[SynthImage]) -> Writer:
        return functools.partial(_write_targz, members=[(_labelled(image), image) for image in images])

    train = _shuffled_train_images(spec)
    files = {f"train_images_{piece}.tar.gz": writer(train[piece::_TRAIN_PIECES]) for piece in range(_TRAIN_PIECES)}
    if spec.val_images:
        files["val_images.tar.gz"] = writer(synth.val_images(spec))
    if spec.test_images:
        files["test_images.tar.gz"] = writer(synth.test_images(spec))
    return files


def _hugging_face_parquet(spec: SynthSpec) -> dict[str, Writer]:
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise UsageError("--kind hf-parquet needs pyarrow: pip install 'imagenet_unpack[parquet]'") from None
    files: dict[str, Writer] = {}
    splits = (
        ("train", _shuffled_train_images(spec)),
        ("validation", synth.val_images(spec)),
        ("test", synth.test_images(spec)),
    )
    for split, images in splits:
        count = -(-len(images) // _PARQUET_FILE_IMAGES)
        for number in range(count):
            part = images[number::count]
            name = f"{split}-{number:05d}-of-{count:05d}.parquet"
            files[name] = functools.partial(_write_parquet, images=part, labelled=split != "test")
    return files


def _write_parquet(file: BinaryIO, images: list[SynthImage], *, labelled: bool) -> None:
    """Write what `datasets` writes: an image column of bytes and path, labels as class indices, 100 rows a group."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - likewise

    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image_type), ("label", pa.int64())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(images), _ROW_GROUP_IMAGES):
            group = images[start : start + _ROW_GROUP_IMAGES]
            rows: list[dict[str, Any]] = [
                {
                    "image": {"bytes": image.body(), "path": _labelled(image)},
                    "label": image.class_index if labelled else -1,
                }
                for image in group
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _labelled(image: SynthImage) -> str:
    """Return the name with the wnid that Hugging Face appends to it."""
    if image.name.startswith("ILSVRC2012_test"):
        return image.name
    return f"{image.name.removesuffix('.JPEG')}_{ilsvrc2012.WNIDS[image.class_index]}.JPEG"


def _all_train_images(spec: SynthSpec) -> Iterator[SynthImage]:
    for index in range(spec.classes):
        yield from synth.train_images(spec, index)


def _shuffled_train_images(spec: SynthSpec) -> list[SynthImage]:
    images = list(_all_train_images(spec))
    random.Random(f"{spec.seed} shuffle").shuffle(images)
    return images


def _write_bytes(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _write_targz(file: IO[bytes], members: Iterable[tuple[str, SynthImage]]) -> None:
    with _gzip(file) as packed, tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for path, image in members:
            archive.addfile(_info(path, image), io.BytesIO(image.body()))


def _gzip(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=_GZIP_LEVEL, mtime=0)


def _info(path: str, image: SynthImage) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = image.size_bytes, image.mtime_s, 0o644
    return info


def _folder_info(path: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info
