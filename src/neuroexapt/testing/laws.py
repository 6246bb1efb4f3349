"""The laws that every edit must obey, each a function that raises :class:`BrokenLaw`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Edit, Patch
from neuroexapt.edit.hold import Hold, Join
from neuroexapt.guard import transaction
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.verify import ended_masks
from neuroexapt.testing.snapshot import changes, snapshot
from neuroexapt.testing.world import World

PROMISES = ("exact", "evaluation", "approximate", "none")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_FAINT = 1e-12  # outputs smaller than this count as zero
_ROUNDINGS = 10  # two orders of summation differ by a few roundings of every parameter


class BrokenLaw(AssertionError):
    """An edit broke a law.

    Args:
        law: the law in words.
        model: name of the row.
        edit: the edit.
        seen: what was found, with figures.

    Example:
        >>> print(BrokenLaw("undo restores every bit", "mlp", "Mine('0')", "changed: 0.weight"))
        mlp: Mine('0') breaks the law "undo restores every bit": changed: 0.weight
    """

    def __init__(self, law: str, model: str, edit: object, seen: str) -> None:
        self.law, self.model, self.edit, self.seen = law, model, edit, seen
        super().__init__(f'{model}: {edit} breaks the law "{law}": {seen}')

    def __reduce__(self) -> tuple[object, ...]:
        # A test runner sends it from a worker; an edit defined inside a test would not pickle.
        return type(self), (self.law, self.model, repr(self.edit), self.seen)


@dataclass(frozen=True)
class Before:
    """What is compared after an edit: names, objects, kinds, groups, outputs, calls."""

    named: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    kinds: Mapping[str, tuple[object, ...]]
    last: frozenset[str]
    groups: Mapping[int, int]
    outputs: Mapping[bool, list[Tensor]]
    calls: Mapping[str, int]


def before(world: World) -> Before:
    """Write down what an edit must keep."""
    named = _all_named(world.model)
    groups = world.optimizer.param_groups
    outputs, calls = _watched(world)
    return Before(
        named,
        dict(world.model.named_modules()),
        {name: _kind(tensor) for name, tensor in named.items()},
        frozenset(name for name, tensor in named.items() if _channels_last(tensor)),
        {id(p): number for number, group in enumerate(groups) for p in group["params"]},
        outputs,
        calls,
    )


def _all_named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.layout


def _channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _watched(world: World) -> tuple[dict[bool, list[Tensor]], dict[str, int]]:
    """Outputs in each mode, and how often each module is called meanwhile."""
    start = {path: counter.calls for path, counter in world.calls.items()}
    outputs = world.outputs()
    return outputs, {path: counter.calls - start[path] for path, counter in world.calls.items()}


def _broken(world: World, edit: Edit, law: str, seen: str) -> NoReturn:
    raise BrokenLaw(law, world.row.name, edit, seen)


def check_undo(world: World, edit: Edit, patch: Patch) -> None:
    """Planning writes nothing; an error afterwards, or an interruption at a write, leaves nothing.

    The interruptions come behind the first write, one in the middle, and the last.
    """
    old = snapshot(world.model, world.optimizer)
    edit.check(world.axes)
    edit.plan(world.axes, named_tensors(world.model))
    _same(world, edit, "check and plan write nothing", old)
    tx = transaction(world.model, world.optimizer)
    tx.apply(edit, world.args, world.kwargs, axes=world.axes)
    changed = changes(old, snapshot(world.model, world.optimizer))
    if all(name.endswith(" _nx_lineage") for name in changed):  # what was done is remembered
        _broken(world, edit, "an edit changes something", "nothing changed")
    tx.roll_back()
    _same(world, edit, "undo restores every bit", old)
    tx.stage(patch)
    writes = len(tx.ledger)
    tx.roll_back()
    for stop in sorted({1, writes // 2 + 1, writes}):
        tx.ledger = _Interrupted(stop)
        try:
            tx.stage(patch)
        except KeyboardInterrupt:
            _same(world, edit, f"undo restores every bit (stopped at write {stop})", old)
        else:
            tx.roll_back()
            _broken(
                world, edit, "a plan is carried out alike each time", f"{writes} writes, then fewer"
            )


class _Interrupted(Ledger):
    """A ledger whose user presses Ctrl-C behind one of the writes."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        self.stop = stop

    def do(self, write: Any, undo: Any) -> None:
        super().do(write, undo)
        self.stop -= 1
        if not self.stop:
            raise KeyboardInterrupt


def _same(world: World, edit: Edit, law: str, old: dict[str, Any]) -> None:
    changed = changes(old, snapshot(world.model, world.optimizer))
    if changed:
        _broken(world, edit, law, f"changed: {', '.join(changed[:5])}")


def check_promise(world: World, edit: Edit, patch: Patch, old: Before) -> float:
    """Outputs have the same shapes, are finite, and in the modes promised the same.

    Returns:
        Largest difference relative to the largest output, over the modes promised; 0 if none is.
    """
    new, worst = world.outputs(), 0.0
    for training, outputs in old.outputs.items():
        mode = "training mode" if training else "evaluation mode"
        shapes = [[tuple(out.shape) for out in outs] for outs in (outputs, new[training])]
        if shapes[0] != shapes[1]:
            seen = f"{shapes[1]} instead of {shapes[0]} in {mode}"
            _broken(world, edit, "outputs keep their shape", seen)
        pairs = zip(outputs, new[training], strict=True)
        if any(a.isfinite().all() and not b.isfinite().all() for a, b in pairs):
            _broken(world, edit, "outputs stay finite", mode)
        if patch.preserves == "exact" or (patch.preserves == "evaluation" and not training):
            gap = difference(outputs, new[training])
            allowed = TOLERANCE[world.dtype]
            if gap > allowed:  # only then is it worth while to ask what rounding does
                allowed = max(allowed, _ROUNDINGS * _rounding(world, training))
            if gap > allowed:
                law = f"'{patch.preserves}' keeps the function ({world.dtype})"
                seen = f"a relative difference of {gap:.2e} in {mode}, allowed {allowed:.0e}"
                _broken(world, edit, law, seen)
            worst = max(worst, gap)
    return worst


def difference(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """Largest difference of outputs, each relative to its own largest entry."""
    gaps = [
        float((a.double() - b.double()).abs().max()) / max(_FAINT, float(a.double().abs().max()))
        for a, b in zip(old, new, strict=True)
        if a.numel()
    ]
    return max(gaps, default=0.0)


def _rounding(world: World, training: bool) -> float:
    """How far one rounding of every parameter moves the outputs."""
    twin, base = copy.deepcopy(world.model), world.outputs()[training]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs.to(parameter))
    return difference(base, world.outputs(twin)[training])


def check_survivors(world: World, edit: Edit, patch: Patch, old: Before) -> None:
    """Whatever was there and is not removed is the same object under the same name, of one kind.

    Tied names stay tied; ``requires_grad``, dtype, device, class and memory format stay; new
    tensors have the dtype and device of the others.
    """
    now, modules = _all_named(world.model), dict(world.model.named_modules())
    gone = tuple(f"{path}." for path in patch.gone)
    ended = ended_masks(patch, {name: id(tensor) for name, tensor in old.named.items()})
    for name, tensor in old.named.items():
        if name not in now and (name in ended or name.startswith(gone)):
            continue
        if now.get(name) is not tensor:
            _broken(world, edit, "survivors keep identity and name", f"'{name}' is lost")
        if _kind(tensor) != old.kinds[name]:
            seen = f"'{name}' is {_kind(tensor)}, was {old.kinds[name]}"
            _broken(world, edit, "survivors keep their kind", seen)
        if name in old.last and not tensor.is_contiguous(memory_format=torch.channels_last):
            seen = f"'{name}' has strides {tensor.stride()}"
            _broken(world, edit, "survivors keep their memory format", seen)
    ends = {id(module.hold) for module in modules.values() if isinstance(module, Join)}
    for path, module in old.modules.items():
        if path not in modules and (path in patch.gone or path.startswith(gone)):
            continue
        if path not in modules and isinstance(module, Hold) and id(module) not in ends:
            continue  # the beginning of a skip goes with its end
        if modules.get(path) is not module:
            _broken(world, edit, "survivors keep identity and name", f"module '{path}' is lost")
    devices = {tensor.device for tensor in old.named.values()}
    for name in now.keys() - old.named.keys():
        odd = now[name].is_floating_point() and now[name].dtype != world.dtype
        if odd or (devices and now[name].device not in devices):
            seen = f"'{name}' is {now[name].dtype} on {now[name].device}"
            _broken(world, edit, "what is new has the dtype and device of the model", seen)


def check_optimizer(world: World, edit: Edit, old: Before) -> None:
    """Groups hold the survivors they held and all new parameters, once; state fits, none is stale.

    A parameter that was kept out of the optimizer stays out.
    """
    was = {id(tensor) for tensor in old.named.values()}
    live = {id(p): path for path, p in world.model.named_parameters()}
    groups = world.optimizer.param_groups
    held = [(id(p), number) for number, group in enumerate(groups) for p in group["params"]]
    wanted = {i for i in live if i in old.groups or i not in was}
    there = {i for i, _ in held}
    if len(held) != len(there) or there != wanted:
        missing = [live[i] for i in wanted - there]
        seen = f"missing {missing}, {len(there - wanted)} strangers, {len(held) - len(there)} twice"
        _broken(world, edit, "the optimizer holds exactly what is live", seen)
    moved = [live[i] for i, number in held if old.groups.get(i, number) != number]
    if moved:
        _broken(world, edit, "parameters stay in their group", f"moved: {moved}")
    for parameter, state in world.optimizer.state.items():
        if id(parameter) not in wanted:
            seen = f"state of a parameter of shape {tuple(parameter.shape)} that is gone"
            _broken(world, edit, "no optimizer state is stale", seen)
        shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor) and v.dim()}
        if any(shape != tuple(parameter.shape) for shape in shapes.values()):
            seen = f"'{live[id(parameter)]}' {tuple(parameter.shape)}: {shapes}"
            _broken(world, edit, "optimizer state fits its parameter", seen)


def check_copies(world: World, edit: Edit, again: nn.Module) -> None:
    """Deepcopy, pickle, and a state dict through a file into ``again`` (the edit made afresh)."""
    twins = {"deepcopy": copy.deepcopy(world.model)}
    if _pickles(world.row.build()):
        twins["pickle"] = pickle.loads(pickle.dumps(world.model))
    for way, twin in twins.items():
        _same_function(world, edit, way, twin)
        if {id(t) for t in twin.parameters()} & {id(t) for t in world.model.parameters()}:
            _broken(world, edit, f"a {way} shares nothing", "a parameter is shared")
        if [type(m) for m in twin.modules()] != [type(m) for m in world.model.modules()]:
            _broken(world, edit, f"a {way} has the same classes", "another class")
    file = io.BytesIO()
    torch.save(world.model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for tensor in again.parameters():
            tensor.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    _same_function(world, edit, "state_dict", again)


def _same_function(world: World, edit: Edit, way: str, twin: nn.Module) -> None:
    for training, outputs in world.outputs().items():
        gap = difference(outputs, world.outputs(twin)[training])
        if gap:
            _broken(world, edit, f"{way} keeps the function", f"differs by {gap:.2e}")


def _pickles(model: nn.Module) -> bool:
    """Whether the model pickles without any edit: one with a lambda inside never did."""
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def check_training(world: World, edit: Edit, old: Before) -> None:
    """Five steps: finite, the loss moves, what is new moves, hooks fire with the right shapes."""
    modules = dict(world.model.named_modules())
    for path, calls in _watched(world)[1].items():
        if modules.get(path) is old.modules[path] and calls not in (old.calls[path], 0):
            seen = f"'{path}' {calls} times instead of {old.calls[path]}"
            _broken(world, edit, "forward hooks fire as before", seen)
    for shapes in world.gradients.values():
        shapes.clear()
    fresh = {n: p for n, p in world.model.named_parameters() if n not in old.named}
    losses = world.train(5)
    if not all(torch.tensor(losses).isfinite()) or len(set(losses)) == 1:
        _broken(world, edit, "training goes on", f"losses {losses}")
    for path, parameter in world.model.named_parameters():
        if not parameter.isfinite().all():
            _broken(world, edit, "training goes on", f"'{path}' is not finite")
        shapes_seen = set(world.gradients.get(path, ()))
        if shapes_seen - {parameter.shape}:
            text = f"'{path}' {tuple(parameter.shape)}: {sorted(map(tuple, shapes_seen))}"
            _broken(world, edit, "tensor hooks see the gradient", text)
        if path in world.gradients and parameter.grad is not None and not shapes_seen:
            _broken(world, edit, "tensor hooks fire as before", f"that of '{path}' never did")
    # By gradients, not by values: weight decay moves a parameter that learns nothing.
    trained = {n: p.grad for n, p in fresh.items() if p.requires_grad}
    if trained and not any(grad is not None and grad.any() for grad in trained.values()):
        _broken(world, edit, "what is new learns", f"no gradient reaches any of {list(trained)}")


def check_compile(world: World, edit: Edit) -> None:
    """``torch.compile`` follows the model as one graph and computes the same."""
    twin: Any = copy.deepcopy(world.model).eval()
    for module in twin.modules():
        module._forward_hooks.clear()  # counting calls is a side effect that no graph holds
    with torch.no_grad():
        expected = world.row.loss(twin(*world.args, **world.kwargs))
        compiled: Any = torch.compile(twin, fullgraph=True, backend="eager")
        gap = float((world.row.loss(compiled(*world.args, **world.kwargs)) - expected).abs())
    torch._dynamo.reset()
    if not gap <= 1e-4 * max(1.0, float(expected.abs())):
        _broken(world, edit, "torch.compile keeps the function", f"the loss differs by {gap:.2e}")
