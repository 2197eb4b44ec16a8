"""`sbatch`: a Slurm batch script for a command line."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from imagenet_unpack import options
from imagenet_unpack.cli import batch, streams
from imagenet_unpack.cli.commands.unpack import read_options
from imagenet_unpack.errors import ExitCode, UsageError
from imagenet_unpack.model import Part


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        UsageError: the job would refuse its options, or read standard input.
    """
    values = read_options(args.unpack)
    if Path("-") in values.source:
        raise UsageError("--source -: a batch job has no standard input to read: give a file")
    options.require_consistent(replace(values, part=Part(index=0, count=args.parts)))
    cpus: dict[str, int] = {} if args.workers is None else {"cpus": args.workers}
    resources = batch.Resources(
        parts=args.parts,
        memory=args.memory,
        time=args.time,
        account=args.account,
        partition=args.partition,
        job_name=args.job_name,
        signal_s=args.signal_before,
        **cpus,
    )
    streams.emit(batch.slurm_script(sys.executable, args.unpack_arguments, resources, os.getcwd()), end="")
    return ExitCode.OK
