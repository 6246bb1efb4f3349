"""Text, speech, audio and video without (only) recurrence."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import constant, given, integers, normal
from torch.nn.utils import weight_norm


class TextCNN(nn.Module):
    """Shawn1993's: convolutions over the whole embedding, max over time by x.size(2)."""

    def __init__(self, V=60, D=24, Co=16, Ks=(2, 3, 4), C=3):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.convs = nn.ModuleList([nn.Conv2d(1, Co, (K, D)) for K in Ks])
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(len(Ks) * Co, C)

    def forward(self, x):
        x = self.embed(x)
        x = x.unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        x = torch.cat(x, 1)
        return self.fc1(self.dropout(x))


class FastText(nn.Module):
    """EmbeddingBag with offsets, as in the AG_NEWS tutorial."""

    def __init__(self, vocab_size=80, embed_dim=32, num_class=4):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocab_size, embed_dim, sparse=False)
        self.fc1 = nn.Linear(embed_dim, 24)
        self.fc = nn.Linear(24, num_class)
        self.init_weights()

    def init_weights(self):
        initrange = 0.5
        self.embedding.weight.data.uniform_(-initrange, initrange)
        self.fc.weight.data.uniform_(-initrange, initrange)
        self.fc.bias.data.zero_()

    def forward(self, text, offsets):
        embedded = self.embedding(text, offsets)
        return self.fc(F.relu(self.fc1(embedded)))


class QRNNLayer(nn.Module):
    """A convolution makes z, f, o; forget-mult runs over time with a Python loop."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.conv = nn.Conv1d(input_size, 3 * hidden_size, kernel_size=2)

    def forward(self, x):
        gates = self.conv(F.pad(x, (1, 0)))
        z, f, o = gates.chunk(3, dim=1)
        z, f, o = torch.tanh(z), torch.sigmoid(f), torch.sigmoid(o)
        c = torch.zeros_like(z[:, :, 0])
        hs = []
        for t in range(z.size(2)):
            c = f[:, :, t] * c + (1 - f[:, :, t]) * z[:, :, t]
            hs.append(o[:, :, t] * c)
        return torch.stack(hs, dim=2)


class QRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([QRNNLayer(16, 32), QRNNLayer(32, 24)])
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x[..., -1])


class SRU(nn.Module):
    """The simple recurrent unit: one matrix for everything, highway connection."""

    def __init__(self, dim=24):
        super().__init__()
        self.inp = nn.Linear(6, dim)
        self.weight = nn.Parameter(torch.randn(dim, dim * 3) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(dim * 2))
        self.out = nn.Linear(dim, 2)

    def forward(self, x):
        x = self.inp(x)
        length, batch, d = x.shape
        u = x.reshape(length * batch, d).mm(self.weight).view(length, batch, d, 3)
        forget_bias, reset_bias = self.bias.view(2, d)
        c = x.new_zeros(batch, d)
        h = []
        for t in range(length):
            u0, u1, u2 = u[t].unbind(-1)
            f = torch.sigmoid(u1 + forget_bias)
            r = torch.sigmoid(u2 + reset_bias)
            c = f * c + (1 - f) * u0
            h.append(r * torch.tanh(c) + (1 - r) * x[t])
        return self.out(torch.stack(h))


class SpeechCTC(nn.Module):
    """assemblyai's model: CNN, ResCNN with layer norm over features, bidirectional GRU."""

    def __init__(self, rnn_dim=24, n_class=12, n_feats=16):
        super().__init__()
        n_feats = n_feats // 2
        self.cnn = nn.Conv2d(1, 16, 3, stride=2, padding=3 // 2)
        self.norm = nn.LayerNorm(n_feats)
        self.res = nn.Conv2d(16, 16, 3, padding=1)
        self.fully_connected = nn.Linear(n_feats * 16, rnn_dim)
        self.birnn = nn.GRU(rnn_dim, rnn_dim, num_layers=1, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(
            nn.Linear(rnn_dim * 2, rnn_dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(rnn_dim, n_class)
        )

    def forward(self, x):
        x = self.cnn(x)
        residual = x
        x = self.norm(x.transpose(2, 3).contiguous()).transpose(2, 3).contiguous()
        x = residual + self.res(F.gelu(x))
        sizes = x.size()
        x = x.view(sizes[0], sizes[1] * sizes[2], sizes[3])
        x = x.transpose(1, 2)
        x = self.fully_connected(x)
        x, _ = self.birnn(x)
        return F.log_softmax(self.classifier(x), dim=2)


class Prenet(nn.Module):
    """Tacotron 2: dropout that stays on in evaluation."""

    def __init__(self, in_dim, sizes):
        super().__init__()
        in_sizes = [in_dim, *sizes[:-1]]
        self.layers = nn.ModuleList(
            [nn.Linear(i, o, bias=False) for i, o in zip(in_sizes, sizes, strict=True)]
        )

    def forward(self, x):
        for linear in self.layers:
            x = F.dropout(F.relu(linear(x)), p=0.5, training=True)
        return x


class TacotronDecoder(nn.Module):
    """Prenet, LSTMCell, location features from cumulative attention weights, postnet."""

    def __init__(self, n_mels=8, enc=16, dec=32):
        super().__init__()
        self.dec, self.n_mels = dec, n_mels
        self.prenet = Prenet(n_mels, [24, 24])
        self.rnn = nn.LSTMCell(24 + enc, dec)
        self.query_layer = nn.Linear(dec, 20, bias=False)
        self.memory_layer = nn.Linear(enc, 20, bias=False)
        self.location_conv = nn.Conv1d(1, 6, 5, padding=2, bias=False)
        self.location_dense = nn.Linear(6, 20, bias=False)
        self.v = nn.Linear(20, 1, bias=False)
        self.projection = nn.Linear(dec + enc, n_mels)
        self.postnet = nn.Sequential(
            nn.Conv1d(n_mels, 24, 5, padding=2), nn.BatchNorm1d(24), nn.Tanh(),
            nn.Conv1d(24, n_mels, 5, padding=2),
        )  # fmt: skip

    def forward(self, memory, mels):
        b = memory.size(0)
        h, c = memory.new_zeros(b, self.dec), memory.new_zeros(b, self.dec)
        cum = memory.new_zeros(b, memory.size(1))
        context = memory.new_zeros(b, memory.size(2))
        processed = self.memory_layer(memory)
        frames = []
        for mel in self.prenet(mels).unbind(1):
            h, c = self.rnn(torch.cat((mel, context), -1), (h, c))
            loc = self.location_dense(self.location_conv(cum.unsqueeze(1)).transpose(1, 2))
            energies = self.v(torch.tanh(self.query_layer(h.unsqueeze(1)) + processed + loc))
            weights = F.softmax(energies.squeeze(-1), dim=1)
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            cum = cum + weights
            frames.append(self.projection(torch.cat((h, context), dim=1)))
        out = torch.stack(frames).transpose(0, 1).contiguous()
        out = out.view(out.size(0), -1, self.n_mels).transpose(1, 2)
        return out, out + self.postnet(out)


class WaveNet(nn.Module):
    """Gated dilated causal convolutions; skips are cut to the last length and added."""

    def __init__(self, residual_channels=16, dilation_channels=24, skip_channels=32, classes=20):
        super().__init__()
        self.start_conv = nn.Conv1d(classes, residual_channels, 1)
        self.filter_convs, self.gate_convs = nn.ModuleList(), nn.ModuleList()
        self.residual_convs, self.skip_convs = nn.ModuleList(), nn.ModuleList()
        self.dilations = [1, 2, 4]
        for d in self.dilations:
            self.filter_convs.append(nn.Conv1d(residual_channels, dilation_channels, 2, dilation=d))
            self.gate_convs.append(nn.Conv1d(residual_channels, dilation_channels, 2, dilation=d))
            self.residual_convs.append(nn.Conv1d(dilation_channels, residual_channels, 1))
            self.skip_convs.append(nn.Conv1d(dilation_channels, skip_channels, 1))
        self.end_conv_1 = nn.Conv1d(skip_channels, 32, 1)
        self.end_conv_2 = nn.Conv1d(32, classes, 1)

    def forward(self, x):
        x = self.start_conv(x)
        skip = 0
        for i in range(len(self.dilations)):
            residual = x
            x = torch.tanh(self.filter_convs[i](x)) * torch.sigmoid(self.gate_convs[i](x))
            s = self.skip_convs[i](x)
            try:
                skip = skip[:, :, -s.size(2) :]
            except TypeError:
                skip = 0
            skip = s + skip
            x = self.residual_convs[i](x)
            x = x + residual[:, :, self.dilations[i] :]
        x = F.relu(self.end_conv_1(F.relu(skip)))
        return self.end_conv_2(x).transpose(1, 2)


class Chomp1d(nn.Module):
    def __init__(self, chomp_size):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """locuslab/TCN: weight norm (the old hook), chomp, dropout."""

    def __init__(self, n_inputs, n_outputs, kernel_size, dilation):
        super().__init__()
        pad = (kernel_size - 1) * dilation
        self.conv1 = weight_norm(
            nn.Conv1d(n_inputs, n_outputs, kernel_size, padding=pad, dilation=dilation)
        )
        self.conv2 = weight_norm(
            nn.Conv1d(n_outputs, n_outputs, kernel_size, padding=pad, dilation=dilation)
        )
        self.net = nn.Sequential(
            self.conv1, Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
            self.conv2, Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()
        self.conv1.weight.data.normal_(0, 0.01)

    def forward(self, x):
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    def __init__(self, input_size=4, num_channels=(16, 24, 24), output_size=3):
        super().__init__()
        layers = []
        for i, out_channels in enumerate(num_channels):
            in_channels = input_size if i == 0 else num_channels[i - 1]
            layers.append(TemporalBlock(in_channels, out_channels, 3, dilation=2**i))
        self.tcn = nn.Sequential(*layers)
        self.linear = nn.Linear(num_channels[-1], output_size)

    def forward(self, x):
        return self.linear(self.tcn(x)[:, :, -1])


class M5(nn.Module):
    """The speech-command tutorial: raw audio, avg_pool1d over x.shape[-1], permute."""

    def __init__(self, n_input=1, n_output=6, stride=4, n_channel=16):
        super().__init__()
        self.conv1 = nn.Conv1d(n_input, n_channel, kernel_size=16, stride=stride)
        self.bn1 = nn.BatchNorm1d(n_channel)
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(n_channel, 2 * n_channel, kernel_size=3)
        self.bn2 = nn.BatchNorm1d(2 * n_channel)
        self.pool2 = nn.MaxPool1d(2)
        self.fc1 = nn.Linear(2 * n_channel, n_output)

    def forward(self, x):
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = F.avg_pool1d(x, x.shape[-1])
        x = x.permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


OFFSETS = constant([0, 5, 9])

CASES: tuple[Case, ...] = (
    Case("plain/text_cnn", TextCNN, given(integers(60, 3, 9))),
    Case("plain/fasttext_bag", FastText, given(integers(80, 14), OFFSETS)),
    Case("plain/qrnn", QRNN, given(integers(50, 3, 6))),
    Case("plain/sru", SRU, given(normal(6, 3, 6))),
    Case("plain/speech_ctc", SpeechCTC, given(normal(2, 1, 16, 20))),
    Case("plain/tacotron_decoder", TacotronDecoder, given(normal(2, 7, 16), normal(2, 4, 8))),
    Case("plain/wavenet", WaveNet, given(normal(2, 20, 24))),
    Case("plain/tcn_weight_norm", TCN, given(normal(3, 4, 20))),
    Case("plain/m5_audio", M5, given(normal(2, 1, 200))),
)
