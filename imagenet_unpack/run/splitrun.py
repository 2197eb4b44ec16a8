"""One split of a run: what is published of it, what is done, what is left to do; its check and its publishing."""

from __future__ import annotations

from dataclasses import dataclass, field

from imagenet_unpack.checking import checker, findings
from imagenet_unpack.errors import CheckError
from imagenet_unpack.model import (
    Part,
    Problem,
    Shard,
    ShardDone,
    ShardFailed,
    SplitPlan,
    SplitSummary,
)
from imagenet_unpack.run.repair import Damage, require_nothing_else, require_restored
from imagenet_unpack.targets import consume
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import Identity, SplitRecord
from imagenet_unpack.targets.split import Split


@dataclass(slots=True, kw_only=True)
class SplitRun:
    """What one run does of one split.

    Attributes:
        target: the split's state on the disk.
        plan: of what this run adds; empty when everything asked for is published already.
        before: record of what was published before this run, or None.
        part: the part of the plan that this run is to do.
        own: the shards of that part, largest first; in the order of their offsets if the archive is to be consumed.
        done: shards whose files are in the staging tree, by id, of all parts.
        uncommitted: those of them that the journal does not know yet.
        shards: how many make up all that was asked for.
        skipped: how many of them earlier runs had done.
        consume: free the archive's bytes of each shard that is journaled.
        damage: what is to be repaired of the published split, or None: this run repairs nothing.
        unread: how many streams have still to be read to the end before all shards are known.
        classes_named: the user named the classes, so that each of them must be there.
        archive_classes: see `SplitRecord`.
        class_indices: class index by wnid where it was not known when the fragments were written.
    """

    target: Split
    plan: SplitPlan
    part: Part
    own: list[Shard] = field(default_factory=list)
    before: SplitRecord | None = None
    done: dict[str, ShardDone] = field(default_factory=dict)
    uncommitted: list[ShardDone] = field(default_factory=list)
    skipped: int = 0
    shards: int
    failures: list[ShardFailed] = field(default_factory=list)
    published: bool = False
    consume: bool = False
    damage: Damage | None = None
    unread: int = 0
    classes_named: bool = False
    class_indices: dict[str, int] | None = None
    archive_classes: tuple[int, ...] | None = None

    @property
    def paths(self) -> SplitPaths:
        """Where it is."""
        return self.target.paths

    @property
    def todo(self) -> list[Shard]:
        """The shards of this part that are not done, in the order of `own`."""
        return [shard for shard in self.own if shard.id not in self.done]

    @property
    def whole(self) -> bool:
        """Whether all that is to be published is staged, and not yet published."""
        known = self.plan.stream is None or self.plan.shards
        return bool(known and self.part.whole) and not (self.published or self.todo or self.unread or self.failures)

    @property
    def staged_images(self) -> int:
        """How many images are in the staging tree, as far as shards are done."""
        return sum(done.images for done in self.done.values())

    def begun(self) -> bool:
        """Say whether anything is in the staging tree."""
        tree = self.paths.tree
        return tree.is_dir() and any(tree.iterdir())

    def left(self) -> SplitPlan:
        """Return the plan of what is still to be written."""
        if self.unread:
            return self.plan.without_bytes(sum(done.size_bytes for done in self.done.values()))
        return self.plan.subset(tuple(self.todo))

    def summary(self) -> SplitSummary:
        """Say what is there of the split now."""
        before = self.before
        added = {} if self.damage is not None else self.done
        refs = {ref.wnid for shard in self.plan.shards if shard.id in added for ref in shard.classes if ref.folder}
        return SplitSummary(
            status="published" if self.published else "failed" if self.failures else "incomplete",
            classes=(len(before.classes) if before else 0) + len(refs),
            images_expected=(before.images if before else 0) + self.plan.images if self.plan.images_exact else None,
            images=(before.images if before else 0) + sum(done.images for done in added.values()),
            size_bytes=(before.size_bytes if before else 0) + sum(done.size_bytes for done in added.values()),
            shards=self.shards,
            shards_skipped=self.skipped,
            shards_failed=len(self.failures),
        )

    def drop(self, *, published: bool) -> None:
        """Give up what was begun: nothing is to be added to what is published, or the split is not there at all."""
        self.target.clear()
        self.published = published

    def committed(self, count: int) -> None:
        """Take note that the first of `uncommitted` are journaled; free them in an archive that is to be consumed."""
        if self.consume:
            committed = {done.shard for done in self.uncommitted[:count]}
            consume.free(shard for shard in self.own if shard.id in committed)
        del self.uncommitted[:count]

    def check_and_publish(self, workers: int, advance: findings.Advance) -> tuple[Problem, ...]:
        """Merge the manifest, compare the staged files with it, and publish when they agree; else say what differs.

        Raises:
            CheckError: a repair was not possible, or not all that is wrong could be repaired.
        """
        target, plan = self.target, self.plan
        if self.damage is not None:
            try:
                require_restored(target.paths, self.damage, (target.paths.fragment(shard.id) for shard in plan.shards))
            except CheckError:
                target.clear()
                raise
            target.repair(self.damage.rows)
            target.believe()
            self.published = True
            require_nothing_else(target.paths, self.damage)
            return ()
        staged = target.stage_manifest((shard.id for shard in plan.shards), self.class_indices)
        result = checker.check_split(
            target.paths.tree,
            plan.split,
            manifest_path=staged,
            depth="sizes",
            workers=workers,
            official=plan.archive.official,
            classes=[ref.folder for ref in plan.classes],
            advance=advance,
        )
        if result.problems:
            return result.problems
        target.publish(
            SplitRecord(
                identity=Identity.of(plan),
                official=plan.archive.official,
                classes=plan.classes,
                images=result.images,
                size_bytes=sum(done.size_bytes for done in self.done.values()),
                manifest_xxh3="",
                archive_classes=self.archive_classes,
                consumed=self.consume or (target.found.plan is not None and target.found.plan.consume),
            )
        )
        self.published = True
        return ()
