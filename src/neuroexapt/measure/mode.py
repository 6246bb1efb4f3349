"""The mode in which a model in training is measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ENOUGH = 16  # samples whose statistics stand for those of the data


def live_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that take the statistics of their batch now: none that is frozen."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]


def measuring(model: nn.Module, samples: int, norms: Sequence[_BatchNorm] | None = None) -> None:
    """Evaluation mode, but batch norms take the statistics of the batch they are given.

    In the middle of a run the running statistics lag behind the weights: at a high learning rate
    that alone moved a held-out loss by half a nat, more than any change of the architecture does.
    Batches of fewer than 16 samples are left to the running statistics, and so are norms that the
    user has frozen. Call it inside ``undisturbed``, which brings flags and statistics back.

    Args:
        model: the model.
        samples: in a batch.
        norms: the norms this is about; by default those of :func:`live_norms`.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> measuring(net, samples=64)
        >>> [module.training for module in net]
        [True, False]

    Wu and Johnson 2021 (on statistics that lag).
    """
    norms = live_norms(model) if norms is None else norms
    model.eval()
    for norm in norms:
        norm.training = samples >= ENOUGH
