"""How parameters move, and how they are kept able to.

- `adamw`: AdamW whose weight decay follows the roles of the parameters
- `Upkeep`: the contract of what is done to a model after an update; `Probe`: what it gets to see
- `Schedule`: an upkeep that sets the rate; `warmup`, `inverse_sqrt`, `warmup_cosine`: rates over updates
"""

from pliant.optim.adamw import adamw
from pliant.optim.base import Probe, Upkeep
from pliant.optim.schedules import Schedule, inverse_sqrt, warmup, warmup_cosine

__all__ = ["Probe", "Schedule", "Upkeep", "adamw", "inverse_sqrt", "warmup", "warmup_cosine"]
