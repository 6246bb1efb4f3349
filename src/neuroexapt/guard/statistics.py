"""Batch norm statistics, measured anew: what a change of widths leaves behind is not what flows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neuroexapt.capture.restore import restored
from neuroexapt.guard.holders import check_swappable
from neuroexapt.guard.ledger import Ledger, swap

LossFn = Callable[[nn.Module, Any], object]


def reestimate(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> tuple[str, ...]:
    """Set the running statistics of every batch norm to those of some batches.

    Running averages remember the model before the last edit. After :class:`Narrow` this is worth
    more than the choice of the score. Each batch is normalised by its own statistics, as in
    training; the new mean and (unbiased) variance are those of all values a norm was given, batches
    of any size together. Everything else runs in evaluation mode.

    Invariant: nothing else changes: parameters, gradients, momentum, ``num_batches_tracked``,
    flags, other buffers and random states; buffers keep their identity. A norm that no batch
    reaches stays, and so does one that its user froze (in evaluation mode inside a model in
    training mode).

    Args:
        model: the model the user holds, unwrapped.
        loss_fn: ``loss_fn(model, batch)``; its value is not used.
        batches: some 10 to 50 training batches.

    Returns:
        The names of the norms that have new statistics.

    Raises:
        GuardError: a live graph or weak reference holds a buffer; nothing was written.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [7.0], [13.0]])
        >>> reestimate(net, lambda model, batch: model(batch), x.split(2))
        ('0',)
        >>> net[0].running_mean.item(), net[0].running_var.item() == x.var().item()
        (5.0, True)

    Wu and Johnson 2021 (precise batch norm).
    """
    ledger = Ledger()
    try:
        names = renew_statistics(ledger, model, loss_fn, batches)
    except BaseException:
        ledger.roll_back()
        raise
    ledger.forget()
    return names


def renew_statistics(
    ledger: Ledger, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]
) -> tuple[str, ...]:
    """:func:`reestimate` on a ledger that can take it back."""
    norms = _norms(model)
    sums = _measured(model, norms, loss_fn, batches)
    done = {name: held for name, held in sums.items() if held.count > 1}
    held = {
        f"{name}.{kind}".lstrip("."): (norms[name]._buffers[kind], value)
        for name, total in done.items()
        for kind, value in (("running_mean", total.mean()), ("running_var", total.variance()))
    }
    tensors = {name: tensor for name, (tensor, _) in held.items() if tensor is not None}
    check_swappable(tensors)
    for name, tensor in tensors.items():
        swap(ledger, tensor, torch.empty_like(tensor).copy_(held[name][1]), name)
    return tuple(done)


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and (module.training or not model.training)
    }


@dataclass
class _Sums:
    """Sums over all values of each channel: their number, themselves, their squares' deviation."""

    count: int = 0
    means: Tensor | float = 0.0
    spread: Tensor | float = 0.0

    def add(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Pool with another set (Chan, Golub and LeVeque 1983), which cancels nothing."""
        total = self.count + count
        gap = mean - self.means
        self.spread = (
            self.spread + variance * (count - 1) + gap * gap * (self.count * count / total)
        )
        self.means = self.means + gap * (count / total)
        self.count = total

    def mean(self) -> Tensor:
        return torch.as_tensor(self.means)

    def variance(self) -> Tensor:
        return torch.as_tensor(self.spread) / (self.count - 1)


def _measured(
    model: nn.Module, norms: Mapping[str, _BatchNorm], loss_fn: LossFn, batches: Iterable[Any]
) -> dict[str, _Sums]:
    sums = {name: _Sums() for name in norms}
    with ExitStack() as stack:
        stack.enter_context(restored(model, training=False))
        stack.enter_context(torch.no_grad())
        _lend_buffers(model)
        for name, norm in norms.items():
            vars(norm)["training"] = True
            norm.momentum = 1.0  # its running statistics are those of the last call
            _reset(norm)
            handle = norm.register_forward_hook(_collector(sums[name]))
            stack.callback(handle.remove)
        for batch in batches:
            loss_fn(model, batch)
    return sums


def _lend_buffers(model: nn.Module) -> None:
    """Give every module copies of its buffers; who restores the modules puts the real ones back."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                copies.setdefault(id(buffer), buffer.clone())
                module._buffers[name] = copies[id(buffer)]


def _reset(norm: _BatchNorm) -> None:
    """Old statistics times nothing are nothing, unless they are not finite."""
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)


def _collector(sums: _Sums) -> Callable[[_BatchNorm, tuple[Any, ...], object], None]:
    def collect(norm: _BatchNorm, inputs: tuple[Any, ...], output: object) -> None:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None or not isinstance(output, Tensor):
            return
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        sums.add(mean.to(wide, copy=True), variance.to(wide), output.numel() // len(mean))

    return collect
