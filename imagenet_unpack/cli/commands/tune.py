"""`tune`: short trials that find a good number of workers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from imagenet_unpack.cli import output, streams
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ExitCode, MissingArchiveError, UsageError
from imagenet_unpack.host import resources
from imagenet_unpack.model import SplitPlan, class_refs
from imagenet_unpack.planning.imagefile import plan_image
from imagenet_unpack.planning.kagglezip import KaggleZip
from imagenet_unpack.planning.parquetfiles import plan_parquet
from imagenet_unpack.planning.train import plan_tar_folder, plan_train
from imagenet_unpack.run import tune
from imagenet_unpack.sources import discover


def run(args: argparse.Namespace) -> int:
    """Show each trial on stderr and print the recommendation."""
    target: Path = args.target_dir or Path(args.base_dir)
    if not target.is_dir():
        raise UsageError(f"--target-dir {target}: give an existing folder on the storage to be tried")
    numbers = args.workers or tune.ladder(resources.usable_cpus(os.environ))
    plan = _plan(args, numbers)
    sample_bytes = _sample_bytes(args, plan.content_bytes)
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


def _sample_bytes(args: argparse.Namespace, archive_bytes: int) -> int:
    return round(args.sample * archive_bytes) if isinstance(args.sample, float) else int(args.sample)


def _plan(args: argparse.Namespace, numbers: Sequence[int]) -> SplitPlan:
    """Plan the train images that trials extract, in runs that are short enough for the numbers of workers to try."""
    base = Path(args.base_dir)
    if args.train_archive is None:
        found = discover.discover(base, ["train"], any_wnids=True)
        if not found:
            raise MissingArchiveError(f"no train archive in {base.absolute()}: give --base-dir or --train-archive")
        source = found[0]
    else:
        source = discover.find_split(args.train_archive, "train")
    path = source.paths[0]
    if source.kind == "inner-tars":
        return plan_train(path, None, None, "wnid")
    if source.kind == "tar-folder":
        return plan_tar_folder(path, None, None, "wnid")
    archive_bytes = sum(each.stat().st_size for each in source.paths)
    run_bytes = tune.run_bytes(archive_bytes, _sample_bytes(args, archive_bytes), numbers)
    refs = class_refs(ilsvrc2012.WNIDS, "wnid")
    if source.kind == "parquet":
        return plan_parquet(source.paths, "train", refs, None, "wnid", run_bytes=run_bytes)
    if source.kind == "image":
        return plan_image(path, "train", refs, None, "wnid", run_bytes=run_bytes)
    archive = KaggleZip(path, ilsvrc2012.WNIDS, run_bytes=run_bytes) if source.kind == "zip" else None
    if archive is None or archive.holds_targz:
        raise UsageError(
            f"tune tries worker processes, but {source.name} is a {source.what} that one process reads front to back: "
            "--workers matters little for it"
        )
    return archive.plan("train", refs, None, "wnid")
