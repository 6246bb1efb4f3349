"""Efficient convolutional nets: depthwise convolutions, squeeze-excite, re-parameterisation."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


def conv_bn(inp, oup, stride):
    return nn.Sequential(
        nn.Conv2d(inp, oup, 3, stride, 1, bias=False),
        nn.BatchNorm2d(oup),
        nn.ReLU(inplace=True),
    )


def conv_dw(inp, oup, stride):
    return nn.Sequential(
        nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
        nn.BatchNorm2d(inp),
        nn.ReLU(inplace=True),
        nn.Conv2d(inp, oup, 1, 1, 0, bias=False),
        nn.BatchNorm2d(oup),
        nn.ReLU(inplace=True),
    )


class MobileNetV1(nn.Module):
    """A chain of depthwise and pointwise pairs; the head reshapes by a number."""

    def __init__(self, ch_in=3, n_classes=10):
        super().__init__()
        self.model = nn.Sequential(
            conv_bn(ch_in, 16, 2),
            conv_dw(16, 32, 1),
            conv_dw(32, 48, 2),
            conv_dw(48, 48, 1),
            conv_dw(48, 64, 1),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x):
        x = self.model(x)
        x = x.view(-1, 64)
        return self.fc(x)


def _make_divisible(v, divisor, min_value=None):
    if min_value is None:
        min_value = divisor
    new_v = max(min_value, int(v + divisor / 2) // divisor * divisor)
    if new_v < 0.9 * v:
        new_v += divisor
    return new_v


class InvertedResidualV2(nn.Module):
    """tonylins: the expansion is left out where the ratio is 1."""

    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.identity = stride == 1 and inp == oup
        layers = []
        if expand_ratio != 1:
            layers += [
                nn.Conv2d(inp, hidden_dim, 1, 1, 0, bias=False),
                nn.BatchNorm2d(hidden_dim),
                nn.ReLU6(inplace=True),
            ]
        layers += [
            nn.Conv2d(hidden_dim, hidden_dim, 3, stride, 1, groups=hidden_dim, bias=False),
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        if self.identity:
            return x + self.conv(x)
        else:
            return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, width_mult=1.0):
        super().__init__()
        self.cfgs = [[1, 16, 1, 1], [3, 24, 2, 2], [3, 32, 2, 1]]
        input_channel = _make_divisible(16 * width_mult, 8)
        layers = [conv_bn(3, input_channel, 1)]
        for t, c, n, s in self.cfgs:
            output_channel = _make_divisible(c * width_mult, 8)
            for i in range(n):
                stride = s if i == 0 else 1
                layers.append(InvertedResidualV2(input_channel, output_channel, stride, t))
                input_channel = output_channel
        self.features = nn.Sequential(*layers)
        self.conv = nn.Sequential(
            nn.Conv2d(input_channel, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6(inplace=True)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x):
        x = self.features(x)
        x = self.conv(x)
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


class h_swish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3, inplace=True) / 6


class SELayer(nn.Module):
    """moskomule's squeeze-excite: view(b, c) and view(b, c, 1, 1)."""

    def __init__(self, channel, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, _make_divisible(channel // reduction, 8)),
            nn.ReLU(inplace=True),
            nn.Linear(_make_divisible(channel // reduction, 8), channel),
            nn.Hardsigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class MobileNetV3Block(nn.Module):
    def __init__(self, inp, hidden_dim, oup, kernel_size, stride, use_se, use_hs):
        super().__init__()
        self.identity = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden_dim, 1, 1, 0, bias=False),
            nn.BatchNorm2d(hidden_dim),
            h_swish() if use_hs else nn.ReLU(inplace=True),
            nn.Conv2d(
                hidden_dim,
                hidden_dim,
                kernel_size,
                stride,
                (kernel_size - 1) // 2,
                groups=hidden_dim,
                bias=False,
            ),
            nn.BatchNorm2d(hidden_dim),
            SELayer(hidden_dim) if use_se else nn.Identity(),
            h_swish() if use_hs else nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x):
        return x + self.conv(x) if self.identity else self.conv(x)


class MobileNetV3(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 16, 1),
            MobileNetV3Block(16, 32, 16, 3, 1, use_se=True, use_hs=False),
            MobileNetV3Block(16, 48, 24, 5, 2, use_se=False, use_hs=True),
            MobileNetV3Block(24, 64, 24, 5, 1, use_se=True, use_hs=True),
        )
        self.classifier = nn.Sequential(
            nn.Linear(24, 64), h_swish(), nn.Dropout(0.2), nn.Linear(64, 10)
        )

    def forward(self, x):
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)


class MBConv(nn.Module):
    """lukemelas' block: swish, convolutional squeeze-excite, drop connect on the branch."""

    def __init__(self, inp, oup, expand, stride, drop_connect_rate=0.2):
        super().__init__()
        mid = inp * expand
        self.skip = stride == 1 and inp == oup
        self.drop_connect_rate = drop_connect_rate
        self._expand_conv = nn.Conv2d(inp, mid, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(mid, momentum=0.01, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self._bn1 = nn.BatchNorm2d(mid, momentum=0.01, eps=1e-3)
        num_squeezed_channels = max(1, int(inp * 0.25))
        self._se_reduce = nn.Conv2d(mid, num_squeezed_channels, 1)
        self._se_expand = nn.Conv2d(num_squeezed_channels, mid, 1)
        self._project_conv = nn.Conv2d(mid, oup, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(oup, momentum=0.01, eps=1e-3)

    def forward(self, inputs):
        x = F.silu(self._bn0(self._expand_conv(inputs)))
        x = F.silu(self._bn1(self._depthwise_conv(x)))
        x_squeezed = F.adaptive_avg_pool2d(x, 1)
        x_squeezed = self._se_expand(F.silu(self._se_reduce(x_squeezed)))
        x = torch.sigmoid(x_squeezed) * x
        x = self._bn2(self._project_conv(x))
        if self.skip:
            x = self.drop_connect(x) + inputs
        return x

    def drop_connect(self, x):
        if not self.training:
            return x
        keep_prob = 1 - self.drop_connect_rate
        random_tensor = keep_prob
        random_tensor += torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
        return x / keep_prob * torch.floor(random_tensor)


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self._bn0 = nn.BatchNorm2d(16, momentum=0.01, eps=1e-3)
        self._blocks = nn.ModuleList([MBConv(16, 16, 2, 1), MBConv(16, 24, 3, 2)])
        self._blocks.append(MBConv(24, 24, 2, 1))
        self._conv_head = nn.Conv2d(24, 64, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(64, momentum=0.01, eps=1e-3)
        self._fc = nn.Linear(64, 10)

    def forward(self, inputs):
        x = F.silu(self._bn0(self._conv_stem(inputs)))
        for idx, block in enumerate(self._blocks):
            x = block(x)
            if idx == 1:
                self.reduction = x.shape[-1]
        x = F.silu(self._bn1(self._conv_head(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1)
        return self._fc(x)


class GhostModule(nn.Module):
    """Half of the channels come from cheap depthwise convolutions; the surplus is sliced off."""

    def __init__(self, inp, oup, ratio=2, relu=True):
        super().__init__()
        self.oup = oup
        init_channels = -(-oup // ratio)
        new_channels = init_channels * (ratio - 1)
        act = nn.ReLU(inplace=True) if relu else nn.Sequential()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, init_channels, 1, bias=False), nn.BatchNorm2d(init_channels), act
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init_channels, new_channels, 3, 1, 1, groups=init_channels, bias=False),
            nn.BatchNorm2d(new_channels),
            act,
        )

    def forward(self, x):
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.oup, :, :]


class GhostNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 1)
        self.ghost1 = GhostModule(16, 48)
        self.ghost2 = GhostModule(48, 16, relu=False)
        self.ghost3 = GhostModule(16, 33)
        self.head = nn.Conv2d(33, 64, 1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.ghost2(self.ghost1(x))
        x = F.relu(self.head(F.max_pool2d(self.ghost3(x), 2)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class SeparableConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3, padding=1):
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, kernel_size, 1, padding, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, 1, 0, 1, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """Cadene's block: the list `rep` is edited before it becomes a Sequential."""

    def __init__(self, in_filters, out_filters, reps, strides=1, start_with_relu=True):
        super().__init__()
        self.skip = None
        if out_filters != in_filters or strides != 1:
            self.skip = nn.Conv2d(in_filters, out_filters, 1, stride=strides, bias=False)
            self.skipbn = nn.BatchNorm2d(out_filters)
        rep = []
        filters = in_filters
        for _ in range(reps):
            rep.append(nn.ReLU(inplace=True))
            rep.append(SeparableConv2d(filters, out_filters))
            rep.append(nn.BatchNorm2d(out_filters))
            filters = out_filters
        rep = rep[1:] if not start_with_relu else [nn.ReLU(inplace=False), *rep[1:]]
        if strides != 1:
            rep.append(nn.MaxPool2d(3, strides, 1))
        self.rep = nn.Sequential(*rep)

    def forward(self, inp):
        x = self.rep(inp)
        skip = self.skipbn(self.skip(inp)) if self.skip is not None else inp
        x += skip
        return x


class Xception(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.block1 = XceptionBlock(16, 32, 2, 2, start_with_relu=False)
        self.block2 = XceptionBlock(32, 32, 2)
        self.conv4 = SeparableConv2d(32, 64)
        self.bn4 = nn.BatchNorm2d(64)
        self.last_linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn4(self.conv4(self.block2(self.block1(x))))
        x = nn.ReLU(inplace=True)(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.size(0), -1)
        return self.last_linear(x)


IMAGE = given(normal(4, 3, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/mobilenet_v1", MobileNetV1, IMAGE),
    Case("plain/mobilenet_v2", MobileNetV2, IMAGE),
    Case("plain/mobilenet_v3", MobileNetV3, IMAGE),
    Case("plain/efficientnet", EfficientNet, IMAGE),
    Case("plain/ghostnet", GhostNet, IMAGE),
    Case("plain/xception", Xception, IMAGE),
)
