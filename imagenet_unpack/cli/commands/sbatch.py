"""`sbatch`: a Slurm batch script for a command line."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise

from imagenet_unpack.cli import batch, streams
from imagenet_unpack.errors import ExitCode, UsageError


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        UsageError: the job would read standard input, or wait for an answer.
    """
    words = args.unpack_arguments
    if "--source=-" in words or ("--source", "-") in pairwise(words):
        raise UsageError("--source -: a batch job has no standard input to read: give a file")
    if "--consume" in words and "--yes" not in words:
        raise UsageError("--consume: nobody can be asked in a batch job: confirm with --yes")
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
