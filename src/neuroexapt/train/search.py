"""What could be done now: no more is measured than the next change needs."""

from __future__ import annotations

from dataclasses import dataclass

from neuroexapt.plan import (
    Candidate,
    Limits,
    Settings,
    State,
    Survey,
    propose,
    ranked,
    stalled,
    worth_of_speed,
)
from neuroexapt.train.survey import Surveyor

# Growth is not looked at where steps of this cost would lose that many nats.
_LARGER, _MISSED = 1.2, 0.02


@dataclass(frozen=True)
class Proposal:
    """A change that could be made, and what it is worth in nats beside doing nothing."""

    utility: float
    candidate: Candidate


@dataclass(frozen=True)
class Search:
    """One look for a change.

    Attributes:
        state: what the controller remembers.
        settings: price and the rest.
        limits: of the model's size.
        now: present parameters and FLOPs.
        frugal: whether measuring is counted, and stops at the first thing worth doing.
    """

    state: State
    settings: Settings
    limits: Limits
    now: tuple[int, int]
    frugal: bool

    def survey(self, surveyor: Surveyor) -> Survey:
        """What was measured: all of it, or as much as was needed.

        Regularisation comes before structure, and growth is looked at when nothing can go.
        """
        survey = surveyor.fitted()
        for further in (surveyor.sized, surveyor.grown):
            if self.frugal and self._found(survey):
                break
            if further == surveyor.grown and not self._may_grow():
                break
            survey = further(survey)
        return survey

    def proposals(self, survey: Survey) -> tuple[Proposal, ...]:
        """What the survey proposes, the best first."""
        flat = stalled(self.state.points)
        candidates = propose(survey, self.settings.significance, stalled=flat)
        rated = ranked(self.state, self.settings, self.limits, candidates, self.now)
        return tuple(Proposal(*pair) for pair in rated)

    def _found(self, survey: Survey) -> bool:
        return any(proposal.utility > 0 for proposal in self.proposals(survey)[:1])

    def _may_grow(self) -> bool:
        """Whether a larger model would not miss the steps that it costs."""
        state = self.state
        missed = -worth_of_speed(state.points, _LARGER, state.start_loss)
        return not state.compute_bound or missed < _MISSED
