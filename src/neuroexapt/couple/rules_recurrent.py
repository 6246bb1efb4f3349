"""Recurrent kernels: a whole sequence in one call, fused cells, packed sequences.

Gates are row blocks of equal size, ``gates * hidden`` with the number of gates pinned. The
hidden width is one axis over all layers and directions: the modules hold one number for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from neuroexapt.capture import TensorRef, refs_in
from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims, Label
from neuroexapt.couple.site import Draft, Site, place_of, rule

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_BY_NUMBER = ("rnn", "rnn", "lstm", "gru")  # as kernels name them: ReLU, tanh, LSTM, GRU


@dataclass(frozen=True)
class _Network:
    """What one call computes: its input, initial states, and the weights of all its layers."""

    kind: str
    x: TensorRef
    states: tuple[TensorRef, ...]
    weights: tuple[TensorRef, ...]
    hidden: int
    biased: bool
    layers: int = 1
    directions: int = 1
    packed: bool = False

    def level(self, number: int) -> list[tuple[TensorRef, ...]]:
        """The weights of one layer, for each direction."""
        each = len(self.weights) // (self.layers * self.directions)
        start = number * self.directions * each
        ends = range(start, start + self.directions * each, each)
        return [self.weights[at : at + each] for at in ends]


def _sequence(site: Site, net: _Network) -> list[Dims]:
    """Couple every layer; the axes of the output, of the final states and of what follows."""
    for axis in site.dims(net.x)[: 1 if net.packed else -1]:
        site.pin(axis, "steps of a sequence")
    # A layer puts out its first state: the hidden width, or what that is projected to.
    out, hidden = site.axis(net.states[0], -1), site.free(net.hidden)
    # Units keep something of the state they start with, and so stem from its makers too.
    incoming, origin = site.axis(net.x, -1), _makers(site, net.states)
    for number in range(net.layers):
        for weights in net.level(number):
            origin |= _layer(site, net, weights, (incoming, hidden, out))
        incoming = algebra.concat([out] * net.directions)
    if len(net.states) > 1:
        site.same(site.axis(net.states[1], -1), hidden)
    return _results(site, net, incoming, origin)


def _layer(
    site: Site, net: _Network, weights: Sequence[TensorRef], axes: tuple[Axis, Axis, Axis]
) -> frozenset[Label]:
    """One layer in one direction; returns what its output stems from."""
    incoming, hidden, out = axes
    makers, rest = weights[:2], list(weights[2:])
    biases = [rest.pop(0) for _ in range(2)] if net.biased else []
    rows = _rows(site, _GATES[net.kind], hidden)
    for ref, columns in zip(makers, (incoming, out), strict=True):
        site.same(site.axis(ref, 0), rows)
        site.same(site.axis(ref, 1), columns)
        site.contract(ref, [-1])
    for ref in biases:
        site.same(site.axis(ref, 0), rows)
        site.role(ref, 0, "elementwise", "zero")
    if not rest:
        site.same(hidden, out)
        return place_of([site.labels(ref)[0] for ref in (*makers, *biases)])
    site.same(site.axis(rest[0], 0), out)
    site.same(site.axis(rest[0], 1), hidden)
    site.contract(rest[0], [-1])
    return site.labels(rest[0])[0]


def _makers(site: Site, refs: Sequence[TensorRef]) -> frozenset[Label]:
    return place_of([site.labels(ref)[-1] for ref in refs])


def _rows(site: Site, gates: int, hidden: Axis) -> Axis:
    if gates == 1:
        return hidden
    return algebra.product([site.fixed(gates, "a number of gates"), hidden])


def _results(site: Site, net: _Network, last: Axis, origin: frozenset[Label]) -> list[Dims]:
    out, *others = site.call.outputs
    _stems_from(site, out, origin)
    results: list[Dims] = [(*site.dims(net.x)[:-1], last)]
    for ref, given in zip(others, net.states, strict=False):
        for axis in site.dims(given)[:-2]:
            site.pin(axis, "a number of layers and directions")
        _stems_from(site, ref, origin)
        results.append(site.dims(given))
    kept = others[len(net.states) :]  # for the kernel's own backward: met by nobody
    return [*results, *(tuple(site.free(n) for n in ref.shape) for ref in kept)]


def _stems_from(site: Site, ref: TensorRef, origin: frozenset[Label]) -> None:
    site.set_labels(ref, (*(frozenset[Label](),) * (len(ref.shape) - 1), origin))


@rule("aten.mkldnn_rnn_layer")
def mkldnn_layer(site: Site) -> list[Dims]:
    """One layer in one direction: x (T, B, i), states (B, h) -> (T, B, h), states."""
    x, rows, columns, *biases, h, c = site.call.args[:7]
    biased = bool(site.arg(12, "has_biases"))
    kind = _BY_NUMBER[int(site.arg(9, "mode"))]
    weights = (rows, columns, *(biases if biased else ()))
    states = (h, c) if kind == "lstm" else (h,)
    net = _Network(kind, x, states, weights, int(site.arg(10, "hidden_size")), biased)
    return _sequence(site, net)


@rule("aten._cudnn_rnn", "aten.miopen_rnn")
def vendor_network(site: Site) -> list[Dims]:
    """All layers; the weights in a list, for cuDNN perhaps once more in one flat buffer."""
    args = list(site.call.args)
    if site.call.op == "aten._cudnn_rnn":
        del args[8], args[3]  # the projected size, the flat buffer
    x, listed, stride, h, c, mode, hidden, layers, _, _, _, bidirectional, sizes = args[:13]
    kind = _BY_NUMBER[int(mode)]
    net = _Network(
        kind,
        x,
        (h, c) if kind == "lstm" else (h,),
        tuple(refs_in(listed)),
        int(hidden),
        biased=int(stride) > 3,
        layers=int(layers),
        directions=2 if bidirectional else 1,
        packed=bool(sizes),
    )
    return _sequence(site, net)


@rule("aten.lstm", "aten._lstm_mps", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def network(site: Site) -> list[Dims]:
    """All layers, before they are taken apart; ``data`` is the form for packed sequences."""
    packed = site.call.overload == "data"
    args = list(site.call.args)
    if packed:
        del args[1]  # the batch sizes
    x, given, listed, biased, layers, _, _, bidirectional = args[:8]
    states, weights = tuple(refs_in(given)), tuple(refs_in(listed))
    kind = "lstm" if len(states) > 1 else "gru" if site.call.op == "aten.gru" else "rnn"
    net = _Network(
        kind,
        x,
        states,
        weights,
        weights[0].shape[0] // _GATES[kind],
        bool(biased),
        int(layers),
        2 if bidirectional else 1,
        packed,
    )
    return _sequence(site, net)


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def cell(site: Site) -> list[Dims]:
    """One step: x (B, i), states (B, h) -> the next states."""
    x, given, *weights = site.call.args
    states, present = tuple(refs_in(given)), tuple(refs_in(weights))
    kind = "lstm" if len(states) > 1 else "gru" if site.call.op == "aten.gru_cell" else "rnn"
    width = site.axis(states[0], -1)
    net = _Network(kind, x, states, present, width.size, biased=len(present) > 2)
    origin = _layer(site, net, present, (site.axis(x, -1), width, width))
    origin |= _makers(site, states)
    for ref in states:
        site.same(site.axis(ref, -1), width)
    for ref in site.call.outputs:
        _stems_from(site, ref, origin)
    return [site.dims(ref) for ref in states]


@rule("aten._thnn_fused_lstm_cell", "aten._thnn_fused_gru_cell")
def fused_cell(site: Site) -> list[Dims]:
    """Gates made of the input and of the state (B, g*h), a state (B, h) -> the next states."""
    from_input, from_state, state, *biases = site.call.inputs
    out, *others = site.call.outputs
    width = site.axis(state, -1)
    gates = from_input.shape[-1] // width.size
    rows = _rows(site, gates, width)
    for ref in (from_input, from_state, *biases):
        site.same(site.axis(ref, -1), rows)
    for ref in biases:
        site.role(ref, 0, "elementwise", "zero")
    origin = _makers(site, (from_input, from_state, state, *biases))
    results = [site.dims(state)]
    for ref in site.call.outputs:
        _stems_from(site, ref, origin)
    for ref in others:
        each = site.dims(state) if ref.shape == out.shape else tuple(map(site.free, ref.shape))
        results.append(each)
    return results


@rule("aten._pack_padded_sequence")
def pack(site: Site) -> list[Dims]:
    """(B, T, ...) and lengths -> (steps, ...), and the number of sequences at each step."""
    x, lengths = site.call.inputs[:2]
    for axis in (*site.dims(x)[:2], *site.dims(lengths)):
        site.pin(axis, "lengths of sequences")
    data, sizes = site.call.outputs
    site.set_labels(data, (frozenset(), *site.labels(x)[2:]))
    steps, count = site.fixed(data.shape[0], "steps"), site.fixed(sizes.shape[0], "steps")
    return [(steps, *site.dims(x)[2:]), (count,)]


@rule("aten._pad_packed_sequence")
def unpack(site: Site) -> list[Dims]:
    """(steps, ...) and the number of sequences at each step -> (B, T, ...), lengths."""
    data, sizes = site.call.inputs[:2]
    for axis in (site.axis(data, 0), site.axis(sizes, 0)):
        site.pin(axis, "lengths of sequences")
    x, lengths = site.call.outputs
    nowhere = frozenset[Label]()
    site.set_labels(x, (nowhere, nowhere, *site.labels(data)[1:]))
    first = [site.fixed(n, "lengths of sequences") for n in (*x.shape[:2], lengths.shape[0])]
    return [(*first[:2], *site.dims(data)[1:]), (first[2],)]


def fields(module: nn.Module) -> Mapping[str, tuple[str, int]]:
    """Attributes of a recurrent module that repeat a dimension of one of its own tensors."""
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}
    if not isinstance(module, nn.RNNBase):
        return {}
    if module.proj_size:
        state = {"hidden_size": ("weight_hr_l0", 1), "proj_size": ("weight_hr_l0", 0)}
    else:
        state = {"hidden_size": ("weight_hh_l0", 1)}
    return {"input_size": ("weight_ih_l0", 1), **state}


def settle_first_steps(draft: Draft) -> None:
    """What makes units is no shift, though it looks like one where a state starts as zeros.

    The product of such a state and a weight is made of no input and is added to one that is.
    """
    makers = {
        (mark.label.name, mark.label.dim, atom)
        for mark in draft.marks
        if mark.role == "producer"
        for atom in algebra.atoms(mark.axis)
    }
    for mark in [mark for mark in draft.marks if mark.role == "elementwise"]:
        places = {(mark.label.name, mark.label.dim, atom) for atom in algebra.atoms(mark.axis)}
        if places <= makers:
            del draft.marks[mark]
