"""Convolutional classifiers as they stand in tutorials, notebooks and papers' repositories."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class LeNet(nn.Module):
    """The 60-minute blitz, with the flattened size computed by hand from the shape."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

    def num_flat_features(self, x):
        size = x.size()[1:]
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


class MnistNet(nn.Module):
    """The old MNIST example: conv dropout, and a view with the size as a number."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


CFG = {
    "tiny": [16, "M", 32, 32, "M", 64, "M"],
    "bn": [24, 24, "M", 48, "M", 64, 64, "M"],
}


def make_layers(cfg, batch_norm=False):
    layers = []
    in_channels = 3
    for v in cfg:
        if v == "M":
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            conv2d = nn.Conv2d(in_channels, v, kernel_size=3, padding=1)
            if batch_norm:
                layers += [conv2d, nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
            else:
                layers += [conv2d, nn.ReLU(inplace=True)]
            in_channels = v
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """torchvision's layout: features, adaptive pool, torch.flatten, classifier, initialisation."""

    def __init__(self, cfg="bn", num_classes=10):
        super().__init__()
        self.features = make_layers(CFG[cfg], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(64 * 2 * 2, 96),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(96, 64),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(64, num_classes),
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(m.bias, 0)

    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class VGGCifar(nn.Module):
    """pytorch-cifar: no adaptive pool, view(out.size(0), -1), one linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            make_layers(CFG["tiny"]), nn.AvgPool2d(kernel_size=1, stride=1)
        )
        self.classifier = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x):
        out = self.features(x)
        out = out.view(out.size(0), -1)
        out = self.classifier(out)
        return out


class CifarQuickNet(nn.Module):
    """A notebook classic: three convolutions, then view(-1, 64 * 4 * 4)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = self.pool(F.relu(self.conv3(x)))
        x = x.view(-1, 64 * 4 * 4)
        x = self.dropout(x)
        x = F.relu(self.fc1(x))
        x = self.dropout(x)
        return self.fc2(x)


class LambdaLayer(nn.Module):
    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class OptionABlock(nn.Module):
    """akamaster/pytorch_resnet_cifar10: the shortcut drops pixels and pads channels with zeros."""

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(
                lambda x: F.pad(
                    x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0
                )
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNetCifar(nn.Module):
    def __init__(self, block, num_blocks, num_classes=10):
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(block, 16, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(block, 32, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(block, 64, num_blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)

    def _make_layer(self, block, planes, num_blocks, stride):
        strides = [stride] + [1] * (num_blocks - 1)
        layers = []
        for stride in strides:
            layers.append(block(self.in_planes, planes, stride))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class ProjectionBlock(OptionABlock):
    """Option B: a 1x1 convolution on the shortcut."""

    def __init__(self, in_planes, planes, stride=1):
        super().__init__(in_planes, planes, stride)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes),
            )


class WideBlock(nn.Module):
    """xternalz/WideResNet: pre-activation, equalInOut, dropout inside the block."""

    def __init__(self, in_planes, out_planes, stride, drop_rate=0.3):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        self.droprate = drop_rate
        self.equalInOut = in_planes == out_planes
        self.convShortcut = (
            not self.equalInOut and nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)
        ) or None

    def forward(self, x):
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self, widen_factor=2, num_classes=10):
        super().__init__()
        n = [8, 8 * widen_factor, 16 * widen_factor]
        self.conv1 = nn.Conv2d(3, n[0], kernel_size=3, stride=1, padding=1, bias=False)
        self.block1 = nn.Sequential(WideBlock(n[0], n[1], 1), WideBlock(n[1], n[1], 1))
        self.block2 = nn.Sequential(WideBlock(n[1], n[2], 2), WideBlock(n[2], n[2], 1))
        self.bn1 = nn.BatchNorm2d(n[2])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(n[2], num_classes)
        self.nChannels = n[2]

    def forward(self, x):
        out = self.block2(self.block1(self.conv1(x)))
        out = self.relu(self.bn1(out))
        out = F.avg_pool2d(out, 8)
        out = out.view(-1, self.nChannels)
        return self.fc(out)


class PreActBottleneck(nn.Module):
    """kuangliu's pre-activation bottleneck: hasattr decides about the shortcut."""

    expansion = 2

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, kernel_size=1, bias=False)
        if stride != 1 or in_planes != self.expansion * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, self.expansion * planes, 1, stride=stride, bias=False)
            )

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class PreActNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            [PreActBottleneck(16, 12), PreActBottleneck(24, 12), PreActBottleneck(24, 20, 2)]
        )
        self.linear = nn.Linear(40, 10)

    def forward(self, x):
        out = self.conv1(x)
        for layer in self.layers:
            out = layer(out)
        out = F.adaptive_avg_pool2d(out, 1)
        return self.linear(out.squeeze(-1).squeeze(-1))


class ResNeXtBlock(nn.Module):
    """Grouped 3x3 in the middle, cardinality given."""

    def __init__(self, in_planes, cardinality=4, bottleneck_width=4, stride=1):
        super().__init__()
        group_width = cardinality * bottleneck_width
        self.conv1 = nn.Conv2d(in_planes, group_width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(group_width)
        self.conv2 = nn.Conv2d(
            group_width, group_width, 3, stride=stride, padding=1, groups=cardinality, bias=False
        )
        self.bn2 = nn.BatchNorm2d(group_width)
        self.conv3 = nn.Conv2d(group_width, 2 * group_width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * group_width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != 2 * group_width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, 2 * group_width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(2 * group_width),
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.layer1 = ResNeXtBlock(24)
        self.layer2 = ResNeXtBlock(32)
        self.layer3 = ResNeXtBlock(32, cardinality=4, bottleneck_width=6, stride=2)
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean([2, 3]))


IMAGE = given(normal(4, 3, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/lenet", LeNet, given(normal(4, 3, 32, 32))),
    Case("plain/mnist_net", MnistNet, given(normal(4, 1, 28, 28))),
    Case("plain/vgg_bn", VGG, IMAGE),
    Case("plain/vgg_cifar", VGGCifar, IMAGE),
    Case("plain/cifar_quick", CifarQuickNet, given(normal(4, 3, 32, 32))),
    Case("plain/resnet_option_a", lambda: ResNetCifar(OptionABlock, [1, 1, 1]), IMAGE),
    Case("plain/resnet_cifar", lambda: ResNetCifar(ProjectionBlock, [2, 1, 1]), IMAGE),
    Case("plain/wide_resnet", WideResNet, IMAGE),
    Case("plain/preact_bottleneck", PreActNet, IMAGE),
    Case("plain/resnext", ResNeXt, IMAGE),
)
