"""A Python file that makes the evolved model from the user's own, with torch alone.

The file is straight-line code: a call for each thing that edits did, in the order in which they
were made, and the few functions and modules that these calls need. Weights are a plain file of
tensors beside it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from neuroexapt.capture.masks import is_mask
from neuroexapt.edit import Reader, Spec, StochasticDepth, graft, registered_specs
from neuroexapt.edit import gates as gate_modules
from neuroexapt.edit.attend import AttentionSpec
from neuroexapt.edit.branches import BranchSpec, Gate
from neuroexapt.edit.copies import BLOCK, Blend, CopySpec
from neuroexapt.edit.hold import Hold, HoldSpec, Join, JoinSpec, _in_backward
from neuroexapt.edit.insert import ConvSpec
from neuroexapt.edit.layer import MlpSpec
from neuroexapt.edit.passage import Given, Nothing, Passage, PassSpec, _filled
from neuroexapt.edit.pool import PoolSpec
from neuroexapt.edit.regularize import ChanceSpec
from neuroexapt.errors import CheckpointError
from neuroexapt.guard.contents import Contents
from neuroexapt.guard.redo import in_order
from neuroexapt.record import runtime

# What an expression may name besides torch.nn, and what that needs in turn.
_PARTS: dict[str, tuple[Any, ...]] = {
    "Gate": (Gate,),
    "StochasticDepth": (StochasticDepth,),
    "SqueezeExcite": (gate_modules._doubled_sigmoid, gate_modules.SqueezeExcite),
    "SpatialGate": (
        gate_modules._doubled_sigmoid, gate_modules._zero_conv, gate_modules.SpatialGate,
    ),
    "ConvBlockAttention": (
        gate_modules._doubled_sigmoid, gate_modules._zero_conv, gate_modules.ConvBlockAttention,
    ),
    "SelfAttention": (gate_modules.SelfAttention,),
    "Blend": (Gate, Blend),
    "Hold": (_in_backward, Hold, Join),
    "Join": (_in_backward, Hold, Join),
    "Passage": (Given, Nothing, _filled, Passage),
}  # fmt: skip
_GRAFT = (graft._first, graft._with, graft._branches_hidden, graft._sequential_members)


def source_of(held: Contents, kind: type[nn.Module], weights: str) -> str:
    """The text of the file.

    Args:
        held: the evolved model's contents.
        kind: its class, for the words at the top.
        weights: name of the file with its tensors.

    Raises:
        CheckpointError: an edit added a module that has no form in torch alone.
    """
    calls = [call for entry in in_order(held.lineages) for call in _calls(*entry)]
    named = sorted(word for word in _PARTS if re.search(rf"\b{word}\(", "\n".join(calls)))
    parts = dict.fromkeys(part for word in named for part in _PARTS[word])
    sources = [inspect.getsource(part) for part in (*_GRAFT, *parts)]
    body = "\n".join(f"    {call}" for call in calls) or "    pass  # no edit changed it"
    return _TEMPLATE.format(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        name=kind.__name__,
        weights=weights,
        block=BLOCK,
        constants="\n".join(f'{word} = "{getattr(graft, word)}"' for word in _ROLES),
        every=", ".join(_ROLES),
        runtime=inspect.getsource(runtime).split("# --- the functions\n")[1].strip(),
        sources="\n\n".join(text.strip() + "\n" for text in sources),
        body=body,
    )


_ROLES = ("SKIP", "AFTER", "THEN", "NEXT", "HOLD", "JOIN", "PASS")

_TEMPLATE = '''"""Turns a freshly built {kind} into the network that its edits made of it.

Needs torch alone:

    model = {name}(...)            # as it was built before the first edit
    evolve(model)
    fill(model, "{weights}")
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

{constants}
_ROLES = ({every})
BLOCK = "{block}"
_CONV = {{1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}}


def evolve(model: nn.Module) -> nn.Module:
    """Make the edits on a model as its own class builds it; values come by :func:`fill`."""
{body}
    return model


{runtime}


{sources}'''


def _calls(path: str, number: int, entry: Mapping[str, Any]) -> Iterator[str]:
    """The calls of one entry of a lineage."""
    text = " ".join(str(entry.get("description", "")).split())
    yield f"# {number}: {text.encode('ascii', 'replace').decode()}"[:110]
    root = f"model.get_submodule({path!r})" if path else "model"
    if "unsaved" in entry:
        raise CheckpointError(
            f"edit {number}",
            seen=str(entry["unsaved"])[:300],
            needed="an edit that can be written down",
            next_step="register its spec with neuroexapt.edit.register before the edit",
        )
    for change in entry["changes"]:
        call = _call(root, change)
        if call:
            yield call


def _call(root: str, change: Mapping[str, Any]) -> str | None:
    do = change["do"]
    if do == "resize" and is_mask(change["tensor"]):
        return None
    if do == "resize":
        return f"_resize({root}, {change['tensor']!r}, {tuple(change['after'])})"
    if do == "set":
        value = literal(Reader().value(change["value"], "value"))
        return f"_set({root}, {change['module']!r}, {change['name']!r}, {value})"
    if do == "give":
        return f"_give({root}, {change['tensor']!r}, {tuple(change['shape'])})"
    if do == "drop":
        return f"_drop({root}, {change['module']!r})"
    if do == "remove":
        passage = expression(_spec(change), root)
        return f"_remove({root}, {change['module']!r}, {passage})"
    if do == "insert":
        made = expression(_spec(change), root)
        beside = literal(change["neighbour"] if _spec(change).fresh else None)
        dtype = literal(Reader().value(change["dtype"], "dtype"))
        where = f"{change['module']!r}, {change['child']!r}"
        return f"_insert({root}, {where}, {made}, {beside}, {dtype})"
    return None  # masks are zeros among the weights, and weight decay is the optimizer's


def _spec(change: Mapping[str, Any]) -> Spec:
    spec = Reader(registered_specs()).value(change["spec"], "spec")
    assert isinstance(spec, Spec)
    return spec


def literal(value: Any) -> str:
    """A plain value as Python writes it.

    Example:
        >>> literal((1, float("inf"), [torch.float16, None]))
        "(1, float('inf'), [torch.float16, None])"
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Given):
        return f"Given({value.at!r}, {value.fresh})"
    if isinstance(value, Nothing):
        return f"Nothing({value.at!r})"
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def expression(spec: Spec, root: str) -> str:
    """The module of a spec, as an expression over torch.nn and the parts of the file.

    Raises:
        CheckpointError: a spec of the user's own has none.
    """
    write = _EXPRESSIONS.get(type(spec))
    if write is None:
        raise CheckpointError(
            type(spec).__name__,
            seen="an inserted module of a class of your own",
            needed="modules of this library: others have no form in torch alone",
            next_step="export the program (neuroexapt export --to program) or ONNX instead",
        )
    return str(write(spec, root))


def _conv(spec: ConvSpec, root: str) -> str:
    n, c = spec.spatial, spec.channels
    conv = (
        f"nn.Conv{n}d({c}, {c}, {spec.kernel}, padding={spec.kernel // 2}, "
        f"groups={spec.groups}, bias={spec.bias})"
    )
    if spec.mode == "identity":
        low, high = spec.bounds or (0.0, 0.0)
        cut = "nn.ReLU()" if high == math.inf else f"nn.Hardtanh({low}, {high})"
        return f"nn.Sequential({conv}{', ' + cut if spec.bounds else ''})"
    return f"nn.Sequential({conv}, nn.BatchNorm{n}d({c}), nn.ReLU(), Gate({c}, {n}))"


def _branch(spec: BranchSpec, root: str) -> str:
    if spec.kind == "identity":
        return f"Gate({spec.target}, {spec.spatial})"
    if not spec.spatial:
        return f"nn.Sequential(nn.Linear({spec.source}, {spec.target}), Gate({spec.target}, 0))"
    n = spec.spatial
    conv = f"nn.Conv{n}d({spec.source}, {spec.target}, 1, stride={spec.stride})"
    return f"nn.Sequential({conv}, nn.BatchNorm{n}d({spec.target}))"


def _mlp(spec: MlpSpec, root: str) -> str:
    first = f"nn.Linear({spec.features}, {spec.hidden})"
    return f"nn.Sequential({first}, nn.GELU(), nn.Linear({spec.hidden}, {spec.features}))"


def _attention(spec: AttentionSpec, root: str) -> str:
    if spec.kind == "squeeze_excite":
        return f"SqueezeExcite({spec.channels}, {spec.hidden}, {spec.channel})"
    if spec.kind == "self":
        return f"SelfAttention({spec.channels}, {spec.hidden}, {spec.channel}, {spec.causal})"
    kind = "SpatialGate" if spec.kind == "spatial" else "ConvBlockAttention"
    return f"{kind}({spec.channels}, {spec.hidden}, {spec.spatial}, {spec.kernel})"


def _pool(spec: PoolSpec, root: str) -> str:
    if spec.kind == "global":
        return f"nn.AdaptiveAvgPool{spec.spatial}d(1)"
    kind = {"max": "Max", "avg": "Avg"}[spec.kind]
    return f"nn.{kind}Pool{spec.spatial}d({spec.stride}, ceil_mode=True)"


def _chance(spec: ChanceSpec, root: str) -> str:
    if spec.samples is not None:
        return f"StochasticDepth({spec.p}, {spec.samples})"
    return f"nn.Dropout{f'{spec.spatial}d' if spec.spatial else ''}({spec.p})"


def _copy(spec: CopySpec, root: str) -> str:
    twin = f"_twin({root}, {spec.source!r}, {literal(spec.numbers)})"
    return twin if spec.silent else f"Blend({twin}, Gate({spec.channels}, {spec.spatial}))"


_EXPRESSIONS: dict[type, Any] = {
    ConvSpec: _conv,
    BranchSpec: _branch,
    MlpSpec: _mlp,
    AttentionSpec: _attention,
    PoolSpec: _pool,
    ChanceSpec: _chance,
    CopySpec: _copy,
    HoldSpec: lambda spec, root: "Hold()",
    JoinSpec: lambda spec, root: (
        f"Join(_last_hold({root}, {spec.first!r}), {expression(spec.branch, root)})"
    ),
    PassSpec: lambda spec, root: f"Passage({literal(spec.answer)})",
}
