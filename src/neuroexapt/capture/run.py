"""Run a model under observation: on fake tensors, or on copies of the real ones.

The run changes nothing that outlives it: parameters and buffers are replaced by stand-ins
through :func:`torch.func.functional_call`, training flags, random states and the attention
fast-path switch are put back, and the hooks that follow the module calls are global ones
that are removed at the end.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt.capture.attributes import Attribute, attributes_set
from neuroexapt.capture.interrupts import breathe
from neuroexapt.capture.numbers import Number, Watch, attributes_tracked
from neuroexapt.capture.restore import restored
from neuroexapt.capture.source import user_line
from neuroexapt.capture.trace import Call, ModuleRun, TensorRef, Trace, form_of, nested
from neuroexapt.capture.whole import Whole
from neuroexapt.errors import CaptureError

_DEVICE = torch.ops.prim.device.default
# Ids are unique over all runs of a process, so that refs of two runs never meet.
_SERIALS = itertools.count()


class RunFailure(Exception):
    """The forward raised; carries what was recorded until then and where it stood."""

    def __init__(self, cause: Exception, calls: tuple[Call, ...], module: str) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause
        self.calls = calls
        self.module = module


@dataclass
class _Tape:
    """Everything one run writes down."""

    calls: list[Call] = field(default_factory=list)
    runs: list[ModuleRun] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of each module on the stack
    failed_in: str | None = None
    inside: bool = False  # a call written down as a whole: its parts are not
    _known: dict[int, TensorRef] = field(default_factory=dict)
    # A tensor that dies could hand its id to a later one, so all are kept until the end.
    _alive: list[Tensor] = field(default_factory=list)

    def ref(self, tensor: Tensor) -> TensorRef:
        """The ref of this tensor; a tensor whose shape changed in place becomes a new one."""
        known = self._known.get(id(tensor))
        shape = tuple(int(size) for size in tensor.shape)
        if known is not None and known.shape == shape:
            return known
        strides = tensor.stride() if tensor.layout is torch.strided else ()
        ref = TensorRef(next(_SERIALS), shape, tensor.dtype, strides)
        self._known[id(tensor)] = ref
        self._alive.append(tensor)
        return ref

    def alias(self, tensor: Tensor, ref: TensorRef) -> None:
        """Let another tensor object stand for a ref (a parameter held outside the module dict)."""
        self._known[id(tensor)] = ref
        self._alive.append(tensor)

    def whole(self, op: str, overload: str, args: Any, run: Callable[[], Any]) -> Any:
        """Run a function, and write it down as one call."""
        sealed, self.inside = self.seal(pytree.tree_map_only(Number, int, args)), True
        try:
            result = run()
        finally:
            self.inside = False
        outputs = self.refs(result)
        call = Call(op, overload, sealed, {}, outputs, self.module, user_line(), pointwise=False)
        self.calls.append(call)
        return result

    def refs(self, value: Any) -> tuple[TensorRef, ...]:
        return tuple(self.ref(leaf) for leaf in opened(value) if isinstance(leaf, Tensor))

    def seal(self, value: Any) -> Any:
        """The arguments of an operator with each tensor replaced by its ref."""
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self.seal(item) for item in value])
        if isinstance(value, dict):
            return {key: self.seal(item) for key, item in value.items()}
        return value

    def made(self, value: Any) -> tuple[TensorRef, ...]:
        """What an operator returned: tensors, alone or in sequences."""
        if isinstance(value, Tensor):
            return (self.ref(value),)
        if isinstance(value, (tuple, list)):
            return tuple(ref for item in value for ref in self.made(item))
        return ()

    def constants(self, args: Sequence[Any]) -> dict[TensorRef, float]:
        """Numbers that came as tensors; a fake tensor keeps what it was made of."""
        found = {}
        for value in args:
            held = getattr(value, "constant", None)
            if isinstance(held, Tensor) and held.dim() == 0 and not held.is_complex():
                found[self.ref(value)] = float(held)
        return found

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: _Tape, watch: Watch | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tape.inside or func is _DEVICE:  # asked for all the time, and no operator
            return func(*args, **kwargs)
        breathe()
        # Sealed before the call: an in-place operator may change an argument's shape.
        sealed_args, sealed_kwargs = self.tape.seal(args), self.tape.seal(kwargs)
        constants = self.tape.constants(args)
        result = func(*args, **kwargs)
        outputs = self.tape.made(result)
        if outputs:
            namespace, name = func._schema.name.split("::")
            self.tape.calls.append(
                Call(
                    op=f"{namespace}.{name}",
                    overload=func._overloadname,
                    args=tuple(sealed_args),
                    kwargs=sealed_kwargs,
                    outputs=outputs,
                    module=self.tape.module,
                    source=user_line(),
                    pointwise=torch.Tag.pointwise in func.tags,
                    origins=self.watch.origins(args) if self.watch else {},
                    constants=constants,
                )
            )
        return result


def opened(value: Any) -> list[Any]:
    """Leaves of nested containers; dataclasses and objects with a ``__dict__`` are opened too."""
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__") or isinstance(leaf, type):
            leaves.append(leaf)
        elif not isinstance(leaf, nn.Module) and not callable(leaf):
            leaves.extend(pytree.tree_leaves(list(vars(leaf).values())))
    return leaves


@contextlib.contextmanager
def _follow_modules(model: nn.Module, tape: _Tape) -> Iterator[None]:
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        tape.stack.append(paths.get(id(module), tape.module))
        tape.starts.append(len(tape.calls))

    # While an exception unwinds, torch leaves the keyword inputs out.
    def leave(module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        *kwargs, output = kwargs_and_output
        path, start = tape.stack.pop(), tape.starts.pop()
        # An `always_call` hook also runs while an exception unwinds; the output is then None.
        if output is None and tape.failed_in is None:
            tape.failed_in = path
        if id(module) in paths:
            takes = form_of(args[0]) if args else "nothing"
            inputs, outputs = tape.refs((args, kwargs)), tape.refs(output)
            forms = takes, form_of(output), start, len(tape.calls)
            held = (nested(v, tape.ref) for v in (args, kwargs[0] if kwargs else {}, output))
            tape.runs.append(ModuleRun(path, inputs, outputs, *forms, *held))

    handles = [
        torch_module.register_module_forward_pre_hook(enter),
        torch_module.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
            # Removing the handle leaves this entry behind.
            torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have; tied tensors appear several times."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy of the given shape: old values where they fit, zeros elsewhere."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor.detach().clone()
    new = tensor.detach().new_zeros(tuple(shape))
    common = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new[common] = tensor.detach()[common]
    return new


def _fake_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor without data; dimensions in memory order, which some operators go by."""
    shape = tuple(shape)
    kind: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    if tensor.layout != torch.strided:
        return torch.empty(shape, **kind)
    if shape == tuple(tensor.shape):
        return torch.empty_strided(shape, tensor.stride(), **kind)
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    return torch.empty_permuted(shape, order, **kind)


def _stand_ins(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], fake: bool
) -> dict[str, Tensor]:
    made: dict[int, Tensor] = {}
    result, make = {}, _fake_like if fake else _resized
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor, shapes.get(name, tensor.shape))
        result[name] = made[id(tensor)]
    return result


def _run(
    model: nn.Module,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    training: bool,
    fake: bool,
    track: bool,
) -> Trace:
    tape = _Tape()
    watch = Watch(tape.ref) if track else None
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with restored(model, training), torch.no_grad(), mode:
        stand_ins = _stand_ins(model, shapes, fake)
        refs = {name: tape.ref(tensor) for name, tensor in stand_ins.items()}
        for name, tensor in named_tensors(model).items():
            if refs[name].shape == tuple(tensor.shape):
                tape.alias(tensor, refs[name])
        make = _fake_like if fake else _resized
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: make(t, t.shape), example)
        inputs = tape.refs((args, kwargs))
        try:
            with contextlib.ExitStack() as modes:
                modes.enter_context(_follow_modules(model, tape))
                modes.enter_context(_Recorder(tape, watch))
                modes.enter_context(Whole(tape.whole, fake=fake))
                if watch is not None:
                    modes.enter_context(attributes_tracked(model))
                    modes.enter_context(watch)
                result = functional_call(model, stand_ins, args, dict(kwargs), strict=False)
        except Exception as cause:
            raise RunFailure(cause, tuple(tape.calls), tape.failed_in or "") from cause
        outputs = tape.refs(result)
    return Trace(
        tuple(tape.calls), refs, inputs, outputs, tuple(tape.runs), training=training, fake=fake
    )


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    attributes: Mapping[Attribute, Any] | None = None,
    training: bool = False,
    track: bool = False,
) -> Trace:
    """Run ``model(*args, **kwargs)`` once and return every operator call.

    Runs on fake tensors (no memory, no weights read); where these refuse, on copies of the
    real ones. The model, its buffers, gradients, flags and all random states are as before.

    Args:
        model: any module; nothing of it is rewritten.
        args: positional example input.
        kwargs: keyword example input.
        shapes: parameters or buffers that the run shall see with another shape.
        attributes: module attributes to hold for the duration of the run.
        training: run with every module in training mode, else all in evaluation mode.
        track: let Python numbers remember their origin (``Call.origins``).

    Raises:
        RunFailure: the forward raised, on fake and on real tensors.

    Example:
        >>> trace = capture(nn.Linear(3, 2), (torch.zeros(4, 3),))
        >>> [call.op for call in trace.calls], trace.outputs[0].shape
        (['aten.t', 'aten.addmm'], (4, 2))
    """
    example = (tuple(args), dict(kwargs or {}))
    ways = [(True, track), (True, False), (False, track), (False, False)]
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        ways = ways[:2]
    furthest: RunFailure | None = None
    with attributes_set(model, attributes or {}):
        # Code that looks at the very type of a number runs untracked.
        for fake, tracked in dict.fromkeys(ways):
            try:
                return _run(model, example, shapes or {}, training, fake, tracked)
            except RunFailure as failure:
                # Fake tensors may stop at a number read from data, before what is wrong is met.
                if furthest is None or len(failure.calls) > len(furthest.calls):
                    furthest = failure
    assert furthest is not None
    raise furthest from furthest.cause


def capture_both(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    track: bool = True,
) -> tuple[Trace, ...]:
    """The run in evaluation mode and the run in training mode, those that go through.

    A model may take other paths while it trains (auxiliary heads), so both are needed; one
    that runs in only one of them (batch normalisation refuses a batch of one value per
    channel in training mode) is still understood from the other. ``track`` as in
    :func:`capture`.

    Raises:
        CaptureError: neither run went through.
    """
    _refuse_scripted(model)
    _refuse_lazy(model)
    traces: list[Trace] = []
    failures: list[RunFailure] = []
    for training in (False, True):
        try:
            traces.append(capture(model, args, kwargs, training=training, track=track))
        except RunFailure as failure:
            failures.append(failure)
    if not traces:
        raise _explain(model, args, failures[0]) from failures[0].cause
    return tuple(traces)


def _refuse_scripted(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            type(model).__name__,
            seen="a scripted or traced model",
            needed="the module that it was made from",
            next_step="change that one, then script or trace it again",
        )


def _refuse_lazy(model: nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor):
            raise CaptureError(
                name,
                seen="a lazy parameter without a shape",
                needed="a model that has run once",
                next_step="call model(*args) once, then try again",
            )


def _explain(model: nn.Module, args: tuple[Any, ...], failure: RunFailure) -> CaptureError:
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
    where = f"module '{failure.module}'" if failure.module else type(model).__name__
    return CaptureError(
        where,
        seen=f"{failure} on example input of shapes {shapes}",
        needed="a forward that runs on the example input",
        next_step="call model(*args, **kwargs) yourself with the same input and fix what it "
        "reports; the model is untouched",
    )
