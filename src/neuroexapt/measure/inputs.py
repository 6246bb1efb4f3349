"""What the readers of a width are given: the mean and the products of their inputs.

Shapes in names: B blocks of a weight (groups, experts; mostly 1), R rows (samples times
positions), C inputs of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt.capture.masks import is_mask
from neuroexapt.couple import AxisMap, Reader, Reading, find_readers, passed_on, reading
from neuroexapt.couple.readers import Layout
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Batch, LossFn, plain_attention, undisturbed

_ROWS = 1 << 15  # rows that are turned to double precision at a time


@dataclass(frozen=True, eq=False)
class ReaderInputs:
    """What the weights that read a width are multiplied with, over data.

    A weight of shape (n, ...) is seen as (B, n / B, ...), B being its number of groups or experts.

    Attributes:
        means: by weight, the mean of what each entry is multiplied with, in a shape that
            broadcasts to (B, n / B, ...); at the padded border of a convolution that is zero.
        products: by weight, (B, C + 1, C + 1): over rows x of inputs with a 1 behind, the sum of
            the outer products of x with itself; its last entry counts the rows. C counts the
            inputs of a block, or the channels where a map was flattened, each place being a row.
    """

    means: Mapping[str, Tensor]
    products: Mapping[str, Tensor]


def reader_inputs(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    axes: AxisMap,
    widths: Collection[str] | None = None,
    *,
    products: bool = False,
    limit: int = 4096,
) -> ReaderInputs:
    """Run the model on some batches and collect what the readers of its widths are given.

    What :class:`~neuroexapt.Narrow` needs to give the mean of what it removes to the readers'
    biases (``means``), or to fit them anew by least squares (``products``).

    Invariant: as :func:`undisturbed`, without a graph. The model runs in evaluation mode.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``; its value is not used.
        batches: batches to run.
        axes: the model's present map.
        widths: names of the widths whose readers are wanted; by default all.
        products: collect the products too. Memory: 8 (C + 1)^2 bytes a reader.
        limit: readers with more inputs than this get no products.

    Returns:
        Means and products in float64, on the CPU. A weight that never ran, or that is read in
        several ways, is absent.

    Raises:
        MeasureError: a name in ``widths`` that is no width, or no batch.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(1.0), net[0].bias.zero_()
        >>> axes = map_axes(net, (x,))
        >>> found = reader_inputs(net, lambda model, x: model(x).mean(), [x], axes, products=True)
        >>> found.means["2.weight"].tolist(), found.products["2.weight"][0].diagonal().tolist()
        ([[[2.0, 2.0]]], [10.0, 10.0, 2.0])
    """
    readers = _wanted(axes, widths)
    mode = _Listener(model, readers, limit if products else 0)
    with undisturbed(model), visible_products(model), torch.no_grad():
        model.eval()
        any_batch = False
        for batch in batches:
            any_batch = True
            with mode:
                loss_fn(model, batch)
            mode.forget()
    if not any_batch:
        raise no_batches("reader_inputs")
    return ReaderInputs(
        {name: tally.mean() for name, tally in mode.tallies.items() if tally.rows},
        {n: t.products.cpu() for n, t in mode.tallies.items() if t.products is not None},
    )


def no_batches(place: str) -> MeasureError:
    """Nothing was measured: an iterator that had been read to its end, say."""
    return MeasureError(
        place,
        seen="no batch",
        needed="at least one",
        next_step="pass a list of batches; a generator can be read only once",
    )


def _wanted(axes: AxisMap, widths: Collection[str] | None) -> dict[str, Reader]:
    unknown = [name for name in widths or () if name not in axes.widths]
    if unknown:
        raise MeasureError(
            "reader_inputs",
            seen=repr(unknown[0]),
            needed="names of widths, such as 'features.0.out'",
            next_step="take the names from `map_axes(...).widths`",
        )
    names = axes.widths if widths is None else widths
    tensors = {
        place.tensor
        for name in names
        for place in axes.widths[name].appearances
        if "consumer" in place.roles
    }
    readers = find_readers(axes)
    return {n: r for n, r in readers.items() if n in tensors and not r.why_not}


@contextmanager
def visible_products(model: nn.Module) -> Iterator[None]:
    """Recurrent layers and attention as operators that show their matrix products.

    Recurrent layers of cuDNN have no gradient in evaluation mode either.
    """
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        with plain_attention():
            yield
        return
    # The context managers of torch would set more than this switch, and warn of it.
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        with plain_attention():
            yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


@dataclass
class _Tally:
    """Running sums for one weight."""

    sums: Tensor | None = None
    rows: int = 0
    products: Tensor | None = None

    def add(self, sums: Tensor, rows: int) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.rows += rows

    def mean(self) -> Tensor:
        assert self.sums is not None
        return (self.sums / self.rows).cpu()


class _Listener(TorchDispatchMode):
    """Sees every operator of a run, and adds up what the wanted weights are multiplied with."""

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader], limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers, self.limit = readers, limit
        self.tallies: dict[str, _Tally] = {}
        named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        named.update(model.named_buffers(remove_duplicate=False))
        self._named = {name: named[name] for name in readers}
        self._masks = {id(tensor) for name, tensor in named.items() if is_mask(name)}
        # The tensors are kept beside their layouts: an id is one object's while that lives.
        self._views: dict[int, tuple[Tensor, str, Layout]] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of the views of the last run."""
        self._views = {
            id(tensor): (tensor, name, tuple(range(tensor.dim())))
            for name, tensor in self._named.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.removeprefix("aten::")
        held = self._held(args[0]) if args else None
        if held is not None and isinstance(result, Tensor):
            layout = passed_on(op, args, held[1], result.shape)
            if op == "mul":
                layout = held[1] if id(args[1]) in self._masks else None
            if layout is not None:
                self._views.setdefault(id(result), (result, held[0], layout))
        found = reading(op, args, self._known)
        if found is not None:
            self._take(found, args, result)
        return result

    def _held(self, value: Any) -> tuple[str, Layout] | None:
        entry = self._views.get(id(value))
        return (entry[1], entry[2]) if entry is not None else None

    def _known(self, value: Any) -> tuple[str, Layout] | None:
        return self._held(value) if isinstance(value, Tensor) else None

    def _take(self, found: Reading, args: Sequence[Any], result: Tensor) -> None:
        reader = self.readers[found.tensor]
        if (found.dim, found.out, found.blocks) != (reader.dim, reader.out, reader.blocks):
            return
        if not result.numel():
            return
        tally = self.tallies.setdefault(found.tensor, _Tally())
        x = found.x.detach()
        weight = self._named[found.tensor]
        if found.convolution:
            tally.add(*_seen_by_kernel(x, weight, args, result, found))
            x_BRC = _channels(x, found.blocks)
        else:
            x_BRC = _rows(x, found)
            sums = _double(x_BRC).sum(1) if len(x_BRC) > 1 else _summed(x_BRC[0])[None]
            shape = [found.blocks] + [1] * weight.dim()
            shape[found.dim + 1] = sums.shape[1]
            tally.add(sums.reshape(shape), x_BRC.shape[1])
        x_BRC = _by_place(x_BRC, reader.inner)
        if x_BRC.shape[-1] <= self.limit:
            _add_products(tally, x_BRC)


def _double(x: Tensor) -> Tensor:
    # Accelerators without float64 (MPS) do their sums in float32.
    return x.float() if x.device.type == "mps" else x.double()


def _summed(x_RC: Tensor) -> Tensor:
    """Column sums, a part at a time, so that no double copy of all rows is made."""
    parts = [_double(part).sum(0) for part in x_RC.split(_ROWS)]
    return torch.stack(parts).sum(0)


def _rows(x: Tensor, found: Reading) -> Tensor:
    """(B, R, C): the inputs of a matrix product as rows."""
    if found.rows_last:
        x = x.transpose(-1, -2)
    if found.blocks > 1:
        return x
    return x.reshape(1, -1, x.shape[-1])


def _channels(x: Tensor, blocks: int) -> Tensor:
    """(B, R, C): every position of a convolution's input as a row of channels, by groups."""
    rows = x.movedim(1, -1).reshape(-1, blocks, x.shape[1] // blocks)
    return rows.transpose(0, 1)


def _by_place(x_BRC: Tensor, inner: int) -> Tensor:
    """Every place of a flattened map as a row of its own."""
    if inner == 1:
        return x_BRC
    blocks, rows, size = x_BRC.shape
    return x_BRC.reshape(blocks, rows, size // inner, inner).transpose(2, 3).flatten(1, 2)


def _add_products(tally: _Tally, x_BRC: Tensor) -> None:
    blocks, _, size = x_BRC.shape
    if tally.products is None:
        tally.products = _double(x_BRC.new_zeros(blocks, size + 1, size + 1))
    for part in x_BRC.split(_ROWS, dim=1):
        wide = _double(part)
        ones = torch.cat([wide, wide.new_ones(blocks, part.shape[1], 1)], -1)
        tally.products += ones.transpose(1, 2) @ ones


def _seen_by_kernel(
    x: Tensor, weight: Tensor, args: Sequence[Any], result: Tensor, found: Reading
) -> tuple[Tensor, int]:
    """Sums over samples and output positions of what each entry of a kernel is multiplied with."""
    total, kernel = _total(x), weight.shape[2:]
    spatial = len(kernel)
    stride, padding, dilation = (_per_dim(args[place], spatial) for place in (3, 4, 5))
    out = result.shape[2:]
    parts = []
    for offset in itertools.product(*map(range, kernel)):
        where = [slice(None)] + [
            _met(size, (o, s, p, d), n, transposed=bool(args[6]))
            for size, o, s, p, d, n in zip(
                total.shape[1:], offset, stride, padding, dilation, out, strict=True
            )
        ]
        parts.append(total[tuple(where)].flatten(1).sum(1))
    sums = torch.stack(parts, -1).reshape(found.blocks, -1, *kernel)
    return sums.unsqueeze(found.out + 1), len(x) * prod(out)


def _total(x: Tensor) -> Tensor:
    total = _double(x[:1]).sum(0)
    for part in x[1:].split(64):
        total = total + _double(part).sum(0)
    return total


def _per_dim(values: Sequence[int], count: int) -> list[int]:
    return [int(v) for v in (values if len(values) == count else list(values) * count)]


def _met(size: int, tap: tuple[int, int, int, int], out: int, *, transposed: bool) -> slice:
    """The input positions that one tap of a kernel meets along one direction.

    An output p of a convolution meets input p * stride + tap * dilation - padding; an input q of
    a transposed one lands on output q * stride + tap * dilation - padding.
    """
    offset, stride, padding, dilation = tap
    shift = offset * dilation - padding
    if transposed:
        first = max(0, -(shift // stride)) if shift < 0 else 0
        last = min(size - 1, (out - 1 - shift) // stride)
        return slice(first, max(first, last + 1))
    p = max(0, -(shift // stride)) if shift < 0 else 0
    last = min(out - 1, (size - 1 - shift) // stride)
    if last < p:
        return slice(0, 0)
    return slice(p * stride + shift, last * stride + shift + 1, stride)
