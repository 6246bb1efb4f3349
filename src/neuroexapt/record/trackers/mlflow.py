"""A run in MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
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

_MOST = 900  # of what MLflow takes in one call
_LONGEST = 500  # characters of a parameter or a tag that every MLflow server takes


class MLflow:
    """Writes metrics, settings as parameters and each decision as a tag.

    Args:
        run_id: a run to write into. Without one: the run that ``mlflow.start_run()`` has made
            active in this thread, else a new run, which is ended in the end.
        experiment: name of the experiment of a new run.
        tracking_uri: where the run is kept; MLflow's own setting without one.

    Raises:
        SettingsError: the package mlflow is not installed (extra ``mlflow``).
        mlflow.exceptions.MlflowException: the server refuses the run.

    Metrics are ``neuroexapt/holdout_loss`` and the like, at the optimizer step; signs that MLflow
    does not take in names become ``_``.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        experiment: str = "neuroexapt",
        tracking_uri: str | None = None,
    ) -> None:
        mlflow = needed("mlflow", "mlflow")
        self._entities = needed("mlflow.entities", "mlflow")
        self.failures: tuple[type[Exception], ...] = (
            mlflow.exceptions.MlflowException,
            OSError,
        )
        active = mlflow.active_run()
        if run_id is None and active is not None and tracking_uri is None:
            run_id = active.info.run_id
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._own = run_id is None
        self.run_id: str = run_id or self._new(experiment)
        self._step = 0

    def _new(self, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else None
        run = self._client.create_run(number or found.experiment_id)
        return str(run.info.run_id)

    def take(self, event: Event) -> None:
        """Write one event."""
        self._step = step_of(event, self._step)
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_name(name), value, now, self._step)
            for name, value in prefixed(scalars(event), "neuroexapt/").items()
        ]
        params = [
            self._entities.Param(_name(name), value[:_LONGEST])
            for name, value in prefixed(settings(event), "neuroexapt.").items()
        ]
        for part in _parts(metrics):
            self._client.log_batch(self.run_id, metrics=part)
        for part in _parts(params, 100):
            self._client.log_batch(self.run_id, params=part)
        said = sentence(event)
        if said:
            kind, number = event["event"], event.get("id")
            self._client.set_tag(self.run_id, _name(f"neuroexapt.{kind}.{number}"), said[:_LONGEST])

    def close(self) -> None:
        """End the run, if it is ours."""
        if self._own:
            self._client.set_terminated(self.run_id)


def _parts(items: list[Any], most: int = _MOST) -> Iterator[list[Any]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _name(name: str) -> str:
    # Written to be a path on every kind of server: no empty, "." or ".." part.
    clean = re.sub(r"[^\w.\- /]", "_", name)
    return "/".join("_" if part.strip(". ") == "" else part for part in clean.split("/"))[:250]
