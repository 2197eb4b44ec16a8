"""joblib's executor of worker processes (loky), as this program uses it; imported where processes are started.

It is loaded under a name of its own. Joblib as a whole imports numpy, asyncio and more, which costs a fifth of a second
before the first image, in this process and in the fork server; and what is changed here must not change the joblib of a
program that uses this package.

loky uses psutil where it is installed, in two ways that do not fit: to list the processes of the machine before it
kills a worker, which ends its thread where /proc hides processes (hidepid), and to retire workers that have grown, for
which mapped files count. Workers here have no children, and their memory is a window.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from typing import Any

__all__ = ["BrokenProcessPool", "executor"]

_NAME = f"{__package__}.joblib_loky"


def _load() -> Any:
    """Return loky's module `process_executor`; where joblib is not a folder, joblib's own."""
    joblib = importlib.util.find_spec("joblib")
    folders = joblib.submodule_search_locations if joblib is not None else None
    init = Path(folders[0], "externals", "loky", "__init__.py") if folders else Path()
    if not init.is_file():
        return importlib.import_module("joblib.externals.loky.process_executor")
    spec = importlib.util.spec_from_file_location(_NAME, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_NAME]
        raise
    return importlib.import_module(f"{_NAME}.process_executor")


process_executor = _load()
BrokenProcessPool: type[Exception] = process_executor.BrokenProcessPool


def _kill(process: Any) -> None:
    with suppress(OSError):
        process.kill()
    process.join()


class _Manager(process_executor._ExecutorManagerThread):  # type: ignore[misc,name-defined] # noqa: SLF001 - untyped
    """Breaks the pool where it fails itself (no more threads or memory): callers would wait for ever."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - whatever it is, callers get it
            with suppress(Exception):
                self.terminate_broken(BrokenProcessPool(str(error)))


process_executor._ExecutorManagerThread = _Manager  # noqa: SLF001
process_executor.kill_process_tree = _kill
process_executor._USE_PSUTIL = False  # noqa: SLF001


class _Process(ForkServerProcess):
    """A worker that does not run the main module again: a user's script need not guard its calls of this package."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def executor(workers: int, initializer: Callable[[], None]) -> Any:
    """Return an executor for up to `workers` processes, forked from the fork server."""
    return process_executor.ProcessPoolExecutor(workers, timeout=None, context=_Context(), initializer=initializer)
