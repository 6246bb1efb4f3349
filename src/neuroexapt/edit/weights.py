"""Which weights a place means, for edits that work on single weights."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from neuroexapt.capture.masks import mask_of
from neuroexapt.couple import AxisMap
from neuroexapt.errors import EditError, UnknownPlaceError

_PARAMETRIZED = ".parametrizations."


def found_weights(axes: AxisMap, at: str, skip: Sequence[str] = ()) -> tuple[str, ...]:
    """The parameters a place means: a parameter's name, a module's path, or a glob over both.

    A pattern or a path stands for the weights in it that multiply what a layer reads (linear,
    convolution, recurrent, attention): no biases, norm scales, gates, positions or embeddings,
    unless an embedding's weight is also a head's. A path that has none of them stands for the
    module's own weights, and a parameter's name for that parameter. Tied weights count once,
    under any of their names. None of a parametrization.

    Raises:
        UnknownPlaceError: nothing has the name that ``at`` or ``skip`` gives.
        EditError: it has no such weight.
    """
    left = {name for pattern in skip for name in _under(axes, pattern)}
    under = _under(axes, at)
    names = under if at in _aliases(axes) else _multiplied(axes, at, under)
    found = tuple(name for name in axes.parameters if name in names and name not in left)
    if not found:
        raise EditError(
            at,
            seen=f"{len(under)} parameters, none of them a weight to prune",
            needed="a weight that multiplies what a layer reads, and that `skip` leaves",
            next_step="name a module or parameter; a parametrization has to be removed first",
        )
    return found


def masked_weights(axes: AxisMap, at: str, skip: Sequence[str] = ()) -> tuple[str, ...]:
    """Those parameters under a place that have a mask.

    Raises:
        UnknownPlaceError: nothing has the name that ``at`` or ``skip`` gives.
        EditError: none has a mask.
    """
    left = {name for pattern in skip for name in _under(axes, pattern)}
    under = _under(axes, at) - left
    found = tuple(n for n in axes.parameters if n in under and mask_of(n) in axes.tensors)
    if not found:
        raise EditError(
            at,
            seen=f"{len(under)} parameters without a mask",
            needed="weights that have been pruned",
            next_step="apply PruneWeights first, or choose another place",
        )
    return found


def input_dim(axes: AxisMap, name: str) -> int | None:
    """The dimension of a weight along which it reads; None if there is not exactly one."""
    dims = _reading(axes).get(name, set())
    return next(iter(dims)) if len(dims) == 1 else None


def fitting(
    names: Iterable[str], given: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str
) -> None:
    """Every weight has a tensor of its shape with finite values.

    Raises:
        EditError: the first that has not.
    """
    for name in names:
        shape = tuple(tensors[name].shape)
        if name not in given:
            near = difflib.get_close_matches(name, given, n=1, cutoff=0.0)
            raise EditError(
                name,
                seen=f"no {what}" + (f"; there are some for '{near[0]}'" if near else ""),
                needed=f"{what} of shape {shape}, one number for each weight",
                next_step=f"give {what} for every weight, or name another place",
            )
        values = given[name]
        if tuple(values.shape) != shape or not bool(values.isfinite().all()):
            raise EditError(
                name,
                seen=f"{what} of shape {tuple(values.shape)}, finite: "
                f"{bool(values.isfinite().all())}",
                needed=f"finite {what} of shape {shape}",
                next_step="measure them on the model as it is now",
            )


def _aliases(axes: AxisMap) -> dict[str, str]:
    """Every name of a parameter to its first one."""
    known = axes.traces[0].tensors
    first = {known[name]: name for name in reversed(axes.parameters)}
    return {name: first[ref] for name, ref in known.items() if ref in first}


def _under(axes: AxisMap, at: str) -> set[str]:
    """First names of all parameters that a name, a path or a pattern reaches."""
    aliases = _aliases(axes)
    found = {first for name, first in aliases.items() if _reaches(at, name)}
    if not found:
        places = {*aliases, *(path for name in aliases for path in _above(name) if path)}
        near = difflib.get_close_matches(str(at), places, n=3, cutoff=0.4)
        raise UnknownPlaceError(
            str(at),
            seen="no parameter of this name, nor one in a module of this name",
            needed="a parameter's name, a module's path, or a glob over both",
            next_step="near names: " + (", ".join(f"'{name}'" for name in near) or "none"),
        )
    return found


def _reaches(at: str, name: str) -> bool:
    return any(place == at or fnmatch.fnmatchcase(place, at) for place in (name, *_above(name)))


def _above(name: str) -> list[str]:
    """The paths of all modules around a parameter, the whole model ("") last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _multiplied(axes: AxisMap, at: str, under: Collection[str]) -> set[str]:
    reading = _reading(axes)
    plain = {name for name in under if _PARAMETRIZED not in f".{name}"}
    found = {name for name in plain if name in reading and len(axes.tensors[name]) > 1}
    own = {name for name in plain if name.rpartition(".")[0] == at}
    return found or {name for name in own if len(axes.tensors[name]) > 1}


def _reading(axes: AxisMap) -> dict[str, set[int]]:
    """For each parameter the dimensions along which it reads."""
    aliases, found = _aliases(axes), dict[str, set[int]]()
    places = [place for width in axes.widths.values() for place in width.appearances]
    places += [place for pin in axes.pinned.values() for place in pin.appearances]
    for place in places:
        if "consumer" in place.roles and place.tensor in aliases:
            found.setdefault(aliases[place.tensor], set()).add(place.dim)
    return found
