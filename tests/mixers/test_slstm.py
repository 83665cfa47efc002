"""The sLSTM against the numbers of its dossier (lram-xlstm.md, section 8)."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core import UsageError, seeded
from pliant.mixers import SLSTM
from pliant.mixers.slstm import load_xlstm_weights
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import close, same_state, worlds


def mixer(width: int = 8, num_heads: int = 2, dtype: torch.dtype = torch.float64) -> SLSTM:
    with seeded(0):
        found = SLSTM(width, num_heads)
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.5)
    return found.to(dtype)


@given(data=st.data())
def test_resets_and_masks_are_those_of_compaction(data: st.DataObject) -> None:
    module = mixer()
    world = data.draw(worlds(8, torch.float64, ((), (2,))))
    agrees_with_compaction(module, world)
    agrees_with_compaction(module, world, module(world.x + 1)[1])


@pytest.mark.parametrize(
    ("block_index", "bias"),
    [(0, [5, -2.9170, -4.7470, -6.0078, -7]), (2, [5, 3.6942, 1.0415, -2.5732, -7])],
)
def test_check_6_the_first_biases(block_index: int, bias: list[float]) -> None:
    with seeded(0):
        found = SLSTM(10, 2, block_index, 3)
    torch.testing.assert_close(found.gate_bias[1], torch.tensor(bias).expand(2, 5), atol=1e-4, rtol=0)
    assert not found.gate_bias.detach()[[0, 2, 3]].any()


def test_check_6_the_first_weights() -> None:
    with seeded(0):
        found = SLSTM(256, 4)
    assert not found.recurrent.detach().any()
    assert found.norm_weight.detach().eq(1).all()
    assert float(found.gate_weight.detach().std()) == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.02)
    assert float(found.conv_weight.detach().abs().max()) <= 0.5


@pytest.mark.parametrize("width", [16, 512])
def test_check_8_the_number_of_parameters(width: int) -> None:
    with seeded(0):
        found = sum(p.numel() for p in SLSTM(width, 4).parameters())
    # Those of the block, less its two norms over the width and its projections.
    hidden = -(-int(1.3 * width) // 64) * 64
    block = 12 * width + 8 * width**2 // 4 + 3 * width * hidden
    assert found == block - 2 * width - 3 * width * hidden


def test_check_10_any_length_works_and_masked_padding_changes_nothing() -> None:
    module = mixer(dtype=torch.float32)
    x = torch.randn(1, 700, 8, generator=torch.Generator().manual_seed(0))
    y, state = module(x)
    padded = torch.cat([torch.full((1, 5, 8), torch.nan), x], 1)
    mask = torch.arange(705)[None] >= 5
    z, after = module(padded, mask=mask)
    close(z[:, 5:], y)
    same_state(state, after)


def test_every_head_of_the_output_has_mean_0_and_spread_1() -> None:
    module = mixer()
    with torch.no_grad():
        module.norm_weight.fill_(1)
    y, _ = module(torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    heads = y.unflatten(-1, (2, 4))
    assert heads.mean(-1).abs().max() < 1e-12
    assert heads.var(-1, correction=0).max() < 1 + 1e-9


def names(layout: str, heads: int = 2, size: int = 4) -> dict[str, Tensor]:
    """Weights as an `sLSTMLayer` of xlstm names them, each entry its own number."""
    width, count = heads * size, iter(range(1000))

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, float(next(count)))

    recurrent = torch.stack([torch.full((heads, size, size), float(g)) for g in range(4)], 2)  # (H, in, gate, out)
    bias = torch.arange(4.0)[None, :, None].expand(heads, 4, size)
    if layout == "vanilla":
        recurrent, bias = recurrent.permute(0, 2, 3, 1).reshape(heads, 4 * size, size), bias.transpose(0, 1)
    return {
        "fgate.weight": filled(heads, size, size),
        "igate.weight": filled(heads, size, size),
        "zgate.weight": filled(heads, size, size),
        "ogate.weight": filled(heads, size, size),
        "conv1d.conv.weight": filled(width, 1, 4),
        "conv1d.conv.bias": filled(width),
        "group_norm.weight": filled(width),
        "slstm_cell._recurrent_kernel_": recurrent.reshape(heads, -1, size if layout == "vanilla" else 4 * size),
        "slstm_cell._bias_": bias.reshape(-1),
    }


@pytest.mark.parametrize("layout", ["vanilla", "cuda"])
def test_weights_of_xlstm_go_to_the_gates_they_mean(layout: str) -> None:
    module = mixer(dtype=torch.float32)
    load_xlstm_weights(module, names(layout))
    # fgate feeds the input gate and igate the forget gate; biases and recurrent weights are not swapped.
    assert module.gate_weight[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert module.gate_bias[:, 1, 2].tolist() == [0, 1, 2, 3]
    assert module.recurrent[1, 2, :, 3].tolist() == [0, 1, 2, 3]
    assert module.norm_weight.eq(7).all()


def test_weights_that_do_not_fit_are_refused_and_change_nothing() -> None:
    module, whole = mixer(dtype=torch.float32), names("cuda")
    before = [p.clone() for p in module.parameters()]
    for name in whole:
        with pytest.raises(UsageError, match="lack"):
            load_xlstm_weights(module, {other: w for other, w in whole.items() if other != name})
    with pytest.raises(UsageError, match="expected"):
        load_xlstm_weights(module, names("cuda", 2, 6))
    assert all(one.equal(two) for one, two in zip(before, module.parameters(), strict=True))


def test_what_cannot_be_built_is_refused() -> None:
    for wrong in ((8, 3), (4, 4), (0, 1), (8, 0)):
        with pytest.raises(UsageError, match="heads"):
            SLSTM(*wrong)
    for block_index, num_blocks in ((1, 1), (-1, 2)):
        with pytest.raises(UsageError, match="block_index"):
            SLSTM(8, 2, block_index, num_blocks)
    with pytest.raises(UsageError, match="conv_width"):
        SLSTM(8, 2, conv_width=0)


@pytest.mark.slow
def test_it_compiles_in_one_graph_and_exports_as_plain_torch() -> None:
    # In a process of its own, since the type checks of the tests cannot be traced.
    code = """
import torch
from pliant.mixers import SLSTM
module = SLSTM(8, 2)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
x = torch.randn(2, 6, 8, requires_grad=True)
y, state = module(x)
torch.testing.assert_close(compiled(x)[0], y)
compiled(x)[0].sum().backward()
for part in (x.detach(), x[:, :1].detach()):
    program = torch.export.export(module, (part, state))
    assert "pliant" not in str(program.graph)
    torch.testing.assert_close(program.module()(part, state)[0], module(part, state)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Parity(nn.Module):
    """One block of section 2.3 over bits, with the class of the running parity at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 32), nn.Linear(32, 2)
        self.norm, self.mixer = nn.LayerNorm(32), SLSTM(32, 2)
        self.up, self.down = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU()), nn.Linear(64, 32)

    def forward(self, bits: Tensor) -> Tensor:
        x = self.embed(bits)
        x = x + self.mixer(self.norm(x))[0]
        return self.head(x + self.down(self.up(x)))


@pytest.mark.slow
def test_check_15_it_keeps_track_of_a_parity() -> None:
    with seeded(0):
        model = Parity()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(1)
    for _ in range(1200):
        steps = int(torch.randint(2, 13, (), generator=random))
        bits = torch.randint(0, 2, (64, steps), generator=random)
        loss = nn.functional.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = torch.randint(0, 2, (1000, 12), generator=random)
    right = model(bits)[:, -1].argmax(-1) == bits.sum(1) % 2
    assert float(right.float().mean()) >= 0.95
