"""The evolver in a training loop. Read :mod:`neuroexapt.train.loop`."""

from neuroexapt.train.bottleneck import read_squeezes
from neuroexapt.train.epoch import Epoch
from neuroexapt.train.loop import Evolver
from neuroexapt.train.search import Proposal

__all__ = ["Epoch", "Evolver", "Proposal", "read_squeezes"]
