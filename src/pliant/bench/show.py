"""Results for the eye: tables, and figures as SVG."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pliant.bench.compare import COPY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

# Okabe and Ito: told apart by everybody.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#7A5195")
MARKS = "osD^vP*Xh"


def duration(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}" if factor < 10 else f"{factor:,.0f}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.2f}"


def times_table(found: Mapping[str, Any]) -> "Table":
    """What `measure` found: times, and the memory of forward and backward."""
    from rich.table import Table

    table = Table("", "", "by", "median", "least", "quartiles", "/ copy", "/ first", "kept MiB", "peak MiB")
    for case in found["cases"]:
        memory = {row["who"]: row for row in case["memory"]}
        name, before = case["name"], None
        for row in case["times"]:
            shown = memory.get(row["who"], {}) if row["what"] == "forward+backward" else {}
            table.add_row(
                name, row["what"] if row["what"] != before else "", row["who"], duration(row["median"]),
                duration(row["min"]), f"{duration(row['q1'])} to {duration(row['q3'])}",
                *("" if row["who"] == COPY else _times(row[f"over {whom}"]) for whom in ("copy", "first")),
                _mebibytes(shown.get("kept")), _mebibytes(shown.get("peak")),
            )  # fmt: skip
            name, before = "", row["what"]
        table.add_section()
    return table


def lengths_table(found: Mapping[str, Any]) -> "Table":
    """What `measure_lengths` found: medians of forward and backward, a column for each length."""
    from rich.table import Table

    rows = [row for row in found["lengths"] if row["what"] == "forward+backward"]
    lengths = sorted({row["steps"] for row in rows})
    table = Table("forward+backward, T =", *(f"{steps:,}" for steps in lengths))
    for name in dict.fromkeys(row["case"] for row in rows):
        cells = {row["steps"]: duration(row["median"]) for row in rows if row["case"] == name}
        table.add_row(name, *(cells.get(steps, "") for steps in lengths))
    return table


def lengths_figure(found: Mapping[str, Any]) -> str:
    """Time of forward and backward against T, logarithmic both, with the quartiles."""
    rows = [row for row in found["lengths"] if row["what"] == "forward+backward"]

    def paint(axes: "Axes") -> None:
        for index, name in enumerate(dict.fromkeys(row["case"] for row in rows)):
            own = [row for row in rows if row["case"] == name]
            x, y = [row["steps"] for row in own], [row["median"] for row in own]
            color = COLORS[index % len(COLORS)]
            axes.plot(x, y, color=color, marker=MARKS[index % len(MARKS)], markersize=5, linewidth=1.4, label=name)
            axes.fill_between(x, [row["q1"] for row in own], [row["q3"] for row in own], color=color, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("T, steps")
        axes.set_ylabel("seconds, forward and backward")
        axes.grid(alpha=0.25)
        if rows:
            axes.legend(frameon=False)

    return _svg(7.5, 5.0, paint)


def times_figure(found: Mapping[str, Any]) -> str:
    """Median of forward and backward by whom, with the quartiles, on a logarithmic axis."""
    rows = [
        (f"{case['name']}, {row['who']}", row)
        for case in found["cases"] for row in case["times"] if row["what"] == "forward+backward"
    ]  # fmt: skip

    def paint(axes: "Axes") -> None:
        for place, (_, row) in enumerate(rows):
            color = COLORS[7] if row["who"] == COPY else COLORS[0]
            axes.plot([row["q1"], row["q3"]], [place, place], color=color, linewidth=2)
            axes.plot([row["median"]], [place], color=color, marker="o")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        if rows:
            axes.set_xscale("log")
        axes.set_xlabel("seconds, forward and backward")
        axes.grid(axis="x", alpha=0.25)

    return _svg(7.5, 1 + 0.27 * max(1, len(rows)), paint)


def _svg(width: float, height: float, paint: Any) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # Letters stay letters, and equal figures are equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pliant", "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
