"""What one case says: every stage timed, every failure classed."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.coverage import oracle, rivals
from benchmarks.coverage.case import Case
from benchmarks.coverage.outputs import (
    SEED,
    Args,
    Kwargs,
    changed,
    difference,
    fingerprint,
    run,
    shapes,
    train_step,
)
from benchmarks.coverage.result import GONE, STAGES, Result, Stage
from torch import nn

from neuroexapt import AxisMap, Narrow, NeuroExaptError, Widen, map_axes, transaction
from neuroexapt.couple import leaves
from neuroexapt.errors import VerifyError

Notify = Callable[[str, Result], None]
EXACT = 1e-5
# Seconds a map may take to be timed three times.
SLOW = 1.0


@dataclass
class Bench:
    """A case in work: the model as built, never edited nor run itself."""

    case: Case
    model: nn.Module
    args: Args
    kwargs: dict[str, Any]
    result: Result
    axes: AxisMap | None = None

    def fresh(self) -> nn.Module:
        """The same model once more; made rather than copied, since not all can be copied."""
        return _made(self.case)


class Wrong(Exception):
    """The library did something wrong; the message says what."""


class TakenBack(Exception):
    """The library promised in advance what its own check then found untrue."""


class Refused(Exception):
    """A rival said in advance that it does not do this model."""


class Little(Exception):
    """The edit was made and is of little use; the message says why."""


def check(case: Case, notify: Notify = lambda stage, result: None, *, timings: int = 3) -> Result:
    """Put a case through all stages, in this process.

    Args:
        case: of the zoo.
        notify: hears of each stage as it begins.
        timings: maps made for the time alone.
    """
    result = Result(case.name)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    notify("build", result)
    bench: list[Bench] = []
    built = _timed(lambda: bench.append(_build(case, result)))
    if not bench:
        result.stages["build"] = built
        return result
    stages: dict[str, Callable[[Bench], str]] = {
        "map": partial(_map, timings),
        "alone": _alone,
        "narrow": _narrow,
        "widen": _widen,
        "permutation": _permutation,
        "silent": _silent,
    }
    for name, stage in stages.items():
        notify(name, result)
        if name in STAGES[2:] and bench[0].axes is None:
            result.stages[name] = Stage("skipped", "no map")
        else:
            result.stages[name] = _timed(partial(stage, bench[0]))
    return result


def check_rival(case: Case, name: str) -> Stage:
    """One rival on the same model and inputs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bench = _build(case, Result(case.name))
    return _timed(partial(_rival, rivals.installed()[name], bench))


def _timed(work: Callable[[], str | None]) -> Stage:
    started = time.perf_counter()
    status, reason = "ok", ""
    try:
        reason = work() or ""
    except (VerifyError, TakenBack) as error:
        status, reason = "taken back", str(error)
    except NeuroExaptError as error:
        status, reason = "refused", f"{type(error).__name__}: {error}"
    except Refused as error:
        status, reason = "refused", str(error)
    except Wrong as error:
        status, reason = "wrong", str(error)
    except Little as error:
        status, reason = "little", str(error)
    except Exception as error:  # the point of the benchmark: whatever happens is counted
        status, reason = "crash", f"{type(error).__name__}: {error}{_where(error)}"
    return Stage(status, reason[:600], time.perf_counter() - started)


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" ({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"


def _made(case: Case) -> nn.Module:
    """The model with weights as if it had trained: nothing is all ones or zeros, as norms begin.

    A scale of ones and a shift of zeros would hide what an edit does to them.
    """
    torch.manual_seed(SEED)
    model = case.make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.mean()).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _build(case: Case, result: Result) -> Bench:
    model = _made(case)
    args, kwargs = case.inputs()
    result.facts["parameters"] = sum(p.numel() for p in model.parameters())
    return Bench(case, model, args, kwargs, result)


def _alone(bench: Bench) -> str:
    """The model itself, after the map: made first, a map may not spoil what a forward caches."""
    alone = bench.fresh()
    run(alone, bench.args, bench.kwargs)
    train_step(alone, bench.args, bench.kwargs, torch.optim.AdamW(alone.parameters(), lr=1e-3))
    return ""


def _map(timings: int, bench: Bench) -> str:
    before = fingerprint(bench.model)
    bench.axes = _untouched(bench.model, before, bench)
    # The first map above paid for imports; a slow model is timed once.
    seconds = [_map_seconds(bench)] if timings else []
    if seconds and seconds[0] < SLOW:
        seconds += [_map_seconds(bench) for _ in range(timings - 1)]
    axes, facts = bench.axes, bench.result.facts
    if seconds:
        facts["map_seconds"] = statistics.median(seconds)
    facts["widths"] = len(axes.widths)
    facts["share"] = _share(bench.model, axes)
    bench.result.unknown = sorted(axes.unknown)
    for pin in axes.pinned.values():
        reason = pin.reason[:120]
        bench.result.pins[reason] = bench.result.pins.get(reason, 0) + 1
    return "; ".join(axes.notes)


def _map_seconds(bench: Bench) -> float:
    """Processor time, which other work on the machine does not change; there is one thread."""
    started = time.process_time()
    map_axes(bench.model, bench.args, bench.kwargs)
    return time.process_time() - started


def _untouched(model: nn.Module, before: dict[str, Any], bench: Bench) -> AxisMap:
    try:
        return map_axes(model, bench.args, bench.kwargs)
    finally:
        _check_untouched(model, before)


def _check_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    names = changed(model, before)
    if names:
        raise Wrong(f"a model that should be untouched changed at {names[:3]}")


def _share(model: nn.Module, axes: AxisMap) -> float:
    total = able = 0
    for name, parameter in model.named_parameters():
        names = {leaf.name for expr in axes.tensors[name] for leaf in leaves(expr)}
        total += parameter.numel()
        able += parameter.numel() * bool(names & axes.widths.keys())
    return able / max(1, total)


def _narrow(bench: Bench) -> str:
    """A quarter off every width of a model in training, then the same shapes and a step."""
    model, args, kwargs = bench.fresh(), bench.args, bench.kwargs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, args, kwargs, optimizer)
    shapes_before = [shapes(model, args, kwargs, training=mode) for mode in (False, True)]
    before = fingerprint(model)
    try:
        with transaction(model, optimizer) as tx:
            done = tx.apply(Narrow("*", by=0.25), args, kwargs, axes=bench.axes)
    except NeuroExaptError:
        _check_untouched(model, before)
        raise
    bench.result.facts["narrowed"] = done.parameters_after
    if [shapes(model, args, kwargs, training=mode) for mode in (False, True)] != shapes_before:
        raise Wrong("narrowing changed the shape of an output")
    train_step(model, args, kwargs, optimizer)
    gone = 1 - done.parameters_after / done.parameters_before
    if gone < GONE:
        raise Little(f"only {gone:.1%} of the parameters gone")
    return ""


def _widen(bench: Bench) -> str:
    """All widths at once, else each by itself; the difference is measured here once more."""
    facts = bench.result.facts
    refusal = _widened(bench, "*")
    if refusal is None:
        facts["widened"] = facts["widths"]
        return ""
    assert bench.axes is not None
    refused = {name: _widened(bench, name) for name in bench.axes.widths}
    reasons = [reason for reason in refused.values() if reason is not None]
    facts["widened"] = len(refused) - len(reasons)
    return f"'*' refused: {refusal}; by themselves {len(reasons)} of {len(refused)} refused"


def _widened(bench: Bench, at: str) -> str | None:
    """None if exact, else the reason of a refusal made in advance."""
    model, args, kwargs = bench.fresh(), bench.args, bench.kwargs
    outputs = run(model, args, kwargs)
    before = fingerprint(model)
    try:
        with transaction(model) as tx:
            tx.apply(Widen(at, by=0.25), args, kwargs, axes=bench.axes)
    except VerifyError as error:
        _check_untouched(model, before)
        raise TakenBack(f"{at}: {error}") from error
    except NeuroExaptError as error:
        _check_untouched(model, before)
        return f"{error.place}: {error.seen}"
    gap = difference(run(model, args, kwargs), outputs)
    if gap > EXACT:
        raise Wrong(f"{at} widened with a relative difference of {gap:.1e}")
    return None


def _permutation(bench: Bench) -> str:
    return _verdict(bench, oracle.permutation)


def _silent(bench: Bench) -> str:
    return _verdict(bench, oracle.silent_units)


def _rival(rival: rivals.Rival, bench: Bench) -> str:
    """A rival gets a fresh copy and the same questions about what comes out."""
    model, args, kwargs = bench.fresh(), bench.args, bench.kwargs
    shapes_before = [shapes(model, args, kwargs, training=mode) for mode in (False, True)]
    before = sum(p.numel() for p in model.parameters())
    try:
        # Another copy: a forward may leave hooks behind, which some rivals refuse.
        model = rival(bench.fresh(), args, kwargs)
    except rivals.Refusal as error:
        raise Refused(str(error)) from error
    if [shapes(model, args, kwargs, training=mode) for mode in (False, True)] != shapes_before:
        raise Wrong("pruning changed the shape of an output")
    train_step(model, args, kwargs, torch.optim.AdamW(model.parameters(), lr=1e-3))
    gone = 1 - sum(p.numel() for p in model.parameters()) / before
    if gone < GONE:
        raise Little(f"only {gone:.1%} of the parameters gone")
    return f"{gone:.0%} of the parameters gone"


def _verdict(
    bench: Bench, judge: Callable[[oracle.Make, AxisMap, Args, Kwargs], oracle.Verdict]
) -> str:
    assert bench.axes is not None
    verdict = judge(bench.fresh, bench.axes, bench.args, bench.kwargs)
    if verdict.wrong:
        listed = "; ".join(f"{name}: {text}" for name, text in list(verdict.wrong.items())[:4])
        raise Wrong(f"{len(verdict.wrong)} of {verdict.checked} widths: {listed}")
    return f"{verdict.checked} widths"
