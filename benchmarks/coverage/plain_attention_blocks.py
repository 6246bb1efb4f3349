"""Attention in other shapes: torch's own modules, latents, sets, low rank, experts, adapters."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal


class Seq2SeqTransformer(nn.Module):
    """nn.Transformer of the translation tutorial, time first, with masks and padding."""

    def __init__(self, vocab=40, emb_size=32, nhead=4, ffn=48):
        super().__init__()
        self.transformer = nn.Transformer(
            d_model=emb_size, nhead=nhead, num_encoder_layers=1, num_decoder_layers=1,
            dim_feedforward=ffn, dropout=0.1,
        )  # fmt: skip
        self.generator = nn.Linear(emb_size, vocab)
        self.src_tok_emb = nn.Embedding(vocab, emb_size)
        self.tgt_tok_emb = nn.Embedding(vocab, emb_size)
        self.emb_size = emb_size

    def forward(self, src, trg):
        tgt_mask = self.transformer.generate_square_subsequent_mask(trg.size(0))
        padding = (src == 1).transpose(0, 1)
        src_emb = self.src_tok_emb(src.long()) * math.sqrt(self.emb_size)
        tgt_emb = self.tgt_tok_emb(trg.long()) * math.sqrt(self.emb_size)
        outs = self.transformer(src_emb, tgt_emb, None, tgt_mask, None, padding, None, padding)
        return self.generator(outs)


class BatchFirstEncoder(nn.Module):
    """nn.TransformerEncoderLayer batch first, norm first, gelu, with a padding mask."""

    def __init__(self, features=6, d_model=32):
        super().__init__()
        self.inp = nn.Linear(features, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, 4, 64, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.out = nn.Linear(d_model, 3)

    def forward(self, x, src_key_padding_mask=None):
        x = self.encoder(self.inp(x), src_key_padding_mask=src_key_padding_mask)
        return self.out(x.mean(dim=1))


class CrossAttentionDecoder(nn.Module):
    """nn.TransformerDecoder over image features."""

    def __init__(self, vocab=40, d_model=32):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, d_model, 1)
        )
        self.embed = nn.Embedding(vocab, d_model)
        layer = nn.TransformerDecoderLayer(d_model, nhead=2, dim_feedforward=48, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=1)
        self.fc = nn.Linear(d_model, vocab)

    def forward(self, image, tokens):
        memory = self.backbone(image).flatten(2).permute(0, 2, 1)
        t = tokens.size(1)
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)
        return self.fc(self.decoder(self.embed(tokens), memory, tgt_mask=mask))


class DETR(nn.Module):
    """The minimal DETR of the paper's appendix: learned queries, row and column embeddings."""

    def __init__(self, num_classes=5, hidden_dim=32, nheads=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 48, 3, 4, 1), nn.BatchNorm2d(48), nn.ReLU())
        self.conv = nn.Conv2d(48, hidden_dim, 1)
        self.transformer = nn.Transformer(hidden_dim, nheads, 1, 1, 64)
        self.linear_class = nn.Linear(hidden_dim, num_classes + 1)
        self.linear_bbox = nn.Linear(hidden_dim, 4)
        self.query_pos = nn.Parameter(torch.rand(6, hidden_dim))
        self.row_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))
        self.col_embed = nn.Parameter(torch.rand(10, hidden_dim // 2))

    def forward(self, inputs):
        h = self.conv(self.backbone(inputs))
        H, W = h.shape[-2:]
        pos = torch.cat(
            [
                self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1),
                self.row_embed[:H].unsqueeze(1).repeat(1, W, 1),
            ],
            dim=-1,
        ).flatten(0, 1).unsqueeze(1)  # fmt: skip
        h = self.transformer(
            pos + 0.1 * h.flatten(2).permute(2, 0, 1),
            self.query_pos.unsqueeze(1).repeat(1, h.shape[0], 1),
        ).transpose(0, 1)
        return {
            "pred_logits": self.linear_class(h),
            "pred_boxes": self.linear_bbox(h).sigmoid(),
        }


class MHAClassifier(nn.Module):
    """nn.MultiheadAttention three ways: self, cross with kdim, weights returned."""

    def __init__(self, dim=24):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.context = nn.Linear(5, 20)
        self.self_attn = nn.MultiheadAttention(dim, 4, dropout=0.1, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, 4, kdim=20, vdim=20, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 48), nn.ReLU(), nn.Linear(48, dim))
        self.head = nn.Linear(dim, 3)

    def forward(self, x, ctx):
        x = self.embed(x)
        x = self.norm1(x + self.self_attn(x, x, x)[0])
        ctx = self.context(ctx)
        attended, weights = self.cross_attn(x, ctx, ctx)
        x = self.norm2(x + attended)
        return self.head((x + self.ff(x))[:, 0]), weights


class Perceiver(nn.Module):
    """Latents read the input by cross attention, then attend among themselves; tied layers."""

    def __init__(self, dim=5, latents=6, latent_dim=32, heads=2, dim_head=12):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, latent_dim))
        self.norm_l, self.norm_x = nn.LayerNorm(latent_dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(latent_dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, latent_dim)
        self.ff1 = nn.Linear(latent_dim, 2 * 48)
        self.ff2 = nn.Linear(48, latent_dim)
        self.logits = nn.Sequential(nn.LayerNorm(latent_dim), nn.Linear(latent_dim, 4))

    def forward(self, data):
        b = data.size(0)
        x = self.latents.unsqueeze(0).expand(b, -1, -1)
        for _ in range(2):
            q = self.to_q(self.norm_l(x))
            k, v = self.to_kv(self.norm_x(data)).chunk(2, dim=-1)
            q, k, v = (
                t.reshape(b, -1, self.heads, t.shape[-1] // self.heads)
                .permute(0, 2, 1, 3)
                .reshape(b * self.heads, -1, t.shape[-1] // self.heads)
                for t in (q, k, v)
            )
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * q.shape[-1] ** -0.5
            out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
            out = out.view(b, self.heads, -1, out.shape[-1]).permute(0, 2, 1, 3).flatten(2)
            x = x + self.to_out(out)
            a, gates = self.ff1(x).chunk(2, dim=-1)
            x = x + self.ff2(a * F.gelu(gates))
        return self.logits(x.mean(dim=-2))


class Linformer(nn.Module):
    """Keys and values projected along the sequence by parameters of their own."""

    def __init__(self, seq=12, dim=32, k=6, heads=4):
        super().__init__()
        self.heads, self.dim_head = heads, dim // heads
        self.embed = nn.Embedding(40, dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.proj_k = nn.Parameter(torch.randn(seq, k) / math.sqrt(k))
        self.proj_v = nn.Parameter(torch.randn(seq, k) / math.sqrt(k))
        self.to_out = nn.Linear(dim, dim)
        self.head = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 24), nn.ReLU(), nn.Linear(24, 3)
        )

    def forward(self, ids):
        x = self.embed(ids)
        b, n, d = x.shape
        d_h, h = self.dim_head, self.heads
        queries = self.to_q(x).reshape(b, n, h, -1).transpose(1, 2)
        keys = torch.einsum("bnd,nk->bkd", self.to_k(x), self.proj_k)
        values = torch.einsum("bnd,nk->bkd", self.to_v(x), self.proj_v)
        keys, values = (t.reshape(b, -1, h, d_h).transpose(1, 2) for t in (keys, values))
        attn = (torch.einsum("bhnd,bhkd->bhnk", queries, keys) * (d_h**-0.5)).softmax(dim=-1)
        out = torch.einsum("bhnk,bhkd->bhnd", attn, values)
        out = out.transpose(1, 2).reshape(b, n, d)
        return self.head(x + self.to_out(out)).mean(1)


class Performer(nn.Module):
    """Linear attention: elu + 1 features, the context first, the normaliser by a sum."""

    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.h = heads
        self.embed = nn.Linear(6, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 3)
        self.register_buffer("projection", torch.randn(10, dim // heads))

    def features(self, x):
        x = torch.einsum("...id,jd->...ij", x * x.shape[-1] ** -0.25, self.projection)
        return F.relu(x) + 1e-3

    def forward(self, x):
        x = self.embed(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 1, 4)
        q, k = self.features(q), self.features(k)
        k_sum = k.sum(dim=-2)
        D_inv = 1.0 / torch.einsum("...nd,...d->...n", q, k_sum)
        context = torch.einsum("...nd,...ne->...de", k, v)
        out = torch.einsum("...de,...nd,...n->...ne", context, q, D_inv)
        return self.head(x + self.out(out.permute(0, 2, 1, 3).reshape(b, n, c)))


class MAB(nn.Module):
    """Set transformer: heads split along features and stacked in the batch by cat."""

    def __init__(self, dim_Q, dim_K, dim_V, num_heads):
        super().__init__()
        self.dim_V, self.num_heads = dim_V, num_heads
        self.fc_q = nn.Linear(dim_Q, dim_V)
        self.fc_k = nn.Linear(dim_K, dim_V)
        self.fc_v = nn.Linear(dim_K, dim_V)
        self.fc_o = nn.Linear(dim_V, dim_V)

    def forward(self, Q, K):
        Q = self.fc_q(Q)
        K, V = self.fc_k(K), self.fc_v(K)
        dim_split = self.dim_V // self.num_heads
        Q_ = torch.cat(Q.split(dim_split, 2), 0)
        K_ = torch.cat(K.split(dim_split, 2), 0)
        V_ = torch.cat(V.split(dim_split, 2), 0)
        A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(self.dim_V), 2)
        O = torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)  # noqa: E741
        return O + F.relu(self.fc_o(O))


class SetTransformer(nn.Module):
    """Induced set attention, pooling by attention with a learned seed."""

    def __init__(self, dim=32):
        super().__init__()
        self.I = nn.Parameter(torch.randn(1, 5, dim))
        self.mab0, self.mab1 = MAB(dim, 3, dim, 4), MAB(3, dim, dim, 4)
        self.S = nn.Parameter(torch.randn(1, 1, dim))
        self.pma = MAB(dim, dim, dim, 4)
        self.dec = nn.Linear(dim, 5)

    def forward(self, X):
        H = self.mab0(self.I.repeat(X.size(0), 1, 1), X)
        X = self.mab1(X, H)
        return self.dec(self.pma(self.S.repeat(X.size(0), 1, 1), X)).squeeze(1)


class AttentionPooling(nn.Module):
    """CommonLit notebooks: tanh attention over tokens, softmax, weighted sum."""

    def __init__(self, vocab=40, hidden=32):
        super().__init__()
        self.embed = nn.Embedding(vocab, 24)
        self.proj = nn.Linear(24, hidden)
        self.attention = nn.Sequential(
            nn.Linear(hidden, 48), nn.Tanh(), nn.Linear(48, 1), nn.Softmax(dim=1)
        )
        self.regressor = nn.Sequential(nn.Linear(hidden, 1))

    def forward(self, batch):
        h = F.gelu(self.proj(self.embed(batch["input_ids"])))
        weights = self.attention(h) * batch["attention_mask"].unsqueeze(-1)
        context_vector = torch.sum(weights * h, dim=1)
        return self.regressor(context_vector)


BOOK = {"input_ids": integers(40, 3, 8), "attention_mask": integers(2, 3, 8)}
PAD = lambda generator: torch.arange(8)[None] >= torch.tensor([8, 5, 6])[:, None]  # noqa: E731

CASES: tuple[Case, ...] = (
    Case("plain/nn_transformer", Seq2SeqTransformer, given(integers(40, 7, 3), integers(40, 7, 3))),
    Case(
        "plain/nn_encoder_batch_first",
        BatchFirstEncoder,
        given(normal(3, 8, 6), src_key_padding_mask=PAD),
    ),
    Case(
        "plain/nn_decoder_captions",
        CrossAttentionDecoder,
        given(normal(2, 3, 8, 8), integers(40, 2, 5)),
    ),
    Case("plain/detr", DETR, given(normal(2, 3, 16, 16))),
    Case("plain/nn_mha", MHAClassifier, given(normal(3, 7, 6), normal(3, 4, 5))),
    Case("plain/perceiver", Perceiver, given(normal(3, 9, 5))),
    Case("plain/linformer", Linformer, given(integers(40, 2, 12))),
    Case("plain/performer", Performer, given(normal(2, 8, 6))),
    Case("plain/set_transformer", SetTransformer, given(normal(3, 7, 3))),
    Case("plain/attention_pooling", AttentionPooling, given(BOOK)),
)
