"""`tune`: short trials that find a good number of workers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from imagenet_unpack.cli import output, streams
from imagenet_unpack.errors import ExitCode, MissingArchiveError, UsageError
from imagenet_unpack.host import resources
from imagenet_unpack.model import SplitPlan
from imagenet_unpack.planning.train import plan_tar_folder, plan_train
from imagenet_unpack.run import tune
from imagenet_unpack.sources import discover


def run(args: argparse.Namespace) -> int:
    """Show each trial on stderr and print the recommendation."""
    target: Path = args.target_dir or Path(args.base_dir)
    if not target.is_dir():
        raise UsageError(f"--target-dir {target}: give an existing folder on the storage to be tried")
    plan = _plan(args)
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


def _plan(args: argparse.Namespace) -> SplitPlan:
    """Plan the inner tars that trials extract from, whether they lie in the outer archive or in a folder."""
    base = Path(args.base_dir)
    if args.train_archive is None:
        found = discover.discover(base, ["train"], any_wnids=True)
        if not found:
            raise MissingArchiveError(f"no train archive in {base.absolute()}: give --base-dir or --train-archive")
        source = found[0]
    else:
        source = discover.find_split(args.train_archive, "train")
    if source.kind not in ("inner-tars", "tar-folder"):
        raise UsageError(f"tune needs a tar or a folder of <wnid>.tar, but {source.name} is a {source.what}")
    plan = plan_train if source.kind == "inner-tars" else plan_tar_folder
    return plan(source.paths[0], None, None, "wnid")
