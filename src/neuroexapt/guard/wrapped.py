"""Around the model: wrappers, compilers, and regions in which no edit can be made."""

from __future__ import annotations

import torch
from torch import nn

from neuroexapt.errors import GuardError

# Kinds of module that hold flat or sharded copies of parameters, or compiled code for them.
_WRAPPERS = frozenset(
    {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule"}
)


def inner_module(model: nn.Module) -> nn.Module:
    """The module to edit: the one inside a compiled wrapper; other wrappers are refused.

    Raises:
        GuardError: the model, or a part of it, is wrapped for several devices or scripted.
    """
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & _WRAPPERS or isinstance(module, torch.jit.ScriptModule):
            raise GuardError(
                path or type(module).__name__,
                seen=f"a wrapped or scripted model ({type(module).__name__})",
                needed="the module itself",
                next_step="edit the inner module (model.module) on every rank, then wrap it again",
            )
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def is_compiled(model: nn.Module) -> bool:
    """By ``torch.compile(model)``, or a part of it by its own ``compile()``."""
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    return bool(compiled) or hasattr(model, "_orig_mod")


def check_mode() -> None:
    """Refuse regions in which weights have copies, or new tensors could not be trained.

    Raises:
        GuardError: autocast or inference mode is on.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", accelerator.type if accelerator is not None else "cpu"}
    if any(torch.is_autocast_enabled(kind) for kind in kinds):
        raise GuardError(
            "apply",
            seen="an autocast region",
            needed="a call outside of it: autocast keeps copies of the weights",
            next_step="leave `with torch.autocast(...)` first",
        )
    if torch.is_inference_mode_enabled():
        raise GuardError(
            "apply",
            seen="inference mode",
            needed="ordinary tensors: those made in inference mode can never be trained",
            next_step="leave torch.inference_mode() first; torch.no_grad() is fine",
        )
