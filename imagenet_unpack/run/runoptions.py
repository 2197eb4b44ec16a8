"""What one run of `unpack` is asked to do, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.extract.throttle import DEFAULT, Limits
from imagenet_unpack.model import Layout, Part, SplitName, SplitPlan
from imagenet_unpack.targets.durable import SyncMode

Replan = Callable[[tuple[int, ...] | None], SplitPlan]
"""Plans a split for the class indices given, or for all that the archive holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        target: where the tree goes; absolute.
        layout: how class folders are named.
        planners: how to plan each split asked for; raises `MissingArchiveError` where its archive is gone.
        classes: the class indices asked for, or None for all that the archives hold.
        verify: compares a plan's archive with the published digest before anything is written, or None.
        time_counts: an archive with another modification time is another archive.
        part: which part of the plan to do; the whole checks and publishes.
        first: the split to extract before the others, or None; given: each split is published as soon as it is whole.
        restart: throw an unfinished run away first.
        limits: the rates; the thresholds that the user named, or `throttle.DEFAULT` for the default of each.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written.
        force: begin even where the room on the target seems too small.
        sync: how to bring files to the disk.
        durable: wait for the disk before publishing.
        wait: wait for another run on the same target.
        repair: extract again what is damaged of published splits.
        consume: free the archives' bytes of what is journaled.
        commit_s: how long after one sync the next one begins; None: the usual time.
    """

    target: Path
    layout: Layout
    planners: dict[SplitName, Replan]
    classes: tuple[int, ...] | None
    verify: Callable[[SplitPlan], None] | None = None
    time_counts: bool = True
    part: Part = Part()
    first: SplitName | None = None
    restart: bool = False
    limits: Limits = Limits(free_space=DEFAULT, free_memory=DEFAULT)
    keep_mtime: bool = False
    uncached_writes: bool = False
    force: bool = False
    sync: SyncMode = "auto"
    durable: bool = True
    wait: bool = False
    repair: bool = False
    consume: bool = False
    commit_s: float | None = None
