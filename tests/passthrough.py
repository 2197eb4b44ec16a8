"""A folder shown under another name by FUSE, with the options of bindfs(1): at a limited rate, for instance."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def passthrough(source: Path, mount: Path, *options: str) -> Iterator[None]:
    """Mount `source` on `mount`, which is made where it is missing."""
    mount.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["bindfs", "-f", *options, source, mount]) as server:
        try:
            deadline = time.monotonic() + 30
            while not os.path.ismount(mount):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"bindfs did not mount {mount}")
                time.sleep(0.02)
            yield
        finally:
            server.terminate()  # it unmounts
            server.wait()
            # Where it could not: a mount that another process's namespace has a copy of, for instance.
            if os.path.ismount(mount):
                subprocess.run(["umount", "--lazy", mount], check=False)
