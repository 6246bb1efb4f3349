"""State and side effects: autograd functions, buffers, precision, memory, in-place writes."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class MishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.tanh(F.softplus(x))

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        sigmoid, tsp = torch.sigmoid(x), torch.tanh(F.softplus(x))
        return grad_output * (tsp + x * sigmoid * (1 - tsp * tsp))


class BinarizeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sign() * weight.abs().mean(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output


class CustomAutograd(nn.Module):
    """A custom activation and binary weights through autograd functions; a gradient clamp hook."""

    def __init__(self):
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(8, 32), nn.Linear(32, 48), nn.Linear(48, 2)

    def forward(self, x):
        x = MishFunction.apply(self.inp(x))
        if x.requires_grad:
            x.register_hook(lambda g: g.clamp(-1, 1))
        x = F.linear(x, BinarizeFunction.apply(self.mid.weight), self.mid.bias)
        return self.out(MishFunction.apply(x))


class RunningNorm(nn.Module):
    """A batch norm by hand: buffers of the width, updated in place under no_grad, assigned back."""

    def __init__(self, num_features, momentum=0.9):
        super().__init__()
        shape = (1, num_features, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.moving_mean, self.moving_var = torch.zeros(shape), torch.ones(shape)
        self.register_buffer("steps", torch.zeros(1))
        self.momentum = momentum

    def forward(self, X):
        if self.moving_mean.device != X.device:
            self.moving_mean = self.moving_mean.to(X.device)
            self.moving_var = self.moving_var.to(X.device)
        if not self.training:
            X_hat = (X - self.moving_mean) / torch.sqrt(self.moving_var + 1e-5)
        else:
            mean = X.mean(dim=(0, 2, 3), keepdim=True)
            var = ((X - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
            X_hat = (X - mean) / torch.sqrt(var + 1e-5)
            with torch.no_grad():
                self.steps += 1
                self.moving_mean = self.momentum * self.moving_mean + (1 - self.momentum) * mean
                self.moving_var = self.momentum * self.moving_var + (1 - self.momentum) * var
        return self.gamma * X_hat + self.beta


class D2LNet(nn.Module):
    """d2l's LeNet with its batch norm from scratch: the statistics are plain attributes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5), RunningNorm(16), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Conv2d(16, 24, kernel_size=3), RunningNorm(24), nn.Sigmoid(), nn.Flatten(),
            nn.Linear(24 * 4 * 4, 32), nn.Sigmoid(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 16, 16))


class FeatureMaskNet(nn.Module):
    """Buffers derived from widths: a random mask of units, an arange, a running centre."""

    def __init__(self, hidden=32):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(8, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 4),
        )
        self.register_buffer("mask", (torch.rand(hidden) > 0.2).float())
        self.register_buffer("center", torch.zeros(hidden))
        self.register_buffer("weight_mask", torch.ones_like(self.fc2.weight))

    def forward(self, x):
        h = torch.relu(self.fc1(x)) * self.mask
        if self.training:
            self.center.mul_(0.9).add_(0.1 * h.detach().mean(0))
        h = F.linear(h - self.center, self.fc2.weight * self.weight_mask, self.fc2.bias)
        return self.fc3(torch.relu(h))


def lazy_net():
    """Lazy modules, made real by a dry run."""
    net = nn.Sequential(
        nn.LazyConv2d(24, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.LazyLinear(48), nn.ReLU(), nn.LazyLinear(5),
    )  # fmt: skip
    net(torch.zeros(2, 3, 8, 8))
    return net


class MixedPrecision(nn.Module):
    """autocast inside the forward, a part kept in float32, half casts by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 5)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.relu(self.conv(x)).mean((2, 3))
            x = F.relu(self.fc1(x))
        with torch.autocast("cpu", enabled=False):
            return self.fc2(x.float())


def channels_last_net():
    """Memory format by .to, strides that are not contiguous, flatten behind."""
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU(True), nn.Conv2d(24, 32, 3, 2, 1),
        nn.ReLU(True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


class InPlace(nn.Module):
    """In-place arithmetic, slices written, out= arguments, clamp_ and masked assignment."""

    def __init__(self, dim=32):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(9, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = self.fc1(x)
        x.mul_(self.scale).add_(0.5).clamp_(min=0)
        out = torch.empty_like(x)
        out[:] = self.fc2(x)
        out[x > 2] = 0
        buf = torch.zeros(x.size(0), 2, x.size(1))
        buf[:, 0] = out
        buf[:, 1, :] += x
        return self.fc3(buf.sum(dim=1).relu_())


class Checkpointed(nn.Module):
    """torch.utils.checkpoint on blocks and on a sequential."""

    def __init__(self, dim=32):
        super().__init__()
        self.inp = nn.Linear(9, dim)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 48), nn.ReLU(), nn.Linear(48, dim)) for _ in range(2)]
        )
        self.tail = nn.Sequential(nn.Linear(dim, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return checkpoint_sequential(self.tail, 2, x, use_reentrant=False)


class UnusedLayer(nn.Module):
    """Left over from an experiment: a head and a projection that nothing calls."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(11, 40), nn.Linear(40, 24), nn.Linear(24, 3)
        self.old_head = nn.Linear(24, 7)
        self.debug = None

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


CASES: tuple[Case, ...] = (
    Case("plain/custom_autograd", CustomAutograd, given(normal(5, 8))),
    Case("plain/d2l_batch_norm", D2LNet, given(normal(4, 1, 16, 16))),
    Case("plain/buffers_of_widths", FeatureMaskNet, given(normal(5, 8))),
    Case("plain/lazy_modules", lazy_net, given(normal(4, 3, 8, 8))),
    Case("plain/autocast_inside", MixedPrecision, given(normal(4, 3, 8, 8))),
    Case("plain/channels_last", channels_last_net, given(normal(4, 3, 8, 8))),
    Case("plain/in_place", InPlace, given(normal(5, 9))),
    Case("plain/checkpointing", Checkpointed, given(normal(5, 9))),
    Case("plain/unused_layer", UnusedLayer, given(normal(5, 11))),
)
