"""Apply the rules to a trace: operator by operator, collect what must change together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neuroexapt.capture import Call, TensorRef, Trace
from neuroexapt.capture.masks import is_mask
from neuroexapt.couple import (
    axis as algebra,
)
from neuroexapt.couple import (
    entries,
    rules_attention,
    rules_complex,
    rules_contraction,
    rules_create,
    rules_expert,
    rules_index,
    rules_linalg,
    rules_loss,
    rules_norm,
    rules_order,
    rules_part,
    rules_pointwise,
    rules_recurrent,
    rules_reduce,
    rules_shape,
    rules_spatial,
    rules_view,
)
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Bind, Dims, Label, Labels
from neuroexapt.couple.numbering import follow_numbers
from neuroexapt.couple.silence import follow_silence
from neuroexapt.couple.site import RULES, Draft, Site, place_of

# Importing a family registers its rules.
FAMILIES = (
    rules_attention,
    rules_complex,
    rules_contraction,
    rules_create,
    rules_expert,
    rules_index,
    rules_linalg,
    rules_loss,
    rules_norm,
    rules_order,
    rules_part,
    rules_pointwise,
    rules_recurrent,
    rules_reduce,
    rules_shape,
    rules_spatial,
    rules_view,
)

# Attributes of torch.nn classes that repeat a dimension of one of the module's own tensors.
# Convolution and group norm state theirs in their rules, where the groups are known; recurrent
# modules in `rules_recurrent.fields`, as theirs depend on whether the state is projected.
FIELDS: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}

# A form of a call that its rule was not written for shows in one of these; it is then unknown.
_NOT_UNDERSTOOD = (algebra.Mismatch, AttributeError, IndexError, KeyError, TypeError, ValueError)


def solve(model: nn.Module, trace: Trace, draft: Draft) -> None:
    """Add the couplings of one trace to the draft.

    Parameter axes are shared between traces of the same model; inputs and outputs are pinned,
    being the model's contract with its caller. An operator without a rule pins what it
    touches and is listed in ``draft.unknown``.
    """
    fields = {path: _fields(module) for path, module in model.named_modules()}
    _seed(trace, draft)
    dead = _dead(trace)
    for number, call in enumerate(trace.calls):
        mixes, site = len(draft.mixes), Site(call, draft, fields.get(call.module, {}))
        couple(site)
        fresh = [] if number in dead else draft.mixes[mixes:]
        draft.mixes[mixes:] = [entries.met(site, mix) for mix in fresh]
    for ref in trace.outputs:
        for axis in (*draft.dims.get(ref, ()), *draft.numbering.get(ref, ())):
            algebra.pin(axis, "the model's output is a contract with its caller")
    rules_recurrent.settle_first_steps(draft)
    _bind_fields(model, draft)


def _dead(trace: Trace) -> set[int]:
    """Calls whose result nothing uses: attention weights that are returned and dropped, say."""
    dead, alive = set(), set(trace.outputs)
    for number in reversed(range(len(trace.calls))):
        call = trace.calls[number]
        in_place = call.op.endswith("_") or call.overload.endswith("out")
        if in_place or alive.intersection(call.outputs):
            alive.update(call.inputs)
        else:
            dead.add(number)
    return dead


def _fields(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _seed(trace: Trace, draft: Draft) -> None:
    by_ref: dict[int, Dims] = {}
    for name, ref in trace.tensors.items():
        if name not in draft.parameters:
            dims = by_ref.setdefault(ref.id, tuple(Axis(size) for size in ref.shape))
            draft.parameters[name] = dims
        if ref not in draft.dims:
            draft.dims[ref] = draft.parameters[name]
            draft.labels[ref] = () if is_mask(name) else _own_labels(name, len(ref.shape))
            draft.weights.add(ref)
    for ref in trace.inputs:
        draft.dims[ref] = tuple(
            Axis(size, pin="the model's input is a contract with its caller") for size in ref.shape
        )


def _own_labels(name: str, dims: int) -> Labels:
    return tuple(frozenset([Label(name, dim)]) for dim in range(dims))


def couple(site: Site) -> None:
    """Apply the rule of one call, and follow where its results stem from."""
    follow_numbers(site)
    rule = RULES.get(site.call.op)
    if rule is None and site.call.pointwise:
        rule = rules_pointwise.pointwise
    if rule is None:
        _unknown(site)
        return
    before = {ref: site.labels(ref) for ref in site.call.outputs if ref in site.draft.dims}
    try:
        outputs = [tuple(dims) for dims in rule(site)]
    except _NOT_UNDERSTOOD:
        _unknown(site)
        return
    if [tuple(a.size for a in dims) for dims in outputs] != [r.shape for r in site.call.outputs]:
        _unknown(site)
        return
    for ref, dims in zip(site.call.outputs, outputs, strict=True):
        _assign(site, ref, dims, known=ref in before)
    entries.follow(site, zip(site.call.outputs, outputs, strict=True))
    _spread_origin(site)
    for ref, labels in before.items():
        site.set_labels(ref, map(frozenset.union, labels, site.labels(ref)))
    _follow_views(site)
    follow_silence(site)


def _assign(site: Site, ref: Any, dims: Dims, *, known: bool) -> None:
    if known:  # written in place: old and new are the same tensor
        for old, new in zip(site.draft.dims[ref], dims, strict=True):
            site.same(old, new)
    else:
        site.draft.dims[ref] = dims


def _spread_origin(site: Site) -> None:
    """A tensor made of weights alone is a weight; what stems from where goes by axis, unless the
    rule said so."""
    inputs, draft = site.call.inputs, site.draft
    made_of_weights = all(site.is_weight(ref) for ref in inputs)
    for ref in site.call.outputs:
        if made_of_weights and inputs:
            draft.weights.add(ref)
        elif not made_of_weights:
            draft.weights.discard(ref)
        if ref in inputs:
            site.stems_from(ref, inputs)
        elif ref not in draft.labels:
            site.stems_from(ref, inputs)
            if made_of_weights:
                _anywhere(site, ref)


def _anywhere(site: Site, ref: TensorRef) -> None:
    """Dimensions of a weight whose origin is not known stem from any dimension of any."""
    everything = place_of(part for other in site.call.inputs for part in site.labels(other))
    site.set_labels(ref, (part or everything for part in site.labels(ref)))


def _follow_views(site: Site) -> None:
    """What is written into a view of a tensor is in that tensor."""
    views, inputs = site.draft.views, site.call.inputs
    for ref in site.call.outputs:
        if ref in inputs:
            while ref in views:
                base = views[ref]
                site.stems_from(base, [ref])
                if ref not in site.draft.weights:
                    site.draft.weights.discard(base)
                ref = base
        elif inputs and _is_view(site.call.op, site.call.overload):
            views[ref] = inputs[0]


@functools.cache
def _is_view(op: str, overload: str) -> bool:
    """Whether an operator's result is its first argument's memory, seen in another way."""
    namespace, _, name = op.partition(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
    aliases = [result.alias_info for result in schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _unknown(site: Site) -> None:
    op = f"{site.call.op}.{site.call.overload}"
    site.draft.unknown.setdefault(op, {})[site.call.module] = None
    for ref in site.call.inputs:
        for axis in site.dims(ref):
            site.pin(axis, f"operator {op} has no rule for this call")
    for ref in site.call.outputs:
        if ref not in site.draft.dims:  # else written in place: an input, pinned above
            site.draft.dims[ref] = tuple(
                site.fixed(size, f"operator {op} has no rule for this call") for size in ref.shape
            )


def _bind_fields(model: nn.Module, draft: Draft) -> None:
    found: dict[Bind, None] = {}
    for path, module in model.named_modules():
        for attribute, (tensor, dim) in _repeated(module):
            dims = draft.parameters.get(f"{path}.{tensor}".lstrip("."))
            if dims is not None:
                found[Bind(path, attribute, dims[dim : dim + 1])] = None
    known = set(draft.binds)
    draft.binds += [bind for bind in found if bind not in known]


def _repeated(module: nn.Module) -> Iterator[tuple[str, tuple[str, int]]]:
    for kind, rows in FIELDS.items():
        if isinstance(module, kind):
            yield from rows.items()
    yield from rules_recurrent.fields(module).items()


def call_axes(call: Call, draft: Draft) -> list[Axis]:
    """Every axis a call touches: its outputs' first, then its inputs'."""
    return [axis for ref in (*call.outputs, *call.inputs) for axis in draft.dims.get(ref, ())]
