"""Convolutional nets with branches, splits and shuffles: what makes channels depend on others."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class DenseBottleneck(nn.Module):
    """torchvision's dense layer: takes the list of all features so far."""

    def __init__(self, num_input_features, growth_rate, bn_size, drop_rate):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, prev_features):
        concated_features = torch.cat(prev_features, 1)
        out = self.conv1(self.relu1(self.norm1(concated_features)))
        new_features = self.conv2(self.relu2(self.norm2(out)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, num_layers, num_input_features, growth_rate):
        super().__init__()
        for i in range(num_layers):
            layer = DenseBottleneck(num_input_features + i * growth_rate, growth_rate, 4, 0.1)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features):
        features = [init_features]
        for _name, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNetBC(nn.Module):
    def __init__(self, growth_rate=8, num_init_features=16):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, num_init_features, 3, padding=1))
        num_features = num_init_features
        for i in range(2):
            self.features.add_module(f"denseblock{i}", DenseBlock(3, num_features, growth_rate))
            num_features += 3 * growth_rate
            if i == 0:
                trans = nn.Sequential()
                trans.add_module("norm", nn.BatchNorm2d(num_features))
                trans.add_module("relu", nn.ReLU(inplace=True))
                trans.add_module("conv", nn.Conv2d(num_features, num_features // 2, 1, bias=False))
                trans.add_module("pool", nn.AvgPool2d(kernel_size=2, stride=2))
                self.features.add_module("transition", trans)
                num_features = num_features // 2
        self.features.add_module("norm5", nn.BatchNorm2d(num_features))
        self.classifier = nn.Linear(num_features, 10)

    def forward(self, x):
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class BasicConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    """The block of Inception v3, double 3x3 branch and pooled branch."""

    def __init__(self, in_channels, pool_features):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 16, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(in_channels, 12, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(12, 16, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 16, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(24, 24, kernel_size=(1, 3), padding=(0, 1))
        self.branch_pool = BasicConv2d(in_channels, pool_features, kernel_size=1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        outputs = [branch1x1, branch5x5, branch3x3dbl, branch_pool]
        return torch.cat(outputs, 1)


class InceptionReduction(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 24, kernel_size=3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class InceptionV3(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = BasicConv2d(3, 16, kernel_size=3)
        self.mixed_a = InceptionA(16, pool_features=8)
        self.mixed_b = InceptionReduction(64)
        self.mixed_c = InceptionA(88, pool_features=8)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.mixed_c(self.mixed_b(self.mixed_a(self.stem(x))))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = F.dropout(x, training=self.training)
        x = x.view(x.size(0), -1)
        return self.fc(x)


class AuxHead(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv = BasicConv2d(in_channels, 16, kernel_size=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 48)
        self.fc2 = nn.Linear(48, num_classes)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, (4, 4))
        x = self.conv(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(F.dropout(x, 0.7, training=self.training))


class GoogLeNet(nn.Module):
    """An auxiliary classifier that speaks in training mode only."""

    def __init__(self, num_classes=10, aux_logits=True):
        super().__init__()
        self.aux_logits = aux_logits
        self.conv1 = BasicConv2d(3, 16, kernel_size=3, padding=1)
        self.inception3a = InceptionA(16, 8)
        self.inception3b = InceptionA(64, 8)
        if aux_logits:
            self.aux1 = AuxHead(64, num_classes)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        x = self.inception3a(x)
        aux_defined = self.training and self.aux_logits
        aux1 = self.aux1(x) if aux_defined else None
        x = self.inception3b(F.max_pool2d(x, 2))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        x = self.fc(self.dropout(x))
        if aux_defined:
            return x, aux1
        return x


class ShuffleBlock(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        """[N,C,H,W] -> [N,g,C/g,H,W] -> [N,C/g,g,H,w] -> [N,C,H,W]"""
        N, C, H, W = x.size()
        g = self.groups
        return x.view(N, g, C // g, H, W).permute(0, 2, 1, 3, 4).reshape(N, C, H, W)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; stride 2 concatenates the pooled input."""

    def __init__(self, in_planes, out_planes, stride, groups):
        super().__init__()
        self.stride = stride
        mid_planes = out_planes // 4
        g = 1 if in_planes == 24 else groups
        out = out_planes - in_planes if stride == 2 else out_planes
        self.conv1 = nn.Conv2d(in_planes, mid_planes, kernel_size=1, groups=g, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_planes)
        self.shuffle1 = ShuffleBlock(groups=g)
        self.conv2 = nn.Conv2d(
            mid_planes, mid_planes, 3, stride=stride, padding=1, groups=mid_planes, bias=False
        )
        self.bn2 = nn.BatchNorm2d(mid_planes)
        self.conv3 = nn.Conv2d(mid_planes, out, kernel_size=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.shuffle1(out)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        res = self.shortcut(x)
        return F.relu(torch.cat([out, res], 1)) if self.stride == 2 else F.relu(out + res)


class ShuffleNetV1(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = ShuffleUnitV1(24, 64, stride=2, groups=2)
        self.layer2 = ShuffleUnitV1(64, 64, stride=1, groups=2)
        self.layer3 = ShuffleUnitV1(64, 64, stride=1, groups=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, 8)
        out = out.view(out.size(0), -1)
        return self.linear(out)


def channel_shuffle(x, groups):
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnitV2(nn.Module):
    """torchvision's unit: chunk in two, work on one half, concatenate, shuffle."""

    def __init__(self, inp, oup, stride):
        super().__init__()
        self.stride = stride
        branch_features = oup // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, branch_features, kernel_size=1, bias=False),
                nn.BatchNorm2d(branch_features),
                nn.ReLU(inplace=True),
            )
        else:
            self.branch1 = nn.Sequential()
        first = inp if stride > 1 else branch_features
        self.branch2 = nn.Sequential(
            nn.Conv2d(first, branch_features, kernel_size=1, bias=False),
            nn.BatchNorm2d(branch_features),
            nn.ReLU(inplace=True),
            nn.Conv2d(
                branch_features, branch_features, 3, stride, 1, groups=branch_features, bias=False
            ),
            nn.BatchNorm2d(branch_features),
            nn.Conv2d(branch_features, branch_features, kernel_size=1, bias=False),
            nn.BatchNorm2d(branch_features),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.stage2 = nn.Sequential(
            ShuffleUnitV2(16, 32, 2), ShuffleUnitV2(32, 32, 1), ShuffleUnitV2(32, 32, 1)
        )
        self.conv5 = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.conv5(self.stage2(self.conv1(x)))
        x = x.mean([2, 3])
        return self.fc(x)


class Fire(nn.Module):
    def __init__(self, inplanes, squeeze_planes, expand1x1_planes, expand3x3_planes):
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze_planes, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze_planes, expand1x1_planes, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze_planes, expand3x3_planes, kernel_size=3, padding=1)
        self.expand_activation = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand_activation(self.expand1x1(x)), self.expand_activation(self.expand3x3(x))],
            1,
        )


class SqueezeNet(nn.Module):
    """Fire modules and a convolution as the classifier."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(32, 12, 24, 24),
            Fire(48, 12, 24, 24),
            Fire(48, 16, 32, 32),
        )
        final_conv = nn.Conv2d(64, num_classes, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)


class OctaveConv(nn.Module):
    """High and low frequency channels, four paths, nearest up-sampling."""

    def __init__(self, in_ch, out_ch, alpha=0.5):
        super().__init__()
        low_in, low_out = int(in_ch * alpha), int(out_ch * alpha)
        self.h2h = nn.Conv2d(in_ch - low_in, out_ch - low_out, 3, padding=1)
        self.h2l = nn.Conv2d(in_ch - low_in, low_out, 3, padding=1)
        self.l2h = nn.Conv2d(low_in, out_ch - low_out, 3, padding=1)
        self.l2l = nn.Conv2d(low_in, low_out, 3, padding=1)

    def forward(self, x):
        x_h, x_l = x
        h = self.h2h(x_h) + F.interpolate(self.l2h(x_l), scale_factor=2, mode="nearest")
        low = self.l2l(x_l) + self.h2l(F.avg_pool2d(x_h, 2))
        return h, low


class OctaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_h = nn.Conv2d(3, 16, 3, padding=1)
        self.first_l = nn.Conv2d(3, 16, 3, padding=1)
        self.oct1 = OctaveConv(32, 48)
        self.oct2 = OctaveConv(48, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        h, low = self.first_h(x), self.first_l(F.avg_pool2d(x, 2))
        h, low = self.oct1((F.relu(h), F.relu(low)))
        h, low = self.oct2((F.relu(h), F.relu(low)))
        return self.fc(torch.cat([h.mean((2, 3)), low.mean((2, 3))], dim=1))


IMAGE = given(normal(4, 3, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/densenet_bc", DenseNetBC, IMAGE),
    Case("plain/inception_v3", InceptionV3, IMAGE),
    Case("plain/googlenet_aux", GoogLeNet, IMAGE),
    Case("plain/shufflenet_v1", ShuffleNetV1, IMAGE),
    Case("plain/shufflenet_v2", ShuffleNetV2, IMAGE),
    Case("plain/squeezenet", SqueezeNet, IMAGE),
    Case("plain/octave_conv", OctaveNet, IMAGE),
)
