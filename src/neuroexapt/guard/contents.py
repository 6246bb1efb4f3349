"""All that a checkpoint keeps of a model, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import original_class
from neuroexapt.guard.lineage import lineages


@dataclass(frozen=True)
class Contents:
    """A model at one moment, by reference.

    Attributes:
        lineages: what was done to it and its parts, by path.
        tensors: parameters and buffers under every name; tied ones are one object.
        frozen: names of parameters that are not trained.
        transient: names of buffers that are not in ``state_dict``.
        evaluating: paths of the modules in evaluation mode.
        kinds: class names of the modules, by path, as the user wrote them.
        extra: what modules add to ``state_dict`` by ``get_extra_state``, by path.
    """

    lineages: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, Tensor]
    frozen: tuple[str, ...]
    transient: tuple[str, ...]
    evaluating: tuple[str, ...]
    kinds: Mapping[str, str]
    extra: Mapping[str, Any]


def contents(model: nn.Module) -> Contents:
    """What a model holds now."""
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    return Contents(
        lineages(model),
        named_tensors(model),
        tuple(name for name, parameter in parameters if not parameter.requires_grad),
        tuple(transient_buffers(model)),
        tuple(path for path, module in modules if not module.training),
        {path: original_class(module).__name__ for path, module in modules},
        {
            path: module.get_extra_state()
            for path, module in modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
        },
    )


def transient_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the buffers that are not in ``state_dict``."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(name) is not None:
                yield f"{path}.{name}".lstrip(".")
