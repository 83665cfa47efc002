"""Kernels, mixers and models that are measured, one `Case` each."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from pliant import kernels, mixers
from pliant.bench.work import Case, Problem, Sizes, Work, nbytes, torch_work
from pliant.core import seeded
from pliant.core.columns import Column, Columns
from pliant.core.seeds import generator
from pliant.models.table import TableModel

TAPS, LEVELS, STATES, DECAY_BIAS = 4, 3, 16, 2.0
READABLE_MIXER = "steps"


class Draw:
    """Random numbers that are the same for every float type."""

    def __init__(self, name: str, dtype: torch.dtype):
        self._random, self._dtype = generator(0, name), dtype

    def normal(self, *shape: int) -> Tensor:
        """Of a standard normal distribution."""
        return self.of(lambda x: x, *shape)

    def of(self, function: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
        """A function of such numbers; rounded to float32, so that float64 starts from the same."""
        return function(torch.randn(shape, generator=self._random)).to(self._dtype)


def heads_of(width: int) -> int:
    """Heads of an even number of features."""
    return next(heads for heads in (4, 2, 1) if width % (2 * heads) == 0)


@dataclass(frozen=True)
class Kernel:
    """A kernel: names of its forms, the readable one last; how inputs are drawn; how y is had from them."""

    forms: tuple[str, ...]
    draw: Callable[[Draw, int, int, int], dict[str, Tensor]]
    call: Callable[..., Tensor]


def _linear_scan(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    return {"a": draw.of(torch.sigmoid, b, t, d), "u": draw.normal(b, t, d)}


def _gated_scan(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    gates = {name: draw.normal(b, t, d) for name in ("x", "input_gate", "decay_gate")}
    first = torch.zeros(b, t, dtype=torch.bool)
    first[:, 0] = True
    rate = draw.of(lambda x: 0.01 + 0.1 * torch.sigmoid(x), d)
    return {**gates, "rate": rate, "h0": 0 * draw.normal(b, d), "first": first}


def _gated_unit(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    heads = heads_of(d)
    k = d // heads
    matrices = {f"{gate}_{part}": draw.of(lambda x: x * d**-0.5, heads, *shape)
                for gate in ("input", "decay") for part, shape in (("weight", (k, k)), ("bias", (k,)))}  # fmt: skip
    scan = _gated_scan(draw, b, t, d)
    return {"x": scan["x"][:, :, None], **matrices, "rate": scan["rate"], "h0": scan["h0"][:, None],
            "first": scan["first"]}  # fmt: skip


def _causal_conv(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    return {"x": draw.normal(b, t, d), "weight": draw.normal(TAPS, d), "bias": draw.normal(d)}


def _filter_bank(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    return {"x": draw.normal(b, t, d), "weight": draw.of(lambda x: 0.5 * x, LEVELS, 2, TAPS, d)}


def _scale_scan(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    scales, size = LEVELS + 2, TAPS
    return {
        "u": draw.normal(scales, b, t, d), "decay": draw.of(torch.sigmoid, scales, size, d),
        "read": draw.normal(scales, size, d), "skip": draw.normal(scales, d), "scales": draw.normal(b, t, scales),
    }  # fmt: skip


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _delta_rule(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    heads = heads_of(d)
    at = (b, t, heads)
    return {
        "q": draw.of(_unit, *at, d // heads), "k": draw.of(_unit, *at, d // heads), "v": draw.normal(*at, d // heads),
        "log_decay": draw.of(lambda x: -F.softplus(x - DECAY_BIAS), *at), "erase": draw.of(torch.sigmoid, *at),
        "write": draw.of(torch.sigmoid, *at),
    }  # fmt: skip


def _matrix_memory(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    heads = heads_of(d)
    parts = {name: draw.normal(b, t, heads, d // heads) for name in ("q", "k", "v")}
    forget = draw.of(lambda x: x + DECAY_BIAS, b, t, heads)
    return {**parts, "input_gate": draw.normal(b, t, heads), "forget_gate": forget}


def _scalar_memory(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    heads = heads_of(d)
    k = d // heads
    return {"pre": draw.normal(b, t, 4, heads, k), "recurrent": draw.of(lambda x: 0.5 * k**-0.5 * x, heads, k, 4, k)}


def _selective_scan(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    return {
        "u": draw.normal(b, t, d), "dt": draw.of(lambda x: F.softplus(x - DECAY_BIAS), b, t, d),
        "A": draw.of(lambda x: 0 * x - torch.arange(1, STATES + 1), d, STATES),
        "B": draw.normal(b, t, STATES), "C": draw.normal(b, t, STATES), "D": draw.normal(d),
    }  # fmt: skip


def _logits(draw: Draw, b: int, t: int, d: int) -> dict[str, Tensor]:
    return {"logits": draw.of(lambda x: 3 * x, b, t, d)}


def _call_matrix_memory(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, form: str) -> Tensor:
    return kernels.matrix_memory(q, k, v, input_gate, F.logsigmoid(forget_gate), form=form)[0]


def _first_of(kernel: Callable[..., tuple[Tensor, Any]]) -> Callable[..., Tensor]:
    return lambda **inputs: kernel(**inputs)[0]


def _call_tempered_softmax(logits: Tensor, form: str) -> Tensor:
    return kernels.tempered_softmax(logits, lambda entropy: 1 + entropy, form=form)


ALL_KERNELS = {
    "linear_scan": Kernel(("numba", "loop"), _linear_scan, _first_of(kernels.linear_scan)),
    "gated_scan": Kernel(("numba", "loop"), _gated_scan, _first_of(kernels.gated_scan)),
    "gated_unit": Kernel(("numba", "loop"), _gated_unit, _first_of(kernels.gated_unit)),
    "causal_conv": Kernel(("numba", "loop"), _causal_conv, _first_of(kernels.causal_conv)),
    "filter_bank": Kernel(("numba", "conv", "loop"), _filter_bank, _first_of(kernels.filter_bank)),
    "scale_scan": Kernel(("numba", "scan", "fft", "loop"), _scale_scan, _first_of(kernels.scale_scan)),
    "delta_rule": Kernel(("numba", "chunk", "loop"), _delta_rule, _first_of(kernels.delta_rule)),
    "matrix_memory": Kernel(("numba", "chunkwise", "parallel", "loop"), _matrix_memory, _call_matrix_memory),
    "scalar_memory": Kernel(("numba", "loop"), _scalar_memory, _first_of(kernels.scalar_memory)),
    "selective_scan": Kernel(("numba", "loop"), _selective_scan, _first_of(kernels.selective_scan)),
    "adaptive_softmax": Kernel(("numba", "loop"), _logits, kernels.adaptive_softmax),
    "perplexity_softmax": Kernel(("numba", "loop"), _logits, kernels.perplexity_softmax),
    "ssmax": Kernel(("numba", "loop"), _logits, kernels.ssmax),
    "tempered_softmax": Kernel(("numba", "loop"), _logits, _call_tempered_softmax),
}  # fmt: skip


def kernel_case(name: str, kernel: Kernel) -> Case:
    """The case of a kernel; a single step is a call with T = 1."""

    def problem(sizes: Sizes, dtype: torch.dtype) -> Problem:
        inputs, once = (
            kernel.draw(Draw(name, dtype), sizes.batch, steps, sizes.width) for steps in (sizes.steps, 1)
        )  # fmt: skip
        return Problem(inputs, once)

    def work(problem: Problem, form: str) -> Work:
        def step() -> Tensor:
            return kernel.call(**problem.once, form=form)

        y = nbytes(step().detach())
        return torch_work(
            lambda: kernel.call(**problem.inputs, form=form), problem.inputs, step,
            step_bytes=nbytes(*problem.once.values()) + y,
        )  # fmt: skip

    return Case(name, kernel.forms, kernel.forms[-1], problem, work)


ALL_MIXERS: dict[str, Callable[[Any, int, int], mixers.SequenceMixer]] = {
    "RGLRU": lambda kind, width, steps: kind(width, heads_of(width)),
    "GatedLRU": lambda kind, width, steps: kind(width, num_heads=heads_of(width)),
    "MLSTM": lambda kind, width, steps: kind(width, heads_of(width)),
    "DenseMLSTM": lambda kind, width, steps: kind(width, heads_of(width)),
    "SLSTM": lambda kind, width, steps: kind(width, heads_of(width)),
    "GatedDelta": lambda kind, width, steps: kind(width, heads_of(width)),
    "S6": lambda kind, width, steps: kind(width),
    "MultiScaleSSM": lambda kind, width, steps: kind(width),
    "MultiresConv": lambda kind, width, steps: kind(width),
    "LRU": lambda kind, width, steps: kind(width),
    "WindowAttention": lambda kind, width, steps: kind(width, heads_of(width)),
    # Room for the step after the last, which is timed too.
    "FullAttention": lambda kind, width, steps: kind(width, heads_of(width), steps + 1),
}
"""How each mixer is made for a width and a number of steps; those that `pliant.mixers` lacks are passed over."""


def mixer_case(name: str, make: Callable[[Any, int, int], mixers.SequenceMixer]) -> Case:
    """The case of a mixer: a sequence in one call. What it has to equal is the same in single steps."""

    def problem(sizes: Sizes, dtype: torch.dtype) -> Problem:
        with seeded(0):
            mixer = make(getattr(mixers, name), sizes.width, sizes.steps).to(dtype)
        draw = Draw(name, dtype)
        x = draw.normal(sizes.batch, sizes.steps, sizes.width)
        return Problem({"x": x}, {"x": draw.normal(sizes.batch, sizes.width)}, mixer)

    def work(problem: Problem, form: str) -> Work:
        mixer, x, one = problem.module, problem.inputs["x"], problem.once["x"]
        assert mixer is not None
        leaves = {"x": x, **dict(mixer.named_parameters())}
        return _recurrent_work(mixer, leaves, x, one, form == READABLE_MIXER)

    return Case(name, ("pliant",), READABLE_MIXER, problem, work)


def _recurrent_work(module: Any, leaves: dict[str, Tensor], x: Tensor, one: Tensor, steps: bool) -> Work:
    """A mixer or model over x `(B, T, ...)`, in one call or in steps, and a further step from where that ends."""
    run = (lambda: in_steps(module, x)[0]) if steps else (lambda: module(x)[0])
    with torch.no_grad():
        y, state = in_steps(module, x) if steps else module(x)
    moved = 2 * nbytes(*tree_leaves(state)) + nbytes(one, *module.parameters()) + nbytes(y[:, -1])
    return torch_work(run, leaves, lambda: module.step(one, state)[0], step_bytes=moved)


def in_steps(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Outputs and last state of a mixer or model, one step after the other."""
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


FEATURES, CLASSES, DEPTH = 8, 4, 2


def model_case(name: str, columns: Columns) -> Case:
    """The case of a `TableModel`: as it is, with all blocks in one pass where that serves, and module by module."""

    def problem(sizes: Sizes, dtype: torch.dtype) -> Problem:
        with seeded(0):
            model = TableModel(columns, width=sizes.width, depth=DEPTH)
            nn.init.normal_(model.head.weight, std=0.1)  # at zero, nothing before it would have a gradient
        draw = Draw(name, torch.float64)
        rows = [draw.normal(*shape, columns.num_features) for shape in ((sizes.batch, sizes.steps), (sizes.batch,))]
        if columns.task == "classify":
            for x in rows:
                x[..., -1] = (x[..., -1].abs() * 2).floor().clamp(max=CLASSES - 1)
        return Problem({"rows": rows[0]}, {"rows": rows[1]}, model.to(dtype))

    def work(problem: Problem, form: str) -> Work:
        model: Any = copy.deepcopy(problem.module)
        if form != "pliant":
            # Who listens to a module hears it called, so the single pass stands back.
            model.stack.register_forward_hook(_listen)
        rows, row = problem.inputs["rows"], problem.once["rows"]
        return _recurrent_work(model, dict(model.named_parameters()), rows, row, form == READABLE_MIXER)

    return Case(name, ("pliant", "modules"), READABLE_MIXER, problem, work)


def _listen(module: nn.Module, inputs: Any, outputs: Any) -> None:
    pass


def _columns(task: Any) -> Columns:
    features = tuple(Column(f"x{i}") for i in range(FEATURES))
    classes = tuple(f"c{i}" for i in range(CLASSES)) if task == "classify" else ()
    return Columns(features=features, targets=("y",), task=task, classes=classes)


def _by_name(cases: Mapping[str, Any], make: Callable[..., Case]) -> dict[str, Case]:
    return {name: make(name, made) for name, made in cases.items()}


KERNELS = _by_name(ALL_KERNELS, kernel_case)
MIXERS = _by_name({name: make for name, make in ALL_MIXERS.items() if hasattr(mixers, name)}, mixer_case)
MODELS = _by_name({"TableModel, classes": _columns("classify"), "TableModel, numbers": _columns("regress")}, model_case)
