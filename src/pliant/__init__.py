"""Sequence models that keep learning.

Importing this package imports no torch; each noun lives in its own floor:
`pliant.streams`, `pliant.mixers`, `pliant.models`, `pliant.optim`, `pliant.learn`,
`pliant.measure`, `pliant.recipes`.
"""

__version__ = "0.1.0"
