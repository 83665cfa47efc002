"""Ragged episodes, packed one after the other or padded side by side, give the same numbers."""

import torch

from pliant.mixers import GatedLRU


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    mixer = GatedLRU(16, num_heads=2)
    lengths = [3, 7, 1, 5]
    episodes = [torch.randn(length, 16) for length in lengths]
    with torch.no_grad():
        alone = [mixer(episode[None])[0][0] for episode in episodes]

        # Packed: one long row; a reset stands where an episode begins.
        reset = torch.zeros(1, sum(lengths), dtype=torch.bool)
        reset[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        packed, _ = mixer(torch.cat(episodes)[None], reset=reset)

        # Padded: a row each, left or right as it comes; the mask is false where there is nothing.
        steps = max(lengths)
        x, mask = torch.full((4, steps, 16), float("nan")), torch.zeros(4, steps, dtype=torch.bool)
        for i, episode in enumerate(episodes):
            place = slice(steps - lengths[i], steps) if i % 2 else slice(0, lengths[i])
            x[i, place], mask[i, place] = episode, True
        padded, _ = mixer(x, mask=mask)

    by_packing = (packed[0] - torch.cat(alone)).abs().max().item()
    by_padding = max((padded[i, mask[i]] - alone[i]).abs().max().item() for i in range(4))
    assert not padded[~mask].any()
    return by_packing, by_padding


if __name__ == "__main__":
    print("largest difference when packed {:.1e}, when padded {:.1e}".format(*main()))
