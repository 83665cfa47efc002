"""A model that reads whole sequences from both ends, for work that is not done on a stream.

    x <- x + m_l(n(x)) + flip(w_l(flip(n(x)))),   x <- x + mlp(n(x))        l = 1 … depth; m, w mixers, n a norm
    answer = head(mean over steps of n(x))

Schuster and Paliwal 1997, Bidirectional recurrent neural networks. The recipes of S5 for the Long Range Arena (Smith et
al. 2023, arXiv:2208.04933) are bidirectional too. Both directions are causal mixers of `pliant.mixers`, and steps that
are masked do not exist for either, so a padded sequence is read as the bare one.
"""

from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.mixers import SequenceMixer
from pliant.mixers.base import check_flags, over_steps, where_steps
from pliant.models.blocks import NORMS, GatedMLP, norm_roles
from pliant.models.classifier import begin_embedding, check_choice, check_mixer, check_sizes, mixers_of
from pliant.models.heads import check_head, head_of


class StepBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the steps that exist. `(B, T, *E, D) -> same`, zero where masked.

    Padding has no part in the moments; those of a batch depend on all of its sequences, so this is for offline use.
    """

    def forward(self, x: Float[Tensor, "B T *E D"], mask: Bool[Tensor, "B T"] | None = None) -> Tensor:
        if mask is None:
            return super().forward(x.flatten(0, -2)).reshape(x.shape)
        there = x[mask]
        found = super().forward(there.flatten(0, -2)).reshape(there.shape)
        return found.new_zeros(x.shape).index_put((mask,), found)


class BidirectionalBlock(nn.Module):
    """One layer, see the top of this page. `(B, T, *E, D) -> (B, T, *E, D)`."""

    def __init__(self, onward: SequenceMixer, backward: SequenceMixer, norm: str):
        super().__init__()
        self.onward, self.back = onward, backward
        self.mixer_norm, self.mlp_norm = _norm(norm, onward.width), _norm(norm, onward.width)
        self.mlp = GatedMLP(onward.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = _normed(self.mixer_norm, x, mask)
        flipped = None if mask is None else mask.flip(1)
        x = x + self.onward(h, mask=mask)[0] + self.back(h.flip(1), mask=flipped)[0].flip(1)
        return x + self.mlp(_normed(self.mlp_norm, x, mask))

    def roles(self) -> dict[str, Role]:
        norms = norm_roles("mixer_norm", self.mixer_norm) | norm_roles("mlp_norm", self.mlp_norm)
        parts = prefix("onward", self.onward.roles()) | prefix("back", self.back.roles())
        return norms | parts | prefix("mlp", self.mlp.roles())


class BidirectionalClassifier(nn.Module, PyTorchModelHubMixin):
    """Embed, mix over time in both directions, read out once. `(B, T, *E, F) -> (B, *E, C)`.

    It is no model of a stream: its answer needs the end of the sequence, so it has no state, no single steps and no
    chunks, and asking for them raises. `SequenceClassifier` has them.

    Args:
        num_features, num_outputs, width, depth, mixer, mixer_options, head, horizon: as in `SequenceClassifier`; each
            layer has two mixers.
        norm: `"layer"`, `"rms"` or `"batch"`; with the last, sequences of a batch touch each other in training.

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
        head: str = "classes",
        horizon: int | None = None,
        norm: str = "layer",
    ):
        super().__init__()
        name = type(self).__name__
        check_sizes(name, num_features=num_features, num_outputs=num_outputs, width=width, depth=depth)
        check_mixer(name, mixer)
        check_head(name, head, horizon)
        check_choice(name, "norm", norm, (*NORMS, "batch"))
        self.num_features = num_features
        self.embed = nn.Linear(num_features, width)
        begin_embedding(self.embed)
        both = mixers_of(mixer, mixer_options, width, 2 * depth)
        pairs = zip(both[::2], both[1::2], strict=True)
        self.blocks = nn.ModuleList(BidirectionalBlock(onward, back, norm) for onward, back in pairs)
        self.norm = _norm(norm, width)
        self.head = head_of(head, width, num_outputs, horizon)

    def forward(
        self,
        x: Shaped[Tensor, "B T *E F"],
        state: Any = None,
        *,
        reset: Any = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> Shaped[Tensor, "B *S"]:
        """The answer to each whole sequence; steps where `mask` is false do not exist.

        Raises:
            UsageError: shapes do not fit, or a state or resets are given.
        """
        if state is not None or reset is not None:
            _refuse()
        if x.ndim < 3 or x.shape[-1] != self.num_features or not x.shape[1]:
            raise UsageError(
                f"BidirectionalClassifier: x is {tuple(x.shape)}, expected (B, T, ..., {self.num_features}) with steps"
            )
        check_flags("BidirectionalClassifier", x, mask=mask)
        if mask is not None:
            x = where_steps(mask, x)
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = block(x, mask)
        x = _normed(self.norm, x, mask)
        if mask is None:
            return self.head(x.mean(1))
        count = mask.sum(1).clamp(min=1).to(x.dtype)
        return self.head(where_steps(mask, x).sum(1) / over_steps(count[:, None], x)[:, 0])

    def init_state(self, *_: Any, **__: Any) -> None:
        """There is none: raises `UsageError`."""
        _refuse()

    def step(self, *_: Any, **__: Any) -> None:
        """There are none: raises `UsageError`."""
        _refuse()

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        """Code length of `targets` in nats under `output`, `(B, *E)`."""
        return self.head.nats(output, targets)

    def roles(self) -> dict[str, Role]:
        roles = {"embed.weight": Role.EMBEDDING, "embed.bias": Role.BIAS} | norm_roles("norm", self.norm)
        for i, block in enumerate(self.blocks):
            roles |= prefix(f"blocks.{i}", block.roles())  # type: ignore[operator]
        return roles | prefix("head", self.head.roles())


def _refuse() -> None:
    raise UsageError(
        "BidirectionalClassifier: it reads whole sequences from both ends and has neither state nor steps; take "
        "SequenceClassifier for a stream"
    )


def _norm(name: str, width: int) -> nn.Module:
    return StepBatchNorm(width) if name == "batch" else NORMS[name](width)


def _normed(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return norm(x, mask) if isinstance(norm, StepBatchNorm) else norm(x)
