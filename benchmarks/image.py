"""Images against other ways to the same: making them, random reads in them, and the full count of images.

    python benchmarks/image.py make  --fs ext4 --classes 30 --images 1300   # image, cp, dd, unpack, unpack + mksquashfs
    python benchmarks/image.py read  --fs ext4 --classes 30 --images 1300   # our image, mksquashfs' image, the tree
    python benchmarks/image.py scale --classes 1000                         # real counts, holes, btrfs with zstd

As root: file systems are fresh, the cache is cold. Results go to image-<what>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _lib

PROGRAM = [sys.executable, "-m", "imagenet_unpack"]
ARCHIVE = "ILSVRC2012_img_train.tar"
PLAIN_SQUASHFS = ["-noappend", "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX"]
READERS = 4
READ_IMAGES = 2500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "read", "scale"))
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR")
    parser.add_argument("--fs", choices=("ext4", "xfs", "btrfs"), default="ext4")
    parser.add_argument("--classes", type=int, default=30)
    parser.add_argument("--images", type=int, default=1300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    _lib.stop_on_sigterm()
    benchmark: Callable[[argparse.Namespace, Path], list[dict[str, object]]] = {
        "make": make, "read": read, "scale": scale,
    }[options.what]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="image-", dir=options.scratch) as name:
        rows = benchmark(options, Path(name))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = {"schema": 1, "benchmark": f"image-{options.what}", **_lib.facts(), "options": values, "rows": rows}
    Path(f"image-{options.what}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def make(options: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    """Make the same data set available in several ways, in turn; the archive lies on the same file system."""
    rows = []
    for turn in range(options.repeat):
        for name, commands in candidates(options.workers, options.fs).items():
            with _lib.fresh_place(options.fs, scratch, 40 << 30) as place:
                synth(place, options, "--val-images", "0")
                cache = _lib.prepare_cache(place / ARCHIVE, warm=False)
                used_before = used_bytes(place)
                usages = [run(command, place) for command in commands]
                added = used_bytes(place) - used_before
                elapsed_s = sum(usage.elapsed_s for usage in usages)
                row: dict[str, object] = {
                    "candidate": name,
                    "turn": turn,
                    "load": os.getloadavg(),
                    "cache": cache,
                    "archive_bytes": (place / ARCHIVE).stat().st_size,
                    "elapsed_s": elapsed_s,
                    "cpu_s": sum(usage.cpu_s for usage in usages),
                    "peak_tree_bytes": max(usage.peak_tree_bytes for usage in usages),
                    "added_bytes": added,
                }
            rows.append(row)
            print(f"{name:20}{elapsed_s:8.2f} s {added / 1e6:10.1f} MB added", flush=True)
    return rows


def candidates(workers: int, file_system: str) -> dict[str, list[list[str]]]:
    """Return the commands of each way; they are run in the folder of the archive."""
    image = [*PROGRAM, "image", "--workers", str(workers), "--progress", "none"]
    unpack = [*PROGRAM, "unpack", "--target-dir", "tree", "--workers", str(workers), "--progress", "none"]
    ways = {
        "image copy": [[*image, "--method", "copy"]],
        "image in-place": [[*image, "--method", "in-place", "--yes"]],
        "cp": [["cp", "--reflink=never", ARCHIVE, "copy"]],
        "dd direct": [["dd", f"if={ARCHIVE}", "of=copy", "bs=8M", "iflag=direct", "oflag=direct", "status=none"]],
        "unpack": [unpack],
        "unpack, mksquashfs": [unpack, ["mksquashfs", "tree/train", "out.sqfs", *PLAIN_SQUASHFS]],
    }
    if file_system != "ext4":
        ways["image reflink"] = [[*image, "--method", "reflink"]]
    return ways


def read(options: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    """Read random images from freshly mounted images, ours and mksquashfs' of the same tree, and from the tree.

    Cold, and warm: the image file is in the page cache, so that what is measured is the work of the file system.
    """
    rows: list[dict[str, object]] = []
    roots = {"our image": "train", "mksquashfs": "", "mksquashfs, no fragments": ""}
    with _lib.fresh_place(options.fs, scratch, 60 << 30) as place:
        synth(place, options, "--val-images", "0")
        run([*PROGRAM, "unpack", "--target-dir", "tree", "--progress", "none"], place)
        run([*PROGRAM, "image", "--method", "copy", "--output", "our image", "--progress", "none"], place)
        run(["mksquashfs", "tree/train", "mksquashfs", *PLAIN_SQUASHFS], place)
        run(["mksquashfs", "tree/train", "mksquashfs, no fragments", *PLAIN_SQUASHFS, "-no-fragments"], place)
        names = sorted(path.relative_to(place / "tree/train").as_posix() for path in place.glob("tree/train/*/*"))
        point = scratch / "mount"
        point.mkdir()
        for turn in range(options.repeat):
            chosen = random.Random(turn).sample(names, min(READ_IMAGES, len(names)))
            for cache in ("cold", "warm"):
                for name in (*roots, *(["tree"] if cache == "cold" else [])):
                    with contextlib.ExitStack() as stack:
                        root = place / "tree/train"
                        if name in roots:
                            _lib.call("mount", "-o", "loop,ro", str(place / name), str(point))
                            stack.callback(_lib.call, "umount", str(point))
                            root = point / roots[name]
                        _lib.prepare_cache(place / (name if name in roots else ARCHIVE), warm=cache == "warm")
                        images_per_s = len(chosen) / read_all(root, chosen)
                    row = {"candidate": name, "cache": cache, "turn": turn, "readers": READERS}
                    rows.append({**row, "images_per_s": images_per_s, "load": os.getloadavg()})
                    print(f"{name:26}{cache:6}{images_per_s:10,.0f} images/s", flush=True)
    return rows


def read_all(root: Path, names: Sequence[str]) -> float:
    """Return the seconds that some processes need to read all of these files once."""
    shares = [[str(root / name) for name in names[number::READERS]] for number in range(READERS)]
    with multiprocessing.Pool(READERS) as pool:
        pool.map(len, [[]] * READERS)  # started before the clock is
        began_s = time.perf_counter()
        pool.map(read_files, shares, chunksize=1)
        return time.perf_counter() - began_s


def read_files(paths: Sequence[str]) -> None:
    """Read some files."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.read()


def scale(options: argparse.Namespace, scratch: Path) -> list[dict[str, object]]:
    """Make images of archives of the real counts, whose bodies are holes, by shared extents and in place."""
    rows = []
    with _lib.fresh_place("btrfs", scratch, 400 << 30) as place:
        _lib.call("mount", "-o", "remount,compress=zstd", str(place))
        shape = ["--classes", str(options.classes), "--real-counts", "--val-images", str(50 * options.classes)]
        _lib.call(*PROGRAM, "synth", str(place), *shape, "--bodies", "holes")
        image = [*PROGRAM, "image", "--workers", str(options.workers), "--progress", "none"]
        for name, extra in (("reflink", ["--method", "reflink"]), ("in-place", ["--method", "in-place", "--yes"])):
            _lib.prepare_cache(place / ARCHIVE, warm=False)
            used_before = used_bytes(place)
            usage = run([*image, *extra], place)
            added = used_bytes(place) - used_before
            rows.append({"candidate": name, "added_bytes": added, "load": os.getloadavg(), **dataclasses.asdict(usage)})
            print(
                f"{name:12}{usage.elapsed_s:8.1f} s {usage.cpu_s:8.1f} s of CPU {usage.peak_tree_bytes / 1e6:8.0f} MB "
                f"{added / 1e6:10.1f} MB added",
                flush=True,
            )
            if name == "reflink":
                (place / "ImageNet.sqfs").unlink()
    return rows


def synth(place: Path, options: argparse.Namespace, *more: str) -> None:
    """Write archives of incompressible images."""
    shape = ["--classes", str(options.classes), "--images", str(options.images)]
    made = place / "made"
    _lib.call(*PROGRAM, "synth", str(made), *shape, *more)
    for path in made.iterdir():
        path.rename(place / path.name)
    shutil.rmtree(made)


def run(command: Sequence[str], place: Path) -> _lib.Usage:
    """Run a command in the folder of the archives and flush its file system; it must succeed."""
    usage = _lib.measure(command, place, cwd=place)
    if usage.error:
        raise SystemExit(f"{' '.join(command)}: {usage.error}")
    return usage


def used_bytes(place: Path) -> int:
    """Return how many bytes of a file system are used, once all is written."""
    _lib.call("sync", "-f", str(place))
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


if __name__ == "__main__":
    sys.exit(main())
