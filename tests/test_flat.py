from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from factory import tar, write

from imagenet_unpack.cli import main as cli

IMAGES = [(f"ILSVRC2012_test_{number:08d}.JPEG", b"x" * number) for number in range(1, 40)]


@pytest.fixture(params=["", "test/"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "ILSVRC2012_img_test_v10102019.tar", tar((request.param + name, body) for name, body in IMAGES))
    return folder


def unpack(base: Path, target: Path, *options: str) -> int:
    command = ["--base-dir", str(base), "--target-dir", str(target), "--splits", "test", "--executor", "serial"]
    return cli.main([*command, *options])


def checked(target: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = cli.main(["check", str(target), "--json", *options])
    return code, json.loads(capsys.readouterr().out)["splits"]


def test_images_lie_directly_in_its_folder(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "t"
    assert unpack(base, target, "--layout", "wnid") == 0
    assert {path.name: path.read_bytes() for path in (target / "test").iterdir()} == dict(IMAGES)
    _, *rows = (target / "test.manifest.tsv").read_text().splitlines()
    assert [row.split("\t")[:4] for row in rows] == [
        [f"test/{name}", "-1", "-", str(len(body))] for name, body in IMAGES
    ]
    assert unpack(base, target, "--layout", "index") == 0
    code, splits = checked(target, capsys, "--deep")
    assert (code, splits["test"]) == (0, {**splits["test"], "images": len(IMAGES), "classes": 0, "problems": []})


def test_a_check_finds_every_kind_of_difference(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "t"
    assert unpack(base, target) == 0
    folder = target / "test"
    (folder / IMAGES[0][0]).unlink()
    (folder / IMAGES[1][0]).write_bytes(b"yy")
    (folder / IMAGES[2][0]).write_bytes(b"longer")
    (folder / "stranger").write_bytes(b"")
    (folder / "a folder").mkdir()
    code, splits = checked(target, capsys, "--deep")
    found = {(problem["kind"], problem["path"]) for problem in splits["test"]["problems"]}
    assert code == 4
    assert found == {
        ("missing", f"test/{IMAGES[0][0]}"),
        ("digest", f"test/{IMAGES[1][0]}"),
        ("size", f"test/{IMAGES[2][0]}"),
        ("extra", "test/stranger"),
        ("extra", "test/a folder"),
    }


def test_without_a_manifest_the_published_names_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "of something else").write_bytes(b"x")
    assert "test" not in checked(tmp_path, capsys)[1]
    (tmp_path / "test" / IMAGES[0][0]).write_bytes(b"x")
    code, splits = checked(tmp_path, capsys)
    assert code == 4
    kinds = [problem["kind"] for problem in splits["test"]["problems"]]
    assert (kinds.count("missing"), kinds.count("extra")) == (99_999, 1)
