"""What a run must have in common with the unfinished or published one that it goes on from. Reads only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.errors import TargetError, reason
from imagenet_unpack.model import Part
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import Identity, PlanRecord

_DIFFERENCES = {
    "layout": "another layout",
    "size_bytes": "an archive of another size",
    "mtime_ns": "an archive with another modification time",
    "headers": "an archive with other contents",
    "labels": "other labels",
}


def require_same(paths: SplitPaths, before: Identity, now: Identity, remedy: str, *, time_counts: bool) -> None:
    """Make sure that two runs are of the same archive, layout and labels.

    Raises:
        TargetError: they differ.
    """
    keys = [key for key in _DIFFERENCES if getattr(before, key) != getattr(now, key)]
    if not time_counts:
        keys = [key for key in keys if key != "mtime_ns"]
    if keys == ["mtime_ns"]:
        remedy = f"if it is the same archive, add --same-archive; else {remedy}"
    if keys:
        what = f"the {paths.split} split of {paths.target}"
        differences = [
            f"--layout {before.layout} (this run asks for {now.layout})" if key == "layout" else _DIFFERENCES[key]
            for key in keys
        ]
        raise TargetError(f"{what} was made with {', '.join(differences)}: {remedy}")


def require_same_work(home: Path, unfinished: PlanRecord, plan: PlanRecord, part: Part) -> None:
    """Make sure that an unfinished run was started for the same classes, shards and number of parts.

    Args:
        home: the folder of the unfinished run, for messages.
        unfinished: its record.
        plan: of the run that is to continue it.
        part: what that run is to do of it; the whole may finish any number of parts, and parts what one run began.

    Raises:
        TargetError: it was not.
    """
    if unfinished.repair != plan.repair:
        how = "with" if unfinished.repair else "without"
        raise TargetError(f"the unfinished run in {home} was started {how} --repair: finish it, or use --restart")
    if unfinished.classes != plan.classes:
        raise TargetError(
            f"the unfinished run in {home} was started for other --classes: finish it first, or use --restart"
        )
    if unfinished.shards != plan.shards:
        raise TargetError(
            f"the unfinished run in {home} is another version's, which cut the work differently: finish it with "
            "that version, or use --restart"
        )
    if not part.whole and unfinished.parts not in (1, part.count):
        raise TargetError(
            f"the unfinished run in {home} was started in {unfinished.parts} parts, not {part.count}: give the "
            "same again, or finish it with --part 0/1"
        )


def require_own_tree(paths: SplitPaths) -> None:
    """Make sure that the staging tree can be read and holds no link in place of a class folder.

    Raises:
        TargetError: it cannot, or does.
    """
    try:
        with os.scandir(paths.tree) as entries:
            links = [entry.name for entry in entries if entry.is_symlink()]
    except OSError as error:
        raise TargetError(
            f"{paths.tree} cannot be read: {reason(error)}: use --restart to discard the unfinished run"
        ) from error
    if links:
        raise TargetError(f"{paths.tree / links[0]} is a symbolic link, which this program did not make: use --restart")


def require_fragments(paths: SplitPaths, done: Iterable[str]) -> None:
    """Make sure that the manifest fragment of each journaled shard is there.

    Raises:
        TargetError: one is not.
    """
    for shard in done:
        fragment = paths.fragment(shard)
        if not fragment.is_file() or fragment.is_symlink():
            raise TargetError(f"{fragment} is missing or damaged: use --restart to discard the unfinished run")
