"""Archives and trees for the tests, from plain values; all of them are made by `tarfile` or byte by byte."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import load_val_labels
from imagenet_unpack.model import Layout, SplitPlan, class_refs
from imagenet_unpack.planning.flat import plan_val
from imagenet_unpack.planning.train import plan_train

WNIDS = ilsvrc2012.WNIDS
BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes,
    size: bytes = b"00000000003\0",
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    link: bytes = b"",
) -> bytes:
    """A header block with whatever fields, and a checksum that is right."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, body: bytes = b"abc", kind: bytes = b"0", link: bytes = b"") -> bytes:
    size = b"%011o\0" % len(body)
    return header(name, size=size, kind=kind, link=link) + body + bytes(-len(body) % BLOCK)


def tar(members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(body), 1_340_000_000
            archive.addfile(info, io.BytesIO(body))
    return out.getvalue()


def train_tar(classes: dict[str, bytes]) -> bytes:
    """An outer tar of inner tars, given as bytes by wnid."""
    return tar((f"{wnid}.tar", inner) for wnid, inner in classes.items())


def images(wnid: str, bodies: Sequence[bytes]) -> list[tuple[str, bytes]]:
    return [(f"{wnid}_{number}.JPEG", body) for number, body in enumerate(bodies)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def train_plan(path: Path, layout: Layout = "index", asked: tuple[int, ...] | None = None) -> SplitPlan:
    return plan_train(path, class_refs(WNIDS, layout), asked, layout)


def val_plan(
    path: Path, layout: Layout = "index", asked: tuple[int, ...] | None = None, run_bytes: int = 64 << 20
) -> SplitPlan:
    labels = load_val_labels(None, WNIDS)
    return plan_val(path, class_refs(WNIDS, layout), asked, layout, labels, run_bytes=run_bytes)


def val_name(number: int) -> str:
    return ilsvrc2012.val_name(number)


def val_index(number: int) -> int:
    return ilsvrc2012.val_class_indices()[number - 1]


def published_class(name: str) -> int:
    """The class of an image by its file name, from the published tables."""
    if name.startswith("ILSVRC2012_val_"):
        return val_index(int(name[15:23]))
    return WNIDS.index(name[:9])
