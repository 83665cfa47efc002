"""How parameters move, and how they are kept able to.

- `adamw`: AdamW whose weight decay follows the roles of the parameters
- `normalize_and_project`: matrices keep their first norms; `effective_rate`: rate over norm of each
- `normalized`: norms before nonlinearities that have none; `norms_of`: where they are; `invariant`: which matrices have
  no scale, by trying
- `Upkeep`: the contract of what is done to a model after an update; `Probe`: what it gets to see
- `ContinualBackprop`, `Isometry`, `Rewarm`, `ShrinkPerturb`, `TowardInit`: upkeep
- `Replay`, `EWC`: upkeep that retains what was learned
- `keeping`: ways to stay able to learn by name; `attach`: upkeep in a training loop that is not ours
- `Schedule`: an upkeep that sets the rate; `warmup`, `inverse_sqrt`, `warmup_cosine`: rates over updates
"""

from pliant.optim.adamw import adamw
from pliant.optim.attach import Attached, attach
from pliant.optim.base import Lesson, Probe, Upkeep
from pliant.optim.continual import ContinualBackprop
from pliant.optim.keeping import keeping
from pliant.optim.memory import EWC, Replay
from pliant.optim.normalization import Norms, invariant, normalized, norms_of
from pliant.optim.projection import effective_rate, normalize_and_project
from pliant.optim.schedules import Schedule, inverse_sqrt, warmup, warmup_cosine
from pliant.optim.upkeep import Isometry, Rewarm, ShrinkPerturb, TowardInit

__all__ = [
    "EWC",
    "Attached",
    "ContinualBackprop",
    "Isometry",
    "Lesson",
    "Norms",
    "Probe",
    "Replay",
    "Rewarm",
    "Schedule",
    "ShrinkPerturb",
    "TowardInit",
    "Upkeep",
    "adamw",
    "attach",
    "effective_rate",
    "invariant",
    "inverse_sqrt",
    "keeping",
    "normalize_and_project",
    "normalized",
    "norms_of",
    "warmup",
    "warmup_cosine",
]
