"""Plans of a run's splits, made in threads beside each other and beside the extraction."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from imagenet_unpack.errors import MissingArchiveError, UsageError
from imagenet_unpack.model import SplitName, SplitPlan
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.opening import Planned
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.targets import consume
from imagenet_unpack.targets.states import is_published

Result = TypeVar("Result")
VAL_WAIT_S = 0.5
_STEP_S = 0.02
_END_S = 2.0


class Plans:
    """The plans of all splits asked for; each is taken once, when it is made.

    Args:
        options: of the run.
        cancel: is asked whether to go on.
    """

    def __init__(self, options: Options, cancel: Cancel) -> None:
        self._options = options
        self._cancel = cancel
        self._plans: dict[SplitName, Future[Planned]] = {}

    @property
    def pending(self) -> bool:
        """Whether there are plans that were not taken yet."""
        return bool(self._plans)

    def make(self) -> None:
        """Begin to plan all splits, and wait until the work can begin.

        Where the first byte is slow, 50,000 header reads in a row take a minute: train does not wait for val's. Where
        they take a moment only, val's faults are met before anything is written.

        Raises:
            UnpackError: an archive is not what was asked for.
            CancelledError: the run is to end.
        """
        options = self._options
        for split in options.planners:
            self._plans[split] = in_background("plan", functools.partial(self._plan, split))
        first_s = time.monotonic()
        for split, plan in self._plans.items():
            must = options.verify is not None or options.consume or split == next(iter(self._plans))
            while not plan.done() and (must or time.monotonic() < first_s + VAL_WAIT_S):
                self._cancel.check()
                self._cancel.wait(_STEP_S)
            self._cancel.check()
            if plan.done():
                plan.result()
            first_s = time.monotonic()
        made = [plan.result() for plan in self._plans.values() if options.consume or options.verify is not None]
        for planned in made:
            if options.consume and isinstance(planned, SplitPlan):
                consume.require_possible(planned)
        for planned in made:
            if options.verify is not None and isinstance(planned, SplitPlan):
                options.verify(planned)

    def take(self) -> list[tuple[SplitName, Planned]]:
        """Return the plans that were made since the last call.

        Raises:
            UnpackError: an archive is not what was asked for.
        """
        made = [split for split, plan in self._plans.items() if plan.done()]
        return [(split, self._plans.pop(split).result()) for split in made]

    def end(self) -> None:
        """Wait for plans that nobody needs any more: Python ends a thread in Arrow's code by aborting the process."""
        unfinished = [plan for plan in self._plans.values() if not plan.done()]
        if unfinished:
            self._cancel.request()
            wait(unfinished, _END_S)

    def _plan(self, split: SplitName) -> Planned:
        """Plan a split; return the error where its archive is gone and the split is published."""
        try:
            plan = self._options.planners[split](self._options.classes)
        except MissingArchiveError as error:
            if not is_published(self._options.target, split):
                raise
            return error
        if plan.stream is not None and not self._options.part.whole:
            raise UsageError(f"{plan.archive.path}: a stream cannot be divided into parts: leave out --part")
        return plan


def in_background(name: str, task: Callable[[], Result]) -> Future[Result]:
    """Run a task in a thread that does not keep the program from ending."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
