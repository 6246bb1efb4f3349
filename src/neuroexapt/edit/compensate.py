"""Make up for what removed units gave to those who read them.

A reader's weight of shape (n, ...) is seen as (B, n / B, ...), B being its number of groups or
experts (mostly 1). J counts its inputs in a block, O the rest of its entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from neuroexapt.capture.masks import mask_of
from neuroexapt.couple import AxisMap, Positions, Reader, find_readers, source_index
from neuroexapt.edit.patch import Rewrite, WidthStep
from neuroexapt.edit.resize import resized
from neuroexapt.errors import EditError

_TOLD = 3  # readers named in a description


@dataclass(frozen=True, eq=False)
class Given:
    """What readers are given, as :func:`neuroexapt.measure.reader_inputs` finds it.

    Attributes:
        means: by weight, the mean of what each entry is multiplied with, in a shape that
            broadcasts to (B, n / B, ...).
        products: by weight, (B, J + 1, J + 1): sums over rows of the products of its inputs with a
            1 behind. A reader that has them is fitted anew.
        ridge: how strongly the fit is held to the old weights, beside the inputs' mean square.
    """

    means: Mapping[str, Tensor]
    products: Mapping[str, Tensor]
    ridge: float


@dataclass
class _Work:
    """What has been decided so far, in the shapes before the steps."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def compensate(
    axes: AxisMap, tensors: Mapping[str, Tensor], steps: Sequence[WidthStep], given: Given
) -> tuple[tuple[Rewrite, ...], str]:
    """New values for what stays, and one sentence about them.

    A reader loses ``W_R x_R``, R being the inputs removed. Least squares replaces ``x_R`` by its
    regression on the inputs K that stay::

        W_K' = W_K + W_R C_RK (C_KK + ridge mean(diag C_KK) I)^-1

    with C the covariance of its inputs (the second moment where nothing can be shifted), for
    convolutions that of the channels, the same for every tap of the kernel. What is still missing
    in the mean, the sum of ``(W - W') E[x]``, is added to the bias, or taken off the running mean
    of the batch norm right behind. In training mode that norm makes up for it by itself.

    Raises:
        EditError: means or products that do not fit a weight.

    He et al. 2017 for least squares on the inputs that stay.
    """
    work = _Work()
    readers = find_readers(axes)
    for name, index in _narrowed(steps, readers).items():
        _compensate_one(work, axes, tensors, readers[name], index, given)
    new = {n: tensors[n].detach() + shift.to(tensors[n]) for n, shift in work.shifts.items()}
    new.update(work.weights)
    rewrites = tuple(Rewrite(name, _after(values, steps, name)) for name, values in new.items())
    return rewrites, _told(work)


def _narrowed(steps: Sequence[WidthStep], readers: Mapping[str, Reader]) -> dict[str, Positions]:
    """Weights that lose inputs, each with the old positions that stay."""
    found: dict[str, Positions] = {}
    for step in steps:
        positions = np.asarray(step.positions, dtype=np.int64)
        for edit in step.dims:
            reader = readers.get(edit.tensor)
            if reader is not None and edit.dim == reader.dim:
                index = source_index(edit.expr, {step.width: positions})
                before = found.get(edit.tensor)
                found[edit.tensor] = index if before is None else before[index]
    return found


def _compensate_one(
    work: _Work,
    axes: AxisMap,
    tensors: Mapping[str, Tensor],
    reader: Reader,
    index: Positions,
    given: Given,
) -> None:
    name, target = reader.tensor, reader.bias or reader.mean
    fit = name in given.products
    why = reader.why_not or _why_not(axes, name, target, given)
    why = "it has no values yet" if tensors[name].is_meta else why
    if why:
        work.left.append(f"'{name}' ({why})")
        return
    old = _blocks(tensors[name], reader)
    _check_given(name, reader, old, given)
    keep = _kept(index, reader, tensors[name].shape[reader.dim])
    new = _without(old, keep, reader.dim + 1)
    if fit:
        new = _fitted(new, old, keep, reader, given, centred=bool(target))
        mask = tensors.get(mask_of(name))
        new = new if mask is None else new * _blocks(mask, reader)
        work.weights[name] = new.reshape(tensors[name].shape)
    if target:
        lost = (old - new) * given.means[name].to(old)
        over = [dim for dim in range(1, lost.dim()) if dim != reader.out + 1]
        shift = lost.sum(over).reshape(tensors[target].shape)
        signed = shift if reader.bias else -shift
        work.shifts[target] = work.shifts[target] + signed if target in work.shifts else signed


def _why_not(axes: AxisMap, name: str, target: str, given: Given) -> str:
    if name not in given.means:
        return "no means are given for it"
    if name in given.products and _also_makes(axes, name):
        return "its weight makes units as well (tied), which a fit would change"
    if not target and name not in given.products:
        return "it has neither a bias nor a batch norm right behind"
    return ""


def _also_makes(axes: AxisMap, name: str) -> bool:
    return any(
        place.tensor == name and {"consumer", "producer"} <= place.roles
        for width in axes.widths.values()
        for place in width.appearances
    )


def _blocks(weight: Tensor, reader: Reader) -> Tensor:
    """(B, n / B, ...), in double precision where the device has it."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    shape = (reader.blocks, weight.shape[0] // reader.blocks, *weight.shape[1:])
    return weight.detach().to(wide).reshape(shape)


def _check_given(name: str, reader: Reader, old: Tensor, given: Given) -> None:
    mean, products = given.means[name], given.products.get(name)
    inputs = old.shape[reader.dim + 1]
    fits = mean.dim() == old.dim() and mean.shape[reader.dim + 1] == inputs
    fits = fits and all(a in (1, b) for a, b in zip(mean.shape, old.shape, strict=True))
    if products is not None:
        size = inputs // reader.inner + 1
        fits = fits and tuple(products.shape) == (old.shape[0], size, size)
    if not fits:
        seen = f"means of shape {tuple(mean.shape)}"
        if products is not None:
            seen += f", products of shape {tuple(products.shape)}"
        raise EditError(
            name,
            seen=seen,
            needed=f"means that broadcast to {tuple(old.shape)}, and one row and column of "
            f"products for each of its {inputs // reader.inner} inputs and for 1",
            next_step="take both from `reader_inputs` on the model as it is now",
        )


def _kept(index: Positions, reader: Reader, size: int) -> Tensor:
    """(B, J): whether an input of a block stays."""
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.from_numpy(index)] = True
    if reader.dim == 0:
        return keep.reshape(reader.blocks, -1)
    return keep.expand(reader.blocks, -1)


def _without(old: Tensor, keep: Tensor, dim: int) -> Tensor:
    """The weight with zeros for the inputs that go."""
    shape = [1] * old.dim()
    shape[0], shape[dim] = keep.shape
    return old * keep.to(old).reshape(shape)


def _fitted(
    new: Tensor, old: Tensor, keep: Tensor, reader: Reader, given: Given, *, centred: bool
) -> Tensor:
    """Put the regression of what goes on what stays into the weights of what stays."""
    new = new.clone()
    for block, keep_J in enumerate(keep[:, :: reader.inner]):
        stays, goes = torch.nonzero(keep_J)[:, 0], torch.nonzero(~keep_J)[:, 0]
        products = given.products[reader.tensor][block].to(old)
        moment_JJ = products[:-1, :-1] / products[-1, -1]
        if centred:
            mean_J = products[:-1, -1] / products[-1, -1]
            moment_JJ = moment_JJ - mean_J[:, None] * mean_J[None, :]
        kept_KK = moment_JJ[stays][:, stays]
        scale = float(kept_KK.diagonal().mean()) if len(stays) else 0.0
        if not len(goes) or scale <= 0:
            continue
        kept_KK.diagonal().add_(given.ridge * scale)
        slope_KR = torch.linalg.solve(kept_KK, moment_JJ[stays][:, goes])
        # Views: what is added to these rows lands in the weight.
        rows_JO, out_JO = (
            w[block].movedim(reader.dim, 0).unflatten(0, (len(keep_J), reader.inner))
            for w in (old, new)
        )
        out_JO[stays] += torch.tensordot(slope_KR, rows_JO[goes], dims=1)
    return new


def _after(values: Tensor, steps: Sequence[WidthStep], name: str) -> Tensor:
    return resized(values, steps, name, generator=torch.Generator())


def _told(work: _Work) -> str:
    parts = []
    if work.shifts:
        parts.append(f"the mean of what went is given to {_listed(list(work.shifts))}")
    if work.weights:
        parts.append(f"{_listed(list(work.weights))} fitted anew by least squares")
    if work.left:
        parts.append(f"not made up for: {_listed(work.left)}")
    return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
