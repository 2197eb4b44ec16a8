"""What the tasks of a check find, and how it is put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from imagenet_unpack.model import Problem, SplitCheck, SplitName

Depth = Literal["names", "sizes", "digests"]
_TASKS = "imagenet_unpack.checking.checker"  # what workers import


class Advance(Protocol):
    """Called with the images, and the bytes read of them, checked since the last call; may raise to end the check."""

    def __call__(self, images: int, nbytes: int, /) -> None:
        """Count them."""


def ignore(_images: int, _nbytes: int, /) -> None:
    """Show no progress."""


@dataclass(slots=True, kw_only=True)
class Found:
    """What one task found: images in each class folder it looked at, bytes it read of them, and what is wrong."""

    images: dict[str, int]
    problems: list[Problem]
    size_bytes: int = 0

    def add(self, other: Found, advance: Advance) -> None:
        """Take in what a task found, and report it as progress."""
        self.images.update(other.images)
        self.problems.extend(other.problems)
        self.size_bytes += other.size_bytes
        advance(sum(other.images.values()), other.size_bytes)


def gather(
    look: Callable[[tuple[int, int]], Found],
    tasks: list[tuple[int, int]],
    workers: int,
    advance: Advance,
    total: Found,
) -> None:
    """Run the tasks, here or in a pool, and add what they find to `total`."""
    results: Iterable[Found] = map(look, tasks)
    if workers > 1 and len(tasks) > 1:
        from imagenet_unpack.host import pool  # noqa: PLC0415 - seldom needed, and slow to import

        results = pool.map_unordered(look, tasks, workers, _TASKS)
    for found in results:
        total.add(found, advance)


def split_check(
    split: SplitName, found: Found, basis: Literal["manifest", "published facts"] = "manifest"
) -> SplitCheck:
    """Return the result of a split from what all its tasks found."""
    problems = sorted(found.problems, key=lambda problem: (problem.class_name, problem.path or "", problem.kind))
    classes = sum(count > 0 for folder, count in found.images.items() if folder)
    images = sum(found.images.values())
    return SplitCheck(split=split, classes=classes, images=images, problems=tuple(problems), basis=basis)


def is_of_manifest(problem: Problem) -> bool:
    """Say whether a split's manifest itself is missing or damaged, so that it cannot say what there should be."""
    path = problem.path or ""
    return path.endswith(".manifest.tsv") and "/" not in path


def by_class(problems: Iterable[Problem]) -> list[tuple[str, Counter[str]]]:
    """Return how many problems of each kind each class has, in the order of the class names."""
    table: dict[str, Counter[str]] = {}
    for problem in problems:
        table.setdefault(problem.class_name, Counter())[problem.kind] += 1
    return sorted(table.items())
