"""What is left of a removed layer: a module that answers in its place, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture import ModuleRun, TensorRef
from neuroexapt.capture.flow import Flow
from neuroexapt.couple import AxisMap
from neuroexapt.edit.branches import Spec
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Given:
    """What a module was given as the positional argument, or the keyword argument, ``at``.

    ``fresh`` asks for a copy, because the model writes into one of both later on.
    """

    at: int | str
    fresh: bool = False


@dataclass(frozen=True)
class Nothing:
    """Zeros, in the shape of what a module was given at ``at``."""

    at: int | str


@dataclass(frozen=True, kw_only=True)
class PassSpec(Spec):
    """An answer made of a module's arguments.

    Attributes:
        answer: :class:`Given`, :class:`Nothing` or a plain value, nested as the module's own.
    """

    answer: Any

    def make(self, model: nn.Module) -> nn.Module:
        """A module without parameters."""
        return Passage(self.answer)


class Passage(nn.Module):
    """Answers with its arguments.

    Args:
        answer: see :class:`PassSpec`.

    Example:
        >>> x = torch.ones(2)
        >>> Passage((Given(0), None))(x, mask=None)
        (tensor([1., 1.]), None)
    """

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer for these arguments."""
        return _filled(self.answer, args, kwargs)

    def extra_repr(self) -> str:
        return repr(self.answer)


def _filled(answer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(answer, (Given, Nothing)):
        value = args[answer.at] if isinstance(answer.at, int) else kwargs[answer.at]
        if isinstance(answer, Nothing):
            return torch.zeros_like(value)
        return value.clone() if answer.fresh and isinstance(value, Tensor) else value
    if isinstance(answer, (tuple, list)):
        return type(answer)([_filled(item, args, kwargs) for item in answer])
    if isinstance(answer, dict):
        return {key: _filled(item, args, kwargs) for key, item in answer.items()}
    return answer


def passage_of(axes: AxisMap, path: str, *, absorbed: bool = False) -> PassSpec:
    """What can answer in a module's place, the same in every run of it.

    Where its effect is ``absorbed`` elsewhere it is the input, of whatever shape.

    Raises:
        EditError: nothing can: the shape changes, or later layers need what only it makes.
    """
    answers: list[Any] = []
    for trace in axes.traces:
        flow = Flow(trace)
        for run in trace.runs:
            if run.path == path:
                answer = _answer(axes, flow, run, absorbed)
                if answer not in answers:
                    answers.append(answer)
    if len(answers) != 1:
        raise EditError(
            path,
            seen=f"{len(answers)} calls of it that would have to be answered in different ways",
            needed="one way to pass the input that fits all calls",
            next_step="remove a module that holds it, or one inside it",
        )
    return PassSpec(answer=answers[0])


def _answer(axes: AxisMap, flow: Flow, run: ModuleRun, absorbed: bool) -> Any:
    out = next((ref for ref in _refs(run.result) if ref.dtype.is_floating_point), None)
    if out is None:
        raise _no_answer(run, f"{_kinds(run.result)} as output", "a floating-point tensor")
    given = _given(run)
    alike = [ref for ref in given if _alike(ref, out)] or [*given][: int(absorbed)]
    if not alike:
        shapes = ", ".join(str(ref.shape) for ref in given) or "no tensor"
        raise _no_answer(
            run, f"input {shapes}, output {out.shape}", "an input in the shape of the output"
        )
    # What was fitted to data was fitted with the first one.
    entry = alike[0] if absorbed else _nearest(flow, run, alike, out)
    main: Given | Nothing = Given(given[entry], flow.rewrites((entry, out), run.stop))
    if not absorbed and _is_branch_of_stream(axes, flow, run, entry, out):
        main = Nothing(given[entry])

    def leaf(value: Any) -> Any:
        if not isinstance(value, TensorRef):
            return value
        if value == out:
            return main
        if value in given:
            return Given(given[value])
        if flow.is_used(value, run.stop):
            raise _no_answer(
                run,
                f"a second output of shape {value.shape} that other layers read",
                "outputs besides the first that nothing reads, or that are inputs",
            )
        return None

    return _mapped(run.result, leaf)


def _nearest(flow: Flow, run: ModuleRun, entries: Sequence[TensorRef], out: TensorRef) -> TensorRef:
    """The input that the output is nearest to: a stream rather than what is added to it."""
    inside = range(run.start, run.stop)
    away = {ref: flow.distance(ref, out, inside) for ref in entries}
    known = {ref: steps for ref, steps in away.items() if steps is not None}
    return min(known, key=lambda ref: known[ref]) if known else entries[0]


def _is_branch_of_stream(
    axes: AxisMap, flow: Flow, run: ModuleRun, entry: TensorRef, out: TensorRef
) -> bool:
    """Whether a module is the whole of what is added to a stream, and not a part of it."""
    if out in run.inputs or not _holds_matrix(axes, run.path):
        return False
    stream = flow.stream(run, entry, out)
    return stream is not None and flow.distance(stream, entry, range(run.start)) == 0


def _holds_matrix(axes: AxisMap, path: str) -> bool:
    names = (name for name in axes.parameters if name.startswith(f"{path}."))
    return any(len(axes.tensors[name]) > 1 for name in names)


def held(axes: AxisMap, path: str) -> list[str]:
    """Names of the parameters and buffers of a module and its parts."""
    return [name for name in axes.tensors if name.startswith(f"{path}.")]


def _alike(ref: TensorRef, out: TensorRef) -> bool:
    return ref.shape == out.shape and ref.dtype == out.dtype


def _given(run: ModuleRun) -> dict[TensorRef, int | str]:
    """Each tensor that was an argument by itself, and the first place where it was given."""
    found: dict[TensorRef, int | str] = {}
    items: list[tuple[int | str, Any]] = [*enumerate(run.args), *run.kwargs.items()]
    for at, value in items:
        if isinstance(value, TensorRef):
            found.setdefault(value, at)
    return found


def _refs(value: Any) -> Iterator[TensorRef]:
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))


def _mapped(value: Any, leaf: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(item, leaf) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(item, leaf) for key, item in value.items()}
    return leaf(value)


def _kinds(value: Any) -> str:
    return getattr(value, "kind", type(value).__name__)


def _no_answer(run: ModuleRun, seen: str, needed: str) -> EditError:
    return EditError(
        run.path,
        seen=seen,
        needed=needed,
        next_step="choose a module that keeps its input's shape",
    )
