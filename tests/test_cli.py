"""The program from its command line, on archives of the real shape: what the contract says of each command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.host import resources

CLASSES = 6
SPEC = SynthSpec(classes=CLASSES, images_per_class=5, val_images=24, mean_bytes=3000)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def too_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train archive of holes whose images need more room than there is."""
    folder = tmp_path_factory.mktemp("too_large")
    free = resources.free_bytes(folder)
    write_archives(folder, SynthSpec(classes=2, images_per_class=4, val_images=0, mean_bytes=free // 4, bodies="holes"))
    return folder


class Outcome:
    """What a run of the program gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value


class Program:
    """Runs the program in this process; `serial` saves the start of a pool where the executor does not matter."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        text = self._capsys.readouterr()
        assert "Traceback" not in text.err
        return Outcome(int(code), text.out, text.err)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_tree(base: Path, layout: str = "index", classes: range = range(CLASSES)) -> dict[str, bytes]:
    """What GNU tar's reading of the archives (here: Python's) and the label file say the tree must be."""

    def folder(wnid: str) -> str:
        index = ilsvrc2012.WNIDS.index(wnid)
        return {"index": f"{index}", "padded": f"{index:04d}", "wnid": wnid}[layout]

    wanted = {ilsvrc2012.WNIDS[index] for index in classes}
    files: dict[str, bytes] = {}
    with tarfile.open(base / "ILSVRC2012_img_train.tar") as outer:
        for inner in outer:
            wnid = inner.name.removesuffix(".tar")
            if wnid in wanted:
                with tarfile.open(fileobj=outer.extractfile(inner)) as images:
                    for image in images:
                        body = images.extractfile(image)
                        assert body is not None
                        files[f"train/{folder(wnid)}/{image.name}"] = body.read()
    labels = dict(line.split() for line in (base / "ImageNet_val_label.txt").read_text().splitlines())
    with tarfile.open(base / "ILSVRC2012_img_val.tar") as flat:
        for image in flat:
            if labels[image.name] in wanted:
                body = flat.extractfile(image)
                assert body is not None
                files[f"val/{folder(labels[image.name])}/{image.name}"] = body.read()
    return files


def published(target: Path) -> dict[str, bytes]:
    return {name: body for name, body in tree(target).items() if name.startswith(("train/", "val/"))}


class TestUnpack:
    def test_the_whole_job_as_a_user_starts_it(self, archives: Path, tmp_path: Path) -> None:
        base = tmp_path / "base"
        base.mkdir()
        for path in archives.iterdir():
            (base / path.name).symlink_to(path)
        command = [sys.executable, "-m", "imagenet_unpack", "--workers", "2", "--json"]
        environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        done = subprocess.run(command, cwd=base, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["status"] == "complete"
        assert result["workers"] == 2
        assert published(base / "ImageNet") == expected_tree(archives)
        assert {path.name for path in (base / "ImageNet").iterdir()} == {
            "train", "val", "train.manifest.tsv", "val.manifest.tsv", ".imagenet_unpack"
        }  # fmt: skip
        assert "Traceback" not in done.stderr
        assert "done in" in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize("layout", ["index", "padded", "wnid"])
    def test_layouts(self, program: Program, archives: Path, tmp_path: Path, layout: str) -> None:
        run = program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial", "--layout", layout)
        assert run.code == 0
        assert run.out == ""
        assert published(tmp_path) == expected_tree(archives, layout)
        assert program("check", tmp_path, "--deep").code == 0

    def test_the_json_object(self, program: Program, archives: Path, tmp_path: Path) -> None:
        run = program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial", "--json")
        expected = expected_tree(archives)
        result = run.json
        assert result.pop("elapsed_s") > 0
        train = [body for name, body in expected.items() if name.startswith("train/")]
        val = [body for name, body in expected.items() if name.startswith("val/")]
        counts = {"status": "published", "classes": CLASSES, "shards_skipped": 0, "shards_failed": 0}
        assert result == {
            "schema": 1,
            "command": "unpack",
            "status": "complete",
            "exit_code": 0,
            "target": str(tmp_path),
            "workers": 1,
            "splits": {
                "train": {**counts, "images": len(train), "bytes": sum(map(len, train)), "shards": CLASSES},
                "val": {**counts, "images": len(val), "bytes": sum(map(len, val)), "shards": 1},
            },
            "failures": [],
        }

    def test_the_manifests(self, program: Program, archives: Path, tmp_path: Path) -> None:
        xxhash = pytest.importorskip("xxhash")
        program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        expected = expected_tree(archives)
        for split in ("train", "val"):
            header, *lines = (tmp_path / f"{split}.manifest.tsv").read_text().splitlines()
            assert header.split("\t") == ["path", "class_index", "wnid", "bytes", "xxh3_64"]
            rows = [line.split("\t") for line in lines]
            assert [row[0] for row in rows] == sorted(name for name in expected if name.startswith(f"{split}/"))
            for path, index, wnid, size, digest in rows:
                assert path.split("/")[1] == index
                assert ilsvrc2012.WNIDS[int(index)] == wnid
                assert int(size) == len(expected[path])
                assert digest == xxhash.xxh3_64_hexdigest(expected[path])

    def test_again_does_nothing_and_says_so(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial", "--json")
        program(*command)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG")}
        again = program(*command)
        assert again.code == 0
        for split in again.json["splits"].values():
            assert split["shards_skipped"] == split["shards"] > 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG")} == before

    def test_classes_and_more_of_them_later(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        assert program(*command, "--classes", "0-1").code == 0
        assert published(tmp_path) == expected_tree(archives, classes=range(2))
        more = program(*command, "--classes", f"{ilsvrc2012.WNIDS[1]},2,3", "--json")
        assert more.code == 0
        assert more.json["splits"]["train"]["classes"] == 4
        assert published(tmp_path) == expected_tree(archives, classes=range(4))
        assert program("check", tmp_path, "--deep").code == 0
        wanted = tmp_path / "wanted"
        wanted.write_text(f"\n4\n{ilsvrc2012.WNIDS[5]}\n")
        assert program(*command, "--classes", f"@{wanted}").code == 0
        assert published(tmp_path) == expected_tree(archives)
        assert program("check", tmp_path, "--deep").code == 0
        assert program(*command).code == 0

    def test_one_split(self, program: Program, archives: Path, tmp_path: Path) -> None:
        run = program("--base-dir", archives, "--target-dir", tmp_path, "--splits", "val", "--executor", "serial")
        assert run.code == 0
        assert not (tmp_path / "train").exists()
        assert (tmp_path / "val").is_dir()

    def test_archives_of_other_names_and_built_in_labels(
        self, program: Program, archives: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "t.tar").symlink_to(archives / "ILSVRC2012_img_train.tar")
        (tmp_path / "v.tar").symlink_to(archives / "ILSVRC2012_img_val.tar")
        target = tmp_path / "tree"
        run = program(
            "--train-archive", tmp_path / "t.tar", "--val-archive", tmp_path / "v.tar", "--target-dir", target,
            "--executor", "serial",
        )  # fmt: skip
        assert run.code == 0
        assert published(target) == expected_tree(archives)

    def test_mode_and_time_of_the_files(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--executor", "serial", "--splits", "val")
        old_mask = os.umask(0o027)
        try:
            assert program(*command, "--target-dir", tmp_path / "a").code == 0
        finally:
            os.umask(old_mask)
        assert program(*command, "--target-dir", tmp_path / "b", "--keep-mtime").code == 0
        with tarfile.open(archives / "ILSVRC2012_img_val.tar") as archive:
            member = archive.getmembers()[0]
        (plain,) = (tmp_path / "a").rglob(member.name)
        (dated,) = (tmp_path / "b").rglob(member.name)
        assert plain.stat().st_mode & 0o777 == 0o640
        assert dated.stat().st_mode & 0o777 == 0o644
        assert plain.stat().st_mtime > member.mtime + 86_400
        assert dated.stat().st_mtime == member.mtime


class TestRefusals:
    """Each is one line that names what is wrong, and the exit code of the contract."""

    def refused(self, run: Outcome, code: int, *words: object) -> None:
        assert run.code == code
        last = run.err.splitlines()[-1]
        for word in words:
            assert str(word) in last

    def test_no_archives(self, program: Program, tmp_path: Path) -> None:
        self.refused(program("--base-dir", tmp_path), 5, "ILSVRC2012_img_train.tar")
        assert not (tmp_path / "ImageNet").exists()

    def test_an_archive_that_was_asked_for_is_missing(self, program: Program, archives: Path, tmp_path: Path) -> None:
        (tmp_path / "ILSVRC2012_img_val.tar").symlink_to(archives / "ILSVRC2012_img_val.tar")
        self.refused(program("--base-dir", tmp_path, "--splits", "train,val"), 5, "ILSVRC2012_img_train.tar")

    def test_swapped_archives(self, program: Program, archives: Path, tmp_path: Path) -> None:
        train, val = archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar"
        self.refused(program("--train-archive", val, "--splits", "train", "--target-dir", tmp_path), 5, val)
        self.refused(program("--val-archive", train, "--splits", "val", "--target-dir", tmp_path), 5, train)
        assert not (tmp_path / "train").exists()
        assert not (tmp_path / "val").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--layout", "names"],
            ["--workers", "0"],
            ["--workers", "many"],
            ["--splits", "training"],
            ["--classes", "1000"],
            ["--classes", "5-3"],
            ["--classes", "n99999999"],
            ["--classes", ""],
            ["--classes", "@/no/such/file"],
            ["--no-such-option"],
            ["--progress", "loud"],
            ["no-such-command"],
            ["check"],
            ["synth"],
            ["--work", "2"],
        ],
        ids=" ".join,
    )
    def test_usage(self, program: Program, archives: Path, tmp_path: Path, arguments: list[str]) -> None:
        base = [] if "-" not in arguments[0] else ["--base-dir", str(archives), "--target-dir", str(tmp_path)]
        run = program(*base, *arguments)
        self.refused(run, 2)
        assert len(run.err.splitlines()) == 1
        assert run.out == ""
        assert list(tmp_path.iterdir()) == []

    def test_another_layout(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        assert program(*command).code == 0
        before = tree(tmp_path)
        self.refused(program(*command, "--layout", "wnid"), 5, "--layout")
        assert published(tmp_path) == {k: v for k, v in before.items() if k.startswith(("train/", "val/"))}

    def test_a_run_that_found_no_room_binds_nobody(
        self, program: Program, archives: Path, too_large: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "tree"
        self.refused(program("--base-dir", too_large, "--target-dir", target, "--executor", "serial"), 5, "--force")
        command = ("--base-dir", archives, "--target-dir", target, "--executor", "serial")
        assert program(*command, "--layout", "wnid", "--classes", "0-1").code == 0

    def test_a_tree_that_is_not_ours(self, program: Program, archives: Path, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "precious").write_text("x")
        self.refused(program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial"), 5, "train")
        assert (tmp_path / "train" / "precious").read_text() == "x"
        assert os.listdir(tmp_path / "train") == ["precious"]

    def test_a_target_that_is_a_file(self, program: Program, archives: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        self.refused(program("--base-dir", archives, "--target-dir", tmp_path / "file"), 5, "file")

    def test_a_missing_label(self, program: Program, archives: Path, tmp_path: Path) -> None:
        lines = (archives / "ImageNet_val_label.txt").read_text().splitlines()
        (tmp_path / "labels").write_text("\n".join(lines[1:]))
        run = program("--base-dir", archives, "--target-dir", tmp_path / "t", "--val-labels", tmp_path / "labels")
        self.refused(run, 5, "labels", lines[0].split()[0])
        assert not (tmp_path / "t" / "val").exists()
        assert not (tmp_path / "t" / "train").exists()

    def test_json_for_a_run_that_could_not_start(self, program: Program, tmp_path: Path) -> None:
        run = program("--base-dir", tmp_path, "--json")
        assert run.code == 5
        result = run.json
        assert (result["status"], result["exit_code"], result["splits"]) == ("failed", 5, {})

    def test_a_published_split_that_lost_a_file(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        program(*command)
        victim = next((tmp_path / "train" / "3").iterdir())
        victim.unlink()
        self.refused(program(*command), 4, victim.name, "check")


class TestPlan:
    def test_a_table(self, program: Program, archives: Path, tmp_path: Path) -> None:
        run = program("plan", "--base-dir", archives, "--target-dir", tmp_path / "t")
        assert run.code == 0
        assert "train" in run.out
        assert "val" in run.out
        assert not (tmp_path / "t").exists()

    def test_json(self, program: Program, archives: Path, tmp_path: Path) -> None:
        run = program("plan", "--base-dir", archives, "--json", "--workers", "32")
        expected = expected_tree(archives)
        val = [len(body) for name, body in expected.items() if name.startswith("val/")]
        train = [len(body) for name, body in expected.items() if name.startswith("train/")]
        assert run.json["splits"]["val"]["images"] == len(val)
        assert run.json["splits"]["val"]["bytes"] == sum(val)
        assert run.json["splits"]["train"]["classes"] == CLASSES
        assert sum(train) <= run.json["splits"]["train"]["bytes"] <= sum(train) + len(train) * 1024 + CLASSES * 10_240
        assert run.json["bytes_free"] > 0

    def test_counts_what_is_done_already(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        before = program("plan", *command, "--json").json
        assert before["splits"]["train"]["shards_left"] == before["splits"]["train"]["shards"] == CLASSES
        assert program(*command, "--part", "0/2").code == 0
        staged = program("plan", *command, "--json").json
        assert 0 < staged["splits"]["train"]["shards_left"] < CLASSES
        assert staged["bytes_needed"] < before["bytes_needed"]
        assert program(*command).code == 0
        done = program("plan", *command, "--json").json
        assert [split["shards_left"] for split in done["splits"].values()] == [0, 0]
        assert done["bytes_needed"] == done["files_needed"] == 0
        assert "train is already complete" in program("plan", *command).out

    def test_counts_the_published_classes(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        assert program(*command, "--classes", "0-3").code == 0
        splits = program("plan", *command, "--json").json["splits"]
        assert splits["train"]["shards_left"] == CLASSES - 4
        assert 0 < splits["val"]["images_left"] < splits["val"]["images"]

    def test_ends_with_5_where_there_is_no_room(self, program: Program, too_large: Path, tmp_path: Path) -> None:
        run = program("plan", "--base-dir", too_large, "--target-dir", tmp_path, "--json")
        assert run.code == run.json["exit_code"] == 5
        assert (run.json["status"], run.json["fits"]) == ("failed", False)
        assert program("plan", "--base-dir", too_large, "--target-dir", tmp_path, "--force").code == 0

    def test_says_how_long_it_would_take(self, program: Program, too_large: Path, tmp_path: Path) -> None:
        assert "at 500 MB/s" in program("plan", "--base-dir", too_large, "--target-dir", tmp_path).out


class TestWhatIsSaid:
    """The words that a user needs."""

    def test_the_trap_of_the_default_layout(self, program: Program, archives: Path, tmp_path: Path) -> None:
        base = ("--base-dir", archives, "--executor", "serial")
        for layout, warned in (("index", True), ("wnid", False), ("padded", False)):
            command = (*base, "--target-dir", tmp_path / layout, "--layout", layout)
            for run in (program("plan", *command), program(*command)):
                assert ("--layout wnid" in run.err) is warned
            assert "--layout wnid" not in program(*command).err  # nothing to do: it was said

    def test_where_a_run_is(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        part = program(*command, "--part", "1/2").err
        assert "not finished" in part
        assert "val: not started (0 of 24 images)" in part
        rest = program(*command).err
        assert "continuing train: 3 of 6 classes are already done" in rest
        assert "nothing to do: train and val are already complete" in program(*command).err

    def test_digests_are_verified_with_progress(self, program: Program, archives: Path, tmp_path: Path) -> None:
        run = program("--base-dir", archives, "--target-dir", tmp_path, "--verify-archives", "digest")
        assert run.code == 5
        assert f"verifying {archives / 'ILSVRC2012_img_train.tar'}" in run.err

    def test_a_check(self, program: Program, archives: Path, tmp_path: Path) -> None:
        command = ("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        assert program(*command, "--part", "0/2").code == 0
        unfinished = program("check", tmp_path)
        assert unfinished.code == 4
        assert "run the same unpack command again" in unfinished.out
        assert program(*command).code == 0
        assert "compared with its manifest (names and counts)" in program("check", tmp_path).out
        assert "compared with its manifest (every byte)" in program("check", tmp_path, "--deep").out
        next((tmp_path / "train" / "1").iterdir()).unlink()
        assert "--repair" in program("check", tmp_path).out.splitlines()[-1]
        assert "no such folder" in program("check", tmp_path / "nowhere").err

    def test_a_tree_of_others(self, program: Program, tmp_path: Path) -> None:
        (tmp_path / "val").mkdir()
        for number in range(1, 4):
            (tmp_path / "val" / ilsvrc2012.val_name(number)).touch()
        run = program("check", tmp_path)
        assert run.code == 4
        assert "published names and counts (no manifest)" in run.out
        assert "3 images directly in it" in run.out
        assert len(run.out.splitlines()) < 6

    def test_the_bar_of_a_check_counts_the_images(self, program: Program, archives: Path, tmp_path: Path) -> None:
        assert program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial").code == 0
        for option in ("--json", "--deep"):
            run = program("check", tmp_path, "--progress", "json", option)
            events = [json.loads(line) for line in run.err.splitlines()]
            last = {event["phase"]: event for event in events if event["event"] == "progress"}
            assert last["checking train"]["images"] == last["checking train"]["total_images"] == CLASSES * 5
            if option == "--deep":
                assert last["checking val"]["bytes"] == last["checking val"]["total_bytes"] > 0


class TestCheck:
    def test_finds_what_is_wrong(self, program: Program, archives: Path, tmp_path: Path) -> None:
        program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        clean = program("check", tmp_path, "--json")
        assert (clean.code, clean.json["status"], clean.json["exit_code"]) == (0, "ok", 0)
        victim = next((tmp_path / "val" / "2").iterdir())
        body = bytearray(victim.read_bytes())
        body[7] ^= 1
        victim.write_bytes(body)
        assert program("check", tmp_path).code == 0
        deep = program("check", tmp_path, "--deep", "--json")
        assert deep.code == 4
        (problem,) = deep.json["splits"]["val"]["problems"]
        assert (problem["class"], problem["kind"], problem["path"]) == ("2", "digest", f"val/2/{victim.name}")
        (tmp_path / "train" / "7").mkdir()
        shallow = program("check", tmp_path)
        assert shallow.code == 4
        assert "train/7" in shallow.out

    def test_nothing_there(self, program: Program, tmp_path: Path) -> None:
        run = program("check", tmp_path, "--json")
        assert run.code == 5
        assert run.json["status"] == "failed"

    def test_a_long_list_is_capped_on_the_terminal_alone(
        self, program: Program, archives: Path, tmp_path: Path
    ) -> None:
        program("--base-dir", archives, "--target-dir", tmp_path, "--executor", "serial")
        for number in range(300):
            (tmp_path / "train" / "0" / f"foreign{number}").touch()
        assert len(program("check", tmp_path).out.splitlines()) < 100
        assert len(program("check", tmp_path, "--json").json["splits"]["train"]["problems"]) == 300


def test_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imagenet_unpack", "demo", "--workers", "2"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_synth_makes_what_unpack_takes(program: Program, tmp_path: Path) -> None:
    arguments = ("--classes", "2", "--images", "3", "--val-images", "4", "--mean-bytes", "500", "--format", "pax")
    assert program("synth", tmp_path, *arguments).code == 0
    assert program("--base-dir", tmp_path, "--executor", "serial").code == 0
    assert len(list((tmp_path / "ImageNet").rglob("*.JPEG"))) == 10
    assert program("synth", tmp_path, *arguments).code == 5


class TestPathsThatCannotBeLookedAt:
    """A folder that may not be entered and a name that is too long are met anywhere, and are no defects."""

    @pytest.fixture
    def closed(self, archives: Path, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "closed"
        shutil.copytree(archives, folder / "in")
        folder.chmod(0)
        yield folder
        folder.chmod(0o700)

    # One process for all, as only a process of its own can give up what root may do.
    EACH = """
import contextlib, io, json, sys
from imagenet_unpack.cli import main as cli
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    print(json.dumps([words, code, err.getvalue()]))
"""

    @pytest.mark.parametrize("where", ["closed", "long"])
    def test_one_line_and_5(self, archives: Path, tmp_path: Path, closed: Path, where: str) -> None:
        bad = str(closed if where == "closed" else tmp_path / ("x" * 300))
        quiet = ["--progress", "none"]
        commands = [
            ["unpack", "--base-dir", f"{bad}/in", "--target-dir", f"{tmp_path}/t", *quiet],
            ["plan", "--base-dir", f"{bad}/in", *quiet],
            [
                "unpack",
                "--train-archive",
                f"{bad}/in/ILSVRC2012_img_train.tar",
                "--target-dir",
                f"{tmp_path}/t",
                *quiet,
            ],
            ["unpack", "--base-dir", str(archives), "--target-dir", f"{bad}/t", *quiet],
            ["plan", "--base-dir", str(archives), "--target-dir", f"{bad}/t", *quiet],
            ["check", f"{bad}/t", *quiet],
            ["check", f"{bad}/t", "--json", *quiet],
            ["tune", "--base-dir", f"{bad}/in", "--target-dir", str(tmp_path)],
            ["synth", f"{bad}/new"],
        ]
        # root may enter any folder, but not without its capabilities
        drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*drop, sys.executable, "-c", self.EACH],
            input=json.dumps(commands), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert [words for words, _, _ in results] == commands
        for words, code, err in results:
            assert code == 5, (words, err)
            (line,) = err.splitlines()
            assert bad in line


def test_a_plan_does_without_the_archive_of_a_published_split(program: Program, archives: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(archives, base)
    assert program("--base-dir", base, "--executor", "serial").code == 0
    (base / "ILSVRC2012_img_val.tar").unlink()
    run = program("plan", "--base-dir", base, "--splits", "train,val")
    assert run.code == 0
    assert "val is published already" in run.err
    assert program("plan", "--base-dir", base, "--splits", "train,val", "--target-dir", tmp_path / "new").code == 5
