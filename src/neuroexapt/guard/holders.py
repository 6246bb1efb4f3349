"""What forbids a tensor to change its content: graphs yet to run backward, weak references.

All of it is looked for before the first write, and named. Looking takes a walk over the objects of
the process, so it is done only where a count says that there is something to find.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.meta_utils import MetaTensorDescriber
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from neuroexapt.errors import GuardError
from neuroexapt.guard.leaks import held_by

# What torch.utils.checkpoint keeps from a forward to its backward: if reentrant, and if not.
_CONTEXT: type = checkpoint.CheckpointFunction._backward_cls
_FRAME: type = checkpoint._CheckpointFrame
_DROP = (
    "edit after optimizer.step(), and drop losses and outputs of the last step first "
    "(del loss, output)"
)


def held(name: str, seen: str, next_step: str = _DROP) -> GuardError:
    """The error for a tensor that cannot be changed now."""
    return GuardError(
        name,
        seen=seen,
        needed="a tensor that no autograd graph and no weak reference holds",
        next_step=next_step,
    )


def check_swappable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose content could not be swapped, before any of them is touched.

    A swap that fails half-way through a model would poison the graph that forbade it, and one under
    a graph that waits for its backward would poison that. A graph that has run is no obstacle.

    Raises:
        GuardError: a live graph, a view or a weak reference holds one, or its class is a wrapper.
    """
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            raise GuardError(
                name,
                seen=f"a {type(tensor).__name__}",
                needed="a plain tensor",
                next_step="edit before sharding or quantising the model",
            )
    if _problem(tensors) is not None:
        gc.collect()  # what nobody can reach any more holds nothing
        _forget_descriptions([t for t in tensors.values() if weakref.getweakrefs(t)])
    problem = _problem(tensors)
    if problem is not None:
        raise problem


def _problem(tensors: Mapping[str, Tensor]) -> GuardError | None:
    in_graphs = []
    for name, tensor in tensors.items():
        watchers = weakref.getweakrefs(tensor)
        if watchers:
            places = list(dict.fromkeys(held_by(watchers[:1], {id(watchers)})))
            where = ", ".join(places[:2]) or "held outside of Python"
            return held(name, f"a weak reference holds it ({where})", "drop what watches it first")
        count = tensor._use_count()  # type: ignore[attr-defined]
        if count > 1:
            in_graphs.append((name, tensor, count))
    return _held_by_graphs(in_graphs) if in_graphs else None


def _forget_descriptions(tensors: Sequence[Tensor]) -> None:
    """torch.export and torch.compile leave notes on tensors by weak reference; an edit makes them
    stale, and torch takes them anew."""
    for thing in gc.get_objects() if tensors else ():
        if type(thing) is MetaTensorDescriber:
            for tensor in tensors:
                thing.lookup_tensor.pop(tensor, None)


# --- graphs --------------------------------------------------------------------------------------


def _held_by_graphs(tensors: list[tuple[str, Tensor, int]]) -> GuardError | None:
    waiting = _Graphs()
    for name, tensor, count in tensors:
        root = waiting.root_of(tensor)
        if root is not None:
            where = list(held_by([root], waiting.own))[:1]
            what = ", ".join(
                [f"{type(root.grad_fn).__name__} of shape {tuple(root.shape)}", *where]
            )
            return held(
                name, f"a live autograd graph holds it ({what}), and waits for its backward"
            )
        # One reference is the object's own, one more the gradient node of a graph that has run.
        if count > 2 or not _has_gradient_node(tensor):
            return held(name, "a view or a live autograd graph holds it")
    return None


def _has_gradient_node(tensor: Tensor) -> bool:
    """Whether the second reference is a gradient node's: asking for one makes one, if there is none
    (as in ``torch.utils.swap_tensors``)."""
    if not (tensor.is_leaf and tensor.requires_grad):
        return False
    node = torch.autograd.graph.get_gradient_edge(tensor).node
    return node is not None and int(tensor._use_count()) == 2  # type: ignore[attr-defined]


class _Graphs:
    """The graphs of this process that may still run, each with a tensor it hangs on."""

    def __init__(self) -> None:
        tensors = list(_tensors_of_graphs())
        self._seen: set[Any] = set()
        self._leaves: dict[int, Tensor] = {}
        self._inner: set[Any] = set()
        for tensor in tensors:
            self._walk(tensor)
        # Once more from those that hang on no other, for these are what somebody must let go of.
        self._seen, self._leaves = set(), {}
        outermost = [t for t in tensors if t.grad_fn not in self._inner and not _is_copy(t)]
        for tensor in outermost:
            self._walk(tensor)
        self.own = {id(tensors), id(outermost), id(self._leaves)}

    def root_of(self, leaf: Tensor) -> Tensor | None:
        """A tensor whose backward would reach this one."""
        return self._leaves.get(id(leaf))

    def _walk(self, root: Tensor) -> None:
        nodes = [root.grad_fn]
        while nodes:
            node: Any = nodes.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                self._leaves.setdefault(id(variable), root)
            kept = _kept(node)
            for tensor in kept or ():
                self._leaves.setdefault(id(tensor), root)
            if kept is not None:
                further = [after for after, _ in node.next_functions]
                self._inner.update(further)
                nodes.extend(further)


def _is_copy(tensor: Tensor) -> bool:
    """Whether it was only cloned, joined or cast, without detaching: a note, and nobody's loss."""
    nodes: list[Any] = [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if _kept(node) != []:
            return False
        nodes.extend(after for after, _ in node.next_functions if after is not None)
    return tensor.dim() > 0


def _tensors_of_graphs() -> Iterator[Tensor]:
    kinds: dict[type, bool] = {}
    for thing in gc.get_objects():
        # By its type: looking at an attribute of a stranger may run its code.
        kind = type(thing)
        if kind not in kinds:
            plain = issubclass(kind, Tensor)
            kinds[kind] = plain and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        if kinds[kind] and thing.grad_fn is not None:
            yield thing


def _kept(node: Any) -> list[Tensor] | None:
    """The tensors a node keeps for its backward; None where it has run and they are gone."""
    kept: list[Tensor] = []
    for name in _saving(node.__class__):
        raw = getattr(node, f"_raw{name}", None)
        if getattr(raw, "unpack_hook", None) is not None:
            continue  # alive; what it would unpack may be costly to make
        try:
            value = getattr(node, name)
        except RuntimeError as error:
            if "freed" in str(error):
                return None
            continue  # changed in place since: its backward will say so
        values = value if isinstance(value, (list, tuple)) else (value,)
        kept += [item for item in values if isinstance(item, Tensor)]
    return kept


@functools.cache
def _saving(kind: type) -> tuple[str, ...]:
    """The attributes of a node that stand for what it keeps."""
    return tuple(n for n in dir(kind) if n.startswith("_saved_") or n == "saved_tensors")


# --- checkpoints ---------------------------------------------------------------------------------


def check_checkpoints() -> None:
    """Refuse while a checkpointed forward waits for its backward, which would run the forward anew.

    ``torch.utils.checkpoint`` keeps no weights, so nothing would forbid an edit in between: its
    reentrant kind would take the gradient of another model without a word, the other would fail.

    Raises:
        GuardError: one of them waits, whatever it runs.
    """
    for waiting in (*_instances(_CONTEXT), *_instances(_FRAME)):
        if _waits(waiting):
            what = getattr(waiting, "run_function", None) or _checkpointed(waiting)
            name = getattr(what, "__qualname__", type(what).__name__)
            raise GuardError(
                "torch.utils.checkpoint",
                seen=f"a checkpointed forward of {name} that waits for its backward",
                needed="a moment between a backward and the next forward: the backward runs the "
                "checkpointed part anew, and would run it changed",
                next_step=_DROP,
            )


# How often each kind is referred to while it has no instances, each of which refers to it too.
_idle: dict[type, int] = {}


def _instances(kind: type) -> list[Any]:
    if sys.getrefcount(kind) <= _idle.get(kind, 0):
        return []
    found = [thing for thing in gc.get_referrers(kind) if type(thing) is kind]
    if not found:
        _idle[kind] = sys.getrefcount(kind)
    return found


def _waits(waiting: Any) -> bool:
    if isinstance(waiting, _FRAME):
        # The graph keeps a holder for each tensor, until its backward has asked for it.
        return any(holder() is not None for holder in vars(waiting)["weak_holders"])
    return _kept(waiting) is not None and bool(waiting.tensor_indices)


def _checkpointed(frame: Any) -> object:
    """The function of a frame, where torch keeps it in the closure of what runs it anew."""
    names, cells = frame.recompute_fn.__code__.co_freevars, frame.recompute_fn.__closure__
    return cells[names.index("fn")].cell_contents if "fn" in names else frame.recompute_fn
