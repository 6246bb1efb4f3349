"""What every signal shares: the value it returns, and the law that measuring changes nothing.

Shapes in names: N rows (samples times positions), C units, M micro-batches, P parameters, U units.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroexapt.capture.interrupts import held_back
from neuroexapt.errors import MeasureError

Batch = Any
"""Whatever the user's loader yields; only the user's loss function looks inside."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""``loss_fn(model, batch)`` runs the model and returns the mean loss of the batch, a scalar."""


@dataclass(frozen=True)
class Reading:
    """One measured number with what is needed to judge it.

    Args:
        signal: name of the signal, such as ``effective_rank``.
        at: module path or width the number is about; ``model`` for the whole model.
        value: the number, in ``unit``.
        unit: unit of ``value`` and of ``error``.
        error: one standard error, 0 where the value is exact, or None when there was too little
            data to know it.
        samples: how many rows, batches or points the number rests on.

    Example:
        >>> Reading("effective_rank", "conv1", 12.5, "units", 0.3, 4096).error
        0.3
    """

    signal: str
    at: str
    value: float
    unit: str
    error: float | None
    samples: int


@dataclass(frozen=True)
class HoldoutScore:
    """Mean loss over a set of batches.

    Args:
        loss: mean loss per sample, in the unit of the loss function (nats for cross-entropy).
        error: standard error of ``loss``; None when there was one batch only.
        samples: number of samples.
        per_batch: loss of each batch in order, for paired comparisons on the same batches.

    Example:
        >>> HoldoutScore(loss=0.5, error=0.1, samples=64, per_batch=(0.4, 0.6)).loss
        0.5
    """

    loss: float
    error: float | None
    samples: int
    per_batch: tuple[float, ...]


@dataclass(frozen=True)
class _RandomState:
    """States of every generator a forward pass can draw from."""

    python: Any
    numpy: Any
    cpu: Tensor
    devices: Mapping[torch.device, Tensor]

    @classmethod
    def read(cls, devices: Sequence[torch.device]) -> _RandomState:
        states = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@dataclass
class RandomStream:
    """Random numbers of a measurement, carried from one `undisturbed` block to the next.

    Without it every block would start from the user's state and draw the same dropout masks.
    """

    state: _RandomState | None = None


@dataclass(frozen=True)
class _Buffers:
    """The buffers of one module: the tensor objects, and copies of the writable ones."""

    module: nn.Module
    slots: Mapping[str, Tensor | None]
    copies: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def read(cls, module: nn.Module) -> _Buffers:
        slots = dict(module._buffers.items())
        copies = [
            (held, held.clone()) for held in slots.values() if held is not None and _writable(held)
        ]
        return cls(module, slots, copies)

    def restore(self) -> None:
        now = dict(self.module._buffers.items())
        if list(now) != list(self.slots) or any(
            now[name] is not held for name, held in self.slots.items()
        ):
            self.module._buffers.clear()
            self.module._buffers.update(self.slots)
        for held, copy in self.copies:
            # `.data` has its own version counter: a live graph that saved the buffer stays valid.
            held.data.copy_(copy)


def _writable(buffer: Tensor) -> bool:
    """False for expanded buffers: torch refuses in-place writes on them, so they cannot change."""
    if buffer.layout is not torch.strided:
        return True
    steps = zip(buffer.stride(), buffer.shape, strict=True)
    return not any(stride == 0 and size > 1 for stride, size in steps)


def _devices(model: nn.Module) -> list[torch.device]:
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return [device for device in found if device.type not in ("cpu", "meta")]


@contextmanager
def undisturbed(model: nn.Module, *, stream: RandomStream | None = None) -> Iterator[None]:
    """Run a measurement and leave the model and the random generators as they were.

    Invariant: after the block, however it is left, every buffer is the same object with the same
    bits, every module has its own train/eval flag, and the generators of Python, NumPy, torch on
    the CPU and torch on the model's accelerators are in the same state. Parameters and gradients
    are not copied: a measurement must not write on them. Plain Python attributes that a forward
    sets on its module are outside the promise.

    Args:
        model: the model that the block will run.
        stream: when given, the block draws from the stream instead of the user's generators, and
            the next block with the same stream goes on where this one ended.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm.eval(), norm.train()(torch.randn(8, 2))
        >>> norm.training, norm.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    with held_back():
        yield from _undisturbed(model, stream)


def _undisturbed(model: nn.Module, stream: RandomStream | None) -> Iterator[None]:
    devices = _devices(model)
    buffers = [_Buffers.read(module) for module in model.modules()]
    flags = [(module, module.training) for module in model.modules()]
    before = _RandomState.read(devices)
    try:
        if stream is not None and stream.state is not None:
            stream.state.restore()
        yield
    finally:
        if stream is not None:
            stream.state = _RandomState.read(devices)
        before.restore()
        for held in buffers:
            held.restore()
        for module, flag in flags:
            module.training = flag


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of ``nn.MultiheadAttention`` for the block.

    That path skips the child modules, and with them every hook and every counted matrix product.

    Example:
        >>> with plain_attention():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def batch_size_of(batch: Batch) -> int:
    """Count the samples of a batch: the first dimension of its first tensor.

    Looks into tuples, lists and mappings in order, at any depth.

    Raises:
        MeasureError: there is no tensor, or the first one has no dimension.

    Example:
        >>> batch_size_of({"x": torch.zeros(8, 3), "y": torch.zeros(8)})
        8
    """
    tensor = next(_tensors_in(batch), None)
    if tensor is None or tensor.dim() == 0:
        seen = (
            f"a batch of type {type(batch).__name__}"
            if tensor is None
            else "a 0-dimensional tensor first"
        )
        raise MeasureError(
            "batch size",
            seen=seen,
            needed="a tensor, tuple, list or mapping whose first tensor has samples in dimension 0",
            next_step="wrap the loader so that it yields such batches",
        )
    return tensor.shape[0]


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def scalar_loss(loss: object) -> Tensor:
    """Return the loss if it is a tensor with one element.

    Raises:
        MeasureError: it is anything else.

    Example:
        >>> scalar_loss(torch.tensor(0.5))
        tensor(0.5000)
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.squeeze()
    seen = (
        f"a tensor of shape {tuple(loss.shape)}"
        if isinstance(loss, Tensor)
        else type(loss).__name__
    )
    raise MeasureError(
        "loss_fn",
        seen=seen,
        needed="a tensor with one element, the mean loss of the batch",
        next_step="return the loss of loss_fn(model, batch), averaged over the batch",
    )


def finite_matrix(values: Tensor, signal: str, *, rows: int) -> Tensor:
    """Return a detached float64 copy of a matrix with at least `rows` rows and no NaN or infinity.

    Stays on its device, except where float64 does not exist (MPS), which goes to the CPU.

    Raises:
        MeasureError: another number of dimensions, too few rows, no column, or a value not finite.

    Example:
        >>> finite_matrix(torch.ones(4, 2), "effective_rank", rows=2).dtype
        torch.float64
    """
    if values.dim() != 2 or values.shape[0] < rows or values.shape[1] == 0:
        raise MeasureError(
            signal,
            seen=f"values of shape {tuple(values.shape)}",
            needed=f"a matrix of at least {rows} rows and one column",
            next_step="pass more samples or micro-batches",
        )
    device = "cpu" if values.device.type == "mps" else values.device
    matrix = values.detach().to(device).to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise MeasureError(
            signal,
            seen="NaN or infinite values",
            needed="finite values",
            next_step="lower the learning rate or skip the batch that diverged",
        )
    return matrix


def standardized(acts_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every unit to mean 0 and variance 1; a constant unit becomes a column of zeros.

    Invariant: ``z_NC.T @ z_NC / N`` is the correlation matrix, unchanged when a unit is scaled or
    shifted.

    Args:
        acts_NC: activations in float64, (N, C).

    Returns:
        z_NC in float64, and alive_C: False where the unit has the same value in every row.

    Example:
        >>> acts_NC = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
        >>> z_NC, alive_C = standardized(acts_NC)
        >>> z_NC.tolist(), alive_C.tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [True, False])
    """
    # Equality of the extremes is exact; equal values minus their mean are 0 only up to rounding.
    alive_C = acts_NC.amax(0) != acts_NC.amin(0)
    centred_NC = acts_NC - acts_NC.mean(0)
    largest_C = centred_NC.abs().amax(0).where(alive_C, 1.0)
    # Dividing by the largest value first keeps the square of tiny and huge units representable.
    shape_NC = centred_NC / largest_C
    spread_C = shape_NC.square().mean(0).sqrt().where(alive_C, 1.0)
    return (shape_NC / spread_C).where(alive_C, 0.0), alive_C
