from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from tasks import die, die_in_worker, double, seen_in_worker

from imagenet_unpack.host import loky, pool
from imagenet_unpack.host.pool import BrokenPoolError, Pool, map_unordered
from imagenet_unpack.host.signals import SIGNALS


@pytest.fixture
def two() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def test_calls_are_run_and_workers_started_as_they_are_needed(two: Pool) -> None:
    assert len(multiprocessing.active_children()) == 1
    futures = {two.submit(double, number) for number in range(5)}
    assert len(multiprocessing.active_children()) == 2
    results = set()
    while futures:
        done = two.wait(futures, 10)
        futures -= done
        results |= {two.result(future) for future in done}
    assert results == {0, 2, 4, 6, 8}


def test_a_worker_imports_little_and_leaves_signals_to_its_parent(two: Pool) -> None:
    modules, blocked, ignored = two.submit(seen_in_worker, 0).result(30)
    assert not {"tqdm", "argparse", "imagenet_unpack.cli", "imagenet_unpack.run.runner"} & modules
    assert set(SIGNALS) <= blocked
    assert ignored


def test_a_dead_worker_breaks_the_pool(two: Pool) -> None:
    future = two.submit(die, 0)
    assert two.wait([future], 30)
    with pytest.raises(BrokenPoolError):
        two.result(future)
    with pytest.raises(BrokenPoolError):
        two.submit(double, 1)


def test_nothing_is_left_after_close_and_kill() -> None:
    for end in (Pool.close, Pool.kill):
        made = Pool(2)
        future = made.submit(time.sleep, 0 if end is Pool.close else 60)
        workers = multiprocessing.active_children()
        end(made)
        made.wait([future], 30)
        for worker in workers:
            worker.join(10)
            assert not worker.is_alive()
        made.close()


def test_map_unordered() -> None:
    assert sorted(map_unordered(double, range(10), 2)) == [2 * number for number in range(10)]


def test_map_unordered_goes_on_here_when_its_workers_die() -> None:
    assert sorted(map_unordered(die_in_worker, range(10), 2)) == [2 * number for number in range(10)]


def limited(limit: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """Map with two workers in a process of its own that has a limit of its own."""
    code = (
        "from imagenet_unpack.host.pool import map_unordered\n"
        "from tasks import double\n"
        "import logging; logging.basicConfig(format='%(message)s')\n"
        "print(sorted(map_unordered(double, range(6), 2)))"
    )
    environ = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, preexec_fn=limit, timeout=60,
        check=False,
    )  # fmt: skip


def no_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))


def test_map_unordered_goes_on_here_where_there_are_too_few_files() -> None:
    done = limited(no_files)
    assert done.stdout == "[0, 2, 4, 6, 8, 10]\n", done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
@pytest.mark.parametrize("module", ["random", "signal", "queue"])
def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('not mine')\n")
    code = (
        "import os; from imagenet_unpack.host.pool import Pool\n"
        "p = Pool(2); print(p.submit(os.getppid).result(30) != os.getpid()); p.close()"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_script_need_not_guard_its_calls(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom imagenet_unpack.host.pool import map_unordered\n"
        "print('here')\nprint(sorted(map_unordered(abs, [-1, 2], 2)))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environ, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("here\n[1, 2]\n", "")


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, time; from imagenet_unpack.host.pool import Pool\n"
        "p = Pool(2); p.submit(time.sleep, 100); p.submit(time.sleep, 100)\n"
        "print(*(each.pid for each in multiprocessing.active_children()), flush=True); time.sleep(100)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
    deadline_s = time.monotonic() + 10
    while any(psutil.pid_exists(worker) for worker in workers):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_is_relied_on_in_loky() -> None:
    """Names of joblib's loky that are not part of its interface."""
    made = loky.executor(2, pool.initialize_worker)
    try:
        made._max_workers = 1
        made._ensure_executor_running()
        assert len(made._processes) == 1
        assert type(made._executor_manager_thread) is loky._Manager
        assert loky.process_executor.kill_process_tree is loky._kill
        assert loky.process_executor._USE_PSUTIL is False
    finally:
        made.shutdown(wait=True)


def test_joblib_itself_is_neither_imported_nor_changed(two: Pool) -> None:
    modules, _, _ = two.submit(seen_in_worker, 0).result(30)
    if metadata.version("joblib") >= "1.6":  # before, loky imports joblib's own copy of cloudpickle
        assert not {"joblib", "numpy"} & modules
    from joblib.externals.loky import process_executor

    assert process_executor is not loky.process_executor
    assert process_executor._ExecutorManagerThread is not loky._Manager


def test_the_error_says_why() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n"
        "from imagenet_unpack.host.pool import CannotStartError, Pool\n"
        "try:\n    Pool(2)\nexcept CannotStartError as error:\n    print(error)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60, check=True
    )
    assert "8 open files" in done.stdout
