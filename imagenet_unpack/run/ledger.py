"""Ledger of a run: what was asked for, what is done, what went wrong. The outcome is computed from it."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace

from imagenet_unpack.errors import ExitCode
from imagenet_unpack.host.signals import stopped_by
from imagenet_unpack.model import Outcome, Part, Problem, RunSummary, Shard, ShardDone, ShardFailed, SplitName
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.splitrun import SplitRun

_REMEDIES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota"}


class Ledger:
    """Every shard that was asked for, and what became of it.

    Attributes:
        splits: those that were opened so far, by name.
        fatal: the first outcome that ended the run, or None.
        problems: what the check before publishing found.

    Args:
        asked: the splits that were asked for.
        part: the part of the plan that this run is to do.
    """

    def __init__(self, asked: Iterable[SplitName], part: Part) -> None:
        self.splits: dict[SplitName, SplitRun] = {}
        self.fatal: ShardFailed | None = None
        self.problems: list[Problem] = []
        self._asked = tuple(asked)
        self._part = part
        self._out: dict[tuple[SplitName, str], Shard] = {}
        self._numbered = 0

    def open(self, split: SplitRun) -> list[Shard]:
        """Enter a split, and return its shards that are to be done, each with a slot of its own in this run."""
        self.splits[split.plan.split] = split
        return [self.add(shard) for shard in split.todo]

    def add(self, shard: Shard) -> Shard:
        """Enter a shard that is to be done, and return it with its slot."""
        shard = replace(shard, slot=self._numbered)
        self._numbered += 1
        self._out[shard.split, shard.id] = shard
        return shard

    def reserve(self) -> int:
        """Return a slot for what reports progress but is not a shard."""
        self._numbered += 1
        return self._numbered - 1

    def withdraw(self, name: SplitName) -> None:
        """Take back a split that turned out not to be there."""
        del self.splits[name]
        self._asked = tuple(asked for asked in self._asked if asked != name)

    def record(self, outcome: Outcome) -> Shard:
        """Enter what became of a shard, and return the shard."""
        split = self.splits[outcome.split]
        if isinstance(outcome, ShardDone):
            split.done[outcome.shard] = outcome
            split.uncommitted.append(outcome)
        elif outcome.fatal:  # the run's end, not the shard's failure
            self.fatal = self.fatal or outcome
        elif outcome.kind != "stopped":
            split.failures.append(outcome)
        return self._out.pop((outcome.split, outcome.shard))

    @property
    def all_open(self) -> bool:
        """Whether all splits that were asked for are planned and opened."""
        return self.splits.keys() >= set(self._asked)

    @property
    def begun(self) -> bool:
        """Whether anything of what was asked for is done."""
        return any(split.done or split.published for split in self.splits.values())

    @property
    def failures(self) -> tuple[ShardFailed, ...]:
        """Every shard that failed."""
        return tuple(failure for split in self.splits.values() for failure in split.failures)

    def is_done(self, name: SplitName) -> bool:
        """Whether all that was asked for of a split is done: published, or for one part of several, journaled."""
        split = self.splits.get(name)
        if split is None:
            return False
        return split.published or not (self._part.whole or split.todo or split.uncommitted)

    @property
    def all_done(self) -> bool:
        """Whether all that was asked for is done."""
        return bool(self._asked) and all(self.is_done(name) for name in self._asked)

    def outcome(self, cancel: Cancel) -> RunSummary:
        """Say how the run ended; 0 only where all is done."""
        failures = self.failures
        again = "run the same command again to continue"
        if self.all_done:
            return self.summary(ExitCode.OK, "")
        if cancel.signal is not None:
            return self.summary(cancel.exit_code, f"{stopped_by(cancel.signal)}: {again}")
        if self.fatal is not None:
            fix = _REMEDIES.get(self.fatal.errno or 0, "fix this")
            remedy = "" if self.fatal.kind == "host" else f": {fix}, then {again}"
            return self.summary(ExitCode.STOPPED, f"{self.fatal.message}{remedy}")
        if any(failure.kind == "defect" for failure in failures):
            return self.summary(ExitCode.DEFECT, "a defect of the program: please report it with the lines above")
        if failures:
            what = "1 shard" if len(failures) == 1 else f"{len(failures)} shards"
            return self.summary(
                ExitCode.SHARDS_FAILED,
                f"{what} could not be extracted (see above): fix the cause, then run the same command to try again",
            )
        if self.problems:
            return self.summary(
                ExitCode.CHECK_DIFFERS,
                "the staged files are not those that were written: nothing of that split is published; use --restart",
            )
        missing = [self._missing(name) for name in self._asked if not self.is_done(name)] or ["there was nothing to do"]
        return self.summary(ExitCode.STOPPED, f"not everything was done ({', '.join(missing)}): {again}")

    def _missing(self, name: SplitName) -> str:
        split = self.splits.get(name)
        if split is None:
            return f"{name}: not started"
        return f"{name}: {len(split.todo)} of {len(split.own)} shards left" if split.todo else f"{name}: not published"

    def summary(self, code: int, message: str) -> RunSummary:
        """Return what there is after the run."""
        return RunSummary(
            exit_code=code,
            splits={name: split.summary() for name, split in self.splits.items()},
            failures=(*self.failures, *((self.fatal,) if self.fatal is not None else ())),
            problems=tuple(self.problems),
            message=message,
        )
