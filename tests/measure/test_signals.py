"""Each signal against a value known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt.errors import MeasureError
from neuroexapt.measure import (
    HoldoutScore,
    Reading,
    batch_size_of,
    dead_units,
    duplicate_units,
    effective_rank,
    evaluate,
    generalisation_gap,
    gradients,
    growth_gain,
    noise_corrected_norm,
    plateau_slope,
    read_dead_units,
    read_duplicate_units,
    read_effective_rank,
    read_plateau_slope,
    read_redundancy,
    removal_loss,
    slopes,
    unit_redundancy,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(correlation: float) -> Tensor:
    """Three units: the third correlates with the first, the second is on its own."""
    one, two, three = normal(50_000, 3).unbind(1)
    return torch.stack([one, two, correlation * one + math.sqrt(1 - correlation**2) * three], 1)


def with_constants(acts_NC: Tensor, count: int) -> Tensor:
    # 0.1 has no exact binary form: a variance by rounding would not be 0.
    constants = torch.full((len(acts_NC), count), 0.1, dtype=torch.float64)
    return torch.cat([acts_NC.double(), constants], dim=1)


COPIES = normal(4000, 4).repeat(1, 8)


def two_level_rank(correlation: float) -> float:
    """Effective rank of eigenvalues 1, 1 + c and 1 - c."""
    shares = np.array([1.0, 1 + correlation, 1 - correlation]) / 3
    return float(np.exp(-(shares * np.log(shares)).sum()))


def turned(*degrees: float) -> Tensor:
    """Units whose correlations are the cosines of the differences of the angles."""
    # Two columns that are exactly uncorrelated, with mean 0.
    basis_N2 = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    angles = torch.tensor(degrees).deg2rad()
    return basis_N2 @ torch.stack([angles.cos(), angles.sin()])


class Row(NamedTuple):
    name: str
    measured: Callable[[], float]
    expected: float
    tolerance: float


TABLE = [
    Row("rank of 4 signals x 8 copies", lambda: effective_rank(COPIES), 4.0, 0.01),
    Row("rank of 32 independent units", lambda: effective_rank(normal(20_000, 32)), 32.0, 0.1),
    Row("rank of one pair at 0.8", lambda: effective_rank(mixed(0.8)), two_level_rank(0.8), 0.02),
    Row("rank ignores constants", lambda: effective_rank(with_constants(COPIES, 5)), 4.0, 0.01),
    Row("rank of constants alone", lambda: effective_rank(torch.ones(8, 3)), 0.0, 0.0),
    Row("rank of 3 rows", lambda: effective_rank(torch.eye(3).repeat(1, 3)), 2.0, 1e-9),
    Row("copies counted", lambda: duplicate_units(COPIES), 28, 0),
    Row("mirrored copies counted", lambda: duplicate_units(torch.cat([COPIES, -COPIES], 1)), 60, 0),
    Row("0.9 is below 0.95", lambda: duplicate_units(mixed(0.9)), 0, 0),
    Row("0.9 is above 0.85", lambda: duplicate_units(mixed(0.9), threshold=0.85), 1, 0),
    Row("a chain is not one family", lambda: duplicate_units(turned(0, 15, 30)), 1, 0),
    Row("constants are no copies", lambda: duplicate_units(torch.ones(8, 3)), 0, 0),
    Row("dead units", lambda: len(dead_units(with_constants(COPIES, 5))), 5, 0),
    Row("R2 of a pair at 0.8", lambda: float(unit_redundancy(mixed(0.8))[2]), 0.64, 0.01),
    Row("R2 of the lone unit", lambda: float(unit_redundancy(mixed(0.8))[1]), 0.0, 0.002),
    Row("R2 of copies", lambda: float(unit_redundancy(COPIES).min()), 1.0, 0.01),
    Row("R2 of a constant", lambda: float(unit_redundancy(torch.ones(8, 2))[0]), 1.0, 0.0),
    Row("R2 of many units, few rows", lambda: read_redundancy(normal(600, 200), "").value, 0, 0.03),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_signal_equals_its_closed_form(row: Row) -> None:
    """The estimate lies within the stated distance of the true value."""
    assert row.measured() == pytest.approx(row.expected, abs=row.tolerance)


@pytest.mark.parametrize("signal", [effective_rank, duplicate_units, unit_redundancy])
@pytest.mark.parametrize("scale", [0.01, 30.0, -1.0, 1e-20])
def test_scaling_and_shifting_units_changes_nothing(
    signal: Callable[[Tensor], float | Tensor], scale: float
) -> None:
    """A unit may be quiet, loud, mirrored or shifted without a change of the signal."""
    acts_NC = torch.cat([mixed(0.8)[:4000], COPIES[:, :5]], dim=1).double()
    moved_NC = acts_NC.clone()
    moved_NC[:, ::2] = scale * (acts_NC[:, ::2] + 3.0)
    torch.testing.assert_close(torch.as_tensor(signal(moved_NC)), torch.as_tensor(signal(acts_NC)))


def test_dead_units_are_listed_by_index() -> None:
    """The indices name exactly the constant columns, however small the others vary."""
    acts_NC = with_constants(1e-12 * normal(100, 3), 2)[:, [3, 0, 1, 4, 2]]
    assert dead_units(acts_NC) == (0, 3)


def test_the_error_of_the_rank_is_the_spread_over_samples() -> None:
    """The jackknife error agrees with the spread over fresh samples within a factor 2."""
    fresh = [effective_rank(mixed(0.8)[start : start + 500]) for start in range(0, 50_000, 500)]
    claimed = [
        read_effective_rank(mixed(0.8)[start : start + 500], "x").error
        for start in range(0, 10_000, 500)
    ]
    ratio = float(np.mean([error for error in claimed if error is not None]) / np.std(fresh))
    assert 0.5 < ratio < 2.0


@pytest.mark.parametrize(
    "read", [read_effective_rank, read_dead_units, read_duplicate_units, read_redundancy]
)
def test_a_reading_says_where_how_many_and_how_sure(
    read: Callable[[Tensor, str], Reading],
) -> None:
    """Place, sample count and unit are set; the error is None only when rows are too few."""
    reading, short = read(normal(64, 3), "conv1"), read(normal(12, 3), "conv1")
    assert (reading.at, reading.samples) == ("conv1", 64)
    assert reading.unit
    assert reading.error is not None
    assert reading.error >= 0.0
    assert short.error is None


# --- removal ---------------------------------------------------------------------------------


def squared_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    loss: Tensor = 0.5 * (model(inputs).squeeze(1) - targets).square().mean()
    return loss


def regression(weights: list[float], count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of y = x . weights + noise of variance 1."""
    inputs_NP = normal(count * size, len(weights), seed=1)
    targets_N = inputs_NP @ torch.tensor(weights) + normal(count * size, seed=2)
    return list(zip(inputs_NP.split(size), targets_N.split(size), strict=True))


def consumer_sums(model: nn.Module, name: str, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    weight_OU = model.get_parameter(name).detach()
    rows = gradients(model, squared_loss, batches)
    return torch.stack([(row[name] * weight_OU).sum(0) for row in rows])


def test_removal_loss_of_a_quadratic_is_the_ablation_loss() -> None:
    """At the optimum of a linear regression with unit noise, removing an input costs w^2 / 2."""
    weights = [1.0, 0.5, 0.0]
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([weights])
    value_U, error_U = removal_loss(consumer_sums(model, "weight", regression(weights, 2000, 8)), 8)
    expected_U = 0.5 * torch.tensor(weights, dtype=torch.float64).square()
    torch.testing.assert_close(value_U, expected_U, atol=0.01, rtol=0.05)
    assert bool(((value_U - expected_U).abs() <= 4 * error_U + 0.01 * expected_U).all())
    assert bool((error_U[:2] > 0).all())


def test_a_truly_dead_unit_costs_nothing() -> None:
    """A unit behind a ReLU that never opens has removal loss and error exactly 0; others do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    model.get_parameter("0.weight").data[1] = 0.0
    model.get_parameter("0.bias").data[1] = -1.0
    value_U, error_U = removal_loss(
        consumer_sums(model, "2.weight", regression([1.0, 0.5, 0.0], 8, 8)), 8
    )
    assert (value_U[1].item(), error_U[1].item()) == (0.0, 0.0)
    assert bool((value_U[[0, 2, 3]] > 0).all())


def test_the_fisher_term_does_not_depend_on_the_micro_batch_size() -> None:
    """The same samples in small or large micro-batches give the same expected rise."""
    per_sample_NU = 0.3 + normal(64_000, 2)
    small, large = (per_sample_NU.reshape(-1, size, 2).mean(1) for size in (4, 32))
    torch.testing.assert_close(
        removal_loss(small, 4)[0], removal_loss(large, 32)[0], atol=0, rtol=0.1
    )


def test_removal_loss_follows_its_formula_and_a_plain_jackknife() -> None:
    """Value and error equal those of a loop over the stated formula."""

    def value(sums_M: Tensor) -> float:
        mean = float(sums_M.mean())
        return abs(mean) + 0.5 * (4 * float(sums_M.var()) + mean**2)

    sums_MU = normal(6, 3).double() - 2.0
    value_U, error_U = removal_loss(sums_MU, 4)
    for unit, sums_M in enumerate(sums_MU.T):
        kept = [torch.cat([sums_M[:skip], sums_M[skip + 1 :]]) for skip in range(6)]
        left_out = np.array([value(sums) for sums in kept])
        assert value_U[unit].item() == pytest.approx(value(sums_M))
        assert error_U[unit].item() == pytest.approx(math.sqrt(5 * left_out.var()))


def test_the_removal_error_is_the_spread_over_samples() -> None:
    """The jackknife error agrees with the standard deviation over 200 fresh draws within 30 %."""
    runs = [removal_loss(0.5 + normal(32, 1, seed=seed), 4) for seed in range(200)]
    spread = torch.cat([value for value, _ in runs]).std().item()
    claimed = torch.cat([error for _, error in runs]).mean().item()
    assert claimed == pytest.approx(spread, rel=0.3)


# --- growth ----------------------------------------------------------------------------------


def test_growth_gain_of_one_weight_is_half_g_squared_over_fisher() -> None:
    """A new input of a regression, still at weight 0, promises 1/2 w^2 / F with F known exactly."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    rows = gradients(model, squared_loss, regression([0.3], 256, 64))
    gradients_MP = torch.stack([row["weight"].flatten() for row in rows])
    # Of x (x w + noise), Gaussian x: E[x^2 (x w + noise)^2] = 3 w^2 + 1.
    expected = 0.5 * 0.3**2 / (3 * 0.3**2 + 1)
    gain, error = growth_gain(gradients_MP, 64)
    assert gain == pytest.approx(expected, rel=0.1)
    assert abs(gain - expected) < 4 * error


def test_growth_gain_of_alike_weights_is_that_of_their_common_direction() -> None:
    """Gradients g + noise of unit variance in 50 equal coordinates: 1/2 |g|^2 / (1 + |g|^2)."""
    gradients_MP = 0.05 + normal(65536, 50)
    square = 50 * 0.05**2
    gain, _ = growth_gain(gradients_MP, 1)
    assert gain == pytest.approx(0.5 * square / (1 + square), rel=0.1)


def test_growth_gain_is_bounded_however_many_weights_say_the_same() -> None:
    """10,000 copies of one certain gradient promise what one does: at most half a nat."""
    one = 1.0 + 0.01 * normal(16, 1)
    single = growth_gain(one, 4)[0]
    assert growth_gain(one.expand(16, 10_000), 4)[0] == pytest.approx(single, abs=1e-6)
    assert single <= 0.5


def test_what_the_existing_weights_would_earn_as_well_is_taken_off() -> None:
    """A candidate that repeats the existing slope earns nothing; an independent one keeps its."""
    old, new = normal(64, 1, seed=1) + 1.0, normal(64, 1, seed=2) + 1.0
    beside = slopes(old, 1)
    assert growth_gain(old, 1, beside_M=beside)[0] == pytest.approx(0.0, abs=0.01)
    # Slopes 1 + noise each: of s=1 remains 1/2, of f=2 remains 2 - 1/2.
    expected = 0.5 * 0.5**2 / 1.5
    assert growth_gain(new, 1, beside_M=beside)[0] == pytest.approx(expected, rel=0.6)


def test_growth_gain_does_not_depend_on_the_scale_of_the_block() -> None:
    """Rescaling all new parameters by one factor leaves the promised gain as it is."""
    gradients_MP = 0.5 + normal(16, 10)
    assert growth_gain(1e-4 * gradients_MP, 8)[0] == pytest.approx(growth_gain(gradients_MP, 8)[0])


def test_growth_gain_is_zero_where_nothing_moves() -> None:
    """Parameters without any gradient earn 0, with damping and without."""
    assert (
        growth_gain(torch.zeros(8, 3), 4) == growth_gain(torch.zeros(8, 3), 4, damping=0) == (0, 0)
    )


@pytest.mark.parametrize("count", [4, 6, 16])
@pytest.mark.parametrize("skewed", [False, True])
def test_growth_gain_of_pure_noise_is_zero_on_average(count: int, skewed: bool) -> None:
    """With a true gradient of 0 the mean over 200 seeds is 0 within its error."""
    gains, naive = [], []
    for seed in range(200):
        noise_MP = normal(count, 500, seed=seed)
        noise_MP = noise_MP.square() - 1 if skewed else noise_MP
        gains.append(growth_gain(noise_MP, 4)[0])
        naive.append(0.5 * (noise_MP.mean(0).square() / (4 * noise_MP.var(0))).sum().item())
    error = np.std(gains, ddof=1) / math.sqrt(len(gains))
    assert abs(np.mean(gains)) < 4 * error
    assert np.mean(naive) > 20 * error  # without the correction this test would see it


def test_the_noise_corrected_norm_is_unbiased() -> None:
    """The mean over 200 seeds is the squared norm of the true gradient; the plain norm is not."""
    true_P = torch.linspace(0.0, 0.4, 50)
    truth = true_P.square().sum().item()
    draws = [true_P + normal(8, 50, seed=seed) for seed in range(200)]
    values, claimed = zip(*(noise_corrected_norm(draw) for draw in draws), strict=True)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values) - truth) < 4 * spread / math.sqrt(200)
    assert np.mean([draw.mean(0).square().sum() for draw in draws]) - truth > spread
    assert 0.7 * spread < np.mean(claimed) < 2.0 * spread


def test_the_noise_corrected_norm_follows_its_formula() -> None:
    """The pair form equals (M |mean|^2 - mean |g|^2) / (M - 1)."""
    draw = normal(8, 5).double()
    plain = 8 * draw.mean(0).square().sum() - draw.square().sum(1).mean()
    assert noise_corrected_norm(draw)[0] == pytest.approx(plain.item() / 7)


# --- training state --------------------------------------------------------------------------


def test_the_slope_of_a_noisy_line_is_found_within_its_error() -> None:
    """Least squares agrees with numpy, and its error with the known noise."""
    noise = normal(400).double().numpy()
    losses = [9.0] * 50 + list(2.0 - 0.01 * np.arange(400) + 0.1 * noise)
    trend = plateau_slope(losses, points=400)
    fitted, covariance = np.polyfit(np.arange(400), losses[50:], 1, cov=True)
    assert trend.slope == pytest.approx(fitted[0])
    assert trend.error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert trend.residual == pytest.approx(0.1, rel=0.1)
    assert abs(trend.slope + 0.01) < 4 * trend.error
    reading = read_plateau_slope(losses, points=400)
    assert (reading.value, reading.error, reading.samples) == (trend.slope, trend.error, 400)


def test_the_generalisation_gap_adds_errors_in_squares() -> None:
    """The gap is held-out minus training; its error is unknown when one of them is."""
    train, known = HoldoutScore(1.0, 0.3, 90, (1.0,)), HoldoutScore(1.5, 0.4, 60, (1.5,))
    unknown = HoldoutScore(1.5, None, 60, (1.5,))
    gap = generalisation_gap(train, known)
    assert (gap.value, gap.error, gap.samples) == (0.5, 0.5, 60)
    assert generalisation_gap(train, unknown).error is None


def plain_mean(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).mean()
    return loss


def test_evaluate_weights_batches_by_their_size() -> None:
    """A short last batch counts for less, in the loss and in the error."""
    batches = [torch.full((4, 1), 1.0), torch.full((4, 1), 2.0), torch.full((2, 1), 6.0)]
    score = evaluate(nn.Dropout(0.5), plain_mean, batches)
    assert (score.loss, score.samples, score.per_batch) == (2.4, 10, (1.0, 2.0, 6.0))
    squares = (0.4 * 1.4) ** 2 + (0.4 * 0.4) ** 2 + (0.2 * 3.6) ** 2
    assert score.error == pytest.approx(math.sqrt(1.5 * squares))


def test_evaluate_of_equal_batches_has_the_usual_standard_error() -> None:
    """With equal sizes the error is the standard deviation by the root of the number."""
    losses = normal(20).double()
    score = evaluate(nn.Identity(), plain_mean, [loss.repeat(4) for loss in losses])
    assert score.error == pytest.approx(losses.std().item() / math.sqrt(20))
    assert evaluate(nn.Identity(), plain_mean, [torch.ones(4)]).error is None


def test_evaluate_builds_no_graph_and_uses_eval_mode() -> None:
    """Inside the loss function gradients are off and every module is in eval mode."""
    seen: list[tuple[bool, bool]] = []

    def spy(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), model.training))
        return plain_mean(model, batch)

    evaluate(nn.Linear(2, 1), spy, [torch.ones(4, 2)])
    assert seen == [(False, False)]


def test_evaluate_passes_divergence_on() -> None:
    """A loss that is not a number is a result, not an exception."""
    assert math.isnan(evaluate(nn.Identity(), plain_mean, [torch.tensor([math.nan])]).loss)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(7, 2), (torch.zeros(7, 2), torch.zeros(3)), {"id": "a", "x": [torch.zeros(7)]}],
    ids=["tensor", "tuple", "dict"],
)
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor(batch: object) -> None:
    """Tensors, tuples and mappings are read in order, at any depth."""
    assert batch_size_of(batch) == 7


REFUSED: dict[str, Callable[[], object]] = {
    "batch without a tensor": lambda: batch_size_of({"x": "text"}),
    "batch with a scalar first": lambda: batch_size_of((torch.tensor(1.0), torch.zeros(3))),
    "no batch": lambda: evaluate(nn.Identity(), plain_mean, []),
    "loss with two elements": lambda: evaluate(nn.Identity(), lambda _, x: x, [torch.zeros(2)]),
    "loss as a number": lambda: evaluate(nn.Identity(), lambda *_: 0.5, [torch.zeros(2)]),  # type: ignore[arg-type]
    "rank of one row": lambda: effective_rank(torch.zeros(1, 3)),
    "rank of an image": lambda: effective_rank(torch.zeros(4, 3, 2, 2)),
    "rank of NaN": lambda: effective_rank(torch.full((4, 3), math.nan)),
    "threshold above 1": lambda: duplicate_units(torch.zeros(4, 3), threshold=1.5),
    "as many units as rows": lambda: unit_redundancy(normal(8, 8)),
    "ridge of 0": lambda: unit_redundancy(normal(8, 2), ridge=0.0),
    "two micro-batches": lambda: removal_loss(torch.zeros(2, 3), 8),
    "removal at batch size 0": lambda: removal_loss(torch.zeros(4, 3), 0),
    "infinite gradient": lambda: removal_loss(torch.full((4, 3), math.inf), 8),
    "three micro-batches for a gain": lambda: growth_gain(torch.zeros(3, 3), 8),
    "growth at batch size 0": lambda: growth_gain(torch.zeros(4, 3), 0),
    "slopes of other batches": lambda: growth_gain(normal(4, 3), 8, beside_M=torch.zeros(5)),
    "negative damping": lambda: growth_gain(torch.zeros(4, 3), 8, damping=-1.0),
    "norm of two micro-batches": lambda: noise_corrected_norm(torch.zeros(2, 3)),
    "slope of two points": lambda: plateau_slope([1.0, 2.0]),
    "slope of no points": lambda: plateau_slope([1.0, 2.0, 3.0], points=0),
    "slope over NaN": lambda: plateau_slope([1.0, math.nan, 2.0]),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_refused_with_the_next_step(ask: Callable[[], object]) -> None:
    """The error says what was seen, what is needed and what to do."""
    with pytest.raises(MeasureError, match=r"got .+; needed .+ Next step: .+"):
        ask()
