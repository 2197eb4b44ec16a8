"""Check whatever a path names: a tree or an image.

The command starts here and not in the Python interface, which imports what plans and extracts too: that takes a third
of the time in which a million files are listed.
"""

from __future__ import annotations

from pathlib import Path

from imagenet_unpack.checking import checker
from imagenet_unpack.checking.findings import Depth
from imagenet_unpack.errors import UsageError
from imagenet_unpack.host import resources
from imagenet_unpack.model import SplitCheck
from imagenet_unpack.reporter import Reporter


def check_path(
    path: Path, *, deep: bool, contents: bool, workers: int | None, reporter: Reporter
) -> tuple[SplitCheck, ...]:
    """Return what is found in each split.

    Args:
        path: the folder that holds `train/` and `val/`, or an image.
        deep: read every byte and compare the digests; else names and counts only.
        contents: see whether every image begins and ends as an image does; not of an image file.
        workers: number of worker processes; None: the CPUs that this job may use.
        reporter: shows the progress.

    Raises:
        TargetError: there is nothing to check.
        UsageError: the contents of an image file were asked for.
    """
    count = resources.worker_count(workers)
    if path.is_file():
        from imagenet_unpack.checking.image import check_image  # noqa: PLC0415 - not for a tree

        if contents:
            raise UsageError(f"{path}: --contents reads folders: mount the image and give the mount point")
        return check_image(path, deep=deep, workers=count, reporter=reporter)
    depth: Depth = "digests" if deep else "names"
    found = checker.check_target(path, depth=depth, workers=count, reporter=reporter)
    if contents:
        from imagenet_unpack.checking.contents import check_contents  # noqa: PLC0415 - seldom asked for

        found = check_contents(path, found, workers=count, reporter=reporter)
    return found
