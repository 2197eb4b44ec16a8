"""Check a tree without a manifest: there is nothing but the published facts to compare it with."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from imagenet_unpack.checking.findings import Advance, Depth, Found, gather, split_check
from imagenet_unpack.checking.folders import differing_names, digest_of, foreign, list_files, shown, unreadable
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.model import LAYOUTS, ClassRef, Problem, SplitCheck, SplitName, class_refs

_INLINE_FOLDERS = 20


def published_count(split: SplitName, folder: str, index: int, count: int) -> Iterator[Problem]:
    """Compare the number of images of a class with the published one."""
    expected = published_images(split, index)
    if count != expected:
        yield Problem(class_name=folder, kind="count", expected=expected, found=count)


def published_images(split: SplitName, index: int) -> int:
    """Return how many images a class has in the published data set."""
    return ilsvrc2012.train_images(index) if split == "train" else ilsvrc2012.VAL_IMAGES_PER_CLASS


def check_against_facts(root: Path, split: SplitName, depth: Depth, workers: int, advance: Advance) -> SplitCheck:
    """Check a tree without a manifest: the official data set must be there, in any of the layouts."""
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries}
    refs = max((class_refs(ilsvrc2012.WNIDS, layout) for layout in LAYOUTS), key=lambda refs: _known(refs, names))
    spans = [(index, index + 1) for index in range(len(refs))]
    look = functools.partial(_check_classes, str(root), split, depth, refs)
    found = Found(images={}, problems=[])
    gather(look, spans, workers if len(names) > _INLINE_FOLDERS else 1, advance, found)
    found.problems.extend(foreign(root, split, {ref.folder for ref in refs}))
    if not any(found.images.values()) and any(problem.class_name == "" for problem in found.problems):
        # Images lie directly in the split's folder: a thousand missing classes would only hide it.
        found.problems[:] = [problem for problem in found.problems if problem.kind != "missing"]
    return split_check(split, found, "published facts")


def holds_test_images(root: Path) -> bool:
    """Say whether a folder is one of the test images, and not a folder of that name with something else in it."""
    try:
        with os.scandir(root) as entries:
            return any(entry.name.startswith("ILSVRC2012_test_") for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_test_against_facts(root: Path, depth: Depth, advance: Advance) -> SplitCheck:
    """Check the test images of a tree without a manifest by their names, which are published."""
    sizes, others = list_files(str(root), want_sizes=True)
    names = {ilsvrc2012.test_name(number).encode() for number in range(1, ilsvrc2012.TEST_IMAGES + 1)}
    found = Found(images={"": len(sizes)}, problems=list(differing_names("", "test", names, sizes.keys(), others)))
    _check_readable(str(root), "", "test", sizes, depth, found)
    advance(len(sizes), found.size_bytes)
    return split_check("test", found, "published facts")


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
) -> Found:
    """Compare class folders with the published counts; names with the published ones where they are known."""
    result = Found(images={}, problems=[])
    for ref in refs[slice(*span)]:
        path, expected = f"{split}/{ref.folder}", published_images(split, ref.index)
        result.images[ref.folder] = 0
        try:
            sizes, others = list_files(f"{root}/{ref.folder}", want_sizes=True)
        except FileNotFoundError:
            result.problems.append(
                Problem(class_name=ref.folder, kind="missing", path=path, expected=expected, found=0)
            )
            continue
        except OSError as error:
            result.problems.append(unreadable(ref.folder, path, error))
            continue
        result.images[ref.folder] = len(sizes)
        if len(sizes) != expected:
            result.problems.append(Problem(class_name=ref.folder, kind="count", expected=expected, found=len(sizes)))
        if split == "val":
            names = _val_names()[ref.index]
        else:  # which numbers a train class has is not published
            name = re.compile(rb"%s_\d+\.JPEG" % ref.wnid.encode())
            names = {each for each in sizes if name.fullmatch(each)}
        result.problems.extend(differing_names(ref.folder, path, names, sizes.keys(), others))
        _check_readable(root, ref.folder, path, sizes, depth, result)
    return result


def _check_readable(root: str, folder: str, path: str, sizes: dict[bytes, int], depth: Depth, result: Found) -> None:
    """Find empty files, and with digests those that cannot be read."""
    for name, size in sizes.items():
        where = f"{path}/{shown(name)}"
        if size == 0:
            result.problems.append(Problem(class_name=folder, kind="size", path=where, found=0))
        elif depth == "digests":
            try:
                digest_of(os.fsencode(f"{root}/{folder}/") + name)
            except OSError as error:
                result.problems.append(unreadable(folder, where, error))
