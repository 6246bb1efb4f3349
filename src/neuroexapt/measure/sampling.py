"""Gradients and activations of a model, taken without disturbing its training.

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NoReturn

import torch
from torch import Tensor, nn

from neuroexapt.capture.interrupts import breathe
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import (
    Batch,
    LossFn,
    RandomStream,
    plain_attention,
    scalar_loss,
    undisturbed,
)

_END = object()


def gradients(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    only: Collection[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the mean loss of each batch, one dict per batch.

    Invariant: parameters, ``.grad``, buffers, generators and train/eval flags are bit-equal before
    the first item, between items and after the last (see `undisturbed`); drawing from `batches`,
    which may shuffle, is inside the promise. The train/eval flags are used as they are. Random
    layers draw different numbers for each batch.

    Args:
        model: the model; a parameter shared by several modules appears once.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: micro-batches of one size.
        only: names of the parameters wanted; by default all trainable ones.

    Yields:
        Parameter name to gradient: detached, shape, dtype and device of the parameter, zeros
        where the loss does not depend on the parameter.

    Raises:
        MeasureError: no trainable parameter, an unknown name in `only`, a loss that is no scalar,
            or a loss without a graph.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> [row] = gradients(layer, lambda model, x: model(x).mean(), [batch])
        >>> row["weight"].tolist(), layer.weight.grad
        ([[2.0, 3.0]], None)
    """
    parameters = _trainable(model, only)
    stream = RandomStream()
    with undisturbed(model, stream=stream):
        remaining = iter(batches)
    while True:
        with undisturbed(model, stream=stream):
            batch = next(remaining, _END)
            row = {} if batch is _END else _gradient(model, loss_fn, batch, parameters)
        if batch is _END:
            return
        yield row


def _trainable(model: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    found = {name: held for name, held in model.named_parameters() if held.requires_grad}
    names = list(found) if only is None else list(only)
    missing = [name for name in names if name not in found]
    if missing:
        near = get_close_matches(missing[0], found, n=3)
        _refuse(
            "gradients", repr(missing[0]), "names of trainable parameters", f"pick one of {near}"
        )
    if not names:
        _refuse("gradients", "no trainable parameter", "at least one", "set requires_grad on some")
    return {name: found[name] for name in names}


def _gradient(
    model: nn.Module, loss_fn: LossFn, batch: Batch, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        loss = scalar_loss(loss_fn(model, batch))
        if not loss.requires_grad:
            _refuse(
                "loss_fn",
                "a loss without a graph",
                "a loss that depends on the parameters",
                "do not detach the loss or run loss_fn under no_grad",
            )
        wanted = list(parameters.values())
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    dense = [grad.to_dense() if grad.layout is not torch.strided else grad for grad in found]
    return {name: grad.detach() for name, grad in zip(parameters, dense, strict=True)}


def _refuse(place: str, seen: str, needed: str, next_step: str) -> NoReturn:
    raise MeasureError(place, seen=seen, needed=needed, next_step=next_step)


@dataclass(frozen=True)
class Probe:
    """Squared gradients of a model, to be measured when they are asked for.

    Args:
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: re-iterable batches of the size used in training.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
        >>> probe = Probe(lambda model, x: model(x).mean(), batches)
        >>> probe(layer)["weight"].tolist()
        [[5.0, 10.0]]
    """

    loss_fn: LossFn
    batches: Iterable[Batch]

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """The mean over the batches of each entry's squared gradient, by parameter name.

        Invariant: as :func:`gradients`, the model is left as it was.

        Raises:
            MeasureError: no batches, or what :func:`gradients` raises.
        """
        sums: dict[str, Tensor] = {}
        count = 0
        for row in gradients(model, self.loss_fn, self.batches):
            squares = {name: grad.square() for name, grad in row.items()}
            sums = {name: sums[name] + value if sums else value for name, value in squares.items()}
            count += 1
        if not count:
            _refuse("Probe", "no batches", "at least one, each time", "pass a list of batches")
        return {name: total / count for name, total in sums.items()}


class Reservoir:
    """A uniform sample of at most `limit` rows out of a stream, in order of arrival.

    Each row gets a random key and the largest keys stay: exact, with memory of `limit` rows.
    """

    def __init__(self, limit: int, dtype: torch.dtype = torch.float32) -> None:
        self.limit = limit
        self.dtype = dtype
        # One fixed seed for all: modules with equally many rows keep the same ones.
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows_NC: Tensor | None = None

    def add(self, rows_NC: Tensor) -> None:
        """Take rows of shape (N, C) into account."""
        self.add_from(rows_NC.shape[0], lambda at_K: rows_NC[at_K.to(rows_NC.device)])

    def add_from(self, count: int, take: Callable[[Tensor], Tensor]) -> None:
        """Take `count` rows into account, of which `take` makes those that are asked for.

        Chosen first, so that no more than `limit` rows are ever copied.
        """
        keys = torch.rand(count, dtype=torch.float64, generator=self.generator)
        if self.rows_NC is not None and len(self.keys) == self.limit:
            # Of these alone some will stay.
            best = torch.nonzero(keys > self.keys.min())[:, 0]
            best = best[self._best(keys[best])]
        else:
            best = self._best(keys)
        rows_NC = take(best).to("cpu", self.dtype)
        keys = torch.cat([self.keys, keys[best]])
        held_NC = rows_NC if self.rows_NC is None else torch.cat([self.rows_NC, rows_NC])
        best = self._best(keys)
        self.keys, self.rows_NC = keys[best], held_NC[best]

    def _best(self, keys: Tensor) -> Tensor:
        return keys.topk(min(self.limit, len(keys))).indices.sort().values


def activations(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    modules: Sequence[str],
    *,
    channel_dim: Mapping[str, int],
    limit: int = 4096,
    entering: bool = False,
) -> dict[str, Tensor]:
    """Collect what modules put out, or take in, as a matrix of rows by units.

    Rows are samples times positions.

    Invariant: as `undisturbed`, without a graph; hooks exist only during the call, and memory is
    bounded by `limit` rows per module. The rows kept are a uniform sample, drawn with a generator
    of its own; modules with equally many rows keep the same ones, so their rows correspond.

    Args:
        model: the model, run with its train/eval flags as they are.
        loss_fn: ``loss_fn(model, batch)``; its value is not used.
        batches: batches to run.
        modules: module paths; of a tuple, list or mapping put out, the first tensor is taken.
        channel_dim: module path to the dimension of its output that counts units (1 for a
            convolution); may be left out for outputs of shape (N, C).
        limit: most rows kept per module.
        entering: collect the first positional input of each module instead of its output.

    Returns:
        Module path to acts_NC, float32 on the CPU, rows in order of arrival. A module that never
        ran is absent; of a module that ran several times all outputs count.

    Raises:
        MeasureError: unknown path, output without a floating-point tensor, or a dimension of units
            that is missing, out of range or changing.

    Example:
        >>> conv = nn.Sequential(nn.Conv2d(3, 5, 1))
        >>> images = [torch.randn(2, 3, 4, 4)]
        >>> def loss_fn(model, images):
        ...     return model(images).mean()
        >>> found = activations(conv, loss_fn, images, ["0"], channel_dim={"0": 1}, limit=10)
        >>> found["0"].shape
        torch.Size([10, 5])
    """
    targets = {path: module_at(model, path) for path in modules}
    kept = {path: Reservoir(limit) for path in modules}
    handles = []
    try:
        for path, module in targets.items():
            hook = _collector(path, channel_dim.get(path), kept[path], entering)
            handles.append(module.register_forward_hook(hook))
        # Not every torch looks for hooks before it takes the fused path of attention.
        with undisturbed(model), plain_attention(), torch.no_grad():
            for batch in batches:
                breathe()
                loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: held.rows_NC for path, held in kept.items() if held.rows_NC is not None}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        MeasureError: there is none; near paths are suggested.
    """
    found: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if path not in found:
        near = get_close_matches(path, found, n=3)
        _refuse("activations", repr(path), "paths of modules", f"pick one of {near}")
    return found[path]


def _collector(
    path: str, dim: int | None, kept: Reservoir, entering: bool
) -> Callable[[nn.Module, object, object], None]:
    def collect(_module: nn.Module, inputs: object, output: object) -> None:
        kept.add(_rows(path, dim, inputs if entering else output, kept.rows_NC))

    return collect


def _rows(path: str, dim: int | None, output: object, held_NC: Tensor | None) -> Tensor:
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point():
        seen = type(output).__name__ if tensor is None else str(tensor.dtype)
        raise MeasureError(
            path,
            seen=f"output {seen}",
            needed="a floating-point tensor",
            next_step="measure a module inside or before it",
        )
    shape = tuple(tensor.shape)
    dim = 1 if dim is None and tensor.dim() == 2 else dim
    if dim is None or tensor.dim() < 2 or not -tensor.dim() <= dim < tensor.dim():
        _refuse(
            path,
            f"channel_dim {dim} for an output of shape {shape}",
            "a dimension of an output with at least two",
            "pass channel_dim for this path",
        )
    rows_NC = tensor.detach().movedim(dim, -1).flatten(0, -2)
    if held_NC is not None and held_NC.shape[1] != rows_NC.shape[1]:
        _refuse(
            path,
            f"{rows_NC.shape[1]} units after {held_NC.shape[1]}",
            "the same number of units in every run",
            "check channel_dim for this path",
        )
    return rows_NC


def first_tensor(output: object) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings, or None."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        found = (first_tensor(item) for item in output)
        return next((tensor for tensor in found if tensor is not None), None)
    return output if isinstance(output, Tensor) else None
