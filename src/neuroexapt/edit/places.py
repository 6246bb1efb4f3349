"""Where something can stand behind a module: what the module puts out, at every call of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuroexapt.capture import Call, TensorRef
from neuroexapt.capture.trace import ModuleRun
from neuroexapt.couple import AxisMap, Expr, leaves, size_of
from neuroexapt.edit.doors import ROOT, Door, channel_dim, check_module, neighbour
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Output(Door):
    """The tensor that leaves a module, or the first of several.

    Attributes:
        dims: what each dimension is made of.
        dtype: what new parameters that work on it should be, where it is not what their
            neighbour is.
    """

    dims: tuple[Expr, ...]
    dtype: torch.dtype | None

    @property
    def features_last(self) -> bool:
        """Whether nothing stands behind the channels."""
        return not self.space

    @property
    def positions(self) -> tuple[int, ...]:
        """The sizes between batch and features, or behind the channels."""
        return self.space or self.sizes[1 : self.channel]


def runs_of(axes: AxisMap, path: str) -> list[ModuleRun]:
    """Every call of a module, in both modes.

    Raises:
        UnknownPlaceError: no such module, or it is not called; near names are suggested.
        EditError: as :func:`check_module` says.
    """
    check_module(axes, path)
    return [run for trace in axes.traces for run in trace.runs if run.path == path]


def makers_of(axes: AxisMap, path: str) -> list[Call]:
    """The operator calls that made a module's outputs, one for each of its calls.

    A module that hands on what it was given has the maker of that.
    """
    found = []
    for trace in axes.traces:
        for run in trace.runs:
            for call in reversed(trace.calls[: run.stop]) if run.path == path else ():
                if run.outputs[0] in call.outputs:
                    found.append(call)
                    break
    return found


def output_of(axes: AxisMap, path: str) -> Output:
    """What leaves a module.

    Raises:
        UnknownPlaceError: no such module; near names are suggested.
        EditError: it is part of a layer that torch may run without calling its parts, its output
            is no tensor and does not begin with one, no dimension of it holds channels, or it
            is called on tensors of different kinds.
    """
    runs = runs_of(axes, path)
    check_called(axes, path)
    for run in runs:
        if run.gives not in ("tensor", "tuple"):
            raise EditError(
                path or ROOT,
                seen=f"an output of type {run.gives}",
                needed="a tensor, or a tuple that begins with one",
                next_step="choose a module inside it",
            )
    refs = [run.outputs[0] for run in runs]
    dims = axes.modules[path].outputs[0]
    sizes = tuple(size_of(expr, {}) for expr in dims)
    _check_floating(path, refs[0])
    channel = channel_dim(axes, path, dims)
    for ref in refs:
        if len(ref.shape) != len(sizes) or ref.shape[channel] != sizes[channel]:
            raise EditError(
                path or ROOT,
                seen=f"calls that put out {sizes} and {ref.shape}",
                needed="a module that always puts out the same channels",
                next_step="choose a module that is called once, or whose calls agree",
            )
    return Output(sizes, channel, dims, _dtype(axes, path, refs[0]))


def check_called(axes: AxisMap, path: str) -> None:
    """Refuse a module that may not be called at all, so that what stands at it would not run.

    Raises:
        EditError: it is part of a layer that torch may run as one kernel.
    """
    for fused in axes.fused:
        if path.startswith(f"{fused}."):
            raise EditError(
                path,
                seen=f"a part of '{fused}', which torch may run as one kernel in evaluation mode",
                needed="a module that is always called",
                next_step=f"insert behind '{fused}' as a whole",
            )


def _check_floating(path: str, ref: TensorRef) -> None:
    if not ref.dtype.is_floating_point:
        raise EditError(
            path or ROOT,
            seen=f"an output of {ref.dtype}",
            needed="real floating-point numbers",
            next_step="choose a module that puts out activations",
        )


def _dtype(axes: AxisMap, path: str, ref: TensorRef) -> torch.dtype | None:
    """That of the tensor, unless only a region of lower precision made it so."""
    known = {name: axes.traces[0].tensors[name].dtype for name in axes.parameters}
    beside = known.get(neighbour(axes, path) or "")
    return ref.dtype if ref.dtype in known.values() and ref.dtype != beside else None


def batch_first(axes: AxisMap, output: Output) -> bool:
    """Whether samples lie along the first dimension, and along no other.

    The batch is the first dimension of the model's first input.
    """
    inputs = axes.modules[""].inputs
    if not inputs or not inputs[0]:
        return False
    batch = {leaf.name for leaf in leaves(inputs[0][0])}
    held = [bool(batch & {leaf.name for leaf in leaves(expr)}) for expr in output.dims]
    return held[0] and not any(held[1:])
