"""Weight decay of chosen parameters, beside whatever the optimizer does by itself.

Not a new parameter group: learning-rate schedulers count the groups they were made with. Not the
group's own ``weight_decay`` either: it holds for every parameter of the group, and means another
thing in each optimizer (SGD and Adam add it to the gradient, AdamW shrinks the weight). Here it
always means what AdamW does, at the learning rate that the parameter's group has at that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit import Decay
from neuroexapt.errors import GuardError
from neuroexapt.guard.ledger import Ledger, drop_item, put_item


class DecoupledDecay:
    """A hook of an optimizer's step: ``p <- p * (1 - lr * strength)`` before the update.

    Parameters without a gradient stay as they are, as in AdamW. torch leaves hooks out of copies
    and state dicts of an optimizer; there the edit has to be applied again.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = optimizer.register_step_pre_hook(DecoupledDecay({weight: 0.2}))
        >>> weight.grad = torch.zeros(1); optimizer.step(); round(weight.item(), 4)
        0.9

    Loshchilov and Hutter 2019 (AdamW).
    """

    def __init__(self, strengths: Mapping[Tensor, float]) -> None:
        self.strengths = dict(strengths)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Decay now, or, where a closure makes the gradients, behind the closure."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._decay(optimizer)
            return None
        after = partial(self._behind, optimizer, closure)
        if len(args) > 1:
            return (args[0], after, *args[2:]), kwargs
        return args, {**kwargs, "closure": after}

    def _behind(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._decay(optimizer)
        return result

    @torch.no_grad()
    def _decay(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                strength = self.strengths.get(parameter)
                if strength is not None and parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * strength)


def set_decay(
    ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer | None, decay: Decay
) -> None:
    """Give parameters another strength of decay; zero ends it.

    Raises:
        GuardError: no optimizer, or one that does not train these parameters.
    """
    # Not by `get_parameter`: a masked weight is read as a product, and is no parameter to it.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name: parameters[name] for name in decay.tensors}
    hook = _checked(optimizer, chosen)
    assert optimizer is not None
    new = dict(hook.strengths)
    new.update(dict.fromkeys(chosen.values(), decay.strength))
    _set_strengths(ledger, optimizer, hook, new)


def forget_decay(ledger: Ledger, optimizer: torch.optim.Optimizer, gone: Iterable[Tensor]) -> None:
    """Let go of parameters that have left the model."""
    lost = {id(parameter) for parameter in gone}
    for hook in _hooks(optimizer).values():
        if isinstance(hook, DecoupledDecay) and lost & {id(p) for p in hook.strengths}:
            left = {p: s for p, s in hook.strengths.items() if id(p) not in lost}
            _set_strengths(ledger, optimizer, hook, left)


def _checked(
    optimizer: torch.optim.Optimizer | None, chosen: Mapping[str, Tensor]
) -> DecoupledDecay:
    held = {id(p) for g in optimizer.param_groups for p in g["params"]} if optimizer else set()
    strange = [name for name, p in chosen.items() if p.requires_grad and id(p) not in held]
    if optimizer is None or strange or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        seen = f"an optimizer ({type(optimizer).__name__}) that does not hold it or has no hooks"
        raise GuardError(
            next(iter(strange or chosen)),
            seen="no optimizer" if optimizer is None else seen,
            needed="the torch.optim.Optimizer that trains it: weight decay acts at its steps",
            next_step="pass optimizer=... to apply or transaction",
        )
    found = [hook for hook in _hooks(optimizer).values() if isinstance(hook, DecoupledDecay)]
    return found[0] if found else DecoupledDecay({})


def _hooks(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    hooks: dict[Any, Any] = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    return hooks


def _set_strengths(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    hook: DecoupledDecay,
    strengths: Mapping[Tensor, float],
) -> None:
    new = {parameter: strength for parameter, strength in strengths.items() if strength}
    ledger.do(
        partial(setattr, hook, "strengths", new),
        partial(setattr, hook, "strengths", hook.strengths),
    )
    hooks = _hooks(optimizer)
    place = next((key for key, held in hooks.items() if held is hook), None)
    if new and place is None:
        number: Any = torch.utils.hooks.RemovableHandle(hooks).id
        put_item(ledger, hooks, number, hook)
    elif not new and place is not None:
        drop_item(ledger, hooks, place)


def decays_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The parameters with a decay of this kind, and its strength."""
    hooks = [hook for hook in _hooks(optimizer).values() if isinstance(hook, DecoupledDecay)]
    return {p: strength for hook in hooks for p, strength in hook.strengths.items()}
