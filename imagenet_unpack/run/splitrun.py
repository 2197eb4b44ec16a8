"""One split of a run: what is published of it, what is done, what is left to do; its check and its publishing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import xxhash

from imagenet_unpack.checking import checker
from imagenet_unpack.errors import CheckError, MissingArchiveError, TargetError
from imagenet_unpack.model import (
    ANY_TIME,
    ArchiveId,
    Layout,
    Part,
    Problem,
    Shard,
    ShardDone,
    ShardFailed,
    SplitPlan,
    SplitSummary,
)
from imagenet_unpack.planning import planner
from imagenet_unpack.run.repair import Damage, find_damage, narrow, require_restored
from imagenet_unpack.targets import consume
from imagenet_unpack.targets.claim import Claim
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import Identity, PlanRecord, SplitRecord
from imagenet_unpack.targets.split import Split
from imagenet_unpack.text import counted

Replan = Callable[[tuple[int, ...] | None], SplitPlan]
"""Plans a split for the class indices given, or for all that the archive holds."""
Planned = SplitPlan | MissingArchiveError
"""A plan of all that was asked for; or why there is none: the archive is gone, and the split is published."""
Check = Callable[[SplitRecord, checker.Depth], tuple[Problem, ...]]
"""Compares a published split with its record and its manifest, and returns what differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, which is all that is known where the archive is gone; `classes` None: all."""

    layout: Layout
    classes: tuple[int, ...] | None


@dataclass(slots=True, kw_only=True)
class SplitRun:
    """What one run does of one split.

    Attributes:
        target: the split's state on the disk.
        plan: of what this run adds; empty when everything asked for is published already.
        before: record of what was published before this run, or None.
        part: the part of the plan that this run is to do.
        own: the shards of that part, largest first.
        done: shards whose files are in the staging tree, by id, of all parts.
        uncommitted: those of them that the journal does not know yet.
        shards: how many make up all that was asked for.
        skipped: how many of them earlier runs had done.
        consume: free the archive's bytes of each shard that is journaled.
        damage: what is to be repaired of the published split, or None: this run repairs nothing.
        unread: how many streams have still to be read to the end before all shards are known.
        classes_named: the user named the classes, so that each of them must be there.
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

    @property
    def paths(self) -> SplitPaths:
        """Where it is."""
        return self.target.paths

    @property
    def todo(self) -> list[Shard]:
        """The shards of this part that are not done, largest first."""
        return [shard for shard in self.own if shard.id not in self.done]

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

    def committed(self) -> None:
        """Free in the archive what is journaled now, if the archive is to be consumed."""
        shards = {shard.id: shard for shard in self.own} if self.consume else {}
        for done in self.uncommitted:
            if done.shard in shards:
                consume.free(shards[done.shard])
        self.uncommitted = []

    def check_and_publish(self, workers: int, advance: checker.Advance) -> tuple[Problem, ...]:
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
            self.published = True
            _require_nothing_else(target.paths, self.damage)
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
                consumed=self.consume or (target.found.plan is not None and target.found.plan.consume),
            )
        )
        self.published = True
        return ()


def open_split(
    claim: Claim,
    planned: Planned,
    replan: Replan,
    *,
    part: Part,
    time_counts: bool,
    asked: Asked,
    repair: bool,
    consume_archive: bool,
    check: Check,
    note: Callable[[str], None],
) -> SplitRun:
    """Open or make the staging tree of a split, after a look at what is published and what is unfinished.

    Args:
        claim: the locks on the split.
        planned: the plan of all that was asked for, if the archive is there.
        replan: plans the classes that a published split lacks.
        part: the part of the plan that this run is to do.
        time_counts: an archive with another modification time is another archive.
        asked: what was asked for, to be compared with what is published where there is no plan.
        repair: extract again what is damaged of the published split.
        consume_archive: free the archive's bytes of each shard that is journaled.
        check: compares the published split with its record.
        note: shows a message to the user.

    Raises:
        TargetError: what is there was made from something else, or by something else.
        MissingArchiveError: the archive is gone and was needed.
        CheckError: the published split is not what was published.
    """
    target = claim.split
    target.require_ours()
    if repair:
        return _open_repair(claim, planned, replan, part=part, check=check, note=note)
    plan = planned if isinstance(planned, SplitPlan) else None
    if target.record is not None:
        if isinstance(planned, MissingArchiveError):
            _require_published(target.record, planned, asked)
            note(f"{planned}: {target.paths.published} does not need it and is compared with its manifest")
        else:
            _require_same_archive(target, target.record, planned, note)
        _require_whole(claim, check, note)
    before = target.record
    shards = len(plan.shards) if plan is not None else 0
    if before is not None:
        have = {ref.index for ref in before.classes}
        missing = tuple(ref.index for ref in plan.classes if ref.index not in have) if plan is not None else ()
        if not missing:
            if target.found.plan is not None and target.found.plan.repair:
                claim.write()
                target.clear()
            return _published(target, part, shards)
        plan = replan(missing)
        claim.write()
    if plan is None:
        assert isinstance(planned, MissingArchiveError)
        raise planned
    return _begin(
        target,
        plan,
        part,
        shards=shards,
        before=before,
        classes_named=asked.classes is not None,
        time_counts=time_counts,
        consume_archive=consume_archive,
        note=note,
    )


def _open_repair(
    claim: Claim,
    planned: Planned,
    replan: Replan,
    *,
    part: Part,
    check: Check,
    note: Callable[[str], None],
) -> SplitRun:
    """Find what is damaged of a published split, and begin or continue to extract that again."""
    target = claim.split
    record, split = target.record, target.paths.split
    if record is None:
        raise TargetError(f"there is no published {split} split in {target.paths.target} to repair: leave out --repair")
    if target.found.plan is not None and not target.found.plan.repair:
        raise TargetError(f"an unfinished run adds classes to {target.paths.published}: finish it before a --repair")
    if isinstance(planned, SplitPlan):
        _require_same_archive(target, record, planned, note)
    claim.write()
    damage = find_damage(target.paths, check(record, "digests"))
    if not damage.rows:
        note(f"{target.paths.published}: nothing to repair")
        target.clear()
        _require_nothing_else(target.paths, damage)
        return _published(target, part, 0)
    if isinstance(planned, MissingArchiveError):
        raise planned
    plan = narrow(replan(tuple(index for index in damage.classes if index >= 0) or None), damage.rows)
    if plan.stream is not None and plan.stream.refs is None:  # any wnids: their indices are known by now
        classes = tuple(ref for ref in record.classes if ref.index in damage.classes)
        plan = replace(plan, stream=replace(plan.stream, refs=record.classes), classes=classes)
    note(f"repairing {counted(len(damage.rows), 'image')} of {target.paths.published}")
    return _begin(target, plan, part, shards=0, before=record, damage=damage, time_counts=False, note=note)


def _published(target: Split, part: Part, shards: int) -> SplitRun:
    """Return the run of a split of which everything asked for is published."""
    record = target.record
    assert record is not None
    return SplitRun(
        target=target, plan=_nothing(record), part=part, before=record, shards=shards, skipped=shards, published=True
    )


def _begin(
    target: Split,
    plan: SplitPlan,
    part: Part,
    *,
    shards: int,
    before: SplitRecord | None,
    damage: Damage | None = None,
    classes_named: bool = False,
    time_counts: bool,
    consume_archive: bool = False,
    note: Callable[[str], None],
) -> SplitRun:
    """Begin or continue to stage a plan; `shards`: how many there were before published classes were left out."""
    # Runs of validation images are cut again for the missing classes, so there may be more of them than at first.
    skipped = max(shards - len(plan.shards), 0)
    own = planner.cut(plan.shards, part.count)[part.index]
    parts = [f"{shard.id} {shard.offset} {shard.end}" for shard in plan.shards]
    parts += sorted(damage.rows) if damage is not None else ()
    done = target.begin(
        PlanRecord(
            identity=Identity.of(plan),
            classes=tuple(ref.index for ref in plan.classes),
            parts=part.count,
            shards=xxhash.xxh3_64_hexdigest("\n".join(parts).encode()),
            repair=damage is not None,
            consume=consume_archive,
        ),
        part=part,
        time_counts=time_counts,
    )
    total = skipped + len(own)
    known = {shard.id for shard in plan.shards}
    if plan.stream is None:  # else its shards are not known yet
        done = {shard: outcome for shard, outcome in done.items() if shard in known}
    skipped += sum(shard.id in done for shard in own)
    if done:
        note(_continuing(plan, done))
    if consume_archive:
        own = [replace(shard, archive=replace(shard.archive, mtime_ns=ANY_TIME)) for shard in own]
        for shard in own:
            if shard.id in done:  # journaled, and perhaps not yet freed when the run before this one ended
                consume.free(shard)
    return SplitRun(
        target=target,
        plan=plan,
        part=part,
        own=own,
        before=before,
        done=done,
        shards=total,
        skipped=skipped,
        damage=damage,
        consume=consume_archive,
        unread=0 if plan.stream is None else len(plan.stream.sources),
        classes_named=classes_named,
    )


def _continuing(plan: SplitPlan, done: dict[str, ShardDone]) -> str:
    """Say how much of a plan an unfinished run had done."""
    if len(plan.shards) == len(plan.classes):
        return f"continuing {plan.split}: {len(done):,} of {counted(len(plan.shards), 'class')} are already done"
    images = sum(shard.images for shard in done.values())
    return f"continuing {plan.split}: {images:,} of {counted(plan.images, 'image')} are already done"


def _require_same_archive(target: Split, record: SplitRecord, plan: SplitPlan, note: Callable[[str], None]) -> None:
    """Compare the archive with the one that a published split was made from; its time alone is not its identity."""
    now = Identity.of(plan)
    remedy = f"choose another --target-dir, or move {target.paths.published} away"
    target.require_same(record.identity, now, remedy, time_counts=False)
    if record.identity.mtime_ns != now.mtime_ns and not record.consumed:
        note(f"{plan.archive.path} has another modification time than when {target.paths.published} was made from it")


def _require_published(record: SplitRecord, gone: MissingArchiveError, asked: Asked) -> None:
    """Make sure that all that was asked for is published, as its archive is gone."""
    if record.identity.layout != asked.layout:
        raise MissingArchiveError(f"{gone} (the {record.identity.split} split is published with another --layout)")
    if not set(asked.classes or ()) <= {ref.index for ref in record.classes}:
        raise MissingArchiveError(f"{gone} (not all of the classes asked for are published)")


def _require_whole(claim: Claim, check: Check, note: Callable[[str], None]) -> None:
    """Check what is published; after another boot by its digests where it was not synced.

    Raises:
        CheckError: it differs.
    """
    target = claim.split
    record, published = target.record, target.paths.published
    assert record is not None
    if target.believed(record):
        problems = check(record, "names")
    else:
        note(f"{published} was not synced before the host restarted: checking every byte")
        problems = check(record, "digests")
        if not problems:
            claim.write()
            target.believe()
        elif all(problem.kind != "extra" for problem in problems):
            note(f"{published} did not survive the restart ({len(problems)} differences): it is unpacked again")
            claim.write()
            target.unpublish()
            return
    if problems:
        first = problems[0]
        raise CheckError(
            f"{published} differs from its manifest in {len(problems)} places "
            f"(first: {first.path or first.class_name}: {first.kind}): see `check {target.paths.target}`; "
            "to repair it, run the same command with --repair"
        )


def _require_nothing_else(paths: SplitPaths, damage: Damage) -> None:
    """Say what a repair leaves alone.

    Raises:
        CheckError: files are there that the manifest does not name.
    """
    if damage.extra:
        first = damage.extra[0]
        raise CheckError(
            f"{paths.published} holds {counted(len(damage.extra), 'file')} that this program did not write, such as "
            f"{first.path}: move them away"
        )


def _nothing(record: SplitRecord) -> SplitPlan:
    """Return the plan of a run to which everything is published already."""
    identity = record.identity
    archive = ArchiveId(
        path="",
        size_bytes=identity.size_bytes,
        mtime_ns=identity.mtime_ns,
        headers=identity.headers,
        official=record.official,
    )
    return SplitPlan(
        split=identity.split,
        archive=archive,
        layout=identity.layout,
        classes=(),
        shards=(),
        images=0,
        images_exact=True,
        content_bytes=0,
        labels_digest=identity.labels,
    )
