"""Diffusion, flows, reversible blocks and super-resolution."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal


def get_timestep_embedding(timesteps, embedding_dim):
    half_dim = embedding_dim // 2
    emb = math.log(10000) / (half_dim - 1)
    emb = torch.exp(torch.arange(half_dim, dtype=torch.float32) * -emb)
    emb = emb.to(device=timesteps.device)
    emb = timesteps.float()[:, None] * emb[None, :]
    emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=1)
    if embedding_dim % 2 == 1:
        emb = F.pad(emb, (0, 1, 0, 0))
    return emb


def nonlinearity(x):
    return x * torch.sigmoid(x)


def Normalize(in_channels):
    return nn.GroupNorm(num_groups=8, num_channels=in_channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """ermongroup/ddim: GroupNorm, swish, the time embedding added in the middle."""

    def __init__(self, in_channels, out_channels, temb_channels, dropout=0.1):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, 1, 1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        if self.in_channels != self.out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Attention over pixels by bmm, scaled by int(c) ** (-0.5)."""

    def __init__(self, in_channels):
        super().__init__()
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.bmm(q, k) * (int(c) ** (-0.5))
        w_ = F.softmax(w_, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), w_).reshape(b, c, h, w)
        return x + self.proj_out(h_)


class DDPMUNet(nn.Module):
    """The list of skips is popped; levels live in nested module lists."""

    def __init__(self, ch=16, ch_mult=(1, 2)):
        super().__init__()
        self.ch = ch
        self.temb_ch = ch * 4
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)]
        )
        self.conv_in = nn.Conv2d(3, ch, 3, 1, 1)
        self.down = nn.ModuleList()
        block_in = ch
        for mult in ch_mult:
            level = nn.Module()
            level.block = ResnetBlock(block_in, ch * mult, self.temb_ch)
            block_in = ch * mult
            level.downsample = nn.Conv2d(block_in, block_in, 3, 2, 1)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(block_in, block_in, self.temb_ch)
        self.mid.attn_1 = AttnBlock(block_in)
        self.up = nn.ModuleList()
        for mult in reversed(ch_mult):
            level = nn.Module()
            level.block = ResnetBlock(block_in + ch * mult, ch * mult, self.temb_ch)
            block_in = ch * mult
            self.up.append(level)
        self.norm_out = Normalize(block_in)
        self.conv_out = nn.Conv2d(block_in, 3, 3, 1, 1)

    def forward(self, x, t):
        temb = get_timestep_embedding(t, self.ch)
        temb = self.temb.dense[1](nonlinearity(self.temb.dense[0](temb)))
        h = self.conv_in(x)
        hs = []
        for level in self.down:
            h = level.block(h, temb)
            hs.append(h)
            h = level.downsample(h)
        h = self.mid.attn_1(self.mid.block_1(h, temb))
        for level in self.up:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = level.block(torch.cat([h, hs.pop()], dim=1), temb)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class LucidBlock(nn.Module):
    """lucidrains' block: scale and shift by chunk from the time MLP."""

    def __init__(self, dim, dim_out, time_emb_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(4, dim_out)
        self.act = nn.SiLU()
        self.block2 = nn.Sequential(nn.Conv2d(dim_out, dim_out, 3, padding=1), nn.GELU())
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x, time_emb):
        scale, shift = self.mlp(time_emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.proj(x))
        h = self.act(h * (scale + 1) + shift)
        return self.block2(h) + self.res_conv(x)


class LinearAttention2d(nn.Module):
    """heads from a fused convolution, context by einsum, softmax on both sides."""

    def __init__(self, dim, heads=2, dim_head=12):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        hidden_dim = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), nn.GroupNorm(1, dim))

    def forward(self, x):
        b, _c, h, w = x.shape
        qkv = self.to_qkv(x).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in qkv)
        q = q.softmax(dim=-2) * self.scale
        k = k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, -1, h, w)) + x


class LucidUnet(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.init_conv = nn.Conv2d(3, dim, 7, padding=3)
        self.freqs = nn.Parameter(torch.randn(8))
        self.time_mlp = nn.Sequential(nn.Linear(17, 32), nn.GELU(), nn.Linear(32, 32))
        self.down = LucidBlock(dim, dim * 2, 32)
        self.attn = LinearAttention2d(dim * 2)
        self.mid = LucidBlock(dim * 2, dim * 2, 32)
        self.up = LucidBlock(dim * 3, dim, 32)
        self.final_conv = nn.Conv2d(dim, 3, 1)

    def forward(self, x, time):
        t = time.float()[:, None]
        freqs = t * self.freqs[None] * 2 * math.pi
        t = self.time_mlp(torch.cat((t, freqs.sin(), freqs.cos()), dim=-1))
        x = self.init_conv(x)
        r = x.clone()
        x = self.attn(self.down(x, t))
        x = self.mid(F.avg_pool2d(x, 2), t)
        x = torch.cat((F.interpolate(x, scale_factor=2), r), dim=1)
        return self.final_conv(self.up(x, t))


class RealNVPCoupling(nn.Module):
    """Half of the variables transform the other half; the halves swap by flip."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim // 2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, dim),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.zeros(dim // 2))

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        log_s, t = self.net(x_a).chunk(2, dim=1)
        log_s = torch.tanh(log_s) * self.scale.exp()
        y_b = x_b * torch.exp(log_s) + t
        return torch.cat([x_a, y_b], dim=1).flip(1), log_s.sum(dim=1)


class RealNVP(nn.Module):
    def __init__(self, dim=6, hidden=32, layers=4):
        super().__init__()
        self.layers = nn.ModuleList([RealNVPCoupling(dim, hidden) for _ in range(layers)])
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("cov", torch.eye(dim))

    def forward(self, x):
        log_det = 0
        for layer in self.layers:
            x, ld = layer(x)
            log_det = log_det + ld
        log_prob = -0.5 * (x - self.mean).pow(2).sum(1) - 0.5 * x.size(1) * math.log(2 * math.pi)
        return log_prob + log_det


class RevBlock(nn.Module):
    """RevNet's additive coupling: f and g act on the two halves of the channels."""

    def __init__(self, channels, bottleneck):
        super().__init__()
        half = channels // 2
        self.f = self.residual(half, bottleneck)
        self.g = self.residual(half, bottleneck)

    @staticmethod
    def residual(half, bottleneck):
        return nn.Sequential(
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, bottleneck, 3, padding=1, bias=False),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(),
            nn.Conv2d(bottleneck, half, 3, padding=1, bias=False),
        )

    def forward(self, x):
        x1, x2 = torch.chunk(x, 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


class RevNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(RevBlock(32, 24), RevBlock(32, 24))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(F.relu(self.blocks(self.stem(x))).mean(dim=(2, 3)))


class SRCNN(nn.Module):
    def __init__(self, num_channels=1):
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, 64, kernel_size=9, padding=9 // 2)
        self.conv2 = nn.Conv2d(64, 32, kernel_size=5, padding=5 // 2)
        self.conv3 = nn.Conv2d(32, num_channels, kernel_size=5, padding=5 // 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.conv3(x)


class ESPCN(nn.Module):
    """PyTorch's own super_resolution example: sub-pixel convolution straight to the output."""

    def __init__(self, upscale_factor=2):
        super().__init__()
        self.relu = nn.Tanh()
        self.conv1 = nn.Conv2d(1, 64, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(64, 32, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(32, upscale_factor**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)

    def forward(self, x):
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.pixel_shuffle(self.conv3(x))


class EDSR(nn.Module):
    """Mean shift by a frozen convolution, scaled residuals, up-sampler with pixel shuffle."""

    def __init__(self, n_feats=24, n_resblocks=2, scale=2):
        super().__init__()
        self.sub_mean = nn.Conv2d(3, 3, kernel_size=1)
        self.sub_mean.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.sub_mean.bias.data = -torch.tensor([0.45, 0.44, 0.40])
        for p in self.sub_mean.parameters():
            p.requires_grad = False
        self.head = nn.Conv2d(3, n_feats, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n_feats, n_feats, 3, padding=1),
                nn.ReLU(True),
                nn.Conv2d(n_feats, n_feats, 3, padding=1),
            )
            for _ in range(n_resblocks)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(n_feats, scale * scale * n_feats, 3, padding=1),
            nn.PixelShuffle(scale),
            nn.Conv2d(n_feats, 3, 3, padding=1),
        )

    def forward(self, x):
        x = self.head(self.sub_mean(x))
        res = x
        for block in self.body:
            res = res + block(res).mul(0.1)
        res += x
        return self.tail(res)


IMAGE = given(normal(2, 3, 8, 8))

CASES: tuple[Case, ...] = (
    Case("plain/ddpm_unet", DDPMUNet, given(normal(2, 3, 8, 8), integers(1000, 2))),
    Case("plain/lucid_unet", LucidUnet, given(normal(2, 3, 8, 8), integers(1000, 2))),
    Case("plain/real_nvp", RealNVP, given(normal(8, 6))),
    Case("plain/revnet", RevNet, IMAGE),
    Case("plain/srcnn", SRCNN, given(normal(2, 1, 12, 12))),
    Case("plain/espcn", ESPCN, given(normal(2, 1, 12, 12))),
    Case("plain/edsr", EDSR, IMAGE),
)
