"""Signals out of training steps that happen anyway: one step in many is watched.

No extra forward and no extra backward: hooks exist during the watched step alone, keep a bounded
sample of activations and gradients, and go. What training mode does (dropout, batch statistics)
is in these readings; :func:`~neuroexapt.measure.evidence.gather` sees evaluation mode.

Shapes in names: M watched steps, P entries of parameters, U units.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.couple import AxisMap
from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import batch_size_of
from neuroexapt.measure.evidence import CAP, NEEDS, Evidence, Looker, Passing, entries
from neuroexapt.measure.scores import Gates, gates_of, sums_along, sums_of_gates

EVERY = 50
STEPS = 16
ROWS = 1024


class Watch:
    """Watches one training step in `every`; :meth:`step` stands behind the optimizer's.

    Invariant: the training is bit for bit the one without it: nothing is drawn from a generator,
    nothing is written on the model, and between watched steps there is no hook. Memory: `cap`
    bytes for activations, 1,024 entries of each parameter for each of the last 16 watched steps.

    Gradients are read as backward leaves them, before clipping; of several backward passes in
    one step the sum counts. Parameters move between watched steps, so their scatter is noise plus
    a little of that. A compiled model runs past hooks on its modules: only gradients are seen.
    What cannot be read in a step is left out, with the reason in ``evidence().refused``.

    Args:
        model: the model, not wrapped.
        axes: its present map; after an edit call :meth:`renew`.
        every: one step in so many is watched.
        needs: some of ``"rows"``, ``"blocks"``, ``"gradients"``, ``"gates"``.
        scale: what the loss is multiplied with, for mixed precision: ``scaler.get_scale``.
        cap: bytes.

    Raises:
        MeasureError: unknown needs, or `every` below 1.

    Example:
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> watch = Watch(net, map_axes(net, (torch.zeros(2, 3),)), every=2)
        >>> for _ in range(9):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        ...     watch.step()
        >>> seen = watch.evidence()
        >>> seen.gates["0.out"].shape, seen.rows["0.out"].values_NC.shape
        (torch.Size([4, 4]), torch.Size([32, 4]))
    """

    def __init__(
        self,
        model: nn.Module,
        axes: AxisMap,
        *,
        every: int = EVERY,
        needs: Collection[str] = ("rows", "gradients", "gates"),
        scale: Callable[[], float] = lambda: 1.0,
        cap: int = CAP,
    ) -> None:
        unknown = [need for need in needs if need not in NEEDS or need == "targets"]
        if unknown or every < 1:
            raise MeasureError(
                "Watch",
                seen=f"every={every}, needs={list(needs)}",
                needed="every of 1 or more; rows, blocks, gradients, gates",
                next_step="targets are seen by gather(...), which runs the loss function",
            )
        self.model, self.every, self.needs = model, every, tuple(needs)
        self.scale, self.cap = scale, cap
        self._count = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.renew(axes)

    def renew(self, axes: AxisMap) -> None:
        """Start over with the map of an edited model; what was seen before is forgotten."""
        self._unhook()
        self.axes = axes
        self._looker = Looker(self.model, axes, self.needs, self.cap, ROWS)
        self._looker.training_only = True
        named = dict(self.model.named_parameters())
        self._gates: Gates = gates_of(axes, named) if "gates" in self.needs else {}
        self._rows: dict[str, deque[Tensor]] = {}
        self._sums: dict[str, deque[Tensor]] = {}
        self._batch_size = 0

    def step(self) -> None:
        """Count a step; end the watching of this one, or begin that of the next."""
        self._count += 1
        if self._handles:
            self._finish()
        if (self._count + 1) % self.every == 0 or self.every == 1:
            self._begin()

    def close(self) -> None:
        """Take the hooks of a watched step off; what was seen stays."""
        self._unhook()

    def held_bytes(self) -> int:
        """Bytes that it keeps at present, beside the model's own."""
        rows = [row for held in (*self._rows.values(), *self._sums.values()) for row in held]
        own = sum(row.numel() * row.element_size() for row in rows)
        return own + self._looker.held_bytes()

    def evidence(self) -> Evidence:
        """What was seen so far, for :func:`~neuroexapt.measure.registry.read_signals`."""
        rows, blocks = self._looker.seen()
        return Evidence(
            self.model,
            self.axes,
            batch_size=max(1, self._batch_size),
            rows=rows,
            blocks=blocks,
            gradients={name: torch.stack(list(held)) for name, held in self._rows.items()},
            sizes={name: p.numel() for name, p in self.model.named_parameters()},
            gates={name: torch.stack(list(held)) for name, held in self._sums.items()},
            refused=list(self._looker.refused.values()),
        )

    def _begin(self) -> None:
        self._seen: dict[str, Tensor] = {}
        self._along: dict[tuple[str, int], Tensor] = {}
        self._handles = self._looker.hook()
        self._handles.append(
            self.model.register_forward_pre_hook(Passing(self._count_samples), with_kwargs=True)
        )
        if not {"gradients", "gates"} & set(self.needs):
            return
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook = self._gradient_hook(name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _count_samples(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        try:
            samples = batch_size_of((args, kwargs))
        except MeasureError as error:  # no tensor goes in: rows belong to nobody
            samples, self._looker.refused[""] = 0, error
        self._batch_size = max(self._batch_size, samples)
        self._looker.next_batch(samples)

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            with torch.no_grad():
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                if "gradients" in self.needs:
                    self._seen[name] = entries(dense)
                self._along.update(sums_along(self._gates, name, dense, parameter))

        return look

    def _finish(self) -> None:
        self._unhook()
        unscale = 1.0 / self.scale()
        for name, row in self._seen.items():
            self._rows.setdefault(name, deque(maxlen=STEPS)).append(row * unscale)
        whole = {
            name: parts
            for name, parts in self._gates.items()
            if all((entry.tensor, entry.dim) in self._along for entry in parts)
        }
        for name, sums_U in sums_of_gates(self.axes, whole, self._along).items():
            self._sums.setdefault(name, deque(maxlen=STEPS)).append(sums_U * unscale)
        self._seen, self._along = {}, {}

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
