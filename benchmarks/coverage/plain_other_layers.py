"""Layers people write themselves: experts, low rank, gates, state spaces, parametrisations."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal
from torch.nn.utils import parametrizations


class SparseMoE(nn.Module):
    """Mixtral's loop: top-k router, torch.where on a one-hot mask, index_add_ for each expert."""

    def __init__(self, dim=24, hidden=32, num_experts=4, top_k=2):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.embed = nn.Linear(6, dim)
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
                for _ in range(4)
            ]
        )
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        batch_size, sequence_length, hidden_dim = x.shape
        flat = x.view(-1, hidden_dim)
        router_logits = self.gate(flat)
        weights, selected = torch.topk(F.softmax(router_logits, dim=1), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        final = torch.zeros_like(flat)
        expert_mask = F.one_hot(selected, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[expert_idx])
            current = self.experts[expert_idx](flat[top_x]) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current)
        return self.head(x + final.reshape(batch_size, sequence_length, hidden_dim)), router_logits


class SoftMoE(nn.Module):
    """Dispatch and combine by einsum over slots; expert weights stacked in one parameter."""

    def __init__(self, dim=24, num_experts=3, slots=2, hidden=32):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.phi = nn.Parameter(torch.randn(dim, num_experts, slots) * dim**-0.5)
        self.w1 = nn.Parameter(torch.randn(num_experts, dim, hidden) * dim**-0.5)
        self.b1 = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, dim) * hidden**-0.5)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        logits = torch.einsum("bnd,des->bnes", x, self.phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bnd,bnes->ebsd", x, dispatch)
        e, b, s, d = slots.shape
        h = F.gelu(torch.bmm(slots.reshape(e, b * s, d), self.w1) + self.b1)
        out = torch.bmm(h, self.w2).view(e, b, s, d)
        return self.head(x + torch.einsum("ebsd,bnes->bnd", out, combine))


class LoRALinear(nn.Linear):
    """microsoft/LoRA: a frozen weight, A and B beside it, scaling by alpha over r."""

    def __init__(self, in_features, out_features, r=4, lora_alpha=8, **kwargs):
        super().__init__(in_features, out_features, **kwargs)
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_dropout = nn.Dropout(0.1)
        self.lora_A = nn.Parameter(self.weight.new_zeros((r, in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((out_features, r)))
        self.scaling = self.lora_alpha / self.r
        self.weight.requires_grad = False
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.normal_(self.lora_B, std=0.02)

    def forward(self, x):
        result = F.linear(x, self.weight, bias=self.bias)
        low = self.lora_dropout(x) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)
        return result + low * self.scaling


class LoRANet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = LoRALinear(12, 48), LoRALinear(48, 32), LoRALinear(32, 4)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class AdapterBlock(nn.Module):
    """Houlsby adapters on a frozen block: down, non-linearity, up, skip."""

    def __init__(self, dim, bottleneck):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        for p in self.base.parameters():
            p.requires_grad_(False)
        self.norm = nn.LayerNorm(dim)
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        h = self.base(x)
        h = h + self.up(F.relu(self.down(h)))
        return self.norm(x + h)


class AdapterNet(nn.Sequential):
    def __init__(self, dim=24):
        super().__init__(
            nn.Linear(8, dim), AdapterBlock(dim, 16), AdapterBlock(dim, 16), nn.Linear(dim, 3)
        )


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """adaLN-zero: six modulations from one linear by chunk(6), norms without affine."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.num_heads = num_heads
        self.qkv, self.proj = (
            nn.Linear(hidden_size, hidden_size * 3),
            nn.Linear(hidden_size, hidden_size),
        )
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 48), nn.GELU(approximate="tanh"), nn.Linear(48, hidden_size)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def attn(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))

    def forward(self, x, c):
        mods = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mods
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """facebookresearch/DiT: label dropout, unpatchify by einsum."""

    def __init__(self, hidden_size=32, patch=2, classes=5, channels=3):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = nn.Conv2d(channels, hidden_size, patch, patch)
        self.t_embedder = nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, hidden_size))
        self.y_embedder = nn.Embedding(classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, 4) for _ in range(2)])
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def unpatchify(self, x):
        c, p = self.channels, self.patch
        h = w = int(x.shape[1] ** 0.5)
        x = x.reshape(shape=(x.shape[0], h, w, p, p, c))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], c, h * p, h * p))

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        freqs = torch.exp(-math.log(10000) * torch.arange(0, 8, dtype=torch.float32) / 8)
        args = t[:, None].float() * freqs[None]
        c = self.t_embedder(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))
        c = c + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.unpatchify(self.linear(modulate(self.norm_final(x), shift, scale)))


class Highway(nn.Module):
    """Three lists of linears: a non-linear, a linear and a gate."""

    def __init__(self, size=32, num_layers=2):
        super().__init__()
        self.inp = nn.Linear(10, size)
        self.nonlinear = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.gate = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.mid, self.out = nn.Linear(size, 24), nn.Linear(24, 2)
        for g in self.gate:
            g.bias.data.fill_(-2)

    def forward(self, x):
        x = self.inp(x)
        for h, t in zip(self.nonlinear, self.gate, strict=True):
            gate = torch.sigmoid(t(x))
            x = gate * F.relu(h(x)) + (1 - gate) * x
        return self.out(F.relu(self.mid(x)))


class Maxout(nn.Module):
    """One linear, view to pieces, max over them; shape handled as a list."""

    def __init__(self, d_in, d_out, pool_size):
        super().__init__()
        self.d_in, self.d_out, self.pool_size = d_in, d_out, pool_size
        self.lin = nn.Linear(d_in, d_out * pool_size)

    def forward(self, inputs):
        shape = list(inputs.size())
        shape[-1] = self.d_out
        shape.append(self.pool_size)
        out = self.lin(inputs)
        m, _i = out.view(*shape).max(len(shape) - 1)
        return m


class RWKV(nn.Module):
    """Time mixing with token shift by ZeroPad2d, the wkv loop, squared relu channel mixing."""

    def __init__(self, vocab=40, n_embd=24):
        super().__init__()
        self.emb = nn.Embedding(vocab, n_embd)
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_decay, self.time_first = (nn.Parameter(torch.randn(n_embd)) for _ in range(2))
        self.time_mix_k, self.time_mix_v = (
            nn.Parameter(torch.rand(1, 1, n_embd)) for _ in range(2)
        )
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(n_embd, n_embd, bias=False) for _ in range(4)
        )
        self.ffn_key, self.ffn_value = nn.Linear(n_embd, 64), nn.Linear(64, n_embd)
        self.head = nn.Linear(n_embd, vocab, bias=False)

    def forward(self, idx):
        x = self.emb(idx)
        h = self.ln1(x)
        xx = self.time_shift(h)
        k = self.key(h * self.time_mix_k + xx * (1 - self.time_mix_k))
        v = self.value(h * self.time_mix_v + xx * (1 - self.time_mix_v))
        r = torch.sigmoid(self.receptance(h))
        num = den = torch.zeros_like(k[:, 0])
        w, u = -torch.exp(self.time_decay), self.time_first
        out = []
        for t in range(k.size(1)):
            kt, vt = k[:, t], v[:, t]
            out.append((num + torch.exp(u + kt) * vt) / (den + torch.exp(u + kt)))
            num = torch.exp(w) * num + torch.exp(kt) * vt
            den = torch.exp(w) * den + torch.exp(kt)
        x = x + self.output(r * torch.stack(out, dim=1))
        return self.head(x + self.ffn_value(torch.square(torch.relu(self.ffn_key(self.ln2(x))))))


class S4D(nn.Module):
    """Diagonal state space: the kernel from complex parameters, convolution by FFT, GLU output."""

    def __init__(self, d_model=24, N=8):
        super().__init__()
        self.encoder = nn.Linear(3, d_model)
        self.log_dt = nn.Parameter(torch.rand(d_model) - 4)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d_model, N // 2, dtype=torch.cfloat)))
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(d_model, N // 2)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(N // 2).repeat(d_model, 1).float())
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))
        self.norm = nn.LayerNorm(d_model)
        self.decoder = nn.Linear(d_model, 3)

    def kernel(self, L):
        dt = torch.exp(self.log_dt)
        C = torch.view_as_complex(self.C)
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * dt.unsqueeze(-1)
        K = dtA.unsqueeze(-1) * torch.arange(L)
        C = C * (torch.exp(dtA) - 1.0) / A
        return 2 * torch.einsum("hn, hnl -> hl", C, torch.exp(K)).real

    def forward(self, x):
        x = self.encoder(x).transpose(-1, -2)
        L = x.size(-1)
        k_f = torch.fft.rfft(self.kernel(L), n=2 * L)
        u_f = torch.fft.rfft(x, n=2 * L)
        y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
        y = F.gelu(y + x * self.D.unsqueeze(-1))
        z = x + self.output_linear(y)
        return self.decoder(self.norm(z.transpose(-1, -2)).mean(dim=1))


def parametrized_mlp():
    """The new parametrizations: orthogonal, weight norm and spectral norm in one net."""
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(12, 32)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(32, 48)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(48, 24)),
        nn.Tanh(),
        nn.Linear(24, 4),
    )


IDS = given(integers(40, 2, 6))

CASES: tuple[Case, ...] = (
    Case("plain/moe_index_add", SparseMoE, given(normal(3, 8, 6))),
    Case("plain/moe_soft_einsum", SoftMoE, given(normal(3, 8, 6))),
    Case("plain/lora", LoRANet, given(normal(5, 12))),
    Case("plain/adapters", AdapterNet, given(normal(5, 8))),
    Case("plain/dit_adaln", DiT, given(normal(2, 3, 8, 8), integers(100, 2), integers(5, 2))),
    Case("plain/highway", Highway, given(normal(5, 10))),
    Case(
        "plain/maxout",
        lambda: nn.Sequential(
            Maxout(10, 32, 3), nn.Dropout(0.2), Maxout(32, 24, 2), nn.Linear(24, 4)
        ),
        given(normal(5, 10)),
    ),
    Case("plain/rwkv", RWKV, IDS),
    Case("plain/s4d", S4D, given(normal(2, 10, 3))),
    Case("plain/parametrizations", parametrized_mlp, given(normal(5, 12))),
)
