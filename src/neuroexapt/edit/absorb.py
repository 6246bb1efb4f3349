"""One affine map folded into a linear layer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroexapt.capture import Call, ModuleRun, TensorRef, Trace
from neuroexapt.capture.flow import VIEWS, Flow
from neuroexapt.capture.masks import MASK
from neuroexapt.couple import AxisMap
from neuroexapt.edit.graft import is_branch
from neuroexapt.errors import EditError

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.linear", "aten.convolution")
_AROUND = VIEWS | {"aten.add", "aten.empty", "aten.clone"}
_WITH_BIAS = ("Linear", "Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class Affine:
    """x to ``matrix @ x + offset`` over channels; a vector as matrix scales each by itself.

    ``preserves`` is the promise a model keeps that has it folded in.
    """

    matrix: Tensor
    offset: Tensor | None
    preserves: str


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer, as the run shows it.

    Attributes:
        path: its module.
        weight: name of its weight.
        bias: name of its bias; None if it has none.
        out_dim: the dimension of the weight that makes units.
        in_dim: the dimension of the weight that reads units.
        groups: groups of channels that do not meet.
        plain: whether each position is read by itself: no kernel, no stride.
        padded: whether it reads zeros beyond the border.
        shape: of the weight.
    """

    path: str
    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    groups: int
    plain: bool
    padded: bool
    shape: tuple[int, ...]


def run_of(trace: Trace, path: str) -> ModuleRun:
    """The one call of a module in a run.

    Raises:
        EditError: it runs more than once, or not at all.
    """
    runs = [run for run in trace.runs if run.path == path]
    if len(runs) == 1:
        return runs[0]
    raise EditError(
        path,
        seen=f"{len(runs)} calls of it in one forward",
        needed="one",
        next_step="name a module that runs once, or leave `into` out",
    )


def layer_at(axes: AxisMap, path: str) -> Layer:
    """The linear or convolution layer at a path.

    Raises:
        EditError: there is another kind of layer, or one whose weight something else uses too.
    """
    trace = axes.traces[0]
    run = run_of(trace, path)
    calls = trace.calls[run.start : run.stop]
    own = {ref: name for name, ref in trace.tensors.items() if name.startswith(f"{path}.")}
    products = [call for call in calls if call.op in _PRODUCTS]
    odd = [call.op for call in calls if call.op not in (*_PRODUCTS, *_AROUND)]
    inside = [name for name in axes.modules if name.startswith(f"{path}.")]
    if len(products) != 1 or odd or any(is_branch(name.rpartition(".")[2]) for name in inside):
        raise _no_layer(path, ", ".join(odd) or f"{len(products)} products with a weight")
    found = _read(products[0], calls, own)
    if found is None or f"{path}.{MASK}weight" in axes.tensors:
        raise _no_layer(path, "a weight that is computed, or masked")
    layer, ref = found
    names = [name for name, other in trace.tensors.items() if other == ref]
    outside = [at for at in Flow(trace).readers(ref) if not run.start <= at < run.stop]
    if len(names) > 1 or outside:
        raise _no_layer(path, f"'{layer.weight}', which other layers use too")
    return layer


def _no_layer(path: str, seen: str) -> EditError:
    return EditError(
        path,
        seen=seen,
        needed="a linear or convolution layer with a weight of its own and nothing beside it",
        next_step="name another layer, or leave `into` out",
    )


def _read(
    product: Call, calls: tuple[Call, ...], own: dict[TensorRef, str]
) -> tuple[Layer, TensorRef] | None:
    conv = product.op == "aten.convolution"
    operand = product.inputs[1] if conv or product.op == "aten.linear" else product.inputs[-1]
    ref, turned = operand, product.op == "aten.linear"
    for call in reversed(calls):
        if ref in call.outputs and call.op in VIEWS and ref not in own:
            ref, turned = call.inputs[0], turned or call.op in ("aten.t", "aten.transpose")
    if ref not in own:
        return None
    path = own[ref].rpartition(".")[0]
    biases = [own[r] for call in calls for r in call.inputs if r in own and len(r.shape) == 1]
    bias = biases[0] if biases else None
    if not conv:
        dims = (0, 1) if turned else (1, 0)
        return Layer(path, own[ref], bias, *dims, 1, True, False, ref.shape), ref
    stride, padding, _, transposed, _, groups = product.args[3:9]
    plain = {*ref.shape[2:], *stride} == {1} and not any(padding)
    dims = (1, 0) if transposed else (0, 1)
    padded = any(padding) or bool(transposed)
    return Layer(path, own[ref], bias, *dims, groups, plain, padded, ref.shape), ref


def affine_at(axes: AxisMap, path: str, tensors: Mapping[str, Tensor]) -> Affine:
    """The affine map that a linear layer, a 1x1 convolution or a batch norm is.

    Raises:
        EditError: it is none.
    """
    norm = _norm(axes, path, tensors)
    if norm is not None:
        return norm
    layer = layer_at(axes, path)
    if not layer.plain or layer.groups > 1:
        raise _no_affine(path, "a convolution over several positions, or in groups")
    weight = tensors[layer.weight].detach().double()
    matrix = weight.movedim(layer.out_dim, 0).flatten(1)
    return Affine(matrix, tensors[layer.bias].detach() if layer.bias else None, "exact")


def _no_affine(path: str, seen: str) -> EditError:
    return EditError(
        path,
        seen=seen,
        needed="an affine map: a linear layer, a 1x1 convolution, or a batch norm with statistics",
        next_step="fit one to data: neuroexapt.measure.affine_fit gives `matrix` and `offset`",
    )


def _norm(axes: AxisMap, path: str, tensors: Mapping[str, Tensor]) -> Affine | None:
    """The scale and shift of a batch norm in evaluation mode."""
    trace = next((t for t in axes.traces if not t.training), axes.traces[0])
    run = run_of(trace, path)
    calls = [c for c in trace.calls[run.start : run.stop] if c.op != "aten.empty"]
    if len(calls) != 1 or "batch_norm" not in calls[0].op:
        return None
    names = {ref: name for name, ref in trace.tensors.items()}
    scale, shift, mean, variance = (names.get(ref) if ref else None for ref in calls[0].args[1:5])
    if mean is None or variance is None or trace.training:
        raise _no_affine(path, "a batch norm without running statistics")
    deviation = (tensors[variance].detach().double() + calls[0].args[7]).sqrt()
    factor = 1.0 / deviation if scale is None else tensors[scale].detach().double() / deviation
    offset = -tensors[mean].detach().double() * factor
    if shift is not None:
        offset = offset + tensors[shift].detach().double()
    return Affine(factor, offset, "evaluation")


def folded_before(layer: Layer, affine: Affine, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight, and what to add to the bias, of a layer that reads the affine map's output.

    Raises:
        EditError: a convolution in groups cannot, unless each channel is scaled by itself.
    """
    wide, matrix = weight.detach().double(), affine.matrix.to(weight.device).double()
    if matrix.dim() == 1 and layer.groups > 1 and layer.in_dim == 1:
        return _scaled_groups(layer, wide, matrix, affine.offset)
    if layer.groups > 1:
        raise _no_layer(layer.path, "a convolution in groups")
    if layer.in_dim == 0 and len(layer.shape) > 2 and affine.offset is not None:
        raise _no_layer(layer.path, "a transposed convolution, and a shift in front of it")
    matrix = matrix.diag() if matrix.dim() == 1 else matrix
    read = wide.movedim(layer.in_dim, -1)
    new = (read @ matrix).movedim(-1, layer.in_dim)
    if affine.offset is None:
        return new, None
    # Without the units read, those made come first.
    return new, (read @ affine.offset.to(read)).reshape(new.shape[layer.out_dim], -1).sum(1)


def _scaled_groups(
    layer: Layer, weight: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A convolution in groups that reads scaled and shifted channels."""
    split = weight.view(layer.groups, -1, *weight.shape[1:])
    factors = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    new = (split * factors).view(weight.shape)
    if offset is None:
        return new, None
    rows = split.flatten(3).sum(3)
    return new, (rows * offset.to(rows).view(layer.groups, 1, -1)).sum(2).flatten()


def folded_behind(
    layer: Layer, affine: Affine, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a layer with the affine map behind it.

    Raises:
        EditError: a transposed convolution in groups.
    """
    if layer.groups > 1 and (layer.out_dim == 1 or affine.matrix.dim() > 1):
        raise _no_layer(layer.path, "a convolution in groups")
    wide, matrix = weight.detach().double(), affine.matrix.to(weight.device).double()
    if matrix.dim() == 1:
        new = wide * matrix.view(-1, *[1] * (wide.dim() - 1 - layer.out_dim))
        shifted = None if bias is None else bias.detach().double() * matrix
    else:
        new = (wide.movedim(layer.out_dim, -1) @ matrix.T).movedim(-1, layer.out_dim)
        shifted = None if bias is None else matrix @ bias.detach().double()
    if affine.offset is not None:
        offset = affine.offset.to(new)
        shifted = offset if shifted is None else shifted + offset
    return new, shifted


def check_adjacent(axes: AxisMap, first: str, second: str) -> None:
    """Nothing but the second module may read what the first one puts out.

    Raises:
        EditError: something stands between them, or reads it too.
    """
    for trace in axes.traces:
        one, two = run_of(trace, first), run_of(trace, second)
        out = one.result
        readers = Flow(trace).readers(out, one.stop) if isinstance(out, TensorRef) else []
        beside = [at for at in readers if not two.start <= at < two.stop]
        if not readers or beside or out in trace.outputs or out not in two.inputs:
            raise EditError(
                first,
                seen=f"an output that '{second}' does not read, or not alone",
                needed=f"'{second}' directly behind '{first}', and nothing else",
                next_step="name a layer beside it as `into`, or fit a map to data",
            )


def with_bias(axes: AxisMap, layer: Layer) -> str:
    """The name of the layer's bias, if need be of one that it does not have yet.

    Raises:
        EditError: its class has no place for one.
    """
    if layer.bias is not None:
        return layer.bias
    if axes.kinds.get(layer.path) not in _WITH_BIAS:
        raise _no_layer(layer.path, "a layer of its own kind without a bias")
    return f"{layer.path}.bias"


def as_tensor(value: Tensor | None, place: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """A given matrix or offset, if it fits.

    Raises:
        EditError: another shape, or entries that are not finite.
    """
    if isinstance(value, Tensor) and value.shape[: len(shape)] == shape and value.isfinite().all():
        return value.detach().to(torch.float64)
    seen = f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
    raise EditError(
        place,
        seen=f"{name} of shape {seen}, or not finite",
        needed=f"a finite tensor with sizes {shape} first",
        next_step="take both from neuroexapt.measure.affine_fit",
    )
