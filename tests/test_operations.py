"""The comparison of operations: the same moment for every arm, and a table that counts rightly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from benchmarks.operations.__main__ import sections
from benchmarks.operations.page import BY_HAND, page, paired, rewritten
from benchmarks.operations.run import Outcome, outcomes
from benchmarks.operations.task import DIGITS_MLP, Moment, Section, Setting, loss_fn

SHORT = dataclasses.replace(DIGITS_MLP, before=3, after=4)


def outcome(arm: str, seed: int, loss: float) -> Outcome:
    """A made-up result."""
    return Outcome("part", "place", arm, seed, 1.0, loss, 50.0, 10, 0.0)


def test_every_arm_starts_from_the_same_moment() -> None:
    """Two arms that change nothing end alike to the bit; one that spoils the weights does not."""
    seen = []

    def look(moment: Moment) -> None:
        seen.append(loss_fn(moment.model, moment.batches[0]).item())
        assert moment.optimizer.state

    def spoil(moment: Moment) -> None:
        look(moment)
        with torch.no_grad():
            moment.model.get_parameter("5.bias").add_(3 * torch.arange(10))

    setting = Setting("place", SHORT, {"first": look, "spoilt": spoil, "second": look})
    first, spoilt, second = outcomes("part", setting, 1, Path())
    assert seen[0] == seen[1] == seen[2]
    assert (first.loss, first.at_once) == (second.loss, second.at_once)
    assert spoilt.loss > first.loss


def test_differences_are_paired_by_seed() -> None:
    """Mean and standard error of the differences, by hand: +0.1, +0.2, +0.3."""
    setting = Setting("place", SHORT, {"plain": lambda _: None, "other": lambda _: None})
    found = [outcome("plain", s, s) for s in range(3)]
    found += [outcome("other", s, s + 0.1 * (s + 1)) for s in range(3)]
    mean, error = paired(setting, "other", found) or (0.0, 0.0)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / 3**0.5)
    text = page({"part": Section("Part", "Why.", (setting,))}, found, "command")
    assert "| other | 10 | 1.0000 | 1.2000 ± 1.1000 | +0.2000 ± 0.0577 | 0/3 |" in text


def test_every_section_has_a_first_arm_and_names_of_its_own() -> None:
    """What the page sorts by is there."""
    for section in sections().values():
        assert all(len(setting.arms) > 1 for setting in section.settings)
        names = [setting.name for setting in section.settings]
        assert len(set(names)) == len(names)


def test_what_was_written_by_hand_stays() -> None:
    """A run replaces what is above the mark, and writes the same page twice."""
    once = rewritten(f"old table\n\n{BY_HAND}\n\n## Notes\n", "new table\n")
    assert once == f"new table\n\n{BY_HAND}\n\n## Notes\n"
    assert rewritten(once, "new table\n") == once
    assert rewritten("", "new table\n") == "new table\n"
