"""What a model costs: parameters, floating-point operations, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import batch_size_of, plain_attention, undisturbed


class LayerRow(TypedDict):
    """One line of `layers`; `shape` reads like ``32x16x3x3``."""

    name: str
    type: str
    shape: str
    parameters: int


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters, trainable or not, shared ones once.

    Raises:
        MeasureError: a lazy parameter has no shape yet.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(_size(name, held) for name, held in model.named_parameters())


def _size(name: str, parameter: nn.Parameter) -> int:
    if nn.parameter.is_lazy(parameter):
        raise MeasureError(
            name,
            seen="a lazy parameter without a shape",
            needed="an initialised parameter",
            next_step="run the model once on a batch",
        )
    return parameter.numel()


def count_flops(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the floating-point operations of one forward pass, per sample.

    One multiply-add counts 2. Only matrix products, convolutions, attention and recurrent layers
    are counted: normalisation, activations, pooling, element-wise work, matrix-vector products and
    custom kernels count 0. The total is divided by the first dimension of the first tensor in
    `args`, else in `kwargs`. Equal counts do not mean equal time.

    Invariant: as `undisturbed`; runs in eval mode without a graph. The fused inference path of
    attention is off meanwhile, because its operations cannot be seen.

    Args:
        model: the model.
        args: positional inputs as a tuple or list, or one input.
        kwargs: keyword inputs.

    Raises:
        MeasureError: no tensor among the inputs, or it has no samples.

    Example:
        >>> count_flops(nn.Linear(3, 2), torch.randn(5, 3))
        12
    """
    positional = tuple(args) if isinstance(args, tuple | list) else (args,)
    named = dict(kwargs or {})
    samples = batch_size_of((*positional, named))
    if samples == 0:
        raise MeasureError(
            "count_flops",
            seen="a batch of 0 samples",
            needed="at least one sample",
            next_step="pass an example input with one sample or more",
        )
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted_by_torch())
    with undisturbed(model), plain_attention(), torch.no_grad():
        model.eval()
        with counter:
            model(*positional, **named)
    return round(counter.get_total_flops() / samples)


def _uncounted_by_torch() -> dict[Any, Callable[..., int]]:
    """Formulas for fused kernels that torch leaves out; they are given shapes for tensors."""
    wanted: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_cudnn_rnn": _cudnn_recurrent_flops,
        "mkldnn_rnn_layer": _mkldnn_recurrent_flops,
    }
    aten = torch.ops.aten
    return {getattr(aten, name): rule for name, rule in wanted.items() if hasattr(aten, name)}


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    # Scores: length x keys x width. Mixing: length x keys x value width. Masks do not halve it.
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _cudnn_recurrent_flops(
    inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    matrices = (math.prod(shape) for shape in weights if len(shape) == 2)
    return 2 * math.prod(inputs[:-1]) * sum(matrices)


def _mkldnn_recurrent_flops(
    inputs: Sequence[int], weight_in: Sequence[int], weight_state: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(inputs[:-1]) * (math.prod(weight_in) + math.prod(weight_state))


def tensor_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes held by parameters, buffers, gradients and optimizer state.

    Counts storages, each once: a view of a large tensor holds the large tensor, two tied
    parameters hold one. Tensors on the meta device hold nothing. Activations and the caches of
    the allocator are not included.

    Example:
        >>> tensor_bytes(nn.Linear(3, 2))
        32
    """
    held = [*model.parameters(), *model.buffers()]
    held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        held += [tensor for state in optimizer.state.values() for tensor in _nested(state)]
    storages = [part.untyped_storage() for tensor in held for part in _dense_parts(tensor)]
    by_address = {(one.device, one.data_ptr()): one.nbytes() for one in storages if one.data_ptr()}
    return sum(by_address.values())


def _nested(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _nested(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nested(item)


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)


def layers(model: nn.Module) -> list[LayerRow]:
    """List what owns parameters, in the order of the modules.

    A module without children, or with a parameter called ``weight``, has one row, with the shape
    of its ``weight`` (else of its first parameter). Any other parameter held directly by a module
    with children (a class token, the packed projection of attention) has a row of its own, of type
    ``Parameter``. A module that was given a branch keeps its row and the name of its class.

    Invariant: the parameters of the rows sum to `count_parameters`; a shared parameter counts
    where it appears first.

    Raises:
        MeasureError: a lazy parameter has no shape yet.

    Example:
        >>> layers(nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()))
        [{'name': '0', 'type': 'Conv2d', 'shape': '32x16x3x3', 'parameters': 4640}]
    """
    seen: set[int] = set()
    return [row for path, module in model.named_modules() for row in _rows_of(path, module, seen)]


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, without the generated subclass a branch gives it.

    Example:
        >>> kind_of(nn.ReLU())
        'ReLU'
    """
    kind = type(module)
    while kind.__name__ == f"Grafted{kind.__mro__[1].__name__}":
        kind = kind.__mro__[1]
    return kind.__name__


def is_whole(module: nn.Module) -> bool:
    """Whether a module's own parameters are one layer, and not one each."""
    return next(module.children(), None) is None or "weight" in module._parameters


def _rows_of(path: str, module: nn.Module, seen: set[int]) -> list[LayerRow]:
    owned = dict(module.named_parameters(recurse=False))
    sizes = {name: _new_size(path, name, held, seen) for name, held in owned.items()}
    if not owned:
        return []
    if is_whole(module):
        main = owned.get("weight", next(iter(owned.values())))
        return [_row(path, kind_of(module), main, sum(sizes.values()))]
    return [
        _row(f"{path}.{name}".lstrip("."), "Parameter", owned[name], sizes[name]) for name in owned
    ]


def _row(name: str, kind: str, shown: Tensor, parameters: int) -> LayerRow:
    shape = "x".join(map(str, shown.shape)) or "scalar"
    return {"name": name, "type": kind, "shape": shape, "parameters": parameters}


def _new_size(path: str, name: str, parameter: nn.Parameter, seen: set[int]) -> int:
    if id(parameter) in seen:
        return 0
    seen.add(id(parameter))
    return _size(f"{path}.{name}".lstrip("."), parameter)
