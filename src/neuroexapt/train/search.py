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

        Regularisation comes before structure. Where computing ends the run, growth is looked at
        when nothing can go, and its steps would not be missed.
        """
        survey = surveyor.fitted()
        if self.frugal and self._found(survey):
            return survey
        survey = surveyor.sized(survey)
        bound = self.state.compute_bound
        if bound and (self._found(survey) or not self._may_grow()):
            return survey
        return surveyor.grown(survey)

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
        return -worth_of_speed(state.points, _LARGER, state.start_loss) < _MISSED
