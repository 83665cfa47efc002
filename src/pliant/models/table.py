"""A recurrent model that reads rows of a table, the newest known label among them, and answers with a distribution.

It starts from what no-change would say and learns what to add to it:

    classes   logits = log p_ref + W f                      p_ref of `pliant.kernels.class_reference`
    numbers   y ~ reference + sum_k e^{w_k} N(c + e m_k, (e v_k)²), normalized
              w = W_w f,  m = W_m f,  log v = log v_0 + W_v f

with f the features of the last layer and W zero at first. For numbers the reference (its center c, root
mean square error e and mixture: `pliant.kernels.number_reference`) stays one of two experts in a mixture,
so that what it knows, as how often a number repeats exactly, is not lost while the model learns to do
better; a fresh model gives both the same weight. Scales of targets are part of the memory, not of the
parameters.
"""

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import mixers
from pliant.core import Role, UsageError, categorical_nats, check_batch, mixture_nats
from pliant.core.columns import Columns
from pliant.core.roles import prefix
from pliant.kernels import (
    WIDTHS,
    ClassCounts,
    Moments,
    NumberScale,
)
from pliant.kernels._gated_block import Sink, gated_block_descent
from pliant.kernels._online import Places, observe_rows
from pliant.kernels._softmax import softmax_slope
from pliant.mixers.base import check_flags, forward_once, where_steps
from pliant.models.blocks import CONSTANTS, AtOnce, Stack, flat_states, heard, through

OWN = (0.3, 0.7, 1.5, 4.0)
"""Standard deviations of a fresh model's own Gaussians, in root mean squares of the errors of no-change."""


class TableState(NamedTuple):
    """The memory of a `TableModel`: running statistics of the inputs, of the labels, and that of the stack."""

    moments: Moments
    reference: ClassCounts | NumberScale
    stack: tuple[Any, ...]


class TableModel(nn.Module, PyTorchModelHubMixin):
    """Rows of a table to distributions: `(B, T, F + G)` float64 to `(B, T, C)` logits or `(B, T, G, 3K)` mixtures.

    Args:
        columns: what the columns mean, a `Columns` or what its `to_dict` gave.
        width: D, width of the model.
        depth: blocks.
        mixer: name of a class in `pliant.mixers`.
        mixer_options: further arguments of that class.
    """

    def __init__(
        self,
        columns: Columns | dict[str, Any],
        *,
        width: int = 32,
        depth: int = 2,
        mixer: str = "GatedLRU",
        mixer_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.columns = columns if isinstance(columns, Columns) else Columns.from_dict(columns)
        kinds = [column.kind for column in self.columns.features]
        held = self.columns.label_as_input
        self.classify = self.columns.task == "classify"
        # Which inputs are numbers; the newest known number is one of them.
        place = [i for i, kind in enumerate(kinds) if kind == "number"]
        place += [] if self.classify or not held else list(range(len(kinds), self.columns.num_features))
        sizes = [column.size for column in self.columns.features if column.size]
        codes = [i for i, kind in enumerate(kinds) if kind == "category"]
        if self.classify and held:
            codes, sizes = [*codes, len(kinds)], [*sizes, len(self.columns.classes)]
        # Each category has one more code, for a missing value.
        starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
        self._places = Places(*(np.array(part, np.int64) for part in (place, codes, sizes, starts)))
        self._at_once = AtOnce()
        self._log_widths, self._log_own = (torch.tensor(part, dtype=torch.float64).log() for part in (WIDTHS, OWN))
        with warnings.catch_warnings():  # a table of categories alone has no numbers to embed
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.embed = nn.Linear(3 * len(place), width)
        self.codes = nn.Embedding(max(1, sum(sizes) + len(sizes)), width)
        make = getattr(mixers, mixer)
        options = mixer_options or ({"depth": depth} if mixer == "GatedLRU" else {})
        self.stack = Stack([make(width, **options) for _ in range(depth)])
        outputs = len(self.columns.classes) if self.classify else 3 * len(OWN) * len(self.columns.targets)
        self.head = nn.Linear(width, outputs)
        inputs = max(1, len(place) + len(codes))
        nn.init.normal_(self.embed.weight, std=inputs**-0.5)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.codes.weight, std=inputs**-0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> TableState:
        """Memory of `batch` fresh streams; a table has no extra axes."""
        if extra:
            raise UsageError(f"TableModel: got extra axes {extra}, but the rows of a table have none")
        device = self.head.weight.device if device is None else device
        columns, reference = self.columns, ClassCounts if self.classify else NumberScale
        return TableState(
            moments=Moments.fresh(batch, len(self._places.numbers), device),
            reference=reference.fresh(batch, columns.lag, columns.num_outputs, device),
            stack=self.stack.init_state(batch, device=device),
        )

    def forward(
        self,
        x: Float64[Tensor, "B T F"],
        state: TableState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        seen: Float64[Tensor, "B T S"] | None = None,
    ) -> tuple[Tensor, TableState]:
        """Answers at every step, zero where masked, and the memory after the last step.

        seen: what `observe` made of x, which then has moved its part of the state already.
        """
        self._check(x)
        check_flags("TableModel", x, reset=reset, mask=mask)
        mask = None if mask is None or _all(mask) else mask
        state = self.init_state(x.shape[0], device=x.device) if state is None else state
        weights = self._at_once.weights(self, self.stack, x, state.stack, (self.embed, self.codes, self.head))
        if weights is None or any(leaf.shape[0] != x.shape[0] for leaf in (*state.moments, *state.reference)):
            check_batch(state, x.shape[0], "TableModel")
        if seen is None:
            seen, state = self.observe(x, state, mask=mask)
        numbers, codes, reference = self._parts(seen)
        if weights is not None:
            offset = reference if self.classify else None
            output, stack = through(weights, None, state.stack, reset, mask, numbers, codes, offset)
        else:
            features = self.embed(numbers.to(self.embed.weight.dtype))
            if codes is not None:
                features = features + F.embedding(codes.long(), self.codes.weight).sum(2)
            features, stack = self.stack(features, state.stack, reset=reset, mask=mask)
            output = self.head(features)
            output = output + reference.to(output.dtype) if self.classify else output
        output = output if self.classify else self._in_units(output, reference)
        output = output if mask is None else where_steps(mask, output)
        return output, TableState(state.moments, state.reference, stack)

    def observe(
        self,
        x: Float64[Tensor, "B T F"],
        state: TableState | None = None,
        *,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float64[Tensor, "B T S"], TableState]:
        """What depends on no parameter, so need not be done again when they have moved.

        Returns standardized numbers, codes and the reference side by side, and the state with that
        part of it moved.
        """
        self._check(x)
        state = self.init_state(x.shape[0], device=x.device) if state is None else state
        if mask is not None:
            mask, x = (None, x) if _all(mask) else (mask, where_steps(mask, x))
        held = self.columns.label_as_input
        seen, moments, reference = observe_rows(x, self._places, state.moments, state.reference, mask, hold=held)
        return seen, TableState(moments, reference, state.stack)

    def descend(
        self,
        seen: Float64[Tensor, "B T S"],
        state: TableState,
        targets: Tensor,
        use: Bool[Tensor, "B T"] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        sink: Sink,
    ) -> float | None:
        """Mean code length of the targets used at steps that exist, its gradient put into `grad` of each parameter.

        Does what `forward`, `nats`, mean and `backward` do, but without a graph, which at few steps of a
        narrow model costs more than all that is computed.

        Returns:
            The loss in nats; if that is not finite there is no gradient. None, and nothing was done, where
            forward has to be called: somebody listens to a module, or the pass is large.
        """
        ends = (self.embed, self.codes, self.head)
        if mask is not None and not _all(mask):
            use = mask if use is None else use & mask
        if heard(self):
            return None
        weights = partial(self._at_once.weights, self, self.stack, seen, state.stack, ends)
        numbers, codes, reference = self._parts(seen)

        def slope(output: Tensor) -> tuple[float, Tensor | None]:
            if self.classify:
                return softmax_slope(output, targets, use)
            with torch.enable_grad():
                mixture = self._in_units(output.requires_grad_(), reference)
                said, truth = (mixture, targets) if use is None else (mixture[use], targets[use])
                loss = self.nats(said, truth).mean()
            nats = float(loss.detach())
            return nats, torch.autograd.grad(loss, output)[0] if math.isfinite(nats) else None

        more: dict[str, Any] = {"numbers": numbers, "codes": codes, "offset": reference if self.classify else None}
        return gated_block_descent(
            slope, partial(flat_states, state.stack), weights, reset, mask, **CONSTANTS, **more, sink=sink
        )

    def _parts(self, seen: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of what `observe` gave: numbers `(B, T, 3N)`, codes `(B, T, M)`, reference."""
        first, second = 3 * len(self._places.numbers), self._places.width
        codes = seen[..., first:second] if second > first else None
        reference = seen[..., second:]
        if not self.classify:
            reference = reference.unflatten(2, (3 + len(WIDTHS), len(self.columns.targets)))
        return seen[..., :first], codes, reference

    def step(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TableState]:
        """One time step: x `(B, F + G)`, reset and mask `(B,)`."""
        return forward_once(self, x, state, reset=reset, mask=mask)

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        """Code length of `targets` in nats under `output`; summed over the numbers of a row."""
        return categorical_nats(output, targets) if self.classify else mixture_nats(output, targets).sum(-1)

    def roles(self) -> dict[str, Role]:
        own = {"embed.weight": Role.EMBEDDING, "embed.bias": Role.BIAS, "codes.weight": Role.EMBEDDING}
        own |= {"head.weight": Role.HEAD, "head.bias": Role.BIAS}
        return own | prefix("stack", self.stack.roles())

    def _in_units(self, output: Tensor, about: Tensor) -> Tensor:
        """A mixture in scales of the reference `(B, T, 3KG)` as one in units of the target `(B, T, G, 3K)`, float64."""
        center, error, spread = (about[:, :, i, :, None] for i in range(3))
        shares = about[:, :, 3:].transpose(2, 3)
        logits, means, widths = output.double().unflatten(-1, (spread.shape[2], -1)).chunk(3, -1)
        log_widths, log_own = (part.to(about.device) for part in (self._log_widths, self._log_own))
        theirs = torch.log(spread) + log_widths
        # No narrower than the narrowest of the reference.
        ours = torch.maximum(torch.log(error) + widths + log_own, theirs[..., :1])
        weights = torch.cat([shares, logits - math.log(len(OWN))], -1).log_softmax(-1)
        return torch.cat([weights, center.expand_as(theirs), center + error * means, theirs, ours], -1)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.columns.num_features or x.dtype != torch.float64:
            raise UsageError(
                f"TableModel: x is {x.dtype} {tuple(x.shape)}, expected torch.float64 (B, T, "
                f"{self.columns.num_features}); use step for one time step"
            )


def _all(mask: Tensor) -> bool:
    """Whether all steps exist, as far as that is cheap to tell."""
    return mask.is_cpu and type(mask) is Tensor and bool(mask.numpy().all())
