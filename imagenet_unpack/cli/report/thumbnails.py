"""Small pictures of images, as data URIs for a page."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Iterator

from PIL import Image

from imagenet_unpack.host import pool

SIZE = 56  # pixels
_QUALITY = 55
_BATCH = 40


def thumbnails(paths: Iterable[str], workers: int) -> Iterator[dict[str, str]]:
    """Yield data URIs by path, in batches as they are ready; "" for what cannot be decoded."""
    listed = list(paths)
    batches = [tuple(listed[start : start + _BATCH]) for start in range(0, len(listed), _BATCH)]
    if workers == 1 or len(batches) < 2:
        yield from map(_batch, batches)
    else:
        yield from pool.map_unordered(_batch, batches, workers, __name__)


def _batch(paths: tuple[str, ...]) -> dict[str, str]:
    return {path: thumbnail(path) for path in paths}


def thumbnail(path: str) -> str:
    """Return the middle square of an image as a data URI, or "" if it cannot be decoded."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.draft("RGB", (2 * SIZE, 2 * SIZE))  # a JPEG is decoded at a fraction of its size
            small = _middle(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return _data_uri(small.tobytes(), small.size)


def _middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)


@functools.lru_cache(maxsize=4096)
def _data_uri(pixels: bytes, size: tuple[int, int]) -> str:
    out = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(out, "WEBP", quality=_QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
