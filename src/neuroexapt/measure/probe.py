"""Small predictors of a target from features: what `information` asks a layer with.

A linear map, or one with a hidden layer on top of it, of features that are turned to their
principal directions and scaled to variance 1. Both are fitted with a penalty chosen on rows that
the fit did not see, from the same start every time.

Shapes in names: N rows, C features, D principal directions, K outputs of the probe (classes,
marks or numbers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["labels", "marks", "numbers"]

DIRECTIONS = 64
_PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
_HIDDEN = 64
_EPOCHS = 30
_PATIENCE = 4
_BATCH = 128
_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class Target:
    """What a probe predicts.

    Attributes:
        kind: ``"labels"`` (one class a row), ``"marks"`` (several yes or no a row) or
            ``"numbers"`` (with normal errors).
        values: (N,) class numbers from 0, or (N, K) numbers; marks lie between 0 and 1.
        outputs: K.
    """

    kind: Kind
    values: Tensor
    outputs: int

    def __getitem__(self, rows: Tensor) -> Target:
        return Target(self.kind, self.values[rows], self.outputs)


def log_likelihood(target: Target, out_NK: Tensor, spread_K: Tensor) -> Tensor:
    """(N,): log probability of the target, in nats, given a probe's outputs.

    Args:
        target: what is predicted.
        out_NK: logits, or means of numbers.
        spread_K: standard deviations; looked at for numbers alone.

    Example:
        >>> target = Target("labels", torch.tensor([1]), 2)
        >>> log_likelihood(target, torch.zeros(1, 2), torch.ones(2))
        tensor([-0.6931])
    """
    if target.kind == "labels":
        return -F.cross_entropy(out_NK, target.values, reduction="none")
    if target.kind == "marks":
        losses = F.binary_cross_entropy_with_logits(out_NK, target.values, reduction="none")
        return -losses.sum(1)
    away_NK = (target.values - out_NK) / spread_K
    return -(0.5 * away_NK.square() + spread_K.log() + 0.5 * math.log(2 * math.pi)).sum(1)


def marginal(target: Target) -> tuple[Tensor, Tensor]:
    """The best prediction without features: outputs (1, K) and spreads (K,)."""
    if target.kind == "numbers":
        return target.values.mean(0, keepdim=True), _spread(target.values, 1)
    if target.kind == "labels":
        counts = torch.bincount(target.values, minlength=target.outputs).double() + 0.5
        return (counts / counts.sum()).log()[None], torch.ones(target.outputs)
    share_K = (target.values.sum(0) + 0.5) / (len(target.values) + 1)
    return torch.logit(share_K)[None], torch.ones(target.outputs)


def _spread(left_NK: Tensor, used: int) -> Tensor:
    """Standard deviations of what is left, after `used` numbers an output were fitted."""
    free = max(1, len(left_NK) - used)
    left_NK = left_NK - left_NK.mean(0) if used == 1 else left_NK
    scale_K = left_NK.square().sum(0) / free
    return scale_K.clamp(min=_FLOOR).sqrt()


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted predictor.

    Attributes:
        penalty: the one that was chosen, per row.
        doubt: how much more, in nats, a probe of any penalty might find with endless rows; 0 where
            the penalty was chosen elsewhere.
    """

    mean_C: Tensor
    turn_CD: Tensor
    weight_DK: Tensor
    bias_K: Tensor
    spread_K: Tensor
    penalty: float
    hidden: tuple[Tensor, Tensor, Tensor] | None = None
    doubt: float = 0.0

    def outputs(self, features_NC: Tensor) -> Tensor:
        """(N, K): logits, or means."""
        return _outputs((features_NC - self.mean_C) @ self.turn_CD, self)


def _outputs(z_ND: Tensor, probe: Probe) -> Tensor:
    out_NK = z_ND @ probe.weight_DK + probe.bias_K
    if probe.hidden is not None:
        first_DH, bias_H, second_HK = probe.hidden
        out_NK = out_NK + torch.relu(z_ND @ first_DH + bias_H) @ second_HK
    return out_NK


def principal(features_NC: Tensor, limit: int = DIRECTIONS) -> tuple[Tensor, Tensor]:
    """Mean (C,) and the map (C, D) to principal directions of variance 1, at most `limit`.

    Of the correlations, so that a loud unit does not push others out.

    Example:
        >>> mean_C, turn_CD = principal(torch.randn(100, 3).double() * torch.tensor([1, 9, 0]))
        >>> turn_CD.shape
        torch.Size([3, 2])
    """
    mean_C = features_NC.mean(0)
    away_NC = features_NC - mean_C
    scale_C = away_NC.square().mean(0).sqrt()
    scale_C = torch.where(scale_C > 1e-12 * scale_C.max().clamp(min=_FLOOR), scale_C, torch.inf)
    z_NC = away_NC / scale_C
    values_C, vectors_CC = torch.linalg.eigh(z_NC.T @ z_NC / len(z_NC))
    kept = values_C > 1e-8 * values_C[-1].clamp(min=_FLOOR)
    values_D, vectors_CD = values_C[kept][-limit:], vectors_CC[:, kept][:, -limit:]
    return mean_C, vectors_CD / (scale_C[:, None] * values_D.sqrt())


def fit(
    features_NC: Tensor,
    target: Target,
    inner_N: Tensor,
    *,
    penalty: float | None = None,
    hidden: bool = False,
    seed: int = 0,
) -> Probe:
    """Fit a probe; rows where `inner_N` is True choose the penalty, then take part in the fit.

    Args:
        features_NC: float64.
        target: of the same rows.
        inner_N: rows kept back for the choice.
        penalty: one that was chosen already.
        hidden: add a hidden layer of 64 units to the linear map, trained until it stops to help.
        seed: of the hidden layer's first weights and its order of rows.
    """
    mean_C, turn_CD = principal(features_NC)
    z_ND = (features_NC - mean_C) @ turn_CD
    first = _fit_linear(z_ND, target, None, None)
    if penalty is not None and not hidden:
        found = _fit_linear(z_ND, target, penalty, first)
        return replace(found, mean_C=mean_C, turn_CD=turn_CD)
    best, doubt = _chosen(z_ND, target, inner_N, _PENALTIES if penalty is None else (penalty,))
    whole = _fit_linear(z_ND, target, best.penalty, best)
    if hidden:
        grown = _grow(best, z_ND, target, inner_N, seed)
        if grown.hidden is not None:
            return replace(grown, mean_C=mean_C, turn_CD=turn_CD, doubt=doubt)
    return replace(whole, mean_C=mean_C, turn_CD=turn_CD, doubt=doubt)


def _chosen(
    z_ND: Tensor, target: Target, inner_N: Tensor, penalties: Sequence[float]
) -> tuple[Probe, float]:
    """From strong to weak penalties, each from the last fit; the best on inner rows, and doubt."""
    known, kept, aim, other = z_ND[~inner_N], z_ND[inner_N], target[~inner_N], target[inner_N]
    tried = best = _fit_linear(known, aim, None, None)
    bare = _value(best, known, aim), _value(best, kept, other)
    best_gain, middle = -math.inf, 0.0
    for penalty in penalties:
        tried = _fit_linear(known, aim, penalty, tried)
        own, gain = _value(tried, known, aim) - bare[0], _value(tried, kept, other) - bare[1]
        # Half-way between the rows fitted and others is where endless rows would lead.
        middle = max(middle, (own + gain) / 2)
        if gain > best_gain:
            best, best_gain = tried, gain
    return best, max(0.0, middle - best_gain)


def _value(probe: Probe, z_ND: Tensor, target: Target) -> float:
    return float(log_likelihood(target, _outputs(z_ND, probe), probe.spread_K).mean())


def _fit_linear(z_ND: Tensor, target: Target, penalty: float | None, start: Probe | None) -> Probe:
    """The best linear map under a penalty; None or infinite: no features at all."""
    size = z_ND.shape[1]
    nothing = z_ND.new_zeros(0)
    if penalty is None or math.isinf(penalty):
        out_1K, spread_K = marginal(target)
        zeros = z_ND.new_zeros(size, target.outputs)
        return Probe(nothing, nothing, zeros, out_1K[0].to(z_ND), spread_K.to(z_ND), math.inf)
    if target.kind == "numbers":
        centre_D, mean_K = z_ND.mean(0), target.values.mean(0)
        away_ND, off_NK = z_ND - centre_D, target.values - mean_K
        gram_DD = away_ND.T @ away_ND / len(z_ND) + penalty * torch.eye(size).to(z_ND)
        weight_DK = torch.linalg.solve(gram_DD, away_ND.T @ off_NK / len(z_ND))
        left_NK = off_NK - away_ND @ weight_DK
        bias_K = mean_K - centre_D @ weight_DK
        return Probe(nothing, nothing, weight_DK, bias_K, _spread(left_NK, size + 1), penalty)
    assert start is not None
    weight, bias = _logistic(z_ND, target, penalty, start)
    return Probe(nothing, nothing, weight, bias, start.spread_K, penalty)


def _logistic(z_ND: Tensor, target: Target, penalty: float, start: Probe) -> tuple[Tensor, Tensor]:
    """Logistic regression: mean loss + penalty / 2 times the squared weights, from a start."""
    ones_N1 = z_ND.new_ones(len(z_ND), 1)
    wide_ND = torch.cat([z_ND, ones_N1], 1)
    held = torch.cat([start.weight_DK, start.bias_K[None]]).clone().requires_grad_()
    wanted_NK = target.values
    if target.kind == "labels":
        wanted_NK = F.one_hot(target.values, target.outputs).to(z_ND)
    solver = torch.optim.LBFGS(
        [held], max_iter=60, tolerance_grad=1e-6, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weights = held.detach()
        out_NK = wide_ND @ weights
        given_NK = out_NK.softmax(1) if target.kind == "labels" else out_NK.sigmoid()
        shrunk = torch.cat([penalty * weights[:-1], torch.zeros_like(weights[-1:])])
        held.grad = wide_ND.T @ (given_NK - wanted_NK) / len(wide_ND) + shrunk
        loss = -log_likelihood(target, out_NK, start.spread_K).mean()
        return loss + 0.5 * penalty * weights[:-1].square().sum()

    solver.step(closure)
    found = held.detach()
    return found[:-1], found[-1]


def _grow(linear: Probe, z_ND: Tensor, target: Target, inner_N: Tensor, seed: int) -> Probe:
    """A hidden layer beside the linear map, from zero outgoing weights; the best epoch counts."""
    generator = torch.Generator().manual_seed(seed)
    size, outputs = z_ND.shape[1], target.outputs
    first = torch.randn(size, _HIDDEN, generator=generator, dtype=torch.float64)
    first = (first * math.sqrt(2 / max(1, size))).to(z_ND)
    weights = [
        linear.weight_DK.clone(),
        linear.bias_K.clone(),
        first,
        torch.randn(_HIDDEN, generator=generator, dtype=torch.float64).to(z_ND) * 0.5,
        z_ND.new_zeros(_HIDDEN, outputs),
    ]
    for weight in weights:
        weight.requires_grad_()
    solver = torch.optim.AdamW(weights, lr=3e-3, weight_decay=1e-2)
    rows = torch.nonzero(~inner_N)[:, 0]
    scale_K = linear.spread_K

    def now(spread_K: Tensor) -> Probe:
        w, b, f, g, s = (weight.detach().clone() for weight in weights)
        return Probe(linear.mean_C, linear.turn_CD, w, b, spread_K, linear.penalty, (f, g, s))

    best, best_value, waited = linear, _value(linear, z_ND[inner_N], target[inner_N]), 0
    for _ in range(_EPOCHS):
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        for part in order.split(_BATCH):
            _step(solver, weights, z_ND[part], target[part], scale_K)
        tried = now(scale_K)
        if target.kind == "numbers":
            # Residuals of rows that were fitted are too small: take those kept back.
            tried = now(_spread(target.values[inner_N] - _outputs(z_ND[inner_N], tried), 0))
        value = _value(tried, z_ND[inner_N], target[inner_N])
        waited = 0 if value > best_value else waited + 1
        if value > best_value:
            best, best_value = tried, value
        if waited >= _PATIENCE:
            break
    return best


def _step(
    solver: torch.optim.Optimizer,
    weights: list[Tensor],
    z_BD: Tensor,
    target: Target,
    spread_K: Tensor,
) -> None:
    weight, bias, first, inner, second = weights
    with torch.enable_grad():
        out_BK = z_BD @ weight + bias + torch.relu(z_BD @ first + inner) @ second
        loss = -log_likelihood(target, out_BK, spread_K).mean()
        gradients = torch.autograd.grad(loss, weights)
    for held, gradient in zip(weights, gradients, strict=True):
        held.grad = gradient
    solver.step()
