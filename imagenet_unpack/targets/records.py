"""The records of a target's state: frozen, typed, versioned JSON files.

Absent, damaged and newer are three different things: `load` returns None where there is no file, and raises where there
is one that is damaged or that a newer version wrote. Version 0.1.0 wrote the same names and keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import LAYOUTS, SPLITS, ClassRef, Layout, SplitName, SplitPlan
from imagenet_unpack.targets.durable import Disk, read_file

SCHEMA = 1
PROGRAM = "imagenet_unpack"
Durability = Literal["disk", "none"]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_T = TypeVar("_T")


def boot_id() -> str:
    """Return the id of this boot of the host (random(4)), or "" where it cannot be read."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


class DamagedError(ValueError):
    """A record lacks a key, or a value is not what it must be."""


class _Fields:
    """The members of a JSON object, each with its type."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise DamagedError("not a JSON object")
        self._members: dict[str, Any] = value
        schema = self.number("schema")
        if schema > SCHEMA:
            raise NewerError(schema)

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self._members.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DamagedError(f"no valid {key!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, str, default)

    def number(self, key: str, default: int | None = None) -> int:
        value = self._get(key, int, default)
        if value < 0 and key != "mtime_ns":
            raise DamagedError(f"no valid {key!r}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, bool, default)

    def choice(self, key: str, choices: tuple[_T, ...], default: _T | None = None) -> _T:
        value = self._members.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise DamagedError(f"no valid {key!r}")
        return value

    def has(self, key: str) -> bool:
        return key in self._members

    def each(self, key: str, make: Callable[[object], _T]) -> tuple[_T, ...]:
        return tuple(make(item) for item in self._get(key, list, None))


class NewerError(Exception):
    """A record has a schema that this version does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What must be the same for a run to be continued or a published split to be extended.

    Attributes:
        split: the split.
        layout: how class folders are named.
        size_bytes: size of the archive.
        mtime_ns: modification time of the archive, nanoseconds.
        headers: hex digest of the archive's headers.
        labels: hex digest of the assignment of images to classes.
    """

    split: SplitName
    layout: Layout
    size_bytes: int
    mtime_ns: int
    headers: str
    labels: str

    @classmethod
    def of(cls, plan: SplitPlan) -> Identity:
        """Return the identity of a plan."""
        archive = plan.archive
        return cls(
            split=plan.split,
            layout=plan.layout,
            size_bytes=archive.size_bytes,
            mtime_ns=archive.mtime_ns,
            headers=archive.headers,
            labels=plan.labels_digest,
        )

    @classmethod
    def from_fields(cls, fields: _Fields) -> Identity:
        """Read the members that `to_json` writes."""
        return cls(
            split=fields.choice("split", SPLITS),
            layout=fields.choice("layout", LAYOUTS),
            size_bytes=fields.number("size"),
            mtime_ns=fields.number("mtime_ns"),
            headers=fields.text("headers"),
            labels=fields.text("labels"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the members of the record that holds this."""
        return {
            "split": self.split,
            "layout": self.layout,
            "size": self.size_bytes,
            "mtime_ns": self.mtime_ns,
            "headers": self.headers,
            "labels": self.labels,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """`record.json`: the state folder is this program's."""

    remedy: ClassVar[str] = "if the folder holds no unfinished run that you need, move it away"

    @classmethod
    def from_json(cls, value: object) -> TargetRecord:
        """Read what `to_json` returned."""
        if _Fields(value).text("program") != PROGRAM:
            raise DamagedError(f"'program' is not {PROGRAM}")
        return cls()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"program": PROGRAM, "schema": SCHEMA}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """`plan.json`: what an unfinished run was planned from.

    Attributes:
        identity: of the plan.
        classes: the class indices that are staged.
        parts: into how many parts the plan was cut.
        shards: digest of the ids and ranges of all shards.
        repair: the staged files replace damaged ones of a published split.
        consume: the archive's bytes of journaled shards were freed: what is staged is all there is of them.
        durability: `none`: not synced, so believed in this boot of the host only.
        boot_id: the boot in which it was begun.
    """

    identity: Identity
    classes: tuple[int, ...]
    parts: int
    shards: str
    repair: bool = False
    consume: bool = False
    durability: Durability = "disk"
    boot_id: str = ""
    remedy: ClassVar[str] = "use --restart to discard the unfinished run"

    @classmethod
    def from_json(cls, value: object) -> PlanRecord:
        """Read what `to_json` returned."""
        fields = _Fields(value)
        return cls(
            identity=Identity.from_fields(fields),
            classes=fields.each("classes", _index),
            parts=fields.number("parts", 1),
            shards=fields.text("shards"),
            repair=fields.flag("repair", default=False),
            consume=fields.flag("consume", default=False),
            durability=_durability(fields),
            boot_id=fields.text("boot_id", ""),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        value = {"schema": SCHEMA, **self.identity.to_json(), "classes": list(self.classes), "parts": self.parts}
        value["shards"] = self.shards
        value |= {name: True for name in ("repair", "consume") if getattr(self, name)}
        return value | _durability_json(self.durability, self.boot_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """`<split>.json`, and `publish.json` while it is being published: a published split.

    Attributes:
        identity: of the plan that it was made from.
        official: whether the archive was the published one.
        classes: the classes that are there, by class index.
        images: number of images.
        size_bytes: sum of the image sizes.
        manifest_xxh3: hex digest of the manifest.
        consumed: the archive's bytes were freed: it cannot be unpacked again.
        archive_classes: indices of the classes that the archive holds, where only reading it through could tell: of a
            stream; else None, as its plan says it.
        durability: `none`: published without a sync, so believed in this boot of the host only.
        boot_id: the boot in which it was published.
    """

    identity: Identity
    official: bool
    classes: tuple[ClassRef, ...]
    images: int
    size_bytes: int
    manifest_xxh3: str
    consumed: bool = False
    archive_classes: tuple[int, ...] | None = None
    durability: Durability = "disk"
    boot_id: str = ""
    remedy: ClassVar[str] = (
        "restore it from a backup, or move the split's folder and manifest and this file away and unpack again"
    )

    @classmethod
    def from_json(cls, value: object) -> SplitRecord:
        """Read what `to_json` returned."""
        fields = _Fields(value)
        return cls(
            identity=Identity.from_fields(fields),
            official=fields.flag("official"),
            classes=fields.each("classes", _class_ref),
            images=fields.number("images"),
            size_bytes=fields.number("bytes"),
            manifest_xxh3=fields.text("manifest_xxh3"),
            consumed=fields.flag("consumed", default=False),
            archive_classes=fields.each("archive_classes", _index) if fields.has("archive_classes") else None,
            durability=_durability(fields),
            boot_id=fields.text("boot_id", ""),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        classes = [{"index": ref.index, "wnid": ref.wnid, "folder": ref.folder} for ref in self.classes]
        return {
            "schema": SCHEMA,
            **self.identity.to_json(),
            "official": self.official,
            "classes": classes,
            "images": self.images,
            "bytes": self.size_bytes,
            "manifest_xxh3": self.manifest_xxh3,
            **({"consumed": True} if self.consumed else {}),
            **({} if self.archive_classes is None else {"archive_classes": list(self.archive_classes)}),
        } | _durability_json(self.durability, self.boot_id)

    def lacks(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the class indices of a plan of the same archive that are not published, as far as it may hold them."""
        published = {ref.index for ref in self.classes}
        left = (ref.index for ref in plan.classes if ref.index not in published)
        return tuple(index for index in left if self.archive_classes is None or index in self.archive_classes)


class Record(Protocol):
    """Any of the records above."""

    remedy: ClassVar[str]

    @classmethod
    def from_json(cls, value: object) -> Any:
        """Read what `to_json` returned."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""


_R = TypeVar("_R", bound=Record)


def load(path: Path, kind: type[_R]) -> _R | None:
    """Read a record, or return None where there is none.

    Raises:
        TargetError: it is damaged, or a newer version's.
        OSError: it cannot be read, or is a symbolic link (ELOOP).
    """
    data = read_file(path)
    if data is None:
        return None
    try:
        record = kind.from_json(json.loads(data))
    except NewerError:
        raise TargetError(f"{path} was written by a newer version of this program: use that version") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 or a key
        why = str(error) if isinstance(error, DamagedError) else "not valid JSON"
        raise TargetError(f"{path} is damaged ({why}): {kind.remedy}") from None
    assert isinstance(record, kind)
    return record


def save(disk: Disk, path: Path, record: Record) -> None:
    """Write a record atomically and durably."""
    disk.write_file(path, json.dumps(record.to_json()).encode() + b"\n")


def _index(value: object) -> int:
    # -1: the test split has no classes.
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise DamagedError("no valid 'classes'")
    return value


def _class_ref(value: object) -> ClassRef:
    if not isinstance(value, Mapping):
        raise DamagedError("no valid 'classes'")
    wnid, folder = value.get("wnid"), value.get("folder")
    if not isinstance(wnid, str) or not isinstance(folder, str) or "/" in folder or folder in (".", ".."):
        raise DamagedError("no valid 'classes'")
    return ClassRef(index=_index(value.get("index")), wnid=wnid, folder=folder)


def _durability(fields: _Fields) -> Durability:
    choices: tuple[Durability, ...] = ("disk", "none")
    return fields.choice("durability", choices, "disk")


def _durability_json(durability: Durability, boot: str) -> dict[str, str]:
    return {} if durability == "disk" else {"durability": durability, "boot_id": boot}
