"""Opens the splits of a run: looks at what is published and what is unfinished, and begins or continues to stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import xxhash

from imagenet_unpack.checking import findings
from imagenet_unpack.errors import ArchiveError, CheckError, MissingArchiveError, TargetError
from imagenet_unpack.model import (
    ANY_TIME,
    ArchiveId,
    Problem,
    ShardDone,
    SplitPlan,
)
from imagenet_unpack.planning import planner
from imagenet_unpack.planning.common import few
from imagenet_unpack.run.repair import Damage, find_damage, narrow, require_nothing_else
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.sources import consumed
from imagenet_unpack.targets import consume, journal
from imagenet_unpack.targets.claim import Claim
from imagenet_unpack.targets.continuing import require_same
from imagenet_unpack.targets.records import Identity, PlanRecord, SplitRecord
from imagenet_unpack.targets.split import Split
from imagenet_unpack.text import counted

Planned = SplitPlan | MissingArchiveError
"""A plan of all that was asked for; or why there is none: the archive is gone, and the split is published."""
Check = Callable[[SplitRecord, findings.Depth], tuple[Problem, ...]]
"""Compares a published split with its record and its manifest, and returns what differs."""


def open_split(
    claim: Claim, planned: Planned, options: Options, *, check: Check, note: Callable[[str], None]
) -> SplitRun:
    """Open or make the staging tree of a split, after a look at what is published and what is unfinished.

    Args:
        claim: the locks on the split.
        planned: the plan of all that was asked for, if the archive is there.
        options: of the run.
        check: compares the published split with its record.
        note: shows a message to the user.

    Raises:
        TargetError: what is there was made from something else, or by something else.
        MissingArchiveError: the archive is gone and was needed.
        CheckError: the published split is not what was published.
    """
    target = claim.split
    target.require_ours()
    if options.repair:
        return _open_repair(claim, planned, options, check=check, note=note)
    plan = planned if isinstance(planned, SplitPlan) else None
    if target.record is not None:
        if isinstance(planned, MissingArchiveError):
            _require_published(target.record, planned, options)
            note(f"{planned}: {target.paths.published} does not need it and is compared with its manifest")
        else:
            _require_same_archive(target, target.record, planned, note)
            _require_held(target.record, planned, options)
        _require_whole(claim, check, note)
    before = target.record
    shards = len(plan.shards) if plan is not None else 0
    if before is not None:
        missing = before.lacks(plan) if plan is not None else ()
        if not missing:
            if target.found.plan is not None and target.found.plan.repair:
                claim.write()
                target.clear()
            return _published(target, options, shards)
        plan = options.planners[target.paths.split](missing)
        claim.write()
    if plan is None:
        assert isinstance(planned, MissingArchiveError)
        raise planned
    return _begin(target, plan, options, shards=shards, before=before, note=note)


def _open_repair(
    claim: Claim, planned: Planned, options: Options, *, check: Check, note: Callable[[str], None]
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
        target.believe()
        require_nothing_else(target.paths, damage)
        return _published(target, options, 0)
    if isinstance(planned, MissingArchiveError):
        raise planned
    replan = options.planners[split]
    plan = narrow(replan(tuple(index for index in damage.classes if index >= 0) or None), damage.rows)
    if plan.stream is not None and plan.stream.refs is None:  # any wnids: their indices are known by now
        classes = tuple(ref for ref in record.classes if ref.index in damage.classes)
        plan = replace(plan, stream=replace(plan.stream, refs=record.classes), classes=classes)
    note(f"repairing {counted(len(damage.rows), 'image')} of {target.paths.published}")
    return _begin(target, plan, options, shards=0, before=record, damage=damage, note=note)


def _published(target: Split, options: Options, shards: int) -> SplitRun:
    """Return the run of a split of which everything asked for is published."""
    record = target.record
    assert record is not None
    return SplitRun(
        target=target,
        plan=_nothing(record),
        part=options.part,
        before=record,
        shards=shards,
        skipped=shards,
        published=True,
    )


def _begin(
    target: Split,
    plan: SplitPlan,
    options: Options,
    *,
    shards: int,
    before: SplitRecord | None,
    damage: Damage | None = None,
    note: Callable[[str], None],
) -> SplitRun:
    """Begin or continue to stage a plan; `shards`: how many there were before published classes were left out."""
    part = options.part
    # Runs of validation images are cut again for the missing classes, so there may be more of them than at first.
    skipped = max(shards - len(plan.shards), 0)
    own = planner.cut(plan.shards, part.count)[part.index]
    parts = [f"{shard.id} {shard.offset} {shard.end}" for shard in plan.shards]
    parts += sorted(damage.rows) if damage is not None else ()
    journaled = journal.read(target.paths.home, plan.split) if target.found.plan is not None else {}
    consumed.require_there(shard for shard in own if shard.id not in journaled)
    done = target.begin(
        PlanRecord(
            identity=Identity.of(plan),
            classes=tuple(ref.index for ref in plan.classes),
            parts=part.count,
            shards=xxhash.xxh3_64_hexdigest("\n".join(parts).encode()),
            repair=damage is not None,
            consume=options.consume,
        ),
        part=part,
        time_counts=options.time_counts and damage is None,
    )
    total = skipped + len(own)
    known = {shard.id for shard in plan.shards}
    if plan.stream is None:  # else its shards are not known yet
        done = {shard: outcome for shard, outcome in done.items() if shard in known}
    skipped += sum(shard.id in done for shard in own)
    if done:
        note(_continuing(plan, done))
    if options.consume or (target.found.plan is not None and target.found.plan.consume):
        # This run changes the archive, or another one did after it was planned (--wait).
        own = [replace(shard, archive=replace(shard.archive, mtime_ns=ANY_TIME)) for shard in own]
    if options.consume:
        own = consume.in_order(own)
        consume.free(shard for shard in own if shard.id in done)  # the run before this one may have ended before that
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
        consume=options.consume,
        unread=0 if plan.stream is None else len(plan.stream.sources),
        classes_named=options.classes is not None and damage is None,
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
    require_same(target.paths, record.identity, now, remedy, time_counts=False)
    if record.identity.mtime_ns != now.mtime_ns and not record.consumed:
        note(f"{plan.archive.path} has another modification time than when {target.paths.published} was made from it")


def _require_held(record: SplitRecord, plan: SplitPlan, asked: Options) -> None:
    """Refuse classes that were named and are not in a stream that was read before."""
    held = record.archive_classes
    absent = [ref.wnid for ref in plan.classes if ref.index not in held] if held is not None else []
    if absent and asked.classes is not None:
        raise ArchiveError(f"{plan.archive.path}: has no image of {few(absent)}: choose other --classes")


def _require_published(record: SplitRecord, gone: MissingArchiveError, asked: Options) -> None:
    """Make sure that all that was asked for is published, as its archive is gone."""
    if record.identity.layout != asked.layout:
        raise MissingArchiveError(f"{gone} (the {record.identity.split} split is published with another --layout)")
    if not set(asked.classes or ()) <= {ref.index for ref in record.classes}:
        raise MissingArchiveError(f"{gone} (not all of the classes asked for are published)")


def _require_whole(claim: Claim, check: Check, note: Callable[[str], None]) -> None:
    """Check what is published; after another boot by its digests where it was not synced; sync it if that is asked for.

    Raises:
        CheckError: it differs.
    """
    target = claim.split
    record, published = target.record, target.paths.published
    assert record is not None
    if target.believed(record):
        problems = check(record, "names")
        if not problems:
            target.believe()
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
        remedy = "to repair it, run the same command with --repair"
        if any(map(findings.is_of_manifest, problems)):
            remedy = f"move {published} away, then run the same command again"
        raise CheckError(
            f"{published} differs from its manifest in {counted(len(problems), 'place')} "
            f"(first: {first.path or first.class_name}: {first.kind}): see `check {target.paths.target}`; {remedy}"
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
