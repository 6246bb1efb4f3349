"""Propose and decide: pure functions of what was measured; no model, no clock, no file.

Read :mod:`neuroexapt.plan.budget` (what may be spent), :mod:`neuroexapt.plan.survey` (what was
measured), :mod:`neuroexapt.plan.propose` (candidates in one currency, from
:mod:`~neuroexapt.plan.fitting`, :mod:`~neuroexapt.plan.squeeze` and the survey itself),
:mod:`neuroexapt.plan.curve` (what further training is worth) and
:mod:`neuroexapt.plan.controller` (when to change, what to keep).
"""

from neuroexapt.plan.budget import Budget, Limits, Settings
from neuroexapt.plan.candidate import Candidate
from neuroexapt.plan.controller import (
    Decision,
    Running,
    State,
    Verdict,
    bearable,
    choose,
    is_young,
    judge,
    observed,
    ranked,
    refused,
    settled,
    started,
    wants_change,
)
from neuroexapt.plan.curve import Point, stalled, steepness, worth_of_speed
from neuroexapt.plan.fitting import Chance, Fitting, overfits
from neuroexapt.plan.propose import propose
from neuroexapt.plan.squeeze import SHARES, squeezed
from neuroexapt.plan.survey import GrowOption, ShrinkOption, SqueezeOption, Survey, WidthSurvey

__all__ = [
    "SHARES",
    "Budget",
    "Candidate",
    "Chance",
    "Decision",
    "Fitting",
    "GrowOption",
    "Limits",
    "Point",
    "Running",
    "Settings",
    "ShrinkOption",
    "SqueezeOption",
    "State",
    "Survey",
    "Verdict",
    "WidthSurvey",
    "bearable",
    "choose",
    "is_young",
    "judge",
    "observed",
    "overfits",
    "propose",
    "ranked",
    "refused",
    "settled",
    "squeezed",
    "stalled",
    "started",
    "steepness",
    "wants_change",
    "worth_of_speed",
]
