"""A run as a folder.

config.json        what was asked for, with the schema and the command
records.jsonl      results over time; only what is reproducible, to the byte
timing.jsonl       seconds and memory over time, and what tuning took; differs between two equal runs, each
                   answer stands in it once, however often the run was killed
environment.json   versions, device, threads, commit
lives/update-<n>/  where the run can be continued
summary.json       totals, once the run is complete
report.html        the page for people

All JSON is strict: null stands for what is not finite.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from pliant import __version__
from pliant.core.errors import UsageError
from pliant.core.files import Disk
from pliant.core.plain import dumps

SCHEMA = 1
PACKAGES = ("torch", "numpy", "numba", "safetensors", "scikit-learn")


class Run:
    """The folder of one run, open for writing or reading.

    Raises:
        UsageError: from `create` and `open`, when the folder cannot serve; the message says why.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._records: IO[bytes] | None = None

    @property
    def lives(self) -> Path:
        return self.folder / "lives"

    def exists(self) -> bool:
        return (self.folder / "config.json").exists()

    def create(self, command: str, config: dict[str, Any], *, threads: int) -> None:
        """Make the folder and write its config; it must not hold a run yet."""
        if self.exists():
            raise UsageError(f"{self.folder} already holds a run; continue it with --resume or choose another --run")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write("environment.json", environment() | {"threads": threads})
            self.write("config.json", {"schema": SCHEMA, "command": command, "config": config})
        except OSError as error:
            raise UsageError(f"the run folder {self.folder} cannot be written ({error.strerror or error})") from None

    def config(self, command: str | None = None) -> dict[str, Any]:
        """The config of the run; with `command`, only if the run belongs to it."""
        head = self.read("config.json")
        kinds = {"schema": int, "command": str, "config": dict}
        if not isinstance(head, dict) or not all(isinstance(head.get(name), kind) for name, kind in kinds.items()):
            raise UsageError(f"{self.folder} holds no readable run; give a folder that pliant learn made")
        if head["schema"] > SCHEMA:
            raise UsageError(
                f"{self.folder} was made with schema {head['schema']}, this version reads up to {SCHEMA}; update pliant"
            )
        if command is not None and head["command"] != command:
            raise UsageError(
                f"{self.folder} is a run of 'pliant {head['command']}', not of 'pliant {command}'; choose another --run"
            )
        return dict(head["config"])

    def command(self) -> str:
        return str(self.read("config.json")["command"])

    def write(self, name: str, value: Any) -> None:
        """Put a JSON file into the folder, whole or not at all."""
        Disk().replace_file(self.folder / name, dumps(value, indent=2).encode() + b"\n")

    def read(self, name: str) -> Any:
        """A JSON file of the folder, None if it is not there or not whole."""
        try:
            return json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A JSON Lines file of the folder; a last line that was cut off is left out."""
        try:
            raw = (self.folder / name).read_bytes()
        except OSError:
            return []
        found = []
        for line in raw.split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append(row)
        return found

    @contextmanager
    def begin(self, keep: int) -> Iterator[None]:
        """Within it the records are open for appending, cut to their first `keep` bytes."""
        path = self.folder / "records.jsonl"
        with open(path, "ab") as self._records:
            if self._records.seek(0, os.SEEK_END) < keep:
                raise UsageError(f"{path} is shorter than when the run was saved; it was altered, start anew")
            self._records.truncate(keep)
            self._records.seek(keep)  # cutting does not move the place that `sync` tells
            yield

    def record(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """Append one line of results and one of timing."""
        assert self._records is not None
        self._records.write(dumps(row).encode() + b"\n")
        self._records.flush()
        self.time(timing)

    def time(self, timing: dict[str, Any]) -> None:
        """Append one line of timing."""
        with open(self.folder / "timing.jsonl", "ab") as file:
            # A line that was cut off by a kill must not swallow the next one.
            file.write((b"\n" if _cut_off(self.folder / "timing.jsonl") else b"") + dumps(timing).encode() + b"\n")

    def trim(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Leave out lines of a JSON Lines file, whole or not at all."""
        lines = self.lines(name)
        kept = [line for line in lines if keep(line)]
        if len(kept) < len(lines):
            Disk().replace_file(self.folder / name, b"".join(dumps(line).encode() + b"\n" for line in kept))

    def sync(self) -> int:
        """Force the records to the device; returns their length in bytes."""
        assert self._records is not None
        os.fsync(self._records.fileno())
        return self._records.tell()


def _cut_off(path: Path) -> bool:
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def environment() -> dict[str, Any]:
    """Where a run takes place: versions, machine, threads, commit."""
    import torch  # a run needs it anyway, reading one does not

    return {
        "pliant": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }


def _commit() -> str | None:
    """The commit of the source that runs, "+" if it has been altered; None outside a checkout."""
    here = Path(__file__).parent
    try:
        top = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "--", here], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return top.stdout.strip() + ("+" if changed.stdout.strip() else "") if top.returncode == 0 else None
