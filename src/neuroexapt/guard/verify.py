"""Is the edited model still a model, and does it keep the promise the edit made?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt.capture import Trace
from neuroexapt.capture.masks import mask_of
from neuroexapt.capture.restore import restored
from neuroexapt.capture.run import capture_both, opened
from neuroexapt.capture.trace import same_computation
from neuroexapt.edit import Patch
from neuroexapt.errors import CaptureError, VerifyError

# Outputs smaller than this count as zero: nothing relative can be said of them.
_FAINT = 1e-12
# Two orders of summation differ by a few roundings of every parameter.
_NOISE = 10
# Largest relative difference of outputs that still counts as the same function.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class WithoutChance(TorchDispatchMode):
    """Random operators return their mean, so that two models can be compared in training mode.

    Dropout keeps everything; noise is zero, a uniform draw one half.
    """

    _MEANS: ClassVar = {
        "aten::rand_like": 0.5,
        "aten::rand": 0.5,
        "aten::randn_like": 0.0,
        "aten::randn": 0.0,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::bernoulli_" and not isinstance(_second(args, kwargs), Tensor):
            return args[0].fill_(_second(args, kwargs))
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        return result.fill_(self._MEANS[name]) if name in self._MEANS else result


def _second(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("p", 0.5)


@dataclass(frozen=True)
class Behaviour:
    """What a model does on one batch.

    Attributes:
        outputs: floating-point outputs in evaluation and (if it runs there) training mode.
        shapes: shapes of all outputs.
        identities: parameter and buffer names to object ids (tied names share one).
        kinds: names to dtype and device.
        graph: outputs in the last mode through which a backward can go, where one was asked for.
    """

    outputs: Mapping[bool, tuple[Tensor, ...]]
    shapes: Mapping[bool, tuple[tuple[int, ...], ...]]
    identities: Mapping[str, int]
    kinds: Mapping[str, tuple[torch.dtype, torch.device]]
    graph: tuple[Tensor, ...] = ()


def behaviour(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    modes: tuple[bool, ...],
    *,
    once: bool = False,
    leaves: Mapping[str, Tensor] | None = None,
) -> Behaviour:
    """Run the real model in the given modes; buffers, flags and random states are untouched.

    Args:
        model: the model.
        args: positional example input.
        kwargs: keyword example input.
        modes: training or not.
        once: it computes the same in all modes, so that one run tells of all.
        leaves: stand-ins for its parameters that the graph of the run in the last mode leads to.
    """
    outputs, shapes = {}, {}
    graph: tuple[Tensor, ...] = ()
    for training in modes[-1:] if once else modes:
        stand_ins = leaves if training == modes[-1] else None
        tensors = _forward(model, args, kwargs, training, stand_ins, graph=stand_ins is not None)
        graph = tuple(t for t in tensors if t.requires_grad)
        outputs[training] = tuple(t.detach() for t in tensors if t.is_floating_point())
        shapes[training] = tuple(tuple(t.shape) for t in tensors)
    if once:
        outputs = {mode: outputs[modes[-1]] for mode in modes}
        shapes = {mode: shapes[modes[-1]] for mode in modes}
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return Behaviour(
        outputs,
        shapes,
        {name: id(tensor) for name, tensor in named.items()},
        {name: (tensor.dtype, tensor.device) for name, tensor in named.items()},
        graph,
    )


def _forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    training: bool,
    parameters: Mapping[str, Tensor] | None = None,
    graph: bool = False,
) -> list[Tensor]:
    # Batch norm updates its buffers in training mode: it gets copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers.update(parameters or {})
    chance = WithoutChance()  # type: ignore[no-untyped-call]
    with restored(model, training), torch.set_grad_enabled(graph), chance:
        copies = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
        try:
            result = functional_call(model, buffers, copies[0], copies[1])
        except Exception as error:
            raise CaptureError(
                type(model).__name__,
                seen=f"{type(error).__name__}: {error} on the real example input",
                needed="an example input on which the real forward runs",
                next_step="check its dtype and device; the model is untouched",
            ) from error
    tensors = [leaf for leaf in opened(result) if isinstance(leaf, Tensor)]
    if not graph:  # a forward may turn gradients on by itself; its graph would hold the parameters
        tensors = [tensor.detach() for tensor in tensors]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def verify(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    before: Behaviour,
    patch: Patch,
    check: Callable[[Sequence[Trace]], None] = lambda traces: None,
) -> float:
    """Check an edited model against what it did before; return the largest output difference.

    Runs it on fake tensors (shapes; a failing kernel would end the process on an accelerator),
    on the real batch (the promise), and backward once (finite gradients); surviving parameters
    must be the same objects of the same kind. ``check`` looks at the run on fake tensors before
    the real one, and may raise.

    Raises:
        VerifyError: the first check that fails.
    """
    traces = _check_fake(model, args, kwargs, before)
    for trace in traces:
        _check_masks(trace, patch)
    check(traces)
    leaves = {
        n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad
    }
    once = same_computation(traces)
    try:
        after = behaviour(model, args, kwargs, tuple(before.outputs), once=once, leaves=leaves)
    except CaptureError as error:
        raise _fail(error.place, error.seen, "a forward that runs after the edit") from error
    for training, shapes in after.shapes.items():
        _check_shapes(shapes, before.shapes[training])
    _check_survivors(before, after, patch)
    difference, relative, place = _difference(before, after, _promised(patch, before))
    if relative > _allowed(before):
        _check_promise(relative, _rounding(model, args, kwargs, after), place, before)
    if patch.preserves != "exact":
        difference, _, _ = _difference(before, after)
    _check_gradients(after, leaves)
    return difference


def _fail(place: str, seen: str, needed: str) -> VerifyError:
    return VerifyError(
        place,
        seen=seen,
        needed=needed,
        next_step="nothing: the model is as it was before; choose another place or size, and "
        "report this if the edit should have worked",
    )


def _check_shapes(shapes: tuple[tuple[int, ...], ...], old: tuple[tuple[int, ...], ...]) -> None:
    if shapes != old:
        raise _fail("output", f"shapes {shapes}", f"shapes {old} as before")


def _check_fake(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: Behaviour
) -> Sequence[Trace]:
    try:
        traces = capture_both(model, args, kwargs, track=False)
    except CaptureError as error:
        raise _fail(error.place, error.seen, "a forward that runs after the edit") from error
    for trace in traces:
        if trace.training in before.shapes:
            shapes = tuple(ref.shape for ref in trace.outputs)
            _check_shapes(shapes, before.shapes[trace.training])
    return traces


def _check_masks(trace: Trace, patch: Patch) -> None:
    """A weight that is not read as its module's attribute is read without its mask."""
    for name in (masking.tensor for masking in patch.maskings if masking.mask is not None):
        ref = trace.tensors[name]
        tied = (other for other, held in trace.tensors.items() if held == ref)
        masks = {trace.tensors[mask_of(other)] for other in tied}
        for call in trace.calls:
            if ref in call.inputs and masks.isdisjoint(call.inputs):
                raise _fail(
                    name,
                    f"'{call.op}' reading it without its mask ({call.place})",
                    "a weight that the forward reads as an attribute of its module",
                )


def _promised(patch: Patch, before: Behaviour) -> tuple[bool, ...]:
    """The modes (training or not) in which the outputs must stay."""
    if patch.preserves == "exact":
        return tuple(before.outputs)
    return (False,) if patch.preserves == "evaluation" else ()


def ended_masks(patch: Patch, identities: Mapping[str, int]) -> set[str]:
    """Names of the masks that a patch takes away, under every name of a tied parameter.

    ``identities`` are the object ids of all parameters by name.
    """
    ended = {identities[m.tensor] for m in patch.maskings if m.mask is None}
    return {mask_of(name) for name, identity in identities.items() if identity in ended}


def _check_survivors(before: Behaviour, after: Behaviour, patch: Patch) -> None:
    lost = ended_masks(patch, before.identities)
    for name, identity in before.identities.items():
        if name not in after.identities and (
            name in lost or any(name.startswith(f"{path}.") for path in patch.gone)
        ):
            continue
        if after.identities.get(name) != identity:
            raise _fail(name, "another object or none", "the same parameter object as before")
        if after.kinds[name] != before.kinds[name]:
            raise _fail(name, f"{after.kinds[name]}", f"{before.kinds[name]} as before")


def _difference(
    before: Behaviour, after: Behaviour, modes: Sequence[bool] = (False, True)
) -> tuple[float, float, str]:
    """Largest absolute and relative difference, and the mode of the latter."""
    absolute, relative, place = 0.0, 0.0, "evaluation mode"
    for training, outputs in before.outputs.items():
        if training not in modes:
            continue
        for old, new in zip(outputs, after.outputs[training], strict=True):
            if not old.numel() or old.is_meta:
                continue  # a model without data has shapes to check, and no values
            gap = _gap(old.double(), new.double())
            scale = max(_FAINT, float(old.double().nan_to_num(0.0, 0.0, 0.0).abs().max()))
            absolute = max(absolute, gap)
            if gap / scale > relative:
                relative, place = gap / scale, f"{'training' if training else 'evaluation'} mode"
    return absolute, relative, place


def _gap(old: Tensor, new: Tensor) -> float:
    """Largest difference; infinite where only one of both is a number."""
    same = (old == new) | (old.isnan() & new.isnan())
    gaps = (old - new).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(gaps.masked_fill(same, 0.0).max())


def same_outputs(before: Behaviour, after: Behaviour) -> bool:
    """Whether two models do the same on one batch, within what counts as the same function."""
    if before.shapes != after.shapes:
        return False
    _, relative, _ = _difference(before, after)
    return relative <= _allowed(before)


def _allowed(before: Behaviour) -> float:
    dtypes = {out.dtype for outputs in before.outputs.values() for out in outputs}
    return max((TOLERANCE.get(dtype, 3e-2) for dtype in dtypes), default=0.0)


def _rounding(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], after: Behaviour
) -> float:
    """How far the outputs move when every parameter is moved by one rounding.

    A deep network with batch norm on a small batch makes 1e-3 of it; no comparison of two
    orders of summation can be closer than that.
    """
    generator = torch.Generator().manual_seed(0)
    nudged = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            step = torch.finfo(parameter.dtype).eps * signs.to(parameter)
            nudged[name] = parameter.detach() * (1 + step)
    outputs = {}
    for training in after.outputs:
        tensors = _forward(model, args, kwargs, training, nudged)
        outputs[training] = tuple(t for t in tensors if t.is_floating_point())
    return _difference(after, replace(after, outputs=outputs))[1]


def _check_promise(relative: float, rounding: float, place: str, before: Behaviour) -> None:
    allowed = max(_allowed(before), _NOISE * rounding)
    if relative > allowed:
        raise _fail(
            f"output in {place}",
            f"a relative difference of {relative:.2e}",
            f"at most {allowed:.0e}, as this edit promises to keep the function",
        )


def _gradients(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, leaves, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        # Such a checkpoint would run the model's own parameters again, and give them gradients.
        return [None] * len(leaves)


def _check_gradients(after: Behaviour, leaves: Mapping[str, Tensor]) -> None:
    """One backward to stand-ins for the parameters: the real ones get no graph and no gradient."""
    outputs = after.outputs[max(after.outputs)]
    if any(out.is_meta for out in outputs):
        return
    if not after.graph or not all(out.isfinite().all() for out in outputs):
        return  # what was not finite before is not for this edit to answer
    # Not squared: a mask of the smallest number in the outputs would overflow.
    with torch.enable_grad():  # the caller may have turned gradients off
        loss = torch.stack([leaf.double().mean() for leaf in after.graph]).sum()
    grads = _gradients(loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None and not grad.isfinite().all():
            raise _fail(name, "a gradient that is not finite", "finite gradients")
