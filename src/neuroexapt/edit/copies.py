"""Copies of a part of a model that add nothing to it at first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neuroexapt.edit.branches import Gate, Spec
from neuroexapt.edit.graft import LINEAGE, fitting_class, is_branch
from neuroexapt.errors import EditError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
BLOCK = "nx_block"  # the block inside of a Blend


class Blend(nn.Module):
    """A block whose change of its input is scaled, per channel, by a gate that starts at zero.

    Args:
        block: takes a tensor and whatever else, gives a tensor of the same shape (or a tuple
            that begins with one).
        gate: the gate.

    Example:
        >>> x = torch.randn(2, 4)
        >>> torch.equal(Blend(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Gate(4, 0))(x), x)
        True

    Bachlechner et al. 2021 (ReZero), per channel.
    """

    def __init__(self, block: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.add_module(BLOCK, block)
        self.gate = gate

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(N, C, ...) or (..., C) to the same shape."""
        # A block may work on its input in place.
        out = self.get_submodule(BLOCK)(x.clone(), *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return x + torch.as_tensor(self.gate(out - x))


@dataclass(frozen=True, kw_only=True)
class CopySpec(Spec):
    """A copy of a block of the model.

    Attributes:
        source: path of the block.
        silent: names in it of parameters that are zero in the copy, so that it hands on its
            input; if there are none the copy stands behind a gate.
        channels: channels of its output.
        spatial: dimensions behind them.
        dtype: that of the gate, where it is not what the block's first parameter is.
        numbers: attributes of its modules, by path in it and name, with the value they get.
    """

    source: str
    silent: tuple[str, ...]
    channels: int
    spatial: int
    dtype: torch.dtype | None = None
    numbers: tuple[tuple[str, str, int], ...] = ()
    fresh: ClassVar[bool] = False

    def make(self, model: nn.Module) -> nn.Module:
        """Takes and gives what the block does.

        Raises:
            EditError: a part of the block cannot be copied.
        """
        block = _copied(model, self.source)
        # Not by `get_parameter`: a masked weight is read as a product, and is no parameter to it.
        named = dict(block.named_parameters(remove_duplicate=False))
        for name in self.silent:
            nn.init.zeros_(named[name])
        for path, name, value in self.numbers:
            vars(block.get_submodule(path))[name] = value
        parameters = list(block.parameters())
        if not any(p.requires_grad for p in parameters):  # of a frozen block: it is to learn
            for parameter in parameters:
                parameter.requires_grad_(parameter.is_floating_point())
        if self.silent:
            return block
        gate = Gate(self.channels, self.spatial)
        first = parameters[0]
        return Blend(block, gate.to(device=first.device, dtype=self.dtype or first.dtype))

    def preview(self, model: nn.Module) -> list[Tensor]:
        """As many and as large as those of the block."""
        block = model.get_submodule(self.source)
        held = [
            *((name, p) for name, p in block.named_parameters() if not is_branch(name)),
            *((name, b) for name, b in block.named_buffers() if not is_branch(name)),
        ]
        return [torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for _, t in held]

    def origin(self, name: str) -> str | None:
        own = name if self.silent else name.removeprefix(f"{BLOCK}.")
        return None if own == "gate.scale" and not self.silent else f"{self.source}.{own}"


def _copied(model: nn.Module, path: str) -> nn.Module:
    """A deep copy without what was inserted behind the block, and without hooks of the user.

    What modules outside hold too (a config, the model itself) is shared, not copied.
    """
    source = model.get_submodule(path)
    inside = list(source.modules())
    patched = [name for name, module in source.named_modules() if "forward" in vars(module)]
    if patched:
        raise EditError(
            ".".join(filter(None, (path, patched[0]))),
            seen="a forward that was replaced on this instance, and would run the old module",
            needed="forwards that belong to their classes",
            next_step="copy a block without it, or make the edit before replacing it",
        )
    memo: dict[int, Any] = {id(held): held for held in _shared(model, inside)}
    if torch.empty(0).is_meta:  # structure alone is asked for
        memo.update((id(tensor), _bare(tensor)) for tensor in _tensors(inside))
    for module in inside:
        values = [*vars(module).values(), *module._buffers.values()]
        for value in values:
            if isinstance(value, Tensor) and not value.is_leaf:  # left there by a forward
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(source, memo)
    except (RuntimeError, TypeError) as error:
        raise EditError(
            path,
            seen=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            needed="a block that copy.deepcopy can copy",
            next_step="drop what its attributes hold, or use InsertLayer(kind='mlp')",
        ) from error
    for module in twin.modules():
        _drop_hooks(module)
        vars(module).pop(LINEAGE, None)
    for name in [name for name in twin._modules if is_branch(name)]:
        del twin._modules[name]
    twin.__class__ = fitting_class(twin)
    return twin


def _tensors(inside: list[nn.Module]) -> Iterator[Tensor]:
    for module in inside:
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None:
                yield held


def _bare(tensor: Tensor) -> Tensor:
    new = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _shared(model: nn.Module, inside: list[nn.Module]) -> Iterator[Any]:
    """Modules outside of a block, objects that these hold too, and the user's hooks."""
    own = {id(module) for module in inside}
    outside = [module for module in model.modules() if id(module) not in own]
    yield from outside
    held = {id(value) for module in outside for value in vars(module).values()}
    for module in inside:
        for value in vars(module).values():
            if id(value) in held and not isinstance(value, (Tensor, nn.Module)):
                yield value
        for kind in _HOOKS:
            yield from (hook for hook in vars(module)[kind].values() if not _is_torchs(hook))


def _is_torchs(hook: Any) -> bool:
    """A hook that makes a weight, such as that of ``torch.nn.utils.weight_norm``."""
    return type(hook).__module__.startswith("torch.nn.utils")


def _drop_hooks(module: nn.Module) -> None:
    for kind in _HOOKS:
        hooks = vars(module)[kind]
        for key in [key for key, hook in hooks.items() if not _is_torchs(hook)]:
            del hooks[key]
