"""Attention modules that start as the identity: each multiplies by one, or adds zero, at first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FEWEST = 4  # hidden units: a single one may be dead under its ReLU


def squeezed(channels: int, reduction: int) -> int:
    """Hidden units of a squeeze: a share of the channels, and not too few to learn.

    Example:
        >>> squeezed(64, 16), squeezed(256, 16), squeezed(2, 16)
        (4, 16, 2)
    """
    return max(channels // reduction, min(channels, _FEWEST))


def _doubled_sigmoid(logits: Tensor) -> Tensor:
    """One where the logits are zero, between 0 and 2."""
    return 2 * torch.sigmoid(logits)


class SqueezeExcite(nn.Module):
    """One gate a channel, from the mean of every channel: ``x * 2 sigmoid(W2 relu(W1 mean(x)))``.

    ``W2`` and its bias start at zero, so every gate starts at one.

    Args:
        channels: channels of the input.
        hidden: units between.
        channel: the dimension that holds them, 1 or the last.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.equal(SqueezeExcite(8, 2, channel=1)(x), x)
        True

    Hu et al. 2018.
    """

    def __init__(self, channels: int, hidden: int, channel: int) -> None:
        super().__init__()
        self.channel = channel
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) or (N, ..., C) to the same shape."""
        others = [dim for dim in range(1, x.dim()) if dim != self.channel]
        gate = _doubled_sigmoid(self.expand(F.relu(self.reduce(x.mean(others)))))
        for dim in others:
            gate = gate.unsqueeze(dim)
        return x * gate

    def extra_repr(self) -> str:
        return f"channel={self.channel}"


class SpatialGate(nn.Module):
    """One gate a place: ``x * 2 sigmoid(conv(relu(squeeze(x))))``, the last convolution zero.

    The squeeze is a learned 1x1 convolution, so that no other width of the model is mixed.

    Args:
        channels: channels of the input (N, C, ...).
        hidden: channels between.
        spatial: number of spatial dimensions, 1 to 3.
        kernel: odd size of the last convolution.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.equal(SpatialGate(8, 2, spatial=2, kernel=7)(x), x)
        True

    The spatial branch of Park et al. 2018 (BAM).
    """

    def __init__(self, channels: int, hidden: int, spatial: int, kernel: int) -> None:
        super().__init__()
        self.squeeze = _CONV[spatial](channels, hidden, 1)
        self.gate = _zero_conv(hidden, spatial, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        return x * _doubled_sigmoid(self.gate(F.relu(self.squeeze(x))))


class ConvBlockAttention(nn.Module):
    """Channel gates from mean and maximum over space, then place gates from both over channels.

    Both last layers start at zero, so every gate starts at one. The mean and the maximum are
    taken over all channels: the width of the input can be narrowed, not widened exactly.

    Args:
        channels: channels of the input (N, C, ...).
        hidden: units between.
        spatial: number of spatial dimensions, 1 to 3.
        kernel: odd size of the convolution over places.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.equal(ConvBlockAttention(8, 2, spatial=2, kernel=7)(x), x)
        True

    Woo et al. 2018 (CBAM).
    """

    def __init__(self, channels: int, hidden: int, spatial: int, kernel: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        self.place = _zero_conv(2, spatial, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        space = list(range(2, x.dim()))
        both = F.relu(self.reduce(x.mean(space))) + F.relu(self.reduce(x.amax(space)))
        gate = _doubled_sigmoid(self.expand(both))
        for dim in space:
            gate = gate.unsqueeze(dim)
        x = x * gate
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * _doubled_sigmoid(self.place(seen))


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions; its output layer starts at zero.

    Args:
        channels: channels of the input.
        heads: heads; they divide the channels.
        channel: the dimension that holds the channels, 1 or the last.
        causal: whether a position sees itself and earlier ones alone.

    Example:
        >>> attention = SelfAttention(8, heads=2, channel=1, causal=False)
        >>> attention(torch.randn(2, 8, 4, 4)).abs().max().item()
        0.0

    Vaswani et al. 2017; on maps Wang et al. 2018 (non-local networks).
    """

    def __init__(self, channels: int, heads: int, channel: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.channel, self.causal = heads, channel, causal
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) or (N, ..., C) to the same shape."""
        last = x.movedim(1, -1) if self.channel == 1 else x
        tokens = last.flatten(1, -2)
        batch, count = tokens.shape[:2]

        def split(rows: Tensor) -> Tensor:
            return rows.view(batch, count, self.heads, -1).transpose(1, 2)

        seen: Tensor = F.scaled_dot_product_attention(
            split(self.query(tokens)),
            split(self.key(tokens)),
            split(self.value(tokens)),
            is_causal=self.causal,
        )
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2)).reshape(last.shape)
        return out.movedim(-1, 1) if self.channel == 1 else out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, channel={self.channel}, causal={self.causal}"


def _zero_conv(channels: int, spatial: int, kernel: int) -> nn.Module:
    """A convolution to one map that starts at zero."""
    conv = _CONV[spatial](channels, 1, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
