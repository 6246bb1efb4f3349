"""The frozen records of one run: tensors, operator calls, module calls."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from neuroexapt.capture.attributes import Attribute


@dataclass(frozen=True)
class TensorRef:
    """A tensor met during the run. Two refs are the same tensor exactly if their ids agree.

    ``strides`` is empty where the tensor is not laid out by strides.
    """

    id: int
    shape: tuple[int, ...] = field(compare=False)
    dtype: torch.dtype = field(compare=False)
    strides: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class OfAttribute:
    """The value of an attribute."""

    at: Attribute
    value: int


@dataclass(frozen=True)
class OfSize:
    """The size of one dimension of a tensor."""

    ref: TensorRef
    dim: int


@dataclass(frozen=True)
class Combined:
    """``left sign right``, the sign one of ``+ - * //``."""

    sign: str
    left: Origin
    right: Origin


Origin: TypeAlias = OfAttribute | OfSize | Combined | int
# Where in a call's arguments a number stands: (argument,) or (argument, place in its list).
Place: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A line of the user's code.

    Example:
        >>> Source("model.py", 42).place
        'model.py:42'
    """

    file: str
    line: int

    @property
    def place(self) -> str:
        """File name and line number, as an editor understands them."""
        return f"{Path(self.file).name}:{self.line}"

    @property
    def code(self) -> str:
        """The text of the line; empty when the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.place} {self.code}".rstrip()


@dataclass(frozen=True)
class Call:
    """One ATen operator call.

    ``args`` and ``kwargs`` are the call's own with every tensor replaced by its
    :class:`TensorRef`; ``outputs`` are the tensors it returned, flat and in order.
    ``op`` is the operator without its overload (``aten.add``), ``overload`` the rest.
    ``origins`` says of numbers among ``args`` (by argument, and place in its list) from which
    attribute or size user code made them; ``constants`` are the values of tensors among the
    arguments that were made of a single number (``torch.tensor(2.0)``).
    """

    op: str
    overload: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[TensorRef, ...]
    module: str
    source: Source | None
    pointwise: bool
    origins: Mapping[Place, Origin] = field(default_factory=dict)
    constants: Mapping[TensorRef, float] = field(default_factory=dict)

    @functools.cached_property
    def inputs(self) -> tuple[TensorRef, ...]:
        """Every tensor argument, in order, lists included."""
        return tuple(refs_in((self.args, tuple(self.kwargs.values()))))

    @property
    def place(self) -> str:
        """Where a reader should look: the source line, else the module path."""
        return str(self.source) if self.source else (self.module or "the model itself")


@dataclass(frozen=True)
class Opaque:
    """What a module was given or returned that is no tensor, container or plain value."""

    kind: str


@dataclass(frozen=True)
class ModuleRun:
    """One call of a module: the tensors that went in and the tensors that came out.

    ``takes`` and ``gives`` say what the first positional input and the output are: a
    ``"tensor"``, a ``"tuple"`` that begins with one, ``"nothing"``, or the class of what it is.
    The operator calls from ``start`` to ``stop`` of the trace were made meanwhile.
    ``args``, ``kwargs`` and ``result`` hold what was given and returned as it was nested.
    """

    path: str
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    takes: str = "tensor"
    gives: str = "tensor"
    start: int = 0
    stop: int = 0
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None


@dataclass(frozen=True)
class Trace:
    """One forward run.

    Attributes:
        calls: operator calls in order of execution.
        tensors: parameter and buffer names to their refs; tied names share a ref.
        inputs: the tensors of the example input.
        outputs: the tensors the model returned.
        runs: module calls in order of completion.
        training: whether the modules were in training mode.
        fake: whether the run used tensors without data.
    """

    calls: tuple[Call, ...]
    tensors: Mapping[str, TensorRef]
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    runs: tuple[ModuleRun, ...]
    training: bool
    fake: bool


def form_of(value: Any) -> str:
    """What a module takes or gives: a tensor, a tuple that begins with one, or its class.

    Example:
        >>> form_of((torch.zeros(1), None)), form_of({})
        ('tuple', 'dict')
    """
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return "tuple"
    return type(value).__name__


def refs_in(value: Any) -> Iterator[TensorRef]:
    """Every :class:`TensorRef` inside nested tuples, lists and dicts, in order.

    Example:
        >>> a, b = (TensorRef(i, (2,), torch.float32) for i in range(2))
        >>> [ref.id for ref in refs_in((a, [3, {"x": b}]))]
        [0, 1]
    """
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from refs_in(item)


def same_computation(traces: Sequence[Trace]) -> bool:
    """Whether several runs of one model made the same calls on the same tensors.

    Then the model does in training mode what it does in evaluation mode: it has no batch norm and
    no dropout that is not zero.
    """
    first, *others = traces
    operators = [call.op for call in first.calls]
    if any([call.op for call in other.calls] != operators for other in others):
        return False
    return all(_numbered(other) == _numbered(first) for other in others)


def _numbered(trace: Trace) -> Any:
    """What a run computed, each tensor by the order in which it was met."""
    known: dict[TensorRef, int] = {}

    def number(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return known.setdefault(value, len(known)), value.shape, value.dtype
        if isinstance(value, (tuple, list)):
            return [number(item) for item in value]
        if isinstance(value, Mapping):
            return [(key, number(item)) for key, item in value.items()]
        return value

    begin = number([*trace.tensors.items(), *trace.inputs])
    calls = [number([c.op, c.overload, c.args, c.kwargs, c.outputs]) for c in trace.calls]
    return begin, calls, number(trace.outputs), trace.fake


def nested(value: Any, ref: Callable[[torch.Tensor], TensorRef]) -> Any:
    """What a module was given or returned, with a ref in place of each tensor.

    Example:
        >>> a = TensorRef(0, (1,), torch.float32)
        >>> nested((torch.zeros(1), {"mask": None, "cache": object()}), lambda tensor: a)[1]
        {'mask': None, 'cache': Opaque(kind='object')}
    """
    if isinstance(value, torch.Tensor):
        return ref(value)
    if type(value) in (tuple, list):
        return type(value)([nested(item, ref) for item in value])
    if type(value) is dict:
        return {key: nested(item, ref) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # one that remembers its origin would keep the run alive
    return (
        value if isinstance(value, (type(None), bool, float, str)) else Opaque(type(value).__name__)
    )
