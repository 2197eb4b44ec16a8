from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_unpack.errors import TargetError
from imagenet_unpack.targets.members import MAX_MTIME_S, Members

NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)
LARGE = st.integers(0, 2**64 - 1)
ROWS = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), NAMES, LARGE, LARGE, st.integers(0, MAX_MTIME_S), LARGE),
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(rows=ROWS, digests=st.booleans())
def test_what_is_written_is_read_sorted(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, bytes, int, int, int, int]], digests: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.members"
    Members.from_rows(rows, digests=digests).write(path)
    found = list(Members.read(path).rows())
    assert found == [row if digests else (*row[:5], None) for row in sorted(rows)]


def test_a_name_may_occur_once_in_a_class() -> None:
    rows = [(0, b"a", 1, 1, 1, 1), (1, b"a", 2, 2, 2, 2), (0, b"a", 3, 3, 3, 3)]
    assert len(Members.from_rows(rows[:2], digests=True)) == 2
    with pytest.raises(ValueError, match="a"):
        Members.from_rows(rows, digests=True)


def test_any_damage_of_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.members"
    Members.from_rows([(0, b"a", 1, 2, 3, 4), (0, b"bc", 5, 6, 7, 8)], digests=True).write(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(TargetError):
            Members.read(path)
        path.write_bytes(content[:place])
        with pytest.raises(TargetError):
            Members.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Members.read(path)
