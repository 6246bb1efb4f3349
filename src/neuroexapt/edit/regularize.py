"""AddRegularization: dropout, stochastic depth, weight decay, each where it is asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from numbers import Real

from torch import Tensor, nn

from neuroexapt.capture import TensorRef
from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit, is_glob
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.doors import ROOT, door_of
from neuroexapt.edit.graft import THEN
from neuroexapt.edit.patch import AttributeEdit, Decay, Insertion, Patch, Removal
from neuroexapt.edit.places import runs_of
from neuroexapt.edit.stream import Flow, branches_near, is_map, joins_stream, sample_dim
from neuroexapt.errors import EditError

_DROPOUTS = {0: nn.Dropout, 1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
_DROPPING = {kind.__name__ for kind in _DROPOUTS.values()} | {
    "AlphaDropout",
    "FeatureAlphaDropout",
}
_DEPTH = "StochasticDepth"
_KINDS = ("dropout", "stochastic_depth", "weight_decay")


class StochasticDepth(nn.Module):
    """Drops the whole branch of a sample in training mode; the others are scaled up to match.

    Args:
        p: share of the samples whose branch is dropped, in [0, 1).
        dim: the dimension that counts samples.

    Example:
        >>> import torch
        >>> branch = StochasticDepth(0.5).train()
        >>> sorted(set(branch(torch.ones(200, 3)).sum(1).tolist()))
        [0.0, 6.0]

    Huang et al. 2016.
    """

    def __init__(self, p: float, dim: int = 0) -> None:
        super().__init__()
        self.p = p
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not self.training or self.p == 0.0:
            return x
        shape = [size if dim == self.dim else 1 for dim, size in enumerate(x.shape)]
        keep = x.new_empty(shape).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}"


@dataclass(frozen=True, kw_only=True)
class ChanceSpec(Spec):
    """A module that drops at random.

    Attributes:
        p: the probability.
        spatial: dimensions behind the channels that go with them; 0 for single features.
        samples: the dimension of samples whose whole branch goes; None for dropout.
    """

    p: float
    spatial: int = 0
    samples: int | None = None

    def make(self, model: nn.Module) -> nn.Module:
        """Output shape: that of the input."""
        if self.samples is not None:
            return StochasticDepth(self.p, self.samples)
        return _DROPOUTS[self.spatial](self.p)


@dataclass(frozen=True)
class AddRegularization(Edit):
    """Regularise one place, or change how strongly.

    ``"dropout"``: whole channels of a map (N, C, ...), single features elsewhere; put it behind a
    norm rather than before one, whose statistics it would move. ``"stochastic_depth"``: the branch
    of a residual connection is dropped for whole samples. ``"weight_decay"``: chosen weights
    shrink by ``lr * strength`` at each step of the optimizer, as in AdamW and beside what the
    optimizer does itself; no group is added and none is changed, so schedulers stay in step.

    Promise: the same function in evaluation mode; weight decay changes no function at all. The
    edit can be made again at the same place, or at a dropout of the user's own, with another
    strength; zero takes away what it added.

    Args:
        at: path of the module behind which to drop. For ``"weight_decay"`` a parameter's name, a
            glob over such names, or a module: its weights of two or more dimensions.
        kind: ``"dropout"``, ``"stochastic_depth"`` or ``"weight_decay"``.
        strength: a probability in [0, 1), or the decay, at least 0.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.
        GuardError: weight decay without the optimizer that trains the weights.

    Example:
        >>> import torch
        >>> from neuroexapt import AddRegularization, apply
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> done = apply(net, AddRegularization("1", "dropout", 0.2), (x,))
        >>> net[1].nx_then, done.max_difference
        (Dropout2d(p=0.2, inplace=False), 0.0)
        >>> apply(net, AddRegularization("1", "dropout", 0.1), (x,)).description
        "set the dropout behind '1' to 0.1"

    Srivastava et al. 2014; Tompson et al. 2015 (whole channels); Huang et al. 2016 (stochastic
    depth); Loshchilov and Hutter 2019 (decoupled weight decay).
    """

    at: str
    kind: str = "dropout"
    strength: float = 0.1

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Kind, strength, and a place that can be regularised in this way."""
        problems = [*self._kind_problems(), *self._strength_problems()]
        if problems:
            return problems
        try:
            self._patch(axes)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """A module behind the place, another strength of one that is there, or a decay."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        return self._patch(axes)

    def _kind_problems(self) -> list[EditError]:
        if self.kind in _KINDS:
            return []
        return [
            EditError(
                self.at or ROOT,
                seen=f"kind={self.kind!r}",
                needed="one of " + ", ".join(f'"{kind}"' for kind in _KINDS),
                next_step='use kind="dropout"',
            )
        ]

    def _strength_problems(self) -> list[EditError]:
        number, decay = self.strength, self.kind == "weight_decay"
        good = isinstance(number, Real) and not isinstance(number, bool) and isfinite(number)
        if good and number >= 0 and (decay or number < 1):
            return []
        return [
            EditError(
                self.at or ROOT,
                seen=f"strength={number!r}",
                needed="a number, 0 or more" if decay else "a probability in [0, 1)",
                next_step=f"use strength={0.01 if decay else 0.1}, or 0 to take it away",
            )
        ]

    def _patch(self, axes: AxisMap) -> Patch:
        if self.kind == "weight_decay":
            return self._decay(axes)
        known = _DROPPING if self.kind == "dropout" else {_DEPTH}
        word = self.kind.replace("_", " ")
        if axes.kinds.get(self.at) in known and not self._is_ours():
            text = f"set the {word} '{self.at}' to {self.strength:g}"
            return self._changed(self.at, text)
        there = self._there(axes, known)
        if there and not self.strength:
            text = f"take the {word} behind '{self._host()}' away"
            return Patch(self, "evaluation", text, removals=(Removal(there, None),))
        if there:
            text = f"set the {word} behind '{self._host()}' to {self.strength:g}"
            return self._changed(there, text)
        if not self.strength:
            raise self._nothing_there()
        spec = self._dropout(axes) if self.kind == "dropout" else self._depth(axes)
        text = f"add {word} of {self.strength:g} behind '{self.at or ROOT}'"
        return Patch(self, "evaluation", text, insertions=(Insertion(self.at, THEN, spec, None),))

    def _is_ours(self) -> bool:
        return self.at.rpartition(".")[2].startswith(THEN)

    def _host(self) -> str:
        return self.at.rpartition(".")[0] if self._is_ours() else self.at

    def _there(self, axes: AxisMap, known: set[str]) -> str | None:
        """What an earlier edit of this kind put behind the place."""
        host = self._host()
        prefix = f"{host}.{THEN}".lstrip(".")
        for path, kind in axes.kinds.items():
            name = path.removeprefix(f"{host}." if host else "")
            if path.startswith(prefix) and "." not in name and kind in known:
                return path if not self._is_ours() or path == self.at else None
        return None

    def _changed(self, path: str, text: str) -> Patch:
        edit = AttributeEdit(path, "p", float(self.strength))
        return Patch(self, "evaluation", text, attributes=(edit,))

    def _nothing_there(self) -> EditError:
        return EditError(
            self.at or ROOT,
            seen=f"strength=0 where this edit has put no {self.kind.replace('_', ' ')}",
            needed="a probability above 0, or a place that has some",
            next_step="use strength=0.1",
        )

    def _dropout(self, axes: AxisMap) -> ChanceSpec:
        refs = self._outputs(axes)
        shape = refs[0].shape
        if prod(shape[1:]) < 2:
            raise EditError(
                self.at or ROOT,
                seen=f"output {shape}, one number a sample",
                needed="two or more numbers a sample: dropout would drop the sample itself",
                next_step="drop where there are more features, further up",
            )
        return ChanceSpec(p=float(self.strength), spatial=self._spatial(axes))

    def _spatial(self, axes: AxisMap) -> int:
        """Dimensions that go with their channel; single numbers where there is one channel."""
        try:
            door = door_of(axes, self.at, "output")
        except EditError:
            return 0  # no dimension that holds channels: numbers go one by one
        whole = door.channel == 1 and door.channels > 1 and is_map(axes, self.at)
        return len(door.space) if whole and len(door.space) <= 3 else 0

    def _depth(self, axes: AxisMap) -> ChanceSpec:
        self._outputs(axes)
        flow = Flow(axes.traces[0])
        problem = joins_stream(flow, self.at)
        dim = sample_dim(axes, self.at)
        if not problem and dim is None:
            problem = "an output without a dimension that counts the samples of the batch"
        if problem or dim is None:
            near = ", ".join(f"'{path}'" for path in [*branches_near(flow, self.at)][:4])
            raise EditError(
                self.at or ROOT,
                seen=problem,
                needed="a module whose output goes only into a sum with the stream",
                next_step=f"residual branches near it: {near}" if near else 'use kind="dropout"',
            )
        return ChanceSpec(p=float(self.strength), samples=dim)

    def _outputs(self, axes: AxisMap) -> tuple[TensorRef, ...]:
        """The tensors that leave the place; the first one is dropped from."""
        run = runs_of(axes, self.at)[0]
        refs = run.outputs
        if run.gives in ("tensor", "tuple") and refs[0].dtype.is_floating_point:
            return refs
        kind = f"an output of type {run.gives}"
        raise EditError(
            self.at or ROOT,
            seen=f"an output of {refs[0].dtype}" if run.gives in ("tensor", "tuple") else kind,
            needed="a floating-point tensor, or a tuple that begins with one",
            next_step="choose a module inside or beside it",
        )

    def _decay(self, axes: AxisMap) -> Patch:
        names = self._chosen(axes)
        share = f"{len(names)} parameters" if len(names) > 1 else f"'{names[0]}'"
        text = f"weight decay of {self.strength:g} for {share}"
        if not self.strength:
            text = f"no weight decay beside the optimizer's own for {share}"
        return Patch(self, "exact", text, decays=(Decay(names, float(self.strength)),))

    def _chosen(self, axes: AxisMap) -> tuple[str, ...]:
        names = _parameter_names(axes)
        if self.at in names:
            return (self.at,)
        if is_glob(self.at):
            found = [name for name in names if fnmatch.fnmatchcase(name, self.at)]
        else:
            if self.at not in axes.kinds:
                axes.find(self.at)  # raises with near names
            prefix = f"{self.at}." if self.at else ""
            found = [n for n in names if n.startswith(prefix) and len(axes.tensors[n]) > 1]
        if found:
            return tuple(found)
        raise EditError(
            self.at or ROOT,
            seen="no weight of two or more dimensions" if not is_glob(self.at) else "no parameter",
            needed="a parameter's name, a glob over names, or a module with weights",
            next_step="name the parameter, such as "
            + ", ".join(f"'{name}'" for name in list(axes.parameters)[:2]),
        )


def _parameter_names(axes: AxisMap) -> list[str]:
    """Every name of every parameter: one that is tied has several."""
    refs = axes.traces[0].tensors
    parameters = {refs[name] for name in axes.parameters}
    return [name for name, ref in refs.items() if ref in parameters]
