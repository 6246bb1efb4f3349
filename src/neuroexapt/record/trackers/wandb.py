"""A run in Weights & Biases, or in anything with the same ``log``, such as trackio."""

from __future__ import annotations

from typing import Any

from neuroexapt.record.story import Event
from neuroexapt.record.trackers.told import (
    needed,
    prefixed,
    scalars,
    sentence,
    settings,
    step_of,
)


class WandB:
    """Logs numbers and decisions, and puts the settings into the config.

    Args:
        run: what ``wandb.init`` (or ``trackio.init``) returned; it is not finished in the end.
            Without one ``wandb.init`` makes a run, which is.
        options: for ``wandb.init``: ``project="digits"``, ``mode="offline"``.

    Raises:
        SettingsError: the package wandb is not installed (extra ``wandb``).
        wandb.Error: W&B refuses the run.

    Numbers are ``neuroexapt/holdout_loss`` and the like, drawn over ``neuroexapt/step``, the
    optimizer step, so that the user's own steps stay as they are.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        self.failures: tuple[type[Exception], ...] = (OSError,)
        self._own = run is None
        if run is None:
            wandb = needed("wandb", "wandb")
            self.failures = (wandb.Error, OSError)
            run = wandb.init(**options)
        self._run: Any = run
        self._step = 0
        if hasattr(run, "define_metric"):
            run.define_metric("neuroexapt/step", hidden=True)
            run.define_metric("neuroexapt/*", step_metric="neuroexapt/step")

    def take(self, event: Event) -> None:
        """Log one event, if there is anything in it to log."""
        self._step = step_of(event, self._step)
        told = settings(event)
        if told and hasattr(self._run, "config"):
            self._run.config.update(prefixed(told, "neuroexapt."))
        numbers: dict[str, Any] = dict(scalars(event))
        said = sentence(event)
        if said:
            numbers["decision"] = said
        if numbers:
            self._run.log(prefixed({"step": self._step, **numbers}, "neuroexapt/"))

    def close(self) -> None:
        """Finish the run, if it is ours."""
        if self._own:
            self._run.finish()
