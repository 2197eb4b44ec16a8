"""What training code reads: paths and class indices of a split, from its manifest instead of a scan of the folders.

Class indices are the published ones in every layout and for every subset of the classes. Neither torch nor any other
framework is imported.
"""

from __future__ import annotations

import functools
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import CheckError, TargetError, UsageError
from imagenet_unpack.model import SplitName
from imagenet_unpack.targets import manifest

if TYPE_CHECKING:
    from PIL.Image import Image

Sample = tuple[str, int]
"""Absolute path of an image, and its class index: for ImageNet-1K from 0 to 999."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFiles:
    """The images of one class: their names in one string of bytes, as a million of them would take ten times as much.

    Attributes:
        class_index: the published one.
        wnid: of the class, such as `n01440764`.
        folder: name of the class folder; differs from the wnid in all layouts but one.
        names: the file names, sorted, one behind the other, in UTF-8.
        ends: where each of them ends, in bytes.
    """

    class_index: int
    wnid: str
    folder: str
    names: bytes
    ends: array[int]

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise((0, *self.ends)):
            yield self.names[start:end].decode()

    def name(self, position: int) -> str:
        """Return the name of the image at a position."""
        start = self.ends[position - 1] if position else 0
        return self.names[start : self.ends[position]].decode()


class Samples(Sequence[Sample]):
    """The images of a split as `(path, class index)`, by class index and then by name.

    Paths are absolute, and are put together when they are asked for: the whole train split takes about 31 MB, which
    worker processes that are forked share and those that are spawned copy once.

    Attributes:
        root: the folder that holds the class folders.
        split: which split it is.
        wnids: the wnid of each class index. All 1000 of ImageNet-1K, also of a subset, so that a class index is always
            a place in this list.
        classes: the same as a list, by the name and type that `torchvision.datasets.ImageFolder` has them on a tree
            with `--layout wnid`.
    """

    def __init__(self, root: str, split: SplitName, files: Sequence[ClassFiles]) -> None:
        self.root = root
        self.split: SplitName = split
        self._files = sorted(files, key=lambda each: each.class_index)
        self._ends = list(accumulate(len(each) for each in self._files))
        self.wnids = _wnids(self._files)
        self.classes = list(self.wnids)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        place = bisect_right(self._ends, number)
        files = self._files[place]
        name = files.name(number - (self._ends[place - 1] if place else 0))
        return f"{self.root}/{files.folder}/{name}", files.class_index

    def __iter__(self) -> Iterator[Sample]:
        for files in self._files:
            for name in files:
                yield f"{self.root}/{files.folder}/{name}", files.class_index

    def __repr__(self) -> str:
        return f"<{len(self):,} images of {len(self._files):,} classes in {self.root}>"

    def by_class(self) -> Sequence[ClassFiles]:
        """Return the classes that have images, by class index."""
        return tuple(self._files)

    def targets(self) -> list[int]:
        """Return the class index of each image."""
        return list(chain.from_iterable(repeat(each.class_index, len(each)) for each in self._files))


def samples(target: str | os.PathLike[str], split: SplitName) -> Samples:
    """Return the images of a split with their class indices.

    Nothing but the manifest is read, so that this takes a second or two for 1.28 million images on any storage.

    Args:
        target: the folder that holds `train/`, `val/` and the manifests, unpacked or mounted from an image.
        split: `train` or `val`.

    Raises:
        TargetError: the split or its manifest is not there.
        CheckError: the manifest is damaged.
        UsageError: there is no such split.
    """
    if split not in ("train", "val"):
        raise UsageError(f"split {split!r}: use train or val (the test images have no labels)")
    folder = Path(target).absolute()
    path = manifest.find(folder, split)
    try:
        spans = manifest.class_ranges(path, 1)
        files = [_class_files(path, *group) for span in spans for group in manifest.read_groups(path, *span)]
    except OSError as error:
        raise TargetError(
            f"{path}: cannot be read: {error.strerror}: give the folder that unpack wrote, or an image's mount point"
        ) from error
    return Samples(str(_root(folder, split, files)), split, files)


def _root(target: Path, split: SplitName, files: Sequence[ClassFiles]) -> Path:
    """Return the folder that holds the class folders: that of the split; of an image made in place, the root."""
    root = target / split
    if root.is_dir():
        return root
    if files and (target / files[0].folder).is_dir():
        return target
    name = manifest.manifest_name(split)
    raise TargetError(f"{root}: no such folder, although {name} lists its images: unpack the split again")


def _class_files(path: Path, folder: str, rows: list[bytes]) -> ClassFiles:
    first = manifest.parse_row(rows[0])
    start = len(first.path.encode()) - len(first.path.rpartition("/")[2].encode())
    same = f"\t{first.class_index}\t{first.wnid}\t".encode()
    try:
        names = [row[start : row.index(same)] for row in rows]
    except ValueError:
        raise manifest.damage_of(path) from None
    ends = array("I", accumulate(map(len, names)))
    return ClassFiles(class_index=first.class_index, wnid=first.wnid, folder=folder, names=b"".join(names), ends=ends)


def _wnids(files: Sequence[ClassFiles]) -> tuple[str, ...]:
    """Return ImageNet-1K's wnids, or, of an archive of other classes, those that it has."""
    known = ilsvrc2012.WNIDS
    if all(each.class_index < len(known) and each.wnid == known[each.class_index] for each in files):
        return known
    wnids = {each.class_index: each.wnid for each in files}
    if sorted(wnids) != list(range(len(files))):
        raise CheckError("the manifest has class indices that are neither ImageNet-1K's nor consecutive")
    return tuple(wnids[index] for index in range(len(files)))


class ImageNet:
    """A map-style data set for `torch.utils.data.DataLoader`, with worker processes or without.

    Items are pairs of an image (`PIL.Image.Image`, RGB, or what `transform` makes of it) and its class index. Images
    are converted to RGB, as the data set holds CMYK and grey ones.

    Args:
        target: the folder that holds `train/`, `val/` and the manifests, unpacked or mounted from an image.
        split: `train` or `val`.
        transform: is called with each image.

    Attributes:
        samples: the images as `(path, class index)`, see `Samples`.
        wnids: the wnid of each class index.
        classes: the same as a list.
        class_to_idx: wnid to class index. Names of classes are no keys, as two classes are called crane.
        targets: the class index of each image, in the order of `samples`.

    Raises:
        TargetError: the split or its manifest is not there.
        CheckError: the manifest is damaged.
        UsageError: there is no such split.
        ImportError: Pillow is not installed.
        OSError: from an item: the image cannot be read or decoded.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        split: SplitName = "train",
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        import PIL.Image  # noqa: F401, PLC0415 - missing it is better said now than in a worker process

        self.samples = samples(target, split)
        self.transform = transform
        self.wnids = self.samples.wnids
        self.classes = self.samples.classes
        self.class_to_idx = {wnid: index for index, wnid in enumerate(self.wnids)}

    @functools.cached_property
    def targets(self) -> list[int]:
        """The class index of each image."""
        return self.samples.targets()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, class_index = self.samples[index]
        image = load_image(path)
        return (image if self.transform is None else self.transform(image)), class_index

    def __repr__(self) -> str:
        return f"ImageNet({self.samples!r}, transform={self.transform!r})"


def load_image(path: str) -> Image:
    """Decode an image as RGB.

    Raises:
        OSError: it cannot be read, or is not an image; the path is in the message.
    """
    from PIL import Image  # noqa: PLC0415 - Pillow is needed by those alone who decode

    with open(path, "rb") as file:
        try:
            return Image.open(file).convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError for a broken file
            raise OSError(f"{path}: cannot be decoded: {error}") from error
