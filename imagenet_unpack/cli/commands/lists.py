"""`lists`: image lists for other frameworks."""

from __future__ import annotations

import argparse

from imagenet_unpack import lists
from imagenet_unpack.cli import streams
from imagenet_unpack.errors import ExitCode


def run(args: argparse.Namespace) -> int:
    """Write the lists and name them."""
    for path in lists.write_lists(args.target, args.format, args.output or args.target):
        streams.emit(f"wrote {path}")
    return ExitCode.OK
