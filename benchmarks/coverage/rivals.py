"""Other pruners on the same models, each the way its README shows it; used when installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from benchmarks.coverage.outputs import Args, Kwargs, run, tensors_of
from torch import Tensor, nn

RATIO = 0.25
# Takes a model and its example input, gives the pruned model (which may be the same object).
Rival: TypeAlias = Callable[[nn.Module, Args, Kwargs], nn.Module]


class Refusal(Exception):
    """A rival said that it does not do this model, and why."""


def installed() -> dict[str, Rival]:
    """The rivals that can be imported, by name."""
    known = {
        "torch-pruning": ("torch_pruning", _torch_pruning),
        "torch-kirigami": ("torch_kirigami", _torch_kirigami),
    }
    return {name: rival for name, (module, rival) in known.items() if find_spec(module)}


def _torch_pruning(model: nn.Module, args: Args, kwargs: Kwargs) -> nn.Module:
    """Its high-level pruner; the layers that make the outputs are ignored, as the README says."""
    import torch_pruning as tp

    ignored = _output_layers(model, run(model, args, kwargs))
    pruner = tp.pruner.BasePruner(
        model.eval(),
        _example(args, kwargs),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        output_transform=_total,
        forward_fn=lambda net, example: net(*args, **kwargs),
    )
    pruner.step()
    return model


def _example(args: Args, kwargs: Kwargs) -> Any:
    return dict(kwargs) if kwargs else args


def _total(result: Any) -> Tensor:
    return torch.stack([t.sum() for t in tensors_of(result) if t.requires_grad]).sum()


def _output_layers(model: nn.Module, outputs: list[Tensor]) -> list[nn.Module]:
    """Layers that put out as many channels as an output has, as README's ``== 1000`` does."""
    last = {t.shape[-1] for t in outputs if t.dim() > 1}
    channels = {t.shape[1] for t in outputs if t.dim() > 3}
    return [
        module
        for module in model.modules()
        if getattr(module, "out_features", None) in last
        or getattr(module, "out_channels", None) in channels
    ]


def _torch_kirigami(model: nn.Module, args: Args, kwargs: Kwargs) -> nn.Module:
    """Graph, candidates, and a greedy plan under a budget of parameters."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    budget = int((1 - RATIO) * sum(p.numel() for p in model.parameters()))
    model = model.eval()
    try:
        graph = DependencyGraph.build(model, args=args, kwargs=dict(kwargs))
        pruner = Pruner(model, graph=graph)
        pruned, _ = pruner.prune(
            pruner.discover_candidates(),
            budget=ParameterBudget(max_params=budget),
            strategy=Greedy(GroupMagnitude(p=2)),
        )
    except Exception as error:
        if type(error).__module__.startswith("torch_kirigami"):
            raise Refusal(f"{type(error).__name__}: {error}") from error
        raise
    result: nn.Module = pruned
    return result


def versions() -> Mapping[str, str]:
    """Installed versions of the rivals, by name."""
    from importlib.metadata import version

    return {name: version(name) for name in installed()}
