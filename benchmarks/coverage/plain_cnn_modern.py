"""Modern convolutional blocks and attention inside convolutional nets."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class ChannelsLayerNorm(nn.Module):
    """ConvNeXt's LayerNorm over channels, first or last."""

    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.data_format = data_format
        self.normalized_shape = (normalized_shape,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def drop_path(x, drop_prob=0.0, training=False):
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    random_tensor.div_(keep_prob)
    return x * random_tensor


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, linear layers on channels last, layer scale, drop path."""

    def __init__(self, dim, drop_prob=0.1, layer_scale_init_value=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = ChannelsLayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 3 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim))
        self.drop_prob = drop_prob

    def forward(self, x):
        shortcut = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv2(self.act(self.pwconv1(x)))
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return shortcut + drop_path(x, self.drop_prob, self.training)


class ConvNeXt(nn.Module):
    def __init__(self, dims=(16, 24)):
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=2, stride=2),
            ChannelsLayerNorm(dims[0], data_format="channels_first"),
        )
        self.downsample_layers.append(stem)
        self.downsample_layers.append(
            nn.Sequential(
                ChannelsLayerNorm(dims[0], data_format="channels_first"),
                nn.Conv2d(dims[0], dims[1], kernel_size=2, stride=2),
            )
        )
        self.stages = nn.ModuleList([nn.Sequential(ConvNeXtBlock(d)) for d in dims])
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], 10)
        self.head.weight.data.mul_(1.0)
        self.head.bias.data.mul_(1.0)

    def forward(self, x):
        for i in range(2):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        return self.head(self.norm(x.mean([-2, -1])))


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def conv_mixer(dim=32, depth=2, kernel_size=5, patch_size=4, n_classes=10):
    """The whole ConvMixer in one expression, as in the paper."""
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size),
        nn.GELU(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"),
                        nn.GELU(),
                        nn.BatchNorm2d(dim),
                    )
                ),
                nn.Conv2d(dim, dim, kernel_size=1),
                nn.GELU(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, n_classes),
    )


class RepVGGBlock(nn.Module):
    """Three parallel branches, the identity one a bare batch norm."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.rbr_identity = (
            nn.BatchNorm2d(num_features=in_channels)
            if out_channels == in_channels and stride == 1
            else None
        )
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module(
            "conv", nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        )
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(out_channels))
        self.rbr_1x1 = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, 0, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, inputs):
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


class RepVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage0 = RepVGGBlock(3, 16)
        self.stage1 = nn.Sequential(RepVGGBlock(16, 32, 2), RepVGGBlock(32, 32))
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        out = self.gap(self.stage1(self.stage0(x)))
        out = out.view(out.size(0), -1)
        return self.linear(out)


class ChannelGate(nn.Module):
    """Jongchan's CBAM: average and max pooling through one MLP."""

    def __init__(self, gate_channels, reduction_ratio=4):
        super().__init__()
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(gate_channels, gate_channels // reduction_ratio),
            nn.ReLU(),
            nn.Linear(gate_channels // reduction_ratio, gate_channels),
        )

    def forward(self, x):
        channel_att_sum = None
        for pool_type in ["avg", "max"]:
            if pool_type == "avg":
                pool = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
            else:
                pool = F.max_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
            raw = self.mlp(pool)
            channel_att_sum = raw if channel_att_sum is None else channel_att_sum + raw
        scale = torch.sigmoid(channel_att_sum).unsqueeze(2).unsqueeze(3).expand_as(x)
        return x * scale


class SpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        x_compress = torch.cat(
            (torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1
        )
        return x * torch.sigmoid(self.spatial(x_compress))


class CBAMNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.channel = ChannelGate(32)
        self.spatial = SpatialGate()
        self.conv2 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        x = self.spatial(self.channel(F.relu(self.conv1(x))))
        x = F.leaky_relu(self.bn(self.conv2(x)), 0.1)
        return self.fc(x.amax(dim=(2, 3)))


class NonLocalBlock(nn.Module):
    """AlexHex7: theta, phi and g by 1x1 convolutions, batch norm that starts at zero."""

    def __init__(self, in_channels, inter_channels=None):
        super().__init__()
        self.in_channels = in_channels
        self.inter_channels = inter_channels or in_channels // 2
        self.g = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.theta = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.phi = nn.Conv2d(in_channels, self.inter_channels, 1)
        self.W = nn.Sequential(
            nn.Conv2d(self.inter_channels, in_channels, 1), nn.BatchNorm2d(in_channels)
        )
        nn.init.constant_(self.W[1].weight, 0)

    def forward(self, x):
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter_channels, -1)
        g_x = g_x.permute(0, 2, 1)
        theta_x = self.theta(x).view(batch_size, self.inter_channels, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(batch_size, self.inter_channels, -1)
        f_div_c = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(f_div_c, g_x)
        y = y.permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter_channels, *x.size()[2:])
        return self.W(y) + x


class NonLocalNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.nl = NonLocalBlock(32)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 64, 24), nn.ReLU())
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        return self.fc(self.head(self.nl(self.conv(x))))


class SelfAttention2d(nn.Module):
    """SAGAN: query and key at an eighth of the width, a learned gate at zero."""

    def __init__(self, in_dim):
        super().__init__()
        self.chanel_in = in_dim
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        m_batchsize, C, width, height = x.size()
        proj_query = self.query_conv(x).view(m_batchsize, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(m_batchsize, -1, width * height)
        attention = torch.softmax(torch.bmm(proj_query, proj_key), dim=-1)
        proj_value = self.value_conv(x).view(m_batchsize, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1))
        out = out.view(m_batchsize, C, width, height)
        return self.gamma * out + x


class SAGANDiscriminator(nn.Module):
    def __init__(self, conv_dim=32):
        super().__init__()
        sn = nn.utils.spectral_norm
        self.l1 = nn.Sequential(sn(nn.Conv2d(3, conv_dim, 4, 2, 1)), nn.LeakyReLU(0.1))
        self.attn1 = SelfAttention2d(conv_dim)
        self.l2 = nn.Sequential(sn(nn.Conv2d(conv_dim, conv_dim * 2, 4, 2, 1)), nn.LeakyReLU(0.1))
        self.last = nn.Sequential(nn.Conv2d(conv_dim * 2, 1, 4))

    def forward(self, x):
        out = self.last(self.l2(self.attn1(self.l1(x))))
        return out.squeeze()


class Involution(nn.Module):
    """The kernel is made from the input: unfold, multiply, sum."""

    def __init__(self, channels, kernel_size=3, group_channels=8, reduction=4):
        super().__init__()
        self.kernel_size = kernel_size
        self.groups = channels // group_channels
        self.group_channels = group_channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.BatchNorm2d(channels // reduction),
            nn.ReLU(),
        )
        self.conv2 = nn.Conv2d(channels // reduction, kernel_size**2 * self.groups, 1)
        self.unfold = nn.Unfold(kernel_size, 1, (kernel_size - 1) // 2, 1)

    def forward(self, x):
        weight = self.conv2(self.conv1(x))
        b, _c, h, w = weight.shape
        weight = weight.view(b, self.groups, self.kernel_size**2, h, w).unsqueeze(2)
        out = self.unfold(x).view(b, self.groups, self.group_channels, self.kernel_size**2, h, w)
        return (weight * out).sum(dim=3).view(b, -1, h, w)


class InvolutionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.inv = Involution(32)
        self.bn = nn.BatchNorm2d(32)
        self.out = nn.Conv2d(32, 48, 1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.bn(self.inv(x)))
        return self.fc(F.relu(self.out(x)).mean(-1).mean(-1))


IMAGE = given(normal(4, 3, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/convnext", ConvNeXt, IMAGE),
    Case("plain/conv_mixer", conv_mixer, IMAGE),
    Case("plain/repvgg", RepVGG, IMAGE),
    Case("plain/cbam", CBAMNet, IMAGE),
    Case("plain/non_local", NonLocalNet, IMAGE),
    Case("plain/sagan_spectral_norm", SAGANDiscriminator, IMAGE),
    Case("plain/involution", InvolutionNet, IMAGE),
)
