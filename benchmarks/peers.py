"""Compare imagenet_unpack with other ways to unpack the train archive, and with the limits of the machine.

    python benchmarks/peers.py --make --base-dir /data/bench        # 40 classes x 1300 images, about 6 GB
    python benchmarks/peers.py --base-dir /data/bench --candidates ours,recipe,plain --fs xfs --repeats 5

Run as root, every run has a fresh file system (an image in --scratch, through a direct-io loop device) and a cold
cache; else a new folder each time. Candidates take turns: A B C, A B C, ... An output that is not the archive's to
the name and size of every file (with --compare: to the byte) does not count. All raw figures go to --json, after
every run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _lib

ARCHIVE_NAME = "ILSVRC2012_img_train.tar"
HERE = Path(__file__).resolve().parent
# Programs run in "$target", an empty folder; "--no-same-owner" is what a user without root gets, and the cheaper.
SHELL = """
cd "$2"
{tar} -xf "$1" {owner}
for inner in *.tar; do mkdir "${{inner%.tar}}"; {tar} -xf "$inner" {owner} -C "${{inner%.tar}}"; rm "$inner"; done
"""
XARGS = """
cd "$2"
tar -xf "$1" --no-same-owner
one='d=${1%.tar}; mkdir "$d" && tar -xf "$1" --no-same-owner -C "$d" && rm "$1"'
printf '%s\\0' *.tar | xargs -0 -n 1 -P "$3" sh -c "$one" sh
"""
TO_COMMAND = """
cd "$2"
tar -xf "$1" --to-command='d=${TAR_FILENAME%.tar}; mkdir "$d" && tar -xf - --no-same-owner -C "$d"'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a candidate is given; `train` is the folder for the class folders, empty and there."""

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
        needs: programs without which it is left out.
        copies: it copies the archive and makes no tree: a limit of the device.
    """

    does: str
    command: Callable[[Setup], list[str]]
    needs: tuple[str, ...] = ()
    copies: bool = False


def ours(setup: Setup) -> list[str]:
    # Folders named by wnid: the same work as the default layout, and trees that compare name by name.
    return [sys.executable, "-m", "imagenet_unpack", "--base-dir", str(setup.archive.parent),
            "--target-dir", str(setup.train.parent), "--workers", str(setup.workers), "--splits", "train",
            "--layout", "wnid", "--progress", "none"]  # fmt: skip


def loop(name: str) -> Callable[[Setup], list[str]]:
    return lambda s: [sys.executable, str(HERE / "loops.py"), name, str(s.archive), str(s.train), str(s.workers)]


def plain_c(mode: str) -> Callable[[Setup], list[str]]:
    return lambda s: [str(s.plain_c), str(s.archive), str(s.train), str(s.workers), mode]


def shell(script: str) -> Callable[[Setup], list[str]]:
    return lambda s: ["bash", "-euc", script, "bash", str(s.archive), str(s.train), str(s.workers)]


CANDIDATES = {
    "ours": Candidate(does="imagenet_unpack, check and manifest included", command=ours),
    "recipe": Candidate(does="shutil.unpack_archive twice, inner tars on disk", command=loop("recipe")),
    "shell": Candidate(
        does="tar, then a shell loop of tar over the inner tars",
        command=shell(SHELL.format(tar="tar", owner="--no-same-owner")),
        needs=("tar",),
    ),
    "bsdtar": Candidate(
        does="the same loop with bsdtar", command=shell(SHELL.format(tar="bsdtar", owner="-o")), needs=("bsdtar",)
    ),
    "xargs": Candidate(does="tar, then xargs -P with a tar for each inner tar", command=shell(XARGS), needs=("xargs",)),
    "to-command": Candidate(does="tar --to-command, no inner tars on disk", command=shell(TO_COMMAND), needs=("tar",)),
    "pool": Candidate(does="tarfile in a process pool, no inner tars on disk", command=loop("pool")),
    "plain": Candidate(does="plainest window loop in Python: no digest, check, progress", command=loop("plain")),
    "plain-uncached": Candidate(does="the same with reads that leave no cache behind", command=loop("plain-uncached")),
    "plain-c": Candidate(does="plainest window loop in C", command=plain_c("buffered"), needs=("gcc",)),
    "plain-c-uncached": Candidate(
        does="the same with reads that leave no cache behind", command=plain_c("uncached"), needs=("gcc",)
    ),
    "dd": Candidate(
        does="limit: copy of the archive, direct reads and writes",
        command=lambda s: ["dd", f"if={s.archive}", f"of={s.train}/copy", "bs=8M", "iflag=direct", "oflag=direct"],
        copies=True,
    ),
    "cp": Candidate(
        does="limit: copy of the archive, buffered",
        command=lambda s: ["cp", "--reflink=never", str(s.archive), f"{s.train}/copy"],
        copies=True,
    ),
}


def main() -> int:
    options = parse_arguments()
    names = options.candidates
    _lib.stop_on_sigterm()
    with contextlib.ExitStack() as undo:
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="peers-", dir=options.scratch)))
        archive = undo.enter_context(archive_in_place(options, scratch))
        size_bytes = archive.stat().st_size
        require_room(options, size_bytes, runs=len(names) * options.repeats)
        binary = scratch / "plain"
        if any("gcc" in CANDIDATES[name].needs for name in names):
            _lib.call("gcc", "-O2", "-Wall", "-Wextra", "-o", str(binary), str(HERE / "plain.c"))
        expected = {whole: _lib.tree_of_archive(archive, contents=whole) for whole in {False, options.compare}}
        report = {
            "schema": 1,
            "benchmark": "peers",
            **_lib.facts(),
            "file_system": options.fs,
            "image_on": _lib.file_system_of(scratch),
            "archive": {"on": _lib.file_system_of(archive), "size_bytes": size_bytes, "files": expected[False].files},
            "cache": "warm" if options.warm else "cold",
            "workers": options.workers,
            "order": names,
            "runs": [],
        }
        runs: list[dict[str, object]] = []
        print(f"{expected[False].files} files, {size_bytes / 1e9:.2f} GB on {report['archive']}; {options.fs}", flush=True)
        for turn in range(options.repeats):
            for name in names:
                contents = options.compare and turn == 0
                run = run_once(name, options, archive, scratch, binary, expected[contents], contents=contents)
                runs.append({"candidate": name, "turn": turn, **run})
                write_report(options.json, report | {"runs": runs, "summary": summarise(runs, names[0])})
                print(f"{turn + 1}  {name:<17} {run['elapsed_s']:7.2f} s  {run['error'] or ''}", flush=True)
    print_summary(summarise(runs, names[0]), names[0], size_bytes)
    print(f"all figures: {options.json}")
    return int(any(run["error"] for run in runs))
