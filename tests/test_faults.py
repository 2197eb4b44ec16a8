"""What the contract promises when something goes wrong: signals, death, full and failing disks, damaged archives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from factory import END, WNIDS, images, member, tar, train_tar, val_name
from program import SLOW, Run, Tree, serial, tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.extract.throttle import RateLimiter
from imagenet_unpack.targets.claim import claim_target
from imagenet_unpack.targets.paths import STATE_FOLDER


def complete(base: Path, target: Path, expected: Tree, *options: str) -> dict[str, Any]:
    code, result, err = Run(base, target, *options).end()
    assert code == 0, err
    assert tree(target) == expected
    return result


# Of the eight combinations, three stand for all in the fast run.
FAST = [(signal.SIGINT, True), (signal.SIGTERM, False)]
SIGNALS = [
    pytest.param(
        number,
        to_group,
        id=f"{number.name}-{'group' if to_group else 'parent'}",
        marks=[] if (number, to_group) in FAST else [pytest.mark.slow],
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    for to_group in (False, True)
]


class TestSignals:
    @pytest.mark.parametrize(("number", "to_group"), SIGNALS)
    def test_end_the_run_in_order(
        self, base: Path, tmp_path: Path, expected: Tree, number: signal.Signals, to_group: bool
    ) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        time.sleep(0.7)
        began_s = time.monotonic()
        if to_group:
            os.killpg(run.process.pid, number)
        else:
            run.process.send_signal(number)
        code, result, err = run.end(timeout=15)
        assert time.monotonic() - began_s < 10
        assert code == 128 + number
        assert (result["status"], result["exit_code"]) == ("interrupted", code)
        assert "run the same command again to continue" in err
        run.wait_until_gone(10)
        assert tree(tmp_path) == {}
        again = complete(base, tmp_path, expected)
        assert again["splits"]["train"]["shards_skipped"] == result["splits"]["train"]["images"] / 30

    def test_what_is_on_the_disk_is_not_extracted_again(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        parts = tmp_path / STATE_FOLDER / "train" / "parts"
        while len(list(parts.glob("*.tsv"))) < 3:
            time.sleep(0.02)
        run.process.terminate()
        _, result, _ = run.end()
        done = [path.stem for path in parts.glob("*.tsv")]
        staged = tmp_path / STATE_FOLDER / "train" / "tree"
        before = {
            path.name: path.stat().st_mtime_ns for wnid in done for path in (staged / str(WNIDS.index(wnid))).iterdir()
        }
        assert result["splits"]["train"]["classes"] == len(done) >= 3
        again = complete(base, tmp_path, expected)
        assert again["splits"]["train"]["shards_skipped"] == len(done)
        after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "train").rglob("*.JPEG")}
        assert {name: after[name] for name in before} == before

    def test_twice_term_is_once(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        run.process.terminate()
        time.sleep(0.05)
        run.process.terminate()
        assert run.end()[0] == 143
        complete(base, tmp_path, expected)

    def test_a_second_ctrl_c_stops_at_once(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        for each in run.workers():
            each.suspend()  # so that the first one has to wait for them
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert run.process.poll() is None
        os.killpg(run.process.pid, signal.SIGINT)
        run.process.communicate(timeout=2)
        assert run.process.returncode == 130
        run.wait_until_gone(5)
        complete(base, tmp_path, expected)

    def test_while_planning(self, base: Path, tmp_path: Path) -> None:
        """Nothing is written yet, so nothing has to be ended in order."""
        code = (
            "import sys, time; from imagenet_unpack.cli import main as cli\n"
            "from imagenet_unpack.planning import inputs\n"
            "inputs.plan_val = lambda *_: time.sleep(60)\n"
            f"sys.exit(cli.main('--base-dir {base} --target-dir {tmp_path}/t --splits val'.split()))"
        )
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
            time.sleep(1.5)
            process.terminate()
            _, err = process.communicate(timeout=5)
        assert process.returncode == 143
        assert "Traceback" not in err
        assert not (tmp_path / "t").exists()


class TestDeath:
    def test_of_the_parent_leaves_no_orphan(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        run.process.kill()
        run.process.communicate()
        run.wait_until_gone(15)
        assert tree(tmp_path) == {}
        complete(base, tmp_path, expected)

    def test_of_a_worker_costs_another_try(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW).at_work()
        run.workers()[0].kill()
        code, _, err = run.end()
        assert code == 0, err
        assert tree(tmp_path) == expected


class TestTwoAtOnce:
    def test_the_second_one_says_so(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        first = Run(base, tmp_path, *SLOW).at_work()
        began_s = time.monotonic()
        code, _, err = Run(base, tmp_path).end()
        assert code == 5
        assert time.monotonic() - began_s < 5
        assert str(first.process.pid) in err
        assert os.uname().nodename in err
        assert first.end()[0] == 0
        assert tree(tmp_path) == expected

    def test_a_stale_lock_is_not_in_the_way(self, base: Path, tmp_path: Path) -> None:
        claim_target(tmp_path)
        (tmp_path / STATE_FOLDER / "train.lock").write_text("process 1 on elsewhere\n")
        assert cli.main(["--base-dir", str(base), "--target-dir", str(tmp_path), "--executor", "serial"]) == 0


@pytest.fixture
def unfinished(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Archives of its own, and a target where a run of them was stopped when three classes were done."""
    own, target = tmp_path / "own", tmp_path / "target"
    shutil.copytree(base, own)
    with pytest.MonkeyPatch.context() as patch:
        real, count = os.preadv, [0]

        def failing(fd: int, *rest: Any) -> int:
            count[0] += 1
            if count[0] > 3:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, *rest)

        patch.setattr(os, "preadv", failing)
        assert serial(own, target) == 3
    return own, target


class TestContinuing:
    def test_the_rest_is_done(
        self, unfinished: tuple[Path, Path], expected: Tree, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert serial(*unfinished, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["splits"]["train"]["shards_skipped"] == 3
        assert tree(unfinished[1]) == expected

    @pytest.mark.parametrize(
        ("change", "options", "word"),
        [
            (lambda own: os.utime(own / "ILSVRC2012_img_train.tar", (1, 1)), (), "modification time"),
            (lambda own: os.truncate(own / "ILSVRC2012_img_train.tar", 6_000_128), (), "size"),
            (None, ("--layout", "wnid"), "--layout"),
            (None, ("--classes", "0-3"), "--classes"),
        ],
        ids=["time", "size", "layout", "classes"],
    )
    def test_with_something_else_is_refused(
        self,
        unfinished: tuple[Path, Path],
        expected: Tree,
        capsys: pytest.CaptureFixture[str],
        change: Callable[[Path], object] | None,
        options: tuple[str, ...],
        word: str,
    ) -> None:
        own, target = unfinished
        if change is not None:
            change(own)
        assert serial(own, target, *options) == 5
        assert word in capsys.readouterr().err.splitlines()[-1]
        assert tree(target) == {}
        if not options:
            assert serial(own, target, "--restart") == 0
            assert tree(target) == expected

    def test_with_other_headers_is_refused(
        self, unfinished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        own, target = unfinished
        path = own / "ILSVRC2012_img_val.tar"
        stat = path.stat()
        data = path.read_bytes()
        first, second = (re.escape(data[at : at + 28]) for at in (0, data.index(b"ILSVRC", 28)))
        assert first != second
        members = data[:512]
        swapped = bytearray(members)
        swapped[136:148] = b"00000000001\0"
        swapped[148:156] = b" " * 8
        swapped[148:156] = b"%06o\0 " % sum(swapped)
        swapped[:28] = b"ILSVRC2012_val_00049999.JPEG"
        swapped[148:156] = b" " * 8
        swapped[148:156] = b"%06o\0 " % sum(swapped)
        path.write_bytes(bytes(swapped) + data[512:])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (own / "ImageNet_val_label.txt").unlink()
        assert serial(own, target, "--splits", "val") == 5
        assert "other contents" in capsys.readouterr().err

    def test_other_labels_are_refused(self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "t"
        assert serial(base, target, "--splits", "val") == 0
        lines = (base / "ImageNet_val_label.txt").read_text().splitlines()
        other = WNIDS[0] if not lines[0].endswith(WNIDS[0]) else WNIDS[1]
        (tmp_path / "labels").write_text("\n".join([f"{lines[0].split()[0]} {other}", *lines[1:]]))
        assert serial(base, target, "--splits", "val", "--val-labels", str(tmp_path / "labels")) == 5
        assert "other labels" in capsys.readouterr().err.splitlines()[-1]


class TestFailingDisks:
    def failing(self, number: int, after: int = 40) -> Callable[..., Any]:
        count = [0]

        def fail(*_: object) -> Any:
            count[0] += 1
            if count[0] > after:
                raise OSError(number, os.strerror(number))
            return None

        return fail

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    @pytest.mark.parametrize("call", ["open", "write", "close", "mkdir"])
    def test_errors_while_writing(
        self, base: Path, tmp_path: Path, expected: Tree, capsys: pytest.CaptureFixture[str], call: str, number: int
    ) -> None:
        real = getattr(os, call)
        count = [0]

        def fail(first: Any, *rest: Any, **options: Any) -> Any:
            if call == "open":
                writing = str(first).endswith(".JPEG")
            elif call == "mkdir":
                writing = "dir_fd" in options
            elif call == "write":
                writing = len(rest[0]) > 2000
            else:
                writing = False
                with contextlib.suppress(OSError):
                    writing = os.readlink(f"/proc/self/fd/{first}").endswith(".JPEG")
            count[0] += writing
            if writing and count[0] > 5:
                if call == "close":
                    real(first)
                raise OSError(number, os.strerror(number))
            return real(first, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, fail)
            assert serial(base, tmp_path) == 6
        err = capsys.readouterr().err
        assert os.strerror(number) in err
        assert "Traceback" not in err
        assert tree(tmp_path) == {}
        assert serial(base, tmp_path) == 0
        assert tree(tmp_path) == expected

    def test_errors_of_sync_journal_and_rename(
        self, base: Path, tmp_path: Path, expected: Tree, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sync, rename = os.fsync, os.rename

        def failing_sync(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".journal"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(fd)

        def failing_rename(source: Path, destination: Path) -> None:
            if source.name == "tree":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            rename(source, destination)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", failing_sync)
            assert serial(base, tmp_path) == 6
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self.failing(errno.EIO, after=0))
            assert serial(base, tmp_path / "other") == 5  # nothing can be noted down: it cannot start
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", failing_rename)
            assert serial(base, tmp_path) == 6
        assert "Traceback" not in capsys.readouterr().err
        assert serial(base, tmp_path) == 0
        assert tree(tmp_path) == expected

    def test_a_source_that_cannot_be_read(self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            assert serial(base, tmp_path, "--json") == 3
        result = json.loads(capsys.readouterr().out)
        assert {failure["kind"] for failure in result["failures"]} == {"source-io"}
        assert tree(tmp_path) == {}

    @contextlib.contextmanager
    def mounted(self, folder: Path, options: str) -> Iterator[Path]:
        if os.geteuid():
            pytest.skip("needs root to mount a small file system")
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    @pytest.mark.root
    @pytest.mark.parametrize(
        ("small", "large"), [("size=3m", "size=60m"), ("size=60m,nr_inodes=150", "nr_inodes=9000")]
    )
    def test_a_small_file_system(
        self, base: Path, tmp_path: Path, expected: Tree, capsys: pytest.CaptureFixture[str], small: str, large: str
    ) -> None:
        with self.mounted(tmp_path / "small", small) as mount:
            assert serial(base, mount / "t") == 5
            assert re.search(r"needs about [\d,.]+ (MB|files), only [\d,.]+", capsys.readouterr().err)
            assert serial(base, mount / "t", "--force", "--min-free-space", "0") == 6
            assert "No space left" in capsys.readouterr().err
            subprocess.run(["mount", "-o", f"remount,{large}", str(mount)], check=True)
            assert serial(base, mount / "t") == 0
            assert tree(mount / "t") == expected

    @pytest.mark.root
    def test_a_read_only_target(self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with self.mounted(tmp_path / "ro", "size=60m") as mount:
            (mount / "half").mkdir()
            claim_target(mount / "half")
            subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
            for target in (mount / "t", mount / "half"):
                assert serial(base, target) == 5
                assert "Read-only" in capsys.readouterr().err

    @pytest.mark.root
    def test_it_goes_on_when_there_is_room_again(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        with self.mounted(tmp_path / "full", "size=60m") as mount:
            (mount / "filler").write_bytes(bytes(45 << 20))
            run = Run(base, mount / "t", "--min-free-space", "20M", "--stall-timeout", "30")
            time.sleep(3)
            assert run.process.poll() is None
            (mount / "filler").unlink()
            assert run.end()[0] == 0
            assert tree(mount / "t") == expected


class TestGates:
    @pytest.mark.parametrize(
        ("option", "word"), [("--min-free-space", "free space"), ("--min-free-memory", "free memory")]
    )
    @pytest.mark.parametrize("executor", ["serial", "local"])
    def test_a_stall_ends_the_run_in_order(
        self, base: Path, tmp_path: Path, expected: Tree, capfd: pytest.CaptureFixture[str],
        option: str, word: str, executor: str,
    ) -> None:  # fmt: skip
        command = ["--base-dir", str(base), "--target-dir", str(tmp_path), "--executor", executor, "--workers", "2"]
        began_s = time.monotonic()
        assert cli.main([*command, option, "9000T", "--stall-timeout", "1"]) == 6
        assert time.monotonic() - began_s < 8
        err = capfd.readouterr().err
        assert word in err
        assert "Traceback" not in err
        assert tree(tmp_path) == {}
        assert cli.main([*command, option, "0"]) == 0
        assert tree(tmp_path) == expected

    def test_the_wait_is_shown(self, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        command = ["--base-dir", str(base), "--target-dir", str(tmp_path), "--progress", "json", "--workers", "2"]
        assert cli.main([*command, "--min-free-space", "9000T", "--stall-timeout", "2"]) == 6
        events = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
        assert any(event["event"] == "waiting" and "free space" in str(event["reason"]) for event in events)

    @pytest.mark.parametrize(
        ("option", "rate", "amount"), [("--max-write-rate", "2MB", 2e6), ("--max-create-rate", "150", 150.0)]
    )
    def test_rates(self, base: Path, tmp_path: Path, expected: Tree, option: str, rate: str, amount: float) -> None:
        began_s = time.monotonic()
        result = complete(base, tmp_path, expected, option, rate)
        elapsed_s = time.monotonic() - began_s
        total = sum(split["bytes" if amount > 1e6 else "images"] for split in result["splits"].values())
        assert total / elapsed_s <= amount * 1.1

    def test_rates_are_shared_with_who_names_the_same_folder(self, base: Path, tmp_path: Path) -> None:
        RateLimiter("create", 1.0, folder=tmp_path)._reserve(1)  # another run has taken the next second
        began_s = time.monotonic()
        assert serial(base, tmp_path / "t", "--rate-dir", str(tmp_path), "--max-create-rate", "1000000") == 0
        assert time.monotonic() - began_s >= 0.8

    def test_a_folder_for_the_rates_that_is_missing_is_usage(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert serial(base, tmp_path / "t", "--rate-dir", str(tmp_path / "none"), "--max-create-rate", "9") == 2
        assert "--rate-dir" in capsys.readouterr().err
        assert not (tmp_path / "t").exists()

    @pytest.mark.root
    @pytest.mark.slow
    def test_many_workers_in_a_small_cgroup(self, tmp_path: Path) -> None:
        """No process is killed, however many workers were asked for."""
        root = Path("/sys/fs/cgroup/memory")
        if os.geteuid() or not root.is_dir():
            pytest.skip("needs root and the memory controller of cgroup v1")
        write_archives(tmp_path, SynthSpec(classes=24, images_per_class=150, val_images=1000))
        group = root / f"imagenet_unpack-test-{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(256 << 20))
            command = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m imagenet_unpack --workers 16 --json"
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "killed" not in done.stderr
            assert json.loads(done.stdout)["splits"]["train"]["images"] == 24 * 150
            events = (group / "memory.oom_control").read_text()
            assert "oom_kill 0" in events
        finally:
            for _ in range(50):
                with contextlib.suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.1)


class TestDamagedArchives:
    def test_one_bad_class_leaves_the_others_and_only_it_is_repeated(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, target = tmp_path / "t.tar", tmp_path / "t"
        inner = {wnid: tar(images(wnid, [b"x" * 700, b"y" * 9])) for wnid in WNIDS[:4]}
        good = train_tar(inner)
        damaged = bytearray(good)
        damaged[good.index(f"{WNIDS[2]}_1.JPEG".encode()) + 3] ^= 1
        path.write_bytes(damaged)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        command = ["--train-archive", str(path), "--target-dir", str(target), "--executor", "serial", "--json"]
        assert cli.main(command) == 3
        failed = capsys.readouterr()
        (failure,) = json.loads(failed.out)["failures"]
        assert (failure["shard"], failure["kind"]) == (WNIDS[2], "archive")
        assert str(path) in failure["message"]
        assert not (target / "train").exists()
        path.write_bytes(good)
        assert cli.main(command) == 5
        assert "--same-archive" in capsys.readouterr().err
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert cli.main(command) == 0
        assert json.loads(capsys.readouterr().out)["splits"]["train"]["shards_skipped"] == 3
        assert len(tree(target)) == 8

    @pytest.mark.parametrize(
        "bad",
        [
            member(b"../evil.JPEG"),
            member(b"/tmp/evil.JPEG"),
            member(b"a/b.JPEG"),
            member(b"a\x1b[31m.JPEG"),
            member(b"\xff.JPEG"),
            member(b"x.JPEG", b"", kind=b"2", link=b"/etc/passwd"),
            member(b"x.JPEG", b"", kind=b"1", link=b"y"),
            member(b"x.JPEG", b"", kind=b"6"),
            member(b"x.JPEG", b"", kind=b"S"),
            b"\x80" * 512,
        ],
        ids=range(10),
    )
    @pytest.mark.parametrize("where", ["inner", "outer", "val"])
    def test_hostile_members(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes, where: str) -> None:
        base, target = tmp_path / "in" / "base", tmp_path / "in" / "target"
        base.mkdir(parents=True)
        good = member(f"{WNIDS[0]}_1.JPEG".encode())
        train = tar([(f"{WNIDS[0]}.tar", (good + bad + END) if where == "inner" else good + END)])
        if where == "outer":
            train = train[:-10240].rstrip(b"\0")
            train += bytes(-len(train) % 512) + bad + END
        val = member(val_name(1).encode()) + (bad if where == "val" else b"") + END
        (base / "ILSVRC2012_img_train.tar").write_bytes(train)
        (base / "ILSVRC2012_img_val.tar").write_bytes(val)
        code = serial(base, target)
        err = capsys.readouterr().err
        assert code == (3 if where == "inner" else 5)
        assert "Traceback" not in err
        assert "\x1b" not in err
        assert "ILSVRC2012_img_" in err
        assert not (target / "train").exists()
        assert (target / "val").exists() == (where == "inner")
        assert {path.name for path in tmp_path.rglob("*evil*")} == set()
        assert {path.name for path in tmp_path.iterdir()} == {"in"}
        assert set(os.listdir(tmp_path / "in")) <= {"base", "target"}


@pytest.mark.root
@pytest.mark.slow
def test_a_short_soak() -> None:
    """Kills and power cuts at random moments; `tests/soak.py` by itself does as many as one likes."""
    if os.geteuid() or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root, loop mounts and xfsprogs")
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), "--kills", "8", "--power-cuts", "4", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(json.loads(done.stdout)["kills"].values()) >= 8
