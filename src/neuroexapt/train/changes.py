"""Changes on a model in training: look for one, put it on trial, keep it or take it back."""

from __future__ import annotations

from typing import Any

from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard.memory import ran_out, release_cached
from neuroexapt.measure import batch_size_of
from neuroexapt.plan import (
    Candidate,
    Decision,
    Limits,
    Settings,
    State,
    Verdict,
    bearable,
    choose,
    is_young,
    judge,
    refused,
    settled,
    started,
)
from neuroexapt.train.attempt import Attempt, Pending
from neuroexapt.train.chronicle import Chronicle
from neuroexapt.train.judge import Judge
from neuroexapt.train.meter import Allowance
from neuroexapt.train.room import new_trial, room_left
from neuroexapt.train.scene import Scene
from neuroexapt.train.search import Proposal, Search
from neuroexapt.train.survey import Surveyor

_TOLD = 10  # proposals that an epoch tells
_WATCHED = "evaluation is unchanged, and what it does to the gap is watched"
_TRIES = 3  # candidates that may be put to the first check, which costs no training, at one moment


class Changes:
    """At most one change is on trial at a time; every decision is written down.

    Attributes:
        state: all that the controller remembers.
        pending: the trial under way.
    """

    def __init__(
        self, scene: Scene, judge: Judge, chronicle: Chronicle, settings: Settings, limits: Limits
    ) -> None:
        self.scene, self.judge, self.chronicle = scene, judge, chronicle
        self.settings, self.limits = settings, limits
        self.state = State(0, 0)
        self.pending: Pending | None = None

    def conclude(self) -> Verdict | None:
        """The verdict on the change on trial, carried out; None while it is too early."""
        judged = judge(self.state, self.settings, self.limits)
        outcome = self.chronicle.planned("judge", judged)
        if outcome is None or self.pending is None:
            return None
        self.state, verdict = outcome
        pending, self.pending = self.pending, None
        if verdict.kept:
            pending.trial.keep()
        else:
            pending.trial.roll_back()
            self.scene.meter.taken_back(pending.since)
        name = "kept" if verdict.kept else "rolled_back"
        realised = {"loss": verdict.realised, "parameters": pending.parameters}
        self.chronicle.verdict(pending.number, name, verdict.why, realised)
        return verdict

    def abandon(self, why: str) -> None:
        """Take back what is on trial, if anything is."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.trial.roll_back()
            self.chronicle.verdict(pending.number, "rolled_back", why)

    def decide(self, allowance: Allowance) -> tuple[Decision, tuple[Proposal, ...]]:
        """Look for a change and begin its trial; the decision, and what else could be done."""
        now, frugal = self.scene.now, self.scene.meter.training > 0
        search = Search(self.state, self.settings, self.limits, now, frugal)
        try:
            survey = search.survey(self._surveyor(allowance))
        except NeuroExaptError as error:
            return Decision(None, f"the model could not be surveyed: {error}"), ()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            release_cached()
            return Decision(None, f"the model could not be surveyed, out of memory: {error}"), ()
        self.chronicle.survey(survey.readings)
        proposals = search.proposals(survey)
        candidates = [proposal.candidate for proposal in proposals]
        for tried in range(_TRIES):
            said: dict[str, Any] = {"candidates": candidates, "now": now, "again": tried > 0}
            chosen = choose(self.state, self.settings, self.limits, **said)
            self.state, decision = self.chronicle.planned("choose", chosen, **said)
            if decision.candidate is None or self._try(decision, decision.candidate, now):
                break
            candidates = [c for c in candidates if c is not decision.candidate]
        return decision, proposals[:_TOLD]

    def _surveyor(self, allowance: Allowance) -> Surveyor:
        scene = self.scene
        return Surveyor(
            scene.model,
            scene.optimizer,
            scene.loss_fn,
            scene.batches[: allowance.signals],
            scene.example,
            scene.axes(),
            self.settings.seed + self.state.epoch,
            tuple(scene.recent),
            allowance.places,
            self.judge.kept,
            frozenset(name for name in scene.axes().widths if is_young(self.state, name)),
        )

    def _try(self, decision: Decision, candidate: Candidate, now: tuple[int, int]) -> bool:
        """Whether the change is made, or was only asked for; else another one may be looked at."""
        number = self.chronicle.proposal(decision, candidate)
        if self.settings.mode == "advise":
            self.chronicle.verdict(number, "refused", "advice only: nothing was touched")
            return True
        scene = self.scene
        held = scene.model, scene.optimizer, scene.copies
        room = room_left(self.limits, *held, scene.axes())
        trial = new_trial(*held, room, self.settings, (scene.loss_fn, scene.batches))
        statistics = tuple(scene.recent or scene.batches)
        try:
            attempt = Attempt(scene.example, scene.axes, scene.loss_fn, statistics)
            done = attempt.make(trial, candidate)
            scene.meter.applied(len(candidate.edits) * batch_size_of(scene.batches[0]))
            # Whatever stops the measuring, the edit is taken back first.
            step = 0.0 if candidate.watched else self.judge.step()
            said = {"candidate": candidate, "now": now, "step": step}
            first = bearable(self.state, self.settings, self.limits, candidate, now, step)
            self.chronicle.planned("bearable", first, **said)
        except NeuroExaptError as error:
            trial.roll_back()
            return self._refuse(number, candidate, str(error), for_good=True)
        except (RuntimeError, MemoryError) as error:
            trial.roll_back()
            if not ran_out(error):
                raise
            return self._refuse(number, candidate, f"out of memory: {error}", for_good=False)
        except BaseException:
            trial.roll_back()
            raise
        if not first.kept:
            trial.roll_back()
            return self._refuse(number, candidate, first.why, for_good=False)
        self.chronicle.applied(number, done)
        added = done.parameters_after - done.parameters_before
        if candidate.watched:
            trial.keep()
            self.state = self.chronicle.planned("settled", settled(self.state))
            self.chronicle.verdict(number, "kept", _WATCHED, {"loss": 0.0, "parameters": added})
            return True
        begun = started(self.state, candidate)
        self.state = self.chronicle.planned("started", begun, candidate=candidate)
        self.pending = Pending(number, trial, added, scene.meter.training)
        return True

    def _refuse(self, number: int, candidate: Candidate, why: str, *, for_good: bool) -> bool:
        state = refused(self.state, candidate, for_good=for_good)
        said = {"candidate": candidate, "for_good": for_good}
        self.state = self.chronicle.planned("refused", state, **said)
        self.chronicle.verdict(number, "refused", why)
        return False
