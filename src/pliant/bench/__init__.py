"""Time and memory on this machine, beside the peers that are installed; equality comes first.

- `KERNELS`, `MIXERS`, `MODELS`: what can be measured, one `Case` each
- `measure`: equality, then times in turns, then memory, of some cases
- `measure_lengths`: time against the number of steps
- `PEERS`: what they are compared with, one small adapter each
"""

from pliant.bench.cases import KERNELS, MIXERS, MODELS
from pliant.bench.compare import measure, measure_lengths
from pliant.bench.peers import PEERS, Peer, find_peers
from pliant.bench.work import Case, Problem, Sizes, Work, torch_work

__all__ = [
    "KERNELS",
    "MIXERS",
    "MODELS",
    "PEERS",
    "Case",
    "Peer",
    "Problem",
    "Sizes",
    "Work",
    "find_peers",
    "measure",
    "measure_lengths",
    "torch_work",
]
