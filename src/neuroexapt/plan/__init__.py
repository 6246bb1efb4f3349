"""Propose and decide: pure functions of what was measured; no model, no clock, no file.

Read :mod:`neuroexapt.plan.budget` (what may be spent), :mod:`neuroexapt.plan.survey` (what was
measured), :mod:`neuroexapt.plan.propose` (candidates in one currency) and
:mod:`neuroexapt.plan.controller` (when to change, what to keep).
"""

from neuroexapt.plan.budget import Budget, Limits, Settings
from neuroexapt.plan.controller import (
    Decision,
    Point,
    Running,
    State,
    Verdict,
    bearable,
    choose,
    judge,
    observed,
    refused,
    started,
    wants_change,
)
from neuroexapt.plan.propose import Candidate, propose
from neuroexapt.plan.survey import GrowOption, ShrinkOption, Survey, WidthSurvey

__all__ = [
    "Budget",
    "Candidate",
    "Decision",
    "GrowOption",
    "Limits",
    "Point",
    "Running",
    "Settings",
    "ShrinkOption",
    "State",
    "Survey",
    "Verdict",
    "WidthSurvey",
    "bearable",
    "choose",
    "judge",
    "observed",
    "propose",
    "refused",
    "started",
    "wants_change",
]
