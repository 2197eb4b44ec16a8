"""`restore`: an image that was made in place back into its archive."""

from __future__ import annotations

import argparse
import os

from imagenet_unpack.cli import output, streams
from imagenet_unpack.errors import TargetError
from imagenet_unpack.run.imageclaim import restore
from imagenet_unpack.targets.durable import Disk


def run(args: argparse.Namespace) -> int:
    """Restore the archive."""
    if not args.target.is_file():
        what = "not a regular file" if os.path.lexists(args.target) else "no such file"
        raise TargetError(f"{args.target}: {what}: give the archive that image --method in-place converted")
    changed = restore(args.target, Disk.for_folder(args.target.absolute().parent))
    streams.say(f"{args.target} is the archive again" if changed else f"{args.target} is an archive already")
    if args.json:
        streams.emit(output.json_object(args))
    return 0
