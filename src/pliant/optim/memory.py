"""Upkeep that retains what was learned: it adds to the gradient of an update.

- `Replay`: questions from all of the past are learned from again
- `EWC`: parameters that past answers depend on are held

Staying able to learn and not forgetting are two things; these are what the second one is commonly measured with.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import UsageError, leaves, map_state
from pliant.core.change import Detector
from pliant.optim.base import Lesson, Probe, Upkeep


class Reservoir:
    """A uniform sample of all rows that have been offered, without knowing how many will be (Vitter 1985, algorithm R).

    A row is one stream's part of a lesson. Memory: `size` rows, each as long as the longest question; shorter ones end
    in steps that do not exist. Rows from which nothing may be learned are passed over.
    """

    def __init__(self, size: int):
        self.size, self.seen = size, 0
        self.parts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def offer(self, lesson: Lesson, generator: torch.Generator) -> None:
        """Each row takes a place with probability size over rows so far."""
        rows = lesson.use.flatten(1).any(1).nonzero()[:, 0].tolist()
        draws = torch.rand(len(rows), dtype=torch.float64, generator=generator).tolist()
        taken: dict[int, int] = {}
        for row, draw in zip(rows, draws, strict=True):
            place = self.seen if self.seen < self.size else int(draw * (self.seen + 1))
            self.seen += 1
            if place < self.size:
                taken[place] = row
        if taken:
            self._write(lesson, list(taken), list(taken.values()))

    def draw(self, count: int, generator: torch.Generator, like: Callable[[], Any]) -> Lesson:
        """That many rows, or all if there are fewer, each at most once; `like()` is a state of the right kind."""
        rows = torch.randperm(len(self), generator=generator)[:count]
        return self.rows(rows, like)

    def rows(self, rows: Tensor, like: Callable[[], Any]) -> Lesson:
        """These of the rows."""
        fresh = like()
        device = next(leaves(fresh))[1].device  # of the model: what was loaded may be elsewhere
        part = {name: value[rows.to(value.device)].to(device) for name, value in self.parts.items()}
        state = iter([value for name, value in part.items() if name.startswith("before.")])
        before = map_state(lambda leaf: next(state), fresh)
        return Lesson(part["inputs"], part["reset"], part["mask"], before, part["targets"], part["use"])

    def clear(self) -> None:
        """Begin anew."""
        self.seen, self.parts = 0, {}

    def _write(self, lesson: Lesson, places: list[int], rows: list[int]) -> None:
        values = lesson._asdict()
        values |= {f"before.{name}": leaf for name, leaf in leaves(values.pop("before"))}
        steps = max(lesson.mask.shape[1], self.parts["mask"].shape[1] if self.parts else 0)
        for name, value in values.items():
            timed = not name.startswith("before.")
            value = _longer(value[torch.tensor(rows, device=value.device)], steps if timed else None)
            if name not in self.parts:
                self.parts[name] = value.new_zeros(self.size, *value.shape[1:])
            self.parts[name] = _longer(self.parts[name].to(value.device), steps if timed else None)
            self.parts[name][torch.tensor(places, device=value.device)] = value

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.parts = {name: value.clone() for name, value in state["parts"].items()}


class Replay(Upkeep):
    """Experience replay: each update also descends the mean code length of answers drawn from all of the past.

    Papers: Chaudhry et al. 2019, arXiv:1902.10486 (a reservoir, and joint steps); Vitter 1985, ACM Trans. Math. Softw.
    11(1) (the reservoir). A row is kept with the state of its stream before the question, so that it may stand in the
    middle of an episode. That state is as the parameters of its time made it and grows stale as they move; the
    gradient goes back to it and no further. Where questions are episodes neither matters. What is replayed is the
    code length, `model.nats`, also under a learner with a loss of its own.

    Args:
        size: rows in memory.
        batch: rows that an update learns from once more.
        strength: weight of their mean code length; the newest answers have 1.

    Raises:
        UsageError: an argument is out of range, or the model has no `nats`.
    """

    def __init__(self, size: int = 500, batch: int = 16, strength: float = 1.0):
        if size < 1 or batch < 1 or strength < 0:
            raise UsageError(f"Replay: size is {size}, batch {batch}, strength {strength}; expected >= 1, >= 1, >= 0")
        self.batch, self.strength = batch, strength
        self.memory = Reservoir(size)

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        _has_nats(model, "Replay")

    def gradient(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> None:
        if len(self.memory):
            lesson = self.memory.draw(self.batch, probe.generator, lambda: _state_like(model, self.memory))
            output = answered(model, lesson)
            nats = model.nats(output[lesson.use], lesson.targets[lesson.use])  # type: ignore[operator]
            (self.strength * nats.mean()).backward()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        # Not before the update is made: what is not finite must not come back for ever.
        for lesson in probe.lessons:
            self.memory.offer(lesson, probe.generator)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])


class EWC(Upkeep):
    """Elastic weight consolidation, online: a penalty strength / 2 · Σ_i F_i (θ_i - θ*_i)² beside the loss.

    At a consolidation θ* becomes the present parameters and F <- decay · F + E[g²], with g the gradient of the code
    length of one row's answers: the diagonal of the Fisher information. Papers: Kirkpatrick et al. 2017,
    arXiv:1612.00796 (the penalty); Schwarz et al. 2018, arXiv:1805.06370, section 4 (one anchor, decaying F). Rows
    are a uniform sample of those learned from since the last consolidation. Memory: two copies of the parameters and
    `samples` rows.

    Args:
        strength: λ. With a mean over answers as the loss, 1 gives the past the weight of as many answers as the
            present has.
        every: updates from one consolidation to the next; None means that only `detector` says.
        detector: gets the loss of each update in nats and says when its level has risen. It says so some updates
            after the change, and θ* is what the parameters are then.
        decay: γ of the old F.
        samples: rows over which g² is averaged; each takes a backward pass.
        fisher: where the answers in g come from. "sampled": from the model's own distribution, one for each target,
            an unbiased estimate of the Fisher information; for logits of classes. "empirical": the true ones; their
            g² is zero where the model is right and sure, and not a Fisher information (Kunstner et al. 2019,
            arXiv:1905.12558), but it needs no distribution to draw from.

    Raises:
        UsageError: an argument is out of range, or the model has no `nats`.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        every: int | None = None,
        detector: Detector | None = None,
        decay: float = 1.0,
        samples: int = 100,
        fisher: Literal["sampled", "empirical"] = "sampled",
    ):
        if every is None and detector is None:
            raise UsageError("EWC: neither a number of updates nor a detector says when to consolidate")
        if strength < 0 or (every is not None and every < 1) or not 0 <= decay <= 1 or samples < 1:
            raise UsageError(
                f"EWC: strength is {strength}, every {every}, decay {decay}, samples {samples}; "
                "expected >= 0, >= 1, 0 to 1, >= 1"
            )
        if fisher not in ("sampled", "empirical"):
            raise UsageError(f"EWC: fisher is {fisher!r}, expected sampled or empirical")
        self.strength, self.every, self.detector = strength, every, detector
        self.decay, self.fisher = decay, fisher
        self.memory = Reservoir(samples)
        self.times = 0

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        _has_nats(model, "EWC")
        self.params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.anchor = [p.detach().clone() for p in self.params]
        self.weight = [torch.zeros_like(p) for p in self.anchor]

    @torch.no_grad()
    def gradient(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> None:
        if not self.times:
            return
        pull = torch._foreach_sub(self.params, self.anchor)
        torch._foreach_mul_(pull, self.weight)
        torch._foreach_mul_(pull, self.strength)
        moved = [i for i, p in enumerate(self.params) if p.requires_grad]
        for i in moved:
            if self.params[i].grad is None:
                self.params[i].grad = torch.zeros_like(self.params[i])
        torch._foreach_add_([self.params[i].grad for i in moved], [pull[i] for i in moved])

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        risen = self.detector is not None and self.detector.update(probe.nats)
        if not risen:  # what came with a rise is of the new regime
            for lesson in probe.lessons:
                self.memory.offer(lesson, probe.generator)
        if not len(self.memory) or not (risen or (self.every is not None and probe.update % self.every == 0)):
            return {}
        torch._foreach_mul_(self.weight, self.decay)
        torch._foreach_add_(self.weight, self.information(model, probe.generator))
        torch._foreach_copy_(self.anchor, [p.detach() for p in self.params])
        self.memory.clear()
        self.times += 1
        return {"consolidated": True}

    def information(self, model: nn.Module, generator: torch.Generator) -> list[Tensor]:
        """Mean of g² over the rows in memory, for each parameter."""
        total = [torch.zeros_like(p) for p in self.anchor]
        for row in range(len(self.memory)):
            lesson = self.memory.rows(torch.tensor([row]), lambda: _state_like(model, self.memory))
            with torch.enable_grad():
                output, targets = answered(model, lesson)[lesson.use], lesson.targets[lesson.use]
                if self.fisher == "sampled":
                    targets = _sampled(output.detach(), targets, generator)
                nats = model.nats(output, targets).sum()  # type: ignore[operator]
                moved = [i for i, p in enumerate(self.params) if p.requires_grad]  # some may have been frozen since
                found = torch.autograd.grad(nats, [self.params[i] for i in moved], allow_unused=True)
            for i, g in zip(moved, found, strict=True):
                if g is not None:
                    total[i].addcmul_(g, g)
        torch._foreach_div_(total, len(self.memory))
        return total

    def state_dict(self) -> dict[str, Any]:
        return {
            "anchor": self.anchor,
            "weight": self.weight,
            "memory": self.memory.state_dict(),
            "times": self.times,
            "detector": {} if self.detector is None else self.detector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.anchor, list(state["anchor"]))
        torch._foreach_copy_(self.weight, list(state["weight"]))
        self.memory.load_state_dict(state["memory"])
        self.times = state["times"]
        if self.detector is not None:
            self.detector.load_state_dict(state["detector"])


def answered(model: nn.Module, lesson: Lesson) -> Tensor:
    """What the model answers to the question of a lesson now, `(R, T, ...)`."""
    output, _ = model(lesson.inputs, lesson.before, reset=lesson.reset, mask=lesson.mask)
    return output


def _sampled(output: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    if targets.is_floating_point():
        raise UsageError("EWC: the answers are numbers, which it cannot draw; set fisher='empirical'")
    chances = F.softmax(output.float(), -1).to(generator.device)
    return torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(targets.shape).to(targets.device)


def _state_like(model: nn.Module, memory: Reservoir) -> Any:
    return model.init_state(1, tuple(memory.parts["inputs"].shape[3:-1]))  # type: ignore[operator]


def _longer(value: Tensor, steps: int | None) -> Tensor:
    """With that many steps, the new ones all zero: masked, and not to be learned from."""
    if steps is None or value.shape[1] == steps:
        return value
    return torch.cat([value, value.new_zeros(len(value), steps - value.shape[1], *value.shape[2:])], 1)


def _has_nats(model: nn.Module, who: str) -> None:
    if not hasattr(model, "nats"):
        raise UsageError(f"{who}: {type(model).__name__} has no nats(output, targets), which says what to descend")
