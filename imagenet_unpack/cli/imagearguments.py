"""Options of `image` and `restore`; light to import, as every help page is built with them."""

from __future__ import annotations

import argparse

from imagenet_unpack.cli import values
from imagenet_unpack.cli.runarguments import group_of


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add what is particular to images; options of the source and of the run are added elsewhere."""
    group = parser.add_argument_group("image")
    add = group.add_argument
    text = "write the image to FILE (default: BASE/ImageNet.sqfs; in-place: the archive itself)"
    add("--output", type=values.path, metavar="FILE", help=text)
    text = (
        "share the archives' extents (XFS, btrfs), copy them, or turn each archive itself into an image; auto: reflink "
        "where it works, else copy (default: auto)"
    )
    add("--method", choices=("auto", "reflink", "copy", "in-place"), default="auto", help=text)
    text = (
        "name class folders 0, 0000 or n01440764; given again: add links by that name below by-index, by-padded or "
        "by-wnid (default: index)"
    )
    add("--layout", choices=("index", "padded", "wnid"), action="append", dest="layouts", help=text)
    add("--yes", action="store_true", help="change the archives without asking; for in-place (default: off)")
    run = group_of(parser, "run")
    text = "run N worker processes (default: auto, the CPUs this job may use)"
    run("--workers", text, type=values.workers, metavar="N|auto")
    run("--executor", "run on local processes or in this process alone (default: local)", choices=("local", "serial"))
    run("--restart", "begin again, and replace an image of that name (default: off)", action="store_true")
    run("--force", "start even if the free space seems too small (default: off)", action="store_true")
    parser.epilog = (
        "Mount it with `mount -o loop,ro FILE DIR`, without root with\n"
        "`squashfuse FILE DIR`, or in Apptainer with `--bind FILE:/data:image-src=/`."
    )


def add_restore_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `restore`."""
    text = "archive that `image --method in-place` converted"
    parser.add_argument("target", type=values.path, metavar="FILE", help=text)
    text = "print one JSON object to stdout at the end (default: off)"
    parser.add_argument("--json", action="store_true", help=text)
