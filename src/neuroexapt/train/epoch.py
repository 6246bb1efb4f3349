"""What an epoch came to."""

from __future__ import annotations

from dataclasses import dataclass

from neuroexapt.measure import HoldoutScore
from neuroexapt.plan import Decision, Verdict
from neuroexapt.train.search import Proposal


@dataclass(frozen=True)
class Epoch:
    """What happened at the end of an epoch.

    Attributes:
        number: the epoch, counted from 1.
        holdout: the held-out loss of the model as it goes into the next epoch.
        parameters: its number of parameters.
        verdict: the end of a trial, if one ended.
        decision: what was decided, if a change was considered. Its candidate is on trial, unless
            the edit was refused, which the journal tells.
        why: one sentence on why nothing was decided, else the decision's or verdict's.
        proposals: what could be done, the best first, where this was asked for.
    """

    number: int
    holdout: HoldoutScore
    parameters: int
    verdict: Verdict | None
    decision: Decision | None
    why: str
    proposals: tuple[Proposal, ...] = ()
