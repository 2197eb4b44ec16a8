"""Arithmetic on plans: the classes asked for, cutting into parts, space needed. Writes nothing."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.errors import UsageError, reason
from imagenet_unpack.model import Shard, SplitPlan
from imagenet_unpack.planning.common import largest_first
from imagenet_unpack.sources.tar import TarRun

_MANIFEST_BYTES = 200  # an image's row in its manifest fragment and in the manifest
_OWN_FILES = 16
_BLOCK_BYTES = 4096


def parse_classes(spec: str, wnids: tuple[str, ...]) -> tuple[int, ...]:
    """Parse `0-99,n01440764,517`, or `@file` with one such item a line, to sorted class indices.

    Raises:
        UsageError: an item is not one of these classes, or none is named.
    """
    if spec.startswith("@"):
        try:
            items = Path(spec[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {spec}: cannot be read: {reason(error)}") from error
    else:
        items = spec.split(",")
    by_wnid = {wnid: index for index, wnid in enumerate(wnids)}
    chosen: set[int] = set()
    for item in filter(None, (item.strip() for item in items)):
        span = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", item, re.ASCII)
        if item in by_wnid:
            chosen.add(by_wnid[item])
        elif span:
            first, last = int(span[1]), int(span[2] or span[1])
            if last >= len(wnids):
                raise UsageError(f"--classes {item}: there are only {len(wnids)} classes, from 0 to {len(wnids) - 1}")
            if first > last:
                raise UsageError(f"--classes: range {item} is backwards")
            chosen.update(range(first, last + 1))
        else:
            raise UsageError(f"--classes: {item!r} is not a class: give indices 0-{len(wnids) - 1}, ranges or wnids")
    if not chosen:
        raise UsageError("--classes is empty" if not spec.startswith("@") else f"--classes {spec}: the file is empty")
    return tuple(sorted(chosen))


def cut(shards: Iterable[Shard], count: int) -> list[list[Shard]]:
    """Deal shards, largest first, to `count` parts: each to the one that has the fewest bytes so far."""
    parts: list[list[Shard]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for shard in largest_first(list(shards)):
        load, index = heapq.heappop(loads)
        parts[index].append(shard)
        heapq.heappush(loads, (load + shard.size_bytes, index))
    return parts


def needs(plans: Iterable[SplitPlan], *, in_flight: int | None = None) -> dict[str, int]:
    """Return `content_bytes` and `files` (images, class folders, manifests and fragments) that plans will write.

    Args:
        plans: what is to be written.
        in_flight: given: the archives are freed shard by shard on the file system of the target, and at most so many
            shards are written and not yet freed.
    """
    plans = list(plans)
    content_bytes = sum(plan.content_bytes for plan in plans)
    if in_flight is not None:
        sizes = sorted((shard.size_bytes for plan in plans for shard in plan.shards), reverse=True)
        # Of each image in a flat tar, the blocks that it shares with headers stay.
        flat = (plan for plan in plans if any(isinstance(shard.payload, TarRun) for shard in plan.shards))
        kept = sum(plan.images * _BLOCK_BYTES for plan in flat)
        grown = max(0, content_bytes - sum(sizes))  # by decompression
        content_bytes = min(content_bytes, sum(sizes[:in_flight]) + kept + grown)
    return {
        "content_bytes": content_bytes + sum(plan.images * _MANIFEST_BYTES for plan in plans),
        "files": sum(plan.images + len(plan.classes) + len(plan.shards) + _OWN_FILES for plan in plans),
    }
