"""Several models on the same texts or tasks: does the one of lowest perplexity have most right?"""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from pliant.core import UsageError
from pliant.measure.perplexity import Comparison, Selection, Summary, TokenScores, compare, intervals, selection
from pliant.report.perplexity import Measured, iso_perplexity

ROWS = (
    ("bits per byte", lambda s: s.bits_per_byte, ".4f"), ("nats per token", lambda s: s.nll, ".4f"),
    ("perplexity", lambda s: s.perplexity, ".4g"), ("right", lambda s: s.accuracy, ".2%"),
    ("nats when right", lambda s: s.right_nll, ".4f"), ("nats when wrong", lambda s: s.wrong_nll, ".4f"),
    ("confidence", lambda s: s.confidence, ".2%"), ("entropy, nats", lambda s: s.entropy, ".4f"),
    ("calibration error", lambda s: s.calibration, ".2%"), ("Brier", lambda s: s.brier, ".4f"),
)  # fmt: skip
"""What the table says of each model."""


class Contest(NamedTuple):
    """What was found.

    Attributes:
        scores: of each model by its name.
        picked: the model of lowest perplexity; by bits per byte if they do not read the same tokens.
        comparisons: of each other model with it.
        selection: how well perplexity picks; None where accuracies cannot be compared.
    """

    scores: Mapping[str, TokenScores]
    picked: str
    comparisons: list[Comparison]
    selection: Selection | None

    def found(self) -> dict[str, Any]:
        """Everything, as plain values."""
        chosen = None
        if self.selection is not None:
            names = list(self.scores)
            places = {"picked": names[self.selection.picked], "most_right": names[self.selection.best]}
            chosen = self.selection._asdict() | places
            del chosen["best"]
        models = [{"name": name, **_of(scores.value()), "positions": _positions(scores),
                   "reliability": scores.reliability()} for name, scores in self.scores.items()]  # fmt: skip
        return {"models": models, "picked": self.picked, "selection": chosen,
                "comparisons": [_plain(one) for one in self.comparisons]}  # fmt: skip

    def lines(self) -> list[str]:
        """For a person: a table, positions, what is picked, and a verdict for each other model."""
        summaries = {name: scores.value() for name, scores in self.scores.items()}
        first = next(iter(summaries.values()))
        table = [["", *summaries], ["tokens", *(f"{summary.tokens:,}" for summary in summaries.values())]]
        for label, value, form in ROWS:
            found = [value(summary) for summary in summaries.values()]
            if not all(map(math.isnan, found)):
                table.append([label, *("-" if math.isnan(one) else f"{one:{form}}" for one in found)])
        said = [*_columns(table), ""]
        if len(spans := next(iter(self.scores.values())).by_position()) > 1:
            said += [*_columns(self._positions([span for span, _ in spans])), ""]
        if self.selection is not None and len(summaries) > 2:
            said += [_picks(self.selection, list(summaries)), ""]
        said += [f"{one.names[0]}, {one.names[1]}: {one.sentence}" for one in self.comparisons]
        return said if first.tokens else ["nothing was scored"]

    def _positions(self, spans: list[range]) -> list[list[str]]:
        by = [dict(scores.by_position()) for scores in self.scores.values()]
        head = ["position", *(f"{name}, {what}" for name in self.scores for what in ("nats", "right"))]
        rows = []
        for span in spans:
            name = f"{span.start}" if len(span) == 1 else f"{span.start} to {span.stop - 1}"
            cells = [[f"{one[span].nll:.3f}", f"{one[span].accuracy:.1%}"] if span in one else ["-", "-"] for one in by]
            rows.append([name, *(cell for pair in cells for cell in pair)])
        return [head, *rows]

    def svg(self) -> str:
        """The iso-perplexity figure of those that are not `undrawn`.

        Raises:
            UsageError: none is left.
        """
        left = set(self.undrawn())
        found = [Measured(name, scores.value(), *intervals(scores)) for name, scores in self.scores.items()
                 if name not in left]  # fmt: skip
        if not found:
            raise UsageError("no model has a finite perplexity, so there is nothing to draw")
        return str(iso_perplexity(found, self.picked))

    def undrawn(self) -> list[str]:
        """Models that have no place in the figure: of no finite perplexity, or of other tokens than the picked one."""
        other = {one.names[1] for one in self.comparisons if not one.same_tokens}
        return [name for name, scores in self.scores.items()
                if name in other or not math.isfinite(scores.value().nll)]  # fmt: skip


def contest(scores: Mapping[str, TokenScores], *, seed: int = 0) -> Contest:
    """Compare the model that perplexity picks with each other one.

    Raises:
        UsageError: fewer than two models, or they were not asked the same.
    """
    if len(scores) < 2:
        raise UsageError(f"got {len(scores)} model{'' if len(scores) == 1 else 's'}, expected two or more to compare")
    summaries = {name: one.value() for name, one in scores.items()}
    alike = len({summary.tokens for summary in summaries.values()}) == 1
    lowest = {name: summary.nll if alike else summary.bits_per_byte for name, summary in summaries.items()}
    picked = min(lowest, key=lambda name: math.inf if math.isnan(lowest[name]) else lowest[name])
    comparisons = [compare(scores[picked], one, names=(picked, name), seed=seed)
                   for name, one in scores.items() if name != picked]  # fmt: skip
    chosen = None
    if all(one.same_tokens for one in comparisons):
        nlls, accuracies = (np.array([getattr(s, name) for s in summaries.values()]) for name in ("nll", "accuracy"))
        chosen = selection(nlls, accuracies)
    return Contest(scores, picked, comparisons, chosen)


def _of(summary: Summary) -> dict[str, Any]:
    return summary._asdict() | {"perplexity": summary.perplexity, "bits_per_byte": summary.bits_per_byte}


def _positions(scores: TokenScores) -> list[dict[str, Any]]:
    return [{"first": span.start, "last": span.stop - 1, "tokens": value.tokens, "nll": value.nll,
             "accuracy": value.accuracy} for span, value in scores.by_position()]  # fmt: skip


def _plain(one: Comparison) -> dict[str, Any]:
    nested = {name: getattr(one, name)._asdict() for name in ("nll", "accuracy", "parts")}
    found = {name: value for name, value in one._asdict().items() if name not in ("a", "b")}
    return found | nested | {"names": list(one.names), "critical": list(one.critical)}


def _picks(found: Selection, names: list[str]) -> str:
    pairs = len(list(combinations(names, 2)))
    return (
        f"perplexity picks {names[found.picked]}, most right is {names[found.best]}: {100 * found.regret:.2f} points "
        f"lost; {found.discordance:.0%} of {pairs} pairs are discordant, Kendall's tau {found.tau:+.2f}"
    )


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows with their cells in line, the first left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip
