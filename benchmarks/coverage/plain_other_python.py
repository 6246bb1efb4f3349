"""Python around the tensors: dicts, dataclasses, sharing, dispatch, branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal
from torch import Tensor


class MultiTask(nn.Module):
    """ModuleDict of heads, a dict of outputs."""

    def __init__(self, tasks=(("age", 1), ("gender", 2), ("race", 5))):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1)
        )
        self.shared = nn.Linear(32, 48)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, n))
                for name, n in tasks
            }
        )

    def forward(self, x):
        x = F.relu(self.backbone(x)).mean(dim=(2, 3))
        x = F.relu(self.shared(x))
        return {name: head(x) for name, head in self.heads.items()}


@dataclass
class ModelOutput:
    logits: Tensor
    embedding: Tensor
    loss: Tensor | None = None


class DataclassOutput(nn.Module):
    """Keyword inputs only, labels optional, a dataclass with the embedding out."""

    def __init__(self, dim=32, emb=16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, dim), nn.Linear(dim, emb)
        self.classifier = nn.Linear(emb, 3)

    def forward(self, *, features, labels=None):
        embedding = self.fc2(F.gelu(self.fc1(features)))
        logits = self.classifier(embedding)
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return ModelOutput(logits=logits, embedding=embedding, loss=loss)


class NestedInputs(nn.Module):
    """A dict with lists and tuples of tensors; text, image and tabular towers."""

    def __init__(self):
        super().__init__()
        self.text = nn.EmbeddingBag(30, 24, mode="mean")
        self.image = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 24))
        self.tab = nn.Linear(7, 24)
        self.fuse = nn.Sequential(nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 2))

    def forward(self, batch):
        text = self.text(batch["text"])
        image, (a, b) = batch["image"], batch["tab"]
        tab = torch.tanh(self.tab(torch.cat([a, b], dim=-1)))
        return {"out": self.fuse(torch.cat([text, self.image(image), tab], dim=1))}


class ALBERT(nn.Module):
    """One block for all layers, a factorised embedding."""

    def __init__(self, vocab=50, emb=12, dim=32, depth=3):
        super().__init__()
        self.embed, self.up = nn.Embedding(vocab, emb), nn.Linear(emb, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ff1, self.ff2 = nn.Linear(dim, 48), nn.Linear(48, dim)
        self.depth, self.heads = depth, 4
        self.cls = nn.Linear(dim, 2)

    def forward(self, ids):
        x = self.up(self.embed(ids))
        b, t, d = x.shape
        for _ in range(self.depth):
            q, k, v = (
                f(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            a = torch.softmax(q @ k.mT / (d // self.heads) ** 0.5, -1) @ v
            x = self.norm1(x + self.o(a.transpose(1, 2).reshape(b, t, d)))
            x = self.norm2(x + self.ff2(F.gelu(self.ff1(x))))
        return self.cls(x[:, 0])


class SharedParameter(nn.Module):
    """Two modules hold one Parameter, and the decoder is the encoder's transpose by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 32), nn.Linear(10, 32)
        self.b.weight = self.a.weight
        self.mix = nn.Linear(32, 24)
        self.unmix_bias = nn.Parameter(torch.zeros(32))
        self.out = nn.Linear(32, 3)

    def forward(self, x, y):
        h = F.relu(self.a(x)) * torch.sigmoid(self.b(y))
        z = F.relu(self.mix(h))
        return self.out(F.linear(z, self.mix.weight.t(), self.unmix_bias))


class Functional(nn.Module):
    """MAML style: a ParameterList walked by index, F.conv2d, F.batch_norm with buffers by hand."""

    def __init__(self, channels=24, n_way=5):
        super().__init__()
        self.vars, self.vars_bn = nn.ParameterList(), nn.ParameterList()
        inp = 1
        for _ in range(2):
            w = nn.Parameter(torch.ones(channels, inp, 3, 3))
            nn.init.kaiming_normal_(w)
            self.vars.extend([w, nn.Parameter(torch.zeros(channels))])
            self.vars.extend(
                [nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))]
            )
            for make in (torch.zeros, torch.ones):
                self.vars_bn.append(nn.Parameter(make(channels), requires_grad=False))
            inp = channels
        self.vars.append(nn.Parameter(torch.randn(n_way, channels * 9) * 0.05))
        self.vars.append(nn.Parameter(torch.zeros(n_way)))

    def forward(self, x, vars=None, bn_training=True):
        vars = self.vars if vars is None else vars
        idx = bn_idx = 0
        for _ in range(2):
            x = F.conv2d(x, vars[idx], vars[idx + 1], stride=2, padding=1)
            mean, var = self.vars_bn[bn_idx], self.vars_bn[bn_idx + 1]
            x = F.batch_norm(x, mean, var, vars[idx + 2], vars[idx + 3], training=bn_training)
            x = F.relu(x, inplace=True)
            idx, bn_idx = idx + 4, bn_idx + 2
        return F.linear(x.view(x.size(0), -1), vars[idx], vars[idx + 1])


class ChoiceNet(nn.Module):
    """ModuleDict dispatch by a string, activations in another dict, a branch on the values."""

    def __init__(self, act="lrelu"):
        super().__init__()
        self.choices = nn.ModuleDict(
            {"conv": nn.Conv1d(4, 32, 3, padding=1), "linear": nn.Conv1d(4, 32, 1)}
        )
        self.activations = nn.ModuleDict([["lrelu", nn.LeakyReLU()], ["prelu", nn.PReLU()]])
        self.act = act
        self.high, self.low = nn.Linear(32, 48), nn.Linear(32, 48)
        self.tail = nn.Sequential(nn.Linear(48, 56), nn.ReLU(), nn.Linear(56, 2))

    def forward(self, x, choice):
        x = self.activations[self.act](self.choices[choice](x)).mean(-1)
        h = self.high(x) if x.mean() > 0 else self.low(x)
        return self.tail(torch.relu(h))


class EarlyExit(nn.Module):
    """BranchyNet: leaves when the first head is sure; all heads in training."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.exit1 = nn.Linear(32, 3)
        self.stage2 = nn.Sequential(nn.Linear(32, 48), nn.ReLU())
        self.exit2 = nn.Linear(48, 3)
        self.threshold = 0.99

    def forward(self, x):
        x = self.stage1(x)
        first = self.exit1(x)
        if not self.training and first.softmax(-1).max(-1).values.min().item() > self.threshold:
            return first
        second = self.exit2(self.stage2(x))
        return [first, second] if self.training else second


IDS = given(integers(50, 3, 7))
NESTED = {
    "text": integers(30, 3, 5),
    "image": normal(3, 1, 8, 8),
    "tab": (normal(3, 4), normal(3, 3)),
}

CASES: tuple[Case, ...] = (
    Case("plain/multi_task_dict", MultiTask, given(normal(4, 3, 8, 8))),
    Case(
        "plain/dataclass_output",
        DataclassOutput,
        given(features=normal(5, 10), labels=integers(3, 5)),
    ),
    Case("plain/nested_inputs", NestedInputs, given(NESTED)),
    Case("plain/albert", ALBERT, IDS),
    Case("plain/shared_parameter", SharedParameter, given(normal(5, 10), normal(5, 10))),
    Case("plain/maml_functional", Functional, given(normal(4, 1, 12, 12))),
    Case("plain/module_dict_choice", ChoiceNet, given(normal(4, 4, 6), "conv")),
    Case("plain/early_exit", EarlyExit, given(normal(5, 12))),
)
