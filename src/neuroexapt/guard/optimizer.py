"""The optimizer goes along: state by the same index, new parameters in their neighbour's group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit import WidthStep, resized
from neuroexapt.errors import GuardError
from neuroexapt.guard.decay import forget_decay
from neuroexapt.guard.ledger import Ledger

# Running second moments and the like. A new entry starts at its siblings' mean: zero beside an old
# `step` would make its first updates many times too large.
SECOND_MOMENTS = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "grad_avg"}
    | {"variance", "step_size"}  # Adafactor's for vectors; Rprop's, which is a rate of its own
)

# The power of the gradient that a state is made of, where it is not the first: what happens to it
# when a parameter is scaled or split. Steps and rates do not depend on the gradient's length.
POWERS = {
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), 2),
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
    groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
    flat = isinstance(optimizer, torch.optim.LBFGS)
    if flat or not isinstance(groups, list) or not isinstance(state, Mapping):
        raise GuardError(
            type(optimizer).__name__,
            seen="an object without state for each parameter",
            needed="an optimizer with parameter groups and state for each parameter",
            next_step="pass the torch.optim.Optimizer that trains this model (not LBFGS)",
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
    shares): Chen et al. 2016 leave this open.
    """
    powers = dict(POWERS)
    if "square_avg" in optimizer.state.get(parameter, ()):
        powers["momentum_buffer"] = 0  # RMSprop's holds steps, SGD's gradients
    change = partial(_migrated, steps=tuple(steps), name=name, powers=powers)
    convert(ledger, optimizer, parameter, change, name)


def convert(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    change: Callable[[str, Tensor], Tensor],
    name: str,
) -> None:
    """Replace the state of one parameter by ``change(key, value)`` of every tensor of its shape.

    Scalars (``step``) are copied. State of a shape of its own cannot follow: it is reset, with a
    warning that names it.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    odd = [
        k
        for k, v in state.items()
        if isinstance(v, Tensor) and v.dim() and (v.shape != parameter.shape)
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


def _migrated(
    key: str, value: Tensor, steps: tuple[WidthStep, ...], name: str, powers: Mapping[str, int]
) -> Tensor:
    fill, power = "mean" if key in SECOND_MOMENTS else "zero", powers.get(key, 1)
    return resized(value, steps, name, generator=torch.Generator(), fill=fill, power=power)


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
) -> None:
    """Put new parameters into the group of their neighbour, right behind it.

    Joining a group, rather than adding one, keeps learning-rate schedulers in step.
    """
    group, at = _place_of(optimizer, neighbour)
    for key, added in (("params", list(named.values())), ("param_names", list(named))):
        if key in group:
            _insert(ledger, group[key], at, added)


def _place_of(
    optimizer: torch.optim.Optimizer, neighbour: nn.Parameter | None
) -> tuple[dict[str, Any], int]:
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is neighbour:
                return group, position + 1
    last: dict[str, Any] = optimizer.param_groups[-1]
    return last, len(last["params"])


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
