"""Copies of a model that follow its edits: moving averages, teachers, the best so far.

They go by name and never by position: an average that zips two lists of parameters averages other
layers as soon as one of both models has a layer more.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.errors import GuardError

# Where torch.compile, AveragedModel, timm's ModelEma and ema-pytorch keep the model inside.
_INSIDE = ("_orig_mod", "module", "ema_model")


def inner_copies(model: nn.Module, copies: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """The modules to edit beside the model, each checked to be a copy of it.

    Raises:
        GuardError: one of them has other parameters or buffers, or shares some with the model.
    """
    return tuple(_inner_copy(model, copy) for copy in copies)


def _inner_copy(model: nn.Module, copy: nn.Module) -> nn.Module:
    wanted = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    held = [copy._modules.get(name) for name in _INSIDE]
    candidates = [copy, *(module for module in held if module is not None)]
    for inner in candidates:
        if {name: tensor.shape for name, tensor in named_tensors(inner).items()} == wanted:
            _check_apart(model, inner, copy)
            return inner
    found = {name: tuple(t.shape) for name, t in named_tensors(candidates[-1]).items()}
    odd = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
    shape = tuple(wanted[odd]) if odd in wanted else "not there"
    raise GuardError(
        type(copy).__name__,
        seen=f"'{odd}' of shape {found.get(odd, 'none')}",
        needed=f"a copy of {type(model).__name__}, where it is {shape}",
        next_step="make the copy anew from the model, and give it from the first edit on",
    )


def _check_apart(model: nn.Module, inner: nn.Module, copy: nn.Module) -> None:
    own = {id(tensor): name for name, tensor in named_tensors(model).items()}
    shared = [own[id(tensor)] for tensor in named_tensors(inner).values() if id(tensor) in own]
    if shared:
        raise GuardError(
            type(copy).__name__,
            seen=f"'{shared[0]}' is the model's own tensor",
            needed="a copy with tensors of its own",
            next_step="give copies made by copy.deepcopy, not the model or a view of it",
        )
