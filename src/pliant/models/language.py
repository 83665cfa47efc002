"""A small model of sequences of tokens, and bytes as tokens.

    h_t = √D · E[token_t],   features = stack(h_1, ..., h_t),   logits_t = features E^T

with one matrix E for both ends (Press and Wolf 2017, arXiv:1608.05859). Its rows are N(0, 1/D), so that features
enter the stack with variance 1, and logits leave it with variance 1, as in RecurrentGemma (arXiv:2404.07839).
"""

from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import mixers
from pliant.core import Role, UsageError, categorical_nats, check_batch
from pliant.core.roles import prefix
from pliant.mixers.base import check_flags, forward_once, where_steps
from pliant.models.blocks import Stack


class ByteTokenizer:
    """Text as its UTF-8 bytes, after a token that no text holds and that begins a document."""

    start = 256
    """The token that stands before the first byte."""
    num_tokens = 257

    def encode(self, text: str | bytes) -> Int[Tensor, "T"]:
        """The start token, then the bytes of the text, int64."""
        raw = text.encode() if isinstance(text, str) else text
        return torch.tensor([self.start, *raw], dtype=torch.int64)

    def decode(self, tokens: Int[Tensor, "T"]) -> str:
        """The text of bytes; start tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in tokens.tolist() if token != self.start).decode(errors="replace")


class LanguageState(NamedTuple):
    """The memory of a `LanguageModel`: that of its mixers."""

    stack: tuple[Any, ...]


class LanguageModel(nn.Module, PyTorchModelHubMixin):
    """Logits of the next token at every step. `(B, T, *E) int64 -> (B, T, *E, V)`.

    Args:
        num_tokens: V; 257 is that of `ByteTokenizer`.
        width: D.
        depth: blocks.
        mixer: name of a class in `pliant.mixers`, recurrences and attention alike.
        mixer_options: further arguments of that class.

    Raises:
        UsageError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        num_tokens: int = ByteTokenizer.num_tokens,
        *,
        width: int = 64,
        depth: int = 2,
        mixer: str = "GatedLRU",
        mixer_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        for name, value in (("num_tokens", num_tokens), ("width", width), ("depth", depth)):
            if value < 1:
                raise UsageError(f"LanguageModel: {name} is {value}, expected at least 1")
        known = [name for name in mixers.__all__ if name != "SequenceMixer"]
        if mixer not in known:
            raise UsageError(f"LanguageModel: mixer is {mixer!r}, expected one of {', '.join(known)}")
        self.num_tokens = num_tokens
        self.embed = nn.Embedding(num_tokens, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        make = getattr(mixers, mixer)
        self.stack = Stack([make(width, **(mixer_options or {})) for _ in range(depth)])

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> LanguageState:
        device = self.embed.weight.device if device is None else device
        return LanguageState(self.stack.init_state(batch, extra, device=device))

    def forward(
        self,
        tokens: Int[Tensor, "B T *E"],
        state: LanguageState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E V"], LanguageState]:
        """Logits at every step, zero where masked, and the memory after the last step."""
        tokens, state = self._start(tokens, state, reset, mask)
        weight = self.embed.weight
        features, stack = self.stack(
            F.embedding(tokens, weight) * weight.shape[1] ** 0.5, state.stack, reset=reset, mask=mask
        )
        logits = F.linear(features, weight)
        return (logits if mask is None else where_steps(mask, logits)), LanguageState(stack)

    def step(
        self, tokens: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LanguageState]:
        """One time step: tokens `(B, *E)`, reset and mask `(B,)`."""
        return forward_once(self, tokens, state, reset=reset, mask=mask)

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B T"],
        steps: int,
        state: LanguageState | None = None,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Int[Tensor, "B S"], LanguageState]:
        """The next `steps` tokens, one after the other.

        Args:
            tokens: what came before, at least one token.
            steps: S, at least 1.
            state: memory from before `tokens`; None begins anew.
            temperature: what logits are divided by; 0 takes the most probable token, the first of several.
            generator: draws the tokens where the temperature is above 0.

        Returns:
            The tokens, and the memory before the last of them: given back with that token, it goes on
            as if it had never stopped.

        Raises:
            UsageError: no token or no step is asked for, or there is nothing to draw with.
        """
        if not tokens.shape[1] or steps < 1:
            raise UsageError(
                f"generate: got {tokens.shape[1]} tokens and {steps} steps, expected at least one of each; begin "
                "a text with the start token"
            )
        if temperature < 0 or (temperature > 0 and generator is None):
            raise UsageError(
                f"generate: temperature is {temperature} and generator {generator}; give 0, or a positive "
                "temperature with a generator"
            )
        logits, state = self(tokens, state)
        found = [_drawn(logits[:, -1], temperature, generator)]
        for _ in range(steps - 1):
            logits, state = self.step(found[-1], state)
            found.append(_drawn(logits, temperature, generator))
        return torch.stack(found, 1), state

    def nats(self, output: Float[Tensor, "*S V"], targets: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Code length of `targets` in nats under `output`."""
        return categorical_nats(output, targets)

    def roles(self) -> dict[str, Role]:
        # At both ends of the model; as a head its scale is that of the logits.
        return {"embed.weight": Role.HEAD} | prefix("stack", self.stack.roles())

    def _start(self, tokens: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        if tokens.ndim < 2 or tokens.dtype != torch.int64:
            raise UsageError(
                f"LanguageModel: tokens are {tokens.dtype} {tuple(tokens.shape)}, expected torch.int64 (B, T, ...); "
                "use step for one time step"
            )
        check_flags("LanguageModel", tokens, reset=reset, mask=mask)
        if mask is not None:
            tokens = where_steps(mask, tokens)
        if tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.num_tokens:
                raise UsageError(
                    f"LanguageModel: tokens go from {low} to {high}, expected 0 to {self.num_tokens - 1}; make the "
                    "model with more tokens"
                )
        if state is None:
            return tokens, self.init_state(tokens.shape[0], tuple(tokens.shape[2:]), device=tokens.device)
        check_batch(state, tokens.shape[0], "LanguageModel")
        return tokens, state


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Tokens `(B,)` from logits `(B, V)`."""
    if not temperature:
        return logits.argmax(-1)
    shares = (logits.double() / temperature).softmax(-1)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)
