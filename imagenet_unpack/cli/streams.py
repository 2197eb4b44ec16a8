"""Standard output and standard error: results to one, lines for people to the other; either may be closed or full."""

from __future__ import annotations

import contextlib
import io
import sys

from imagenet_unpack.errors import ExitCode, UnpackError
from imagenet_unpack.text import mute_if_broken, printable


class OutputError(UnpackError):
    """Standard output cannot be written: the result that was asked for has not arrived.

    Attributes:
        exit_code: what the command ends with: its own code, unless that says that all is well.
    """

    exit_code = ExitCode.STOPPED

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.exit_code = ExitCode(code or ExitCode.STOPPED)

    def __str__(self) -> str:
        """Return the message."""
        return f"cannot write to standard output: {self.args[0]}"


def escape_unencodable() -> None:
    """Let both streams escape what their encoding lacks: a path may hold any byte, a terminal may know ASCII alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # closed, or its buffer cannot be flushed
                stream.reconfigure(errors="backslashreplace")


def emit(text: str, *, code: int = ExitCode.OK, end: str = "\n") -> None:
    """Write a result to standard output.

    Args:
        text: what to write.
        code: what the command ends with, as far as it knows.
        end: written behind it.

    Raises:
        OutputError: it cannot be written.
    """
    if sys.stdout is None:  # Python found descriptor 1 closed when it started
        raise OutputError("it is closed", code)
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is closed"
        raise OutputError(reason, code) from error


def say(text: str) -> None:
    """Write a line for people to standard error, if it can be written; control characters in it are escaped."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{printable(text)}\n")
            sys.stderr.flush()


def finish() -> None:
    """Keep Python from failing as it flushes a broken stream at its end, which would change the exit code to 120."""
    mute_if_broken(sys.stdout)
    mute_if_broken(sys.stderr)
