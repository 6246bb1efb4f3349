"""What the evolver learns from its caller: held-out batches and an example input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn

from neuroexapt.errors import SettingsError
from neuroexapt.measure import Batch, LossFn, evaluate


def signal_batches(holdout: Iterable[Batch], count: int) -> list[Batch]:
    """The first ``count`` held-out batches.

    Raises:
        SettingsError: the loader can be read only once, or has fewer than four batches.
    """
    if iter(holdout) is holdout:
        raise SettingsError(
            "holdout",
            seen=f"a {type(holdout).__name__} that can be read once",
            needed="a loader or list that can be read after every epoch",
            next_step="pass the DataLoader itself, or list(...) of the batches",
        )
    batches = list(itertools.islice(holdout, count))
    if len(batches) < 4:
        raise SettingsError(
            "holdout",
            seen=f"{len(batches)} batches",
            needed="at least 4, so that signals have an error estimate",
            next_step="use a smaller batch size for the held-out loader",
        )
    return batches


def example_input(
    model: nn.Module, loss_fn: LossFn, batch: Batch
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], float]:
    """The arguments with which the loss function calls the model, and the loss.

    Raises:
        SettingsError: it does not call the model.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        loss = evaluate(model, loss_fn, [batch]).loss
    finally:
        handle.remove()
    if not seen:
        raise SettingsError(
            "loss_fn",
            seen="no call of the model's forward",
            needed="a loss that calls model(...)",
            next_step="call the model itself, not a submodule of it, inside loss_fn",
        )
    return seen[0], loss


def no_batch() -> SettingsError:
    """Computing that is limited must be counted."""
    return SettingsError(
        "evolver.step",
        seen="no batch",
        needed="the batch of each step, as Budget(compute=...) counts it",
        next_step="call evolver.step(batch)",
    )
