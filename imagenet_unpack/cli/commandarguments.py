"""Options of the commands beside `unpack` and `image`. Light to import, as every help page is built with them."""

from __future__ import annotations

import argparse

from imagenet_unpack.cli import values
from imagenet_unpack.cli.runarguments import add_output_options, add_workers

_SYNTH_KINDS = (  # as in dataset/kinds.py, which is slow to import
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
_LIST_FORMATS = ("caffe", "dali", "paddle", "torchvision", "xxhsum")  # as in lists.py, likewise


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add what `check` looks at."""
    parser.add_argument(
        "target", type=values.path, metavar="TARGET", help="folder that holds train/ and val/, or an image"
    )
    parser.add_argument("--deep", action="store_true", help="read every byte and compare digests (default: off)")
    text = "read the first and last bytes of every image: list empty, truncated and misnamed ones (default: off)"
    parser.add_argument("--contents", action="store_true", help=text)
    add_workers(parser)
    add_output_options(parser)


def add_lists_options(parser: argparse.ArgumentParser) -> None:
    """Add which lists `lists` writes, and where to."""
    add = parser.add_argument
    add("target", type=values.path, metavar="TARGET", help="folder that unpack wrote, or a mounted image")
    text = (
        "caffe (also MMPretrain), dali, paddle: path and class index; torchvision: the meta.bin of its ImageNet class "
        "(extra [torch]); xxhsum: digests for `xxhsum -c` (default: %(default)s)"
    )
    add("--format", choices=_LIST_FORMATS, default="caffe", help=text)
    add("--output", type=values.path, metavar="DIR", help="write to the folder DIR (default: TARGET)")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add what `report` shows, and where it goes."""
    add = parser.add_argument
    add("target", type=values.path, metavar="TARGET", help="folder that holds train/ and val/, or a mounted image")
    text = "write the page to FILE (default: %(default)s); an earlier report is replaced"
    add("--output", type=values.path, default="imagenet-report.html", metavar="FILE.html", help=text)
    text = "show N images of each class and split (default: 2 to 24, depending on the number of classes)"
    add("--images", type=values.positive, metavar="N", help=text)
    add_workers(parser)
    add_output_options(parser)


def add_synth_options(parser: argparse.ArgumentParser) -> None:
    """Add what `synth` writes."""
    add = parser.add_argument
    add("folder", type=values.path, metavar="DIR", help="folder to write to; it may exist")
    add("--classes", type=values.positive, default=10, metavar="N", help="write N classes (default: %(default)s)")
    text = "write N train images per class (default: %(default)s)"
    add("--images", type=values.positive, default=20, metavar="N", help=text)
    text = "write as many train images per class as the real data set has (default: off)"
    add("--real-counts", action="store_true", help=text)
    text = "write N validation images; 0: no validation archive (default: %(default)s)"
    add("--val-images", type=values.count, default=50, metavar="N", help=text)
    text = "write N test images; 0: no test archive (default: %(default)s)"
    add("--test-images", type=values.count, default=0, metavar="N", help=text)
    text = (
        f"write this kind of archive ({', '.join(_SYNTH_KINDS)}); all kinds of one seed hold the same images "
        "(default: %(default)s)"
    )
    add("--kind", choices=_SYNTH_KINDS, default="official", metavar="KIND", help=text)
    text = "make images of N bytes on average (default: %(default)s)"
    add("--mean-bytes", type=values.positive, default=114_000, metavar="N", help=text)
    text = "seed the contents; the same seed gives the same bytes (default: %(default)s)"
    add("--seed", type=values.count, default=0, metavar="N", help=text)
    text = "write this tar format (default: %(default)s)"
    add("--format", choices=("gnu", "ustar", "pax"), default="gnu", help=text)
    text = "fill images with random bytes, or leave holes (default: %(default)s)"
    add("--bodies", choices=("random", "holes"), default="random", help=text)
    add("--no-labels", action="store_true", help="write no label files (default: off)")


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Add what `tune` tries."""
    add = parser.add_argument
    add("--base-dir", type=values.path, default=".", metavar="DIR", help="look for the archive in DIR (default: .)")
    text = "read the train archive from FILE (default: BASE/ILSVRC2012_img_train.tar)"
    add("--train-archive", type=values.path, metavar="FILE", help=text)
    text = "write the trials to this existing folder and remove them again (default: BASE)"
    add("--target-dir", type=values.path, metavar="DIR", help=text)
    text = "try these numbers, such as 1,4,16 (default: 1, 2, 4, ... up to four times the CPUs)"
    add("--workers", type=values.numbers, default=(), metavar="A,B,...", help=text)
    text = "extract this much in all trials together: 5G, or 5%% of the archive (default: %(default)s)"
    add("--sample", type=values.amount, default="5G", metavar="BYTES", help=text)
    text = "stop after about this time (default: %(default)s)"
    add("--budget", type=values.seconds, default="120", metavar="SECONDS", help=text)
    add("--json", action="store_true", help="print one JSON object to stdout at the end (default: off)")


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add what `sbatch` asks of Slurm."""
    add = parser.add_argument
    text = "submit N parts as an array, then a job that checks and publishes; 1: one job (default: %(default)s)"
    add("--parts", type=values.positive, default=1, metavar="N", help=text)
    text = "request N CPUs for each job and run as many workers (default: 8)"
    add("--workers", type=values.workers, metavar="N", help=text)
    add("--memory", default="8G", metavar="SIZE", help="request this memory for each job (default: %(default)s)")
    text = "set the time limit of each job, as Slurm writes it (default: %(default)s)"
    add("--time", default="04:00:00", metavar="LIMIT", help=text)
    add("--account", default="", metavar="NAME", help="charge this account (default: the cluster's default)")
    add("--partition", default="", metavar="NAME", help="use this partition (default: the cluster's default)")
    text = "name the jobs and their logs (default: %(default)s)"
    add("--job-name", default="imagenet", metavar="NAME", help=text)
    text = (
        "ask the program to stop this long before the time limit; the job is requeued and continues "
        "(default: %(default)s)"
    )
    add("--signal-before", type=values.positive, default=120, metavar="SECONDS", help=text)
