"""A model, how it learns, and the memory of the streams it follows."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.core import Answer, Question, Record, UsageError, detach, from_leaves, generator, leaves, moved, stack
from pliant.kernels._gated_block import Sink
from pliant.learn.base import Predictor, rows_of
from pliant.learn.held import Held, Known
from pliant.learn.rules import Asked, Rule, Together, Trace, bptt, through
from pliant.learn.traces import Taped, Traces
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
        rule: Rule | None = None,
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
        self.traces = Traces(model, self.rule) if isinstance(self.rule, Trace) else None
        self.keep = list(keep)
        self.loss, self.streams, self.remember = loss, streams, remember
        self.after_update, self.reuse, self.clip_norm = after_update, reuse, clip_norm
        self.generator = generator(seed, "learner")
        self.updates = 0
        self.forgotten = 0
        self.memory: Any = None
        self.output: Tensor | None = None
        self._held = Held()
        self._tape: tuple[int, list[tuple[int, int]], Taped] | None = None  # time, parameters, the pass
        self._shape: tuple[Any, Any] | None = None  # of an input, and its type
        # With a loss of its own, somebody may ask autograd for gradients; otherwise it is enough that they are there.
        self._sink = Sink() if loss is None else None
        if self.traces is not None and self._sink is None:
            self.traces.at_once = False
        for upkeep in self.keep:
            upkeep.init(model, optimizer)

    @property
    def device(self) -> torch.device:
        """Of the model. Questions and answers may come from anywhere; outputs and the memory are there."""
        parameter: Tensor = self.optimizer.param_groups[0]["params"][0]
        return parameter.device

    def predict(self, question: Question) -> Tensor:
        """Answer. Reads parameters; moves the memory of the streams and nothing else.

        Raises:
            UsageError: the question does not fit the streams that this learner follows.
        """
        self._check(question)
        question = moved(question, self.device)
        if question.time in self._held and self.traces is not None:  # asked again: the border has to be behind it
            self.finish()
            self._pass(list(self._held.asked.values()))
        if self.memory is None:
            self.streams = self.streams or len(question.rows)
            extra = tuple(question.inputs.shape[2:-1])
            self.memory = self.model.init_state(self.streams, extra)  # type: ignore[operator]
        traces = self.traces
        reuse = self.reuse and self.rule.alone(question, self._held.newest) and not (traces and traces.at_once)
        recording = traces.recording() if reuse and traces is not None else nullcontext({})
        with torch.set_grad_enabled(reuse), self._sink or nullcontext(), recording as calls:
            output, after, seen = self.rule.run(self.model, question, self.memory)
        # What is kept for a gradient is not given away.
        self.output = output.detach().clone() if reuse else output.detach()
        self._shape = question.inputs.shape[2:], question.inputs.dtype
        self._held.ask(Asked.of(question, self.memory, self.output, seen))
        self._tape = (question.time, self._places(), Taped(output, calls)) if reuse else None
        self.memory = detach(after) if reuse else after
        if len(self._held.open) > self.remember:
            self._held.open.popitem(last=False)
            self.forgotten += 1
        self._make_room()
        if self._held.full:
            self._held.keep(self._needed())
        return self.output

    def said(self, answer: Answer) -> Tensor | None:
        if answer.time not in self._held.open:
            return None
        asked = self._held.asked[answer.time]
        return rows_of(asked.said, asked.question.rows, answer.rows)

    def learn(self, answer: Answer) -> Record:
        """Make one update from what was true; whatever happened is in the record.

        A loss or gradient that is not finite changes nothing and is an outcome, not an error.
        """
        held = self._held
        if answer.time not in held.open:
            return Record(self.updates, answer.time, "forgotten")
        answer = moved(answer, self.device)
        known = Known.of(answer)
        learned = known.learned
        self.forget(answer)
        outcome = "nothing to learn"
        if learned:
            if not self.rule.revisit and not held.due:
                held.known.clear()
            held.learn(known)
            outcome = "gathered"
        if held.due and (self._passable() or self._ripe()):
            return self._learn_due(answer)
        self._pass(self._passable())
        return Record(self.updates, answer.time, outcome)

    def finish(self) -> Record | None:
        """Learn what was gathered and still waits for an update, such as that of a chunk which is not full."""
        if not (due := [time for time in self._held.due if time in self._held.known]):
            return None
        return self._learn_due(self._held.known[due[-1]][-1].answer)

    def _ripe(self) -> bool:
        """Whether as much was gathered as the rule waits for, though an older question may keep the border back."""
        if self.rule.every:
            return self.rule.every <= self._held.gathered
        return self.traces is not None and self._held.steps_due() >= self.traces.rule.chunk

    def _learn_due(self, answer: Answer) -> Record:
        learned = self._held.gathered
        outcome, nats, reports = self._updates(answer)
        if not self.rule.revisit:
            self._held.known.clear()
        self._pass(self._passable())
        return Record(self.updates, answer.time, outcome, nats, learned if outcome == "updated" else 0, reports)

    def forget(self, answer: Answer) -> None:
        """Take note of an answer without learning from it: a final one closes its question."""
        if answer.final:
            self._held.open.pop(answer.time, None)

    def close(self) -> None:
        """Wait for no answer any more."""
        self._held.open.clear()
        self._tape = None
        self._held.keep(self._needed())

    def restart(self) -> None:
        """Streams begin anew, and what waits for an answer is dropped; parameters, moments and upkeep stay."""
        self._held, self._tape = Held(), None
        self.memory = self.output = None
        if self.traces is not None:
            self.traces.values.clear()

    def grow(self, streams: int) -> None:
        """Make room for more streams; the new ones are fresh, what is known of the others stays.

        Raises:
            UsageError: fewer than there are.
        """
        if streams < (self.streams or 1):
            raise UsageError(f"Learner: {streams} streams, expected at least the {self.streams or 1} that there are")
        if self.memory is None:
            self.streams = streams
            return
        assert self.streams is not None
        more = self._like(dict(leaves(self.memory)), streams - self.streams)
        self.streams, self.memory = streams, stack([self.memory, more])
        for time, asked in self._held.asked.items():
            self._held.asked[time] = asked._replace(before=stack([asked.before, more]))
        if self.traces is not None:
            self.traces.grow(streams)

    def memory_error(self) -> float:
        """Distance between the memory and what the present parameters would have made of the window.

        Relative: the norm of the difference over the norm of the recomputed memory, floats only.
        """
        if not self._held:  # or none since the last border
            return 0.0
        _, again = self._again()
        pairs = [(a.double(), b.double()) for (_, a), (_, b) in zip(leaves(self.memory), leaves(again), strict=True)
                 if a.is_floating_point()]  # fmt: skip
        apart = sum(float((a - b).square().sum()) for a, b in pairs)
        size = sum(float(b.square().sum()) for _, b in pairs)
        return math.sqrt(apart / size) if size else 0.0

    def _updates(self, answer: Answer) -> tuple[str, float, tuple[dict[str, Any], ...]]:
        """One update from all that has been gathered; more only if answers about questions far apart came together."""
        due = self._held.take_due()
        outcome, nats = "nothing to learn", math.nan
        reports: tuple[dict[str, Any], ...] = ()
        while due:
            reached = self.rule.reach(self._held.back_from(due[-1]))
            outcome, nats, more = self._update(reached, answer, due)
            reports += more
            times = {asked.question.time for asked in reached}
            due = [time for time in due if time not in times and time in self._held]
        return outcome, nats, reports

    def _update(
        self, reached: list[Asked], answer: Answer, due: list[int]
    ) -> tuple[str, float, tuple[dict[str, Any], ...]]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        _clear(parameters)
        nats = self._descend(reached, answer)
        if not math.isfinite(nats):
            return "non-finite loss", nats, ()
        probe = Probe(self.updates + 1, self.generator, reached[-1].question, nats)
        adding = [upkeep for upkeep in self.keep if type(upkeep).gradient is not Upkeep.gradient]
        if adding:
            probe = probe._replace(lessons=self._held.lessons(reached, due))
            with torch.enable_grad():
                for upkeep in adding:
                    upkeep.gradient(self.model, self.optimizer, probe)
        finite = self._gradient_is_finite([p.grad for p in parameters if p.grad is not None])
        if finite:
            self.optimizer.step()
        _clear(parameters)
        if not finite:
            return "non-finite gradient", nats, ()
        self.updates += 1
        with torch.no_grad():
            reports = tuple(upkeep.apply(self.model, self.optimizer, probe) for upkeep in self.keep)
        if self.after_update == "recompute":
            self._held.asked, self.memory = self._again()
        return "updated", nats, reports

    def _passable(self) -> list[Asked]:
        """The oldest questions, if they make a chunk and wait for no answer: the border may move over them."""
        if self.traces is None:
            return []
        found = list(self._held.answered())
        return found if sum(asked.steps for asked in found) >= self.traces.rule.chunk else []

    def _pass(self, questions: list[Asked], moved: bool = False) -> None:
        """Move the border over the oldest questions, which are then forgotten; the traces may be there already."""
        if not questions:
            return
        assert self.traces is not None
        if not moved:
            tape = self._take_tape(questions)
            calls = None if tape is None else tape.calls
            tape = None  # what is kept for a gradient may go
            graph = self.reuse and len(questions) == 1 and questions[0].steps == self.traces.rule.chunk
            self.traces.move_border(self.model, questions, self._sink, calls, graph)
        for asked in questions:
            self._held.drop(asked.question.time)

    def _make_room(self) -> None:
        """No question waits at the border for longer than it takes to ask `remember` others."""
        held = self._held
        if self.traces is None or len(held) <= self.remember:
            return
        oldest = next(iter(held.open))
        since = len(held) - list(held.asked).index(oldest)
        if since > self.remember:
            del held.open[oldest]
            self.forgotten += 1
        # An update goes first, but where nobody learns any more what was gathered is lost.
        if not held.due or since > 2 * self.remember:
            self._pass(self._passable())

    def _descend(self, reached: list[Asked], answer: Answer) -> float:
        """The loss; where that is finite, its gradient is in `grad` of the parameters then."""
        tape = self._take_tape(reached)
        if self.traces is not None:
            return self._descend_by_traces(self.traces, reached, answer, tape)
        if tape is None and (nats := self._at_once(reached)) is not None:
            return nats
        with torch.enable_grad():
            with self._sink or nullcontext():
                outputs = self.rule.replay(self.model, reached) if tape is None else [tape.output]
            loss = self._loss(reached, outputs, answer)
        nats = float(loss.detach())
        if math.isfinite(nats):
            loss.backward()
        return nats

    def _descend_by_traces(self, traces: Traces, reached: list[Asked], answer: Answer, tape: Taped | None) -> float:
        """The same; and the border moves on, by the parameters of the gradient, as far as nothing is waited for."""
        passing = self._passable()
        moved, nats = len(passing) == len(reached), None
        loss = partial(self._loss, reached, answer=answer)
        if self._sink is not None:
            nats = traces.quickly(self.model, reached, partial(self._in_one_pass, reached, loss), self._sink, moved)
        if nats is None:
            nats = traces.descend(self.model, reached, loss, moved, self._sink, tape)
        self._pass(passing, moved)
        return nats

    def _in_one_pass(self, reached: list[Asked], loss: Callable[[list[Tensor]], Tensor], together: Together) -> float:
        """The loss of a pass over these questions, its gradient put where the sink says."""
        if together.seen is not None and (nats := self._at_once(reached, together)) is not None:
            return nats
        assert together.inputs is not None and self._sink is not None
        with torch.enable_grad(), self._sink:
            parts = together.inputs, together.reset, together.mask, together.seen
            output, _ = through(self.model, together.before, *parts)
            total = loss(together.apart(output, reached))
            nats = float(total.detach())
            if math.isfinite(nats):
                total.backward()
        return nats

    def _at_once(self, reached: list[Asked], together: Together | None = None) -> float | None:
        """As `_descend`, by a model that has a way without autograd; None if it may not be taken."""
        descend = getattr(self.model, "descend", None)
        if descend is None or self._sink is None or self.device.type != "cpu":
            return None
        together = self.rule.together(reached) if together is None else together
        if together is None:
            return None
        told = self._held.told(reached) if together.places is None else self._held.placed(reached, together)
        if told is None:
            return None
        return descend(together.seen, together.before, *told, reset=together.reset, mask=together.mask, sink=self._sink)

    def _loss(self, reached: list[Asked], outputs: list[Tensor], answer: Answer) -> Tensor:
        """Of the outputs for each question reached, or of the one for all of them."""
        if self.loss is not None and self.traces is not None:
            every = [self.loss(rows_of(output, asked.question.rows, part.answer.rows), part.answer)
                     for asked, output in zip(reached, outputs, strict=True)
                     for part in self._held.known.get(asked.question.time, [])]  # fmt: skip
            return torch.stack(every).mean()
        if self.loss is not None:
            last = reached[-1]
            return self.loss(rows_of(outputs[-1][:, -last.steps :], last.question.rows, answer.rows), answer)
        if len(outputs) == 1 and (told := self._held.told(reached)) is not None:
            return self._mean_nats(outputs[0], *told)
        if len(outputs) < len(reached):
            outputs = list(outputs[0].split([asked.steps for asked in reached], 1))
        said, truth = [], []
        for asked, output in zip(reached, outputs, strict=True):
            for part in self._held.known.get(asked.question.time, []):
                said.append(rows_of(output, asked.question.rows, part.answer.rows)[part.use])
                truth.append(part.answer.targets[part.use])
        return self.model.nats(torch.cat(said), torch.cat(truth)).mean()  # type: ignore[operator]

    def _mean_nats(self, said: Tensor, targets: Tensor, use: Tensor | None) -> Tensor:
        # Choosing first spares the head's backward pass over steps that have no target.
        if use is not None:
            said, targets = said[use], targets[use]
        return self.model.nats(said, targets).mean()  # type: ignore[operator]

    def _gradient_is_finite(self, gradients: list[Tensor]) -> bool:
        """Whether it is; if so it is clipped."""
        sink = self._sink
        if sink is not None and sink.flat is not None and sink.holds_all(gradients):
            gradients = [sink.flat]
            size = math.sqrt(float(sink.flat @ sink.flat))  # sooner there than the norm
        else:
            size = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(size):
            return False
        if self.clip_norm is not None and size > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / (size + 1e-6))
        return True

    def _take_tape(self, reached: list[Asked]) -> Taped | None:
        """The pass of `predict` with its graph, if running the model again would give the same; it serves once."""
        kept, self._tape = self._tape, None
        if kept is None:
            return None
        time, places, tape = kept
        same = time == reached[-1].question.time and len(reached) == 1 and places == self._places()
        return tape if same else None

    def _places(self) -> list[tuple[int, int]]:
        """Where the parameters are, and how often they were written to."""
        return [(p.data_ptr(), p._version) for group in self.optimizer.param_groups for p in group["params"]]

    def _again(self) -> tuple[OrderedDict[int, Asked], Any]:
        """The window run again with the present parameters: the questions with new memories, and the last memory."""
        past = self.rule.reach(reversed(self._held.asked.values()))
        if not past:
            return self._held.asked, self.memory
        memory, renewed = past[0].before, self._held.asked.copy()
        with torch.no_grad():
            for asked in past:
                renewed[asked.question.time] = asked._replace(before=memory)
                _, memory, _ = self.rule.run(self.model, asked.question, memory)
        return renewed, detach(memory)

    def _needed(self) -> set[int]:
        """Times of questions that wait or are within the window of one that waits or is to come."""
        due = set(self._held.due)
        newest_first = reversed(self._held.asked.values())
        return self.rule.needed(newest_first, lambda time: time in self._held.open or time in due)

    def _check(self, question: Question) -> None:
        now = question.inputs
        if self._shape is not None:
            shape, dtype = self._shape
            if now.shape[2:] != shape or now.dtype != dtype:
                raise UsageError(
                    f"Learner: the stream's question changed shape, from {dtype} (B, T, "
                    f"{', '.join(map(str, shape))}) to {now.dtype} (B, T, "
                    f"{', '.join(map(str, now.shape[2:]))}); a learner follows streams of one shape"
                )
        if question.time in self._held.open:
            raise UsageError(f"Learner: question {question.time} is already waiting; give each its own time")
        if self.streams is not None and (largest := max(question.rows.tolist(), default=-1)) >= self.streams:
            raise UsageError(
                f"Learner: the question is about stream {largest} but the memory holds {self.streams}; "
                f"make the learner with streams={largest + 1}"
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
            **self._held.state_dict(self._needed()),
            "traces": None if self.traces is None else self.traces.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a learner built the same way.

        Raises:
            UsageError: it was taken under another learning rule, or the traces are of other kinds, shapes or types.
        """
        if (state["traces"] is None) != (self.traces is None):
            raise UsageError("Learner: the state was taken under another learning rule, with traces or without")
        if self.traces is not None:
            self.traces.check(state["traces"])
        self.model.load_state_dict(state["model"])
        # torch takes the moments as they are; a copy keeps two learners from sharing them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for upkeep, part in zip(self.keep, state["keep"], strict=True):
            upkeep.load_state_dict(part)
        self.generator.set_state(state["generator"])
        self.updates, self.forgotten, self.streams = state["updates"], state["forgotten"], state["streams"]
        self.output, self.memory, self._tape = state["output"], None, None
        self._shape, like = None, None
        if state["memory"] is not None:
            like = self._like(state["memory"])
            self.memory = from_leaves(state["memory"], like)
        self._held.load_state_dict(state, like, self.device)
        if (newest := self._held.newest) is not None:
            self._shape = newest.question.inputs.shape[2:], newest.question.inputs.dtype
        if self.traces is not None:
            self.traces.load_state_dict(state["traces"], self.device)

    def _like(self, table: dict[str, Tensor], streams: int | None = None) -> Any:
        """A fresh state of the right kind, whose extra axes are those that `table` shows."""
        streams = self.streams if streams is None else streams
        plain = self.model.init_state(streams)  # type: ignore[operator]
        for name, leaf in leaves(plain):
            if extra := table[name].shape[1 : 1 + table[name].ndim - leaf.ndim]:
                return self.model.init_state(streams, tuple(extra))  # type: ignore[operator]
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
            else:
                setattr(twin, name, None if name == "_tape" else copy.deepcopy(value, memo))
        # Copying an optimizer drops its hooks; they get the optimizer as an argument, so ours can be shared.
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(twin.optimizer, hooks, OrderedDict(getattr(self.optimizer, hooks)))
        return twin


def _clear(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
