"""Limits and settings."""

from __future__ import annotations

from typing import Any

import pytest

from neuroexapt import Budget, Settings
from neuroexapt.errors import SettingsError
from neuroexapt.plan import Limits


def test_a_float_is_a_share_of_the_start_and_an_int_a_count() -> None:
    """Half of 1,000 parameters are 500; 700 FLOPs are 700."""
    assert Budget(params=0.5, flops=700).limits(parameters=1000, flops=9) == Limits(500, 700)


def test_the_excess_is_that_of_the_tightest_limit() -> None:
    """25 % over in parameters and 50 % over in FLOPs is 50 % over; none is 0."""
    assert Limits(100, 100).excess(125, 150) == pytest.approx(0.5)
    assert Limits(100, None).excess(100, 10**9) == 0.0


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("params", lambda: Budget(params=0.0)),
        ("params", lambda: Budget(params=-5)),
        ("flops", lambda: Budget(flops=True)),
        ("epochs", lambda: Settings(epochs=0)),
        ("until", lambda: Settings(until=1.5)),
        ("trial_epochs", lambda: Settings(trial_epochs=0)),
        ("cool_down", lambda: Settings(cool_down=-1)),
        ("patience", lambda: Settings(patience=0)),
        ("significance", lambda: Settings(significance=-0.1)),
        ("price", lambda: Settings(price=-1.0)),
        ("signal_batches", lambda: Settings(signal_batches=3)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, make: Any) -> None:
    """The error names the setting, the value and what would do."""
    with pytest.raises(SettingsError, match="needed") as caught:
        make()
    assert caught.value.place == name
