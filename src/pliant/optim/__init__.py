"""How parameters move, and how they are kept able to.

- `adamw`: AdamW whose weight decay follows the roles of the parameters
- `normalize_and_project`: matrices keep their first norms; `effective_rate`: rate over norm of each
- `Upkeep`: the contract of what is done to a model after an update; `Probe`: what it gets to see
- `ContinualBackprop`, `Isometry`, `Rewarm`, `ShrinkPerturb`, `TowardInit`: upkeep
- `keeping`: these by name
- `Schedule`: an upkeep that sets the rate; `warmup`, `inverse_sqrt`, `warmup_cosine`: rates over updates
"""

from pliant.optim.adamw import adamw
from pliant.optim.base import Probe, Upkeep
from pliant.optim.continual import ContinualBackprop
from pliant.optim.keeping import KEEPERS, Keeper, keeping
from pliant.optim.projection import effective_rate, normalize_and_project
from pliant.optim.schedules import Schedule, inverse_sqrt, warmup, warmup_cosine
from pliant.optim.upkeep import Isometry, Rewarm, ShrinkPerturb, TowardInit

__all__ = [
    "KEEPERS",
    "ContinualBackprop",
    "Isometry",
    "Keeper",
    "Probe",
    "Rewarm",
    "Schedule",
    "ShrinkPerturb",
    "TowardInit",
    "Upkeep",
    "adamw",
    "effective_rate",
    "inverse_sqrt",
    "keeping",
    "normalize_and_project",
    "warmup",
    "warmup_cosine",
]
