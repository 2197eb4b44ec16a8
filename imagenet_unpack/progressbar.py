"""A progress bar of bytes, drawn by tqdm: on a terminal, or as a widget in a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.text import printable


class ProgressBar(NullReporter):
    """A `Reporter` that draws a bar of bytes with the rate of images beside it; notes appear above the bar.

    A phase that counts images alone (a check) is drawn in images.

    Args:
        bar_class: a tqdm class; None: `tqdm.auto.tqdm`, which chooses the widget in a notebook with ipywidgets, and
            text elsewhere.
        stream: where a bar of text goes; None: stderr.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        bar_class: Any = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if bar_class is None:
            from tqdm.auto import tqdm as bar_class  # noqa: PLC0415 - looks for IPython when it is imported
        self._bar_class = bar_class
        self._stream = stream
        self._clock = clock
        self._bar: Any = None
        self._name = ""
        self._reason: str | None = None
        self._images = 0
        self._began_s = 0.0
        self._of_images = False

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Begin a new bar; the one before stays on the screen if anything was counted in it."""
        self.close()
        self._name = name
        self._images = 0
        self._began_s = self._clock()
        self._of_images = total_bytes is None and total_images is not None
        self._bar = self._bar_class(
            total=total_images if self._of_images else total_bytes,
            desc=self._description(),
            unit=" images" if self._of_images else "B",
            unit_scale=True,
            miniters=1,
            smoothing=0.1,
            dynamic_ncols=True,
            file=self._stream,
        )

    def grow(self, nbytes: int) -> None:
        """Make the total larger."""
        if self._bar is not None and not self._of_images:
            self._set_total((self._bar.total or 0) + nbytes)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Count what was done."""
        self._images += images
        if self._bar is None:
            return
        if self._of_images:
            self._bar.update(images)
            return
        elapsed_s = self._clock() - self._began_s
        per_s = self._images / elapsed_s if elapsed_s > 0 else 0.0
        self._bar.set_postfix_str(f"{per_s:,.0f} images/s", refresh=False)
        self._bar.update(nbytes)

    def waiting(self, reason: str | None) -> None:
        """Show beside the bar why no work is going on."""
        if reason == self._reason:
            return
        self._reason = reason
        if self._bar is not None:
            self._bar.set_description_str(self._description())

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        self._bar_class.write(printable(message), file=self._stream)
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        """Remove the bar, or leave its last state if anything was counted."""
        if self._bar is not None:
            self._bar.leave = self._bar.n > 0
            self._bar.close()
        self._bar = None

    def _description(self) -> str:
        return self._name if self._reason is None else f"{self._name} (waiting: {self._reason})"

    def _set_total(self, total: int) -> None:
        self._bar.total = total
        widget = getattr(self._bar, "container", None)
        if widget is not None:  # tqdm.notebook gives its widget the total once, when it is made
            widget.children[1].max = total
        self._bar.refresh()
