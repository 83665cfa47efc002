"""`pliant report RUN ...`: one page about runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pliant.cli.arguments import parse, require


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """One self-contained HTML page about one or more runs."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path | None = None
    """The page to write; default: report.html in the first run."""
    json: bool = False
    """Print where the page is as JSON."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant report` with these arguments."""
    require(arguments, "pliant report needs at least one run folder, such as: pliant report runs/digits-001")
    import tyro

    kind = Annotated[ReportOptions, tyro.conf.arg(name="")]
    from pliant.core.plain import dumps
    from pliant.report import write_report

    options = parse(kind, arguments, "pliant report", None, positional=("runs",))
    page = write_report(options.runs, options.out)
    print(dumps({"report": str(page)}) if options.json else page)
    return 0
