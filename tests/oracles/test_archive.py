"""The sets of the UCR and UEA archives that aeon carries have the sizes that the archives publish."""

import pytest

pytest.importorskip("aeon")

from pliant.streams import collection

pytestmark = pytest.mark.oracle

SIZES = {  # train, test, longest series, channels, classes
    "ACSF1": (100, 100, 1460, 1, 10),
    "ArrowHead": (36, 175, 251, 1, 3),
    "BasicMotions": (40, 40, 100, 6, 4),
    "GunPoint": (50, 150, 150, 1, 2),
    "ItalyPowerDemand": (67, 1029, 24, 1, 2),
    "JapaneseVowels": (270, 370, 29, 12, 9),
    "OSULeaf": (200, 242, 427, 1, 6),
    "PickupGestureWiimoteZ": (50, 50, 361, 1, 10),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_archives(name: str) -> None:
    train, test, classes = collection(name)
    sizes = len(train.labels), len(test.labels), *train.inputs.shape[1:], len(classes)
    assert sizes == SIZES[name]
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(len(classes)))
    assert not train.inputs[~train.mask].any() and not train.inputs.isnan().any()
