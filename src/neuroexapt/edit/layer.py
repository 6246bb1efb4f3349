"""InsertLayer: a further layer, new or copied from its neighbour, that adds nothing at first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuroexapt.capture.stacks import Stack, counted_with, role_of
from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.copies import CopySpec
from neuroexapt.edit.doors import ROOT, neighbour
from neuroexapt.edit.graft import AFTER, NEXT, PASS, is_branch
from neuroexapt.edit.passing import silenced
from neuroexapt.edit.patch import AttributeEdit, Insertion, Patch
from neuroexapt.edit.places import Output, output_of, runs_of
from neuroexapt.errors import EditError

KINDS = ("mlp", "copy")


@dataclass(frozen=True, kw_only=True)
class MlpSpec(Spec):
    """Two linear layers with a GELU between, the second one zero.

    Attributes:
        features: features that enter and leave.
        hidden: features between.
    """

    features: int
    hidden: int

    def make(self, model: nn.Module) -> nn.Module:
        """(..., C) to the same shape."""
        last = nn.Linear(self.hidden, self.features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(self.features, self.hidden), nn.GELU(), last)


@dataclass(frozen=True)
class InsertLayer(Edit):
    """A further layer behind a module, which adds nothing at first.

    ``kind="mlp"``: ``y + W2 gelu(W1 y)`` on features that come last, ``W2`` zero.

    ``kind="copy"``: a copy of the block itself, behind it, called with the same further inputs
    (masks, caches, a memory). In a residual block (of a transformer, a ResNet) the last linear
    map of every branch is zero in the copy, or the norm behind it. Where the run does not show
    that this makes the copy hand on its input (post-norm, no residual connection, experts), the
    copy stands behind a gate per channel: ``y + gate * (copy(y) - y)``, gate zero.

    Promise: exact, in evaluation and in training mode. A number by which layers know their place
    (``layer_idx``) gets the next free value in the copy, and a config that counts the layers
    (``num_hidden_layers``, ``layer_types``) counts it, so that generation with a cache of
    keys and values goes on. New parameters join the optimizer groups of those they copy; hooks
    of the user are not copied.

    Args:
        after: path of a module; for a copy, of a block whose output has the shape of its input.
        kind: ``"mlp"`` or ``"copy"``.
        hidden: features inside the MLP; as many as outside if not given.
        seed: seed of the random weights of an MLP.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import InsertLayer, apply
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> done = apply(net, InsertLayer("1", hidden=16), args=(torch.randn(5, 3),))
        >>> net[1].nx_after[0], done.max_difference
        (Linear(in_features=8, out_features=16, bias=True), 0.0)

    Gong et al. 2019 (stacking); zero output layers as in Zhang et al. 2019 (Fixup) and Wu et al.
    2024 (LLaMA Pro).
    """

    after: str
    kind: str = "mlp"
    hidden: int | None = None
    seed: int = 0

    @property
    def place(self) -> str:
        return self.after

    def check(self, axes: AxisMap) -> list[EditError]:
        """Wrong options; features that are not last; a block that cannot stand twice in a row."""
        problems = self._wrong_options()
        try:
            output = output_of(axes, self.after)
        except EditError as error:
            return [*problems, error]
        unfit = self._unfit_copy(axes) if self.kind == "copy" else self._unfit_mlp(output)
        return [*problems, *unfit]

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name, and the numbers that count layers."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        output = output_of(axes, self.after)
        beside = neighbour(axes, self.after)
        if self.kind == "mlp":
            features = output.channels
            spec = MlpSpec(features=features, hidden=self.hidden or features, seed=self.seed)
            mlp = Insertion(self.after, AFTER, spec, beside, dtype=output.dtype)
            text = f"add a linear residual branch after '{self.after}'"
            return Patch(self, "exact", text, insertions=(mlp,))
        silent = tuple(sorted(silenced(axes, self.after) or ()))
        numbers, attributes = _renumbered(axes, self.after)
        twin = CopySpec(
            source=self.after,
            silent=silent,
            channels=output.channels,
            spatial=len(output.space),
            dtype=output.dtype,
            numbers=numbers,
        )
        way = f"{', '.join(silent)} zero in it" if silent else "a gate closed around it"
        return Patch(
            self,
            "exact",
            f"add a copy of '{self.after}' behind it, {way}",
            attributes=attributes,
            insertions=(Insertion(self.after, NEXT, twin, beside),),
        )

    def _wrong_options(self) -> list[EditError]:
        problems = []
        if self.kind not in KINDS:
            problems.append(self._error(f"kind={self.kind!r}", f"one of {KINDS}", "choose one"))
        if self.hidden is not None and (type(self.hidden) is not int or self.hidden < 1):
            problems.append(
                self._error(f"hidden={self.hidden!r}", "a positive whole number", "use hidden=64")
            )
        if self.hidden is not None and self.kind == "copy":
            problems.append(
                self._error(
                    f"kind='copy' and hidden={self.hidden!r}",
                    "hidden with kind='mlp' alone: a copy has the block's widths",
                    "leave it out, and use Widen on the copy afterwards",
                )
            )
        return problems

    def _unfit_mlp(self, output: Output) -> list[EditError]:
        if output.channel == len(output.sizes) - 1:
            return []
        return [
            self._error(
                f"output {output.sizes} with channels in dimension {output.channel}",
                "features in the last dimension: (N, C) or (N, ..., C)",
                "use InsertConv",
            )
        ]

    def _unfit_copy(self, axes: AxisMap) -> list[EditError]:
        prefix = f"{self.after}."
        if not self.after or f"{self.after}.{PASS}" in axes.modules:
            seen = "a removed layer" if self.after else "the whole model"
            return [self._error(seen, "a block inside the model", "name one of its blocks")]
        inside = [n.removeprefix(prefix) for n in axes.parameters if n.startswith(prefix)]
        if all(is_branch(name) for name in inside):  # what was inserted is not copied
            return [
                self._error(
                    "a module without weights", "a block that can learn", "name the block around it"
                )
            ]
        for run in runs_of(axes, self.after):
            if run.takes != "tensor":
                return [
                    self._error(
                        f"a first input of type {run.takes}"
                        if run.takes != "nothing"
                        else "a call by keyword alone",
                        "a block that is called with a tensor as its first positional input",
                        "choose a block inside it, or use kind='mlp'",
                    )
                ]
            given, made = run.inputs[0], run.outputs[0]
            if given.shape != made.shape or given.dtype != made.dtype:
                return [
                    self._error(
                        f"input {given.shape}, output {made.shape}",
                        "a block whose output has the shape of its input",
                        "choose one that neither resizes nor projects",
                    )
                ]
        return []

    def _error(self, seen: str, needed: str, next_step: str) -> EditError:
        return EditError(self.after or ROOT, seen=seen, needed=needed, next_step=next_step)


def _renumbered(
    axes: AxisMap, path: str
) -> tuple[tuple[tuple[str, str, int], ...], tuple[AttributeEdit, ...]]:
    """The numbers of a copied block's layers, and the config's count of them."""
    numbers: list[tuple[str, str, int]] = []
    edits: dict[tuple[str, str], AttributeEdit] = {}
    for stack in axes.stacks:
        own = _own_numbers(stack, path)
        if not own or not stack.continues(path):
            continue
        alike = [other for other in axes.stacks if other.name == stack.name]
        pool = counted_with(axes.stacks, stack) if stack.holds(path) else alike
        free = 1 + max(other.last for other in pool)
        layers = _by_layer(own)
        numbers += [(inner, name, free + layer) for layer, (inner, name, _) in layers]
        if stack.holds(path):
            added = {layer: value for layer, (_, _, value) in reversed(layers)}
            for edit in _counted(stack, [added[layer] for layer in sorted(added)]):
                edits[edit.module, edit.name] = edit
    return tuple(numbers), tuple(edits.values())


def _by_layer(
    own: list[tuple[str, str, int]],
) -> list[tuple[int, tuple[str, str, int]]]:
    """Which layer of the block each number belongs to, counted from 0.

    Parts of one layer (attention to itself, to a memory) may have unlike numbers, after one of
    them took over that of a removed layer: so each is counted among its like.
    """
    alike: dict[str, set[int]] = {}
    for inner, _, value in own:
        alike.setdefault(role_of(inner), set()).add(value)
    return [
        (sorted(alike[role_of(inner)]).index(value), (inner, name, value))
        for inner, name, value in own
    ]


def _own_numbers(stack: Stack, path: str) -> list[tuple[str, str, int]]:
    """Those inside a block, by path in it; copies behind the block have their own."""
    found = []
    for at, value in stack.counters:
        inner = at.module.removeprefix(path).lstrip(".")
        inside = at.module == path or at.module.startswith(f"{path}.")
        if inside and not is_branch(inner):
            found.append((inner, at.name, value))
    return found


def _counted(stack: Stack, added: list[int]) -> list[AttributeEdit]:
    """The config's numbers and lists with as many layers more."""
    totals = [AttributeEdit(at.module, at.name, stack.count + len(added)) for at in stack.totals]
    tables = []
    for at, entries in stack.tables:
        further: list[Any] = [entries[value - stack.first] for value in added]
        tables.append(AttributeEdit(at.module, at.name, type(entries)([*entries, *further])))
    return [*totals, *tables]
