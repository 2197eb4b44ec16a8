from __future__ import annotations

import pytest

from imagenet_unpack.dataset.names import original_name, train_wnid


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01440764_10026_n01440764.JPEG", ("n01440764_10026.JPEG", "n01440764")),
        ("ILSVRC2012_val_00000293_n01440764.JPEG", ("ILSVRC2012_val_00000293.JPEG", "n01440764")),
        ("ILSVRC2012_test_00000001.JPEG", ("ILSVRC2012_test_00000001.JPEG", None)),
        ("n01440764_10026.JPEG", ("n01440764_10026.JPEG", None)),
        ("ILSVRC2012_val_00000293.JPEG", ("ILSVRC2012_val_00000293.JPEG", None)),
        ("n01440764_10026_n0144076.JPEG", ("n01440764_10026_n0144076.JPEG", None)),
    ],
)
def test_an_appended_wnid_is_split_off(name: str, expected: tuple[str, str | None]) -> None:
    assert original_name(name) == expected


def test_the_wnid_of_a_train_name() -> None:
    assert train_wnid("n01440764_10026.JPEG") == "n01440764"
    assert train_wnid("ILSVRC2012_val_00000293.JPEG") is None
    assert train_wnid("n01440764_10026_n01440764.JPEG") is None
