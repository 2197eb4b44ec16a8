"""Compressed files and pipes as pieces of decompressed bytes, read once and front to back.

str is recognised by its magic number, never by a file name: gzip (RFC 1952), zstd (RFC 8878), xz (The .xz File
Format 1.2.1, section 2.1.1.1) and bzip2. gzip, xz and bzip2 need the standard library alone; gzip takes ISA-L instead
where the `isal` package is installed; zstd needs Python 3.14 or the `zstandard` package.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import queue
import select
import stat
import threading
import zlib
from collections.abc import Callable
from typing import Any

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources import magic
from imagenet_unpack.sources.reader import SourceError

_READ_BYTES = 1 << 20
_ZSTD_WINDOW_LOG = 31  # of what `zstd --long=31` makes; a library's default is less
_POLL_S = 0.2
_AHEAD = 8
_STEP_BYTES = 128 << 10
_JOIN_S = 2.0
BeforeRead = Callable[[int], None]
"""Called with the number of bytes about to be read, 0 while a pipe has none; may wait, may raise to stop reading."""


class StreamReadError(SourceError):
    """Reading the compressed file or the pipe failed: an I/O error, not damaged contents."""


class StreamCutError(ArchiveError):
    """The stream ends before its archive does."""


class RawStream(io.RawIOBase):
    """A file or a pipe, read front to back.

    Attributes:
        taken_bytes: how much of it has been read so far.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        head: bytes = b"",
        before_read: BeforeRead = lambda _: None,
        piece_bytes: int = _READ_BYTES,
    ) -> None:
        """Read `head`, which has been read from the descriptor before, and then the descriptor; close it at the end."""
        super().__init__()
        self._piece_bytes = min(piece_bytes, _READ_BYTES)
        self._fd = fd
        self._name = name
        self._head = memoryview(head)
        self._before_read = before_read
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.taken_bytes = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer.

        Raises:
            StreamReadError: the file or the pipe cannot be read.
        """
        view = memoryview(buffer).cast("B")
        if len(self._head):
            size = min(len(view), len(self._head))
            view[:size] = self._head[:size]
            self._head = self._head[size:]
        else:
            view = view[: self._piece_bytes]
            self._before_read(len(view))
            try:
                self._wait()
                size = os.readv(self._fd, [view])
                if self._regular:
                    os.posix_fadvise(self._fd, self.taken_bytes, size, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise StreamReadError(
                    f"{self._name}: cannot be read at byte {self.taken_bytes:,}: {os.strerror(error.errno or 0)}"
                ) from error
        self.taken_bytes += size
        return size

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._fd)
        super().close()

    def _wait(self) -> None:
        """Wait for a pipe to have bytes, in short steps: its writer may take as long as it likes."""
        while not self._regular and not select.select([self._fd], [], [], _POLL_S)[0]:
            self._before_read(0)


def open_decompressed(raw: io.RawIOBase, kind: str, name: str) -> Any:
    """Return a file of the decompressed bytes, with `read` and `readinto`; what is not compressed stays as it is.

    Raises:
        ArchiveError: this interpreter cannot read the format.
    """
    buffered: Any = io.BufferedReader(raw, _READ_BYTES)
    if kind == "gzip":
        return _open_gzip(buffered)
    if kind == "xz":
        return lzma.LZMAFile(buffered, format=lzma.FORMAT_XZ)  # else stream padding is taken for the older format
    if kind == "bzip2":
        return bz2.BZ2File(buffered)
    if kind == "zstd":
        return _open_zstd(buffered, name)
    return buffered


def _open_gzip(buffered: Any) -> Any:
    try:
        from isal import igzip  # noqa: PLC0415 - an extra
    except ImportError:
        return gzip.GzipFile(fileobj=buffered)
    return igzip.open(buffered, "rb")  # type: ignore[no-untyped-call]


def _open_zstd(buffered: Any, name: str) -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - Python 3.14
    except ImportError:
        pass
    else:
        return zstd.ZstdFile(buffered, options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
    try:
        import zstandard  # noqa: PLC0415 - an extra
    except ImportError:
        raise ArchiveError(
            f"{name}: is compressed with zstd, which this Python cannot read: install imagenet_unpack[zstd], or "
            "decompress it first with `zstd -d`"
        ) from None
    made = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
    return made.stream_reader(buffered, read_across_frames=True)


def peek(path: os.PathLike[str] | str, size: int) -> tuple[str, bytes]:
    """Return how a regular file is compressed, and the first `size` bytes of what it holds.

    Fewer bytes are returned where it holds fewer, or is damaged before: that is for its reader to say.

    Raises:
        OSError: it cannot be opened.
        ArchiveError: it cannot be read, or this interpreter cannot decompress it.
    """
    raw = RawStream(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), os.fspath(path))
    with raw:
        magic = raw.read(_READ_BYTES) or b""
        return peek_head(magic, size, os.fspath(path))


def peek_head(head: bytes, size: int, name: str) -> tuple[str, bytes]:
    """Return how a stream that begins with `head` is compressed, and up to `size` of its first decompressed bytes."""
    kind = magic.compression(head)
    if not kind:
        return kind, head[:size]
    found = b""
    file = open_decompressed(_Bytes(head), kind, name)
    try:
        # In small pieces: what lies before a damage, or before the end of the head, is still returned.
        while len(found) < size and (piece := file.read(min(512, size - len(found)))):
            found += piece
    except _FORMAT_ERRORS:
        pass
    return kind, found


class _Bytes(io.RawIOBase):
    """Bytes as a raw file."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._view = memoryview(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._view))
        view[:size] = self._view[:size]
        self._view = self._view[size:]
        return size


def _format_errors() -> tuple[type[BaseException], ...]:
    """Return what the libraries raise for damaged contents; `StreamReadError` is none of them, as it is no OSError."""
    found: list[Any] = [EOFError, OSError, ValueError, zlib.error, lzma.LZMAError]
    try:
        from isal import isal_zlib  # noqa: PLC0415 - an extra

        found.append(isal_zlib.IsalError)
    except ImportError:
        pass
    try:
        import zstandard  # noqa: PLC0415 - an extra

        found.append(zstandard.ZstdError)
    except ImportError:
        pass
    return tuple(found)


_FORMAT_ERRORS = _format_errors()


class Decompressed:
    """The decompressed bytes of a stream, read into the caller's buffers.

    Args:
        raw: the file or pipe.
        kind: how it is compressed.
        name: how messages call it.

    Raises:
        ArchiveError: this interpreter cannot read the format.
    """

    def __init__(self, raw: io.RawIOBase, kind: str, name: str) -> None:
        self._file = open_decompressed(raw, kind, name)
        # The standard library's files (and isal's) inherit a `readinto1` that reads bytes and copies them while it
        # holds the interpreter lock; the buffered reader within them decompresses into the buffer that it is given.
        self._readinto1 = getattr(self._file, "_buffer", self._file).readinto1
        self._kind = kind
        self._name = name
        self._done = 0
        self._fault: BaseException | None = None

    def readinto(self, view: memoryview) -> int:
        """Read some bytes, at most `len(view)`; 0 at the end.

        Raises:
            StreamCutError: the compressed data ends too early.
            StreamReadError: the file or the pipe cannot be read.
            ArchiveError: the compressed data is damaged.
        """
        if self._fault is not None:
            raise self._fault
        size = 0
        try:
            # In small steps: a library that meets a fault loses what it has decompressed in the same call.
            while size < len(view) and (got := self._readinto1(view[size : size + _STEP_BYTES])):
                size += got
        except BaseException as error:
            self._fault = self._named(error, self._done + size)
            if not size:
                raise self._fault from error
        self._done += size
        return size

    def _named(self, error: BaseException, done: int) -> BaseException:
        if isinstance(error, EOFError):
            return StreamCutError(
                f"{self._name}: the {self._kind} data ends too early, after {done:,} decompressed bytes: the download "
                "is incomplete"
            )
        if isinstance(error, _FORMAT_ERRORS):
            return ArchiveError(
                f"{self._name}: the {self._kind} data is damaged after {done:,} decompressed bytes ({error}): download "
                "it again"
            )
        return error


class ReadAhead:
    """Decompresses in a thread, up to `_AHEAD` pieces before they are asked for.

    The libraries release the interpreter lock while they decompress, so parsing and writing go on meanwhile.

    Args:
        source: what is read; by the thread alone.
    """

    def __init__(self, source: Decompressed) -> None:
        self._source = source
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[memoryview, int] | BaseException] = queue.SimpleQueue()
        for _ in range(_AHEAD):
            self._free.put(memoryview(bytearray(_READ_BYTES)))
        self._piece = memoryview(b"")
        self._at = self._size = 0
        self._thread = threading.Thread(target=self._work, name="decompress", daemon=True)
        self._thread.start()

    def readinto(self, view: memoryview) -> int:
        """Read some bytes, at most `len(view)`; 0 at the end. Raises what `Decompressed.readinto` raises."""
        if self._at == self._size:
            if self._size:
                self._free.put(self._piece)
                self._at = self._size = 0
            item = self._full.get()
            if isinstance(item, BaseException):
                self._full.put(item)  # for whoever asks again
                raise item
            self._piece, self._size = item
            if not self._size:
                self._full.put(item)
                return 0
        size = min(len(view), self._size - self._at)
        view[:size] = self._piece[self._at : self._at + size]
        self._at += size
        return size

    def close(self) -> None:
        """End the thread; one that waits for a pipe ends as soon as what is called before reading raises."""
        self._free.put(None)
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        try:
            while (piece := self._free.get()) is not None:
                size = self._source.readinto(piece)
                self._full.put((piece, size))
                if not size:
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the bytes are asked for
            self._full.put(error)
