"""NeuroExapt changes a PyTorch model's architecture while it trains.

Start with :class:`Evolver` (three lines in a training loop you already have), or make one safe
change yourself with :func:`apply`. ``docs/architecture.md`` shows the rooms.
"""

from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import InsertConv, InsertResidual, Narrow, Widen
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard import apply, transaction

__all__ = [
    "AxisMap",
    "InsertConv",
    "InsertResidual",
    "Narrow",
    "NeuroExaptError",
    "Widen",
    "apply",
    "map_axes",
    "transaction",
]
