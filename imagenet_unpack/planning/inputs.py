"""Find the sources that a user names or that the base folder contains, and a planner for each split.

The command line and the Python interface both come through here; nothing is written and nothing printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012, labels
from imagenet_unpack.dataset.class_index import load_class_index
from imagenet_unpack.dataset.labels import ValLabels
from imagenet_unpack.errors import ArchiveError, MissingArchiveError, UsageError
from imagenet_unpack.model import SPLITS, ClassRef, Layout, SplitName, SplitPlan, StreamSource, VerifyLevel, class_refs
from imagenet_unpack.planning.flat import plan_test, plan_val
from imagenet_unpack.planning.imagefile import plan_image
from imagenet_unpack.planning.kagglezip import KaggleZip
from imagenet_unpack.planning.parquetfiles import plan_parquet
from imagenet_unpack.planning.planner import parse_classes
from imagenet_unpack.planning.streams import is_pipe, open_stream, plan_streams, what_it_is
from imagenet_unpack.planning.train import plan_tar_folder, plan_train
from imagenet_unpack.sources import discover
from imagenet_unpack.sources.recognise import Source

Planner = Callable[[tuple[int, ...] | None], SplitPlan]
"""Plans a split for the class indices given, or for all that the source holds."""

_DEFAULT_SPLITS: tuple[SplitName, ...] = ("train", "val")
_NAMES: dict[SplitName, str] = {
    "train": ilsvrc2012.TRAIN_ARCHIVE_NAME,
    "val": ilsvrc2012.VAL_ARCHIVE_NAME,
    "test": ilsvrc2012.TEST_ARCHIVE_NAME,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for; each field as the command-line option of its name.

    Attributes:
        archives: `--train-archive` and the like, by split.
        sources: `--source`.
        splits: None: train and val, as far as they are there.
        verify: what to demand of archives of the published size.
        published: splits that are in the target already: they can do without their archives.
    """

    base_dir: Path = Path()
    archives: dict[SplitName, Path]
    sources: tuple[Path, ...] = ()
    class_index: Path | None = None
    val_labels: Path | None = None
    splits: tuple[SplitName, ...] | None = None
    classes: str | None = None
    any_wnids: bool = False
    layout: Layout = "index"
    verify: VerifyLevel = "size"
    published: tuple[SplitName, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How to plan what was asked for.

    Attributes:
        planners: by split. That of a split that was named, or is published, and whose archive is missing raises
            `MissingArchiveError`.
        streams: the sources that can only be read front to back.
        classes: the class indices asked for, or None for all.
        left_out: splits that were not named and are not there, and why.
        pipes: the pipes that were opened; plans read from copies of their descriptors.
    """

    planners: dict[SplitName, Planner]
    streams: tuple[Source, ...]
    classes: tuple[int, ...] | None
    left_out: dict[SplitName, str]
    pipes: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the pipes, so that who writes into one that was not read to its end does not wait for ever."""
        for fd in self.pipes:
            os.close(fd)


def find_inputs(request: Request, check: Callable[[], None] = lambda: None) -> Inputs:
    """Find archives and label files, recognise them, and return how to plan each split.

    Args:
        request: what is asked for.
        check: is called now and then while a zip, a parquet file or a pipe is read, and may raise to end that.

    Raises:
        MissingArchiveError: there is no archive at all.
        ArchiveError: one is something else, or two hold one split.
        LabelError: a label file is missing or damaged.
        UsageError: options contradict each other, or a class is unknown.
    """
    splits = request.splits or (("train",) if request.any_wnids else None)
    if request.any_wnids:
        if splits != ("train",) or request.layout != "wnid":
            raise UsageError("--any-wnids needs --splits train --layout wnid: other classes have no labels here")
        if request.classes is not None:
            raise UsageError("--any-wnids takes every class of the archive: leave out --classes")
    zips: dict[Path, KaggleZip] = {}
    pipes: dict[Path, StreamSource] = {}
    by_split = _sources(request, splits, zips, pipes, check)
    missing = {split: _reason(request, split) for split in splits or _DEFAULT_SPLITS if split not in by_split}
    kept = [split for split in missing if request.splits is not None or split in request.published]
    if not by_split and not kept:
        raise MissingArchiveError(
            f"no ImageNet archives in {request.base_dir.absolute()}: expected {_NAMES['train']} or {_NAMES['val']}; "
            f"give --base-dir, --source, --train-archive or --val-archive{_near(request)}"
        )
    wnids = load_class_index(_given(request.class_index, request.base_dir / "ImageNet_class_index.json"))
    refs = None if request.any_wnids else class_refs(wnids, request.layout)
    planners: dict[SplitName, Planner] = {}
    for split in SPLITS:
        if split in kept:
            planners[split] = _missing_planner(missing[split])
        elif split in by_split:
            planners[split] = _planner(request, split, by_split[split], refs, wnids, zips, pipes, check)
    left_out = {split: why for split, why in missing.items() if split not in kept}
    if left_out and by_split:
        first = next(split for split in planners if split in by_split)
        planners[first] = _with_notes(
            planners[first], [f"{split} is left out: {left_out[split]}" for split in left_out]
        )
    return Inputs(
        planners=planners,
        streams=tuple(source for source in by_split.values() if source.kind == "stream"),
        classes=parse_classes(request.classes, wnids) if request.classes is not None else None,
        left_out=left_out,
        pipes=tuple(pipe.pipe_fd for pipe in pipes.values() if pipe.pipe_fd),  # 0, standard input, stays open
    )


def _sources(
    request: Request,
    splits: tuple[SplitName, ...] | None,
    zips: dict[Path, KaggleZip],
    pipes: dict[Path, StreamSource],
    check: Callable[[], None],
) -> dict[SplitName, Source]:
    """Return the source of each split that is wanted and there; zips and pipes are opened to see which they hold."""
    wanted = splits or _DEFAULT_SPLITS
    named = []
    for split, path in request.archives.items():
        if splits is None or split in splits:
            with suppress(*(MissingArchiveError,) if split in request.published else ()):
                named.append(discover.find_split(path, split))
    if request.sources:
        given = [source for path in request.sources for source in _find(path, request, splits or SPLITS, pipes, check)]
        _require_given_once(given)
        found = discover.join(given)
    else:
        open_splits = [split for split in wanted if split not in request.archives]
        if request.published and not request.base_dir.is_dir():
            open_splits = []
        found = discover.discover(request.base_dir, open_splits, any_wnids=request.any_wnids)
        found = tuple(
            replace(source, splits=tuple(split for split in source.splits if split in open_splits)) for source in found
        )
    by_split: dict[SplitName, Source] = {}
    everything = [_with_zip_splits(source, zips, check) for source in (*named, *found)]
    if splits is None and not any(split in source.splits for source in everything for split in wanted):
        wanted = SPLITS  # a source that holds test alone was named for its sake
    for source in everything:
        for split in source.splits:
            if split not in wanted:
                continue
            if split in by_split:
                raise ArchiveError(
                    f"two sources for {split}: {by_split[split].name} and {source.name}: name the one to take with "
                    f"--{split}-archive, or move the other away"
                )
            by_split[split] = source
    return by_split


def _require_given_once(sources: Sequence[Source]) -> None:
    seen: set[str] = set()
    for path in (path for source in sources for path in source.paths):
        real = os.path.realpath(path)
        if real in seen:
            raise UsageError(f"--source {path}: given twice")
        seen.add(real)


def _find(
    path: Path,
    request: Request,
    splits: tuple[SplitName, ...],
    pipes: dict[Path, StreamSource],
    check: Callable[[], None],
) -> tuple[Source, ...]:
    """Recognise what a user names, with `-` for standard input."""
    if not is_pipe(path):
        return discover.find(path, splits, any_wnids=request.any_wnids)
    if path in pipes:
        raise UsageError(f"--source {path}: given twice, but a pipe can be read only once")
    pipes[path] = opened = open_stream(path, check)
    return (Source(kind="stream", paths=(path,), splits=opened.splits, what=what_it_is(opened)),)


def _planner(
    request: Request,
    split: SplitName,
    source: Source,
    refs: tuple[ClassRef, ...] | None,
    wnids: tuple[str, ...],
    zips: dict[Path, KaggleZip],
    pipes: dict[Path, StreamSource],
    check: Callable[[], None],
) -> Planner:
    path, layout, verify = source.paths[0], request.layout, request.verify

    def plan(wanted: tuple[int, ...] | None) -> SplitPlan:
        if source.kind == "inner-tars":
            return plan_train(path, refs, wanted, layout, verify)
        if source.kind == "tar-folder":
            return plan_tar_folder(path, refs, wanted, layout, verify)
        if source.kind == "stream":
            return plan_streams(
                split,
                [pipes[each] if each in pipes else open_stream(each) for each in source.paths],
                refs,
                wanted,
                layout,
                val_labels,
                labels_given=labels_given,
                required=request.splits is not None,
            )
        if source.kind == "image":
            return plan_image(path, split, refs, wanted, layout)
        assert refs is not None
        if source.kind == "parquet":
            given = val_labels if labels_given else None
            return plan_parquet(source.paths, split, refs, wanted, layout, labels=given, check=check)
        if source.kind == "zip":
            return zips[path].plan(split, refs, wanted, layout, val_labels)
        if source.kind == "images" and split == "val":
            assert val_labels is not None
            return plan_val(path, refs, wanted, layout, val_labels, verify)
        return plan_test(path, verify)

    if request.any_wnids and source.kind not in ("inner-tars", "tar-folder", "image", "stream"):
        raise UsageError(f"--any-wnids needs a tar or a folder of <wnid>.tar, but {source.name} is a {source.what}")
    val_labels = _val_labels(request, source, wnids, zips) if split == "val" else None
    labels_given = _given(request.val_labels, request.base_dir / "ImageNet_val_label.txt") is not None
    return lambda wanted: replace(plan(wanted), source=source.what)


def _val_labels(request: Request, source: Source, wnids: tuple[str, ...], zips: dict[Path, KaggleZip]) -> ValLabels:
    """Return the labels that the user gave, those that come with Kaggle's archives, or the built-in ones."""
    given = _given(request.val_labels, request.base_dir / "ImageNet_val_label.txt")
    path = source.paths[0]
    solution = zips[path].solution if path in zips else None
    if given is None and solution is not None:
        return labels.parse_val_labels(solution, f"{path} (LOC_val_solution.csv)", wnids)
    if given is None and source.kind == "stream" and not is_pipe(path):
        beside = path.parent / "LOC_val_solution.csv"
        given = beside if beside.is_file() else None
    return labels.load_val_labels(given, wnids)


def _with_zip_splits(source: Source, zips: dict[Path, KaggleZip], check: Callable[[], None]) -> Source:
    if source.kind != "zip":
        return source
    path = source.paths[0]
    opened = zips[path] = KaggleZip(path, ilsvrc2012.WNIDS, check=check)
    if opened.holds_targz:
        what = "tar.gz of Kaggle's shape in a zip"
        return replace(source, kind="stream", compression="gzip", what=what)
    held = tuple(split for split in source.splits if split in opened.splits)
    return replace(source, splits=held, what="zip of Kaggle's shape")


def _missing_planner(reason: str) -> Planner:
    def plan(_: tuple[int, ...] | None) -> SplitPlan:
        raise MissingArchiveError(reason)

    return plan


def _with_notes(planner: Planner, notes: list[str]) -> Planner:
    def plan(wanted: tuple[int, ...] | None) -> SplitPlan:
        made = planner(wanted)
        return replace(made, notes=(*notes, *made.notes))

    return plan


def _reason(request: Request, split: SplitName) -> str:
    if request.sources:
        return f"none of the sources given holds the {split} split"
    near = discover.near_misses(request.base_dir, split)
    return f"{request.base_dir / _NAMES[split]}: no such file" + (f": {near}" if near else "")


def _near(request: Request) -> str:
    found = [near for split in _DEFAULT_SPLITS if (near := discover.near_misses(request.base_dir, split))]
    return f" ({'; '.join(found)})" if found else ""


def _given(explicit: Path | None, default: Path) -> Path | None:
    """A file named by an option must be there; one of the usual name counts when it is."""
    return explicit or (default if default.exists() else None)
