"""Whole networks over raw inputs, with the methods of a mixer.

- `SequenceClassifier`: classes or predictive distributions from a sequence of features
"""

from pliant.models.classifier import SequenceClassifier

__all__ = ["SequenceClassifier"]
