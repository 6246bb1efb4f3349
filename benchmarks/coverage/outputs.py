"""Running a model and comparing what it gives; what a model is, to see that it is untouched."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
SEED = 20
_PLAIN = (bool, int, float, str, tuple, list, type(None))


class WithoutChance(TorchDispatchMode):
    """Random operators give one value everywhere, so that units may change places.

    Noise that is drawn for each unit is not the same noise for the same unit at another place.
    """

    _VALUES: ClassVar = {
        "rand": 0.5,
        "rand_like": 0.5,
        "uniform_": 0.5,
        "randn": 0.0,
        "randn_like": 0.0,
        "normal_": 0.0,
        "exponential_": 1.0,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        if name == "bernoulli_" and not isinstance(chance, Tensor):
            return args[0].fill_(chance)
        result = func(*args, **kwargs)
        return result.fill_(self._VALUES[name]) if name in self._VALUES else result


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of nested outputs; objects with attributes are opened once."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            inner = pytree.tree_leaves(list(vars(leaf).values()))
            found.extend(tensor for tensor in inner if isinstance(tensor, Tensor))
    return found


def run(model: nn.Module, args: Args, kwargs: Kwargs, *, training: bool = False) -> list[Tensor]:
    """Outputs without a graph and without chance; the inputs are copied."""
    args, kwargs = copy.deepcopy((args, dict(kwargs)))
    torch.manual_seed(SEED)
    with torch.no_grad(), WithoutChance():  # type: ignore[no-untyped-call]
        return tensors_of(model.train(training)(*args, **kwargs))


def shapes(
    model: nn.Module, args: Args, kwargs: Kwargs, *, training: bool
) -> list[tuple[int, ...]]:
    """Shapes of all outputs; buffers that training mode moves are put back."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = [tuple(tensor.shape) for tensor in run(model, args, kwargs, training=training)]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept and kept[name].shape == buffer.shape:
                buffer.copy_(kept[name])
    return result


def train_step(
    model: nn.Module, args: Args, kwargs: Kwargs, optimizer: torch.optim.Optimizer
) -> None:
    """Forward in training mode, backward of the sum of all outputs, one step; no graph is left.

    Raises:
        ValueError: no output carries a gradient, or a gradient is not finite.
    """
    args, kwargs = copy.deepcopy((args, dict(kwargs)))
    torch.manual_seed(SEED)
    made = [t for t in tensors_of(model.train()(*args, **kwargs)) if t.requires_grad]
    if not made:
        raise ValueError("no output carries a gradient")
    finite = all(bool(tensor.isfinite().all()) for tensor in made)
    torch.stack([tensor.double().sum() for tensor in made]).sum().backward()
    for name, parameter in model.named_parameters():
        if finite and parameter.grad is not None and not parameter.grad.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite")
    optimizer.step()
    optimizer.zero_grad()


def difference(new: list[Tensor], old: list[Tensor]) -> float:
    """Largest difference relative to each output's largest value; infinite for other shapes."""
    if [t.shape for t in new] != [t.shape for t in old]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(new, old, strict=True)), default=0.0)


def _relative(new: Tensor, old: Tensor) -> float:
    if not old.numel():
        return 0.0
    a, b = new.detach().double(), old.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (
        (a - b).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).masked_fill(same, 0.0).max()
    )
    scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-6)
    return float(gap / scale)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything an edit may change: tensors, their identity, plain attributes, training flags."""
    print_: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        print_[f"{path} class"] = type(module)
        for name, value in _held(vars(module), ""):
            print_[f"{path} {name}"] = copy.deepcopy(value) if _is_data(value) else _shown(value)
    tensors = {**dict(_all_parameters(model)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in tensors.items():
        print_[f"{name} tensor"] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
    return print_


def _held(values: Mapping[Any, Any], prefix: str, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Plain values by name, those inside of configs and dictionaries too."""
    for name, value in list(values.items()):
        if isinstance(value, _PLAIN):
            yield f"{prefix}{name}", value
        elif not isinstance(value, (Tensor, nn.Module, type)) and depth and not callable(value):
            inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            if not any(isinstance(child, (Tensor, nn.Module)) for child in inner.values()):
                yield from _held(inner, f"{prefix}{name}.", depth - 1)


def changed(model: nn.Module, before: Mapping[str, Any]) -> list[str]:
    """What differs from an earlier fingerprint, by name; bit for bit."""
    after = fingerprint(model)
    names = sorted(before.keys() ^ after.keys())
    return names + [
        name for name in before if name in after and not _same(before[name], after[name])
    ]


def _all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _is_data(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return all(isinstance(leaf, (bool, int, float, str, type(None))) for leaf in leaves)


def _shown(value: Any) -> list[str]:
    """Leaves that are no data as text; a weak reference is what it refers to."""
    leaves = pytree.tree_leaves(value)
    return [str(id(leaf()) if isinstance(leaf, weakref.ref) else leaf) for leaf in leaves]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and len(a) == 3 and isinstance(a[2], Tensor):
        return a[:2] == b[:2] and _same_bits(a[2], b[2])
    return bool(a == b) or repr(a) == repr(b)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
