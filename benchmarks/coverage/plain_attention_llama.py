"""Newer language models: rotary positions, grouped queries, linear attention, state spaces."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers


class RMSNorm(nn.Module):
    """Meta's: computed in float, cast back."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def precompute_freqs_cis(dim, end, theta=10000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    t = torch.arange(end)
    freqs = torch.outer(t, freqs).float()
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(xq, xk, freqs_cis):
    """Complex numbers, as in the original release."""
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, xq_.shape[1], 1, xq_.shape[-1])
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x, n_rep):
    """torch.repeat_interleave(x, dim=2, repeats=n_rep)"""
    bs, slen, n_kv_heads, head_dim = x.shape
    if n_rep == 1:
        return x
    return (
        x[:, :, :, None, :]
        .expand(bs, slen, n_kv_heads, n_rep, head_dim)
        .reshape(bs, slen, n_kv_heads * n_rep, head_dim)
    )


class LlamaAttention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.n_rep = n_heads // n_kv_heads
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        keys = repeat_kv(xk, self.n_rep).transpose(1, 2)
        values = repeat_kv(xv, self.n_rep).transpose(1, 2)
        xq = xq.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        output = output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class GroupedQueryAttention(nn.Module):
    """enable_gqa, real rotary positions, norms on queries and keys."""

    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.hd = dim // n_heads
        self.wqkv = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * self.hd, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.hd), RMSNorm(self.hd)
        self.wo = nn.Linear(n_heads * self.hd, dim, bias=False)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads

    def forward(self, x, freqs_cis, mask):
        b, t, _ = x.shape
        kv_size = self.n_kv_heads * self.hd
        q, k, v = self.wqkv(x).split([self.n_heads * self.hd, kv_size, kv_size], dim=-1)
        q = self.q_norm(q.view(b, t, self.n_heads, self.hd)).transpose(1, 2)
        k = self.k_norm(k.view(b, t, self.n_kv_heads, self.hd)).transpose(1, 2)
        v = v.view(b, t, self.n_kv_heads, self.hd).transpose(1, 2)
        cos, sin = freqs_cis.real[None, None], freqs_cis.imag[None, None]
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, self.n_heads * self.hd))

    @staticmethod
    def rotate(x, cos, sin):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class FusedSwiGLU(nn.Module):
    """One matrix for gate and value, chunk(2)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class LlamaFeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, multiple_of=8):
        super().__init__()
        hidden_dim = int(2 * hidden_dim / 3)
        hidden_dim = multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Llama(nn.Module):
    def __init__(self, attention=LlamaAttention, feed_forward=LlamaFeedForward, dim=32):
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, dim)
        self.attention = nn.ModuleList([attention(dim, 4, 2) for _ in range(2)])
        self.feed_forward = nn.ModuleList([feed_forward(dim, 48) for _ in range(2)])
        self.attention_norm = nn.ModuleList([RMSNorm(dim) for _ in range(2)])
        self.ffn_norm = nn.ModuleList([RMSNorm(dim) for _ in range(2)])
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, 50, bias=False)
        self.freqs_cis = precompute_freqs_cis(dim // 4, 32)

    @torch.no_grad()
    def _mask(self, seqlen, device):
        mask = torch.full((seqlen, seqlen), float("-inf"), device=device)
        return torch.triu(mask, diagonal=1)

    def forward(self, tokens):
        _bsz, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = self.freqs_cis[:seqlen]
        mask = self._mask(seqlen, tokens.device)
        for i in range(2):
            h = h + self.attention[i](self.attention_norm[i](h), freqs_cis, mask)
            h = h + self.feed_forward[i](self.ffn_norm[i](h))
        return self.output(self.norm(h)).float()


class ALiBiMultiQuery(nn.Module):
    """ALiBi slopes as a buffer of the heads; one key and value head for all queries."""

    def __init__(self, dim=32, heads=4, vocab=40):
        super().__init__()
        self.num_heads = heads
        self.embed = nn.Embedding(vocab, dim)
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * (dim // heads), bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.ff = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim)
        )
        self.head = nn.Linear(dim, vocab)
        slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])
        self.register_buffer("m", slopes.view(heads, 1, 1))

    def forward(self, ids):
        x = self.embed(ids)
        h = self.norm(x)
        b, n, _ = h.shape
        q = self.to_q(h).reshape(b, n, self.num_heads, -1).permute(0, 2, 1, 3)
        k, v = self.to_kv(h).chunk(2, dim=-1)
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        sim = sim + self.m * distance
        causal = torch.ones(n, n, dtype=torch.bool).triu(1)
        attn = sim.masked_fill(causal, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = torch.einsum("b h i j, b j d -> b h i d", attn, v)
        x = x + self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))
        return self.head(x + self.ff(x))


class TransformerXLAttention(nn.Module):
    """Relative positions with two learned biases and the shift by padding; memory given."""

    def __init__(self, d_model=32, n_head=2, d_head=12):
        super().__init__()
        self.n_head, self.d_head = n_head, d_head
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.scale = 1 / (d_head**0.5)
        self.layer_norm = nn.LayerNorm(d_model)

    def _rel_shift(self, x):
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=1)
        x_padded = x_padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return x_padded[1:].view_as(x)

    def forward(self, w, r, mems):
        qlen, rlen, bsz = w.size(0), r.size(0), w.size(1)
        w_heads = self.qkv_net(torch.cat([mems, w], 0))
        r_head_k = self.r_net(r).view(rlen, self.n_head, self.d_head)
        w_head_q, w_head_k, w_head_v = torch.chunk(w_heads, 3, dim=-1)
        w_head_q = w_head_q[-qlen:].view(qlen, bsz, self.n_head, self.d_head)
        klen = w_head_k.size(0)
        w_head_k = w_head_k.view(klen, bsz, self.n_head, self.d_head)
        w_head_v = w_head_v.view(klen, bsz, self.n_head, self.d_head)
        AC = torch.einsum("ibnd,jbnd->ijbn", w_head_q + self.r_w_bias, w_head_k)
        BD = torch.einsum("ibnd,jnd->ijbn", w_head_q + self.r_r_bias, r_head_k)
        attn_prob = F.softmax((AC + self._rel_shift(BD)).mul_(self.scale), dim=1)
        attn_vec = torch.einsum("ijbn,jbnd->ibnd", attn_prob, w_head_v)
        attn_vec = attn_vec.contiguous().view(qlen, bsz, self.n_head * self.d_head)
        return self.layer_norm(w + self.o_net(attn_vec))


class TransformerXL(nn.Module):
    def __init__(self, d_model=32, mem=3):
        super().__init__()
        self.word_emb = nn.Embedding(40, d_model)
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0.0, d_model, 2) / d_model)))
        self.layers = nn.ModuleList([TransformerXLAttention(d_model) for _ in range(2)])
        self.out = nn.Linear(d_model, 40)
        self.d_model, self.mem_len = d_model, mem

    def forward(self, data):
        h = self.word_emb(data).mul_(self.d_model**0.5)
        mems = torch.zeros(self.mem_len, data.size(1), self.d_model)
        pos = torch.arange(self.mem_len + data.size(0) - 1, -1, -1.0)
        sinusoid = torch.outer(pos, self.inv_freq)
        r = torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1)
        for layer in self.layers:
            h = layer(h, r, mems)
        return self.out(h)


class MambaBlock(nn.Module):
    """mamba-minimal: in_proj chunk, depthwise conv, x_proj split, selective scan by a loop."""

    def __init__(self, d_model, d_state=4, d_conv=3, expand=2):
        super().__init__()
        self.d_inner = d_model * expand
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, self.d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + d_state * 2, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True)
        A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x):
        _b, length, _d = x.shape
        x, res = self.in_proj(x).split(split_size=[self.d_inner, self.d_inner], dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, :length].transpose(1, 2)
        y = self.ssm(F.silu(x)) * F.silu(res)
        return self.out_proj(y)

    def ssm(self, x):
        (d_in, n) = self.A_log.shape
        A = -torch.exp(self.A_log.float())
        x_dbl = self.x_proj(x)
        (delta, B, C) = x_dbl.split(split_size=[self.dt_rank, n, n], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, x)
        h = torch.zeros((x.size(0), d_in, n), device=x.device)
        ys = []
        for i in range(x.size(1)):
            h = deltaA[:, i] * h + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i, :]))
        return torch.stack(ys, dim=1) + x * self.D


class Mamba(nn.Module):
    def __init__(self, vocab=40, d_model=24, n_layer=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList([MambaBlock(d_model) for _ in range(n_layer)])
        self.norms = nn.ModuleList([RMSNorm(d_model) for _ in range(n_layer)])
        self.norm_f = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x)) + x
        return self.lm_head(self.norm_f(x))


IDS = given(integers(40, 2, 7))

CASES: tuple[Case, ...] = (
    Case("plain/llama_complex", Llama, IDS),
    Case("plain/llama_gqa_swiglu", lambda: Llama(GroupedQueryAttention, FusedSwiGLU), IDS),
    Case("plain/alibi_multi_query", ALiBiMultiQuery, IDS),
    Case("plain/transformer_xl", TransformerXL, given(integers(40, 6, 2))),
    Case("plain/mamba_minimal", Mamba, IDS),
)
