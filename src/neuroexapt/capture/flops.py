"""FLOPs of a recorded run, from shapes alone: no forward, no memory."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch.utils.flop_counter import conv_flop_count

from neuroexapt.capture.trace import Call, TensorRef, Trace


def flops_of(trace: Trace) -> int:
    """FLOPs of one sample's forward, as :func:`~neuroexapt.measure.count_flops` counts them.

    Matrix products, convolutions, attention and recurrent networks; one multiply-add counts 2.
    The batch size is the first dimension of the first input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt.capture import capture
        >>> flops_of(capture(nn.Linear(3, 5), (torch.zeros(7, 3),)))
        30
    """
    return sum(map(flops_of_call, trace.calls)) // batch_of(trace)


def flops_of_call(call: Call) -> int:
    """FLOPs of one operator call on the whole batch; 0 where none are counted."""
    return _FORMULAS[call.op](call) if call.op in _FORMULAS else 0


def batch_of(trace: Trace) -> int:
    """The number of samples: the first dimension of the first input."""
    return max(1, trace.inputs[0].shape[0] if trace.inputs and trace.inputs[0].shape else 1)


def _matrix_product(call: Call) -> int:
    left, right = call.inputs[-2:]
    return 2 * prod(left.shape) * right.shape[-1]


def _linear(call: Call) -> int:
    return 2 * prod(call.inputs[0].shape) * call.inputs[1].shape[0]


def _convolution(call: Call) -> int:
    x, weight = call.inputs[:2]
    transposed = bool(call.args[6])
    return conv_flop_count(
        list(x.shape), list(weight.shape), list(call.outputs[0].shape), transposed
    )


def _attention(call: Call) -> int:
    query, key, value = call.inputs[:3]
    rows = prod(query.shape[:-1])
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(call: Call) -> int:
    """Every matrix (the arguments of two dimensions) once a step and sequence."""
    x, *rest = call.inputs
    return 2 * prod(x.shape[:-1]) * sum(prod(ref.shape) for ref in rest if len(ref.shape) == 2)


def _recurrent_cell(call: Call) -> int:
    matrices: tuple[TensorRef, ...] = call.args[2:4]
    return 2 * prod(call.inputs[0].shape[:-1]) * sum(prod(ref.shape) for ref in matrices)


_ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math",
    "aten.scaled_dot_product_attention",
)
_CELLS = ("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
_FORMULAS: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"), _matrix_product),
    **dict.fromkeys(_ATTENTION, _attention),
    **dict.fromkeys(("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"), _recurrent),
    **dict.fromkeys(_CELLS, _recurrent_cell),
    "aten.linear": _linear,
    "aten.convolution": _convolution,
}
