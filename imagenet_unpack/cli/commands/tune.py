"""`tune`: short trials that find a good number of workers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from imagenet_unpack.cli import output, streams
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ExitCode, UsageError
from imagenet_unpack.host import resources
from imagenet_unpack.planning.train import plan_train
from imagenet_unpack.run import tune


def run(args: argparse.Namespace) -> int:
    """Show each trial on stderr and print the recommendation."""
    archive = args.train_archive or Path(args.base_dir) / ilsvrc2012.TRAIN_ARCHIVE_NAME
    target: Path = args.target_dir or Path(args.base_dir)
    if not target.is_dir():
        raise UsageError(f"--target-dir {target}: give an existing folder on the storage to be tried")
    plan = plan_train(archive, None, None, "wnid")
    share = isinstance(args.sample, float)
    sample_bytes = round(args.sample * plan.content_bytes) if share else args.sample
    numbers = args.workers or tune.ladder(resources.usable_cpus(os.environ))
    streams.say(output.TRIAL_HEADER)
    trials = []
    for trial in tune.run_trials(plan, target, numbers, sample_bytes=sample_bytes, budget_s=args.budget):
        trials.append(trial)
        streams.say(output.trial_line(trial))
    advice, best = tune.recommend(trials)
    if args.json:
        found = {"trials": [output.trial_object(trial) for trial in trials], "workers": advice.workers}
        streams.emit(output.json_object(args, target=str(target.absolute()), **found))
    else:
        streams.emit(output.advice_line(advice, best))
    return ExitCode.OK
