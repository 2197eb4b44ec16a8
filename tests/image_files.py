"""Images for the tests, straight from the table writer: data first, then tables, filled up to whole device blocks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from imagenet_unpack.sources import squashfs as reading
from imagenet_unpack.targets import squashfs as writing

MTIME_S = 1_340_000_000
Folders = Mapping[bytes, Mapping[bytes, bytes]]


def write_image(
    path: Path, folders: Folders, links: Mapping[bytes, bytes] | None = None, block_size: int = writing.BLOCK_SIZE
) -> bytes:
    """Write `train/<folder>/<name>`, and links in the root; return the content of the image."""
    data = bytearray(4096)
    out = io.BytesIO()
    spans = {}
    for folder, files in folders.items():
        for name, body in files.items():
            spans[folder, name] = len(data)
            data += body
    tables = writing.TableWriter(io.BytesIO(), io.BytesIO(), block_size=block_size)
    tables.open_folder(b"train")
    for folder, files in sorted(folders.items()):
        tables.open_folder(folder)
        tables.add_files((name, spans[folder, name], len(body), MTIME_S) for name, body in sorted(files.items()))
        tables.close_folder()
    tables.close_folder()
    for name, target in (links or {}).items():
        tables.add_link(name, target, MTIME_S)
    superblock, end = tables.finish(out, len(data))
    data[: len(superblock)] = superblock
    data += out.getvalue()
    assert len(data) == end
    data += bytes(-len(data) % reading.DEVICE_BLOCK_BYTES)
    path.write_bytes(data)
    return bytes(data)


def read_tree(path: Path) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Return the files' bytes and the links' targets by path, read by the independent reader."""
    files: dict[bytes, bytes] = {}
    links: dict[bytes, bytes] = {}
    with reading.Image(path) as image:
        for folder in image.walk():
            for file in folder.files:
                assert file.mtime_s == MTIME_S
                files[b"/".join((*folder.path, file.name))] = b"".join(image.read(file))
            links |= {b"/".join((*folder.path, name)): target for name, target in folder.links}
    return files, links


def paths(folders: Folders) -> dict[bytes, bytes]:
    return {b"train/%s/%s" % (folder, name): body for folder, files in folders.items() for name, body in files.items()}
