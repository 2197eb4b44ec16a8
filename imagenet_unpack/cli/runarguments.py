"""Options that several commands share: sources, the run, limits, output. Light to import, as every help page is built.

Those of `unpack` have no default here: what is not given is left to `options.UnpackOptions`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from imagenet_unpack.cli import values


def group_of(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """Begin a group of options; return what adds an option without a default to it."""
    group = parser.add_argument_group(title)

    def add(option: str, text: str, **settings: object) -> None:
        group.add_argument(option, help=text, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]

    return add


def add_source_options(parser: argparse.ArgumentParser, *, tree: bool = True) -> None:
    """Add what says which images to take and, for a tree, where that goes."""
    add = group_of(parser, "what to unpack")
    add("--base-dir", "look for archives and label files in DIR (default: .)", type=values.path, metavar="DIR")
    if tree:
        add("--target-dir", "create the tree in DIR (default: BASE/ImageNet)", type=values.path, metavar="DIR")
    text = "read the train archive from FILE (default: BASE/ILSVRC2012_img_train.tar)"
    add("--train-archive", text, type=values.path, metavar="FILE")
    text = "read the validation archive from FILE (default: BASE/ILSVRC2012_img_val.tar)"
    add("--val-archive", text, type=values.path, metavar="FILE")
    text = "read the test archive from FILE (default: BASE/ILSVRC2012_img_test_v10102019.tar)"
    add("--test-archive", text, type=values.path, metavar="FILE")
    text = "recognise this archive or folder and take its splits, instead of what BASE holds; may be repeated"
    add("--source", f"{text} (default: BASE)", type=values.path, metavar="PATH", action="append")
    text = "read the classes from FILE (default: BASE/ImageNet_class_index.json if it exists, else built in)"
    add("--class-index", text, type=values.path, metavar="FILE")
    text = "read the validation labels from FILE (default: BASE/ImageNet_val_label.txt if it exists, else built in)"
    add("--val-labels", text, type=values.path, metavar="FILE")
    text = "unpack these splits only: train, val, test or a list (default: train,val, whichever archives exist)"
    add("--splits", text, type=values.splits, metavar="LIST")
    text = "unpack these classes only: 0-99,n01440764,517 or @FILE with one per line (default: all)"
    add("--classes", text, metavar="SPEC")
    text = "take inner archives of any wnids, as in ImageNet-21K; needs --splits train --layout wnid (default: off)"
    add("--any-wnids", text, action="store_true")
    text = "name class folders 0, 0000 or n01440764 (default: index); see below for training"
    if tree:
        add("--layout", text, choices=("index", "padded", "wnid"))
    text = (
        "compare the archives with the published sizes or SHA-256 digests before extracting (default: size; digest "
        "reads every byte first)"
    )
    add("--verify-archives", text, choices=("none", "size", "digest"))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add how a run is carried out: workers, parts, limits, what is kept, and its output."""
    add = group_of(parser, "workers")
    text = "run N worker processes (default: auto, the CPUs this job may use)"
    add("--workers", text, type=values.workers, metavar="N|auto")
    text = "run on local processes, in this process alone, or on a Dask cluster (default: local)"
    add("--executor", text, choices=("local", "serial", "dask"))
    add(
        "--dask-scheduler",
        "connect to the Dask scheduler at ADDRESS, such as tcp://node1:8786 (default: none)",
        metavar="ADDRESS",
    )
    text = "connect to the Dask scheduler that wrote FILE (`dask scheduler --scheduler-file FILE`) (default: none)"
    add("--dask-scheduler-file", text, type=values.path, metavar="FILE")
    text = (
        "do part I (from 0) of N of the plan and publish nothing; auto: take both from the batch system's variables; "
        "run 0/1 at last to check and publish (default: 0/1)"
    )
    add("--part", text, type=values.part, metavar="I/N|auto")
    add("--shard", argparse.SUPPRESS, type=values.part, dest="part")  # its name until 0.1.0

    add_limit_options(parser)
    add = group_of(parser, "files and unfinished runs")
    add("--keep-mtime", "set the modification times that the archive records (default: off)", action="store_true")
    text = "keep written files out of the page cache; needs Linux 6.14 (default: off)"
    add("--uncached-writes", text, action="store_true")
    text = "continue although the archive's modification time differs (default: off)"
    add("--same-archive", text, action="store_true")
    text = "free each class in the archive once it is on the disk; destroys the archive (default: off)"
    add("--consume", text, action="store_true")
    add("--yes", "confirm --consume without a question (default: off)", action="store_true")
    text = "extract again what is missing or damaged in a published tree (default: off)"
    add("--repair", text, action="store_true")
    text = "wait for another run on the same target, then go on (default: off)"
    add("--wait", text, action="store_true")
    text = (
        "extract train, val or test before the others and publish it while they go on "
        "(default: none; val with --durability none)"
    )
    add("--first", text, choices=("train", "val", "test"), metavar="SPLIT")
    text = "disk: publish what is on the disk; none: do not wait for it, for node-local scratch (default: disk)"
    add("--durability", text, choices=("disk", "none"))
    text = "how files reach the disk: one by one, or the file system as a whole (default: auto, by its type)"
    add("--sync", text, choices=("auto", "files", "fs"))
    add("--restart", "discard the unfinished run and begin again (default: off)", action="store_true")
    add("--force", "start even if the free space seems too small (default: off)", action="store_true")
    add_output_options(parser)


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add rates, thresholds and how long to wait for them."""
    add = group_of(parser, "limits")
    for kind, verb in (("read", "reads"), ("write", "writes")):
        text = f"limit {verb} to BYTES per second, such as 50MB, shared by all your runs on this host (default: none)"
        add(f"--max-{kind}-rate", text, type=values.rate, metavar="BYTES")
    text = "limit file creation to FILES per second, shared likewise (default: none)"
    add("--max-create-rate", text, type=values.rate, metavar="FILES")
    text = "share the rates with runs on this host that name the same local DIR (default: with all your runs here)"
    add("--rate-dir", text, type=values.path, metavar="DIR")
    text = "pause while less is free on the target: 512M, 2GiB, 5%%; 0: off (default: 1GiB, less on small file systems)"
    add("--min-free-space", text, type=values.amount, metavar="BYTES")
    text = "pause while less memory is available to this job; 0: off (default: 512MiB, less in small jobs)"
    add("--min-free-memory", text, type=values.amount, metavar="BYTES")
    text = "give up (exit code 6) after waiting this long for space, memory or workers (default: 600)"
    add("--stall-timeout", text, type=values.seconds, metavar="SECONDS")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the number of worker processes."""
    text = "run N worker processes (default: auto, the CPUs this job may use)"
    parser.add_argument("--workers", type=values.workers, metavar="N|auto", help=text)


def add_progress(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add how progress is shown."""
    text = "show progress on stderr: auto is a bar on a terminal, else a line now and then (default: auto)"
    parser.add_argument("--progress", choices=("auto", "bar", "log", "json", "none"), default="auto", help=text)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add progress and result."""
    group = parser.add_argument_group("output")
    add_progress(group)
    group.add_argument(
        "--json", action="store_true", help="print one JSON object to stdout at the end, nothing else (default: off)"
    )
