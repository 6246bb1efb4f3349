"""Numbers among the data that name positions: which expert a token goes to, say.

``topk`` puts out positions of the axis it ranks. Moved about, such numbers still name positions of
it, and a table that they index has that very axis: units of it can go, since the numbers are
made anew by every forward. Whoever computes with them pins the axis.
"""

from __future__ import annotations

from neuroexapt.capture import TensorRef
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.site import Site

# The first operand's entries come out as they went in, each in some place.
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "flatten", "clone", "detach", "alias", "_to_copy"),
        *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "contiguous"),
        *("slice", "select", "split", "unbind", "index", "index_select", "gather", "sort"),
    )
)
_COPIES = frozenset({"aten._to_copy", "aten.clone", "aten.detach", "aten.alias"})
# Where the index tensors of an operator stand among its arguments; its rule couples them.
_READERS = {
    "aten.index": 1,
    "aten._unsafe_index": 1,
    "aten.index_select": 2,
    "aten.gather": 2,
    "aten.scatter": 2,
    "aten.scatter_": 2,
    "aten.scatter_add": 2,
    "aten.scatter_add_": 2,
}
_COUNTERS = frozenset({"aten.histc", "aten.bincount"})


def follow_numbers(site: Site) -> None:
    """Hand on what a call moves; pin what it computes with. Called before the call's rule."""
    op, counts = site.call.op, site.draft.counts
    for ref in site.call.inputs:
        if ref in counts and op in _COPIES:
            counts[site.call.outputs[0]] = counts[ref]
        axes = site.draft.numbering.get(ref)
        if not axes:
            continue
        if op in _MOVES and site.call.args and site.call.args[0] == ref:
            _move(site, axes)
        elif op in _COUNTERS or _is_index(site, ref):
            continue
        else:
            for axis in axes:
                site.pin(axis, "its positions are named by number")


def _move(site: Site, axes: tuple[Axis, ...]) -> None:
    # A ranking puts out the numbers in order, and the places where they stood.
    moved = site.call.outputs[:1] if site.call.op == "aten.sort" else site.call.outputs
    for out in moved:
        site.numbers(out, axes)


def _is_index(site: Site, ref: TensorRef) -> bool:
    place = _READERS.get(site.call.op)
    given = site.call.args[place] if place is not None and place < len(site.call.args) else None
    return given == ref or (isinstance(given, (list, tuple)) and ref in given)


def indexed(site: Site, x: TensorRef, dim: int, index: TensorRef | None, why: str) -> None:
    """A dimension is taken by number: that of the axis which the numbers name, else pinned."""
    numbered = site.draft.numbering.get(index, ()) if index is not None else ()
    axis = site.axis(x, dim)
    if len(numbered) == 1 and algebra.find(numbered[0]).size == axis.size:
        site.same(axis, numbered[0])
        return
    site.pin(axis, why)
    for other in numbered:
        site.pin(other, "its positions are named by number")


def counted(site: Site) -> Axis | None:
    """The axis that the numbers name, if the tally has one count for each of its positions."""
    ref, out = site.call.inputs[0], site.call.outputs[0]
    numbered = site.draft.numbering.get(ref, ())
    if len(numbered) != 1 or len(out.shape) != 1:
        return None
    size = algebra.find(numbered[0]).size
    asked = (0, size - 1) if site.call.op == "aten.histc" else (size,)
    given = (
        (site.setting("min", 0), site.setting("max", 0))
        if site.call.op == "aten.histc"
        else (site.setting("minlength", 0),)
    )
    return numbered[0] if out.shape[0] == size and given == asked else None
