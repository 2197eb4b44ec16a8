"""Make a published tree of the whole data set's shape with empty images, for `check.py`: all names, no bytes.

python benchmarks/empty_tree.py TARGET [--layout wnid]      # 1,331,167 inodes: see `mkfs.ext4 -N`

The numbers in the train names are made up (in rising order, with gaps); counts, classes and val names are the published
ones. Files are made in the order of their numbers, as `unpack` makes them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import xxhash

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.model import LAYOUTS, ClassRef, Layout, SplitName, class_refs
from imagenet_unpack.targets import manifest, records
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths, state_folder

SEED = 20261125
DIGEST = xxhash.xxh3_64(b"").intdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="index")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one class in N alone")
    options = parser.parse_args()
    target: Path = options.target
    state_folder(target).mkdir(parents=True)
    records.save(Disk(), state_folder(target) / "record.json", records.TargetRecord())
    refs = class_refs(ilsvrc2012.WNIDS, options.layout)[:: options.every]
    publish(target, "train", refs, {ref: train_names(ref) for ref in refs}, options.layout)
    val: dict[int, list[str]] = {}
    for number, index in enumerate(ilsvrc2012.val_class_indices(), 1):
        val.setdefault(index, []).append(ilsvrc2012.val_name(number))
    publish(target, "val", refs, {ref: val[ref.index] for ref in refs}, options.layout)
    return 0


def train_names(ref: ClassRef) -> list[str]:
    """Return as many names as the class has images."""
    count = ilsvrc2012.train_images(ref.index)
    numbers = sorted(random.Random(SEED + ref.index).sample(range(20 * count), count))
    return [f"{ref.wnid}_{number}.JPEG" for number in numbers]


def publish(
    target: Path, split: SplitName, refs: tuple[ClassRef, ...], names: dict[ClassRef, list[str]], layout: Layout
) -> None:
    """Make a split's files, manifest and record."""
    paths = SplitPaths(target, split)
    rows = []
    for ref in refs:
        folder = paths.published / ref.folder
        folder.mkdir(parents=True)
        folder_fd = os.open(folder, os.O_RDONLY)
        for name in names[ref]:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=folder_fd))
            rows.append(manifest.row(f"{split}/{ref.folder}/{name}", ref.index, ref.wnid, 0, DIGEST))
        os.close(folder_fd)
    manifest.write(paths.manifest, [sorted(rows)])
    identity = records.Identity(split=split, layout=layout, size_bytes=0, mtime_ns=0, headers="", labels="")
    records.save(
        Disk(),
        paths.record,
        records.SplitRecord(
            identity=identity,
            official=True,
            classes=refs,
            images=len(rows),
            size_bytes=0,
            manifest_xxh3=manifest.file_digest(paths.manifest),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
