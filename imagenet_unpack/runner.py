"""Drives one run: plan, open the staging trees, extract, commit to the journal, check, publish; and ends in order."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from imagenet_unpack import checker, journal, manifest, staging
from imagenet_unpack.errors import CheckError, ExitCode, TargetError, UnpackError
from imagenet_unpack.executors import Executor
from imagenet_unpack.extractor import read_part
from imagenet_unpack.model import Outcome, Problem, Shard, ShardDone, ShardFailed, SplitName, SplitPlan
from imagenet_unpack.worker import Settings, run_shard

COMMIT_S = 5.0
GRACE_S = 7.0
_PART = "0-of-1"


class Reporter(Protocol):
    """What a run tells while it goes on."""

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Begin a new stretch of work."""

    def grow(self, nbytes: int) -> None:
        """Enlarge the total of the current stretch."""

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Count what was done."""

    def waiting(self, reason: str | None) -> None:
        """Say why nothing goes on, or that it does again (None)."""

    def note(self, message: str) -> None:
        """Tell people something they should know."""

    def close(self) -> None:
        """End the display."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What stands of a split after the run; counts as in the contract's JSON."""

    status: Literal["published", "incomplete", "failed"]
    classes: int
    images: int
    size_bytes: int
    shards: int
    shards_skipped: int
    shards_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The outcome of a run."""

    exit_code: int
    splits: dict[SplitName, SplitSummary]
    failures: tuple[ShardFailed, ...] = ()
    problems: tuple[Problem, ...] = ()
    message: str = ""


class StopRequest:
    """A wish to end the run, made from a signal handler: sets a number and removes the run's token."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._token: Path | None = None
        self._kill: Callable[[], None] = lambda: None

    def arm(self, token: Path, kill: Callable[[], None]) -> None:
        """From now on a request also ends the workers: by the token, and after a grace by `kill`."""
        self._token, self._kill = token, kill
        if self.signal is not None:
            self.request(self.signal)

    def request(self, number: int) -> None:
        """Ask the run to end."""
        self.signal = number
        self.end_workers()

    def end_workers(self) -> None:
        """Let the workers drop what they have; kill those that cannot within the grace."""
        if self._token is not None:
            self._token.unlink(missing_ok=True)
            timer = threading.Timer(GRACE_S, self._kill)
            timer.daemon = True
            timer.start()

    def disarm(self) -> None:
        """The workers have ended."""
        self._token, self._kill = None, lambda: None


@dataclass(slots=True, kw_only=True)
class _Split:
    """One split of this run: the plan of what is still to be added, and what is done of it."""

    folder: staging.SplitFolder
    plan: SplitPlan
    before: dict[str, Any] | None = None  # record of what is published already
    done: dict[str, ShardDone] = field(default_factory=dict)
    uncommitted: list[ShardDone] = field(default_factory=list)
    skipped: int = 0
    failures: list[ShardFailed] = field(default_factory=list)
    published: bool = False

    @property
    def todo(self) -> list[Shard]:
        return [shard for shard in self.plan.shards if shard.id not in self.done]

    def summary(self) -> SplitSummary:
        before = self.before or {"classes": [], "images": 0, "bytes": 0}
        complete = len(self.done) == len(self.plan.shards)
        counts = len(before["classes"]) + (len(self.plan.classes) if complete else 0)
        return SplitSummary(
            status="published" if self.published else "failed" if self.failures else "incomplete",
            classes=counts if complete or self.plan.split == "val" else len(before["classes"]) + len(self.done),
            images=before["images"] + sum(item.images for item in self.done.values()),
            size_bytes=before["bytes"] + sum(item.size_bytes for item in self.done.values()),
            shards=len(self.plan.shards),
            shards_skipped=self.skipped,
            shards_failed=len(self.failures),
        )


Replan = Callable[[tuple[int, ...] | None], SplitPlan]
"""Plans a split for the class indices given."""


def run(
    *,
    target: Path,
    planners: dict[SplitName, Replan],
    asked: tuple[int, ...] | None,
    executor: Executor,
    reporter: Reporter,
    stop: StopRequest,
    restart: bool = False,
    keep_mtime: bool = False,
    verify: Callable[[SplitPlan], None],
) -> RunSummary:
    """Run the whole job and return what became of it.

    Args:
        target: where the tree goes.
        planners: how to plan each split asked for.
        asked: the class indices asked for, or None for all that the archives hold.
        executor: runs the shards.
        reporter: is told what goes on.
        stop: asks for an early end.
        restart: throw an unfinished run away first.
        keep_mtime: give files the members' modification times.
        verify: holds a plan's archive against the published facts.

    Raises:
        UnpackError: it could not start, or had to stop.
    """
    splits: dict[SplitName, _Split] = {}
    with ExitStack() as stack:
        train_plan = planners["train"](asked) if "train" in planners else None
        # 50,000 header reads in a row can take a minute on storage with a slow first byte: train does not wait.
        pool = ThreadPoolExecutor(1, thread_name_prefix="plan-val")
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        val_plan = pool.submit(planners["val"], asked) if "val" in planners else None
        staging.claim_target(target)
        for split in planners:
            folder = staging.SplitFolder(target, split)
            stack.enter_context(staging.lock(folder.root / "locks" / f"{split}.lock", f"the {split} split of {target}"))
            staging.wait_for_leases(folder.lease(_PART))
        token = target / staging.FOLDER / f"run-{socket.gethostname()}-{os.getpid()}"
        _write_token(token)
        stack.callback(token.unlink, missing_ok=True)
        stop.arm(token, executor.kill)
        stack.callback(stop.disarm)
        settings = Settings(target=str(target), part=_PART, token=str(token), keep_mtime=keep_mtime)

        def opened(plan: SplitPlan) -> _Split:
            for note in plan.notes:
                reporter.note(note)
            verify(plan)
            opened_split = _open(target, plan, planners[plan.split], asked, restart, executor.workers, reporter)
            splits[plan.split] = opened_split
            return opened_split

        try:
            if train_plan is not None:
                opened(train_plan)
            if train_plan is None and val_plan is not None:
                opened(val_plan.result())
                val_plan = None
            _preflight(target, splits)
            _extract(splits, val_plan, opened, executor, settings, reporter, stop)
        finally:
            executor.close()
        return _finish(splits, executor.workers, reporter, stop)


def _write_token(token: Path) -> None:
    try:
        token.write_text("", encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{token.parent}: cannot be written: {error.strerror}") from error


def _open(
    target: Path,
    plan: SplitPlan,
    replan: Replan,
    asked: tuple[int, ...] | None,
    restart: bool,
    workers: int,
    reporter: Reporter,
) -> _Split:
    """Open or make the staging tree of a split, after a look at what is published and what is unfinished."""
    folder = staging.SplitFolder(target, plan.split)
    intent = staging.read_json(folder.intent)
    if intent is not None:
        _same_run(folder, plan, intent)
        staging.publish(folder, intent)
    elif restart:
        staging.clear(folder)
    record = staging.read_json(folder.record)
    if os.path.lexists(folder.published):
        if record is None:
            raise TargetError(f"{folder.published} exists and was not made by this program: move it away")
        _same_run(folder, plan, record)
        _verify_published(folder, record, workers, reporter)
        have = {item["index"] for item in record["classes"]}
        missing = tuple(ref.index for ref in plan.classes if ref.index not in have)
        if not missing or (asked is None and plan.split == "val" and not missing):
            empty = _with_shards(plan, ())
            split = _Split(folder=folder, plan=empty, before=record, published=True)
            split.skipped = 0
            return split
        plan = replan(missing)
    else:
        if record is None and os.path.lexists(folder.manifest):
            raise TargetError(f"{folder.manifest} exists and was not made by this program: move it away")
        record = None
    identity = _identity(plan) | {"classes": [ref.index for ref in plan.classes]}
    unfinished = staging.read_json(folder.plan)
    if unfinished is not None:
        _same_run(folder, plan, unfinished)
        if unfinished.get("classes") != identity["classes"]:
            raise TargetError(
                f"the unfinished run in {folder.home} was asked for other --classes: finish it first, or use --restart"
            )
    else:
        staging.clear(folder)
        folder.tree.mkdir(parents=True)
        folder.parts.mkdir()
        staging.write_json(folder.plan, identity)
    split = _Split(folder=folder, plan=plan, before=record)
    known = {shard.id for shard in plan.shards}
    split.done = {name: done for name, done in journal.read(folder.home, plan.split).items() if name in known}
    split.skipped = len(split.done)
    return split


def _with_shards(plan: SplitPlan, shards: tuple[Shard, ...]) -> SplitPlan:
    return SplitPlan(
        split=plan.split,
        archive=plan.archive,
        layout=plan.layout,
        classes=(),
        shards=shards,
        images=0,
        content_bytes=0,
        labels_digest=plan.labels_digest,
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


def _same_run(folder: staging.SplitFolder, plan: SplitPlan, before: dict[str, Any]) -> None:
    words = {
        "layout": "another --layout",
        "size": "an archive of another size",
        "mtime_ns": "an archive with another modification time",
        "headers": "an archive with other contents",
        "labels": "other labels",
    }
    now = _identity(plan)
    differ = [text for key, text in words.items() if before.get(key) != now[key]]
    if differ:
        remedy = "move it away" if folder.record.exists() else "give the same again, or use --restart"
        raise TargetError(f"the {folder.split} split of {folder.target} was made with {', '.join(differ)}: {remedy}")


def _verify_published(folder: staging.SplitFolder, record: dict[str, Any], workers: int, reporter: Reporter) -> None:
    reporter.phase(f"checking {folder.split}", None, record["images"])
    result = checker.check_split(
        folder.published,
        folder.split,
        manifest=folder.manifest,
        depth="names",
        workers=workers,
        classes=tuple(item["folder"] for item in record["classes"]),
    )
    if result.problems:
        first = result.problems[0]
        raise CheckError(
            f"{folder.published} differs from its manifest in {len(result.problems)} places "
            f"(first: {first.path or first.class_name}: {first.kind}): see `check {folder.target}`; to make it anew, "
            f"remove {folder.published} and run the same command"
        )


def _preflight(target: Path, splits: dict[SplitName, _Split]) -> None:
    need = sum(shard.size_bytes for split in splits.values() for shard in split.todo)
    stat = os.statvfs(target)
    free = stat.f_bavail * stat.f_frsize
    if need > free:
        raise TargetError(f"{target}: needs about {need:,} bytes, {free:,} are free: make room")


def _extract(
    splits: dict[SplitName, _Split],
    val_plan: Future[SplitPlan] | None,
    opened: Callable[[SplitPlan], _Split],
    executor: Executor,
    settings: Settings,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Extract all that is not done; journal it in groups; raise what val's planning raised."""
    reporter.phase("extracting", sum(shard.size_bytes for s in splits.values() for shard in s.todo), None)
    fatal: list[ShardFailed] = []
    queue: list[Shard] = [shard for split in splits.values() for shard in split.todo]
    pending = val_plan
    last_commit = time.monotonic()

    def take_val(*, wait: bool) -> None:
        nonlocal pending
        if pending is not None and (wait or pending.done()):
            plan, pending = pending, None
            split = opened(plan.result())
            reporter.grow(sum(shard.size_bytes for shard in split.todo))
            queue.extend(split.todo)

    def shards() -> Iterator[Shard]:
        while queue and stop.signal is None and not fatal:
            yield queue.pop(0)

    while True:
        take_val(wait=not queue)
        if not queue:
            break
        for outcome in executor.run(
            shards(),
            functools.partial(run_shard, settings=settings),
            lambda shard: read_part(shard, splits[shard.split].folder.part(shard.id)),
        ):
            _collect(outcome, splits[outcome.split], reporter, fatal)
            if fatal and len(fatal) == 1:
                stop.end_workers()
            try:
                take_val(wait=False)
            except UnpackError:
                stop.end_workers()
                queue.clear()
                raise
            if time.monotonic() - last_commit > COMMIT_S:
                _commit(splits)
                last_commit = time.monotonic()
        if stop.signal is not None or fatal:
            break
    _commit(splits)


def _collect(outcome: Outcome, split: _Split, reporter: Reporter, fatal: list[ShardFailed]) -> None:
    if isinstance(outcome, ShardDone):
        split.done[outcome.shard] = outcome
        split.uncommitted.append(outcome)
        for note in outcome.notes:
            reporter.note(note)
        size = next(shard.size_bytes for shard in split.plan.shards if shard.id == outcome.shard)
        reporter.advance(nbytes=size, images=outcome.images, shards=1)
    elif outcome.fatal:
        fatal.append(outcome)
        split.failures.append(outcome)
    elif outcome.kind != "stopped":
        split.failures.append(outcome)
        reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")


def _commit(splits: dict[SplitName, _Split]) -> None:
    """Journal the shards done so far, after a sync that covers all their files and manifest parts."""
    batches = [(split, split.uncommitted) for split in splits.values() if split.uncommitted]
    if not batches:
        return
    staging.sync(batches[0][0].folder.home)
    for split, done in batches:
        journal.append(split.folder.home, _PART, done)
        split.uncommitted = []


def _finish(splits: dict[SplitName, _Split], workers: int, reporter: Reporter, stop: StopRequest) -> RunSummary:
    code = ExitCode.OK
    message = ""
    problems: list[Problem] = []
    failures = tuple(failure for split in splits.values() for failure in split.failures)
    fatal = [failure for failure in failures if failure.fatal]
    for split in splits.values():
        if split.published or split.todo or stop.signal is not None or fatal:
            continue
        reporter.phase(f"checking {split.plan.split}", None, sum(done.images for done in split.done.values()))
        found = _check_and_publish(split, workers)
        problems += found
    if stop.signal is not None:
        return RunSummary(
            exit_code=128 + stop.signal,
            splits={name: split.summary() for name, split in splits.items()},
            failures=failures,
            message="stopped by a signal: the same command continues",
        )
    if fatal:
        code, message = ExitCode.STOPPED, f"{fatal[0].message}: mend it, then the same command continues"
    elif any(failure.kind == "defect" for failure in failures):
        code = ExitCode.DEFECT
    elif failures:
        code, message = ExitCode.SHARDS_FAILED, f"{len(failures)} shards failed: the same command tries them again"
    elif problems:
        code, message = ExitCode.CHECK_DIFFERS, "the staged files are not what was written: nothing is published"
    return RunSummary(
        exit_code=code,
        splits={name: split.summary() for name, split in splits.items()},
        failures=failures,
        problems=tuple(problems),
        message=message,
    )


def _check_and_publish(split: _Split, workers: int) -> tuple[Problem, ...]:
    """Merge the manifest, compare the staged files with it, and publish when they agree."""
    folder, plan = split.folder, split.plan
    staged = folder.home / "staged.tsv"
    _write_manifest(staged, folder, plan.shards, None)
    result = checker.check_split(
        folder.tree,
        plan.split,
        manifest=staged,
        depth="sizes",
        workers=workers,
        official=plan.archive.official,
        classes=tuple(ref.folder for ref in plan.classes),
    )
    if result.problems:
        return result.problems
    before = split.before
    if before is None:
        staged.replace(folder.new_manifest)
    else:
        _write_manifest(folder.new_manifest, folder, plan.shards, folder.manifest)
    staging.sync(folder.home)
    classes = [{"index": ref.index, "wnid": ref.wnid, "folder": ref.folder} for ref in plan.classes]
    record = _identity(plan) | {
        "official": plan.archive.official,
        "classes": sorted([*(before["classes"] if before else []), *classes], key=_class_index),
        "images": result.images + (before["images"] if before else 0),
        "bytes": sum(done.size_bytes for done in split.done.values()) + (before["bytes"] if before else 0),
    }
    staging.publish(folder, record)
    split.published = True
    return ()


def _class_index(item: dict[str, Any]) -> int:
    return int(item["index"])


def _write_manifest(path: Path, folder: staging.SplitFolder, shards: tuple[Shard, ...], existing: Path | None) -> None:
    """Write the rows of the shards' parts, sorted by path, merged with those of an existing manifest."""
    streams = manifest.part_streams(folder.part(shard.id) for shard in shards)
    if existing is not None:
        streams.append(manifest.rows(existing))
    with open(path, "wb") as file:
        manifest.merge(file, streams)
