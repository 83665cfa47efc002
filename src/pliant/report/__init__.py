"""One HTML page about one or more runs, for a person who looks rather than reads.

The page needs nothing but itself: figures are inline SVG, there are no scripts and no requests. The
same folders give the same bytes. Whatever comes from a run (names, config, environment) is text and
nothing else: jinja2 escapes it, matplotlib must not read it as mathematics, and characters that do
not print are replaced.

Cost is summed over all lines of timing.jsonl; what a killed run did twice stands there once.
"""

from pliant.report.page import write_report

__all__ = ["write_report"]
