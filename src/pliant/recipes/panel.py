"""The learner and its opponents in one loop, and how each of them is scored."""

from collections.abc import Mapping
from typing import Any

from pliant.learn import Predictor, Timed
from pliant.learn.loops import Opponents
from pliant.measure.scores import (
    Accuracy,
    Bits,
    Brier,
    Calibration,
    Grouped,
    Kappa,
    Scores,
    TemporalKappa,
    bits_saved,
)

LEARNER, REFERENCE = "pliant", "no-change"


class Member:
    """A predictor under a clock, with its scores of the running window and of everything before it."""

    def __init__(self, predictor: Predictor, visits: tuple[str, ...]):
        self.timed = Timed(predictor)
        self.visits = visits
        self.window = Scores(
            bits=Bits(),
            accuracy=Accuracy(),
            brier=Brier(),
            calibration=Calibration(),
            kappa=Kappa(),
            temporal_kappa=TemporalKappa(),
            visit_bits=Grouped(Bits(), by="visit"),
            visit_accuracy=Grouped(Accuracy(), by="visit"),
        )
        self.total = self.window.fresh()

    def cut(self) -> dict[str, Any]:
        """Values of the window, which is then added to the total and begins anew."""
        row = {"answers": self.window["bits"].count, "bits": self.window["bits"].value(),
               "accuracy": self.window["accuracy"].value()}  # fmt: skip
        self.total = self.total.merge(self.window)
        # In place, because the loop holds on to the object.
        self.window.load_state_dict(self.window.fresh().state_dict())
        return row

    def summary(self, reference: "Member") -> dict[str, Any]:
        """Totals, and bits saved against `reference`."""
        bits = self.total["bits"]
        plain = {
            name: self.total[name].value() for name in ("accuracy", "brier", "calibration", "kappa", "temporal_kappa")
        }
        names = dict(enumerate(self.visits))
        by_visit = {kind: self.total[f"visit_{kind}"].value() for kind in ("bits", "accuracy")}
        return {
            "answers": bits.count,
            "bits": bits.value(),
            "total_bits": bits.total(),
            "bits_saved": bits_saved(reference.total["bits"], bits),
            **plain,
            "visits": {
                names[visit]: {kind: values[visit] for kind, values in by_visit.items()}
                for visit in sorted(by_visit["bits"])
            },
            "reliability": self.total["calibration"].table(),
            "missed": bits.missed,
        }


class Panel:
    """Members by name, the learner first; a part of a life."""

    def __init__(self, learner: Predictor, opponents: Mapping[str, Predictor], visits: tuple[str, ...]):
        self.members = {name: Member(who, visits) for name, who in {LEARNER: learner, **opponents}.items()}

    @property
    def learner(self) -> Member:
        return self.members[LEARNER]

    @property
    def opponents(self) -> Opponents:
        """As `prequential` takes them."""
        return {name: (who.timed, who.window) for name, who in self.members.items() if name != LEARNER}

    @property
    def answers(self) -> int:
        """Answers scored so far."""
        return int(self.learner.total["bits"].count + self.learner.window["bits"].count)

    def cut(self) -> dict[str, Any]:
        """The window of every member; see `Member.cut`."""
        return {name: member.cut() for name, member in self.members.items()}

    def summary(self) -> dict[str, Any]:
        return {name: member.summary(self.members[REFERENCE]) for name, member in self.members.items()}

    def saved(self) -> dict[str, float]:
        """Bits of every member saved against the reference up to the last cut."""
        reference = self.members[REFERENCE].total["bits"]
        return {name: bits_saved(reference, member.total["bits"]) for name, member in self.members.items()}

    def seconds(self) -> dict[str, float]:
        """Processor seconds of every member since this process began."""
        return {name: member.timed.seconds for name, member in self.members.items()}

    def state_dict(self) -> dict[str, Any]:
        """Scores of all, and the opponents; the learner is a part of the life in its own right."""
        return {
            name: {
                "window": member.window.state_dict(),
                "total": member.total.state_dict(),
                "predictor": None if name == LEARNER else member.timed.state_dict(),
            }
            for name, member in self.members.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, member in self.members.items():
            member.window.load_state_dict(state[name]["window"])
            member.total.load_state_dict(state[name]["total"])
            if name != LEARNER:
                member.timed.load_state_dict(state[name]["predictor"])
