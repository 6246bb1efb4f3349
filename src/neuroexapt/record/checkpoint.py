"""Checkpoints of models that change: saved whole, loaded into what the user's factory builds.

A checkpoint is a folder:

======================= ==========================================================================
``manifest.json``       format, schema, and the size and digest of every other file
``architecture.json``   every edit that was kept, as data; the final form of every tensor
``model.safetensors``   the values of every tensor
``copy0.safetensors``   likewise, of a moving average that is saved along
``run.json``            optimizers by parameter name, schedulers, the evolver, random states
``run.safetensors``     the tensors of ``run.json``
``before0.safetensors`` with a trial under way: the model as it was before it
======================= ==========================================================================
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from neuroexapt.capture.interrupts import held_back
from neuroexapt.errors import CheckpointError
from neuroexapt.guard import inner_module
from neuroexapt.guard.several import Optimizers
from neuroexapt.record.folder import Opened, write_folder
from neuroexapt.record.loading import Loading
from neuroexapt.record.saving import Evolving, Saving

Made = TypeVar("Made")


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizers = None,
    evolver: Evolving | None = None,
    copies: Iterable[nn.Module] = (),
    keep: int = 1,
    required: bool = True,
    **objects: object,
) -> Path | None:
    """Save a run so that :func:`load` continues it as if nothing had happened.

    The checkpoint is a numbered folder in ``path``, written under a temporary name, brought to the
    disk and renamed: a kill at any moment leaves the previous one whole. Save between steps, when
    gradients have been used; they are not kept.

    Args:
        path: the folder in which checkpoints are numbered; one process writes it.
        model: the model, unwrapped or compiled.
        optimizer: the optimizer that trains it, or several; by default the evolver's.
        evolver: the evolver, with a trial under way if there is one.
        copies: moving averages and the like; those the evolver follows are saved anyway.
        keep: how many checkpoints stay.
        required: False makes a warning of a disk that refuses, and training can go on.
        objects: what else belongs to the run, by a name of your own: anything with ``state_dict``
            and ``load_state_dict`` (a scheduler, a ``GradScaler``, a stateful loader), a
            ``torch.Generator``, or a plain value such as ``epoch=3``.

    Returns:
        The folder of this checkpoint; None where the disk refused and it was not required.

    Raises:
        CheckpointError: the disk refuses, or something can be no data; earlier checkpoints are
            untouched.

    Example:
        >>> import tempfile, torch
        >>> from neuroexapt import Widen, apply, load, save
        >>> def factory():
        ...     return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net, x = factory(), torch.ones(4, 2)
        >>> done = apply(net, Widen("0", to=5), (x,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save(folder, net)
        ...     again = load(factory, folder)
        >>> again[0], torch.equal(again(x), net(x))
        (Linear(in_features=2, out_features=5, bias=True), True)
    """
    if type(keep) is not int or keep < 1:
        raise CheckpointError(
            "keep", seen=repr(keep), needed="1 or more checkpoints", next_step="use keep=1"
        )
    with held_back():
        if optimizer is None and evolver is not None:
            optimizer = evolver.optimizer
        saving = Saving(inner_module(model), optimizer, evolver, tuple(copies))
        files = saving.files(objects)
        try:
            return write_folder(Path(path), files, keep)
        except CheckpointError as error:
            if required:
                raise
            warnings.warn(f"no checkpoint was written: {error}", stacklevel=2)
            return None


def load(factory: Callable[[], Made], path: str | os.PathLike[str]) -> Made:
    """Bring what a factory builds to where a checkpoint was saved.

    The factory builds the run as it was built at first: the model of the original class and size,
    and the rest on it. The edits are made again, then values are filled in. No code and no pickle
    is read from the files, and every size is checked before memory is taken.

    Args:
        factory: a function without arguments that returns the model alone; or a dictionary with
            ``"model"`` and whatever of ``"optimizer"``, ``"evolver"``, ``"copies"`` and the other
            names given to :func:`save` is to go on. With a dictionary the random states of the
            process are restored too.
        path: a folder of checkpoints (the newest is taken), or one checkpoint.

    Returns:
        What the factory returned; a dictionary has the plain values besides.

    Raises:
        NoCheckpointError: there is no checkpoint yet.
        CheckpointError: it is damaged (the message names file and field), or the factory builds
            something else (the message names the first edit or tensor that does not fit).

    Example:
        >>> import tempfile, torch
        >>> from neuroexapt import Narrow, apply, load, save
        >>> def factory():
        ...     net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        ...     return {"model": net, "optimizer": torch.optim.Adam(net.parameters())}
        >>> run = factory()
        >>> done = apply(run["model"], Narrow("0", to=2), (torch.ones(4, 2),),
        ...              optimizer=run["optimizer"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save(folder, **run, epoch=7)
        ...     again = load(factory, folder)
        >>> again["epoch"], [p.shape[0] for p in again["optimizer"].param_groups[0]["params"]]
        (7, [2, 2, 1, 1])
    """
    opened = Opened(Path(path))  # first: where there is none, nothing should have been begun
    made = factory()
    parts: Mapping[str, Any]
    if isinstance(made, nn.Module):
        parts = {"model": made}
    elif isinstance(made, dict) and isinstance(made.get("model"), nn.Module):
        parts = made
    else:
        raise CheckpointError(
            "factory",
            seen=f"a {type(made).__name__}",
            needed='a model, or a dictionary with the model under "model"',
            next_step='return {"model": model, "optimizer": optimizer, ...}',
        )
    with held_back():
        plain = Loading(opened, parts).run(whole=made is parts)
    if isinstance(made, dict):
        made.update(plain)
    return made
