"""A model, how it learns, and the memory of the streams it follows."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.core import Answer, Question, Record, UsageError, detach, from_leaves, generator, leaves
from pliant.learn.base import Predictor, rows_of
from pliant.learn.rules import Asked, Bptt, bptt
from pliant.optim import Probe, Upkeep

Loss = Callable[[Tensor, Answer], Tensor]
"""(output `(R, T, ...)`, answer) -> scalar to descend."""


class Learner(Predictor):
    """Answers a stream, and changes the model when answers come.

    Args:
        model: has `init_state`, `forward(inputs, state, reset=, mask=)` and, unless `loss` is given,
            `nats(output, targets) -> (R, T, ...)`.
        optimizer: any `torch.optim.Optimizer` over the model's parameters.
        rule: the learning rule; None means `bptt(32)`.
        keep: upkeep, applied in this order after each update.
        loss: what to descend; None means the mean code length of the targets that may be learned.
        streams: how many streams the memory holds; None means as many as the first question has.
        remember: questions that may wait for an answer at the same time; beyond that the oldest is forgotten.
        after_update: what the memory means once the parameters have moved. `"carry"`: it stays as the
            old parameters made it. `"recompute"`: the window is run again with the new ones, at the
            cost of one more forward pass. `memory_error` tells how much is at stake.
        reuse: learn from the forward pass of `predict` where it is still valid, rather than repeat it.
        clip_norm: largest norm of a gradient; None leaves it as it is.
        seed: of the generator that upkeep draws from.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Bptt | None = None,
        keep: Sequence[Upkeep] = (),
        *,
        loss: Loss | None = None,
        streams: int | None = None,
        remember: int = 128,
        after_update: Literal["carry", "recompute"] = "carry",
        reuse: bool = True,
        clip_norm: float | None = 1.0,
        seed: int = 0,
    ):
        if after_update not in ("carry", "recompute"):
            raise UsageError(f"Learner: after_update is {after_update!r}, expected carry or recompute")
        if remember < 1:
            raise UsageError(f"Learner: remember is {remember}, expected at least 1 question")
        self.model, self.optimizer = model, optimizer
        self.rule = bptt(32) if rule is None else rule
        self.keep = list(keep)
        self.loss, self.streams, self.remember = loss, streams, remember
        self.after_update, self.reuse, self.clip_norm = after_update, reuse, clip_norm
        self.generator = generator(seed, "learner")
        self.updates = 0
        self.forgotten = 0
        self.memory: Any = None
        self.output: Tensor | None = None
        self._asked: OrderedDict[int, Asked] = OrderedDict()
        self._open: OrderedDict[int, None] = OrderedDict()  # an ordered set: questions that wait for answers
        self._tape: tuple[int, int, Tensor] | None = None  # time, updates, output with its graph
        for upkeep in self.keep:
            upkeep.init(model, optimizer)

    def predict(self, question: Question) -> Tensor:
        """Answer. Reads parameters; moves the memory of the streams and nothing else.

        Raises:
            UsageError: the question does not fit the streams that this learner follows.
        """
        self._check(question)
        if self.memory is None:
            self.streams = self.streams or len(question.rows)
            extra = tuple(question.inputs.shape[2:-1])
            self.memory = self.model.init_state(self.streams, extra)  # type: ignore[operator]
        with torch.set_grad_enabled(self.reuse):
            output, after = self.rule.run(self.model, question, self.memory)
        self.output = output.detach()
        self._asked[question.time] = Asked(question, self.memory, self.output)
        self._open[question.time] = None
        self._tape = (question.time, self.updates, output) if self.reuse else None
        self.memory = detach(after)
        if len(self._open) > self.remember:
            self._open.popitem(last=False)
            self.forgotten += 1
        self._prune()
        return self.output

    def said(self, answer: Answer) -> Tensor | None:
        if answer.time not in self._open:
            return None
        asked = self._asked[answer.time]
        return rows_of(asked.said, asked.question.rows, answer.rows)

    def learn(self, answer: Answer) -> Record:
        """Make one update from what was true; whatever happened is in the record.

        A loss or gradient that is not finite changes nothing and is an outcome, not an error.
        """
        if answer.time not in self._open:
            return Record(self.updates, answer.time, "forgotten")
        learned = int((answer.learn_mask & answer.target_mask).sum())
        if learned:
            outcome, nats, reports = self._update(answer)
        else:
            outcome, nats, reports = "nothing to learn", math.nan, ()
        self.forget(answer)
        return Record(self.updates, answer.time, outcome, nats, learned if outcome == "updated" else 0, reports)

    def forget(self, answer: Answer) -> None:
        """Take note of an answer without learning from it: a final one closes its question."""
        if answer.final and answer.time in self._open:
            del self._open[answer.time]
            self._prune()

    def memory_error(self) -> float:
        """Distance between the memory and what the present parameters would have made of the window.

        Relative: the norm of the difference over the norm of the recomputed memory, floats only.
        """
        if not self._asked:
            return 0.0
        _, again = self._again()
        pairs = [(a.double(), b.double()) for (_, a), (_, b) in zip(leaves(self.memory), leaves(again), strict=True)
                 if a.is_floating_point()]  # fmt: skip
        apart = sum(float((a - b).square().sum()) for a, b in pairs)
        size = sum(float(b.square().sum()) for _, b in pairs)
        return math.sqrt(apart / size) if size else 0.0

    def _update(self, answer: Answer) -> tuple[str, float, tuple[dict[str, Any], ...]]:
        past = self._past(answer.time)
        with torch.enable_grad():
            tape = self._valid_tape(past)
            output = self.rule.replay(self.model, past) if tape is None else tape
            said = rows_of(output, past[-1].question.rows, answer.rows)
            loss = self._loss(said, answer)
        self._tape = None
        nats = float(loss.detach())
        if not math.isfinite(nats):
            return "non-finite loss", nats, ()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self._gradient_is_finite():
            self.optimizer.zero_grad(set_to_none=True)
            return "non-finite gradient", nats, ()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        probe = Probe(self.updates, self.generator, past[-1].question)
        with torch.no_grad():
            reports = tuple(upkeep.apply(self.model, self.optimizer, probe) for upkeep in self.keep)
        if self.after_update == "recompute":
            self._asked, self.memory = self._again()
        return "updated", nats, reports

    def _loss(self, said: Tensor, answer: Answer) -> Tensor:
        if self.loss is not None:
            return self.loss(said, answer)
        use = answer.learn_mask & answer.target_mask
        # Choosing first spares the head's backward pass over steps that have no target.
        return self.model.nats(said[use], answer.targets[use]).mean()  # type: ignore[operator]

    def _gradient_is_finite(self) -> bool:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            return False
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm, norm
            )
        return True

    def _valid_tape(self, past: list[Asked]) -> Tensor | None:
        """The output of `predict` with its graph, if running the model again would give the same."""
        if self._tape is None:
            return None
        time, updates, output = self._tape
        same = time == past[-1].question.time and updates == self.updates
        return output if same and self.rule.first(past) == len(past) - 1 else None

    def _past(self, time: int) -> list[Asked]:
        """The questions that are still held, up to the one at `time`."""
        past = []
        for asked in self._asked.values():
            past.append(asked)
            if asked.question.time == time:
                break
        return past

    def _again(self) -> tuple[OrderedDict[int, Asked], Any]:
        """The window run again with the present parameters: the questions with new memories, and the last memory."""
        past = list(self._asked.values())
        start = self.rule.first(past)
        memory, renewed = past[start].before, self._asked.copy()
        with torch.no_grad():
            for asked in past[start:]:
                renewed[asked.question.time] = asked._replace(before=memory)
                _, memory = self.rule.run(self.model, asked.question, memory)
        return renewed, detach(memory)

    def _prune(self) -> None:
        """Drop questions that neither wait nor are within the window of one that waits or is to come."""
        past, needed = list(self._asked.values()), []
        oldest = next(iter(self._open), None)
        for asked in past:
            needed.append(asked)
            if asked.question.time == oldest:
                break
        spare = self.rule.spare(needed) if oldest is None else self.rule.first(needed)
        for asked in needed[:spare]:
            del self._asked[asked.question.time]

    def _check(self, question: Question) -> None:
        last = next(reversed(self._asked.values()), None)
        if last is not None:
            before, now = last.question.inputs, question.inputs
            if now.shape[2:] != before.shape[2:] or now.dtype != before.dtype:
                raise UsageError(
                    f"Learner: the stream's question changed shape, from {before.dtype} (B, T, "
                    f"{', '.join(map(str, before.shape[2:]))}) to {now.dtype} (B, T, "
                    f"{', '.join(map(str, now.shape[2:]))}); a learner follows streams of one shape"
                )
            if question.time in self._open:
                raise UsageError(f"Learner: question {question.time} is already waiting; give each its own time")
        if self.streams is not None and int(question.rows.max()) >= self.streams:
            raise UsageError(
                f"Learner: the question is about stream {int(question.rows.max())} but the memory holds "
                f"{self.streams}; make the learner with streams={int(question.rows.max()) + 1}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as nested plain values and tensors."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "keep": [upkeep.state_dict() for upkeep in self.keep],
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "forgotten": self.forgotten,
            "streams": self.streams,
            "output": self.output,
            "memory": None if self.memory is None else dict(leaves(self.memory)),
            "asked": [(tuple(q), dict(leaves(before)), said) for q, before, said in self._asked.values()],
            "open": list(self._open),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a learner built the same way."""
        self.model.load_state_dict(state["model"])
        # torch takes the moments as they are; a copy keeps two learners from sharing them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for upkeep, part in zip(self.keep, state["keep"], strict=True):
            upkeep.load_state_dict(part)
        self.generator.set_state(state["generator"])
        self.updates, self.forgotten, self.streams = state["updates"], state["forgotten"], state["streams"]
        self.output, self.memory, self._tape = state["output"], None, None
        self._asked.clear()
        if state["memory"] is not None:
            questions = [Question(*question) for question, _, _ in state["asked"]]
            like = self._like(state["memory"])
            self.memory = from_leaves(state["memory"], like)
            for question, (_, before, said) in zip(questions, state["asked"], strict=True):
                self._asked[question.time] = Asked(question, from_leaves(before, like), said)
        self._open = OrderedDict.fromkeys(state["open"])

    def _like(self, table: dict[str, Tensor]) -> Any:
        """A state of the right kind, whose extra axes are those that `table` shows."""
        plain = self.model.init_state(self.streams)  # type: ignore[operator]
        for name, leaf in leaves(plain):
            if extra := table[name].shape[1 : 1 + table[name].ndim - leaf.ndim]:
                return self.model.init_state(self.streams, tuple(extra))  # type: ignore[operator]
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> "Learner":
        """A learner that shares nothing with this one and continues to the same bits."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            if name == "generator":
                twin.generator = torch.Generator()
                twin.generator.set_state(self.generator.get_state())
            elif name == "memory":
                twin.memory = value  # states are never changed in place
            elif name == "_asked":
                twin._asked = value.copy()
            else:
                setattr(twin, name, None if name == "_tape" else copy.deepcopy(value, memo))
        # Copying an optimizer drops its hooks; they get the optimizer as an argument, so ours can be shared.
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(twin.optimizer, hooks, OrderedDict(getattr(self.optimizer, hooks)))
        return twin
