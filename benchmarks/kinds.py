"""Every kind of archive against what a user would type today, in pairs on fresh file systems.

For each kind: `imagenet_unpack --source` against `unzip`, `tar -xzf` or a loop over pyarrow, each followed by the
script that sorts the validation images into class folders; and the limit that lies in decompression alone. All outputs
are compared before a time counts. How and why: docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _lib

HERE = Path(__file__).resolve().parent
GIB = 1 << 30

# What guides for Kaggle's download say: unpack all, then move each validation image to the folder of its class.
UNZIP = """
mkdir "$2"; unzip -q "$1"/imagenet-object-localization-challenge.zip -d "$2"
"$3" "$4" sort-kaggle "$2" "$2"/LOC_val_solution.csv
"""
TAR_KAGGLE = """
mkdir "$2"; tar -xzf "$1"/imagenet_object_localization_patched2019.tar.gz --no-same-owner -C "$2"
"$3" "$4" sort-kaggle "$2" "$1"/LOC_val_solution.csv
"""
TAR_HUGGING_FACE = """
mkdir -p "$2"/train.flat "$2"/val.flat
for archive in "$1"/train_images_*.tar.gz; do tar -xzf "$archive" --no-same-owner -C "$2"/train.flat; done
tar -xzf "$1"/val_images.tar.gz --no-same-owner -C "$2"/val.flat
"$3" "$4" sort-hugging-face "$2"
"""
# tar recognises by itself what is compressed.
TAR_OFFICIAL = """
mkdir -p "$2"/train "$2"/val
tar -xf "$1"/ILSVRC2012_img_train.tar* --no-same-owner -C "$2"/train
for inner in "$2"/train/*.tar; do
  mkdir "${inner%.tar}"; tar -xf "$inner" --no-same-owner -C "${inner%.tar}"; rm "$inner"
done
tar -xf "$1"/ILSVRC2012_img_val.tar* --no-same-owner -C "$2"/val
"$3" "$4" sort-official "$2" "$1"/ImageNet_val_label.txt
"""
TAR_WINTER21 = """
mkdir "$2"; tar -xf "$1"/winter21_whole.tar --no-same-owner -C "$2"; mv "$2"/winter21_whole "$2"/train
for inner in "$2"/train/*.tar; do
  tar -xf "$inner" --no-same-owner -C "$2"/train; rm "$inner"
done
"""
TAR_FOLDER = """
mkdir -p "$2"/train "$2"/val
for inner in "$1"/ILSVRC2012_img_train/*.tar; do
  name=$(basename "$inner" .tar); mkdir "$2"/train/"$name"; tar -xf "$inner" --no-same-owner -C "$2"/train/"$name"
done
tar -xf "$1"/ILSVRC2012_img_val.tar --no-same-owner -C "$2"/val
"$3" "$4" sort-official "$2" "$1"/ImageNet_val_label.txt
"""
PYARROW = """
mkdir "$2"; "$3" "$4" pyarrow "$1" "$2"
"""
LIMIT = "# limit: writes nothing\n"
DECOMPRESS = LIMIT + 'for archive in "$1"/*.gz; do gzip -dc "$archive" > /dev/null; done'
DECOMPRESS_ISAL = LIMIT + 'for archive in "$1"/*.gz; do "$3" -m isal.igzip -dc "$archive" > /dev/null; done'


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of archive, what is typed today, and a limit: reading and decompressing alone."""

    name: str
    today: str
    needs: str
    splits: str = "train,val"
    options: tuple[str, ...] = ()
    limits: dict[str, str] = dataclasses.field(default_factory=dict)


GZIP_LIMITS = {"gzip -dc": DECOMPRESS, "igzip -dc": DECOMPRESS_ISAL}
KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="kaggle-zip", today=UNZIP, needs="unzip"),
        Kind(name="kaggle-targz", today=TAR_KAGGLE, needs="tar", limits=GZIP_LIMITS),
        Kind(name="hf-targz", today=TAR_HUGGING_FACE, needs="tar", limits=GZIP_LIMITS),
        Kind(name="official-targz", today=TAR_OFFICIAL, needs="tar", limits=GZIP_LIMITS),
        Kind(name="hf-parquet", today=PYARROW, needs="tar"),
        Kind(name="folder", today=TAR_FOLDER, needs="tar"),
        Kind(name="winter21", today=TAR_WINTER21, needs="tar", splits="train", options=("--any-wnids",)),
        Kind(name="official", today=TAR_OFFICIAL, needs="tar"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed run; `error` says why it does not count."""

    kind: str
    candidate: str
    turn: int
    usage: _lib.Usage
    error: str | None


def ours(kind: Kind, base: Path, place: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "imagenet_unpack", "--layout", "wnid", "--splits", kind.splits, *kind.options]
    command += ["--base-dir", str(base), "--target-dir", str(place), "--workers", str(workers), "--progress", "none"]
    return command


def shell(script: str, base: Path, place: Path) -> list[str]:
    program = [sys.executable, str(Path(__file__).resolve())]
    return ["bash", "-euc", script, "bash", str(base), str(place / "today"), *program]


def measure_kind(options: argparse.Namespace, kind: Kind, base: Path, scratch: Path) -> Iterator[Run]:
    """Run all candidates in turn; within a turn, all outputs must be the same."""
    for turn in range(options.repeats):
        expected: dict[str, _lib.Tree] = {}
        for candidate in ("ours", "today", *kind.limits):
            script = kind.today if candidate == "today" else kind.limits.get(candidate, "")
            with _lib.fresh_place(options.fs, scratch, place_bytes(base)) as place:
                for path in files(base):
                    _lib.prepare_cache(path, warm=options.warm)
                command = shell(script, base, place)
                if candidate == "ours":
                    command = ours(kind, base, place, options.workers)
                usage = _lib.measure(command, place, cwd=_lib.REPOSITORY)
                error = usage.error
                if not error and not script.startswith(LIMIT):
                    found = trees(place if candidate == "ours" else place / "today", contents=turn == 0)
                    expected = expected or found
                    error = None if found == expected else f"another output: {found} instead of {expected}"
            yield Run(kind=kind.name, candidate=candidate, turn=turn, usage=usage, error=error)


def trees(folder: Path, *, contents: bool) -> dict[str, _lib.Tree]:
    return {split: _lib.tree_of_folder(folder / split, contents=contents) for split in ("train", "val")}


def files(base: Path) -> list[Path]:
    return [path for path in base.rglob("*") if path.is_file()]


def place_bytes(base: Path) -> int:
    """Size a target file system: what is typed today holds some things twice for a while."""
    return sum(path.stat().st_size for path in files(base)) * 5 // 2 + 4 * GIB


# --- what the scripts above call --------------------------------------------------------------------------------------


def sort_kaggle(target: Path, solution: Path) -> None:
    data = target / "ILSVRC/Data/CLS-LOC"
    (data / "train").rename(target / "train")
    for line in solution.read_text(encoding="utf-8").splitlines()[1:]:
        name, _, prediction = line.partition(",")
        move(data / "val" / f"{name}.JPEG", target / "val" / prediction.split()[0] / f"{name}.JPEG")


def sort_hugging_face(target: Path) -> None:
    for split in ("train", "val"):
        for path in (target / f"{split}.flat").iterdir():
            name, _, wnid = path.stem.rpartition("_")
            move(path, target / split / wnid / f"{name}.JPEG")


def sort_official(target: Path, labels: Path) -> None:
    for line in labels.read_text(encoding="utf-8").splitlines():
        name, wnid = line.split()
        move(target / "val" / name, target / "val" / wnid / name)


def pyarrow_loop(base: Path, target: Path) -> None:
    import pyarrow.parquet as pq

    for path in sorted(base.glob("*.parquet")):
        split = {"train": "train", "validation": "val", "test": "test"}[path.name.partition("-")[0]]
        for batch in pq.ParquetFile(path).iter_batches(batch_size=100):
            for row in batch.to_pylist():
                name, _, wnid = row["image"]["path"].removesuffix(".JPEG").rpartition("_")
                folder = target / split / wnid
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.JPEG").write_bytes(row["image"]["bytes"])


def move(path: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    path.rename(new)


HELPERS: dict[str, Callable[..., None]] = {
    "sort-kaggle": sort_kaggle,
    "sort-hugging-face": sort_hugging_face,
    "sort-official": sort_official,
    "pyarrow": pyarrow_loop,
}


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(runs: list[Run]) -> list[dict[str, object]]:
    """Return medians of each candidate, and the times of the others as multiples of ours, turn by turn."""
    rows: list[dict[str, object]] = []
    for kind, candidate in dict.fromkeys((run.kind, run.candidate) for run in runs):
        valid = {
            run.turn: run.usage for run in runs if (run.kind, run.candidate) == (kind, candidate) and not run.error
        }
        mine = {run.turn: run.usage for run in runs if (run.kind, run.candidate) == (kind, "ours") and not run.error}
        if not valid:
            continue
        ratios = [usage.elapsed_s / mine[turn].elapsed_s for turn, usage in valid.items() if turn in mine]
        rows.append(
            {
                "kind": kind,
                "candidate": candidate,
                "runs": len(valid),
                "elapsed_s": statistics.median(usage.elapsed_s for usage in valid.values()),
                "cpu_s": statistics.median(usage.cpu_s for usage in valid.values()),
                "peak_process_bytes": max(usage.peak_process_bytes for usage in valid.values()),
                "peak_tree_bytes": max(usage.peak_tree_bytes for usage in valid.values()),
                "ratio": statistics.median(ratios) if ratios else None,
                "ratios": ratios,
            }
        )
    return rows


def valid_runs(runs: list[Run], kind: str, candidate: str) -> dict[int, _lib.Usage]:
    return {run.turn: run.usage for run in runs if (run.kind, run.candidate) == (kind, candidate) and not run.error}


def print_summary(rows: list[dict[str, object]]) -> None:
    print("\nmedians; x: time as a multiple of ours, pair by pair")
    for row in rows:
        ratio = f"{row['ratio']:6.2f}" if row["ratio"] is not None else "     -"
        print(
            f"{row['kind']:<15} {row['candidate']:<11}{row['elapsed_s']:8.2f} s {ratio}  {row['cpu_s']:7.2f} CPU s"
            f"  largest {row['peak_process_bytes'] / 1e6:6.0f} MB"  # type: ignore[operator]
        )


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in HELPERS:
        HELPERS[sys.argv[1]](*map(Path, sys.argv[2:]))
        return 0
    options = parse_arguments()
    _lib.stop_on_sigterm()
    runs: list[Run] = []
    with contextlib.ExitStack() as undo:
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="kinds-", dir=options.scratch)))
        report: dict[str, object] = {
            "schema": 1,
            "benchmark": "kinds",
            **_lib.facts(),
            "images": {"classes": options.classes, "per_class": options.images, "validation": options.val_images},
            "target": {"file_system": options.fs, "on": _lib.file_system_of(scratch)},
            "cache": "warm" if options.warm else "cold",
            "workers": options.workers,
        }
        for name in options.kinds:
            base = (options.archives or scratch) / name
            counts = ["--classes", str(options.classes), "--images", str(options.images)]
            counts += ["--val-images", str(options.val_images), "--kind", name]
            if not base.exists():
                _lib.call(sys.executable, "-m", "imagenet_unpack", "synth", str(base), *counts)
            for run in measure_kind(options, KINDS[name], base, scratch):
                runs.append(run)
                print(
                    f"{run.turn + 1}  {name:<15} {run.candidate:<11}{run.usage.elapsed_s:8.2f} s  {run.error or ''}",
                    flush=True,
                )
                text = json.dumps({**report, "runs": runs, "summary": summarise(runs)}, default=dataclasses.asdict)
                options.json.write_text(text + "\n", encoding="utf-8")
            if not options.archives:
                shutil.rmtree(base)
    print_summary(summarise(runs))
    print(f"raw figures: {options.json}")
    return int(any(run.error for run in runs))


def kind_list(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - KINDS.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return names


def parse_arguments() -> argparse.Namespace:
    installed = [name for name, kind in KINDS.items() if shutil.which(kind.needs)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.geteuid() == 0
    add = parser.add_argument
    add("--kinds", type=kind_list, default=installed, metavar="A,B,...", help="default: all that can be compared")
    add("--classes", type=int, default=13, metavar="N", help="default: %(default)s")
    add("--images", type=int, default=1300, metavar="N", help="train images a class (default: %(default)s)")
    add("--val-images", type=int, default=650, metavar="N", help="default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="turns (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--fs", choices=_lib.FILE_SYSTEMS, default="ext4" if root else "folder",
        help="file system of the target; folder needs no root (default: %(default)s)")  # fmt: skip
    add("--warm", action="store_true", help="read the archives before each run, instead of dropping the cache")
    add("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR",
        help="where archives, images and mount points go: a disk, with room (default: %(default)s)")  # fmt: skip
    add("--archives", type=Path, metavar="DIR",
        help="where archives of these counts are kept, in a folder for each kind; what is missing is made")  # fmt: skip
    add("--json", type=Path, default=Path("kinds.json"), metavar="FILE", help="raw figures (default: %(default)s)")
    options = parser.parse_args()
    if options.fs != "folder" and not root:
        parser.error(f"--fs {options.fs} needs root: use --fs folder")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
