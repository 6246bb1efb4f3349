"""Video: 3-D convolutions and a recurrent cell of convolutions."""

from __future__ import annotations

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class C3D(nn.Module):
    """jfzhang95's C3D: view(-1, 256) by a number behind 3-D convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 16, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool1 = nn.MaxPool3d(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.conv2 = nn.Conv3d(16, 24, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool2 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2))
        self.conv3 = nn.Conv3d(24, 32, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.fc6 = nn.Linear(256, 64)
        self.fc7 = nn.Linear(64, 5)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x))
        x = x.view(-1, 256)
        return self.fc7(self.relu(self.fc6(x)))


class R2Plus1DBlock(nn.Module):
    """Spatial then temporal convolution, the middle width from the parameter count."""

    def __init__(self, inp, out):
        super().__init__()
        mid = (inp * out * 3 * 3 * 3) // (inp * 3 * 3 + 3 * out)
        self.spatial = nn.Conv3d(inp, mid, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn1 = nn.BatchNorm3d(mid)
        self.temporal = nn.Conv3d(mid, out, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn2 = nn.BatchNorm3d(out)

    def forward(self, x):
        return F.relu(self.bn2(self.temporal(F.relu(self.bn1(self.spatial(x))))))


class R2Plus1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = R2Plus1DBlock(3, 16)
        self.layer = R2Plus1DBlock(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.layer(x)
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class ConvLSTMCell(nn.Module):
    """ndrplz: one convolution for four gates, torch.split by the hidden size."""

    def __init__(self, input_dim, hidden_dim, kernel_size=3):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv = nn.Conv2d(
            input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=kernel_size // 2
        )

    def forward(self, input_tensor, cur_state):
        h_cur, c_cur = cur_state
        combined = torch.cat([input_tensor, h_cur], dim=1)
        cc_i, cc_f, cc_o, cc_g = torch.split(self.conv(combined), self.hidden_dim, dim=1)
        i, f, o = torch.sigmoid(cc_i), torch.sigmoid(cc_f), torch.sigmoid(cc_o)
        c_next = f * c_cur + i * torch.tanh(cc_g)
        return o * torch.tanh(c_next), c_next

    def init_hidden(self, batch_size, image_size):
        shape = (batch_size, self.hidden_dim, *image_size)
        return (
            torch.zeros(shape, device=self.conv.weight.device),
            torch.zeros(shape, device=self.conv.weight.device),
        )


class ConvLSTM(nn.Module):
    def __init__(self, hidden_dims=(16, 24)):
        super().__init__()
        dims = [1, *hidden_dims]
        self.cells = nn.ModuleList([ConvLSTMCell(i, o) for i, o in itertools.pairwise(dims)])
        self.head = nn.Conv2d(hidden_dims[-1], 1, 1)

    def forward(self, x):
        b, seq_len, _, h, w = x.size()
        cur_layer_input = x
        for cell in self.cells:
            hc = cell.init_hidden(b, (h, w))
            output_inner = []
            for t in range(seq_len):
                hc = cell(cur_layer_input[:, t, :, :, :], hc)
                output_inner.append(hc[0])
            cur_layer_input = torch.stack(output_inner, dim=1)
        return self.head(cur_layer_input[:, -1])


CASES: tuple[Case, ...] = (
    Case("plain/c3d", C3D, given(normal(2, 3, 4, 8, 8))),
    Case("plain/r2plus1d", R2Plus1D, given(normal(2, 3, 4, 8, 8))),
    Case("plain/conv_lstm", ConvLSTM, given(normal(2, 3, 1, 6, 6))),
)
