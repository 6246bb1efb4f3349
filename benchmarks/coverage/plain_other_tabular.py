"""Tabular data, recommenders and reinforcement learning."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal
from torch import Tensor
from torch.distributions import Categorical, Normal


class TabularModel(nn.Module):
    """fastai's: an embedding for each category, batch norm on the continuous part, cat."""

    def __init__(self, emb_szs=((12, 6), (7, 4), (5, 3)), n_cont=5, layers=(48, 32), out_sz=2):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(ni, nf) for ni, nf in emb_szs])
        self.emb_drop = nn.Dropout(0.1)
        self.bn_cont = nn.BatchNorm1d(n_cont)
        self.n_emb = sum(e.embedding_dim for e in self.embeds)
        self.n_cont = n_cont
        sizes = [self.n_emb + self.n_cont, *layers]
        blocks = []
        for i in range(len(layers)):
            blocks += [nn.Linear(sizes[i], sizes[i + 1], bias=False), nn.ReLU(inplace=True)]
            blocks += [nn.BatchNorm1d(sizes[i + 1]), nn.Dropout(0.2)]
        blocks.append(nn.Linear(sizes[-1], out_sz))
        self.layers = nn.Sequential(*blocks)

    def forward(self, x_cat, x_cont=None):
        if self.n_emb != 0:
            x = [e(x_cat[:, i]) for i, e in enumerate(self.embeds)]
            x = torch.cat(x, 1)
            x = self.emb_drop(x)
        if self.n_cont != 0:
            x_cont = self.bn_cont(x_cont)
            x = torch.cat([x, x_cont], 1) if self.n_emb != 0 else x_cont
        return self.layers(x)


class WideAndDeep(nn.Module):
    """The wide part is an embedding of width one, summed over fields."""

    def __init__(self, fields=6, vocab=40, dim=8):
        super().__init__()
        self.wide = nn.Embedding(vocab, 1)
        self.deep_emb = nn.Embedding(vocab, dim)
        self.deep = nn.Sequential(
            nn.Linear(fields * dim, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU()
        )
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        wide = self.wide(x).sum(dim=1)
        deep = self.out(self.deep(self.deep_emb(x).view(x.size(0), -1)))
        return torch.sigmoid(wide + deep).squeeze(1)


class DeepFM(nn.Module):
    """rixwew/pytorch-fm: one table with offsets, the square of sum minus the sum of squares."""

    def __init__(self, field_dims=(10, 8, 6), embed_dim=16, mlp_dims=(32, 24), dropout=0.2):
        super().__init__()
        self.linear = nn.Embedding(sum(field_dims), 1)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        offsets = [0, field_dims[0], field_dims[0] + field_dims[1]]
        self.register_buffer("offsets", torch.tensor(offsets))
        self.embed_output_dim = len(field_dims) * embed_dim
        layers, input_dim = [], self.embed_output_dim
        for dim in mlp_dims:
            layers += [
                nn.Linear(input_dim, dim),
                nn.BatchNorm1d(dim),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
            input_dim = dim
        self.mlp = nn.Sequential(*layers, nn.Linear(input_dim, 1))

    def forward(self, x):
        x = x + x.new_tensor([0, 10, 18]).unsqueeze(0)
        embed_x = self.embedding(x)
        square_of_sum = torch.sum(embed_x, dim=1) ** 2
        sum_of_square = torch.sum(embed_x**2, dim=1)
        fm = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        linear = torch.sum(self.linear(x), dim=1) + self.bias
        out = linear + fm + self.mlp(embed_x.view(-1, self.embed_output_dim))
        return torch.sigmoid(out.squeeze(1))


class CrossNetwork(nn.Module):
    """DCN: x0 * (w . x) + b + x in a loop, beside a deep part."""

    def __init__(self, input_dim=24, num_layers=3):
        super().__init__()
        self.proj = nn.Linear(10, input_dim)
        self.num_layers = num_layers
        self.w = nn.ModuleList([nn.Linear(input_dim, 1, bias=False) for _ in range(num_layers)])
        self.b = nn.ParameterList(
            [nn.Parameter(torch.zeros((input_dim,))) for _ in range(num_layers)]
        )
        self.deep = nn.Sequential(nn.Linear(input_dim, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
        self.out = nn.Linear(input_dim + 16, 1)

    def forward(self, x):
        x = self.proj(x)
        x0 = x
        for i in range(self.num_layers):
            xw = self.w[i](x)
            x = x0 * xw + self.b[i] + x
        return self.out(torch.cat([x, self.deep(x0)], dim=1))


class NeuMF(nn.Module):
    """GMF and MLP towers with their own embeddings, joined before the prediction."""

    def __init__(self, users=20, items=30, factors=8, layers=(32, 16, 8)):
        super().__init__()
        self.mf_user, self.mf_item = nn.Embedding(users, factors), nn.Embedding(items, factors)
        self.mlp_user = nn.Embedding(users, layers[0] // 2)
        self.mlp_item = nn.Embedding(items, layers[0] // 2)
        self.fc_layers = nn.ModuleList()
        for in_size, out_size in itertools.pairwise(layers):
            self.fc_layers.append(nn.Linear(in_size, out_size))
        self.affine_output = nn.Linear(layers[-1] + factors, 1)

    def forward(self, user_indices, item_indices):
        mlp = torch.cat([self.mlp_user(user_indices), self.mlp_item(item_indices)], dim=-1)
        mf = torch.mul(self.mf_user(user_indices), self.mf_item(item_indices))
        for idx in range(len(self.fc_layers)):
            mlp = F.relu(self.fc_layers[idx](mlp))
        return self.affine_output(torch.cat([mlp, mf], dim=-1)).sigmoid()


class GLULayer(nn.Module):
    def __init__(self, inp, out, fc=None):
        super().__init__()
        self.fc = fc or nn.Linear(inp, 2 * out, bias=False)
        self.bn = nn.BatchNorm1d(2 * out)
        self.output_dim = out

    def forward(self, x):
        x = self.bn(self.fc(x))
        return torch.mul(x[:, : self.output_dim], torch.sigmoid(x[:, self.output_dim :]))


class TabNet(nn.Module):
    """Decision steps: n_d and n_a cut from one feature transformer, shared layers, mask prior."""

    def __init__(self, input_dim=10, n_d=16, n_a=8, n_steps=2, output_dim=3):
        super().__init__()
        self.n_d, self.n_steps = n_d, n_steps
        self.initial_bn = nn.BatchNorm1d(input_dim)
        shared = nn.Linear(input_dim, 2 * (n_d + n_a), bias=False)
        self.feat = nn.ModuleList(
            [
                nn.Sequential(
                    GLULayer(input_dim, n_d + n_a, fc=shared), GLULayer(n_d + n_a, n_d + n_a)
                )
                for _ in range(n_steps + 1)
            ]
        )
        self.att = nn.ModuleList([nn.Linear(n_a, input_dim) for _ in range(n_steps)])
        self.final_mapping = nn.Linear(n_d, output_dim, bias=False)

    def forward(self, x):
        x = self.initial_bn(x)
        prior = torch.ones(x.shape)
        att = self.feat[0](x)[:, self.n_d :]
        res = 0
        for step in range(self.n_steps):
            M = F.softmax(self.att[step](att) * prior, dim=-1)
            prior = torch.mul(1.3 - M, prior)
            out = self.feat[step + 1](torch.mul(M, x))
            res = torch.add(res, F.relu(out[:, : self.n_d]))
            att = out[:, self.n_d :]
        return self.final_mapping(res)


class FTTransformer(nn.Module):
    """Every number gets a weight and a bias vector; a class token; reglu; attention by hand."""

    def __init__(self, d_numerical=5, categories=(6, 9), d_token=24, n_heads=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_numerical + 1, d_token) * 0.1)
        self.bias = nn.Parameter(torch.zeros(d_numerical + len(categories), d_token))
        self.category_embeddings = nn.Embedding(sum(categories), d_token)
        self.n_heads = n_heads
        self.W_q, self.W_k, self.W_v, self.W_out = (nn.Linear(d_token, d_token) for _ in range(4))
        self.norm0, self.norm1 = nn.LayerNorm(d_token), nn.LayerNorm(d_token)
        self.linear0, self.linear1 = nn.Linear(d_token, 64), nn.Linear(32, d_token)
        self.head = nn.Linear(d_token, 2)

    def _reshape(self, x):
        batch_size, n_tokens, d = x.shape
        d_head = d // self.n_heads
        return (
            x.reshape(batch_size, n_tokens, self.n_heads, d_head)
            .transpose(1, 2)
            .reshape(batch_size * self.n_heads, n_tokens, d_head)
        )

    def forward(self, x_num, x_cat):
        x_some = torch.cat([torch.ones(len(x_num), 1), x_num], dim=1)
        x = self.weight[None] * x_some[:, :, None]
        x = torch.cat([x, self.category_embeddings(x_cat + torch.tensor([0, 6])[None])], dim=1)
        bias = torch.cat([torch.zeros(1, self.bias.shape[1]), self.bias])
        x = x + bias[None]
        h = self.norm0(x)
        q, k, v = self._reshape(self.W_q(h)), self._reshape(self.W_k(h)), self._reshape(self.W_v(h))
        attention = F.softmax(q @ k.transpose(1, 2) / k.shape[-1] ** 0.5, dim=-1)
        b, n, d = h.shape
        h = (attention @ v).reshape(b, self.n_heads, n, -1).transpose(1, 2).reshape(b, n, d)
        x = x + self.W_out(h)
        a, g = self.linear0(self.norm1(x)).chunk(2, dim=-1)
        x = x + self.linear1(a * F.relu(g))
        return self.head(F.relu(x[:, 0]))


class AutoRec(nn.Module):
    """A tied autoencoder: the decoder is F.linear with the transposed weight."""

    def __init__(self, n_items=40, hidden=32, code=16):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(hidden, n_items) * 0.1)
        self.w2 = nn.Parameter(torch.randn(code, hidden) * 0.1)
        self.b1, self.b2 = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(code))
        self.b3, self.b4 = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(n_items))

    def forward(self, x):
        x = F.selu(F.linear(x, self.w1, self.b1))
        z = F.dropout(F.selu(F.linear(x, self.w2, self.b2)), 0.5, self.training)
        x = F.selu(F.linear(z, self.w2.t(), self.b3))
        return F.linear(x, self.w1.transpose(0, 1), self.b4)


class DuelingDQN(nn.Module):
    """Frames scaled in place of a dataset; value and advantage minus its mean."""

    def __init__(self, num_actions=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 16, kernel_size=4, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
        )
        self.input_shape, self.num_actions = (4, 12, 12), num_actions
        self.advantage = nn.Sequential(
            nn.Linear(self.feature_size(), 48), nn.ReLU(), nn.Linear(48, num_actions)
        )
        self.value = nn.Sequential(nn.Linear(self.feature_size(), 48), nn.ReLU(), nn.Linear(48, 1))

    def feature_size(self):
        return self.features(torch.zeros(1, *self.input_shape)).view(1, -1).size(1)

    def forward(self, x):
        x = self.features(x.float() / 255)
        x = x.view(x.size(0), -1)
        advantage, value = self.advantage(x), self.value(x)
        return value + advantage - advantage.mean(1, keepdim=True)


class ActorOutput(NamedTuple):
    log_prob: Tensor
    entropy: Tensor
    value: Tensor


class ActorCritic(nn.Module):
    """Shared body, Categorical inside the forward, a named tuple out."""

    def __init__(self, obs=6, actions=3, hidden=32):
        super().__init__()
        self.affine1 = nn.Linear(obs, hidden)
        self.affine2 = nn.Linear(hidden, 24)
        self.action_head = nn.Linear(24, actions)
        self.value_head = nn.Linear(24, 1)
        self.saved_actions = []

    def forward(self, state, action):
        x = torch.tanh(self.affine2(torch.tanh(self.affine1(state))))
        dist = Categorical(logits=self.action_head(x))
        return ActorOutput(dist.log_prob(action), dist.entropy(), self.value_head(x).squeeze(-1))


class SAC(nn.Module):
    """Squashed Gaussian actor by rsample, twin critics, an output dict."""

    def __init__(self, obs_dim=6, act_dim=2, hidden=32):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * act_dim)
        )
        self.q1 = self.mlp([obs_dim + act_dim, hidden, 24, 1])
        self.q2 = self.mlp([obs_dim + act_dim, hidden, 24, 1])
        self.log_alpha = nn.Parameter(torch.tensor(0.0))

    @staticmethod
    def mlp(sizes, activation=nn.ReLU, output_activation=nn.Identity):
        layers = []
        for j in range(len(sizes) - 1):
            act = activation if j < len(sizes) - 2 else output_activation
            layers += [nn.Linear(sizes[j], sizes[j + 1]), act()]
        return nn.Sequential(*layers)

    def forward(self, obs):
        mu, log_std = self.trunk(obs).chunk(2, dim=-1)
        dist = Normal(mu, torch.clamp(log_std, -20, 2).exp())
        u = dist.rsample()
        action = torch.tanh(u)
        log_prob = (dist.log_prob(u) - torch.log(1 - action.pow(2) + 1e-6)).sum(-1, keepdim=True)
        obs_action = torch.cat([obs, action], dim=-1)
        q1, q2 = self.q1(obs_action), self.q2(obs_action)
        return {"q": torch.min(q1, q2), "log_prob": log_prob, "alpha": self.log_alpha.exp()}


@dataclass
class RSSMState:
    deter: Tensor
    stoch: Tensor
    image: Tensor


class WorldModel(nn.Module):
    """Dreamer's recurrent state: GRUCell, prior and posterior, straight-through one-hot."""

    def __init__(self, obs=8, action=2, deter=32, classes=4, cats=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(obs, 40), nn.ELU(), nn.Linear(40, 24))
        self.inp = nn.Linear(classes * cats + action, 24)
        self.cell = nn.GRUCell(24, deter)
        self.post = nn.Sequential(
            nn.Linear(deter + 24, 32), nn.ELU(), nn.Linear(32, classes * cats)
        )
        self.decoder = nn.Sequential(
            nn.Linear(deter + classes * cats, 40), nn.LayerNorm(40), nn.ELU(), nn.Linear(40, obs)
        )
        self.classes, self.cats, self.deter = classes, cats, deter

    def forward(self, obs, actions):
        b, t = obs.shape[:2]
        embed = self.encoder(obs.flatten(0, 1)).unflatten(0, (b, t))
        h = obs.new_zeros(b, self.deter)
        z = obs.new_zeros(b, self.classes * self.cats)
        hs, zs = [], []
        for i in range(t):
            h = self.cell(F.elu(self.inp(torch.cat([z, actions[:, i]], -1))), h)
            logits = self.post(torch.cat([h, embed[:, i]], -1)).view(b, self.cats, self.classes)
            probs = logits.softmax(-1)
            hard = F.one_hot(probs.argmax(-1), self.classes).float()
            z = (hard + probs - probs.detach()).flatten(1)
            hs.append(h)
            zs.append(z)
        deter, stoch = torch.stack(hs, 1), torch.stack(zs, 1)
        return RSSMState(deter, stoch, self.decoder(torch.cat([deter, stoch], -1)))


CATEGORIES = lambda generator: torch.tensor([[1, 2, 3], [11, 6, 4], [0, 0, 0], [5, 5, 1]])  # noqa: E731

CASES: tuple[Case, ...] = (
    Case("plain/tabular_fastai", TabularModel, given(CATEGORIES, normal(4, 5))),
    Case("plain/wide_and_deep", WideAndDeep, given(integers(40, 5, 6))),
    Case("plain/deep_fm", DeepFM, given(integers(6, 5, 3))),
    Case("plain/dcn_cross", CrossNetwork, given(normal(5, 10))),
    Case("plain/neu_mf", NeuMF, given(integers(20, 5), integers(30, 5))),
    Case("plain/tabnet", TabNet, given(normal(6, 10))),
    Case("plain/ft_transformer", FTTransformer, given(normal(4, 5), integers(6, 4, 2))),
    Case("plain/autorec_tied", AutoRec, given(normal(4, 40))),
    Case("plain/dueling_dqn", DuelingDQN, given(integers(256, 3, 4, 12, 12))),
    Case("plain/actor_critic", ActorCritic, given(normal(5, 6), integers(3, 5))),
    Case("plain/sac", SAC, given(obs=normal(5, 6))),
    Case("plain/world_model", WorldModel, given(normal(3, 4, 8), normal(3, 4, 2))),
)
