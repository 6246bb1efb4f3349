"""What signals look at, collected once for all of them.

:func:`gather` runs the model on some batches (one forward, and one backward where gradients are
asked for); `watch.Watch` collects the same during training steps that happen anyway. What nobody
asked for is not collected.

Shapes in names: M micro-batches, P entries of parameters, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.interrupts import breathe
from neuroexapt.couple import AxisMap
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import (
    Batch,
    HoldoutScore,
    LossFn,
    Reading,
    batch_size_of,
    plain_attention,
    undisturbed,
)
from neuroexapt.measure.places import block_places, width_places
from neuroexapt.measure.rows import Keeper, Rows, rows_within
from neuroexapt.measure.sampling import first_tensor, gradients, module_at
from neuroexapt.measure.scores import gate_slopes
from neuroexapt.measure.targets import TargetFn, TargetTap, Wanted, given_targets

CAP = 16 << 20
ROWS = 2048
ENTRIES = 1024
NEEDS = ("rows", "targets", "blocks", "gradients", "gates")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was seen of a model at one moment; empty where it was not asked for.

    Attributes:
        model: the model, for signals that run it themselves.
        axes: its map.
        loss_fn: ``loss_fn(model, batch)``, or None where only training steps were watched.
        batches: the batches that were run, for signals that run the model themselves.
        batch_size: samples of a micro-batch.
        rows: by width, a sample of what its readers are given.
        blocks: by path, input and output of the modules that keep their input's shape.
        targets: by name of a target, one entry a batch, in order.
        gradients: by parameter, (M, P): at most 1,024 entries, the same ones each time.
        sizes: by parameter, its number of entries.
        gates: by width, (M, U): derivative of the loss by a gate on each unit.
        losses: training losses in order, for the plateau.
        train: score on training batches.
        holdout: score on held-out batches.
        refused: what signals could not measure, each with its reason; filled by them.
        memo: what several signals compute from the same rows; filled by them.
    """

    model: nn.Module
    axes: AxisMap
    loss_fn: LossFn | None = None
    batches: Sequence[Batch] = ()
    batch_size: int = 1
    rows: Mapping[str, Rows] = field(default_factory=dict)
    blocks: Mapping[str, tuple[Rows, Rows]] = field(default_factory=dict)
    targets: Mapping[str, Sequence[Wanted]] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Sequence[float] = ()
    train: HoldoutScore | None = None
    holdout: HoldoutScore | None = None
    refused: list[MeasureError] = field(default_factory=list)
    memo: dict[str, Any] = field(default_factory=dict)

    def tried(self, read: Callable[[], Reading]) -> Iterator[Reading]:
        """The reading, or none: what cannot be measured at one place is noted in ``refused``."""
        try:
            yield read()
        except MeasureError as error:
            self.refused.append(error)


def gather(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    axes: AxisMap,
    *,
    needs: Collection[str] = ("rows", "targets", "gradients", "gates"),
    targets: TargetFn | None = None,
    cap: int = CAP,
) -> Evidence:
    """Run the model on some batches and keep what signals need.

    Invariant: as :func:`undisturbed`; the model runs in evaluation mode, hooks exist only
    meanwhile, and activations take at most `cap` bytes (64 rows a place at least).

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch.
        batches: micro-batches of one size.
        axes: the model's present map.
        needs: some of ``"rows"``, ``"targets"``, ``"blocks"``, ``"gradients"``, ``"gates"``.
        targets: ``targets(batch)``, what the model is to predict, one row a sample, or a mapping
            of several; by default what the loss function compares the model with.
        cap: bytes.

    Raises:
        MeasureError: unknown needs, no batch, or a target that is asked for and not found.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> seen = gather(net, loss_fn, batches, map_axes(net, (batches[0][0],)))
        >>> seen.rows["0.out"].values_NC.shape, seen.gates["0.out"].shape
        (torch.Size([32, 4]), torch.Size([4, 4]))
    """
    unknown = [name for name in needs if name not in NEEDS]
    if unknown or not batches:
        raise MeasureError(
            "gather",
            seen=f"needs {unknown}" if unknown else "no batch",
            needed=f"some of {', '.join(NEEDS)}, and at least one batch",
            next_step="check the signal's needs, or pass a list of batches",
        )
    looker = Looker(model, axes, needs, cap)
    aims: dict[str, list[Wanted]] = {}
    if {"rows", "blocks", "targets"} & set(needs):
        with undisturbed(model), plain_attention(), torch.no_grad(), looker.hooked():
            model.eval()
            for batch in batches:
                breathe()
                samples = batch_size_of(batch)
                looker.next_batch(samples)
                with TargetTap(samples) as tap:
                    loss_fn(model, batch)
                if "targets" in needs:
                    _note_targets(aims, batch, targets, tap, samples)
    # A loss that is called for some batches only cannot be told by sample.
    aims = {name: found for name, found in aims.items() if len(found) == len(batches)}
    rows, blocks = looker.seen()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Evidence(
        model,
        axes,
        loss_fn,
        tuple(batches),
        batch_size_of(batches[0]),
        rows,
        blocks,
        aims,
        _gradients(model, loss_fn, batches) if "gradients" in needs else {},
        sizes,
        gate_slopes(model, loss_fn, batches, axes) if "gates" in needs else {},
    )


def _note_targets(
    aims: dict[str, list[Wanted]],
    batch: Batch,
    targets: TargetFn | None,
    tap: TargetTap,
    samples: int,
) -> None:
    if targets is None and tap.found:
        named = {str(number): one for number, one in enumerate(tap.found)}
    else:
        named = given_targets(batch, targets, samples)
    for name, wanted in named.items():
        aims.setdefault(name, []).append(wanted)


def _gradients(model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch]) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {}
    with undisturbed(model):
        model.eval()
        for found in gradients(model, loss_fn, batches):
            for name, gradient in found.items():
                kept.setdefault(name, []).append(entries(gradient))
    return {name: torch.stack(rows) for name, rows in kept.items()}


def entries(gradient: Tensor) -> Tensor:
    """At most 1,024 entries, float32 on the CPU; always the same ones for one size."""
    flat = gradient.detach().flatten()
    if flat.numel() > ENTRIES:
        generator = torch.Generator().manual_seed(flat.numel())
        order = torch.randint(flat.numel(), (ENTRIES,), generator=generator)
        flat = flat[order.to(flat.device)]
    return flat.float().cpu()


class Passing:
    """A hook that looks and does nothing else; copies and pickles of a model get an empty one.

    Example:
        >>> import copy
        >>> hook = Passing(print)
        >>> hook("seen"), copy.deepcopy(hook)("not seen")
        seen
        (None, None)
    """

    def __init__(self, look: Callable[..., None] | None = None) -> None:
        self.look = look

    def __call__(self, *given: Any) -> None:
        if self.look is not None:
            self.look(*given)

    def __reduce__(self) -> tuple[type[Passing], tuple[()]]:
        return Passing, ()


class Looker:
    """Hooks that keep rows of what passes; used by :func:`gather` and by watched steps."""

    def __init__(
        self,
        model: nn.Module,
        axes: AxisMap,
        needs: Collection[str],
        cap: int,
        rows: int = ROWS,
    ) -> None:
        self.model = model
        widths = width_places(axes) if "rows" in needs or "targets" in needs else {}
        blocks = block_places(axes) if "blocks" in needs else {}
        places = [*widths.values(), *(place for pair in blocks.values() for place in pair)]
        limit = min(rows, rows_within(cap, places))
        self.widths = {name: Keeper(place, limit) for name, place in widths.items()}
        self.blocks = {
            path: (Keeper(pair[0], limit), Keeper(pair[1], limit)) for path, pair in blocks.items()
        }
        self.first = self.samples = 0
        self.training_only = False
        self.refused: dict[str, MeasureError] = {}

    def _keepers(self) -> list[Keeper]:
        return [*self.widths.values(), *(k for pair in self.blocks.values() for k in pair)]

    def held_bytes(self) -> int:
        """Bytes that it keeps at present."""
        return sum(keeper.held_bytes() for keeper in self._keepers())

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the modules, for the block alone."""
        with ExitStack() as stack:
            for handle in self.hook():
                stack.callback(handle.remove)
            yield

    def hook(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks on; the caller removes them."""
        by_path: dict[str, list[Keeper]] = {}
        for keeper in self._keepers():
            by_path.setdefault(keeper.place.path, []).append(keeper)
        handles = []
        for path, keepers in by_path.items():
            module = module_at(self.model, path)
            entering = [k for k in keepers if k.place.entering]
            leaving = [k for k in keepers if not k.place.entering]
            if entering:  # before the module runs: it may write into its input
                hook = self._before(entering)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if leaving:
                handles.append(module.register_forward_hook(self._behind(leaving)))
        return handles

    def _before(self, keepers: Sequence[Keeper]) -> Passing:
        return Passing(
            lambda _module, args, kwargs: self._keep(
                keepers, first_tensor((args, list(kwargs.values())))
            )
        )

    def _behind(self, keepers: Sequence[Keeper]) -> Passing:
        return Passing(lambda _module, _args, output: self._keep(keepers, first_tensor(output)))

    def _keep(self, keepers: Sequence[Keeper], tensor: Tensor | None) -> None:
        if tensor is None or not tensor.is_floating_point():
            return
        if self.training_only and not torch.is_grad_enabled():
            return  # an evaluation in the middle of a watched step
        with torch.no_grad():
            for keeper in keepers:
                try:
                    keeper.add(tensor, self.first, self.samples)
                except MeasureError as error:
                    if not self.training_only:
                        raise
                    # An input of another size must not stop a training that runs well with it.
                    self.refused[keeper.place.name] = error

    def next_batch(self, samples: int) -> None:
        """A batch of so many samples is about to pass."""
        self.first, self.samples = self.first + self.samples, samples

    def seen(self) -> tuple[dict[str, Rows], dict[str, tuple[Rows, Rows]]]:
        """What was kept so far."""
        rows = {name: keeper.rows() for name, keeper in self.widths.items()}
        pairs = {path: (a.rows(), b.rows()) for path, (a, b) in self.blocks.items()}
        return (
            {name: held for name, held in rows.items() if held is not None},
            {path: (a, b) for path, (a, b) in pairs.items() if a is not None and b is not None},
        )
