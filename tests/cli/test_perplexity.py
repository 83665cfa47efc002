"""`pliant measure perplexity`: models of ours on texts, logs of lm-eval, what does not fit."""

import json
import math
from pathlib import Path

import pytest
import torch

from pliant.cli import main
from pliant.core import generator, seeded
from pliant.models import ByteTokenizer, LanguageModel

TEXT = "".join(f"line {i}, and line {i + 1} after it\n" for i in range(60))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models over bytes; the second has learned a little."""
    folder = tmp_path_factory.mktemp("models")
    tokens = ByteTokenizer().encode(TEXT)[None, :300]
    for seed, name in enumerate(("fresh", "taught")):
        with seeded(seed):
            model = LanguageModel(width=16, depth=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(30 * seed):
            loss = model.nats(model(tokens[:, :-1])[0], tokens[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return [folder / "fresh", folder / "taught"]


def test_models_on_a_text(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = models[0].parent / "text.txt"
    options = ["--text", str(text), "--piece", "200"]
    figure, kept = tmp_path / "figure.svg", tmp_path / "scores"
    run = ["measure", "perplexity", *map(str, models), *options]
    assert main([*run, "--figure", str(figure), "--save", str(kept)]) == 0
    out, err = capsys.readouterr()
    assert "taught: 9 of 9 documents" in err
    assert "taught, fresh: agree: taught has the lower perplexity" in out
    assert "16 to 31" in out
    assert figure.read_text().startswith("<svg") and "taught" in figure.read_text()
    assert main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["picked"] == "taught"
    assert [model["tokens"] for model in found["models"]] == [len(TEXT)] * 2
    assert found["models"][1]["bits_per_byte"] == pytest.approx(found["models"][1]["nll"] / math.log(2))
    assert found["comparisons"][0]["verdict"] == "agree"
    # What was saved gives the same.
    assert (
        main(["measure", "perplexity", "--scores", *(str(kept / f"{p.name}.safetensors") for p in models), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["comparisons"] == found["comparisons"]


def test_a_model_that_gives_no_numbers_is_never_picked(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with seeded(0):
        model = LanguageModel(width=16, depth=1)
    torch.nn.init.constant_(model.embed.weight, math.nan)
    model.save_pretrained(tmp_path / "hollow")
    text, figure = models[0].parent / "text.txt", tmp_path / "figure.svg"
    run = ["measure", "perplexity", str(tmp_path / "hollow"), *map(str, models), "--text", str(text), "--piece", "200"]
    assert main([*run, "--figure", str(figure)]) == 0
    out, err = capsys.readouterr()
    assert "perplexity picks taught, most right is taught" in out and "hollow gave no numbers" in out
    assert "not in the figure: hollow" in err and "hollow" not in figure.read_text()


def test_what_cannot_be_written_is_told_before_anything_is_scored(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["measure", "perplexity", *map(str, models), "--text", str(models[0].parent / "text.txt")]
    assert main([*run, "--figure", str(tmp_path / "nowhere" / "a.svg")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "there is no folder" in err


def log(path: Path, right_more: float, sure: float, task: str = "sst2") -> Path:
    """A log as lm-eval writes it, of 300 questions with two choices; numbers stand in it as text."""
    random, lines = generator(7, "truth"), []
    for number, luck in enumerate(torch.rand(300, generator=random).tolist()):
        target = number % 2
        best = target if luck < right_more else 1 - target
        pairs = [[str(math.log(sure if i == best else 1 - sure) - 3), "False"] for i in range(2)]
        arguments = {f"gen_args_{i}": {"arg_0": "?", "arg_1": f" {word}"} for i, word in enumerate(("no", "yes"))}
        sample = {"doc_id": number, "target": str(target), "arguments": arguments, "resps": [pairs], "filter": "none",
                  "filtered_resps": pairs, "doc_hash": f"{number:x}", "acc": float(best == target)}  # fmt: skip
        # A second filter says the same once more.
        lines += [json.dumps(sample), json.dumps(sample | {"filter": "other"})]
    path.mkdir()
    (path / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_logs_of_lm_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm, sure = log(tmp_path / "calm", 0.6, 0.6), log(tmp_path / "sure", 0.75, 0.999)
    assert main(["measure", "perplexity", "--scores", str(calm), str(sure), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["comparisons"]
    assert one["verdict"] == "perplexity picks the less accurate model"
    assert one["sentence"].startswith("perplexity picks the less accurate model: it prefers calm by ")
    assert one["documents"] == 300
    summaries = {model["name"]: model for model in found["models"]}
    share = summaries["calm"]["accuracy"]
    assert summaries["calm"]["nll"] == pytest.approx(-share * math.log(0.6) - (1 - share) * math.log(0.4))
    assert summaries["calm"]["brier"] == pytest.approx(share * 2 * 0.16 + (1 - share) * 2 * 0.36)
    assert found["selection"]["most_right"] == "sure" and found["selection"]["picked"] == "calm"
    log_file = next(calm.glob("*.jsonl"))
    assert main(["measure", "perplexity", "--scores", str(log_file), str(sure)]) == 0
    assert "perplexity picks the less accurate model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scores", "{made}/one"], "two models"),
        (["{made}/one", "{made}/two"], "--text"),
        (["--scores", "a", "b", "--text", "c"], "--text needs models"),
        (["{made}/one", "{made}/one", "--text", "{made}/text.txt"], "given twice"),
        (["{made}/no", "{made}/one", "--text", "{made}/text.txt"], "is not there"),
        (["{made}/empty", "{made}/one", "--text", "{made}/text.txt"], "no readable config.json"),
        (["{made}/broken", "{made}/one", "--text", "{made}/text.txt"], "cannot be read"),
        (["{made}/few", "{made}/one", "--text", "{made}/text.txt"], "a model of text has 257"),
        (["{made}/one", "{made}/two", "--text", "{made}/none.txt"], "cannot be read as text"),
        (["{made}/one", "{made}/two", "--text", "{made}/bytes.txt"], "not UTF-8"),
        (["{made}/one", "{made}/two", "--text", "{made}/bad.jsonl"], "line 2"),
        (["{made}/one", "{made}/two", "--text", "{made}/blank.txt"], "holds no text"),
        (["--scores", "{made}/bad.jsonl", "{made}/bad2.jsonl"], "expected a sample of lm-eval"),
        (["--scores", "{made}/blank.txt", "{made}/bad.jsonl"], "holds no samples"),
        (["--scores", "{made}/empty", "{made}/bad.jsonl"], "no log of lm-eval"),
        (["--scores", "{made}/bad.safetensors", "{made}/bad.jsonl"], "holds no scores"),
        (["{made}/one", "{made}/two", "--text", "{made}/text.txt", "--piece", "0"], "at least 1"),
        (["{made}/one", "{made}/two", "--text", "{made}/text.txt", "--figure", "{made}/no/x.svg"], "cannot be written"),
        (["--tex", "a"], "'--text'"),
    ],
)
@pytest.mark.global_rng
def test_one_sentence_names_what_is_wrong(
    arguments: list[str], says: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, source in (("one", models[0]), ("two", models[1])):
        (tmp_path / name).symlink_to(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"num_tokens": 257, "depth": "deep"}')
    LanguageModel(5, width=8).save_pretrained(tmp_path / "few")
    for name, content in (("text.txt", TEXT.encode()), ("bytes.txt", b"\xff"), ("blank.txt", b""),
                          ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n'), ("bad2.jsonl", b'{"doc_id": 1}\n'),
                          ("bad.safetensors", b"no")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert main(["measure", "perplexity", *(argument.format(made=tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("pliant: ") and says in last, err
    assert "Traceback" not in err


def test_the_page_of_kinds_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure"]) == 0
    assert "perplexity" in capsys.readouterr().out
