"""NeuroExapt changes a PyTorch model's architecture while it trains.

Start with :class:`Evolver` (three lines in a training loop you already have), or make one safe
change yourself with :func:`apply`. ``docs/architecture.md`` shows the rooms.
"""

from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import (
    AddRegularization,
    ExpandBottleneck,
    IncreaseCapacity,
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertPool,
    InsertResidual,
    Narrow,
    PruneWeights,
    RemoveLayer,
    Widen,
)
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard import apply, transaction
from neuroexapt.plan import Budget, Settings
from neuroexapt.record import load, save
from neuroexapt.train import Evolver

__all__ = [
    "AddRegularization",
    "AxisMap",
    "Budget",
    "Evolver",
    "ExpandBottleneck",
    "IncreaseCapacity",
    "InsertAttention",
    "InsertConv",
    "InsertLayer",
    "InsertPool",
    "InsertResidual",
    "Narrow",
    "NeuroExaptError",
    "PruneWeights",
    "RemoveLayer",
    "Settings",
    "Widen",
    "apply",
    "load",
    "map_axes",
    "save",
    "transaction",
]
