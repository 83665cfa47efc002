"""Where questions and answers come from, in time order.

- `Stream`: the contract; `Passive`: a stream that nobody's output can change; `Spec`: its sizes
- `digits`: scikit-learn's handwritten digits as sequences
- `drift`: a module of wrappers that change a stream: `permute`, `relabel`, `redraw`, `delay`, `hide`, …
"""

from pliant.streams import drift
from pliant.streams._digits import digits
from pliant.streams.base import Passive, Spec, Stream

__all__ = ["Passive", "Spec", "Stream", "digits", "drift"]
