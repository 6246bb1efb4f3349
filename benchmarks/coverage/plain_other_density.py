"""Generated weights, ensembles, splines, densities and operators between functions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal, uniform
from torch.distributions import Categorical, MixtureSameFamily, Normal


class DeepONet(nn.Module):
    """Branch and trunk meet in an inner product over p."""

    def __init__(self, sensors=12, hidden=32, p=24):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(sensors, hidden), nn.Tanh(), nn.Linear(hidden, p))
        self.trunk = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, p), nn.Tanh())
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, u, y):
        B = self.branch(u)
        T = self.trunk(y)
        return torch.einsum("bi,ni->bn", B, T) + self.b


class KANLinear(nn.Module):
    """efficient-kan: a grid buffer for every input, B-spline bases, a flattened spline weight."""

    def __init__(self, in_features, out_features, grid_size=4, spline_order=2):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        h = 2 / grid_size
        grid = torch.arange(-spline_order, grid_size + spline_order + 1) * h - 1
        self.register_buffer("grid", grid.expand(in_features, -1).contiguous())
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) * 0.2)
        self.spline_weight = nn.Parameter(
            torch.randn(out_features, in_features, grid_size + spline_order) * 0.1
        )
        self.spline_scaler = nn.Parameter(torch.ones(out_features, in_features))
        self.base_activation = nn.SiLU()

    def b_splines(self, x):
        assert x.dim() == 2
        assert x.size(1) == self.in_features
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)])
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)])
            bases = left * bases[:, :, :-1] + right * bases[:, :, 1:]
        assert bases.size() == (x.size(0), self.in_features, self.grid_size + self.spline_order)
        return bases.contiguous()

    @property
    def scaled_spline_weight(self):
        return self.spline_weight * self.spline_scaler.unsqueeze(-1)

    def forward(self, x):
        base_output = F.linear(self.base_activation(x), self.base_weight)
        spline_output = F.linear(
            self.b_splines(x).view(x.size(0), -1),
            self.scaled_spline_weight.view(self.out_features, -1),
        )
        return base_output + spline_output


class KAN(nn.Module):
    def __init__(self, layers_hidden=(6, 24, 16, 3)):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(len(layers_hidden) - 1):
            self.layers.append(KANLinear(layers_hidden[i], layers_hidden[i + 1]))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class MixtureDensity(nn.Module):
    """Three heads, view to (batch, K, out), a distribution's log_prob as the output."""

    def __init__(self, n_in=4, hidden=32, K=5, n_out=2):
        super().__init__()
        self.K, self.n_out = K, n_out
        self.body = nn.Sequential(
            nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, 24), nn.Tanh()
        )
        self.pi = nn.Linear(24, K)
        self.mu, self.sigma = nn.Linear(24, K * n_out), nn.Linear(24, K * n_out)

    def forward(self, x, y):
        h = self.body(x)
        mu = self.mu(h).view(-1, self.K, self.n_out)
        sigma = F.softplus(self.sigma(h)).view(-1, self.K, self.n_out) + 1e-3
        parts = torch.distributions.Independent(Normal(mu, sigma), 1)
        mixture = MixtureSameFamily(Categorical(logits=self.pi(h)), parts)
        return -mixture.log_prob(y)


class HyperNetwork(nn.Module):
    """One net writes the weights of another: view to matrices for every sample, bmm."""

    def __init__(self, cond=5, inp=6, hidden=16, out=3):
        super().__init__()
        self.inp, self.hidden, self.out = inp, hidden, out
        self.trunk = nn.Sequential(nn.Linear(cond, 48), nn.ReLU())
        self.w1 = nn.Linear(48, inp * hidden)
        self.b1 = nn.Linear(48, hidden)
        self.w2 = nn.Linear(48, hidden * out)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x, condition):
        h = self.trunk(condition)
        w1 = self.w1(h).view(-1, self.inp, self.hidden)
        w2 = self.w2(h).view(-1, self.hidden, self.out)
        x = torch.bmm(x.unsqueeze(1), w1) + self.b1(h).unsqueeze(1)
        x = self.norm(F.relu(x))
        return torch.bmm(x, w2).squeeze(1)


class BatchedEnsemble(nn.Module):
    """PETS: all members in one tensor (ensemble, in, out), baddbmm, bounds as parameters."""

    def __init__(self, members=4, inp=6, hidden=32, out=3):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(members, inp, hidden) * 0.3)
        self.b1 = nn.Parameter(torch.zeros(members, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(members, hidden, hidden) * 0.2)
        self.b2 = nn.Parameter(torch.zeros(members, 1, hidden))
        self.w3 = nn.Parameter(torch.randn(members, hidden, 2 * out) * 0.2)
        self.b3 = nn.Parameter(torch.zeros(members, 1, 2 * out))
        self.max_logvar = nn.Parameter(torch.ones(1, out) / 2.0)
        self.num_nets, self.out_features = members, out

    def forward(self, x):
        x = x.unsqueeze(0).expand(self.num_nets, -1, -1)
        x = F.silu(torch.baddbmm(self.b1, x, self.w1))
        x = F.silu(x.matmul(self.w2) + self.b2)
        x = torch.baddbmm(self.b3, x, self.w3)
        mean, logvar = x[:, :, : self.out_features], x[:, :, self.out_features :]
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, torch.exp(logvar)


class StackedEnsemble(nn.Module):
    """A list of nets, outputs stacked, mean and spread returned."""

    def __init__(self, members=3, hidden=32):
        super().__init__()
        self.members = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 24), nn.ReLU())
                for _ in range(members)
            ]
        )
        self.heads = nn.ModuleList([nn.Linear(24, 2) for _ in range(members)])

    def forward(self, x):
        outs = torch.stack([head(m(x)) for m, head in zip(self.members, self.heads, strict=True)])
        return outs.mean(0), outs.std(0)


class BetaVAE(nn.Module):
    """An MLP VAE with two heads and torch.randn of a computed shape."""

    def __init__(self, x_dim=36, hidden=40, z_dim=8):
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(x_dim, hidden), nn.Linear(hidden, z_dim)
        self.fc22, self.fc3 = nn.Linear(hidden, z_dim), nn.Linear(z_dim, hidden)
        self.fc4 = nn.Linear(hidden, x_dim)
        self.z_dim = z_dim

    def forward(self, x):
        h1 = F.relu(self.fc1(x.view(-1, 36)))
        mu, logvar = self.fc21(h1), self.fc22(h1)
        eps = torch.randn(mu.size(0), self.z_dim, device=mu.device)
        z = mu + eps * torch.exp(0.5 * logvar)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1).mean()
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), kl


class GumbelVAE(nn.Module):
    """Categorical latents: gumbel_softmax over view(-1, N, K)."""

    def __init__(self, N=6, K=5, hidden=48):
        super().__init__()
        self.N, self.K = N, K
        self.encoder = nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, N * K))
        self.decoder = nn.Sequential(nn.Linear(N * K, hidden), nn.ReLU(), nn.Linear(hidden, 20))

    def forward(self, x):
        logits = self.encoder(x).view(-1, self.N, self.K)
        z = F.gumbel_softmax(logits, tau=0.8, hard=self.training)
        q = F.softmax(logits, dim=-1)
        kl = (q * torch.log(q * self.K + 1e-20)).sum((1, 2)).mean()
        return self.decoder(z.reshape(-1, self.N * self.K)), kl


class MADE(nn.Module):
    """Masks built from the degrees of the units, multiplied into the weights."""

    def __init__(self, dim=6, hidden=32):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(dim, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, dim * 2),
        )
        d0 = torch.arange(1, dim + 1)
        d1 = torch.randint(1, dim, (hidden,))
        d2 = torch.randint(1, dim, (hidden,))
        self.register_buffer("m1", (d1[:, None] >= d0[None]).float())
        self.register_buffer("m2", (d2[:, None] >= d1[None]).float())
        self.register_buffer("m3", (d0[:, None] > d2[None]).float().repeat(2, 1))

    def forward(self, x):
        h = F.relu(F.linear(x, self.m1 * self.fc1.weight, self.fc1.bias))
        h = F.relu(F.linear(h, self.m2 * self.fc2.weight, self.fc2.bias))
        mu, log_sigma = F.linear(h, self.m3 * self.fc3.weight, self.fc3.bias).chunk(2, 1)
        return 0.5 * ((x - mu) * torch.exp(-log_sigma)).pow(2).sum(1) + log_sigma.sum(1)


CASES: tuple[Case, ...] = (
    Case("plain/deep_o_net", DeepONet, given(normal(4, 12), uniform(7, 1))),
    Case("plain/kan", KAN, given(normal(5, 6))),
    Case("plain/mixture_density", MixtureDensity, given(normal(5, 4), normal(5, 2))),
    Case("plain/hyper_network", HyperNetwork, given(normal(4, 6), normal(4, 5))),
    Case("plain/batched_ensemble", BatchedEnsemble, given(normal(5, 6))),
    Case("plain/stacked_ensemble", StackedEnsemble, given(normal(5, 6))),
    Case("plain/beta_vae", BetaVAE, given(normal(5, 1, 6, 6))),
    Case("plain/gumbel_vae", GumbelVAE, given(normal(5, 20))),
    Case("plain/made", MADE, given(normal(5, 6))),
)
