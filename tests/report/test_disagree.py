"""The report says where bits prefer one member and accuracy another."""

import json
from pathlib import Path
from typing import Any

import pytest

from pliant.report.disagree import disagreements
from pliant.report.load import load
from tests.report.pages import MEMBERS, make_run, record, summary, write


def made(folder: Path, accuracy: dict[str, float], noise: float = 0.01, windows: int = 12) -> list[str]:
    """A run in which members have these accuracies, give or take, and the bits of `MEMBERS`."""
    run = make_run(folder, windows)
    rows = [record(index) for index in range(windows)]
    for index, row in enumerate(rows):
        for name, share in accuracy.items():
            row["members"][name]["accuracy"] = share + noise * (-1) ** (index + (name == "pliant"))
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, Any] = summary(500 * windows)
    # Right nine times in ten at a confidence of one half.
    found["members"]["frozen"]["reliability"] = [{"count": 10, "confidence": 0.5, "accuracy": 0.9}]
    write(run / "summary.json", found)
    return disagreements(load(run))


def test_a_member_with_more_right_and_more_bits_is_spoken_of(tmp_path: Path) -> None:
    assert MEMBERS["pliant"] < MEMBERS["frozen"]
    (said,) = made(
        tmp_path / "run", {"pliant": 0.7, "frozen": 0.8, "retrained": 0.6, "majority": 0.2, "no-change": 0.2}
    )
    assert said == (
        "Bits and accuracy disagree: pliant needs 1.50 bits per answer less than frozen, which is right more often, by "
        "10.0 points, but not sure enough: it gives its answers 50% on average and is right 90% of the time."
    )


@pytest.mark.parametrize(
    ("accuracy", "noise", "windows"),
    [({"pliant": 0.9}, 0.01, 12), ({"frozen": 0.51}, 0.3, 12), ({"frozen": 0.8}, 0.01, 4)],
)
def test_nothing_is_said_where_they_agree_or_chance_may_be_it(
    tmp_path: Path, accuracy: dict[str, float], noise: float, windows: int
) -> None:
    assert made(tmp_path / "run", dict.fromkeys(MEMBERS, 0.5) | accuracy, noise, windows) == []
