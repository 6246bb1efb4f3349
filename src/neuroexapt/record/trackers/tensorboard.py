"""A run in TensorBoard."""

from __future__ import annotations

import os
from typing import Any

from neuroexapt.record.story import Event
from neuroexapt.record.trackers.told import needed, scalars, sentence, settings, step_of


class TensorBoard:
    """Writes scalars, decisions as texts and settings as TensorBoard event files.

    Args:
        to: a folder for the event files, or a ``SummaryWriter`` that is there already, which is
            flushed in the end and not closed.

    Raises:
        SettingsError: the package tensorboard is not installed (extra ``tensorboard``).

    Names in TensorBoard are ``neuroexapt/holdout_loss`` and the like; readings of layers are
    ``neuroexapt/effective_rank/features.0.out``.
    """

    failures = (OSError,)

    def __init__(self, to: str | os.PathLike[str] | Any) -> None:
        self._own = isinstance(to, str | os.PathLike)
        if self._own:
            to = needed("torch.utils.tensorboard", "tensorboard").SummaryWriter(os.fspath(to))
        self._writer: Any = to
        self._step = 0

    def take(self, event: Event) -> None:
        """Write one event and flush."""
        self._step = step_of(event, self._step)
        for name, value in scalars(event).items():
            self._writer.add_scalar(f"neuroexapt/{name}", value, self._step)
        said = sentence(event)
        if said:
            self._writer.add_text("neuroexapt/decisions", _plain(said), self._step)
        told = settings(event)
        if told:
            rows = [f"- {_plain(name)}: {_plain(value)}" for name, value in told.items()]
            self._writer.add_text("neuroexapt/run", "\n".join(rows), self._step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer, if it is ours."""
        if self._own:
            self._writer.close()
        else:
            self._writer.flush()


def _plain(words: str) -> str:
    """TensorBoard shows texts as Markdown; names such as ``a_b_c`` are not meant as such."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+!|" else sign for sign in words)
