"""More models of the zoo: recurrent, encoder and decoder, experts, a generator, a graph.

Like ``tests/zoo.py``, of which this is a part: plain torch, as users write it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
VOCAB = 23


class LSTMTagger(nn.Module):
    """Token embeddings, a bidirectional LSTM, a label for each token."""

    def __init__(self, d: int = 8, hidden: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, d)
        self.lstm = nn.LSTM(d, hidden, batch_first=True, bidirectional=True)
        self.hidden2tag = nn.Linear(2 * hidden, CLASSES)

    def forward(self, sentence: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(sentence))
        return self.hidden2tag(out)


class GRUClassifier(nn.Module):
    """Two stacked GRUs over a signal, the last state classified."""

    def __init__(self, features: int = 6, hidden: int = 12) -> None:
        super().__init__()
        self.proj = nn.Linear(features, 9)
        self.gru = nn.GRU(9, hidden, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(torch.tanh(self.proj(x)))
        return self.fc(self.norm(out[:, -1]))


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, added and normalised."""

    position_ids: Tensor

    def __init__(self, d: int, context: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, d, padding_idx=0)
        self.position_embeddings = nn.Embedding(context, d)
        self.token_type_embeddings = nn.Embedding(2, d)
        self.LayerNorm = nn.LayerNorm(d, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(context).expand((1, -1)))

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.LayerNorm(x + self.position_embeddings(self.position_ids[:, : ids.size(1)]))


class BertSelfAttention(nn.Module):
    """Bidirectional attention with three projections."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = heads, d // heads
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_size)
        context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        return context.view(x.size(0), x.size(1), self.num_heads * self.head_size)


class BertLayer(nn.Module):
    """A post-LayerNorm encoder block."""

    def __init__(self, d: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = BertSelfAttention(d, heads)
        self.attention_output = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d, eps=1e-12)
        self.intermediate = nn.Linear(d, hidden)
        self.output = nn.Linear(hidden, d)
        self.norm2 = nn.LayerNorm(d, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention_output(self.attention(x)))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


class Bert(nn.Module):
    """An encoder in the style of BERT, pooled at its first token."""

    def __init__(self, d: int = 16, heads: int = 2, hidden: int = 28, context: int = 16) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(d, context)
        self.layer = nn.ModuleList([BertLayer(d, heads, hidden) for _ in range(2)])
        self.pooler = nn.Linear(d, d)
        self.classifier = nn.Linear(d, CLASSES)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layer:
            x = layer(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class CrossAttention(nn.Module):
    """Attention of one sequence to another one, or to itself."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        k, v = self.kv(memory).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Seq2SeqBlock(nn.Module):
    """A pre-norm block of an encoder, or with cross-attention of a decoder."""

    def __init__(self, d: int, heads: int, hidden: int, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(d), CrossAttention(d, heads)
        self.cross_attn = CrossAttention(d, heads) if decoder else None
        self.norm2 = nn.LayerNorm(d) if decoder else None
        self.norm3 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h, causal=memory is not None)
        if self.cross_attn is not None and self.norm2 is not None:
            x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class Seq2Seq(nn.Module):
    """Encoder and decoder with one embedding for both, tied to the output layer."""

    def __init__(self, d: int = 16, heads: int = 2, context: int = 16) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCAB, d)
        nn.init.normal_(self.shared.weight, std=0.3)
        self.pos = nn.Parameter(torch.randn(context, d) * 0.1)
        self.encoder = nn.ModuleList([Seq2SeqBlock(d, heads, 24, False)])
        self.decoder = nn.ModuleList([Seq2SeqBlock(d, heads, 24, True)])
        self.final_norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, VOCAB, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.shared(source) + self.pos[: source.size(1)]
        for block in self.encoder:
            memory = block(memory)
        x = self.shared(target) + self.pos[: target.size(1)]
        for block in self.decoder:
            x = block(x, memory)
        return self.lm_head(self.final_norm(x))


class Expert(nn.Module):
    """A feed-forward layer."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)))


class MixtureOfExperts(nn.Module):
    """A token classifier whose feed-forward layer sends each token to two of three experts."""

    def __init__(self, d: int = 12, experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.embed = nn.Embedding(VOCAB, d)
        self.norm = nn.LayerNorm(d)
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList([Expert(d, 18) for _ in range(experts)])
        self.head = nn.Linear(d, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        weights, chosen = self.gate(h).topk(self.top_k, dim=-1)
        weights = weights.softmax(dim=-1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            share = (weights * (chosen == index)).sum(-1, keepdim=True)
            out = out + share * expert(h)
        return self.head(x + out)


class Generator(nn.Module):
    """The generator of a DCGAN: from a latent vector to an image."""

    def __init__(self, latent: int = 10) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(latent, 12, 4, 1, 0, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(True),
            nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


class GraphConv(nn.Module):
    """A linear layer over the mean of a node's neighbours."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features)
        self.root = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        degree = adj.sum(-1, keepdim=True).clamp(min=1)
        return self.lin(torch.bmm(adj, x) / degree) + self.root(x)


class GraphNet(nn.Module):
    """Two graph convolutions, summed over the nodes, one label a graph."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.conv1 = GraphConv(features, 14)
        self.conv2 = GraphConv(14, 11)
        self.lin = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        x = F.relu(self.conv1(x, adj))
        x = F.relu(self.conv2(x, adj))
        return self.lin(x.sum(dim=1))
