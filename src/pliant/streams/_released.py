"""Sets that are not carried by any package, read from the files of their release when a user has them.

- PTB-XL, 12-lead electrocardiograms of 10 s at 100 Hz: Wagner et al. 2020, doi:10.1038/s41597-020-0495-6; the five
  superclasses and the split by folds (1 to 8 to learn from, 9 to choose by, 10 to test on) are the recommended ones
- ListOps of the Long Range Arena: Tay et al. 2021, arXiv:2011.04006
"""

import ast
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pliant.core import UsageError
from pliant.streams._listops import TOKENS, value_of

SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
LEADS, STEPS, PER_MILLIVOLT = 12, 1000, 1000


class Electrocardiograms(NamedTuple):
    """inputs `(N, 1000, 12)` float32 in millivolts; labels `(N, 5)` float32, 1 for each of `SUPERCLASSES` that a record
    has; folds `(N,)` int64, 1 to 10."""

    inputs: Float[Tensor, "N T F"]
    labels: Float[Tensor, "N C"]
    folds: Int[Tensor, "N"]


class Expressions(NamedTuple):
    """tokens `(N, T)` uint8, by `TOKENS` of `listops`, at the end of each row; mask `(N, T)`: which there are; values
    `(N,)` int64."""

    tokens: UInt8[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    values: Int[Tensor, "N"]


def ptb_xl(folder: str | Path) -> Electrocardiograms:
    """The records of PTB-XL at 100 Hz; those without any superclass are left out, as is usual.

    Args:
        folder: holds `ptbxl_database.csv`, `scp_statements.csv` and `records100`, as PhysioNet has them.

    Raises:
        UsageError: files are missing, or are no such records.
    """
    folder = Path(folder)
    try:
        with open(folder / "scp_statements.csv", newline="", encoding="utf-8") as file:
            classes = {row[""]: row["diagnostic_class"] for row in csv.DictReader(file) if row["diagnostic_class"]}
        with open(folder / "ptbxl_database.csv", newline="", encoding="utf-8") as file:
            rows = [(row, set(map(classes.get, ast.literal_eval(row["scp_codes"])))) for row in csv.DictReader(file)]
        rows = [(row, own) for row, own in rows if own & set(SUPERCLASSES)]
        found = np.stack([_record(folder / f"{row['filename_lr']}.dat") for row, _ in rows])
        folds = torch.tensor([int(row["strat_fold"]) for row, _ in rows])
    except (OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UsageError(f"PTB-XL cannot be read from {folder} ({type(error).__name__}: {error})") from None
    labels = torch.tensor([[float(name in own) for name in SUPERCLASSES] for _, own in rows])
    return Electrocardiograms(torch.from_numpy(found), labels, folds)


def _record(path: Path) -> np.ndarray:
    """Samples of 16 bits, lead after lead at each step (WFDB's format 16)."""
    samples = np.fromfile(path, "<i2")
    if samples.size != STEPS * LEADS:
        raise ValueError(f"{path.name} has {samples.size} samples, expected {STEPS * LEADS}")
    return samples.reshape(STEPS, LEADS).astype(np.float32) / PER_MILLIVOLT


def lra_listops(path: str | Path) -> Expressions:
    """Expressions and their values from a file of the Long Range Arena, such as `basic_train.tsv`.

    Brackets that only group are no tokens, as in `listops`.

    Raises:
        UsageError: it cannot be read, or an expression has another value than it says.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = list(_expressions(file))
        if not found:
            raise ValueError("no expressions")
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"ListOps cannot be read from {path} ({type(error).__name__}: {error})") from None
    longest = max(len(tokens) for tokens, _ in found)
    rows, mask = torch.zeros(len(found), longest, dtype=torch.uint8), torch.zeros(len(found), longest, dtype=torch.bool)
    for row, there, (tokens, _) in zip(rows, mask, found, strict=True):
        row[longest - len(tokens) :] = torch.tensor(tokens, dtype=torch.uint8)
        there[longest - len(tokens) :] = True
    return Expressions(rows, mask, torch.tensor([value for _, value in found]))


def _expressions(file: Iterator[str]) -> Iterator[tuple[list[int], int]]:
    places = {token: place for place, token in enumerate(TOKENS)}
    for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 2):
        tokens = [places[word] for word in row["Source"].split() if word not in "()"]
        if value_of(tokens) != int(row["Target"]):
            raise ValueError(f"line {number} says {row['Target']} and has the value {value_of(tokens)}")
        yield tokens, int(row["Target"])
