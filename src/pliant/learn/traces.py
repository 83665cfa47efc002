"""Traces of a model at the border of a chunk, and the gradients that go on by them to all the past before it.

Layers are those mixers in which `traceable` names something; inputs of each are caught as the model calls it, so any
model will do. Across layers a gradient flows as it does inside a chunk; at its border, in each layer, the gradient of
the state goes on by the layer's own traces (see `pliant.learn.trace`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import UsageError, detach, leaves, put, take
from pliant.core.state import map_state, nbytes
from pliant.kernels._gated_block import Sink, Taken
from pliant.learn.rules import Asked, Together, Trace, streams_of, through
from pliant.mixers import GatedLRU, SequenceMixer

Values = dict[str, dict[str, Tensor]]
"""Traces by name of the mixer, then by the name that it gives them."""


class Call(NamedTuple):
    """What a mixer was called with; float leaves of the state are where its gradient arrives."""

    x: Tensor
    state: Any
    reset: Tensor | None
    mask: Tensor | None


class Taped(NamedTuple):
    """A pass that has been made: its output, with a graph, and, if that is known, what mixers were called with."""

    output: Tensor
    calls: Mapping[str, Call]


class Traces:
    """The traces of all streams, where the questions begin that a learner still holds.

    Args:
        model: with at least one mixer that has traces.
        rule: says chunk and kinds.

    Raises:
        UsageError: no mixer has traces, or the policy names something that none has.
    """

    def __init__(self, model: nn.Module, rule: Trace):
        self.rule = rule
        self.mixers = traced(model)
        self.kinds = {name: _kinds(mixer, dict(rule.policy)) for name, mixer in self.mixers.items()}
        self.values: Values = {}
        self.at_once = all(
            type(mixer) is GatedLRU and self.kinds[name] == mixer.kinds(None) for name, mixer in self.mixers.items()
        )
        """Whether the layers are such that a single pass has all of their traces."""
        _check(model, self.mixers, dict(rule.policy))

    def descend(
        self,
        model: nn.Module,
        reached: Sequence[Asked],
        loss: Callable[[list[Tensor]], Tensor],
        advance: bool,
        sink: Sink | None = None,
        tape: Taped | None = None,
    ) -> float:
        """The loss; where that is finite, its gradient is added to `grad` of the parameters.

        Args:
            reached: all questions from the border on, up to the last that is learned from.
            loss: of the outputs for each of them.
            advance: whether the border moves over them.
            sink: where a single pass over a chunk may put gradients.
            tape: the pass over them, if it was made already.
        """
        together = Together.of(reached, inputs=True)
        pieces = _pieces(together, self.rule.chunk)
        if len(pieces) == 1:
            traces = self._taken(together.rows)
            with torch.enable_grad():
                output, calls = tape or self._through(model, together.before, pieces[0])[::2]
                nats = _back(loss(together.apart(output, reached)))
            self._credit(traces, calls if math.isfinite(nats) else {})
            traces = self._advanced(traces, calls) if advance else traces
        else:
            nats, slopes = self._slopes(model, reached, together, pieces, loss, sink)
            own = _taken_gradients(model)  # of the loss itself, if it reads parameters
            state, traces = together.before, self._copied(together.rows)
            for i, (piece, slope) in enumerate(zip(pieces, slopes, strict=True)):
                # The last one goes back in any case, so that parameters have gradients, if of zero.
                back = math.isfinite(nats) and (bool(slope.any()) or i == len(pieces) - 1)
                state, traces = self._piece(model, state, piece, slope if back else None, traces, sink)
            for parameter, gradient in own:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if advance:
            self._keep(reached, together.rows, traces)
        return nats

    def quickly(
        self,
        model: nn.Module,
        reached: Sequence[Asked],
        descend: Callable[[Together], float],
        sink: Sink,
        advance: bool,
    ) -> float | None:
        """As `descend`, by a single pass that has the traces of all layers; None, and no gradient, if there is none.

        Args:
            descend: puts the gradient of a chunk of these questions where `sink` says, and returns the loss.
        """
        if not self.at_once or sum(asked.steps for asked in reached) > self.rule.chunk:
            return None
        together = Together.of(reached, inputs=True)
        with _listening(sink) as taken:
            nats = descend(together)
        if not math.isfinite(nats):
            if advance:
                self.move_border(model, reached, sink)
            return nats
        traces = self._fused(taken, self._taken(together.rows), streams_of(together.before), advance)
        if traces is None:
            for parameter in model.parameters():
                parameter.grad = None
            return None
        if advance:
            self._keep(reached, together.rows, traces)
        return nats

    def move_border(
        self,
        model: nn.Module,
        questions: Sequence[Asked],
        sink: Sink | None = None,
        calls: Mapping[str, Call] | None = None,
        graph: bool = False,
    ) -> None:
        """Over these questions.

        Args:
            calls: of the pass over them, if it was made already.
            graph: whether that would have been made with a graph, so that this is, too: forms without one may round
                otherwise, and a fork, which has no pass, has to come to the same bits.
        """
        together = Together.of(questions, inputs=True)
        if calls is not None:
            self._keep(questions, together.rows, self._advanced(self._taken(together.rows), calls))
            return
        pieces, state = _pieces(together, self.rule.chunk), together.before
        traces = self._copied(together.rows) if len(pieces) > 1 else self._taken(together.rows)
        for piece in pieces:
            state, traces = self._piece(model, state, piece, None, traces, sink, graph)
        self._keep(questions, together.rows, traces)

    def _piece(
        self, model: nn.Module, state: Any, piece: "Piece", slope: Tensor | None, traces: Values, sink: Sink | None,
        graph: bool = False,
    ) -> tuple[Any, Values]:  # fmt: skip
        """State and traces after a piece; if there is a slope of its output, with the gradients that come of it."""
        if sink is not None and self.at_once:
            with torch.set_grad_enabled(slope is not None), sink, _listening(sink) as taken:
                output, after = through(model, state, *piece)
                if slope is not None:
                    output.backward(slope)
            if (found := self._fused(taken, traces, streams_of(state), True)) is not None:
                return detach(after), found
            if slope is not None:
                raise RuntimeError("trace: a layer got a listener in the middle of a question; ask it again")
        with torch.set_grad_enabled(graph or slope is not None):
            output, state, calls = self._through(model, state, piece)
            if slope is not None:
                output.backward(slope)
                self._credit(traces, calls)
        return detach(state), self._advanced(traces, calls)

    def _fused(self, taken: Sequence[Taken], traces: Values, streams: int, advance: bool) -> Values | None:
        """Traces after passes that have those of all layers, and what goes on by them added to the gradients; None, and
        nothing done, if they have not. May write to the traces that are given."""
        layers = self._layers(taken)
        if layers is None:
            return None
        values = {name: {part: e.contiguous() for part, e in of.items()}
                  for name, of in (traces or _fresh(self, streams, ())).items()}  # fmt: skip
        for each, names in zip(taken, layers, strict=True):
            each.apply([values[name] for name in names], advance)
        return values

    def _layers(self, taken: Sequence[Taken]) -> list[list[str]] | None:
        """Names of the mixers in each of these passes; None if they do not have all that have traces, each once."""
        names = {id(mixer.lru.decay): name for name, mixer in self.mixers.items()}  # type: ignore[union-attr]
        layers = [[names.get(id(decay), "") for decay in each.decays()] for each in taken]
        if sorted(name for own in layers for name in own) == sorted(self.mixers):
            return layers
        self.at_once = False  # somebody listens to a layer, or the pass is large: it will stay so
        return None

    def _copied(self, rows: Tensor | None) -> Values:
        """Traces that are written to piece by piece: those at the border stay, should something go wrong."""
        values = self._taken(rows)
        return {name: {part: e.clone() for part, e in of.items()} for name, of in values.items()}

    def grow(self, streams: int) -> None:
        """Room for more streams, of which nothing is known."""
        for traces in self.values.values():
            for name, e in traces.items():
                traces[name] = torch.cat([e, e.new_zeros(streams - len(e), *e.shape[1:])])

    def nbytes(self) -> int:
        """Bytes of the traces of all streams."""
        return nbytes(tuple(e for traces in self.values.values() for e in traces.values()))

    def state_dict(self) -> Values:
        return {name: dict(traces) for name, traces in self.values.items()}

    def check(self, state: Values) -> None:
        """Raise `UsageError` unless these are traces of such mixers, kinds, shapes and types; none at all will do."""
        if not state:
            return
        for name, like in _fresh(self, 1, ()).items():
            own = state.get(name, {})
            fits = own.keys() == like.keys() and all(
                own[part].dtype == e.dtype and own[part].shape[own[part].ndim - e.ndim + 1 :] == e.shape[1:]
                for part, e in like.items()
            )
            if not fits:
                raise UsageError(f"trace: traces of {name or 'the model'} in the state are of other kinds, shapes or "
                                 "types; use the policy, precision and version that it was saved with")  # fmt: skip
        if more := state.keys() - self.mixers.keys():
            raise UsageError(f"trace: the state has traces of {min(more)}, which has none here")

    def load_state_dict(self, state: Values, device: torch.device) -> None:
        self.values = {name: {part: e.clone().to(device) for part, e in of.items()} for name, of in state.items()}

    def _slopes(
        self, model: nn.Module, reached: Sequence[Asked], together: Together, pieces: Sequence["Piece"],
        loss: Callable[[list[Tensor]], Tensor], sink: Sink | None,
    ) -> tuple[float, Sequence[Tensor]]:  # fmt: skip
        """The loss, and its gradient by the outputs of each piece: so only one piece need be kept at a time."""
        outputs, state = [], together.before
        with torch.no_grad():
            for piece in pieces:
                if sink is None or not self.at_once:
                    output, state = through(model, state, *piece)
                else:
                    with sink, _listening(sink) as taken:
                        output, state = through(model, state, *piece)
                    self._layers(taken)  # tells whether a single pass will do
                outputs.append(output)
        whole = torch.cat(outputs, 1).requires_grad_()
        nats = _back(loss(together.apart(whole, reached)))
        slopes = torch.zeros_like(whole) if whole.grad is None else whole.grad
        return nats, slopes.split(self.rule.chunk, 1)

    def recording(self) -> AbstractContextManager[dict[str, Call]]:
        """Catches what each mixer is called with, and has the gradient of its state arrive in `grad` of that.

        Raises:
            UsageError: one is called twice.
        """
        return _recording(self.mixers)

    def _through(self, model: nn.Module, state: Any, piece: "Piece") -> tuple[Tensor, Any, dict[str, Call]]:
        with self.recording() as calls:
            output, state = through(model, state, *piece)
        return output, state, calls

    @torch.no_grad()
    def _credit(self, traces: Values, calls: Mapping[str, Call]) -> None:
        """Add what goes on by the traces to `grad` of the parameters."""
        for name, call in calls.items():
            if name not in traces:
                continue
            mixer, own = self.mixers[name], traces[name]
            state, dstate = detach(call.state), map_state(_slope, call.state)
            if call.reset is not None and bool(call.reset.any()):
                # Where resets have cut the past off, its trace may be anything, also not finite.
                rows = _reached(call.state).nonzero()[:, 0]
                state, own = take(state, rows), {part: take(e, rows) for part, e in own.items()}
                dstate = map_state(partial(_slope, rows=rows), call.state)
            for part, gradient in mixer.trace_gradients(own, state, dstate).items():
                parameter = mixer.get_parameter(part)
                if parameter.requires_grad:
                    gradient = gradient.to(parameter.dtype)
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.no_grad()
    def _advanced(self, traces: Values, calls: Mapping[str, Call]) -> Values:
        after = dict(traces)
        for name, (x, state, reset, mask) in calls.items():
            mixer, kinds = self.mixers[name], self.kinds[name]
            after[name] = mixer.advance_traces(traces.get(name), x, detach(state), kinds, reset=reset, mask=mask)
        return after

    def _taken(self, rows: Tensor | None) -> Values:
        """Traces at the border, of all streams or of some, in the float type that the mixers' states have by now."""
        for name, traces in self.values.items():
            dtype = torch.promote_types(next(self.mixers[name].parameters()).dtype, torch.float32)
            for part, e in traces.items():
                traces[part] = e if e.dtype == dtype else e.to(dtype)
        if rows is None:
            return self.values
        return {name: {part: take(e, rows) for part, e in traces.items()} for name, traces in self.values.items()}

    def _keep(self, questions: Sequence[Asked], rows: Tensor | None, traces: Values) -> None:
        if rows is not None:
            streams = streams_of(questions[0].before)
            for name, parts in traces.items():
                for part, e in parts.items():
                    known = self.values.get(name, {}).get(part)
                    before = e.new_zeros(streams, *e.shape[1:]) if known is None else known
                    parts[part] = put(before, rows, e)
        self.values = traces


Piece = tuple[Tensor, Tensor, Tensor, Tensor | None]


def traced(model: nn.Module) -> dict[str, SequenceMixer]:
    """The mixers of a model that have traces, by name; of one inside another the outer."""
    found: dict[str, SequenceMixer] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(module, SequenceMixer) and module.traceable() and not inside:
            found[name] = module
    return found


@contextmanager
def _recording(mixers: Mapping[str, SequenceMixer]) -> Iterator[dict[str, Call]]:
    calls: dict[str, Call] = {}

    def listener(name: str) -> Callable[..., Any]:
        def before(mixer: Any, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
            if name in calls:
                raise UsageError(f"trace: {name} is called twice in one pass, which traces do not allow; use bptt")
            x, state = args[0], args[1] if len(args) > 1 else more.pop("state", None)
            if state is None:
                state = mixer.init_state(x.shape[0], tuple(x.shape[2:-1]), device=x.device)
            grad = torch.is_grad_enabled()
            state = map_state(
                lambda leaf: leaf.detach().requires_grad_() if grad and leaf.is_floating_point() else leaf, state
            )
            calls[name] = Call(x.detach(), state, more.get("reset"), more.get("mask"))
            return (x, state), more

        return before

    handles = [mixer.register_forward_pre_hook(listener(name), with_kwargs=True) for name, mixer in mixers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _listening(sink: Sink) -> Iterator[list[Taken]]:
    """The passes of which `sink` hears."""
    taken: list[Taken] = []
    sink.taken = taken
    try:
        yield taken
    finally:
        sink.taken = None


def trace_bytes(model: nn.Module, rule: Trace, streams: int = 1, extra: tuple[int, ...] = ()) -> int:
    """Bytes that the traces of so many streams will occupy; extra axes are those of the inputs.

    Raises:
        UsageError: no mixer has traces, another rule, or fewer than one stream.
    """
    if not isinstance(rule, Trace) or streams < 1:
        raise UsageError(f"trace_bytes: {rule} and {streams} streams, expected a rule by trace() and at least 1")
    return sum(sum(e.numel() * e.element_size() for e in traces.values()) for traces in
               _fresh(Traces(model, rule), streams, extra).values())  # fmt: skip


@torch.no_grad()
def _fresh(traces: Traces, streams: int, extra: tuple[int, ...]) -> Values:
    found = {}
    for name, mixer in traces.mixers.items():
        state = mixer.init_state(1, extra)
        x = torch.zeros(1, 0, *extra, mixer.width, device=next(mixer.parameters()).device)
        one = mixer.advance_traces(None, x, state, traces.kinds[name])
        found[name] = {part: e.expand(streams, *e.shape[1:]) for part, e in one.items()}
    return found


def _slope(leaf: Tensor, rows: Tensor | None = None) -> Any:
    """The gradient that has come to a leaf, of some streams; None if none has."""
    return leaf.grad if leaf.grad is None or rows is None else leaf.grad[rows]


def _reached(state: Any) -> Tensor:
    """The streams `(B,)` to whose state a gradient has come that is not zero throughout."""
    found = torch.zeros(streams_of(state), dtype=torch.bool, device=next(leaves(state))[1].device)
    for _, leaf in leaves(state):
        found = found if leaf.grad is None else found | leaf.grad.flatten(1).any(1)
    return found


def _taken_gradients(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Gradients that are in the parameters, which have none then."""
    found = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for parameter, _ in found:
        parameter.grad = None
    return found


def _back(loss: Tensor) -> float:
    nats = float(loss.detach())
    if math.isfinite(nats):
        loss.backward()
    return nats


def _pieces(together: Together, chunk: int) -> list[Piece]:
    assert together.inputs is not None
    parts = [part.split(chunk, 1) for part in (together.inputs, together.reset, together.mask)]
    seen = [None] * len(parts[0]) if together.seen is None else together.seen.split(chunk, 1)
    return list(zip(*parts, seen, strict=True))


def _kinds(mixer: SequenceMixer, policy: Mapping[str, str]) -> dict[str, str]:
    """The kind of each group: as the policy says, none where all is frozen, else the default."""
    kinds = mixer.kinds(None)
    for group, offered in mixer.traceable().items():
        named = [key for key in policy if _named(key, group)]
        kinds[group] = policy[max(named, key=len)] if named else kinds[group]  # what is said of a part of it goes first
        if kinds[group] not in offered:
            raise UsageError(f"trace: {type(mixer).__name__} has no {kinds[group]!r} traces of {group}; "
                             f"choose from {', '.join(offered)}")  # fmt: skip
        if not any(p.requires_grad for name, p in mixer.named_parameters() if name.startswith(group)):
            kinds[group] = "instant"
    return kinds


def _named(key: str, group: str) -> bool:
    return group == key or group.startswith(f"{key}.")


def _check(model: nn.Module, mixers: Mapping[str, SequenceMixer], policy: Mapping[str, str]) -> None:
    if not mixers:
        own = sorted({type(part).__name__ for part in model.modules() if isinstance(part, SequenceMixer)})
        why = f": {' or '.join(own)} is no element-wise recurrence" if own else ""
        raise UsageError(f"trace: no layer of {type(model).__name__} has traces{why}; use bptt, or a mixer that has: "
                         "GatedLRU, RGLRU, LRU, S6, MultiScaleSSM")  # fmt: skip
    groups = {group for mixer in mixers.values() for group in mixer.traceable()}
    for key in policy:
        if not any(_named(key, group) for group in groups):
            raise UsageError(f"trace: the policy names {key}, of which no mixer has traces; there are "
                             f"{', '.join(sorted(groups))}")  # fmt: skip
