"""What single weights are worth, and what masked ones would earn, from gradients alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuroexapt.capture.masks import is_mask, mask_of
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, batch_size_of
from neuroexapt.measure.sampling import gradients

_KINDS = ("taylor", "fisher")


def weight_scores(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    kind: str = "fisher",
    only: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Expected rise of the loss if a single weight w becomes zero, for every weight.

    ``"taylor"`` is the first-order term ``|mean(g) * w|``, ``"fisher"`` the second-order term
    ``F * w**2 / 2`` with the diagonal empirical Fisher information F, the mean squared gradient
    of a sample. That is estimated from the scatter between micro-batches of B samples,
    ``B * var(g) + mean(g)**2``, so that no gradient of a single sample is needed. Both judge
    weights one at a time.

    Invariant: as :func:`gradients`. A weight of zero scores zero.

    Args:
        model: the model, run with its train/eval flags as they are.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: micro-batches of one size.
        kind: ``"taylor"`` or ``"fisher"``.
        only: names of the parameters wanted; by default all trainable ones.

    Returns:
        Parameter name to scores of its shape, in the unit of the loss, float32 (float64 for
        such parameters), on its device.

    Raises:
        MeasureError: an unknown kind, no batch, a single one for ``"fisher"``, or what
            :func:`gradients` raises.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])]
        >>> def loss_fn(model, x):
        ...     return model(x).mean()
        >>> weight_scores(layer, loss_fn, batches, kind="taylor")["weight"].tolist()
        [[4.0, 2.0]]
        >>> weight_scores(layer, loss_fn, batches)["weight"].tolist()  # (2 + 4) * 4 / 2 and 4 / 2
        [[12.0, 2.0]]

    Molchanov et al. 2017 (first order); LeCun, Denker and Solla 1990 with the Fisher information
    in place of the Hessian, as Theis et al. 2018 (second order).
    """
    if kind not in _KINDS:
        raise MeasureError(
            "weight_scores", seen=f"kind={kind!r}", needed=f"one of {_KINDS}", next_step="name one"
        )
    sizes: list[int] = []
    means, squares = dict[str, Tensor](), dict[str, Tensor]()

    def sized(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(batch_size_of(batch))
        return loss_fn(model, batch)

    for count, row in enumerate(gradients(model, sized, batches, only=only), start=1):
        for name, gradient in row.items():
            wide = gradient if gradient.dtype == torch.float64 else gradient.float()
            old = means.get(name, torch.zeros_like(wide))
            means[name] = old + (wide - old) / count
            # Welford 1962: a difference of large sums would lose a small variance.
            squares[name] = squares.get(name, 0) + (wide - old) * (wide - means[name])
    needed = 2 if kind == "fisher" else 1
    if len(sizes) < needed:
        raise MeasureError(
            "weight_scores",
            seen=f"{len(sizes)} batches",
            needed=f"at least {needed}",
            next_step="pass more micro-batches",
        )
    weights = {name: p.detach().to(means[name].dtype) for name, p in _named(model, means)}
    if kind == "taylor":
        return {name: (means[name] * weight).abs() for name, weight in weights.items()}
    size = sum(sizes) / len(sizes)
    information = {
        name: size * squares[name] / (len(sizes) - 1) + means[name].square() for name in means
    }
    return {name: information[name] * weight.square() / 2 for name, weight in weights.items()}


def _named(model: nn.Module, wanted: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if name in wanted]


def dense_gradients(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The mean gradient for every weight that has a mask, as if the mask let all weights through.

    The loss is that of the masked model; only the way back ignores the masks, so that a weight
    that is held at zero shows what it would earn.

    Invariant: as :func:`gradients`.

    Raises:
        MeasureError: no trainable weight has a mask, no batch, or what :func:`gradients` raises.

    Example:
        >>> from neuroexapt import PruneWeights, apply
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
        >>> done = apply(layer, PruneWeights("", share=0.5), (x,))
        >>> dense_gradients(layer, lambda model, x: model(x).sum(), [x])["weight"].tolist()
        [[3.0, 4.0]]

    Evci et al. 2020 (RigL).
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    masked = [
        name for name, p in model.named_parameters() if p.requires_grad and mask_of(name) in buffers
    ]
    if not masked:
        raise MeasureError(
            "dense_gradients",
            seen="no trainable weight with a mask",
            needed="a model with pruned weights",
            next_step="apply PruneWeights first",
        )
    lens = _Lens(model, loss_fn)
    aliases = dict(model.named_parameters(remove_duplicate=False))

    def unmasked(model: nn.Module, batch: Batch) -> Tensor:
        seen = {f"model.{n}": torch.ones_like(b) for n, b in buffers.items() if is_mask(n)}
        for name, stored in _named(model, masked):
            # The product in value, the stored weight in gradient.
            held = stored.detach()
            opened = stored + (held * buffers[mask_of(name)] - held)
            seen.update({f"model.{n}": opened for n, p in aliases.items() if p is stored})
        found: Tensor = functional_call(lens, seen, (batch,), tie_weights=False)
        return found

    total, count = dict[str, Tensor](), 0
    for row in gradients(model, unmasked, batches, only=masked):
        count += 1
        total = {name: grad + total.get(name, 0) for name, grad in row.items()}
    if not count:
        raise MeasureError(
            "dense_gradients", seen="no batch", needed="at least one", next_step="pass some"
        )
    return {name: grad / count for name, grad in total.items()}


class _Lens(nn.Module):
    """A loss as a module, so that its model can be seen with other tensors in it."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)
