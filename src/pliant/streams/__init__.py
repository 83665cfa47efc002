"""Where questions and answers come from, in time order.

- `Stream`: the contract; `Passive`: a stream that nobody's output can change; `Spec`: its sizes
- `digits`: scikit-learn's handwritten digits as sequences
- `archive`: labelled series of the UCR and UEA archives; `collection`: the same as arrays, in their standard split
- `pictures`: images of MNIST, Fashion-MNIST, CIFAR-10 or a zip, pixel by pixel or row by row; `images`: as arrays
- `texts`: documents by class, byte by byte
- `listops`: nested operations on digits, of the published distribution, whose value is asked for
- `ptb_xl`, `lra_listops`: electrocardiograms, and expressions of the Long Range Arena, from files that a user has
- `pathfinder`: pictures of contours with two marks: are they the two ends of one?
- `series`: rows of a table, a file or a folder; `named`, `from_pairs`, `regimes`, `replay`: rows from elsewhere
- `drift`: a module of wrappers that change a stream: `permute`, `relabel`, `redraw`, `delay`, `hide`, …
"""

from pliant.streams import drift
from pliant.streams._archive import archive, collection
from pliant.streams._digits import digits
from pliant.streams._images import images, pictures
from pliant.streams._listops import listops
from pliant.streams._named import from_pairs, named, regimes, replay
from pliant.streams._pathfinder import pathfinder
from pliant.streams._released import lra_listops, ptb_xl
from pliant.streams._series import Series, series
from pliant.streams._texts import texts
from pliant.streams.base import Passive, Spec, Stream

__all__ = [
    "Passive",
    "Series",
    "Spec",
    "Stream",
    "archive",
    "collection",
    "digits",
    "drift",
    "from_pairs",
    "images",
    "listops",
    "lra_listops",
    "named",
    "pathfinder",
    "pictures",
    "ptb_xl",
    "regimes",
    "replay",
    "series",
    "texts",
]
