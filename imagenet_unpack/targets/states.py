"""What is on the disk of a split, and which of the states of `targets.split` that is. Reads only."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from imagenet_unpack.errors import TargetError, reason
from imagenet_unpack.model import SplitName
from imagenet_unpack.targets import records
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import PlanRecord, SplitRecord

State = Enum("State", "ABSENT STAGED PUBLISHING PUBLISHED EXTENDING FOREIGN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is on the disk of a split.

    Attributes:
        published: something that is not an empty folder has the split's name.
        manifest: something has the manifest's name.
        record: of the published split.
        plan: of the unfinished run.
        intent: the record to be published.
    """

    published: bool = False
    manifest: bool = False
    record: SplitRecord | None = None
    plan: PlanRecord | None = None
    intent: SplitRecord | None = None

    @property
    def state(self) -> State:
        """The state that this is."""
        if self.intent is not None:
            return State.PUBLISHING
        if self.record is None and (self.published or self.manifest):
            return State.FOREIGN
        if self.published:
            return State.PUBLISHED if self.plan is None else State.EXTENDING
        # A record without its split: whoever removed the split wants it made again.
        return State.ABSENT if self.plan is None else State.STAGED


def look(paths: SplitPaths) -> Found:
    """Look what is on the disk of a split.

    Raises:
        TargetError: a record is damaged or a newer version's, or a link is in the way.
    """
    for folder in (paths.root, paths.home, paths.tree, paths.fragments):
        if folder.is_symlink():
            raise TargetError(f"{folder} is a symbolic link, which this program did not make: move it away")
    try:
        return Found(
            published=os.path.lexists(paths.published) and not _is_empty_folder(paths.published),
            manifest=os.path.lexists(paths.manifest),
            record=records.load(paths.record, SplitRecord),
            plan=records.load(paths.plan, PlanRecord),
            intent=records.load(paths.intent, SplitRecord),
        )
    except OSError as error:
        raise TargetError(f"{error.filename or paths.root} cannot be read: {reason(error)}") from error


def is_published(target: Path, split: SplitName) -> bool:
    """Say whether a split is published by this program, so that it can do without its archive."""
    with suppress(TargetError, OSError):
        return look(SplitPaths(target, split)).state in (State.PUBLISHED, State.EXTENDING, State.PUBLISHING)
    return False


def _is_empty_folder(path: Path) -> bool:
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return False
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except FileNotFoundError:  # renamed or removed since
        return True
