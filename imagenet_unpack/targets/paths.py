"""Paths of everything in a target.

TARGET/
    <split>/<class>/<image>          a published split
    <split>.manifest.tsv             its manifest
    .imagenet_unpack/                the state folder
        record.json                  marks the folder as this program's
        timeline.json                counts of the last run over time, for the report
        record.lock                  held while record.json is made
        <split>.json                 record of a published split
        <split>.lock                 held by the run (shared by its parts, and by runs that only read)
        <split>.opening.lock         held while the staging tree is found or made
        <split>.<part>.lock          held by one part of several
        <split>.<part>.lease         held, shared, by the workers of a part while they write
        <split>.<part>.owner         heartbeat of a run that writes, removed when it ends
        <split>/                     the unfinished run
            plan.json                what it was planned from
            tree/<class>/            its files
            parts/<shard>.tsv        manifest fragment of a shard, written last
            <part>.journal           shards known to be on the disk
            publish.json             everything is on the disk and checked: publishing has begun
        <split>.removing-*/          an unfinished run that is being deleted

After success the state folder holds no folder, only records and lock files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.model import SplitName
from imagenet_unpack.targets.manifest import manifest_name

STATE_FOLDER = ".imagenet_unpack"


def state_folder(target: Path) -> Path:
    """Return the folder that holds the state of a target."""
    return target / STATE_FOLDER


def timeline_file(target: Path) -> Path:
    """Return the file that holds the counts of the last run over time."""
    return state_folder(target) / "timeline.json"


@dataclass(frozen=True, slots=True)
class SplitPaths:
    """The paths of one split of a target; makes and reads nothing."""

    target: Path
    split: SplitName

    @property
    def root(self) -> Path:
        """The state folder."""
        return state_folder(self.target)

    @property
    def published(self) -> Path:
        """The published class folders."""
        return self.target / self.split

    @property
    def manifest(self) -> Path:
        """The published manifest."""
        return self.target / manifest_name(self.split)

    @property
    def record(self) -> Path:
        """Record of the published split."""
        return self.root / f"{self.split}.json"

    @property
    def home(self) -> Path:
        """The unfinished run."""
        return self.root / self.split

    @property
    def plan(self) -> Path:
        """What the unfinished run was planned from."""
        return self.home / "plan.json"

    @property
    def intent(self) -> Path:
        """The record to be published; while it exists, publishing is under way."""
        return self.home / "publish.json"

    @property
    def tree(self) -> Path:
        """The staged class folders."""
        return self.home / "tree"

    @property
    def fragments(self) -> Path:
        """Folder of the manifest fragments."""
        return self.home / "parts"

    def fragment(self, shard: str) -> Path:
        """Manifest fragment of a shard."""
        return self.fragments / f"{shard}.tsv"

    @property
    def staged_manifest(self) -> Path:
        """Manifest of the staged files alone, for the check before publishing."""
        return self.home / f"{self.split}.staged.tsv"

    @property
    def new_manifest(self) -> Path:
        """The manifest to be published."""
        return self.home / manifest_name(self.split)

    @property
    def lock(self) -> Path:
        """Lock file of the split."""
        return self.root / f"{self.split}.lock"

    @property
    def opening_lock(self) -> Path:
        """Lock file held while the staging tree is found or made."""
        return self.root / f"{self.split}.opening.lock"

    def part_lock(self, part: str) -> Path:
        """Lock file of one part of several."""
        return self.root / f"{self.split}.{part}.lock"

    def lease(self, part: str) -> Path:
        """Lock file that the workers of a part hold while they write."""
        return self.root / f"{self.split}.{part}.lease"

    def leases(self) -> list[Path]:
        """Lock files that the workers of any part hold while they write."""
        return sorted(self.root.glob(f"{self.split}.*.lease"))

    def owner(self, part: str) -> Path:
        """Heartbeat file of a part."""
        return self.root / f"{self.split}.{part}.owner"

    def owners(self) -> list[Path]:
        """Heartbeat files of all parts."""
        return sorted(self.root.glob(f"{self.split}.*.owner"))

    @property
    def legacy_locks(self) -> Path:
        """Folder of the lock files of version 0.1.0."""
        return self.root / "locks"
