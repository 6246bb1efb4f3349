"""Recurrent networks and cells as the one call that they are, rather than gate by gate.

torch takes most of them apart into a dozen operators for each layer and step before an operator
is seen, and which ones depends on device, dtype and options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NETWORKS = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_CELLS = frozenset({torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell})


class Whole(TorchFunctionMode):
    """Hands each recurrent network and cell to ``record``, with a function that runs it.

    Args:
        record: called with operator, overload, arguments and that function; returns its result.
        fake: tensors hold no values, so that one step says all that there is to know.
    """

    def __init__(
        self, record: Callable[[str, str, Any, Callable[[], Any]], Any], *, fake: bool
    ) -> None:
        super().__init__()
        self._record, self._fake = record, fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._fake and func is Tensor.data_ptr:
            return 0  # as torch answers, with a warning: recurrent modules ask on an accelerator
        if func not in _NETWORKS | _CELLS or kwargs:
            return func(*args, **kwargs)
        op, overload, one_step = f"aten.{func.__name__}", "default", False
        if func in _NETWORKS:
            packed = isinstance(args[3], (tuple, list))  # data, sizes and states, then weights
            overload = "data" if packed else "input"
            one_step = self._fake and not packed
        run = partial(_one_step, func) if one_step else func
        return self._record(op, overload, args, lambda: run(*args))


def _one_step(network: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """The network on the first step alone, its output made as long as the input."""
    time = 1 if rest[-1] else 0
    out, *states = network(x.narrow(time, 0, 1), *rest)
    shape = list(out.shape)
    shape[time] = x.shape[time]
    return (out.new_empty(shape), *states)
