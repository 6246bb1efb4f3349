"""Unusual convolutional nets: weights made from inputs, routing, transformers of space, pairs."""

from __future__ import annotations

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class SiameseNetwork(nn.Module):
    """One encoder called on both images; the absolute difference is scored."""

    def __init__(self):
        super().__init__()
        self.cnn1 = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(1, 16, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(16),
            nn.ReflectionPad2d(1), nn.Conv2d(16, 24, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(24),
            nn.MaxPool2d(4),
        )  # fmt: skip
        self.fc1 = nn.Sequential(nn.Linear(24 * 4 * 4, 64), nn.ReLU(inplace=True))
        self.out = nn.Linear(64, 1)

    def forward_once(self, x):
        output = self.cnn1(x)
        output = output.view(output.size()[0], -1)
        return self.fc1(output)

    def forward(self, input1, input2):
        output1 = self.forward_once(input1)
        output2 = self.forward_once(input2)
        return torch.sigmoid(self.out(torch.abs(output1 - output2)))


class TripletNet(nn.Module):
    """Three images through one net, embeddings normalised to the unit sphere."""

    def __init__(self, emb_dim=16):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.PReLU(), nn.MaxPool2d(2, 2), nn.Dropout(0.3),
            nn.Conv2d(16, 32, 5), nn.PReLU(32), nn.MaxPool2d(2, 2), nn.Dropout(0.3),
        )  # fmt: skip
        self.fc = nn.Sequential(nn.Linear(32 * 4 * 4, 48), nn.PReLU(), nn.Linear(48, emb_dim))

    def get_embedding(self, x):
        x = self.conv(x)
        x = x.view(-1, 32 * 4 * 4)
        return F.normalize(self.fc(x), p=2, dim=1)

    def forward(self, anchor, positive, negative):
        return (
            self.get_embedding(anchor),
            self.get_embedding(positive),
            self.get_embedding(negative),
        )


def squash(x, dim=-1):
    squared_norm = (x**2).sum(dim=dim, keepdim=True)
    return squared_norm / (1 + squared_norm) * x / (squared_norm.sqrt() + 1e-8)


class CapsNet(nn.Module):
    """Primary capsules, dynamic routing in three rounds with a detached copy, decoder."""

    def __init__(self, num_classes=5, prim_dim=8, digit_dim=12):
        super().__init__()
        self.num_classes = num_classes
        self.prim_dim = prim_dim
        self.conv = nn.Conv2d(1, 32, kernel_size=5)
        self.primary_caps = nn.Conv2d(32, 2 * prim_dim, kernel_size=5, stride=2)
        self.W = nn.Parameter(0.01 * torch.randn(1, num_classes, 2 * 4 * 4, digit_dim, prim_dim))
        self.decoder = nn.Sequential(
            nn.Linear(digit_dim * num_classes, 48), nn.ReLU(True), nn.Linear(48, 16 * 16)
        )

    def forward(self, x):
        out = F.relu(self.conv(x))
        out = self.primary_caps(out)
        batch_size = out.shape[0]
        out = squash(out.view(batch_size, -1, self.prim_dim))
        x = out.unsqueeze(1).unsqueeze(4)
        u_hat = torch.matmul(self.W, x).squeeze(-1)
        temp_u_hat = u_hat.detach()
        b = torch.zeros(batch_size, self.num_classes, u_hat.size(2), 1)
        for _route_iter in range(2):
            c = b.softmax(dim=1)
            v = squash((c * temp_u_hat).sum(dim=2))
            b = b + torch.matmul(temp_u_hat, v.unsqueeze(-1))
        v = squash((b.softmax(dim=1) * u_hat).sum(dim=2))
        logits = torch.norm(v, dim=-1)
        pred = torch.eye(self.num_classes).to(x).index_select(dim=0, index=torch.argmax(logits, 1))
        reconstruction = self.decoder((v * pred[:, :, None]).contiguous().view(batch_size, -1))
        return logits, reconstruction


class FiLMBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x, beta, gamma):
        beta = beta.view(x.size(0), x.size(1), 1, 1)
        gamma = gamma.view(x.size(0), x.size(1), 1, 1)
        identity = F.relu(self.conv1(x))
        out = self.bn(self.conv2(identity))
        return F.relu(gamma * out + beta) + identity


class FiLMNet(nn.Module):
    """One generator for all blocks: view(batch, n_blocks, 2, channels)."""

    def __init__(self, n_res_blocks=2, n_channels=24, dim_question=12):
        super().__init__()
        self.n_res_blocks = n_res_blocks
        self.n_channels = n_channels
        self.film_generator = nn.Linear(dim_question, 2 * n_res_blocks * n_channels)
        self.feature = nn.Sequential(nn.Conv2d(3, n_channels, 4, 2, 1), nn.ReLU(True))
        self.res_blocks = nn.ModuleList([FiLMBlock(n_channels) for _ in range(n_res_blocks)])
        self.classifier = nn.Sequential(
            nn.Conv2d(n_channels, 32, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 5)
        )

    def forward(self, x, question):
        batch_size = x.size(0)
        film_vector = self.film_generator(question).view(
            batch_size, self.n_res_blocks, 2, self.n_channels
        )
        x = self.feature(x)
        for i, res_block in enumerate(self.res_blocks):
            x = res_block(x, film_vector[:, i, 0, :], film_vector[:, i, 1, :])
        return self.classifier(x)


class AddCoords(nn.Module):
    """CoordConv: two channels of positions, made by repeat and transposed."""

    def forward(self, x):
        batch_size, _, x_dim, y_dim = x.size()
        xx_channel = torch.arange(x_dim).repeat(1, y_dim, 1)
        yy_channel = torch.arange(y_dim).repeat(1, x_dim, 1).transpose(1, 2)
        xx_channel = xx_channel.float() / (x_dim - 1) * 2 - 1
        yy_channel = yy_channel.float() / (y_dim - 1) * 2 - 1
        xx_channel = xx_channel.repeat(batch_size, 1, 1, 1).transpose(2, 3)
        yy_channel = yy_channel.repeat(batch_size, 1, 1, 1).transpose(2, 3)
        return torch.cat([x, xx_channel.type_as(x), yy_channel.type_as(x)], dim=1)


class CoordConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.addcoords = AddCoords()
        self.conv1 = nn.Conv2d(3 + 2, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16 + 2, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        x = F.elu(self.conv1(self.addcoords(x)))
        x = F.elu(self.conv2(self.addcoords(x)))
        return self.conv3(x).flatten(2).softmax(-1)


class MixedOp(nn.Module):
    """A DARTS cell's edge: every operation weighted by a softmaxed architecture parameter."""

    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList(
            [
                nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(C, affine=False)),
                nn.Sequential(nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(C, affine=False)),
                nn.Identity() if stride == 1 else nn.Conv2d(C, C, 1, stride),
                nn.Sequential(
                    nn.ReLU(), nn.Conv2d(C, C, 3, stride, 1, groups=C, bias=False),
                    nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False),
                ),
                nn.Sequential(
                    nn.ReLU(), nn.Conv2d(C, C, 3, stride, 2, dilation=2, groups=C, bias=False),
                    nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False),
                ),
            ]
        )  # fmt: skip

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class NASCell(nn.Module):
    def __init__(self, steps, C_prev, C):
        super().__init__()
        self.preprocess0 = nn.Sequential(nn.ReLU(), nn.Conv2d(C_prev, C, 1), nn.BatchNorm2d(C))
        self.preprocess1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C_prev, C, 1), nn.BatchNorm2d(C))
        self._steps = steps
        self._ops = nn.ModuleList(MixedOp(C, 1) for i in range(steps) for _ in range(2 + i))

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _i in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-2:], dim=1)


class DARTSNet(nn.Module):
    def __init__(self, C=16, steps=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.cell = NASCell(steps, 24, C)
        self.alphas = nn.Parameter(1e-3 * torch.randn(5, 5))
        self.classifier = nn.Linear(2 * C, 10)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        out = self.cell(s0, s1, F.softmax(self.alphas, dim=-1))
        return self.classifier(F.adaptive_avg_pool2d(out, 1).view(out.size(0), -1))


class DynamicConv(nn.Module):
    """Attention over K kernels; the batch becomes groups of one convolution."""

    def __init__(self, in_planes, out_planes, kernel_size=3, K=4):
        super().__init__()
        self.in_planes, self.out_planes, self.kernel_size, self.K = in_planes, out_planes, 3, K
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_planes, 8, 1), nn.ReLU(), nn.Conv2d(8, K, 1)
        )
        self.weight = nn.Parameter(
            torch.randn(K, out_planes, in_planes, kernel_size, kernel_size) * 0.1
        )
        self.bias = nn.Parameter(torch.zeros(K, out_planes))

    def forward(self, x):
        softmax_attention = F.softmax(self.attention(x).view(x.size(0), -1) / 30, 1)
        batch_size, in_planes, height, width = x.size()
        x = x.view(1, -1, height, width)
        weight = self.weight.view(self.K, -1)
        aggregate_weight = torch.mm(softmax_attention, weight)
        aggregate_weight = aggregate_weight.view(-1, in_planes, self.kernel_size, self.kernel_size)
        aggregate_bias = torch.mm(softmax_attention, self.bias).view(-1)
        output = F.conv2d(x, aggregate_weight, aggregate_bias, padding=1, groups=batch_size)
        return output.view(batch_size, self.out_planes, output.size(-2), output.size(-1))


class DynamicConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.dyn = DynamicConv(16, 32)
        self.bn = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.dyn(F.relu(self.conv1(x)))))
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


class SpatialTransformer(nn.Module):
    """The PyTorch STN tutorial: affine_grid, grid_sample, identity bias, view(-1, 10 * 3 * 3)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)
        self.localization = nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(8, 10, kernel_size=5), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(10 * 3 * 3, 32), nn.ReLU(True), nn.Linear(32, 3 * 2))
        self.fc_loc[2].weight.data.zero_()
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))

    def stn(self, x):
        xs = self.localization(x)
        xs = xs.view(-1, 10 * 3 * 3)
        theta = self.fc_loc(xs)
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x):
        x = self.stn(x)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class StochasticDepthNet(nn.Module):
    """Blocks are skipped by Python's random numbers in training, scaled in evaluation."""

    def __init__(self, channels=32, depth=3):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.SELU(),
                nn.Conv2d(24, channels, 3, padding=1), nn.BatchNorm2d(channels),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.survival = [1.0, 0.9, 0.8]
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        x = self.stem(x)
        for p, block in zip(self.survival, self.blocks, strict=True):
            if self.training and random.random() > p:
                continue
            x = x + (block(x) if self.training else p * block(x))
        return self.head(x.flatten(2).mean(2))


IMAGE = given(normal(4, 3, 8, 8))
PAIR = given(normal(4, 1, 16, 16), normal(4, 1, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/siamese", SiameseNetwork, PAIR),
    Case("plain/triplet", TripletNet, given(*[normal(4, 1, 28, 28)] * 3)),
    Case("plain/capsnet", CapsNet, given(normal(3, 1, 16, 16))),
    Case("plain/film", FiLMNet, given(normal(3, 3, 8, 8), normal(3, 12))),
    Case("plain/coord_conv", CoordConvNet, IMAGE),
    Case("plain/darts_cell", DARTSNet, IMAGE),
    Case("plain/dynamic_conv", DynamicConvNet, IMAGE),
    Case("plain/spatial_transformer", SpatialTransformer, given(normal(4, 1, 28, 28))),
    Case("plain/stochastic_depth", StochasticDepthNet, IMAGE),
)
