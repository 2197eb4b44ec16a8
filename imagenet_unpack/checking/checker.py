"""Check whether a tree is whole: its files against the manifest, or against the published facts if there is none.

It shares no code with what writes the trees.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import xxhash

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import CheckError, TargetError, reason
from imagenet_unpack.host import pool
from imagenet_unpack.model import LAYOUTS, SPLITS, ClassRef, Problem, SplitCheck, SplitName, class_refs
from imagenet_unpack.reporter import NullReporter, Reporter
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import SplitRecord
from imagenet_unpack.targets.split import Split, State

Depth = Literal["names", "sizes", "digests"]


class Advance(Protocol):
    """Called with the images, and the bytes read of them, checked since the last call; may raise to end the check."""

    def __call__(self, images: int, nbytes: int, /) -> None:
        """Count them."""


# Of a manifest, so that many workers are kept busy and progress is seen: about 3,000 rows, of which 400 MB are read
# where digests are compared, or 300 rows.
_RANGE_BYTES: dict[Depth, int] = {"names": 256 << 10, "sizes": 256 << 10, "digests": 32 << 10}
_INLINE_BYTES: dict[Depth, int] = {"names": 4 << 20, "sizes": 4 << 20, "digests": 16 << 10}
_INLINE_FOLDERS = 20
_READ_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class _Found:
    """What one task found: images in each class folder it looked at, bytes it read of them, and what is wrong."""

    images: dict[str, int]
    problems: list[Problem]
    size_bytes: int = 0


def _ignore(_images: int, _nbytes: int, /) -> None:
    """Show no progress."""


def check_target(
    target: Path, *, depth: Depth, workers: int, reporter: Reporter | None = None
) -> tuple[SplitCheck, ...]:
    """Check every split that stands below `target`, or should.

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
            begin(split, manifest.count_rows(path), None)
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
            if _holds_test_images(folder.published):
                begin(split, ilsvrc2012.TEST_IMAGES, None)
                checks.append(_check_test_against_facts(folder.published, depth, advance))
        elif folder.published.is_dir():
            begin(split, sum(_published_images(split, index) for index in range(len(ilsvrc2012.WNIDS))), None)
            checks.append(_check_against_facts(folder.published, split, depth, workers, advance))
    if not checks:
        raise TargetError(f"{target}: has neither train/ nor val/: give the folder that contains them")
    return tuple(checks)


def check_published(
    folder: SplitPaths,
    record: SplitRecord,
    *,
    depth: Depth,
    workers: int,
    advance: Advance = _ignore,
) -> SplitCheck:
    """Check a published split against its manifest, and the manifest against the record of the split."""
    changed = _changed_manifest(folder, record.manifest_xxh3)
    found = check_split(
        folder.published,
        folder.split,
        manifest_path=folder.manifest,
        depth=depth,
        workers=workers,
        official=record.official,
        classes=[ref.folder for ref in record.classes],
        trusted=not changed,
        advance=advance,
    )
    return replace(found, problems=(*changed, *found.problems), consumed=record.consumed)


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
    trusted: bool = False,
    advance: Advance = _ignore,
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
        trusted: the manifest is known to be as it was written, so that its rows need not be parsed to compare names.
        advance: called with progress.
    """
    try:
        size = manifest_path.stat().st_size
        ranges = manifest.class_ranges(manifest_path, max(1, size // _RANGE_BYTES[depth]))
        look = functools.partial(_check_range, str(root), split, manifest_path, depth, official)
        if trusted and depth == "names":
            look = functools.partial(_check_names, str(root), split, manifest_path, official)
        found = _gather(look, ranges, 1 if size < _INLINE_BYTES[depth] else workers, advance)
    except FileNotFoundError:
        found = _Found(images={}, problems=[Problem(class_name="", kind="missing", path=manifest_path.name)])
    except CheckError as error:
        text = str(error)
        found = _Found(
            images={}, problems=[Problem(class_name="", kind="unreadable", path=manifest_path.name, found=text)]
        )
    else:
        listed = set(found.images)
        found.problems.extend(
            Problem(class_name=name, kind="missing", path=f"{split}/{name}", expected="a class folder", found=None)
            for name in sorted(set(classes) - listed)
        )
        if "" not in listed:  # of the test split all that is in its folder has been looked at
            found.problems.extend(_foreign(root, split, {*listed, *classes, *beside}))
    return _split_check(split, found)


def _split_check(
    split: SplitName, found: _Found, basis: Literal["manifest", "published facts"] = "manifest"
) -> SplitCheck:
    problems = sorted(found.problems, key=lambda problem: (problem.class_name, problem.path or "", problem.kind))
    classes = sum(count > 0 for folder, count in found.images.items() if folder)
    images = sum(found.images.values())
    return SplitCheck(split=split, classes=classes, images=images, problems=tuple(problems), basis=basis)


def _changed_manifest(folder: SplitPaths, recorded: str) -> tuple[Problem, ...]:
    """Compare the manifest with what the record of the published split says of it."""
    try:
        found = manifest.file_digest(folder.manifest)
    except OSError:
        return ()  # missing or unreadable: the comparison with the tree says so
    if found == recorded:
        return ()
    return (Problem(class_name="", kind="digest", path=folder.manifest.name, expected=recorded, found=found),)


def _gather(
    look: Callable[[tuple[int, int]], _Found], tasks: list[tuple[int, int]], workers: int, advance: Advance
) -> _Found:
    """Run the tasks, here or in a pool, and put together what they found."""
    total = _Found(images={}, problems=[])
    here = workers == 1 or len(tasks) <= 1
    results = map(look, tasks) if here else pool.map_unordered(look, tasks, workers, __name__)
    for found in results:
        total.images.update(found.images)
        total.problems.extend(found.problems)
        advance(sum(found.images.values()), found.size_bytes)
    return total


def _check_range(
    root: str,
    split: SplitName,
    manifest_path: Path,
    depth: Depth,
    official: bool,
    span: tuple[int, int],
) -> _Found:
    """Compare the class folders that a byte range of the manifest lists."""
    result = _Found(images={}, problems=[])
    for folder, rows in manifest.read_groups(manifest_path, *span):
        files = manifest.read_files(manifest_path, rows)
        path = f"{split}/{folder}".rstrip("/")
        try:
            sizes, others = _list(f"{root}/{folder}", want_sizes=depth != "names")
        except FileNotFoundError:
            result.images[folder] = 0
            result.problems.append(Problem(class_name=folder, kind="missing", path=path, expected=len(files), found=0))
            continue
        except OSError as error:
            result.images[folder] = 0
            result.problems.append(_unreadable(folder, path, error))
            continue
        result.images[folder] = len(sizes)
        if others or sizes.keys() != files.keys():
            result.problems.extend(_differing_names(folder, path, files.keys(), sizes.keys(), others))
        if depth != "names":
            result.problems.extend(_differing_contents(root, folder, path, files, sizes, depth))
        if depth == "digests":
            result.size_bytes += sum(sizes.values())
        if official:
            result.problems.extend(_published_count(split, folder, int(next(iter(files.values()))[0]), len(files)))
    return result


def _check_names(root: str, split: SplitName, manifest_path: Path, official: bool, span: tuple[int, int]) -> _Found:
    """Do what `_check_range` does for names, with a manifest that is known to be as it was written."""
    result = _Found(images={}, problems=[])
    for folder, index, names in manifest.name_groups(manifest_path, *span):
        if not _holds_exactly(f"{root}/{folder}", names):
            return _check_range(root, split, manifest_path, "names", official, span)
        result.images[folder] = len(names)
        if official:
            result.problems.extend(_published_count(split, folder, index, len(names)))
    return result


def _published_count(split: SplitName, folder: str, index: int, count: int) -> Iterator[Problem]:
    expected = _published_images(split, index)
    if count != expected:
        yield Problem(class_name=folder, kind="count", expected=expected, found=count)


def _holds_exactly(folder: str, names: list[bytes]) -> bool:
    """Say whether a folder holds regular files of these names and nothing else, as fast as it can be listed."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.close(fd)
        with os.scandir(os.fsencode(folder)) as entries:
            found = [entry.name if entry.is_file(follow_symlinks=False) else b"" for entry in entries]
    except OSError:
        return False
    return len(found) == len(names) and set(names).issuperset(found)


def _list(folder: str, *, want_sizes: bool) -> tuple[dict[bytes, int], dict[bytes, str]]:
    """Return the size of each regular file by name (0 where sizes are not wanted), and what else there is."""
    sizes: dict[bytes, int] = {}
    others: dict[bytes, str] = {}
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.close(fd)  # a link to a folder is not a folder of this tree
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size if want_sizes else 0
            else:
                others[entry.name] = _kind_of(entry)
    return sizes, others


def _kind_of(entry: os.DirEntry[bytes]) -> str:
    return "a symbolic link" if entry.is_symlink() else "a folder" if entry.is_dir() else "not a regular file"


def _differing_names(
    folder: str, path: str, expected: Iterable[bytes], found: Iterable[bytes], others: dict[bytes, str]
) -> Iterator[Problem]:
    expected, found = set(expected), set(found)
    for name in expected - found:
        yield Problem(class_name=folder, kind="missing", path=f"{path}/{os.fsdecode(name)}", found=others.get(name))
    for name in found - expected:
        yield Problem(class_name=folder, kind="extra", path=f"{path}/{_shown(name)}")
    for name in others.keys() - expected:
        yield Problem(class_name=folder, kind="extra", path=f"{path}/{_shown(name)}", found=others[name])


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
                found = _digest(os.fsencode(f"{root}/{folder}/") + name)
            except OSError as error:
                yield _unreadable(folder, shown, error)
                continue
            if digest != b"-" and found != digest.decode():  # -: of an image whose bytes were not read
                yield Problem(class_name=folder, kind="digest", path=shown, expected=digest.decode(), found=found)


def _digest(path: bytes) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _unreadable(folder: str, path: str, error: OSError) -> Problem:
    return Problem(class_name=folder, kind="unreadable", path=path, found=reason(error))


def _foreign(root: Path, split: SplitName, known: set[str]) -> Iterator[Problem]:
    """Yield what is in the split's folder beside the class folders; images that lie there directly as one."""
    try:
        with os.scandir(os.fsencode(root)) as entries:
            names = sorted(_shown(entry.name) for entry in entries)
    except FileNotFoundError:
        yield Problem(class_name="", kind="missing", path=split)
        return
    except OSError as error:
        yield _unreadable("", split, error)
        return
    images = sum(name.upper().endswith((".JPEG", ".JPG")) for name in names)
    if images:
        yield Problem(
            class_name="", kind="extra", path=split, expected="class folders", found=f"{images:,} images directly in it"
        )
    for name in names:
        if name not in known and not name.upper().endswith((".JPEG", ".JPG")):
            yield Problem(class_name=name, kind="extra", path=f"{split}/{name}")


def _published_images(split: SplitName, index: int) -> int:
    return ilsvrc2012.train_images(index) if split == "train" else ilsvrc2012.VAL_IMAGES_PER_CLASS


def _check_against_facts(root: Path, split: SplitName, depth: Depth, workers: int, advance: Advance) -> SplitCheck:
    """Check a tree without a manifest: the official data set must be there, in any of the layouts."""
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries}
    refs = max((class_refs(ilsvrc2012.WNIDS, layout) for layout in LAYOUTS), key=lambda refs: _known(refs, names))
    spans = [(index, index + 1) for index in range(len(refs))]
    look = functools.partial(_check_classes, str(root), split, depth, refs)
    found = _gather(look, spans, workers if len(names) > _INLINE_FOLDERS else 1, advance)
    found.problems.extend(_foreign(root, split, {ref.folder for ref in refs}))
    if not any(found.images.values()) and any(problem.class_name == "" for problem in found.problems):
        # Images lie directly in the split's folder: a thousand missing classes would only hide it.
        found.problems[:] = [problem for problem in found.problems if problem.kind != "missing"]
    return _split_check(split, found, "published facts")


def _holds_test_images(root: Path) -> bool:
    """Say whether a folder is one of the test images, and not a folder of that name with something else in it."""
    try:
        with os.scandir(root) as entries:
            return any(entry.name.startswith("ILSVRC2012_test_") for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _check_test_against_facts(root: Path, depth: Depth, advance: Advance) -> SplitCheck:
    """Check the test images of a tree without a manifest by their names, which are published."""
    sizes, others = _list(str(root), want_sizes=True)
    names = {ilsvrc2012.test_name(number).encode() for number in range(1, ilsvrc2012.TEST_IMAGES + 1)}
    found = _Found(images={"": len(sizes)}, problems=list(_differing_names("", "test", names, sizes.keys(), others)))
    _check_readable(str(root), "", "test", sizes, depth, found)
    advance(len(sizes), found.size_bytes)
    return _split_check("test", found, "published facts")


def _known(refs: tuple[ClassRef, ...], names: set[str]) -> int:
    return sum(ref.folder in names for ref in refs)


@functools.cache
def _val_names() -> dict[int, set[bytes]]:
    names: dict[int, set[bytes]] = {}
    for number, index in enumerate(ilsvrc2012.val_class_indices(), 1):
        names.setdefault(index, set()).add(ilsvrc2012.val_name(number).encode())
    return names


def _check_classes(
    root: str, split: SplitName, depth: Depth, refs: tuple[ClassRef, ...], span: tuple[int, int]
) -> _Found:
    """Compare class folders with the published counts; names with the published ones where they are known."""
    result = _Found(images={}, problems=[])
    for ref in refs[slice(*span)]:
        path, expected = f"{split}/{ref.folder}", _published_images(split, ref.index)
        result.images[ref.folder] = 0
        try:
            sizes, others = _list(f"{root}/{ref.folder}", want_sizes=True)
        except FileNotFoundError:
            result.problems.append(
                Problem(class_name=ref.folder, kind="missing", path=path, expected=expected, found=0)
            )
            continue
        except OSError as error:
            result.problems.append(_unreadable(ref.folder, path, error))
            continue
        result.images[ref.folder] = len(sizes)
        if len(sizes) != expected:
            result.problems.append(Problem(class_name=ref.folder, kind="count", expected=expected, found=len(sizes)))
        if split == "val":
            names = _val_names()[ref.index]
        else:  # which numbers a train class has is not published
            name = re.compile(rb"%s_\d+\.JPEG" % ref.wnid.encode())
            names = {each for each in sizes if name.fullmatch(each)}
        result.problems.extend(_differing_names(ref.folder, path, names, sizes.keys(), others))
        _check_readable(root, ref.folder, path, sizes, depth, result)
    return result


def _check_readable(root: str, folder: str, path: str, sizes: dict[bytes, int], depth: Depth, result: _Found) -> None:
    """Find empty files, and with digests those that cannot be read."""
    for name, size in sizes.items():
        shown = f"{path}/{_shown(name)}"
        if size == 0:
            result.problems.append(Problem(class_name=folder, kind="size", path=shown, found=0))
        elif depth == "digests":
            try:
                _digest(os.fsencode(f"{root}/{folder}/") + name)
            except OSError as error:
                result.problems.append(_unreadable(folder, shown, error))


def by_class(problems: Iterable[Problem]) -> list[tuple[str, Counter[str]]]:
    """Return how many problems of each kind each class has, in the order of the class names."""
    table: dict[str, Counter[str]] = {}
    for problem in problems:
        table.setdefault(problem.class_name, Counter())[problem.kind] += 1
    return sorted(table.items())
