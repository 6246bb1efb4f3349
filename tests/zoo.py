"""The test zoo: small models in plain torch, written the way users write them.

Nothing here knows about the library under test.  Every model is one row of ``ZOO``; a law that
holds for "every model" is parametrised over that table.  The models are tiny on purpose (a forward
and backward of a batch of four takes milliseconds), and their inputs and outputs have fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import zoo_others as others

CLASSES = 10
VOCAB = 23
TOKENS = 12

# --------------------------------------------------------------------------- convolutional nets


class ReferenceCNN(nn.Module):
    """Three conv-BN-ReLU blocks and a two-layer classifier; 2,193,674 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, kernel_size=3, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(128 * 8 * 8, 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class SmallCNN(nn.Module):
    """Two convolutions without norms, global average pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.fc(torch.flatten(x, 1))


class BasicBlock(nn.Module):
    """The ResNet block of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes * self.expansion:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * self.expansion, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * self.expansion),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """The ResNet block of 1x1 reduce, 3x3, 1x1 expand."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes * self.expansion:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * self.expansion, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * self.expansion),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """A stem, two stages of two blocks, global average pooling, one linear layer."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], planes: tuple[int, int]) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, self.inplanes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, planes[0], blocks=2, stride=1)
        self.layer2 = self._make_layer(block, planes[1], blocks=2, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[1] * block.expansion, CLASSES)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        layers: list[nn.Module] = [block(self.inplanes, planes, stride)]
        self.inplanes = planes * block.expansion
        layers += [block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """BN-ReLU-conv whose output is concatenated to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class DenseNet(nn.Module):
    """Two dense blocks with a halving transition between them."""

    def __init__(self, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        channels = 8
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(
            *[DenseLayer(channels + i * growth, growth) for i in range(layers)]
        )
        channels += layers * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.AvgPool2d(2),
        )
        channels //= 2
        self.block2 = nn.Sequential(
            *[DenseLayer(channels + i * growth, growth) for i in range(layers)]
        )
        channels += layers * growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.transition(self.block1(self.stem(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1)
        return self.classifier(x)


class InvertedResidual(nn.Module):
    """The MobileNetV2 block: 1x1 expand, depthwise 3x3, 1x1 project."""

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNet(nn.Module):
    """A depthwise-separable block and two inverted residuals, one of them with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.separable = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Conv2d(8, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
        )
        self.block1 = InvertedResidual(12, 12, stride=1, expand_ratio=2)
        self.block2 = InvertedResidual(12, 16, stride=2, expand_ratio=3)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.separable(self.stem(x))
        x = self.block2(self.block1(x))
        return self.classifier(x.mean([2, 3]))


class DoubleConv(nn.Module):
    """Twice conv-BN-ReLU, the unit of a U-Net."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Two levels down, two up with transposed convolutions, skips by concatenation."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 6)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 10))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(10, 16))
        self.up1 = nn.ConvTranspose2d(16, 8, kernel_size=2, stride=2)
        self.conv1 = DoubleConv(10 + 8, 10)
        self.up2 = nn.ConvTranspose2d(10, 5, kernel_size=2, stride=2)
        self.conv2 = DoubleConv(6 + 5, 6)
        self.outc = nn.Conv2d(6, n_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        x = self.conv2(torch.cat([x1, self.up2(x)], dim=1))
        return self.outc(x)


class SqueezeExcite(nn.Module):
    """Channel gates from globally pooled features."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class SEResNet(nn.Module):
    """One residual block whose branch ends in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.se = SqueezeExcite(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        x = F.relu(x + out)
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


class GroupNormCNN(nn.Module):
    """Group normalisation and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm2 = nn.GroupNorm(4, 24)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.norm1(self.conv1(x))), 2)
        x = F.silu(self.norm2(self.conv2(x)))
        return self.fc(x.mean(dim=(-2, -1)))


class Conv1dNet(nn.Module):
    """A convolutional net over a signal in time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, 8, kernel_size=5, padding=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 12, kernel_size=3, padding=1),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.AvgPool1d(4),
            nn.Flatten(),
            nn.Linear(12 * 4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Conv3dNet(nn.Module):
    """A convolutional net over a small video."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 6, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm3d(6)
        self.pool = nn.MaxPool3d(2)
        self.conv2 = nn.Conv3d(6, 8, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm3d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class HardcodedFlatten(nn.Module):
    """A forward that writes the flattened size down as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 8 * 8, 20)
        self.fc2 = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        x = x.view(-1, 8 * 8 * 8)
        return self.fc2(F.relu(self.fc1(x)))


class PixelShuffleNet(nn.Module):
    """Super-resolution by two, once inside the network and once at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.conv2 = nn.Conv2d(10, 6 * 2**2, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 3 * 2**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.shuffle(self.conv2(x)))
        return self.shuffle(self.conv3(x))


class PreactBlock(nn.Module):
    """A pre-activation residual block."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreactDict(nn.Module):
    """A pre-activation net that takes a dict and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([PreactBlock(8, 8), PreactBlock(8, 14, stride=2)])
        self.norm = nn.BatchNorm2d(14)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.conv(batch["image"])
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).mean((2, 3))
        return {"logits": self.head(x)}


class LayerScaleBlock(nn.Module):
    """A residual branch without norms, scaled by one learned number per channel."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv2(F.gelu(self.conv1(x)))


class NormFreeResidual(nn.Module):
    """Two layer-scaled residual blocks without any normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(LayerScaleBlock(10, 12), LayerScaleBlock(10, 14))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=[2, 3]))


class Inception(nn.Module):
    """Parallel 1x1, 3x3 and pooling branches, concatenated."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        one, reduce, three, pool = widths
        self.branch1 = nn.Conv2d(in_channels, one, 1)
        self.branch2 = nn.Sequential(
            nn.Conv2d(in_channels, reduce, 1), nn.ReLU(), nn.Conv2d(reduce, three, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(in_channels, pool, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.branch1(x), self.branch2(x), self.branch3(x)]
        return F.relu(torch.cat(outputs, 1))


class InceptionBranches(nn.Module):
    """A stem and two inception blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mixed1 = Inception(8, (4, 5, 6, 3))
        self.mixed2 = Inception(4 + 6 + 3, (6, 4, 7, 2))
        self.fc = nn.Linear(6 + 7 + 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.mixed2(self.mixed1(x))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(start_dim=1))


class VAE(nn.Module):
    """A convolutional variational autoencoder; samples only in training."""

    def __init__(self, latent: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 10, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(10 * 4 * 4, 2 * latent),
        )
        self.project = nn.Linear(latent, 12 * 4 * 4)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (12, 4, 4)),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 1, 4, stride=2, padding=1),
        )

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if self.training:
            std = torch.exp(0.5 * logvar)
            return mu + torch.randn_like(std) * std
        return mu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = self.reparameterize(mu, logvar)
        return torch.sigmoid(self.decoder(self.project(z))), mu, logvar


# --------------------------------------------------------------------------- vectors


class MLP(nn.Module):
    """Linear, BatchNorm1d, ReLU, Dropout, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SharedModule(nn.Module):
    """One linear layer used twice, which ties its input width to its output width."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(20, 14)
        self.shared = nn.Linear(14, 14)
        self.out = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(x))
        return self.out(x)


# --------------------------------------------------------------------------- transformers


class FusedAttention(nn.Module):
    """Causal self-attention with one fused projection and torch's attention kernel."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(B, T, self.heads, -1).transpose(1, 2)
        k = k.view(B, T, self.heads, -1).transpose(1, 2)
        v = v.view(B, T, self.heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class GPTBlock(nn.Module):
    """A pre-LayerNorm decoder block."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(d)
        self.attn = FusedAttention(d, heads)
        self.ln2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A decoder with learned positions and an untied head."""

    def __init__(self, d: int = 16, heads: int = 4, layers: int = 2, context: int = 16) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, d)
        self.pos = nn.Embedding(context, d)
        self.blocks = nn.ModuleList([GPTBlock(d, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(d)
        self.head = nn.Linear(d, VOCAB, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        _, T = idx.shape
        x = self.tok(idx) + self.pos(torch.arange(T, device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


class NanoAttention(nn.Module):
    """Causal self-attention as nanoGPT writes it."""

    bias: Tensor

    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        assert n_embd % n_head == 0
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_dropout = nn.Dropout(0.0)
        self.n_head = n_head
        self.n_embd = n_embd
        mask = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", mask.view(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class NanoMLP(nn.Module):
    """The nanoGPT feed-forward layer."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    """The nanoGPT block."""

    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = NanoAttention(n_embd, n_head, block_size)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = NanoMLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    """A decoder in the style of nanoGPT, with the head tied to the token embedding."""

    def __init__(self, n_embd: int = 24, n_head: int = 3, n_layer: int = 2, block_size: int = 16):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList([NanoBlock(n_embd, n_head, block_size) for _ in range(n_layer)]),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, VOCAB, bias=False)
        self.apply(self._init_weights)
        wte = self.transformer["wte"]
        assert isinstance(wte, nn.Embedding)
        wte.weight = self.lm_head.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.2)

    def forward(self, idx: Tensor) -> Tensor:
        _, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        tok_emb = self.transformer["wte"](idx)
        pos_emb = self.transformer["wpe"](pos)
        x = self.transformer["drop"](tok_emb + pos_emb)
        for block in self.transformer["h"].children():
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class ViTAttention(nn.Module):
    """Self-attention as timm writes it, with the logit scale fixed at construction."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).flatten(2)
        return self.proj(x)


class ViTBlock(nn.Module):
    """A pre-LayerNorm encoder block."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer with a class token and learned positions."""

    def __init__(self, dim: int = 24, heads: int = 3, image: int = 16, patch: int = 4) -> None:
        super().__init__()
        patches = (image // patch) ** 2
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads, 2 * dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


def rotate_half(x: Tensor) -> Tensor:
    """Turn each pair (i, i + half) of the last dimension by a quarter turn."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class LlamaAttention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.num_kv_heads = kv_heads
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).contiguous().view(b, t, -1))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """A pre-RMSNorm decoder block."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, intermediate: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.self_attn = LlamaAttention(hidden, heads, kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = SwiGLU(hidden, intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder in the style of Llama."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden: int = 32, heads: int = 4, kv_heads: int = 2, context: int = 16):
        super().__init__()
        head_dim = hidden // heads
        self.embed_tokens = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList([LlamaBlock(hidden, heads, kv_heads, 40) for _ in range(2)])
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        angles = torch.outer(torch.arange(context).float(), inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        cos, sin = self.cos[:t], self.sin[:t]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


class MixerBlock(nn.Module):
    """Mix over tokens, then over channels."""

    def __init__(self, tokens: int, dim: int, token_dim: int, channel_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mix = nn.Sequential(
            nn.Linear(tokens, token_dim), nn.GELU(), nn.Linear(token_dim, tokens)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mix = nn.Sequential(
            nn.Linear(dim, channel_dim), nn.GELU(), nn.Linear(channel_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer of two blocks."""

    def __init__(self, dim: int = 18) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*[MixerBlock(16, dim, 10, 28) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


class EncoderBlock(nn.Module):
    """A pre-LayerNorm block around torch's own multi-head attention."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h, _ = self.self_attn(h, h, h, need_weights=False)
        x = x + h
        return x + self.linear2(F.relu(self.linear1(self.norm2(x))))


class EncoderLayer(nn.Module):
    """A sequence classifier with one encoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 20)
        self.block = EncoderBlock(20, nhead=4, dim_feedforward=36)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(self.embed(x)))
        return self.head(x.mean(dim=1))


# --------------------------------------------------------------------------- the table

Args = tuple[Any, ...]
Kind = Literal["image", "sequence", "vector"]

_ARGS_SEED = 1234
_TARGET_SEED = 4321


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how to make it, and example arguments for a batch size."""

    name: str
    make: Callable[[], nn.Module]
    args: Callable[[int], Args]
    kind: Kind

    def __repr__(self) -> str:
        return f"Entry({self.name!r})"


def _floats(*shape: int) -> Callable[[int], Args]:
    """Normal noise of ``(batch, *shape)``, the same at every call."""

    def args(batch: int) -> Args:
        generator = torch.Generator().manual_seed(_ARGS_SEED)
        return (torch.randn(batch, *shape, generator=generator, dtype=torch.float32),)

    return args


def _tokens(length: int) -> Callable[[int], Args]:
    """Token ids of ``(batch, length)``, the same at every call."""

    def args(batch: int) -> Args:
        generator = torch.Generator().manual_seed(_ARGS_SEED)
        return (torch.randint(0, VOCAB, (batch, length), generator=generator),)

    return args


def _image_dict(*shape: int) -> Callable[[int], Args]:
    """The image of ``_floats`` inside a dict."""
    floats = _floats(*shape)
    return lambda batch: ({"image": floats(batch)[0]},)


def _token_pair(length: int) -> Callable[[int], Args]:
    """Two texts of token ids, each ``(batch, length)``."""

    def args(batch: int) -> Args:
        generator = torch.Generator().manual_seed(_ARGS_SEED)
        first, second = torch.randint(0, VOCAB, (2, batch, length), generator=generator)
        return first, second

    return args


def _segmented(length: int) -> Callable[[int], Args]:
    """Token ids of ``(batch, length)`` and the segment, 0 or 1, of each."""

    def args(batch: int) -> Args:
        ids, other = _token_pair(length)(batch)
        return ids, (other % 2).sort(-1).values

    return args


def _graph(nodes: int, features: int) -> Callable[[int], Args]:
    """Node features of ``(batch, nodes, features)`` and a symmetric adjacency matrix."""

    def args(batch: int) -> Args:
        x = _floats(nodes, features)(batch)[0]
        generator = torch.Generator().manual_seed(_ARGS_SEED)
        drawn = torch.rand(batch, nodes, nodes, generator=generator, dtype=torch.float32)
        return x, ((drawn + drawn.transpose(1, 2)) > 1).float()

    return args


ZOO: tuple[Entry, ...] = (
    Entry("reference_cnn", ReferenceCNN, _floats(3, 32, 32), "image"),
    Entry("small_cnn", SmallCNN, _floats(3, 16, 16), "image"),
    Entry("resnet_basic", lambda: ResNet(BasicBlock, (8, 16)), _floats(3, 16, 16), "image"),
    Entry("resnet_bottleneck", lambda: ResNet(Bottleneck, (4, 6)), _floats(3, 16, 16), "image"),
    Entry("densenet", DenseNet, _floats(3, 16, 16), "image"),
    Entry("mobilenet", MobileNet, _floats(3, 16, 16), "image"),
    Entry("unet", UNet, _floats(3, 16, 16), "image"),
    Entry("gpt", GPT, _tokens(TOKENS), "sequence"),
    Entry("gpt_nano", NanoGPT, _tokens(TOKENS), "sequence"),
    Entry("vit", ViT, _floats(3, 16, 16), "image"),
    Entry("mlp", MLP, _floats(20), "vector"),
    Entry("llama", Llama, _tokens(TOKENS), "sequence"),
    Entry("se_resnet", SEResNet, _floats(3, 16, 16), "image"),
    Entry("groupnorm_cnn", GroupNormCNN, _floats(3, 16, 16), "image"),
    Entry("conv1d_net", Conv1dNet, _floats(4, 32), "sequence"),
    Entry("conv3d_net", Conv3dNet, _floats(2, 4, 8, 8), "image"),
    Entry("shared_module", SharedModule, _floats(20), "vector"),
    Entry("mixer", Mixer, _floats(3, 16, 16), "image"),
    Entry("hardcoded_flatten", HardcodedFlatten, _floats(3, 16, 16), "image"),
    Entry("vae", VAE, _floats(1, 16, 16), "image"),
    Entry("pixel_shuffle_net", PixelShuffleNet, _floats(3, 8, 8), "image"),
    Entry("preact_dict", PreactDict, _image_dict(3, 16, 16), "image"),
    Entry("norm_free_residual", NormFreeResidual, _floats(3, 16, 16), "image"),
    Entry("inception_branches", InceptionBranches, _floats(3, 16, 16), "image"),
    Entry("encoder_layer", EncoderLayer, _floats(TOKENS, 6), "sequence"),
    Entry("lstm", others.LSTMTagger, _tokens(TOKENS), "sequence"),
    Entry("gru", others.GRUClassifier, _floats(TOKENS, 6), "sequence"),
    Entry("bert", others.Bert, _segmented(TOKENS), "sequence"),
    Entry("encoder_decoder", others.Seq2Seq, _token_pair(TOKENS), "sequence"),
    Entry("moe", others.MixtureOfExperts, _tokens(TOKENS), "sequence"),
    Entry("generator", others.Generator, _floats(10), "image"),
    Entry("graph_net", others.GraphNet, _graph(7, 5), "sequence"),
)

_BY_NAME = {row.name: row for row in ZOO}


def entry(name: str) -> Entry:
    """The row of that name; ``KeyError`` if there is none."""
    return _BY_NAME[name]


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A new model in train mode with the weights of ``seed``; the global RNG is left as it was.

    The weights are drawn in float32 and then converted, so a float64 model has the same values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU alone: torch.manual_seed reaches CUDA
        return entry(name).make().to(dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def example(name: str, batch: int = 4, dtype: torch.dtype = torch.float32) -> Args:
    """Example arguments, their floating tensors in ``dtype``; the same at every call."""
    return _cast(entry(name).args(batch), dtype)


def flat(output: Any) -> Tensor:
    """Whatever a model returned, as one ``(batch, -1)`` tensor in the order it was returned."""
    if isinstance(output, Tensor):
        return output.flatten(1)
    items = output.values() if isinstance(output, Mapping) else output
    return torch.cat([flat(item) for item in items], dim=1)


def loss(model: nn.Module, args: Args) -> Tensor:
    """The mean squared error of the flattened outputs against a fixed random target."""
    prediction = flat(model(*args))
    generator = torch.Generator().manual_seed(_TARGET_SEED)
    target = torch.randn(prediction.shape, generator=generator, dtype=torch.float32)
    return F.mse_loss(prediction, target.to(prediction))
