"""Run folders to report on, and what holds for every page."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

MEMBERS = {"pliant": 1.0, "majority": 3.3, "no-change": 3.0, "frozen": 2.5, "retrained": 1.5}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def make_run(folder: Path, windows: int = 8, finished: bool = True, schema: int = 1, **config: Any) -> Path:
    """A run folder with plain curves; 500 answers a window, a task every 2,000."""
    folder.mkdir(parents=True)
    config = {"change": "permute", "answers": 4000, "retrain": 2000} | config
    write(folder / "config.json", {"schema": schema, "command": "learn digits", "config": config})
    write(folder / "environment.json", {"pliant": "0.1.0", "packages": {"torch": "2.13.0"}, "commit": None})
    records = [record(index) for index in range(windows)]
    timing = [{"answers": row["answers"], "session": 0, "seconds": 2.0 * (index + 1), "rss": 400 << 20,
               "cpu": {"pliant": 0.5, "majority": 0.01, "no-change": 0.01, "frozen": 0.2, "retrained": 1.0}}
              for index, row in enumerate(records)]  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    if finished:
        write(folder / "summary.json", summary(500 * windows))
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def record(index: int) -> dict[str, Any]:
    worse = 0.1 * (index % 4)
    members = {name: {"answers": 500, "bits": bits + worse, "accuracy": 0.5} for name, bits in MEMBERS.items()}
    members["no-change"]["bits"] = 3.0
    return {"answers": 500 * (index + 1), "update": 31, "task": index // 4, "nats": 1.0, "outcomes": {"updated": 31},
            "members": members}  # fmt: skip


def summary(answers: int) -> dict[str, Any]:
    bins = [{"count": 10, "confidence": 0.1 * i, "accuracy": 0.09 * i} for i in range(1, 10)]
    members = {
        name: {"answers": answers, "bits": bits, "total_bits": bits * answers, "bits_saved": (3.0 - bits) * answers,
               "accuracy": 0.75, "brier": 0.3, "calibration": 0.04, "kappa": 0.7, "temporal_kappa": 0.6,
               "visits": {"first visit": {"accuracy": 0.71, "bits": 1.1}, "held out": {"accuracy": 0.72, "bits": 1.2}},
               "reliability": [*bins, {"count": 0, "confidence": math.nan, "accuracy": math.nan}], "missed": 0}
        for name, bits in MEMBERS.items()
    }  # fmt: skip
    return {"answers": answers, "updates": 250, "reference": "no-change", "members": members, "parameters": 1234}


class Page(HTMLParser):
    """Tags, texts and attributes of a page; complains about tags that do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check(page: str) -> Page:
    """What holds for every page."""
    parsed = Page(page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
    for tag, attrs in parsed.tags:
        assert tag not in {"script", "iframe", "object", "img"}
        assert not any(name.startswith("on") for name in attrs)
        links = [attrs[name] or "" for name in ("href", "src", "xlink:href") if name in attrs]
        assert all(link == "data:," or (link.startswith("#") and link[1:] in ids) for link in links)
        for name in re.findall(r"url\(#?(.*?)\)", " ".join(value or "" for value in attrs.values())):
            assert name in ids
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page
    assert "@import" not in page
    return parsed


CLASSES = {"pliant": 0.4, "majority": 1.0, "no-change": 0.6, "frozen": 0.8, "retrained": 0.5, "boosting": 0.45,
           "hoeffding-tree": 0.55, "adaptive-forest": 0.42}  # fmt: skip
NUMBERS = {"pliant": 1.1, "mean": 2.9, "no-change": 2.0, "seasonal": 1.2, "frozen": 1.9, "retrained": 1.4,
           "boosting": 1.3, "hoeffding-tree": 1.6, "adaptive-forest": 1.5}  # fmt: skip


def make_table_run(
    folder: Path, numbers: bool = False, windows: int = 8, features: int = 5, groups: int = 3, **more: Any
) -> Path:
    """A run on a table; 500 answers a window. `more` goes over the summary."""
    folder.mkdir(parents=True)
    members, answers = NUMBERS if numbers else CLASSES, 500 * windows
    config = {"data": "power.csv", "target": "demand", "task": "forecast" if numbers else "classify",
              "horizon": 24 if numbers else 0, "delay": 0, "retrain": 2000}  # fmt: skip
    write(folder / "config.json", {"schema": 1, "command": "learn series", "config": config})
    drifts = np.random.default_rng(0).normal(size=(windows, features)).cumsum(0).round(3).tolist()
    records, timing = [], []
    for index, drift in enumerate(drifts):
        scores = {
            name: {"answers": 500, "bits": bits} | ({"error": 10 * bits} if numbers else {"accuracy": 1 - bits / 4})
            for name, bits in members.items()
        }
        named = {f"feature {number}": value if index else None for number, value in enumerate(drift)}
        records.append({"answers": 500 * (index + 1), "update": 15, "task": None, "members": scores, "drift": named})
        timing.append({"answers": 500 * (index + 1), "session": 0, "seconds": 2.0 * (index + 1), "rss": 400 << 20,
                       "cpu": {name: 0.1 * bits for name, bits in members.items()}})  # fmt: skip
    write_lines(folder / "records.jsonl", records)
    write_lines(folder / "timing.jsonl", timing)
    tops = {
        "answers": answers, "reference": "no-change",
        "members": {name: table_member(bits, members["no-change"], answers, numbers) for name, bits in members.items()},
        "changes": [{"answers": 1000, "name": "adwin"}, {"answers": 2500, "name": "adwin"}],
        "groups": {f"group {index}": {"answers": 900 - index, "bits_saved": 90.0, "accuracy": 0.9, "error": 5.0}
                   for index in range(groups)},
        "problems": {"a cell held text where a number was expected": 7, "a row was short": 12},
        "notes": ["The labels came late."], "seconds": 16.0, "rows_per_second": 250.0,
        "latency": {"predict": {"p50": 0.2, "p99": 0.4, "p999": 1.9}, "learn": {"p50": 0.35, "p99": 6.5, "p999": 11.0}},
        "cpu_seconds": {name: 0.1 * bits * windows for name, bits in members.items()},
    }  # fmt: skip
    write(folder / "summary.json", tops | more)
    return folder


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table_member(bits: float, reference: float, answers: int, numbers: bool) -> dict[str, Any]:
    plain = {"answers": answers, "bits": bits, "total_bits": bits * answers, "bits_saved": (reference - bits) * answers}
    if numbers:
        levels = [{"level": level, "inside": 0.94 * level} for level in (0.5, 0.9, 0.99)]
        return plain | {"error": 10 * bits, "relative_error": bits / reference, "coverage": levels, "missed": 2}
    bins = [{"count": 10, "confidence": 0.1 * i, "accuracy": 0.09 * i} for i in range(4, 10)]
    return plain | {"accuracy": 1 - bits / 4, "brier": 0.3, "calibration": 0.04, "kappa": 0.7, "temporal_kappa": 0.2,
                    "reliability": bins}  # fmt: skip
