"""A small recurrent model that reads features and answers with a distribution."""

from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from pliant import mixers
from pliant.core import Role, UsageError, check_batch
from pliant.core.roles import prefix
from pliant.mixers.base import check_flags, forward_once, where_steps
from pliant.models.blocks import NORMS, Stack
from pliant.models.heads import MeanPool, check_head, head_of
from pliant.models.normalizer import NormalizerState, OnlineNormalizer

MAX_SIZE = 16


class ClassifierState(NamedTuple):
    """The memory of a `SequenceClassifier`; normalizer and pool are empty where there is none."""

    normalizer: NormalizerState | tuple[()]
    stack: tuple[Any, ...]
    pool: tuple[Any, ...]


class SequenceClassifier(nn.Module, PyTorchModelHubMixin):
    """Normalize, embed, mix over time, read out. `(B, T, *E, F) -> (B, T, *E, C)`, answering at every step.

    Args:
        num_features: F, raw features per step.
        num_outputs: C classes or labels, or the count of numbers to predict.
        width: D, width of the model.
        depth: blocks.
        mixer: name of a class in `pliant.mixers`.
        mixer_options: further arguments of that class.
        readout: `"step"` reads the features of the step; `"mean"` their mean since the last reset.
        head: `"classes"`: logits `(…, C)`; `"labels"`: logits `(…, C)`, each of its own; `"mixture"`: K Gaussians per
            number, `(…, C, 3K)`; `"forecast"`: one for each number at each of the next H steps, `(…, H, C, 3)`.
        horizon: H, for a forecast alone.
        norm: of the blocks, `"rms"` or `"layer"`.
        normalize: whether raw features are standardized by what their stream has shown so far.

    Raises:
        UsageError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        *,
        width: int = 64,
        depth: int = 2,
        mixer: str = "GatedLRU",
        mixer_options: dict[str, Any] | None = None,
        readout: str = "step",
        head: str = "classes",
        horizon: int | None = None,
        norm: str = "rms",
        normalize: bool = True,
    ):
        super().__init__()
        name = type(self).__name__
        check_sizes(name, num_features=num_features, num_outputs=num_outputs, width=width, depth=depth)
        check_mixer(name, mixer)
        check_head(name, head, horizon)
        check_choice(name, "readout", readout, ("step", "mean"))
        # A norm over a batch would mix streams, and moments of a stream that are yet to come.
        check_choice(name, "norm", norm, tuple(NORMS))
        self.num_features = num_features
        self.normalizer = OnlineNormalizer(num_features) if normalize else None
        self.embed = nn.Linear(num_features, width)
        self.stack = Stack(mixers_of(mixer, mixer_options, width, depth), norm)
        self.pool = MeanPool(width) if readout == "mean" else None
        self.head = head_of(head, width, num_outputs, horizon)
        begin_embedding(self.embed)

    @classmethod
    def sized(cls, size: int, num_features: int, num_outputs: int, **options: Any) -> "SequenceClassifier":
        """The one dial: depth = size, width = 32 size; of a gated LRU, one head of the gates per 32 features.

        Raises:
            UsageError: size is not in 1 … 16.
        """
        if not 1 <= size <= MAX_SIZE:
            raise UsageError(f"size is {size}, expected 1 to {MAX_SIZE}; 2 is a good start")
        if options.get("mixer", "GatedLRU") == "GatedLRU":
            options = {"mixer_options": {"num_heads": size, "depth": size}} | options
        return cls(num_features, num_outputs, width=32 * size, depth=size, **options)

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> ClassifierState:
        """Memory of `batch` fresh streams with extra axes `extra`."""
        device = self.embed.weight.device if device is None else device
        like = torch.empty(0, dtype=self.embed.weight.dtype, device=device)
        return ClassifierState(
            normalizer=() if self.normalizer is None else self.normalizer.init_state(batch, extra, device=device),
            stack=self.stack.init_state(batch, extra, device=device),
            pool=() if self.pool is None else self.pool.init_state(like, batch, extra),
        )

    def forward(
        self,
        x: Shaped[Tensor, "B T *E F"],
        state: ClassifierState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Shaped[Tensor, "B T *S"], ClassifierState]:
        """Answers at every step, zero where masked, and the memory after the last step."""
        x, state = self._start(x, state, reset, mask)
        normalizer = state.normalizer
        if self.normalizer is not None:
            # In the dtype of the input: after the offset is gone, nothing is lost by a narrower one.
            x, normalizer = self.normalizer(x if x.is_floating_point() else x.float(), normalizer, mask=mask)
        embedded = self.embed(x.to(self.embed.weight.dtype))
        features, stack = self.stack(embedded, state.stack, reset=reset, mask=mask)
        pool: tuple[Any, ...] = ()
        if self.pool is not None:
            features, pool = self.pool(features, state.pool, reset=reset, mask=mask)
        output = self.head(features)
        if mask is not None:
            output = where_steps(mask, output)
        return output, ClassifierState(normalizer, stack, pool)

    def step(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ClassifierState]:
        """One time step: x `(B, *E, F)`, reset and mask `(B,)`."""
        return forward_once(self, x, state, reset=reset, mask=mask)

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        """Code length of `targets` in nats under `output`, `(B, T, *E)`."""
        return self.head.nats(output, targets)

    def roles(self) -> dict[str, Role]:
        own = {"embed.weight": Role.EMBEDDING, "embed.bias": Role.BIAS}
        return own | prefix("stack", self.stack.roles()) | prefix("head", self.head.roles())

    def _start(
        self, x: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, ClassifierState]:
        if x.ndim < 3 or x.shape[-1] != self.num_features:
            raise UsageError(
                f"SequenceClassifier: x is {tuple(x.shape)}, expected (B, T, ..., {self.num_features}); "
                "use step for one time step"
            )
        check_flags("SequenceClassifier", x, reset=reset, mask=mask)
        if mask is not None:
            x = where_steps(mask, x)
        if state is None:
            return x, self.init_state(x.shape[0], tuple(x.shape[2:-1]), device=x.device)
        check_batch(state, x.shape[0], "SequenceClassifier")
        return x, state


def begin_embedding(linear: nn.Linear) -> None:
    """Draw a map by which features of variance 1 become so many of variance 1."""
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.zeros_(linear.bias)


def mixers_of(name: str, options: dict[str, Any] | None, width: int, count: int) -> list[mixers.SequenceMixer]:
    """So many mixers of that class of `pliant.mixers`."""
    return [getattr(mixers, name)(width, **(options or {})) for _ in range(count)]


def check_mixer(owner: str, name: str) -> None:
    """Raise `UsageError` unless `name` is a class of `pliant.mixers`; `owner` begins the message."""
    check_choice(owner, "mixer", name, tuple(known for known in mixers.__all__ if known != "SequenceMixer"))


def check_sizes(owner: str, **sizes: int) -> None:
    """Raise `UsageError` unless all are at least 1; `owner` begins the message."""
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{owner}: {name} is {value}, expected at least 1")


def check_choice(owner: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of the known; `owner` begins the message."""
    if value not in known:
        raise UsageError(f"{owner}: {name} is {value!r}, expected one of {', '.join(known)}")
