"""`demo`: synth, unpack and check in a temporary folder."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from imagenet_unpack.cli import streams
from imagenet_unpack.cli.arguments import parse, program_name
from imagenet_unpack.cli.main import run_command
from imagenet_unpack.dataset import synth
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.text import human_time


def run(args: argparse.Namespace) -> int:
    """Show the three commands and what they say."""
    with tempfile.TemporaryDirectory(prefix="imagenet_unpack-demo-") as folder:
        streams.emit(f"1. synth: small archives of ImageNet's shape into {folder}")
        synth.write_archives(Path(folder), synth.SynthSpec())
        options = ["--workers", str(args.workers)] if args.workers else []
        options += ["--progress", args.progress] if args.progress != "auto" else []
        commands = (["unpack", "--base-dir", folder, *options], ["check", f"{folder}/ImageNet", "--deep", *options])
        for number, command in enumerate(commands, 2):
            streams.emit(f"{number}. {program_name()} {' '.join(command)}")
            code = run_command(parse(command))
            if code:
                return code
        elapsed = human_time(time.monotonic() - args.began_s)
        streams.emit(f"done in {elapsed}; the temporary folder has been removed")
    return ExitCode.OK
