"""What the fork server imports, once for all workers; the server is given its name only.

Workers have no voice of their own, as everything they have to say is in what they return: what interpreters print when
they are killed or run out of something would reach the user's terminal as tracebacks. And whoever reads a pipe from the
program must not wait for a worker that a hanging file system holds.
"""

from __future__ import annotations

import contextlib
import importlib
import os

with contextlib.suppress(OSError):
    _fd = os.open(os.devnull, os.O_RDWR)
    for _standard in (0, 1, 2):
        os.dup2(_fd, _standard)
    os.close(_fd)

for _name in ("imagenet_unpack.host.pool", "imagenet_unpack.host.loky"):
    with contextlib.suppress(ImportError, OSError):  # then a worker fails as it starts, and the pool says so
        importlib.import_module(_name)
