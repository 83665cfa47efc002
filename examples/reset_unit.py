"""A unit of the network is made new in mid-stream, moments of the optimizer included."""

from typing import Any

import torch
from torch import nn

from pliant.learn import Learner, bptt, prequential
from pliant.measure.scores import Accuracy, Scores
from pliant.models import SequenceClassifier
from pliant.optim import Probe, Upkeep, adamw
from pliant.streams import digits, drift


class RenewUnit(Upkeep):
    """Every so many updates, give the next unit of a hidden layer fresh input weights and silent output weights."""

    def __init__(self, every: int):
        self.every, self.next = every, 0

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        pass

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        if probe.update % self.every:
            return {}
        mlp = model.stack.blocks[0].mlp
        into, out, unit = mlp.linear_in, mlp.linear_out, self.next % mlp.linear_out.in_features
        into.weight[unit].normal_(std=into.in_features**-0.5, generator=probe.generator)
        out.weight[:, unit].zero_()
        for parameter, where in ((into.weight, (unit,)), (out.weight, (slice(None), unit))):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment][where] = 0
        self.next += 1
        return {"renewed": unit}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def main(questions: int = 200) -> tuple[int, float]:
    stream = drift.relabel(digits(batch=16, questions=questions), every=1600)
    torch.manual_seed(0)
    model = SequenceClassifier(8, 10, width=32, depth=1, readout="mean")
    learner = Learner(model, adamw(model, 3e-3), bptt(8), keep=[RenewUnit(every=20)])
    scores = Scores(accuracy=Accuracy())
    renewed = sum(len(record.upkeep) > 0 and "renewed" in record.upkeep[0]
                  for record in prequential(stream, learner, scores))  # fmt: skip
    return renewed, scores.value()["accuracy"]


if __name__ == "__main__":
    renewed, accuracy = main()
    print(f"{renewed} units renewed while learning, accuracy {accuracy:.3f}")
