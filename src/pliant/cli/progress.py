"""What is shown while a run goes on."""

import contextlib
import math
from typing import Any


@contextlib.contextmanager
def live_table(title: str, total: int | None, main: str) -> Any:
    """A live table on a terminal, a line now and then elsewhere; both on standard error."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    task = progress.add_task("", total=total)
    told = [-math.inf]

    def table(row: dict[str, Any], saved: dict[str, float], cpu: dict[str, float]) -> Table:
        columns = ("", "bits per answer", "bits saved so far", main, "CPU s")
        place = "" if row["task"] is None else f" · task {row['task']}"
        grid = Table(*columns, title=title + place, title_justify="left")
        for name, member in row["members"].items():
            style = "bold" if name == "pliant" else ""
            cells = (f"{member['bits']:.3f}", f"{saved[name]:,.0f}", f"{member[main]:.4g}", f"{cpu[name]:.1f}")
            grid.add_row(name, *cells, style=style)
        return grid

    with Live(console=console, refresh_per_second=4, auto_refresh=False) as live:

        def show(answers: int, row: dict[str, Any], saved: dict[str, float], cpu: dict[str, float]) -> None:
            progress.update(task, completed=answers)
            if console.is_terminal:
                live.update(Group(table(row, saved, cpu), progress), refresh=True)
            elif answers - told[0] >= (total or 100_000) / 10:
                told[0] = answers
                ours = row["members"]["pliant"]
                place = "" if row["task"] is None else f", task {row['task']}"
                console.print(f"{answers:,} answers{place}: {ours['bits']:.3f} bits per answer, "
                              f"{main} {ours[main]:.4g}")  # fmt: skip

        yield show
