"""What was done to a model, remembered on the model itself.

Every edit that is carried out adds an entry: a line of JSON that says what was written, from which
:mod:`neuroexapt.guard.redo` makes the same structure from a model as its factory builds it. An edit
that is taken back takes its entry along, as it does everything else.

The entries are a tuple of text in an attribute of the module that was edited. So they go wherever
the model goes (copies, pickles, another optimizer or none), stay out of ``state_dict``, and a
pickle of the model does not need this library because of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from neuroexapt.edit import Patch, Writer, registered_specs
from neuroexapt.edit.graft import LINEAGE
from neuroexapt.errors import CheckpointError
from neuroexapt.guard.ledger import Change, Ledger


def lineage(model: nn.Module) -> tuple[str, ...]:
    """The entries of a model, oldest first.

    Example:
        >>> import torch
        >>> from neuroexapt import Widen, apply
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> done = apply(net, Widen("0", to=5), (torch.ones(4, 2),))
        >>> [(entry["kind"], entry["place"]) for entry in map(json.loads, lineage(net))]
        [('Widen', '0')]
    """
    held: tuple[str, ...] = vars(model).get(LINEAGE, ())
    return held


def remember(ledger: Ledger, model: nn.Module, patch: Patch, changes: Sequence[Change]) -> None:
    """Add an entry for a patch that was carried out."""
    become(ledger, model, (*lineage(model), _entry(patch, changes)))


def become(ledger: Ledger, model: nn.Module, entries: tuple[str, ...]) -> None:
    """Replace the entries of a model."""
    ledger.do(partial(_put, model, entries), partial(_put, model, lineage(model)))


def _put(model: nn.Module, entries: tuple[str, ...]) -> None:
    if entries:
        vars(model)[LINEAGE] = entries
    else:
        vars(model).pop(LINEAGE, None)


def _entry(patch: Patch, changes: Sequence[Change]) -> str:
    head: dict[str, Any] = {
        "kind": type(patch.edit).__name__,
        "place": patch.edit.place,
        "description": patch.description,
        # Entries of a model and of its parts, edited by themselves, are put in order by this.
        "time": time.time_ns(),
    }
    if patch.decays:
        changes = [*changes, *(_decay(decay.tensors, decay.strength) for decay in patch.decays)]
    writer = Writer(registered_specs())
    try:
        head["changes"] = [
            {key: writer.data(value, f"{change['do']}.{key}") for key, value in change.items()}
            for change in changes
        ]
    except CheckpointError as error:
        # The edit itself is good; only a checkpoint has to refuse.
        head["unsaved"] = f"{error.place}: {error.seen}"
    return json.dumps(head, separators=(",", ":"))


def _decay(tensors: tuple[str, ...], strength: float) -> Change:
    return {"do": "decay", "tensors": list(tensors), "strength": strength}


def lineages(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """The entries of a model and of every part that was edited by itself, by path."""
    found = {path: lineage(module) for path, module in model.named_modules()}
    return {path: entries for path, entries in found.items() if entries}
