"""Make the edits of a candidate on trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neuroexapt.couple import AxisMap
from neuroexapt.guard import Applied, Trial
from neuroexapt.measure import Batch, LossFn
from neuroexapt.plan import Candidate


@dataclass(frozen=True)
class Pending:
    """A trial under way.

    Attributes:
        number: of its proposal in the journal.
        trial: the way back.
        parameters: it added.
        since: where the meter of training stood.
    """

    number: int
    trial: Trial
    parameters: int
    since: int


@dataclass(frozen=True)
class Attempt:
    """What is needed to make edits.

    Attributes:
        example: positional and keyword example input.
        axes: the map of the model as it is when called.
        loss_fn: for batch norm statistics.
        batches: for batch norm statistics.
    """

    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    axes: Callable[[], AxisMap]
    loss_fn: LossFn
    batches: Sequence[Batch]

    def make(self, trial: Trial, candidate: Candidate) -> Applied:
        """All edits of a candidate, and batch norm statistics that fit what is left.

        Raises:
            NeuroExaptError: one of them cannot be made; those before it are still on trial.
        """
        args, kwargs = self.example
        done = [trial.apply(edit, args, kwargs, axes=self.axes()) for edit in candidate.edits]
        if candidate.parameters < 0:
            trial.reestimate(self.loss_fn, self.batches)
        return replace(
            done[-1],
            parameters_before=done[0].parameters_before,
            max_difference=max(one.max_difference for one in done),
            seconds=sum(one.seconds for one in done),
        )
