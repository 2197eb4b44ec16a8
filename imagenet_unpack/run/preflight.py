"""What a run still needs of the target's file system, held against what is free, and the limits that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from imagenet_unpack.errors import TargetError
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.extractor import remove_leftovers
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.host import resources
from imagenet_unpack.planning import planner
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.targets import consume

CONSUMED_SHARDS = 2  # a worker: of --consume, at work or waiting for the next commit


def require_room(options: Options, splits: Iterable[SplitRun], workers: int, note: Callable[[str], None]) -> None:
    """Make sure that what is left to be written has room; what an unfinished run left behind is in the way.

    Args:
        options: of the run.
        splits: those that were opened so far.
        workers: number of workers.
        note: shows a message to the user.

    Raises:
        TargetError: it has not, and the run is not to begin all the same.
    """
    splits = list(splits)
    room = _room(options, splits, workers)
    if room.fault is not None and any(split.begun() for split in splits):
        for split in splits:
            for shard in split.todo:
                sink = FolderSink(split.paths.tree, Unpaced())
                remove_leftovers(shard, sink, split.paths.fragment(shard.id))
        room = _room(options, splits, workers)
    if room.fault is not None:
        if not options.force:
            raise TargetError(f"{room.fault}: free some space, or use --force to try anyway")
        note(f"{room.fault}: trying anyway (--force)")


def limits(options: Options, splits: Iterable[SplitRun], workers: int) -> Limits:
    """Return what the workers are to keep to: a default threshold where the user named none."""
    return throttle.with_defaults(options.limits, _room(options, splits, workers), resources.memory())


def _room(options: Options, splits: Iterable[SplitRun], workers: int) -> resources.Room:
    left = [split.left() for split in splits]
    freed = options.consume and consume.on_same_file_system(left, options.target)
    in_flight = CONSUMED_SHARDS * workers if freed else None
    return resources.room(options.target, **planner.needs(left, in_flight=in_flight))
