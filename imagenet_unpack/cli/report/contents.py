"""What the report shows of a target: the classes and images of each split, from its manifest or its folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import CheckError, TargetError
from imagenet_unpack.model import LAYOUTS, Problem, SplitCheck, class_refs
from imagenet_unpack.targets.manifest import manifest_name
from imagenet_unpack.targets.paths import timeline_file
from imagenet_unpack.training import samples

LabelledSplit = Literal["train", "val"]
LABELLED_SPLITS: tuple[LabelledSplit, ...] = ("train", "val")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image to be shown: its path, its file name, and what a check found wrong with it, or ""."""

    path: str
    name: str
    mark: str = ""


@dataclass(slots=True, kw_only=True)
class ClassContents:
    """A class of a target.

    Attributes:
        index: class index.
        wnid: its wnid.
        names: what WordNet calls it, or "".
        images: number of images by split.
        pictures: the images to be shown, by split.
    """

    index: int
    wnid: str
    names: str
    images: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)

    def published(self, split: str) -> int | None:
        """Return how many images the published data set has, or None for a class that is not in it."""
        if not self.names:
            return None
        return ilsvrc2012.train_images(self.index) if split == "train" else ilsvrc2012.VAL_IMAGES_PER_CLASS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """A class folder, and the names in it: those that the manifest lists, or those that are there."""

    index: int
    wnid: str
    path: str
    images: int
    names: Iterable[str]
    listed: bool


def class_contents(target: Path, checks: Iterable[SplitCheck], per_class: int | None) -> list[ClassContents]:
    """Return the classes of a target by class index, each with the images to show.

    Args:
        target: folder that holds `train/` and `val/`.
        checks: what a check found; images that are not in the manifest are shown first, and marked.
        per_class: images to show of each class and split; None: as many as a page of a few megabytes holds.
    """
    folders = {split: list(_folders(target, split)) for split in LABELLED_SPLITS}
    count = per_class or min(max(_PICTURES // max(1, sum(map(len, folders.values()))), 2), _MOST)
    extra, missing = _found_by_check(target, checks)
    names = dict(zip(ilsvrc2012.WNIDS, ilsvrc2012.class_names(), strict=True))
    classes: dict[int, ClassContents] = {}
    for split, listed in folders.items():
        for folder in listed:
            entry = classes.setdefault(
                folder.index, ClassContents(index=folder.index, wnid=folder.wnid, names=names.get(folder.wnid, ""))
            )
            more, fewer = extra.get(folder.path, []), missing.get(folder.path, set())
            entry.images[split] = folder.images + (len(more) - len(fewer) if folder.listed else 0)
            shown = more[:count]
            for name in _evenly(folder, count - len(shown)):
                mark = "missing" if name in fewer else ""
                shown.append(Picture(path=f"{folder.path}/{name}", name=name, mark=mark))
            entry.pictures[split] = shown
    return [classes[index] for index in sorted(classes)]


_PICTURES = 4000
_MOST = 24


def _folders(target: Path, split: LabelledSplit) -> Iterator[_Folder]:
    if not (target / manifest_name(split)).exists():
        yield from _scanned(target / split)
        return
    try:
        found = samples(target, split)
    except (TargetError, CheckError):  # the check says what is wrong
        yield from _scanned(target / split)
        return
    for files in found.by_class():
        yield _Folder(
            index=files.class_index,
            wnid=files.wnid,
            path=f"{found.root}/{files.folder}",
            images=len(files),
            names=files,
            listed=True,
        )


def _scanned(root: Path) -> Iterator[_Folder]:
    """Yield the class folders of a tree without a manifest, in whichever layout fits best."""
    try:
        present = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    except OSError:
        return
    refs = max(
        (class_refs(ilsvrc2012.WNIDS, layout) for layout in LAYOUTS),
        key=lambda refs: sum(ref.folder in present for ref in refs),
    )
    for ref in refs:
        if ref.folder in present:
            names = sorted(os.listdir(root / ref.folder))
            path = str(root / ref.folder)
            yield _Folder(index=ref.index, wnid=ref.wnid, path=path, images=len(names), names=names, listed=False)


def _evenly(folder: _Folder, count: int) -> Iterator[str]:
    """Yield up to `count` names, evenly spread over the class."""
    wanted = {number * folder.images // count for number in range(count)} if count < folder.images else None
    for position, name in enumerate(folder.names):
        if wanted is None or position in wanted:
            yield name


def _found_by_check(target: Path, checks: Iterable[SplitCheck]) -> tuple[dict[str, list[Picture]], dict[str, set[str]]]:
    """Return the images that are not in the manifest, and the names of those that are missing, by folder."""
    extra: dict[str, list[Picture]] = {}
    missing: dict[str, set[str]] = {}
    for problem in (problem for check in checks for problem in check.problems):
        if problem.path is None or problem.path.count("/") != 2:
            continue
        path = str(target.absolute() / problem.path)
        folder, _, name = path.rpartition("/")
        if problem.kind == "extra":
            extra.setdefault(folder, []).append(Picture(path=path, name=name, mark="not in the manifest"))
        elif problem.kind == "missing":
            missing.setdefault(folder, set()).add(name)
    return extra, missing


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRun:
    """How the last run went over time.

    Attributes:
        began_s: when it began, seconds since the epoch.
        elapsed_s: how long it took.
        workers: number of worker processes.
        points: seconds since it began, images and bytes so far, and what was waited for, or "".
    """

    began_s: int
    elapsed_s: float
    workers: int
    points: list[tuple[float, int, int, str]]


def last_run(target: Path) -> LastRun | None:
    """Return the log of the last run that extracted anything, or None if there is none that can be read."""
    try:
        value = json.loads(timeline_file(target).read_bytes())
        points = [(float(at), int(images), int(size), str(reason)) for at, images, size, reason in value["points"]]
        return LastRun(
            began_s=int(value["began"]),
            elapsed_s=float(value["elapsed_s"]),
            workers=int(value["workers"]),
            points=points,
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def problem_text(problem: Problem) -> str:
    """Say in a few words what a check found."""
    values = (("expected", problem.expected), ("found", problem.found))
    amounts = ", ".join(f"{word} {value}" for word, value in values if value is not None)
    return f"{problem.kind}" + (f" ({amounts})" if amounts else "")
