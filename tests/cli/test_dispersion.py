"""`pliant measure dispersion`: a saved model on a text, and what is wrong in one sentence."""

import json
from pathlib import Path

import pytest

from pliant.cli import main
from pliant.core import seeded
from pliant.models.language import LanguageModel


def saved(folder: Path, mixer: str, **options: object) -> str:
    with seeded(0):
        LanguageModel(width=8, depth=2, mixer=mixer, mixer_options=options or None).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("a line of a text, " * 20)
    return str(tmp_path / "text.txt")


def test_heads_of_a_saved_model(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", "FullAttention", num_heads=2, max_steps=48)
    figure = tmp_path / "figure.svg"
    assert main(["measure", "dispersion", model, "--text", text, "--share", "0.1", "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 2 and lines[1].split()[:2] == ["stack.blocks.0.mixer", "0"]
    assert "of 4 heads held 10%" in lines[-1]
    assert figure.read_text().startswith("<?xml") and "stack.blocks.1.mixer" in figure.read_text()
    assert main(["measure", "dispersion", model, "--text", text, "--json", "--tokens", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [head["keys"] for head in found["heads"]] == [[2, 4, 8, 9]] * 4
    assert found["share"] == 0.5 and found["heads"][0]["limit"] >= 2


def test_what_is_wrong_is_one_sentence(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, without = saved(tmp_path / "model", "WindowAttention"), saved(tmp_path / "other", "GatedLRU")
    (tmp_path / "empty.txt").write_text("")
    for arguments, said in (
        ([], "needs a model and a text"),
        ([model], "needs a model and a text"),
        ([model, "--text", text, "--share", "2"], "a share above 0 and at most 1"),
        ([model, "--text", str(tmp_path / "none")], "cannot be read as text"),
        ([model, "--text", str(tmp_path / "empty.txt")], "has 1 token, expected"),
        ([str(tmp_path / "none"), "--text", text], "is not there"),
        ([without, "--text", text], "has no attention"),
    ):
        assert main(["measure", "dispersion", *arguments]) == 2
        assert said in capsys.readouterr().err
