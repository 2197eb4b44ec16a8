from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_unpack.errors import CheckError
from imagenet_unpack.targets import manifest

NAME = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1)
FILES = st.dictionaries(st.tuples(st.integers(0, 999), NAME), st.integers(0, 10**12), max_size=30)


def row(index: int, name: str, size: int) -> bytes:
    return manifest.row(f"train/{index}/{name}", index, "n01440764", size, size * 7919)


@given(FILES, st.integers(1, 5))
def test_parts_become_one_sorted_manifest_and_come_back(files: dict[tuple[int, str], int], parts: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(index, name, size) for (index, name), size in files.items()]
        paths = []
        for number in range(parts):
            path = Path(folder, f"{number}.tsv")
            path.write_bytes(b"".join(sorted(rows[number::parts])))
            paths.append(path)
        whole = Path(folder, "train.manifest.tsv")
        manifest.write(whole, manifest.part_streams(paths))
        assert whole.read_bytes() == manifest.HEADER + b"".join(sorted(rows))
        assert list(manifest.rows(whole)) == sorted(rows)
        read = [manifest.parse_row(line) for line in manifest.rows(whole)]
        assert {(each.class_index, each.path.split("/", 2)[2]): each.size_bytes for each in read} == files
        for ranges in (1, 3, 100):
            groups = [
                (name, lines)
                for span in manifest.class_ranges(whole, ranges)
                for name, lines in manifest.read_groups(whole, *span)
            ]
            assert [line for _, lines in groups for line in lines] == sorted(rows)
            assert len({name for name, _ in groups}) == len(groups)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"train/0/a\t0\tn01440764\t1",
        b"train/0/a\tx\tn01440764\t1\t0123456789abcdef\n",
        b"train/0/a\t0\tn01440764\t-1\t0123456789abcdef\n",
        b"train/0/a\t0\tn01440764\t1\t0123456789ABCDEF\n",
        b"train/a\t0\tn01440764\t1\t0123456789abcdef\n",
        b"train/0/\xff\t0\tn01440764\t1\t0123456789abcdef\n",
    ],
)
def test_what_is_no_row(line: bytes) -> None:
    with pytest.raises(CheckError):
        manifest.parse_row(line)


def test_a_damaged_manifest_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.manifest.tsv"
    path.write_bytes(manifest.HEADER + row(0, "a", 1) + b"damage\n" + row(0, "c", 1))
    (span,) = manifest.class_ranges(path, 1)
    with pytest.raises(CheckError, match="line 3"):
        [manifest.read_files(path, lines) for _, lines in manifest.read_groups(path, *span)]
    path.write_bytes(b"path\n")
    with pytest.raises(CheckError, match="header"):
        list(manifest.rows(path))


def test_more_fragments_that_overlap_than_a_process_may_open_are_merged(tmp_path: Path) -> None:
    rows = [manifest.row(f"train/0/n01440764_{number:05d}.JPEG", 0, "n01440764", 3, number) for number in range(900)]
    parts = [tmp_path / f"{number}.tsv" for number in range(300)]
    for number, part in enumerate(parts):
        part.write_bytes(b"".join(rows[number::300]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, hard))
    try:
        manifest.write(tmp_path / "all.tsv", manifest.part_streams(parts))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(manifest.rows(tmp_path / "all.tsv")) == rows


def test_class_indices_are_filled_in_by_wnid() -> None:
    row = manifest.row("train/n01440764/a.JPEG", 0, "n01440764", 3, 7)
    assert list(manifest.with_class_indices([row], {"n01440764": 12})) == [
        manifest.row("train/n01440764/a.JPEG", 12, "n01440764", 3, 7)
    ]
