"""Run every law on an edit, over a table of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.couple import AxisMap, map_axes
from neuroexapt.edit import Edit, Patch
from neuroexapt.errors import EditError, VerifyError
from neuroexapt.guard import transaction
from neuroexapt.testing import laws
from neuroexapt.testing.laws import BrokenLaw
from neuroexapt.testing.models import Row, default_models
from neuroexapt.testing.world import World, world

Choice = Callable[[AxisMap, nn.Module], Iterable[Edit]]


@dataclass(frozen=True)
class Cell:
    """What came of one edit on one model.

    Attributes:
        model: name of the row.
        edit: the edit that was made, or the first that was refused.
        kept: whether it was made and kept every law; else it was refused.
        reason: the promise it kept, or the error that refused it.
        differences: largest relative difference of the outputs where a promise speaks of it, in
            double and in single precision.
        seconds: time for all of it.
    """

    model: str
    edit: Edit
    kept: bool
    reason: str
    differences: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0

    def __str__(self) -> str:
        verdict = "kept its promise" if self.kept else "refused"
        return f"{self.model}: {self.edit}: {verdict}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """The cells of one edit over all models, in the order of the rows."""

    cells: tuple[Cell, ...]

    @property
    def kept(self) -> tuple[Cell, ...]:
        """Cells in which the edit was made and kept every law."""
        return tuple(cell for cell in self.cells if cell.kept)

    @property
    def refused(self) -> tuple[Cell, ...]:
        """Cells in which it was refused, each with the reason."""
        return tuple(cell for cell in self.cells if not cell.kept)

    def __str__(self) -> str:
        return "\n".join(map(str, self.cells))


def check_edit(
    edit: Edit | type[Edit] | Choice,
    models: Sequence[Row] | None = None,
    *,
    places: int = 1,
    compiled: bool = False,
) -> Report:
    """Run every law on an edit, on each model; the first law that is broken is raised.

    The laws: planning writes nothing; a promise holds in float64 (1e-10) and float32 (1e-5);
    undo restores every bit, also when it is interrupted; what survives keeps identity, name, kind,
    ties and memory format; the optimizer holds exactly what is live; deepcopy, pickle and state
    dict keep the function; five steps of training go well and what is new learns; hooks fire.

    Args:
        edit: an edit; a subclass whose first field is the place and whose others have defaults,
            tried at every width and every module; or a function from a map and a model to
            edits, in the order of preference.
        models: rows to try it on; five small models by default.
        places: at how many places of a model to make it, spread over those that take it.
        compiled: also follow the edited model with ``torch.compile``, which takes seconds.

    Returns:
        A cell for each model: the promise was kept, or the edit was refused, and why.

    Raises:
        BrokenLaw: a law is broken, or no model takes the edit at all.

    Example:
        >>> from neuroexapt import Narrow
        >>> report = check_edit(lambda axes, model: [Narrow(name, by=1) for name in axes.widths])
        >>> print(len(report.kept), report.kept[0].model, report.kept[0].reason)
        5 mlp approximate
    """
    rows = default_models() if models is None else models
    cells = tuple(check_cell(edit, row, places=places, compiled=compiled) for row in rows)
    if not any(cell.kept for cell in cells):
        seen = "; ".join(f"{cell.model}: {cell.reason}" for cell in cells)
        raise BrokenLaw("some model takes the edit", "all models", edit, seen)
    return Report(cells)


def check_cell(
    edit: Edit | type[Edit] | Choice,
    row: Row,
    *,
    maps: Callable[[torch.dtype], AxisMap] | None = None,
    places: int = 1,
    compiled: bool = False,
) -> Cell:
    """Run every law on an edit on one model; see :func:`check_edit`.

    Args:
        edit: as there.
        row: the model.
        maps: its map in a dtype, if the caller has it already.
        places: as there.
        compiled: as there.

    Raises:
        BrokenLaw: the first law that is broken.
    """
    started = time.perf_counter()
    maps = maps or partial(_mapped, row)
    axes = maps(torch.float32)
    single = world(row, axes)
    taken, refusals = _planned(single, _candidates(edit, axes, single.model), places)
    if not taken:
        first, error = refusals[0]
        return Cell(row.name, first, False, str(error), seconds=time.perf_counter() - started)
    single_gaps = [_made(row, axes, *pair, compiled) for pair in taken]
    wide = maps(torch.float64)
    worst = max(_double(row, wide, made) for made, _ in taken), max(single_gaps)
    made, patch = taken[0]
    return Cell(row.name, made, True, patch.preserves, worst, time.perf_counter() - started)


def _mapped(row: Row, dtype: torch.dtype) -> AxisMap:
    return map_axes(row.build(dtype), *row.inputs(dtype))


def _candidates(edit: Edit | type[Edit] | Choice, axes: AxisMap, model: nn.Module) -> list[Edit]:
    if isinstance(edit, Edit):
        return [edit]
    if isinstance(edit, type):
        places = [*(path for path in axes.modules if path), *axes.widths, ""]
        return [edit(place) for place in places]
    found = list(edit(axes, model))
    if not found:
        raise BrokenLaw("every cell has an edit", type(model).__name__, edit, "no edit was given")
    return found


def _planned(
    single: World, candidates: Sequence[Edit], places: int
) -> tuple[list[tuple[Edit, Patch]], list[tuple[Edit, EditError]]]:
    """The edits that can be made, with their patches, and the refusals."""
    taken, refused = [], []
    for edit in candidates:
        problems = edit.check(single.axes)
        try:
            patch = edit.plan(single.axes, named_tensors(single.model))
        except EditError as error:
            refused.append((edit, error))
            continue
        if problems:
            seen = f"check says: {problems[0]}"
            raise BrokenLaw("plan refuses what check refuses", single.row.name, edit, seen)
        if patch.preserves not in laws.PROMISES:
            seen = f"preserves={patch.preserves!r}, not one of {laws.PROMISES}"
            raise BrokenLaw("a patch makes a promise", single.row.name, edit, seen)
        taken.append((edit, patch))
        if places == 1:
            break
    count = min(max(1, places), len(taken))
    return [taken[index * len(taken) // count] for index in range(count)], refused


def _made(row: Row, axes: AxisMap, edit: Edit, patch: Patch, compiled: bool) -> float:
    """All laws at one place, in single precision; the largest difference."""
    single = world(row, axes)
    old = laws.before(single)
    try:
        laws.check_undo(single, edit, patch)
        with transaction(single.model, single.optimizer) as tx:
            tx.apply(edit, single.args, single.kwargs, axes=axes)
    except VerifyError as error:
        raise BrokenLaw("what is planned can be made", row.name, edit, str(error)) from error
    gap = laws.check_promise(single, edit, patch, old)
    laws.check_survivors(single, edit, patch, old)
    laws.check_optimizer(single, edit, old)
    laws.check_copies(single, edit, _staged(row, axes, edit).model)
    if compiled:
        laws.check_compile(single, edit)
    laws.check_training(single, edit, old)
    return gap


def _staged(row: Row, axes: AxisMap, edit: Edit) -> World:
    """The edit on a fresh model, written without the library's own verification."""
    made = world(row, axes)
    with transaction(made.model, made.optimizer) as tx:
        tx.stage(edit.plan(axes, named_tensors(made.model)))
    return made


def _double(row: Row, axes: AxisMap, edit: Edit) -> float:
    """The promise in double precision, where rounding is no excuse."""
    made = world(row, axes, torch.float64)
    old = laws.before(made)
    patch = edit.plan(axes, named_tensors(made.model))
    with transaction(made.model, made.optimizer) as tx:
        tx.stage(patch)
    return laws.check_promise(made, edit, patch, old)
