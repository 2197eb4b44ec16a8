"""Compare imagenet_unpack with other ways to unpack the train archive, and with the limits of the machine.

    python benchmarks/peers.py --base-dir /data/bench --make        # 40 classes x 1300 images, about 6 GB
    python benchmarks/peers.py --base-dir /data/bench --candidates ours,recipe,plain --fs xfs --repeats 5

As root, every run has a fresh file system (a sparse image in --scratch, through a direct-io loop device) and a cold
cache; otherwise a new folder each. Candidates take turns: A B C, A B C, ... The time includes the flush to disk. A
run counts if its output is what the archive holds, to the name and size of every file (with --compare to the byte).
All raw figures are in the JSON file, which is written after every run.
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

ARCHIVE_NAME = "ILSVRC2012_img_train.tar"
HERE = Path(__file__).resolve().parent
GIB = 1 << 30
# "$1" is the archive, "$2" the folder to make, "$3" the number of workers. The owner is not restored, as for a user who
# is not root: it is the cheaper way, and what the others do.
SHELL = """
mkdir "$2"; cd "$2"
{tar} -x {owner} -f "$1"
for inner in *.tar; do d=${{inner%.tar}}; mkdir "$d"; {tar} -x {owner} -f "$inner" -C "$d"; rm "$inner"; done
"""
XARGS = """
mkdir "$2"; cd "$2"
tar -x --no-same-owner -f "$1"
one='d=${1%.tar}; mkdir "$d" && tar -x --no-same-owner -f "$1" -C "$d" && rm "$1"'
printf '%s\\0' *.tar | xargs -0 -n 1 -P "$3" sh -c "$one" sh
"""
TO_COMMAND = """
mkdir "$2"; cd "$2"
tar -x -f "$1" --to-command='d=${TAR_FILENAME%.tar}; mkdir "$d" && tar -x --no-same-owner -f - -C "$d"'
"""


# Mounted, inner tars as folders; copied as files. The index is built anew each time, in memory.
RATARMOUNT = """
mkdir "$2" "$2.mnt"
ratarmount --recursive --strip-recursive-tar-extension --index-file :memory: "$1" "$2.mnt"
cp -r --no-preserve=all "$2.mnt"/*/ "$2"; fusermount -u "$2.mnt"; rmdir "$2.mnt"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a candidate is given; it makes the folder `train` itself."""

    archive: Path
    train: Path
    workers: int
    plain_c: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to do it.

    Attributes:
        does: what it does, in a few words.
        command: the command line for a setup.
        needs: the program without which it is left out.
        copies: a limit: it copies the archive to `train` and unpacks nothing.
    """

    does: str
    command: Callable[[Setup], list[str]]
    needs: str = "sync"
    copies: bool = False


def ours(setup: Setup) -> list[str]:
    # Folders named by wnid: the same work as the default layout, and a tree that compares name by name.
    command = [sys.executable, "-m", "imagenet_unpack", "--layout", "wnid", "--splits", "train", "--progress", "none"]
    command += ["--base-dir", str(setup.archive.parent), "--target-dir", str(setup.train.parent)]
    return [*command, "--workers", str(setup.workers)]


def loop(name: str) -> Callable[[Setup], list[str]]:
    return lambda s: [sys.executable, str(HERE / "loops.py"), name, str(s.archive), str(s.train), str(s.workers)]


def plain_c(mode: str) -> Callable[[Setup], list[str]]:
    return lambda s: [str(s.plain_c), str(s.archive), str(s.train), str(s.workers), mode]


def shell(script: str) -> Callable[[Setup], list[str]]:
    return lambda s: ["bash", "-euc", script, "bash", str(s.archive), str(s.train), str(s.workers)]


def dd(setup: Setup) -> list[str]:
    return ["dd", f"if={setup.archive}", f"of={setup.train}", "bs=8M", "iflag=direct", "oflag=direct"]


def cp(setup: Setup) -> list[str]:
    return ["cp", "--reflink=never", str(setup.archive), str(setup.train)]


GNU_SHELL = shell(SHELL.format(tar="tar", owner="--no-same-owner"))
BSD_SHELL = shell(SHELL.format(tar="bsdtar", owner="-o"))
CANDIDATES = {
    "ours": Candidate(does="imagenet_unpack with digest, manifest, check and publish", command=ours),
    "recipe": Candidate(does="shutil.unpack_archive of outer and inner tars", command=loop("recipe")),
    "shell": Candidate(does="tar, then a tar for each inner tar", command=GNU_SHELL, needs="tar"),
    "bsdtar": Candidate(does="the same with bsdtar", command=BSD_SHELL, needs="bsdtar"),
    "xargs": Candidate(does="tar, then xargs -P with tar", command=shell(XARGS), needs="xargs"),
    "to-command": Candidate(does="tar --to-command, no inner tars on disk", command=shell(TO_COMMAND), needs="tar"),
    "ratarmount": Candidate(does="mounted with ratarmount, then cp", command=shell(RATARMOUNT), needs="ratarmount"),
    "pool": Candidate(does="tarfile in a process pool, no inner tars on disk", command=loop("pool")),
    "plain": Candidate(does="plainest window loop in Python", command=loop("plain")),
    "plain-uncached": Candidate(does="the same, no page cache left behind", command=loop("plain-uncached")),
    "plain-c": Candidate(does="plainest window loop in C", command=plain_c("buffered"), needs="gcc"),
    "plain-c-uncached": Candidate(does="the same, no page cache left behind", command=plain_c("uncached"), needs="gcc"),
    "dd": Candidate(does="limit: direct copy of the archive", command=dd, needs="dd", copies=True),
    "cp": Candidate(does="limit: buffered copy of the archive", command=cp, needs="cp", copies=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed run; `error` says why it does not count."""

    candidate: str
    turn: int
    usage: _lib.Usage
    error: str | None


def main() -> int:
    options = parse_arguments()
    names: list[str] = options.candidates
    _lib.stop_on_sigterm()
    with contextlib.ExitStack() as undo:
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="peers-", dir=options.scratch)))
        archive = undo.enter_context(archive_in_place(options, scratch))
        require_room(options, scratch, archive)
        binary = scratch / "plain"
        if any(CANDIDATES[name].needs == "gcc" for name in names):
            _lib.call("gcc", "-O2", "-Wall", "-Wextra", "-o", str(binary), str(HERE / "plain.c"))
        sizes = _lib.tree_of_archive(archive, contents=False)
        contents = _lib.tree_of_archive(archive, contents=True) if options.compare else None
        report: dict[str, object] = {
            "schema": 1,
            "benchmark": "peers",
            **_lib.facts(),
            "archive": {"on": _lib.file_system_of(archive), "size_bytes": archive.stat().st_size},
            "images": {"files": sizes.files, "size_bytes": sizes.size_bytes},
            "target": {"file_system": options.fs, "on": _lib.file_system_of(scratch)},
            "workers": options.workers,
            "compared": "contents in the first turn, else names and sizes" if options.compare else "names and sizes",
        }
        cache = "warm" if options.warm else "cold"
        print(f"{sizes.files} images, {sizes.size_bytes / 1e9:.2f} GB, {cache} cache, {options.workers} workers")
        print(f"from {_lib.file_system_of(archive)} to {options.fs} on {_lib.file_system_of(scratch)}", flush=True)
        runs: list[Run] = []
        for turn in range(options.repeats):
            for name in names:
                expected = contents if contents and turn == 0 else sizes
                with _lib.fresh_place(options.fs, scratch, place_bytes(archive)) as place:
                    setup = Setup(archive=archive, train=place / "train", workers=options.workers, plain_c=binary)
                    report["cache"] = _lib.prepare_cache(archive, warm=options.warm)
                    usage = _lib.measure(CANDIDATES[name].command(setup), place, cwd=_lib.REPOSITORY)
                    error = usage.error or difference(name, setup, expected, contents=expected is contents)
                runs.append(Run(candidate=name, turn=turn, usage=usage, error=error))
                print(f"{turn + 1}  {name:<17}{usage.elapsed_s:8.2f} s  {error or ''}", flush=True)
                write_report(options.json, {**report, "runs": runs, "summary": summarise(runs, names)})
    print_summary(summarise(runs, names), sizes, baseline=names[0])
    print(f"raw figures: {options.json}")
    return int(any(run.error for run in runs))


def difference(name: str, setup: Setup, expected: _lib.Tree, *, contents: bool) -> str | None:
    """Say how the output differs from what the archive holds, or return None."""
    if CANDIDATES[name].copies:
        return None if setup.train.stat().st_size == setup.archive.stat().st_size else "the copy has another size"
    found = _lib.tree_of_folder(setup.train, contents=contents)
    return None if found == expected else f"another output: {found} instead of {expected}"


@contextlib.contextmanager
def archive_in_place(options: argparse.Namespace, scratch: Path) -> Iterator[Path]:
    """Give the archive where it lies, or a copy on a file system of its own; make it first if that was asked for."""
    archive: Path = options.base_dir / ARCHIVE_NAME
    if options.make and not archive.exists():
        counts = ["--classes", str(options.classes), "--images", str(options.images), "--val-images", "0"]
        _lib.call(sys.executable, "-m", "imagenet_unpack", "synth", str(options.base_dir), *counts)
    if not archive.exists():
        raise SystemExit(f"{archive} is missing; --make makes one")
    if not options.archive_fs:
        yield archive
        return
    with _lib.fresh_place(options.archive_fs, scratch, archive.stat().st_size * 11 // 10 + GIB) as place:
        yield Path(shutil.copy(archive, place))


def place_bytes(archive: Path) -> int:
    """Size a target file system: the recipe holds all inner tars and then the images too; free space for our gate."""
    return archive.stat().st_size * 5 // 2 + 4 * GIB


def require_room(options: argparse.Namespace, scratch: Path, archive: Path) -> None:
    if options.fs == "tmpfs":
        return
    places = len(options.candidates) * options.repeats if options.fs == "folder" else 1
    needed = archive.stat().st_size * (places * 11 + 11) // 10  # the recipe has everything twice for a while
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise SystemExit(f"{scratch.parent}: {free / GIB:.0f} GiB free, {needed / GIB:.0f} needed; see --scratch")


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Medians over the runs that count; `ratios` are the times, turn by turn, as multiples of the baseline's."""

    candidate: str
    does: str
    runs: int
    elapsed_s: float
    fastest_s: float
    slowest_s: float
    cpu_s: float
    machine_busy_s: float
    peak_process_bytes: float
    peak_tree_bytes: float
    ratio: float | None
    cpu_ratio: float | None
    ratios: list[float]


def summarise(runs: list[Run], names: list[str]) -> list[Summary]:
    """Summarise each candidate against the first one."""
    valid = {name: {run.turn: run.usage for run in runs if run.candidate == name and not run.error} for name in names}
    baseline = valid[names[0]]
    summaries = []
    for name, turns in valid.items():
        usages = list(turns.values())
        if not usages:
            continue
        pairs = [(usage, baseline[turn]) for turn, usage in turns.items() if turn in baseline]
        ratios = [mine.elapsed_s / base.elapsed_s for mine, base in pairs]
        summary = Summary(
            candidate=name,
            does=CANDIDATES[name].does,
            runs=len(usages),
            elapsed_s=statistics.median(u.elapsed_s for u in usages),
            fastest_s=min(u.elapsed_s for u in usages),
            slowest_s=max(u.elapsed_s for u in usages),
            cpu_s=statistics.median(u.cpu_s for u in usages),
            machine_busy_s=statistics.median(u.machine_busy_s for u in usages),
            peak_process_bytes=statistics.median(u.peak_process_bytes for u in usages),
            peak_tree_bytes=statistics.median(u.peak_tree_bytes for u in usages),
            ratio=statistics.median(ratios) if ratios else None,
            cpu_ratio=statistics.median(mine.cpu_s / base.cpu_s for mine, base in pairs) if pairs else None,
            ratios=ratios,
        )
        summaries.append(summary)
    return summaries


def print_summary(summaries: list[Summary], images: _lib.Tree, baseline: str) -> None:
    print(f"\nmedians; x: time and CPU as multiples of those of {baseline}, pair by pair")
    print("candidate          time s (range)          x   MB/s files/s  CPU s     x busy s largest MB tree MB")
    for s in summaries:
        spread = f"({s.fastest_s:.1f}-{s.slowest_s:.1f})"
        megabytes, files = images.size_bytes / 1e6 / s.elapsed_s, images.files / s.elapsed_s
        print(
            f"{s.candidate:<17}{s.elapsed_s:8.2f} {spread:<12}{times(s.ratio)}{megabytes:7.0f}{files:8.0f}"
            f"{s.cpu_s:7.2f}{times(s.cpu_ratio)}{s.machine_busy_s:7.2f}"
            f"{s.peak_process_bytes / 1e6:11.0f}{s.peak_tree_bytes / 1e6:8.0f}  {s.does}"
        )


def times(ratio: float | None) -> str:
    return "     -" if ratio is None else f"{ratio:6.2f}"


def write_report(path: Path, report: dict[str, object]) -> None:
    """Replace the report in one step, so that an interruption leaves the last whole one."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(report, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")
    new.replace(path)


# --- command line -----------------------------------------------------------------------------------------------------


def candidate_list(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - CANDIDATES.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CANDIDATES)}")
    return names


def parse_arguments() -> argparse.Namespace:
    installed = [name for name, candidate in CANDIDATES.items() if shutil.which(candidate.needs)]
    listing = "\n".join(f"  {name:<17} {candidate.does}" for name, candidate in CANDIDATES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"candidates:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root = os.geteuid() == 0
    add = parser.add_argument
    add("--base-dir", type=Path, required=True, metavar="DIR", help=f"folder with {ARCHIVE_NAME}")
    add("--make", action="store_true", help="make that archive if it is not there, of --classes x --images")
    add("--classes", type=int, default=40, metavar="N", help="for --make (default: %(default)s)")
    add("--images", type=int, default=1300, metavar="N", help="a class, for --make (default: %(default)s)")
    add("--candidates", type=candidate_list, default=installed, metavar="A,B,...",
        help="in this order; ratios are against the first (default: all that are installed)")  # fmt: skip
    add("--repeats", type=int, default=3, metavar="N", help="turns (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--fs", choices=_lib.FILE_SYSTEMS, default="ext4" if root else "folder",
        help="file system of the target; folder needs no root (default: %(default)s)")  # fmt: skip
    add("--archive-fs", choices=_lib.FILE_SYSTEMS,
        help="copy the archive to a file system of its own first (default: read it where it lies)")  # fmt: skip
    add("--warm", action="store_true", help="read the archive before each run, instead of dropping the cache")
    add("--compare", action="store_true", help="compare every byte in the first turn, not only names and sizes")
    add("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR",
        help="where images and mount points go: a disk, with room (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, default=Path("peers.json"), metavar="FILE", help="raw figures (default: %(default)s)")
    options = parser.parse_args()
    if options.fs != "folder" and not root:
        parser.error(f"--fs {options.fs} needs root: use --fs folder")
    options.base_dir = options.base_dir.resolve()
    return options


if __name__ == "__main__":
    raise SystemExit(main())
