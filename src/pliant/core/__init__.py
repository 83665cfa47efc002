"""What travels between the floors: state, questions and answers, roles, files, seeds.

- `State` and its free functions: `take`, `put`, `detach`, `to`, `stack`, `nbytes`, `save_state`, `load_state`
- `Question`, `Answer`, `Batch`: what a stream and a learner say to each other
- `Role`: what a parameter is for
- `Disk`: file operations that leave the old or the new, never neither
- `UsageError`: one sentence for a person, exit code 2 on the command line
"""

from pliant.core.errors import UsageError
from pliant.core.exchange import KNOWN, Answer, Batch, Question, moved
from pliant.core.files import Disk
from pliant.core.predictive import categorical_nats, mixture_mean, mixture_nats
from pliant.core.record import Record
from pliant.core.roles import Role, check_roles
from pliant.core.seeds import generator, numpy_generator, seeded
from pliant.core.state import (
    State,
    check_batch,
    detach,
    from_leaves,
    leaves,
    load_state,
    map_state,
    nbytes,
    put,
    save_state,
    stack,
    take,
    to,
)

__all__ = [
    "KNOWN",
    "Answer",
    "Batch",
    "Disk",
    "Question",
    "Record",
    "Role",
    "State",
    "UsageError",
    "categorical_nats",
    "check_batch",
    "check_roles",
    "detach",
    "from_leaves",
    "generator",
    "leaves",
    "load_state",
    "map_state",
    "mixture_mean",
    "mixture_nats",
    "moved",
    "nbytes",
    "numpy_generator",
    "put",
    "save_state",
    "seeded",
    "stack",
    "take",
    "to",
]
