"""Trials of a benchmark: one record for each key, made once and kept in a file; and a command line for them."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """Records in a file of JSON lines, `{"key": ..., what the run returned}`. Several processes may add to it.

    Attributes:
        file: where they stand.
        run: makes what is to be known of a key, whose parts are its arguments; `"cpu seconds"` is among it.
        tuning: the seed of runs that only choose a setting, of which `brief` is kept.
        brief: names of what is kept of these.
        told: what is printed of a record.
    """

    file: Path
    run: Callable[..., Record]
    tuning: int | None = None
    brief: tuple[str, ...] = ("mean", "cpu seconds")
    told: Callable[[Record], str] = lambda record: f"{record['mean']:.4f}"

    def records(self) -> list[Record]:
        """All that there are; a line that a kill cut short is left out."""
        if not self.file.exists():
            return []
        found = (_read(line) for line in self.file.read_text().splitlines())
        return [record for record in found if record is not None]

    def once(self, **key: Any) -> Record:
        """The record of a key, which is made if it is not there."""
        for record in self.records():
            if record["key"] == key:
                return record
        found = self.run(**key)
        if self.tuning is not None and key["seed"] == self.tuning:
            found = {name: found[name] for name in self.brief}
        record = {"key": key, **found}
        self.file.parent.mkdir(exist_ok=True)
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with open(self.file, "a") as file:
            file.write("\n" * cut + json.dumps(record) + "\n")
        print(*key.values(), self.told(record), f"{record['cpu seconds']} s", flush=True)
        return record

    def best(self, keys: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The key with the greatest mean; the first of them that have it."""
        return max(keys, key=lambda key: self.once(**key)["mean"])

    def command(
        self,
        work: Callable[..., None],
        draw: Callable[[Sequence[Record], Sequence[int]], None],
        ledger: Callable[[Sequence[Record], Sequence[int]], None],
        **filters: Sequence[Any],
    ) -> None:
        """`--draw` the page, or write the `--ledger`, or else `work`, with what was chosen of `filters` by their names.

        Args:
            work: runs what is missing.
            draw, ledger: get all records and the seeds that count, which are one of the filters.
            filters: what may be chosen, and is if nothing else is said.
        """
        parser = argparse.ArgumentParser()
        for name, values in filters.items():
            # Further seeds may be asked for; of everything else there is what there is.
            few = {"choices": list(values)} if isinstance(values[0], str) else {}
            parser.add_argument(f"--{name}", nargs="*", type=type(values[0]), default=list(values), **few)
        parser.add_argument("--draw", action="store_true")
        parser.add_argument("--ledger", action="store_true")
        chosen = vars(parser.parse_args())
        shown = [show for name, show in (("draw", draw), ("ledger", ledger)) if chosen.pop(name)]
        for show in shown:
            show(self.records(), chosen["seeds"])
        if not shown:
            work(**chosen)


def _read(line: str) -> Record | None:
    try:
        return dict(json.loads(line))
    except json.JSONDecodeError:
        return None
