"""The evolver in a training loop. Read :mod:`neuroexapt.train.loop`."""

from neuroexapt.train.bottleneck import read_squeezes
from neuroexapt.train.loop import Evolver
from neuroexapt.train.resume import Epoch

__all__ = ["Epoch", "Evolver", "read_squeezes"]
