"""From a model and an example input to its AxisMap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from neuroexapt.capture import Trace
from neuroexapt.capture.run import capture_both
from neuroexapt.capture.stacks import find_stacks
from neuroexapt.couple.attention import tie_attention
from neuroexapt.couple.axismap import AxisMap
from neuroexapt.couple.freeze import freeze
from neuroexapt.couple.probe import Prober
from neuroexapt.couple.scales import note_scales
from neuroexapt.couple.site import Draft
from neuroexapt.couple.sizes import relate
from neuroexapt.couple.solve import solve
from neuroexapt.errors import CaptureError


def map_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> AxisMap:
    """Infer which tensor dimensions of a model must change together.

    Runs the model on fake tensors (no memory, no weights read) in evaluation and in training
    mode, couples the dimensions operator by operator, and then checks the result: a second
    run with every free width resized must give every tensor exactly the predicted size. What
    does not follow is pinned, with the line of code that holds it. The model, its buffers,
    flags and the random state are as before.

    Args:
        model: any module; its forward is followed, not analysed.
        args: positional example input; a batch of 2 or more lets batch norm train.
        kwargs: keyword example input.

    Raises:
        CaptureError: the forward fails on the example input, in both modes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
        >>> axes = map_axes(net, (torch.zeros(2, 1, 8, 8),))
        >>> for place in axes.widths["0.out"].appearances:
        ...     print(place.tensor, place.dim, place.role)
        0.weight 0 producer
        0.bias 0 elementwise
        1.weight 0 elementwise
        1.bias 0 elementwise
        2.weight 1 consumer
        1.running_mean 0 elementwise
        1.running_var 0 elementwise
    """
    if not isinstance(args, (tuple, list)):
        raise CaptureError(
            "args",
            seen=f"a {type(args).__name__}",
            needed="a tuple of the positional inputs of the forward",
            next_step="pass args=(x,), and keyword inputs as kwargs={...}",
        )
    example = (tuple(args), dict(kwargs or {}))
    traces = capture_both(model, *example)
    draft = Draft()
    for trace in traces:
        solve(model, trace, draft)
    tie_attention(model, draft)
    relate(traces, draft)
    prober = Prober(model, example, traces, draft)
    prober.settle()
    note_scales(prober)
    parameters = tuple(name for name, _ in model.named_parameters())
    axes = freeze(draft, traces, parameters, _notes(traces))
    # The fused kernel of an encoder layer reads the weights of its parts and calls none of them.
    kind = nn.TransformerEncoderLayer
    fused = tuple(path for path, m in model.named_modules() if isinstance(m, kind))
    return replace(axes, fused=fused, stacks=find_stacks(model), kinds=_kinds(model))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Per module path the class, or the nearest base of it, that torch or this library wrote."""
    known = ("torch.nn.", "neuroexapt.")
    return {
        path: next(
            kind.__name__
            for kind in type(module).__mro__
            if kind.__module__.startswith(known) and "_nx_original" not in vars(kind)
        )
        for path, module in model.named_modules(remove_duplicate=False)
    }


def _notes(traces: tuple[Trace, ...]) -> tuple[str, ...]:
    notes = []
    if len(traces) == 1:
        missing = "evaluation" if traces[0].training else "training"
        notes.append(f"the forward did not run in {missing} mode on this example input")
    if not all(trace.fake for trace in traces):
        notes.append("fake tensors were refused by this model; real copies were used")
    return tuple(notes)
