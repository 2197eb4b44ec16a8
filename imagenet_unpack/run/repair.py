"""`unpack --repair`: which files of a published split are damaged, where they come from, and whether they came back.

Only files that the manifest names are replaced, and only by files with the size and digest that it lists. What is there
beside them is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.errors import CheckError, TargetError
from imagenet_unpack.extract.extractor import open_reader
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.model import Problem, Shard, SplitPlan
from imagenet_unpack.sources.tar import TarRun
from imagenet_unpack.targets import manifest
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What a check found wrong with a published split.

    Attributes:
        rows: manifest row of each damaged file, by its path below the split's folder.
        extra: what is there and not in the manifest.
    """

    rows: dict[str, bytes]
    extra: tuple[Problem, ...]

    @property
    def classes(self) -> tuple[int, ...]:
        """Indices of the classes that the damaged files are of."""
        return tuple(sorted({manifest.parse_row(row).class_index for row in self.rows.values()}))


def find_damage(paths: SplitPaths, problems: Iterable[Problem]) -> Damage:
    """Sort out what can be repaired.

    Raises:
        TargetError: the manifest is damaged, or something that is not a file is in the way.
    """
    damaged: set[str] = set()
    extra = []
    for problem in problems:
        if problem.path == paths.manifest.name:
            raise TargetError(
                f"{paths.manifest} is missing or damaged, so nothing says what to repair: move {paths.published} away "
                "and unpack again"
            )
        if problem.kind == "extra":
            extra.append(problem)
        elif problem.path is not None:
            damaged.add(problem.path)
    # A class folder stands for all of its files; the split's folder for everything.
    rows = {}
    for row in manifest.rows(paths.manifest):
        path = row.partition(b"\t")[0].decode()
        if path in damaged or path.rpartition("/")[0] in damaged or paths.split in damaged:
            rows[path.partition("/")[2]] = row
    for name in rows:
        file = paths.published / name
        if file.parent.is_symlink() or (file.parent.exists() and not file.parent.is_dir()):
            raise TargetError(f"{file.parent} must be a folder: move it away")
        if file.is_dir() and not file.is_symlink():
            raise TargetError(f"{file} is a folder where a file has to be: move it away")
    return Damage(rows=rows, extra=tuple(extra))


def narrow(plan: SplitPlan, names: Collection[str]) -> SplitPlan:
    """Return the part of a plan that holds files of these names, as closely as its format can be cut."""
    shards = tuple(filter(None, (_narrow_shard(shard, names) for shard in plan.shards)))
    return plan.subset(shards) if len(shards) < len(plan.shards) else replace(plan, shards=shards)


def _narrow_shard(shard: Shard, names: Collection[str]) -> Shard | None:
    prefixes = [f"{ref.folder}/" if ref.folder else "" for ref in shard.classes]
    if isinstance(shard.payload, TarRun) and shard.payload.labels is not None:
        labels = {name: at for name, at in shard.payload.labels.items() if prefixes[at] + name in names}
        return replace(shard, payload=replace(shard.payload, labels=labels)) if labels else None
    with open_reader(shard, Unpaced()) as reader:
        held = reader.names()
        if held is None:  # all of its class
            return shard if any(name.startswith(prefixes[0]) for name in names) else None
        return shard if any(prefixes[at] + name in names for at, name in held) else None


def require_restored(paths: SplitPaths, damage: Damage, fragments: Iterable[Path]) -> None:
    """Make sure that the staged files are the ones that the manifest lists.

    Raises:
        CheckError: one is missing or differs: the archive is not the one that the split was made from.
    """
    staged = {line for fragment in fragments for line in fragment.read_bytes().splitlines(keepends=True)}
    for name, row in damage.rows.items():
        path = paths.tree / name
        if row not in staged or not path.is_file() or path.stat().st_size != manifest.parse_row(row).size_bytes:
            raise CheckError(
                f"the archive does not hold {paths.split}/{name} as {paths.manifest} lists it: nothing was replaced"
            )


def require_nothing_else(paths: SplitPaths, damage: Damage) -> None:
    """Say what a repair leaves alone.

    Raises:
        CheckError: files are there that the manifest does not name.
    """
    if damage.extra:
        first = damage.extra[0]
        raise CheckError(
            f"{paths.published} holds {counted(len(damage.extra), 'file')} that this program did not write, such as "
            f"{first.path}: move them away"
        )
