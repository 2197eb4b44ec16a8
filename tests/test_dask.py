"""The Dask executor on real `dask scheduler` and `dask worker` processes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from program import SLOW, Run, tree
from test_executors import SHARDS, no_recovery, work

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import kinds
from imagenet_unpack.dataset.synth import SynthSpec, write_files
from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import ShardFailed
from imagenet_unpack.run.dask_executor import DaskExecutor, versions
from imagenet_unpack.targets.paths import STATE_FOLDER

pytestmark = [pytest.mark.dask]
pytest.importorskip("distributed", reason="needs the extra [dask]")
HERE = str(Path(__file__).parent)
PACKAGE = str(Path(cli.__file__).parents[2])


class Cluster:
    """A scheduler and workers of this machine, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(self.file), *arguments]
        environ = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{HERE}"}
        log = open(self.folder / "dask.log", "ab")  # noqa: SIM115 - the process's own
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environ, cwd=self.folder, start_new_session=True
        )
        log.close()
        self.processes.append(process)
        return process

    def add_worker(self) -> subprocess.Popen[bytes]:
        worker = self.start(
            "dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1",
            "--local-directory", str(self.folder), "--death-timeout", "60",
        )  # fmt: skip
        self.workers.append(worker)
        return worker

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_for_workers(self, count: int) -> None:
        deadline = time.monotonic() + 60
        import distributed

        connect: Any = distributed.Client
        while not self.file.exists():
            time.sleep(0.05)
        with connect(scheduler_file=str(self.file), set_as_default=False) as client:
            while len(client.nthreads()) != count:
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    made = Cluster(folder)
    for _ in range(2):
        made.add_worker()
    made.wait_for_workers(2)
    yield made
    made.end()


def start(base: Path, target: Path, cluster: Cluster, *options: str) -> Run:
    return Run(base, target, "--executor", "dask", "--dask-scheduler-file", str(cluster.file), *options)


def test_the_contract_of_executors(cluster: Cluster, tmp_path: Path) -> None:
    executor = DaskExecutor(None, str(cluster.file), stall_timeout_s=30)
    try:
        assert executor.workers == 2
        folder = tmp_path / "work"
        folder.mkdir()
        outcomes = list(executor.run(iter(SHARDS), functools.partial(work, folder=str(folder)), no_recovery))
    finally:
        executor.close()
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)
    assert [outcome.shard for outcome in outcomes if isinstance(outcome, ShardFailed)] == ["s3"]
    assert all((folder / item.id).read_bytes() == b"x" for item in SHARDS)


def test_the_same_tree(cluster: Cluster, base: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    address = json.loads(cluster.file.read_text())["address"]
    run = Run(base, tmp_path / "t", "--executor", "dask", "--dask-scheduler", address)
    code, result, err = run.end()
    assert code == 0, err
    assert result["workers"] == 2
    assert tree(tmp_path / "t") == expected


def test_every_kind_of_source_gives_the_same_tree(cluster: Cluster, tmp_path: Path) -> None:
    """Streams are read by the process that was started; the workers do the rest."""
    spec = SynthSpec(classes=3, images_per_class=7, val_images=9, mean_bytes=3000)
    trees: dict[str, dict[str, str]] = {}
    for kind in kinds.KINDS:
        if kind == "winter21" or (kind == "hf-parquet" and find_spec("pyarrow") is None):
            continue
        base = tmp_path / kind
        write_files(base, kinds.files_of(kind, spec))
        code, result, err = start(base, base / "t", cluster).end()
        assert code == 0, (kind, err)
        assert {name: split["images"] for name, split in result["splits"].items()} == {"train": 21, "val": 9}
        trees[kind] = tree(base / "t")
    assert len(trees) >= 7
    assert all(each == trees["official"] for each in trees.values())


def test_imagenet_21k(cluster: Cluster, tmp_path: Path) -> None:
    write_files(tmp_path, kinds.files_of("winter21", SynthSpec(classes=3, images_per_class=7, val_images=1)))
    options = ("--any-wnids", "--layout", "wnid", "--splits", "train")
    code, result, err = start(tmp_path, tmp_path / "t", cluster, *options).end()
    assert code == 0, err
    assert result["splits"]["train"]["images"] == 21


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet"])
def test_a_run_on_a_cluster_is_continued_and_parts_are_put_together(
    cluster: Cluster, tmp_path: Path, kind: str
) -> None:
    if kind == "hf-parquet":
        pytest.importorskip("pyarrow")
    spec = SynthSpec(classes=3, images_per_class=50, val_images=9, mean_bytes=3000)
    write_files(tmp_path, kinds.files_of(kind, spec))
    for part in ("0/2", "1/2"):
        code, _, err = start(tmp_path, tmp_path / "t", cluster, "--part", part).end()
        assert code == 0, err
        assert not (tmp_path / "t" / "train").exists()
    code, result, err = start(tmp_path, tmp_path / "t", cluster).end()
    assert code == 0, err
    assert all(split["shards_skipped"] == split["shards"] for split in result["splits"].values())


def test_a_worker_killed_in_a_shard_costs_nothing_but_time(
    cluster: Cluster, base: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    run = start(base, tmp_path / "t", cluster, *SLOW).at_work()
    cluster.workers[0].kill()
    code, _, err = run.end()
    assert code == 0, err
    assert tree(tmp_path / "t") == expected


def test_all_workers_gone_and_one_comes(cluster: Cluster, base: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    run = start(base, tmp_path / "t", cluster, *SLOW).at_work()
    for worker in cluster.workers:
        worker.kill()
    time.sleep(4)
    assert run.process.poll() is None
    cluster.add_worker()
    code, _, err = run.end(timeout=90)
    assert code == 0, err
    assert "no worker: waiting" in err
    assert "going on" in err
    assert tree(tmp_path / "t") == expected


def test_all_workers_gone_for_too_long(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    run = start(base, tmp_path / "t", cluster, *SLOW, "--stall-timeout", "3").at_work()
    for worker in cluster.workers:
        worker.kill()
    code, result, err = run.end(timeout=60)
    assert code == 6, err
    assert result["status"] == "incomplete"
    assert "no worker" in err


def test_the_scheduler_gone(cluster: Cluster, base: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    run = start(base, tmp_path / "t", cluster, *SLOW).at_work()
    cluster.scheduler.kill()
    code, _, err = run.end(timeout=60)
    assert code == 6, err
    assert "scheduler is gone" in err
    cluster.end()
    code, _, err = Run(base, tmp_path / "t").end()
    assert code == 0, err
    assert tree(tmp_path / "t") == expected


def test_term_drops_what_runs_and_what_has_not_started(
    cluster: Cluster, base: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    run = start(base, tmp_path / "t", cluster, *SLOW).at_work()
    began_s = time.monotonic()
    run.process.terminate()
    code, _, err = run.end(timeout=30)
    assert code == 143, err
    assert time.monotonic() - began_s < 10
    assert "run the same command again" in err
    code, _, err = start(base, tmp_path / "t", cluster).end()
    assert code == 0, err
    assert tree(tmp_path / "t") == expected


def test_a_gate_on_the_workers_host(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    options = ("--min-free-space", "9000T", "--stall-timeout", "1")
    code, _, err = start(base, tmp_path / "t", cluster, *options).end()
    assert code == 6
    assert "free space" in err


def test_no_scheduler_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be reached"):
        DaskExecutor("tcp://127.0.0.1:9", None, stall_timeout_s=30, connect_timeout_s=1)
    common = ["--base-dir", str(base), "--target-dir", str(tmp_path / "t"), "--executor", "dask"]
    assert cli.main(common) == 2
    assert not (tmp_path / "t" / STATE_FOLDER).exists()


def test_other_versions_are_named(cluster: Cluster) -> None:
    with pytest.raises(TargetError, match=r"0\.0\.1"):
        DaskExecutor(None, str(cluster.file), stall_timeout_s=30, wanted=(versions()[0], "0.0.1"))
