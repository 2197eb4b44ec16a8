"""Amounts as text for people, and a text stream that tolerates write errors."""

from __future__ import annotations

import io
import math
import os
from contextlib import suppress

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from typing import TextIO

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def human_bytes(size_bytes: float) -> str:
    """Return `6.0 GB` for 6,000,000,000 bytes: decimal units, as the published archive sizes are usually quoted."""
    value = float(size_bytes)
    for unit in _BYTE_UNITS[:-1]:
        # Against 999.95, not 1000: the rounding must not make "1000.0 kB".
        if abs(value) < (1000 if unit == "B" else 999.95):
            break
        value /= 1000
    else:
        unit = _BYTE_UNITS[-1]
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return `1 image`, `2,000 images` or `0 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def printable(text: str) -> str:
    """Return a name with control characters escaped: in a file name they could rewrite the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def human_time(seconds: float) -> str:
    """Return `8.1 s`, `2 min 05 s`, `3 h 20 min` or `2 d 4 h`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < _MINUTE_S - 0.05:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S:02d} s"
    minutes = round(seconds / _MINUTE_S)
    if minutes * _MINUTE_S < _DAY_S:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / _HOUR_S)
    return f"{hours // 24} d {hours % 24} h"


def is_terminal(stream: TextIO) -> bool:
    """Say whether `stream` is a terminal; one that is closed is none."""
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False


def mute_if_broken(stream: TextIO | None) -> None:
    """Flush `stream`; if it cannot be written to, lead its descriptor to the null device.

    To be called for stdout and stderr just before the program ends: Python keeps what it could not write, tries once
    more at its end, and turns the exit code into 120 when that fails (sys.exit in the Python documentation). The way
    out is the one of https://docs.python.org/3/library/signal.html#note-on-sigpipe.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except ValueError:  # it is closed: nothing is left to be flushed
        return
    except OSError:
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(null, stream.fileno())
            finally:
                os.close(null)


class TolerantStream(io.TextIOBase):
    """A text stream that drops what it cannot write: the reader has gone, the disk is full, the stream is closed."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in typeshed
        """Name the encoding: tqdm chooses the characters of its bar by it."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        """Write what can be written; characters that the encoding lacks are escaped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            with suppress(OSError, ValueError):
                self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        except (OSError, ValueError):
            pass
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def fileno(self) -> int:
        """Return the descriptor, by which the width of a terminal is asked for."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Say whether it is a terminal."""
        return is_terminal(self._stream)
