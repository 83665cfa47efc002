"""A model that changes while it answers.

- `Learner`: predicts, remembers what it said, learns when the answer comes
- `bptt`, `trace`, `immediate`: the learning rule, how far back a gradient reaches, `rule_named` by their names;
  `trace_bytes`: what traces cost
- `prequential`: the loop over a stream; `fit`: many passes over a fixed set
- `Life`: everything an exact continuation needs, as one value
- `Majority`, `NoChange`, `Frozen`, `Retrained`: honest opponents; `Timed`: counts what each costs
"""

from pliant.learn.base import Predictor
from pliant.learn.learner import Learner
from pliant.learn.life import Life
from pliant.learn.loops import fit, prequential
from pliant.learn.opponents import Frozen, Majority, NoChange, Retrained
from pliant.learn.rules import Bptt, Rule, Trace, bptt, immediate, rule_named, trace
from pliant.learn.timed import Timed
from pliant.learn.traces import trace_bytes

__all__ = [
    "Bptt",
    "Frozen",
    "Learner",
    "Life",
    "Majority",
    "NoChange",
    "Predictor",
    "Retrained",
    "Rule",
    "Timed",
    "Trace",
    "bptt",
    "fit",
    "immediate",
    "prequential",
    "rule_named",
    "trace",
    "trace_bytes",
]
