"""Decisions as pure functions: when, what, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroexapt import AddRegularization, Narrow, Settings, Widen
from neuroexapt.edit import Edit
from neuroexapt.measure import Reading
from neuroexapt.plan import (
    Candidate,
    Chance,
    Fitting,
    GrowOption,
    Limits,
    Point,
    ShrinkOption,
    SqueezeOption,
    State,
    Survey,
    WidthSurvey,
    bearable,
    choose,
    judge,
    observed,
    propose,
    refused,
    squeezed,
    started,
    steepness,
    wants_change,
)
from neuroexapt.plan.controller import expectation, price, utility
from neuroexapt.plan.fitting import regularisations

SETTINGS = Settings(epochs=20, price=0.02, significance=1.0)
FREE = Limits()


def candidate(
    edit: Edit | None = None, *, loss: float = 0.0, parameters: int = 0, error: float = 0.0
) -> Candidate:
    return Candidate(edit or Narrow("fc", to=4), loss, error, parameters, 0, (), "because")


def state(losses: list[float], *, error: float = 0.01) -> State:
    now = State(start_parameters=1000, start_flops=1000)
    for epoch, loss in enumerate(losses, 1):
        now = observed(now, Point(epoch, loss, error))
    return now


READY = state([0.5, 0.4, 0.35])


def test_nothing_is_decided_before_a_trend_can_be_seen() -> None:
    """One held-out loss says nothing of where the next one would be."""
    assert not wants_change(state([0.5]), SETTINGS)[0]
    assert wants_change(READY, SETTINGS)[0]


def test_nothing_is_decided_in_the_last_part_of_a_run_of_known_length() -> None:
    """With 60 % of 20 epochs, epoch 11 may change the model and epoch 12 may not."""
    assert wants_change(replace(READY, epoch=11), SETTINGS)[0]
    assert not wants_change(replace(READY, epoch=12), SETTINGS)[0]
    assert wants_change(replace(READY, epoch=12), replace(SETTINGS, epochs=None))[0]


def test_a_change_taken_back_is_followed_by_plain_training() -> None:
    """The cool-down counts from the roll-back."""
    tired = replace(READY, rested=3)
    assert not wants_change(tired, replace(SETTINGS, cool_down=1))[0]
    assert wants_change(replace(tired, epoch=4), replace(SETTINGS, cool_down=1))[0]


def test_the_search_stops_after_fruitless_decisions_in_a_row() -> None:
    """Patience is a stop rule."""
    assert not wants_change(replace(READY, fruitless=SETTINGS.patience), SETTINGS)[0]


def test_a_cheap_removal_beats_doing_nothing_and_an_expensive_one_does_not() -> None:
    """Half of the parameters are worth 0.01 nats at a price of 0.02; 30 % of a loss lasts."""
    cheap, dear = candidate(loss=0.03, parameters=-500), candidate(loss=0.04, parameters=-500)
    assert choose(READY, SETTINGS, FREE, [cheap], (1000, 0))[1].candidate is cheap
    _, nothing = choose(READY, SETTINGS, FREE, [dear], (1000, 0))
    assert nothing.candidate is None
    assert "doing nothing" in nothing.why


def test_kinds_compare_in_one_currency_and_the_runner_up_is_named() -> None:
    """A growth that promises more nats than a removal saves wins."""
    grow = candidate(Widen("fc", by=4), loss=-0.05, parameters=100)
    shrink = candidate(loss=0.001, parameters=-500)
    _, decision = choose(READY, SETTINGS, FREE, [shrink, grow], (1000, 0))
    assert decision.candidate is grow
    assert decision.runner_up is not None
    assert "Narrow fc" in decision.runner_up


def test_a_gain_must_cover_its_own_error() -> None:
    """0.05 nats give or take 0.06 are no reason to grow."""
    unsure = candidate(Widen("fc", by=4), loss=-0.05, error=0.06, parameters=1)
    assert choose(READY, SETTINGS, FREE, [unsure], (1000, 0))[1].candidate is None


def test_growth_never_breaks_a_limit_that_holds() -> None:
    """However much it promises."""
    grow = candidate(Widen("fc", by=4), loss=-9.0, parameters=100)
    limits = Limits(parameters=1050)
    assert choose(READY, SETTINGS, limits, [grow], (1000, 0))[1].candidate is None
    assert choose(READY, SETTINGS, limits, [grow], (900, 0))[1].candidate is grow


def test_the_price_doubles_while_a_limit_is_exceeded_and_falls_back_once_it_holds() -> None:
    """So a limit is reached in the end, and not overshot."""
    limits, now = Limits(parameters=500), READY
    prices = []
    for size in (1000, 900, 800, 400):
        now, _ = choose(now, SETTINGS, limits, [], (size, 0))
        prices.append(price(now, SETTINGS))
    assert prices == [0.04, 0.08, 0.16, 0.02]


def test_only_what_is_limited_is_priced() -> None:
    """With a FLOPs limit alone, parameters are free."""
    grow = candidate(Widen("fc", by=4), parameters=1000)
    assert utility(READY, SETTINGS, Limits(flops=10), grow, (1, 1)) == 0.0
    assert utility(READY, SETTINGS, Limits(parameters=10), grow, (1, 1)) == pytest.approx(-0.02)


def test_a_trial_is_judged_against_the_trend_and_the_noise_not_against_one_lucky_epoch() -> None:
    """0.34 after 0.29 is five sampling errors up, but inside the scatter of the curve."""
    before = state([0.40, 0.33, 0.36, 0.29])
    for loss, kept in ((0.34, True), (0.9, False), (float("nan"), False)):
        running = observed(started(before, candidate()), Point(5, loss, 0.01))
        outcome = judge(running, replace(SETTINGS, significance=2.0), FREE)
        assert outcome is not None
        assert outcome[1].kept is kept


def test_no_verdict_before_the_trial_is_over() -> None:
    """A trial of two epochs is not judged after one."""
    running = observed(started(READY, candidate()), Point(4, 0.3, 0.01))
    assert judge(running, replace(SETTINGS, trial_epochs=2), FREE) is None


def test_a_change_taken_back_leaves_no_trace_in_the_curve() -> None:
    """Its loss was that of a model that no longer exists."""
    running = observed(started(READY, candidate()), Point(4, 9.0, 0.01))
    outcome = judge(running, SETTINGS, FREE)
    assert outcome is not None
    after, verdict = outcome
    assert not verdict.kept
    assert after.points == READY.points
    assert (after.epoch, after.rested, after.trial) == (4, 4, None)


def test_the_same_change_is_left_alone_after_two_failures_and_after_one_refusal() -> None:
    """Another size of the same width may still be tried."""
    again, other = candidate(parameters=-500), candidate(Narrow("fc", to=3), parameters=-500)
    failed = replace(READY, failed={"Narrow fc to 4": 2})
    assert choose(failed, SETTINGS, FREE, [again], (1000, 0))[1].candidate is None
    assert choose(failed, SETTINGS, FREE, [again, other], (1000, 0))[1].candidate is other
    unfit = refused(READY, again, for_good=True)
    assert choose(unfit, SETTINGS, FREE, [again], (1, 0))[1].candidate is None
    shocked = refused(READY, again, for_good=False)
    assert choose(shocked, SETTINGS, FREE, [again], (1, 0))[1].candidate is again


def test_predictions_of_a_kind_are_corrected_by_what_the_kind_brought() -> None:
    """A removal whose loss lasted four times as promised makes the next one look dearer."""
    running = started(state([0.5] * 5, error=0.001), candidate(loss=0.1, parameters=-1000))
    outcome = judge(observed(running, Point(6, 0.9, 0.001)), SETTINGS, FREE)
    assert outcome is not None
    assert outcome[0].correction["Narrow"] == pytest.approx(0.5 * 0.3 + 0.5 * 4)


def test_the_first_check_refuses_a_step_beyond_noise_and_price() -> None:
    """Measured on the same weights and data, before any training."""
    calm = state([0.5] * 5, error=0.01)
    saving = candidate(parameters=-500)
    assert bearable(calm, SETTINGS, FREE, saving, (1000, 0), 0.035).kept
    assert not bearable(calm, SETTINGS, FREE, saving, (1000, 0), 0.045).kept
    assert not bearable(calm, SETTINGS, FREE, saving, (1000, 0), float("nan")).kept


def test_an_expectation_is_the_end_of_the_line_within_what_was_seen() -> None:
    """A steep fall does not go on by itself; a flat curve is expected to stay flat."""
    falling = [Point(e, 2.0 * 0.5**e, 0.0) for e in range(5)]
    assert expectation(falling)[0] == pytest.approx(falling[-1].loss)
    assert expectation([Point(e, -1.0, 0.2) for e in range(4)]) == (
        pytest.approx(-1.0),
        pytest.approx(0.6),
    )


@given(st.lists(st.floats(0.01, 10.0), min_size=3, max_size=12), st.floats(0.0, 1.0))
def test_an_expectation_lies_between_the_last_three_losses(
    losses: list[float], error: float
) -> None:
    """For any curve; its noise is never below the sampling error."""
    points = [Point(e, loss, error) for e, loss in enumerate(losses)]
    expected, noise = expectation(points)
    assert min(losses[-3:]) - 1e-9 <= expected <= max(losses[-3:]) + 1e-9
    assert noise >= error


def survey(*, rank: float, removal: tuple[float, ...], gain: float = 0.0) -> Survey:
    size = len(removal)
    reading = Reading("effective_rank", "fc", rank, "units", 0.0, 100)
    width = WidthSurvey(
        "fc", size, removal, (0.0,) * size, (reading,), (ShrinkOption(size // 2, -10, -20),)
    )
    grow = GrowOption(Widen("fc", by=size), gain, 0.0, 10, 20, ())
    return Survey(100, 100, (width,), (grow,))


def test_a_narrowing_is_priced_by_the_least_needed_units() -> None:
    """Half of four units: the two cheapest, whatever their order."""
    narrow = propose(survey(rank=2.0, removal=(0.5, 0.1, 0.7, 0.2)))[0]
    assert narrow.loss == pytest.approx(0.3)
    assert narrow.edit == Narrow("fc", to=2, scores={"fc": (0.5, 0.1, 0.7, 0.2)})
    assert (narrow.parameters, narrow.flops) == (-10, -20)


def test_a_squeezed_width_is_worth_widening_and_an_idle_one_is_not() -> None:
    """All directions used and every unit needed, against one direction used of four."""
    squeezed = propose(survey(rank=4.0, removal=(0.4,) * 4))[-1]
    idle = propose(survey(rank=1.0, removal=(0.4, 0.4, 0.4, 0.0)))[-1]
    assert squeezed.loss == pytest.approx(-0.2)
    assert idle.loss == 0.0
    assert "100%" in squeezed.reason


def test_a_width_earns_the_saturated_share_of_a_promised_gain() -> None:
    """Gradients promise 0.8; half of the directions are idle and could earn it as well."""
    half = propose(survey(rank=2.0, removal=(0.0,) * 4, gain=0.8))[-1]
    assert half.loss == pytest.approx(-0.4)


def test_what_has_just_grown_is_not_taken_away_for_being_silent() -> None:
    """New units begin with zero outgoing weights: for five epochs that is no reason to go."""
    grow = candidate(Widen("fc", by=4), loss=-0.1, parameters=10)
    running = observed(started(READY, grow), Point(4, 0.3, 0.01))
    outcome = judge(running, SETTINGS, FREE)
    assert outcome is not None
    shrink = candidate(Narrow("fc", to=4), parameters=-500)
    young, other = outcome[0], candidate(Narrow("fc2", to=4), parameters=-500)
    assert choose(young, SETTINGS, FREE, [shrink], (1000, 0))[1].candidate is None
    assert choose(young, SETTINGS, FREE, [shrink, other], (1000, 0))[1].candidate is other
    old = replace(young, epoch=9)
    assert choose(old, SETTINGS, FREE, [shrink], (1000, 0))[1].candidate is shrink


HALF = candidate(Narrow("fc", to=4), loss=0.1, parameters=-100)
CURVE = [Point(n, 2.0 - 0.5 * log(n), 0.001, n / 10) for n in (1, 2, 3)]


def bound(points: Sequence[Point] = CURVE) -> State:
    now = State(start_parameters=1000, start_flops=1000, compute_bound=True)
    for point in points:
        now = observed(now, point)
    return now


def test_cheaper_steps_are_worth_what_the_curve_says_where_computing_ends_the_run() -> None:
    """At 30 % of a run, half the cost a step is 0.3 + 0.7 / 0.5 of a run: 0.5 nats an e-fold."""
    half = replace(HALF, flops=-500)
    worth = 0.5 * log(0.3 + 0.7 / 0.5)
    saved = 0.02 * 0.1
    assert utility(bound(), SETTINGS, FREE, half, (1000, 1000)) == pytest.approx(
        worth + saved - 0.3 * 0.1, abs=1e-6
    )
    free = replace(bound(), compute_bound=False)
    assert utility(free, SETTINGS, FREE, half, (1000, 1000)) == pytest.approx(saved - 0.03)


def test_growth_pays_for_the_steps_it_costs() -> None:
    """The same gain is taken late, when few steps are left to lose, and not early."""
    grow = candidate(Widen("fc", by=4), loss=-0.1)
    dear = replace(grow, flops=1000)
    late = [Point(n, 2.0 - 0.5 * log(n), 0.001, n / 10) for n in (5, 6, 7, 8, 9)]
    assert utility(bound(), SETTINGS, FREE, dear, (1, 1000)) < 0
    assert utility(bound(late), SETTINGS, FREE, dear, (1, 1000)) > 0


@given(st.floats(0.0, 2.0), st.integers(5, 9))
def test_the_slope_of_a_curve_is_found(slope: float, count: int) -> None:
    """L = a - b log(progress) gives b; the loss of the untrained model has no say by then."""
    points = [Point(n, 3.0 - slope * log(n), 0.0, n / 10) for n in range(1, count + 1)]
    assert steepness(points, 9.0) == pytest.approx(slope, abs=1e-9)


def test_a_curve_of_two_points_is_read_off_its_start() -> None:
    """2.3 before training, 1.5 at a tenth of the run: 0.8 over the e-folds since a hundredth."""
    points = [Point(1, 1.8, 0.01, 0.05), Point(2, 1.5, 0.01, 0.1)]
    assert steepness(points, 2.3) == pytest.approx(0.8 / log(10))
    assert steepness(points) == 0.0


def fitting(gap: float, *, p: float = 0.5, chance: float = 0.2) -> Fitting:
    return Fitting(
        Reading("generalisation_gap", "model", gap, "nats", 0.01, 4),
        1.0,
        Reading("chance", "model", chance, "nats", 0.01, 4),
        (Chance("drop", p),),
        ("act",),
    )


def test_dropout_goes_where_nothing_is_overfitted_before_anything_else_is_done() -> None:
    """Its price is half of what it adds to the training loss; a better narrowing waits."""
    whole = replace(survey(rank=2.0, removal=(0.0,) * 4), fitting=fitting(0.02))
    candidates = propose(whole)
    _, decision = choose(READY, SETTINGS, FREE, candidates, (1000, 0))
    assert decision.candidate is not None
    assert decision.candidate.edit == AddRegularization("drop", "dropout", 0.0)
    assert decision.candidate.loss == pytest.approx(-0.1)
    assert decision.candidate.watched


@pytest.mark.parametrize(
    ("gap", "stalled", "strength"), [(0.2, True, None), (0.5, False, None), (0.5, True, 0.5)]
)
def test_more_dropout_is_tried_where_the_gap_is_wide_and_the_loss_falls_no_more(
    gap: float, stalled: bool, strength: float | None
) -> None:
    """Between 10 % and 30 % of the training loss a gap says nothing."""
    found = list(regularisations(fitting(gap, p=0.4), 2.0, stalled=stalled))
    dropout = [c for c in found if getattr(c.edit, "kind", "") == "dropout"]
    assert [c.edit.strength for c in dropout] == ([strength] if strength else [])  # type: ignore[attr-defined]
    assert not any(c.watched for c in found)


def test_several_widths_go_together_with_the_dropout_behind_them() -> None:
    """Half of the units of both; dropout for half as many units is half as strong."""
    one = WidthSurvey("a", 8, (0.1,) * 8, (0.0,) * 8, (), (), chances=(("drop", 0.4),))
    other = replace(one, name="b", chances=())
    option = SqueezeOption((("a", 4), ("b", 4)), -100, -200)
    (found,) = propose(Survey(1000, 1000, (one, other), (), (option,)))
    assert found.loss == pytest.approx(0.8)
    assert found.edits == (
        Narrow("a", to=4, scores={"a": (0.1,) * 8}),
        AddRegularization("drop", "dropout", 0.2),
        Narrow("b", to=4, scores={"b": (0.1,) * 8}),
    )


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=40), min_size=1, max_size=4),
    st.floats(0.01, 0.9),
)
def test_a_squeeze_takes_the_least_needed_and_leaves_every_width_half(
    removal: list[list[float]], share: float
) -> None:
    """Of widths whose units cost the same."""
    widths = [
        WidthSurvey(str(n), len(values), tuple(values), (0.0,) * len(values), (), ())
        for n, values in enumerate(removal)
    ]
    sizes = squeezed(widths, {w.name: 1.0 for w in widths}, share)
    total = sum(w.size for w in widths)
    gone = sum(w.size - sizes.get(w.name, w.size) for w in widths)
    assert gone <= share * total + 1
    for width in widths:
        assert sizes.get(width.name, width.size) >= width.size / 2
