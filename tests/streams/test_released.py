"""Sets that a user may have, by small files in their layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pliant.core import UsageError
from pliant.streams import lra_listops, ptb_xl

LINES = "Source\tTarget\n( ( ( [MAX 4 ) 9 ) ] )\t9\n( ( ( ( [SM 7 ) ( ( ( [MIN 3 ) 8 ) ] ) ) 2 ) ] )\t2\n5\t5\n"


def test_expressions_of_the_arena_are_those_of_the_generator(tmp_path: Path) -> None:
    (tmp_path / "basic.tsv").write_text(LINES)
    found = lra_listops(tmp_path / "basic.tsv")
    assert found.values.tolist() == [9, 2, 5]
    assert found.mask.sum(1).tolist() == [4, 8, 1]
    assert found.tokens[0].tolist() == [0, 0, 0, 0, 11, 4, 9, 14]
    assert found.tokens[1].tolist() == [13, 7, 10, 3, 8, 14, 2, 14]
    for wrong in (LINES.replace("\t9", "\t8"), LINES.replace("MAX", "AVG"), "Source\tTarget\n", "a\tb\n1\t1\n"):
        (tmp_path / "basic.tsv").write_text(wrong)
        with pytest.raises(UsageError, match="ListOps cannot be read"):
            lra_listops(tmp_path / "basic.tsv")
    with pytest.raises(UsageError, match="ListOps cannot be read"):
        lra_listops(tmp_path / "none.tsv")


def test_electrocardiograms_have_their_superclasses_and_folds(tmp_path: Path) -> None:
    (tmp_path / "records100").mkdir()
    (tmp_path / "scp_statements.csv").write_text(
        ",description,diagnostic_class\nNORM,normal,NORM\nIMI,inferior,MI\nSR,rhythm,\nLVH,left,HYP\n"
    )
    codes = ["{'NORM': 100.0, 'SR': 0.0}", "{'IMI': 50.0, 'LVH': 0.0}", "{'SR': 0.0}"]
    rows = [f'{i},"{code}",{i + 1},records100/{i}' for i, code in enumerate(codes)]
    (tmp_path / "ptbxl_database.csv").write_text("\n".join(["ecg_id,scp_codes,strat_fold,filename_lr", *rows]) + "\n")
    samples = np.random.default_rng(0).integers(-2000, 2000, (3, 1000, 12)).astype("<i2")
    for i, record in enumerate(samples):
        record.tofile(tmp_path / "records100" / f"{i}.dat")
    found = ptb_xl(tmp_path)
    assert found.labels.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]] and found.folds.tolist() == [1, 2]
    torch.testing.assert_close(found.inputs, torch.from_numpy(samples[:2].astype(np.float32) / 1000))
    samples[0, :5].tofile(tmp_path / "records100" / "1.dat")
    with pytest.raises(UsageError, match=r"1\.dat has 60 samples"):
        ptb_xl(tmp_path)
    with pytest.raises(UsageError, match="PTB-XL cannot be read"):
        ptb_xl(tmp_path / "none")
