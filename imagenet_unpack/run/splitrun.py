"""One split of a run: what is published of it, what is done, what is to do; its check and its publishing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from imagenet_unpack.checking import checker
from imagenet_unpack.errors import CheckError, TargetError
from imagenet_unpack.model import Part, Problem, Shard, ShardDone, ShardFailed, SplitPlan, SplitSummary
from imagenet_unpack.planning import planner
from imagenet_unpack.targets import journal, manifest, staging

Replan = Callable[[tuple[int, ...] | None], SplitPlan]
"""Plans a split for the class indices given, or for all that the archive holds."""

_DIFFERENCES = {
    "layout": "another --layout",
    "size": "an archive of another size",
    "mtime_ns": "an archive with another modification time",
    "headers": "an archive with other contents",
    "labels": "other labels",
}


@dataclass(slots=True, kw_only=True)
class SplitRun:
    """The state of one split.

    Attributes:
        plan: of what this run adds; empty when everything asked for is published already.
        before: record of what was published before this run, or None.
        part: the part of the plan that this run is to do.
        own: the shards of that part, largest first.
        done: shards whose files are in the staging tree, by id, of all parts.
        uncommitted: those of them that the journal does not know yet.
        shards: how many make up all that was asked for.
        skipped: how many of them earlier runs had done.
    """

    folder: staging.SplitFolder
    plan: SplitPlan
    part: Part
    own: list[Shard] = field(default_factory=list)
    before: dict[str, Any] | None = None
    done: dict[str, ShardDone] = field(default_factory=dict)
    uncommitted: list[ShardDone] = field(default_factory=list)
    skipped: int = 0
    shards: int
    failures: list[ShardFailed] = field(default_factory=list)
    published: bool = False

    @property
    def todo(self) -> list[Shard]:
        """The shards of this part that are not done, largest first."""
        return [shard for shard in self.own if shard.id not in self.done]

    def begun(self) -> bool:
        """Say whether anything stands in the staging tree."""
        return self.folder.tree.is_dir() and any(self.folder.tree.iterdir())

    def left(self) -> SplitPlan:
        """Return the plan of what is still to be written."""
        todo = self.todo
        share = sum(shard.size_bytes for shard in todo) / max(1, sum(shard.size_bytes for shard in self.plan.shards))
        images, content_bytes = round(self.plan.images * share), round(self.plan.content_bytes * share)
        return replace(self.plan, shards=tuple(todo), images=images, content_bytes=content_bytes)

    def commit(self) -> None:
        """Journal what is done; the caller has synced the file system since."""
        if self.uncommitted:
            journal.append(self.folder.home, self.part.name, self.uncommitted)
            self.uncommitted = []

    def summary(self) -> SplitSummary:
        """Say what stands of the split now."""
        before = self.before or {"classes": [], "images": 0, "bytes": 0}
        refs = {ref.index for shard in self.plan.shards if shard.id in self.done for ref in shard.classes}
        return SplitSummary(
            status="published" if self.published else "failed" if self.failures else "incomplete",
            classes=len(before["classes"]) + len(refs),
            images=before["images"] + sum(done.images for done in self.done.values()),
            size_bytes=before["bytes"] + sum(done.size_bytes for done in self.done.values()),
            shards=self.shards,
            shards_skipped=self.skipped,
            shards_failed=len(self.failures),
        )

    def check_and_publish(self, workers: int, advance: checker.Advance) -> tuple[Problem, ...]:
        """Merge the manifest, compare the staged files with it, and publish when they agree; else say what differs."""
        folder, plan, before = self.folder, self.plan, self.before
        staged = folder.home / f"{plan.split}.staged.tsv"
        parts = manifest.part_streams(folder.part(shard.id) for shard in plan.shards)
        manifest.write(staged, parts)
        result = checker.check_split(
            folder.tree,
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
        if before is None:
            staged.replace(folder.new_manifest)
        else:
            manifest.write(folder.new_manifest, [manifest.rows(staged), manifest.rows(folder.manifest)])
        staging.sync(folder.home)
        classes = [{"index": ref.index, "wnid": ref.wnid, "folder": ref.folder} for ref in plan.classes]
        record = _identity(plan) | {
            "official": plan.archive.official,
            "classes": sorted([*(before["classes"] if before else []), *classes], key=_class_index),
            "images": result.images + (before["images"] if before else 0),
            "bytes": sum(done.size_bytes for done in self.done.values()) + (before["bytes"] if before else 0),
            "manifest_xxh3": manifest.file_digest(folder.new_manifest),
        }
        staging.publish(folder, record)
        self.published = True
        return ()


def open_split(
    folder: staging.SplitFolder,
    plan: SplitPlan,
    replan: Replan,
    *,
    part: Part,
    restart: bool,
    time_counts: bool,
    check: Callable[[dict[str, Any]], tuple[Problem, ...]],
) -> SplitRun:
    """Open or make the staging tree of a split, after a look at what is published and what is unfinished.

    Args:
        folder: where the split stands.
        plan: of all that was asked for.
        replan: plans the classes that a published split lacks.
        part: the part of the plan that this run is to do.
        restart: throw an unfinished run away.
        time_counts: an archive with another modification time is another archive.
        check: compares the published split with its record and returns what differs.

    Raises:
        TargetError: what stands there was made from something else, or by something else.
        CheckError: the published split is not what was published.
    """

    def require_same(before: dict[str, Any], remedy: str) -> None:
        now = _identity(plan)
        keys = [key for key in _DIFFERENCES if time_counts or key != "mtime_ns"]
        differ = [_DIFFERENCES[key] for key in keys if before.get(key) != now[key]]
        if differ:
            what = f"the {folder.split} split of {folder.target} was made with {', '.join(differ)}"
            if differ == [_DIFFERENCES["mtime_ns"]]:
                seconds, fraction = divmod(before["mtime_ns"], 10**9)
                raise TargetError(
                    f"{what}: if it is a copy, or was mended, give it the time of the first one "
                    f"(touch -d @{seconds}.{fraction:09d}), or prove it official with --verify-archives digest; "
                    f"else {remedy}"
                )
            raise TargetError(f"{what}: {remedy}")

    intent = staging.read_json(folder.intent)
    if intent is not None:  # publishing had begun: end it, whatever is asked for now
        staging.publish(folder, intent)
    elif restart:
        staging.clear(folder)
    record = staging.read_json(folder.record)
    shards = len(plan.shards)
    if os.path.lexists(folder.published):
        if record is None:
            raise TargetError(f"{folder.published} exists and was not made by this program: move it away")
        require_same(record, f"choose another --target-dir, or move {folder.published} away")
        _require_whole(folder, check(record))
        have = {item["index"] for item in record["classes"]}
        missing = tuple(ref.index for ref in plan.classes if ref.index not in have)
        if not missing:
            nothing = replace(plan, classes=(), shards=(), images=0, content_bytes=0)
            return SplitRun(
                folder=folder, plan=nothing, part=part, before=record, shards=shards, skipped=shards, published=True
            )
        plan = replan(missing)
    else:
        if record is None and os.path.lexists(folder.manifest):
            raise TargetError(f"{folder.manifest} exists and was not made by this program: move it away")
        record = None  # whoever removed the published split wants it anew
    # Runs of validation images are cut anew for the missing classes, so there may be more of them than at first.
    skipped = max(shards - len(plan.shards), 0)
    own = planner.cut(plan.shards, part.count)[part.index]
    split = SplitRun(
        folder=folder, plan=plan, part=part, own=own, before=record, shards=skipped + len(own), skipped=skipped
    )
    _find_or_make_staging(split, require_same)
    return split


def _find_or_make_staging(split: SplitRun, require_same: Callable[[dict[str, Any], str], None]) -> None:
    """Continue the unfinished run of the same plan, or begin one."""
    folder, plan, part = split.folder, split.plan, split.part
    asked_for = _identity(plan) | {"classes": [ref.index for ref in plan.classes], "parts": part.count}
    shards = "\n".join(f"{shard.id} {shard.offset} {shard.end}" for shard in plan.shards)
    asked_for["shards"] = xxhash.xxh3_64_hexdigest(shards.encode())
    unfinished = staging.read_json(folder.plan)
    if unfinished is None or (part.whole and not split.begun()):  # begun and given up before the first image
        staging.clear(folder)
        folder.tree.mkdir(parents=True)
        folder.parts.mkdir()
        staging.write_json(folder.plan, asked_for)
        return
    require_same(unfinished, "give the same again to continue, or use --restart")
    if unfinished.get("classes") != asked_for["classes"]:
        raise TargetError(
            f"the unfinished run in {folder.home} was asked for other --classes: finish it first, or use --restart"
        )
    if unfinished.get("shards") != asked_for["shards"]:
        raise TargetError(
            f"the unfinished run in {folder.home} is another version's, which cut its shards otherwise: end it with "
            "that version, or use --restart"
        )
    parts = unfinished.get("parts", 1)
    if not part.whole and parts != part.count:
        if parts != 1:
            raise TargetError(
                f"the unfinished run in {folder.home} was begun in {parts} parts, not {part.count}: give the same "
                "again, or let --shard 0/1 do the rest"
            )
        staging.write_json(folder.plan, asked_for)  # what one run began may be ended in parts
    known = {shard.id for shard in plan.shards}
    split.done = {name: done for name, done in journal.read(folder.home, plan.split).items() if name in known}
    split.skipped += sum(shard.id in split.done for shard in split.own)


def _require_whole(folder: staging.SplitFolder, problems: tuple[Problem, ...]) -> None:
    if problems:
        first = problems[0]
        raise CheckError(
            f"{folder.published} differs from its manifest in {len(problems)} places "
            f"(first: {first.path or first.class_name}: {first.kind}): see `check {folder.target}`; to make it anew, "
            f"remove {folder.published} and run the same command"
        )


def _identity(plan: SplitPlan) -> dict[str, Any]:
    """What must be the same for a run to be continued or a published split to be extended."""
    return {
        "schema": 1,
        "split": plan.split,
        "layout": plan.layout,
        "size": plan.archive.size_bytes,
        "mtime_ns": plan.archive.mtime_ns,
        "headers": plan.archive.headers,
        "labels": plan.labels_digest,
    }


def _class_index(item: dict[str, Any]) -> int:
    return int(item["index"])
