"""Check whether a tree is whole: its files against the manifest, or against the published facts if there is none.

It shares no code with what writes the trees. Of a published split most is compared the quick way (`quick`); only where
that finds a difference are rows parsed and differences named.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG

from imagenet_unpack.checking import facts, quick
from imagenet_unpack.checking.findings import Advance, Depth, Found, gather, ignore, split_check
from imagenet_unpack.checking.folders import differing_names, digest_of, foreign, list_files, unreadable
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import CheckError, TargetError
from imagenet_unpack.model import LAYOUTS, SPLITS, Problem, SplitCheck, SplitName
from imagenet_unpack.reporter import NullReporter, Reporter
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import SplitRecord
from imagenet_unpack.targets.split import Split
from imagenet_unpack.targets.states import State

# Of a manifest, so that many workers are kept busy and progress is seen: about 3,000 rows, of which 400 MB are read
# where digests are compared, or 300 rows.
_RANGE_BYTES: dict[Depth, int] = {"names": 256 << 10, "sizes": 256 << 10, "digests": 32 << 10}
_INLINE_BYTES: dict[Depth, int] = {"names": 4 << 20, "sizes": 4 << 20, "digests": 16 << 10}


def check_target(
    target: Path, *, depth: Depth, workers: int, reporter: Reporter | None = None
) -> tuple[SplitCheck, ...]:
    """Check every split that is below `target`, or should be.

    Args:
        target: folder that holds `train/` and `val/`; made by this program or not.
        depth: compare names, names and sizes, or every byte.
        workers: processes to share the work.
        reporter: shows the progress: a phase for each split.

    Raises:
        TargetError: there is nothing to check.
    """
    reporter = reporter or NullReporter()

    def advance(images: int, nbytes: int, /) -> None:
        reporter.advance(nbytes=nbytes, images=images, shards=0)

    def begin(split: SplitName, images: int, size_bytes: int | None) -> None:
        reporter.phase(f"checking {split}", size_bytes if depth == "digests" else None, images)

    if not target.is_dir():
        raise TargetError(f"{target}: {'is not a folder' if target.exists() else 'no such folder'}")
    checks = []
    for split in SPLITS:
        folder = SplitPaths(target, split)
        found = Split(folder, Disk())
        state, record = found.look(), found.record
        if state in (State.PUBLISHING, State.STAGED):
            unfinished = Problem(
                class_name="", kind="missing", path=split, expected="a whole split", found="a part of it"
            )
            checks.append(SplitCheck(split=split, classes=0, images=0, problems=(unfinished,), basis="unfinished"))
        elif record is not None:
            begin(split, record.images, record.size_bytes)
            checks.append(check_published(folder, record, depth=depth, workers=workers, advance=advance))
        elif (path := manifest.find(target, split)).exists():
            begin(split, manifest.count_rows(path) if path.is_file() else 0, None)
            checks.append(
                check_split(
                    folder.published,
                    split,
                    manifest_path=path,
                    depth=depth,
                    workers=workers,
                    beside=() if path == folder.manifest else (path.name, *(f"by-{layout}" for layout in LAYOUTS)),
                    advance=advance,
                )
            )
        elif split == "test":
            if facts.holds_test_images(folder.published):
                begin(split, ilsvrc2012.TEST_IMAGES, None)
                checks.append(facts.check_test_against_facts(folder.published, depth, advance))
        elif folder.published.is_dir():
            begin(split, sum(facts.published_images(split, index) for index in range(len(ilsvrc2012.WNIDS))), None)
            checks.append(facts.check_against_facts(folder.published, split, depth, workers, advance))
        elif os.path.lexists(folder.published):
            other = Problem(class_name="", kind="unreadable", path=split, expected="a folder", found="something else")
            checks.append(SplitCheck(split=split, classes=0, images=0, problems=(other,), basis="published facts"))
    if not checks:
        folder_name = f"{target.parent}" if target.absolute().name in SPLITS else "the folder that contains them"
        raise TargetError(f"{target}: has neither train/ nor val/: give {folder_name}")
    return tuple(checks)


def check_published(
    folder: SplitPaths,
    record: SplitRecord,
    *,
    depth: Depth,
    workers: int,
    advance: Advance = ignore,
) -> SplitCheck:
    """Check a published split against its manifest, and the manifest against the record of the split."""
    found = check_split(
        folder.published,
        folder.split,
        manifest_path=folder.manifest,
        depth=depth,
        workers=workers,
        official=record.official,
        classes=[ref.folder for ref in record.classes],
        recorded=record.manifest_xxh3,
        advance=advance,
    )
    return replace(found, consumed=record.consumed)


def check_split(
    root: Path,
    split: SplitName,
    *,
    manifest_path: Path,
    depth: Depth,
    workers: int,
    official: bool = False,
    classes: Iterable[str] = (),
    beside: Iterable[str] = (),
    recorded: str = "",
    advance: Advance = ignore,
) -> SplitCheck:
    """Compare the class folders below `root` with a manifest; a damaged manifest is a problem like any other.

    Args:
        root: folder of the split, published or staged.
        split: which one; the manifest's paths begin with it.
        manifest_path: the manifest.
        depth: how closely to look.
        workers: processes to share the work.
        official: the classes must also have the published number of images.
        classes: folders that must be there whatever the manifest says.
        beside: what may be in the split's folder beside the class folders.
        recorded: digest of the manifest as it was written; while it has that, its rows need not be parsed to compare
            names.
        advance: called with progress.
    """
    found = Found(images={}, problems=[])
    look = functools.partial(_check_range, str(root), split, manifest_path, depth, official)
    digest: str | None = None
    try:
        if not S_ISREG(manifest_path.stat().st_mode):
            raise CheckError(f"{manifest_path}: not a regular file")
        spans = manifest.class_ranges(manifest_path, max(1, manifest_path.stat().st_size // _RANGE_BYTES[depth]))
        if recorded and depth == "names":
            with quick.listing(root, manifest_path, spans, _share(spans, depth, workers)) as agreeing:
                digest = manifest.file_digest(manifest_path)
                if digest == recorded:  # else each row has to be looked at
                    for span, listed in agreeing:
                        found.add(_agreed(split, listed, official=official), advance)
                        spans.remove(span)
        gather(look, spans, _share(spans, depth, workers), advance, found)
    except FileNotFoundError:
        found = Found(images={}, problems=[Problem(class_name="", kind="missing", path=manifest_path.name)])
    except CheckError as error:
        text = str(error).removeprefix(f"{manifest_path}: ")
        found = Found(
            images={}, problems=[Problem(class_name="", kind="unreadable", path=manifest_path.name, found=text)]
        )
    else:
        listed_folders = set(found.images)
        found.problems.extend(
            Problem(class_name=name, kind="missing", path=f"{split}/{name}", expected="a class folder", found=None)
            for name in sorted(set(classes) - listed_folders)
        )
        if "" not in listed_folders:  # of the test split all that is in its folder has been looked at
            found.problems.extend(foreign(root, split, {*listed_folders, *classes, *beside}))
    if recorded and digest is None and manifest_path.is_file():
        digest = manifest.file_digest(manifest_path)
    if digest not in (None, recorded):
        found.problems.append(
            Problem(class_name="", kind="digest", path=manifest_path.name, expected=recorded, found=digest)
        )
    return split_check(split, found)


def _share(spans: list[quick.Span], depth: Depth, workers: int) -> int:
    """Return how many workers so much of a manifest is worth."""
    return workers if sum(end - start for start, end in spans) > _INLINE_BYTES[depth] else 1


def _agreed(split: SplitName, classes: Iterable[tuple[bytes, int, int]], *, official: bool) -> Found:
    """Return what there is to say of classes whose names agree with the manifest."""
    result = Found(images={}, problems=[])
    for name, index, images in classes:
        folder = name.decode()
        result.images[folder] = images
        if official:
            result.problems.extend(facts.published_count(split, folder, index, images))
    return result


def _check_range(
    root: str,
    split: SplitName,
    manifest_path: Path,
    depth: Depth,
    official: bool,
    span: tuple[int, int],
) -> Found:
    """Compare the class folders that a byte range of the manifest lists."""
    result = Found(images={}, problems=[])
    for folder, rows in manifest.read_groups(manifest_path, *span):
        files = manifest.read_files(manifest_path, rows)
        path = f"{split}/{folder}".rstrip("/")
        try:
            sizes, others = list_files(f"{root}/{folder}", want_sizes=depth != "names")
        except FileNotFoundError:
            result.images[folder] = 0
            result.problems.append(Problem(class_name=folder, kind="missing", path=path, expected=len(files), found=0))
            continue
        except OSError as error:
            result.images[folder] = 0
            result.problems.append(unreadable(folder, path, error))
            continue
        result.images[folder] = len(sizes)
        if others or sizes.keys() != files.keys():
            result.problems.extend(differing_names(folder, path, files.keys(), sizes.keys(), others))
        if depth != "names":
            result.problems.extend(_differing_contents(root, folder, path, files, sizes, depth))
        if depth == "digests":
            result.size_bytes += sum(sizes.values())
        if official:
            result.problems.extend(facts.published_count(split, folder, int(next(iter(files.values()))[0]), len(files)))
    return result


def _differing_contents(
    root: str,
    folder: str,
    path: str,
    files: dict[bytes, tuple[bytes, bytes, bytes, bytes]],
    sizes: dict[bytes, int],
    depth: Depth,
) -> Iterator[Problem]:
    for name, (_, _, size, digest) in files.items():
        if name not in sizes:
            continue
        shown = f"{path}/{os.fsdecode(name)}"
        if sizes[name] != int(size):
            yield Problem(class_name=folder, kind="size", path=shown, expected=int(size), found=sizes[name])
        elif depth == "digests":
            try:
                found = digest_of(os.fsencode(f"{root}/{folder}/") + name)
            except OSError as error:
                yield unreadable(folder, shown, error)
                continue
            if digest != b"-" and found != digest.decode():  # -: of an image whose bytes were not read
                yield Problem(class_name=folder, kind="digest", path=shown, expected=digest.decode(), found=found)
