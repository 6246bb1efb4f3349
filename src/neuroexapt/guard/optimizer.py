"""The optimizer goes along: state by the same index, new parameters in their neighbour's group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit import WidthStep, resized
from neuroexapt.errors import GuardError
from neuroexapt.guard.decay import forget_decay
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.several import Several

# Running second moments and the like. A new entry starts at its siblings' mean: zero beside an old
# `step` would make its first updates many times too large.
SECOND_MOMENTS = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "grad_avg"}
    # Adafactor's for vectors, rows and columns; Rprop's, which is a rate of its own.
    | {"variance", "row_var", "col_var", "step_size"}
)

# The power of the gradient that a state is made of, where it is not the first: what happens to it
# when a parameter is scaled or split. Steps and rates do not depend on the gradient's length.
POWERS = {
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), 2),
    **dict.fromkeys(("row_var", "col_var"), 2),
    **dict.fromkeys(("acc_delta", "step_size"), 0),
}


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """The optimizer must be the one that trains this model.

    Raises:
        GuardError: it is no optimizer, keeps one flat history for all parameters, or none of
            its parameters belongs to the model.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, Several):
        for one in optimizer.optimizers:
            check_optimizer(model, one)
        return
    groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
    flat = isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam))
    if flat or not isinstance(groups, list) or not isinstance(state, Mapping):
        raise GuardError(
            type(optimizer).__name__,
            seen="an object without state for each parameter",
            needed="an optimizer with parameter groups and state for each parameter",
            next_step="pass the torch.optim.Optimizer that trains it (not LBFGS, not SparseAdam)",
        )
    own = {id(p) for p in model.parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own & held:
        raise GuardError(
            type(optimizer).__name__,
            seen=f"{len(held)} parameters, none of which belongs to {type(model).__name__}",
            needed="the optimizer that trains this model",
            next_step="pass the optimizer built from model.parameters()",
        )


def migrate(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    steps: Iterable[WidthStep],
    name: str,
) -> None:
    """Resize the state of one parameter, which still has its old shape.

    First moments of new entries are 0, second moments the mean of their siblings. Copies of one
    unit, and scaled parameters, get the moments they would have had (to the mean of the copies'
    shares): Chen et al. 2016 leave this open. Factored moments (Adafactor's means over rows and
    columns) follow along the dimensions that they have; a mean over units that went or came stays
    what it was until the next step.
    """
    powers = dict(POWERS)
    if "square_avg" in optimizer.state.get(parameter, ()):
        powers["momentum_buffer"] = 0  # RMSprop's holds steps, SGD's gradients
    whole = tuple(parameter.shape)
    change = partial(_migrated, steps=tuple(steps), name=name, powers=powers, whole=whole)
    convert(ledger, optimizer, parameter, change, name, factored=True)


def convert(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    change: Callable[[str, Tensor], Tensor],
    name: str,
    *,
    factored: bool = False,
) -> None:
    """Replace the state of one parameter by ``change(key, value)`` of every tensor of its shape.

    Scalars (``step``) are copied. State of a shape of its own cannot follow: it is reset, with a
    warning that names it. With ``factored``, ``change`` also takes state that has one entry along
    some dimensions.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    odd = [
        k
        for k, v in state.items()
        if isinstance(v, Tensor) and v.dim() and not _fits(v, parameter, factored)
    ]
    new: Mapping[str, Any] = {}
    if odd:
        warnings.warn(
            f"{type(optimizer).__name__} state {odd} of '{name}' does not have the parameter's "
            "shape and starts anew after this edit",
            stacklevel=2,
        )
    else:
        new = {key: _converted(key, value, change) for key, value in state.items()}
    _put_state(ledger, optimizer, {parameter: new})


def reweigh(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    change: Callable[[str, Tensor], Tensor],
) -> None:
    """Replace state of a parameter that keeps its shape by ``change(key, value)``.

    State of a shape of its own (factored moments) stays as it is.
    """
    state = optimizer.state.get(parameter)
    if state:
        new = {key: _reweighed(key, value, parameter, change) for key, value in state.items()}
        _put_state(ledger, optimizer, {parameter: new})


def _reweighed(
    key: str, value: Any, parameter: Tensor, change: Callable[[str, Tensor], Tensor]
) -> Any:
    if isinstance(value, Tensor) and value.shape != parameter.shape:
        return value.clone()
    return _converted(key, value, change)


def _converted(key: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    # `step` counts in place: the old one must stay what it was.
    return change(key, value) if value.dim() else value.clone()


def _fits(value: Tensor, parameter: Tensor, factored: bool) -> bool:
    if not factored or value.dim() != parameter.dim():
        return value.shape == parameter.shape
    pairs = zip(value.shape, parameter.shape, strict=True)
    return all(mine in (1, theirs) for mine, theirs in pairs)


def _migrated(
    key: str,
    value: Tensor,
    steps: tuple[WidthStep, ...],
    name: str,
    powers: Mapping[str, int],
    whole: tuple[int, ...],
) -> Tensor:
    fill, power = "mean" if key in SECOND_MOMENTS else "zero", powers.get(key, 1)
    single = {d for d, size in enumerate(value.shape) if size == 1 < whole[d]}
    if single:
        steps = tuple(_without(step, name, single) for step in steps)
    return resized(value, steps, name, generator=torch.Generator(), fill=fill, power=power)


def _without(step: WidthStep, name: str, dims: set[int]) -> WidthStep:
    """A step that leaves some dimensions of one tensor alone."""
    return replace(
        step,
        dims=tuple(e for e in step.dims if e.tensor != name or e.dim not in dims),
        scalings=tuple(
            s for s in step.scalings if s.tensor != name or s.positions is None or s.dim not in dims
        ),
    )


def reset(ledger: Ledger, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Let the state of a parameter start anew."""
    if parameter in optimizer.state:
        _put_state(ledger, optimizer, {parameter: {}})


def _put_state(
    ledger: Ledger, optimizer: torch.optim.Optimizer, new: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Give some parameters another state, or none; the way back keeps the order too."""
    held = optimizer.state
    before = dict(held)
    after = {p: state for p, state in {**before, **new}.items() if state or p not in new}
    ledger.do(partial(_become_state, held, after), partial(_become_state, held, before))


def _become_state(held: Any, contents: Mapping[Tensor, Any]) -> None:
    held.clear()
    held.update(contents)


def adopt(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    neighbour: nn.Parameter | None,
    order: Sequence[Tensor],
) -> None:
    """Put new parameters into the group of their neighbour, right behind it.

    Joining a group, rather than adding one, keeps learning-rate schedulers in step. Where groups
    keep matrices and vectors apart (no decay for biases and norms, Muon for matrices alone), a
    new one joins the nearest of its kind.

    Args:
        named: the new parameters by name.
        neighbour: a parameter of the model.
        order: the model's parameters before the insertion.

    Raises:
        GuardError: the optimizer cannot train a parameter of this kind.
    """
    places: dict[tuple[int, int], tuple[dict[str, Any], dict[str, nn.Parameter]]] = {}
    for name, parameter in named.items():
        beside = _beside(optimizer, parameter, neighbour, order)
        group, at = _place_of(optimizer, beside)
        _check_kind(optimizer, group, parameter, name)
        places.setdefault((id(group), at), (group, {}))[1][name] = parameter
    for (_, at), (group, added) in places.items():
        for key, items in (("params", list(added.values())), ("param_names", list(added))):
            if key in group:
                _insert(ledger, group[key], at, items)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1


def _beside(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    neighbour: Tensor | None,
    order: Sequence[Tensor],
) -> Tensor | None:
    """The neighbour, unless its group is for the other kind alone and others are for this kind."""
    own = _place_of(optimizer, neighbour)[0]
    fitting = [group for group in optimizer.param_groups if _is_for(optimizer, group, parameter)]
    fits = any(group is own for group in fitting)  # not `in`: it would compare parameters
    if neighbour is None or fits or not _is_of_one_kind(own):
        return neighbour
    wanted = {id(p) for group in fitting for p in group["params"]}
    middle = next((at for at, p in enumerate(order) if p is neighbour), len(order))
    near = sorted((abs(at - middle), at) for at, p in enumerate(order) if id(p) in wanted)
    return order[near[0][1]] if near else neighbour


def _is_of_one_kind(group: dict[str, Any]) -> bool:
    return len({_is_matrix(p) for p in group["params"]}) == 1


def _is_for(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> bool:
    """Whether a group holds parameters of this kind alone, or anything that Muon does not train."""
    if any(_is_muon(holder) for holder in _each(optimizer)) and parameter.dim() != 2:
        return not _is_muon(_holder(optimizer, group))
    kinds = {_is_matrix(p) for p in group["params"]}
    return kinds == {_is_matrix(parameter)}


def _each(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    return optimizer.optimizers if isinstance(optimizer, Several) else (optimizer,)


def _holder(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> torch.optim.Optimizer:
    return next(o for o in _each(optimizer) if any(g is group for g in o.param_groups))


def _is_muon(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "Muon"


def _place_of(
    optimizer: torch.optim.Optimizer, neighbour: Tensor | None
) -> tuple[dict[str, Any], int]:
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is neighbour:
                return group, position + 1
    last: dict[str, Any] = optimizer.param_groups[-1]
    return last, len(last["params"])


def _check_kind(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, name: str
) -> None:
    if _is_muon(_holder(optimizer, group)) and parameter.dim() != 2:
        raise GuardError(
            name,
            seen=f"a new parameter of shape {tuple(parameter.shape)} for Muon",
            needed="an optimizer for parameters that are no matrices: Muon trains those alone",
            next_step="give the other one too: optimizer=[muon, adamw]",
        )


def _insert(ledger: Ledger, held: list[Any], at: int, added: list[Any]) -> None:
    _set_list(ledger, held, [*held[:at], *added, *held[at:]])


def _set_list(ledger: Ledger, held: list[Any], new: list[Any]) -> None:
    ledger.do(partial(_become, held, new), partial(_become, held, list(held)))


def _become(held: list[Any], contents: list[Any]) -> None:
    held[:] = contents


def abandon(ledger: Ledger, optimizer: torch.optim.Optimizer, gone: Sequence[Tensor]) -> None:
    """Take parameters that have left the model out of their groups, with their state.

    A group stays even when it is empty: learning-rate schedulers count groups.
    """
    gone = list(gone)
    forget_decay(ledger, optimizer, gone)
    lost = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        keep = [at for at, p in enumerate(group["params"]) if id(p) not in lost]
        for key in ("params", "param_names"):
            if key in group and len(keep) < len(group[key]):
                _set_list(ledger, group[key], [group[key][at] for at in keep])
    _put_state(ledger, optimizer, {p: {} for p in gone if p in optimizer.state})
