"""The evolver in a training loop. Read :mod:`neuroexapt.train.loop`."""

from neuroexapt.train.bottleneck import read_squeezes
from neuroexapt.train.loop import Epoch, Evolver

__all__ = ["Epoch", "Evolver", "read_squeezes"]
