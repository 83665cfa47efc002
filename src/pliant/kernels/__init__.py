"""Pure functions on tensors; time is axis 1.

- `linear_scan`: h_t = a_t h_{t-1} + u_t, with initial state and resets
- `gated_scan`: the same with decay and input from the gates of the gated LRU, in one pass
- `gated_unit`: that with the matrices of the gates
- `causal_conv`: depthwise convolution over the past, with carried inputs, resets and masks
- `filter_bank`: a cascade of causal filters that splits each channel into time scales
- `scale_scan`: diagonal recurrences side by side, one for each time scale, weighed and summed
- `delta_rule`: a matrix per head in which the value under a key is replaced (gated delta net, KDA, GDN-2)
- `matrix_memory`: one matrix per head that is written to and read from, with exponential gates (mLSTM)
- `scalar_memory`: memory of one number per unit, exponential gates and recurrent weights (sLSTM)
- `selective_scan`: N states per channel whose step size, input and output weights come from the data (S6)
- `online_moments`, `class_reference`, `number_reference`: running statistics of a stream, without gradients
- `gated_block`: a whole stack of gated blocks in one pass, for narrow models on a CPU
- `mixture_quantiles`: quantiles of Gaussian mixtures
- `adaptive_softmax`, `perplexity_softmax`, `ssmax`, `tempered_softmax`: softmax at a temperature of each row;
  `masked_softmax`: softmax with the same arguments
- `entmax`, `sparsemax`, `stieltjes`: weights that are not exponential
- `sharp_attention`: attention with any of these, in strips of queries
- `entropy_of_blocks`: entropy of softmax over keys that come in blocks
"""

from pliant.kernels._adaptive_softmax import (
    adaptive_softmax,
    masked_softmax,
    perplexity_softmax,
    ssmax,
    tempered_softmax,
)
from pliant.kernels._causal_conv import causal_conv
from pliant.kernels._delta_rule import delta_rule
from pliant.kernels._filter_bank import filter_bank
from pliant.kernels._gated_block import BlockWeights, gated_block, gated_block_fits
from pliant.kernels._gated_scan import gated_scan
from pliant.kernels._gated_unit import gated_unit
from pliant.kernels._linear_scan import linear_scan
from pliant.kernels._matrix_memory import Memory, matrix_memory
from pliant.kernels._mixture import mixture_quantiles
from pliant.kernels._online import (
    WIDTHS,
    ClassCounts,
    Moments,
    NumberScale,
    class_reference,
    number_reference,
    online_moments,
)
from pliant.kernels._row_softmax import entropy_of_blocks
from pliant.kernels._scalar_memory import ScalarMemory, scalar_memory
from pliant.kernels._scale_scan import scale_scan
from pliant.kernels._selective_scan import selective_scan
from pliant.kernels._sharp_attention import sharp_attention
from pliant.kernels._sparse_softmax import entmax, sparsemax, stieltjes

__all__ = [
    "WIDTHS",
    "BlockWeights",
    "ClassCounts",
    "Memory",
    "Moments",
    "NumberScale",
    "ScalarMemory",
    "adaptive_softmax",
    "causal_conv",
    "class_reference",
    "delta_rule",
    "entmax",
    "entropy_of_blocks",
    "filter_bank",
    "gated_block",
    "gated_block_fits",
    "gated_scan",
    "gated_unit",
    "linear_scan",
    "masked_softmax",
    "matrix_memory",
    "mixture_quantiles",
    "number_reference",
    "online_moments",
    "perplexity_softmax",
    "scalar_memory",
    "scale_scan",
    "selective_scan",
    "sharp_attention",
    "sparsemax",
    "ssmax",
    "stieltjes",
    "tempered_softmax",
]
