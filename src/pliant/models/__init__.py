"""Whole networks over raw inputs, with the methods of a mixer.

- `SequenceClassifier`: classes, labels, predictive distributions or forecasts from a sequence of features
- `BidirectionalClassifier`: the same of whole sequences, from both ends; not for streams
- `LanguageModel`: the next token, from tokens; `ByteTokenizer`
- `XLSTM`, `XLSTMLarge`: stacks of xLSTM blocks over embedded features, as of 2024 and as in xLSTM 7B
- `quantize_weights`: a copy of a model for inference, with int8 weights
"""

from pliant.mixers.base import exportable
from pliant.models.bidirectional import BidirectionalClassifier
from pliant.models.classifier import ClassifierState, SequenceClassifier
from pliant.models.heads import PoolState
from pliant.models.language import ByteTokenizer, LanguageModel, LanguageState
from pliant.models.normalizer import NormalizerState
from pliant.models.quantize import quantize_weights
from pliant.models.xlstm import XLSTM, XLSTMLarge, XLSTMState

__all__ = [
    "XLSTM",
    "BidirectionalClassifier",
    "ByteTokenizer",
    "LanguageModel",
    "SequenceClassifier",
    "XLSTMLarge",
    "quantize_weights",
]

exportable(ClassifierState, LanguageState, NormalizerState, PoolState, XLSTMState)
