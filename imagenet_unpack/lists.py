"""Lists of images and class indices for other frameworks, from the manifests of a target.

Formats:

- `caffe`: `train.txt`, `val.txt`, a path below the split's folder and the class index a line
  (https://github.com/BVLC/caffe/blob/master/examples/imagenet/readme.md); MMPretrain's `ann_file` is the same
  (https://mmpretrain.readthedocs.io/en/latest/user_guides/dataset_prepare.html)
- `dali`: `train.txt`, `val.txt`, a path below the target and the class index a line: `file_list` and `file_root` of
  https://docs.nvidia.com/deeplearning/dali/user-guide/docs/operations/nvidia.dali.fn.readers.file.html
- `paddle`: `train_list.txt`, `val_list.txt`, likewise below the target
  (https://github.com/PaddlePaddle/PaddleClas/blob/release/2.5/docs/en/data_preparation/classification_dataset_en.md)
- `torchvision`: `meta.bin`, what `torchvision.datasets.ImageNet` reads beside the class folders: a pair of names by
  wnid and the wnids of the validation images (`load_meta_file` in
  https://github.com/pytorch/vision/blob/main/torchvision/datasets/imagenet.py); extra `[torch]`
- `xxhsum`: `train.xxh3`, `val.xxh3`, for `xxhsum -c` (https://github.com/Cyan4973/xxHash/blob/dev/cli/xxhsum.1.md)
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import TargetError, UsageError
from imagenet_unpack.model import SplitName
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.training import Samples, samples

ListFormat = Literal["caffe", "dali", "paddle", "torchvision", "xxhsum"]
_SPLITS: tuple[SplitName, ...] = ("train", "val")


def write_lists(target: Path, list_format: ListFormat, output: Path) -> tuple[Path, ...]:
    """Write the lists of train and val, as far as they are there, and return their paths.

    Args:
        target: the folder that holds the manifests, unpacked or mounted from an image.
        list_format: one of those described at the head of this module.
        output: the folder to write to, made where it is missing. A list that is there already and the same is kept.

    Raises:
        TargetError: no split is there, another file has the name of a list, or `output` cannot be written.
        CheckError: a manifest is damaged.
        UsageError: the format needs another layout, an extra that is missing, or digests that the manifest lacks.
    """
    files = {output / name: data for name, data in _files(target, list_format)}
    try:
        for path, data in files.items():
            if path.exists() and path.read_bytes() != data:
                raise TargetError(f"{path} exists and differs: move it away or choose another --output")
        output.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            Disk(durable=False).write_file(path, data, sync=False)
    except OSError as error:
        where = error.filename or output
        raise TargetError(f"{where}: cannot be written: {error.strerror}: choose another --output") from error
    return tuple(files)


def _files(target: Path, list_format: ListFormat) -> Iterator[tuple[str, bytes]]:
    splits = [split for split in _SPLITS if (target / manifest.manifest_name(split)).exists()]
    if not splits:
        raise TargetError(f"{target}: has no manifest: give the folder that unpack wrote, or an image's mount point")
    if list_format == "torchvision":
        yield "meta.bin", _meta_bin(target, splits)
        return
    for split in splits:
        if list_format == "xxhsum":
            yield f"{split}.xxh3", _digests(target, split)
        else:
            name = f"{split}_list.txt" if list_format == "paddle" else f"{split}.txt"
            found = samples(target, split)
            below = "" if list_format == "caffe" or found.root == str(target.absolute()) else f"{split}/"
            yield name, _paths(found, below)


def _paths(found: Samples, below: str) -> bytes:
    return "".join(
        f"{below}{files.folder}/{name} {files.class_index}\n" for files in found.by_class() for name in files
    ).encode()


def _digests(target: Path, split: SplitName) -> bytes:
    lines = []
    for line in manifest.rows(target / manifest.manifest_name(split)):
        path, _, _, _, digest = line.rstrip(b"\n").split(b"\t")
        if digest == b"-":
            raise UsageError(f"{split}: this image was made without digests: its manifest has none to list")
        lines.append(b"XXH3 (%s) = %s\n" % (path, digest))
    return b"".join(lines)


def _meta_bin(target: Path, splits: list[SplitName]) -> bytes:
    if find_spec("torch") is None:
        raise UsageError("--format torchvision needs PyTorch: pip install 'imagenet_unpack[torch]'")
    for split in splits:
        other = next((files.folder for files in samples(target, split).by_class() if files.folder != files.wnid), None)
        if other is not None:
            raise UsageError(
                f"torchvision.datasets.ImageNet needs class folders named by wnid, but {split}/{other} is not: "
                "unpack with --layout wnid"
            )
    import torch  # noqa: PLC0415 - an extra, and slow

    names = {
        wnid: tuple(words.split(", ")) for wnid, words in zip(ilsvrc2012.WNIDS, ilsvrc2012.class_names(), strict=True)
    }
    val_wnids = [ilsvrc2012.WNIDS[index] for index in ilsvrc2012.val_class_indices()]
    out = io.BytesIO()
    torch.save((names, val_wnids), out)
    return out.getvalue()
