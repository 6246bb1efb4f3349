"""Graphs and points by hand, implicit functions, operators that learn physics, densities."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import constant, given, integers, normal, uniform


class GraphConvolution(nn.Module):
    """tkipf/pygcn: support = input @ weight, output = adj @ support, uniform by stdv."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.FloatTensor(in_features, out_features))
        self.bias = nn.Parameter(torch.FloatTensor(out_features))
        self.reset_parameters()

    def reset_parameters(self):
        stdv = 1.0 / math.sqrt(self.weight.size(1))
        self.weight.data.uniform_(-stdv, stdv)
        self.bias.data.uniform_(-stdv, stdv)

    def forward(self, input, adj):
        support = torch.mm(input, self.weight)
        return torch.mm(adj, support) + self.bias


class GCN(nn.Module):
    def __init__(self, nfeat=12, nhid=32, nclass=4):
        super().__init__()
        self.gc1, self.gc2 = GraphConvolution(nfeat, nhid), GraphConvolution(nhid, 24)
        self.gc3 = GraphConvolution(24, nclass)

    def forward(self, x, adj):
        x = F.dropout(F.relu(self.gc1(x, adj)), 0.5, training=self.training)
        return F.log_softmax(self.gc3(F.relu(self.gc2(x, adj)), adj), dim=1)


class GraphAttentionLayer(nn.Module):
    """Diego999/pyGAT: the vector a is cut at out_features for source and target."""

    def __init__(self, in_features, out_features, concat=True):
        super().__init__()
        self.out_features, self.concat = out_features, concat
        self.W = nn.Parameter(torch.empty(size=(in_features, out_features)))
        nn.init.xavier_uniform_(self.W.data, gain=1.414)
        self.a = nn.Parameter(torch.empty(size=(2 * out_features, 1)))
        nn.init.xavier_uniform_(self.a.data, gain=1.414)
        self.leakyrelu = nn.LeakyReLU(0.2)

    def forward(self, h, adj):
        Wh = torch.mm(h, self.W)
        Wh1 = torch.matmul(Wh, self.a[: self.out_features, :])
        Wh2 = torch.matmul(Wh, self.a[self.out_features :, :])
        e = self.leakyrelu(Wh1 + Wh2.T)
        attention = torch.where(adj > 0.5, e, -9e15 * torch.ones_like(e))
        attention = F.dropout(F.softmax(attention, dim=1), 0.3, training=self.training)
        h_prime = torch.matmul(attention, Wh)
        return F.elu(h_prime) if self.concat else h_prime


class GAT(nn.Module):
    def __init__(self, nfeat=12, nhid=8, nclass=4, nheads=3):
        super().__init__()
        self.attentions = [GraphAttentionLayer(nfeat, nhid) for _ in range(nheads)]
        for i, attention in enumerate(self.attentions):
            self.add_module(f"attention_{i}", attention)
        self.out_att = GraphAttentionLayer(nhid * nheads, nclass, concat=False)

    def forward(self, x, adj):
        x = torch.cat([att(x, adj) for att in self.attentions], dim=1)
        return F.log_softmax(F.elu(self.out_att(x, adj)), dim=1)


class GraphSAGE(nn.Module):
    """Edges in a (2, E) tensor; the mean by index_add_ and a degree by scatter_add_."""

    def __init__(self, feat=12, hidden=32, classes=4):
        super().__init__()
        self.self1, self.neigh1 = nn.Linear(feat, hidden), nn.Linear(feat, hidden, bias=False)
        self.self2, self.neigh2 = nn.Linear(hidden, 24), nn.Linear(hidden, 24, bias=False)
        self.out = nn.Linear(24, classes)

    @staticmethod
    def mean(x, edge_index):
        src, dst = edge_index
        agg = torch.zeros_like(x).index_add_(0, dst, x[src])
        deg = torch.zeros(x.size(0)).scatter_add_(0, dst, torch.ones(dst.size(0)))
        return agg / deg.clamp(min=1).unsqueeze(-1)

    def forward(self, x, edge_index):
        x = F.relu(self.self1(x) + self.neigh1(self.mean(x, edge_index)))
        x = F.relu(self.self2(x) + self.neigh2(self.mean(x, edge_index)))
        return self.out(F.normalize(x, dim=1))


class MPNN(nn.Module):
    """Gilmer's network: edge network to matrices, bmm, GRUCell, graph read-out by batch index."""

    def __init__(self, node=6, edge=3, dim=16):
        super().__init__()
        self.lin0 = nn.Linear(node, dim)
        self.edge_net = nn.Sequential(nn.Linear(edge, 24), nn.ReLU(), nn.Linear(24, dim * dim))
        self.gru = nn.GRUCell(dim, dim)
        self.dim = dim
        self.lin1, self.lin2 = nn.Linear(2 * dim, 32), nn.Linear(32, 1)

    def forward(self, x, edge_index, edge_attr, batch):
        x0 = F.relu(self.lin0(x))
        h = x0
        row, col = edge_index[0], edge_index[1]
        weight = self.edge_net(edge_attr).view(-1, self.dim, self.dim)
        for _ in range(2):
            m = torch.matmul(h[row].unsqueeze(1), weight).squeeze(1)
            index = col.unsqueeze(-1).expand_as(m)
            agg = torch.zeros_like(h).scatter_add(0, index, m)
            h = self.gru(agg, h)
        out = torch.cat([h, x0], dim=-1)
        pooled = out.new_zeros(int(batch.max()) + 1, out.size(1)).index_add(0, batch, out)
        return self.lin2(F.relu(self.lin1(pooled))).view(-1)


class STN3d(nn.Module):
    """fxia22/pointnet: T-Net with a numpy identity, max over points, view(-1, 64)."""

    def __init__(self, k=3):
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 32, 1), nn.Conv1d(32, 64, 1)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, k * k)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(32), nn.BatchNorm1d(64), nn.BatchNorm1d(32)

    def forward(self, x):
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 64)
        x = F.relu(self.bn3(self.fc1(x)))
        x = self.fc2(x)
        iden = torch.from_numpy(np.eye(self.k).flatten().astype(np.float32))
        iden = iden.view(1, self.k * self.k).repeat(batchsize, 1)
        return (x + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    """Segmentation: the global feature is repeated for every point and joined to the local one."""

    def __init__(self, k=5):
        super().__init__()
        self.stn = STN3d()
        self.conv1, self.conv2 = nn.Conv1d(3, 24, 1), nn.Conv1d(24, 48, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(24), nn.BatchNorm1d(48)
        self.seg1, self.seg2 = nn.Conv1d(48 + 24, 32, 1), nn.Conv1d(32, k, 1)
        self.bn3 = nn.BatchNorm1d(32)
        self.k = k

    def forward(self, x):
        n_pts = x.size()[2]
        trans = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        pointfeat = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(pointfeat))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 48, 1).repeat(1, 1, n_pts)
        x = torch.cat([x, pointfeat], 1)
        x = self.seg2(F.relu(self.bn3(self.seg1(x)))).transpose(2, 1).contiguous()
        x = F.log_softmax(x.view(-1, self.k), dim=-1)
        return x.view(-1, n_pts, self.k), trans


class PermEqui(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.Gamma = nn.Linear(in_dim, out_dim)
        self.Lambda = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x):
        xm, _ = x.max(1, keepdim=True)
        return self.Gamma(x) - self.Lambda(xm)


class DeepSets(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.phi = nn.Sequential(PermEqui(3, d), nn.ELU(), PermEqui(d, d), nn.ELU())
        self.ro = nn.Sequential(nn.Dropout(0.5), nn.Linear(d, 24), nn.ELU(), nn.Linear(24, 4))

    def forward(self, x):
        phi_output = self.phi(x)
        sum_output = phi_output.mean(1)
        return self.ro(sum_output)


class NeRF(nn.Module):
    """yenchenlin's: split points and views, skip by cat, module list with a branch on the index."""

    def __init__(self, D=4, W=32, input_ch=15, input_ch_views=9, skips=(1,)):
        super().__init__()
        self.input_ch, self.input_ch_views, self.skips = input_ch, input_ch_views, skips
        self.pts_linears = nn.ModuleList(
            [nn.Linear(input_ch, W)]
            + [
                nn.Linear(W, W) if i not in self.skips else nn.Linear(W + input_ch, W)
                for i in range(D - 1)
            ]
        )
        self.views_linears = nn.ModuleList([nn.Linear(input_ch_views + W, W // 2)])
        self.feature_linear, self.alpha_linear = nn.Linear(W, W), nn.Linear(W, 1)
        self.rgb_linear = nn.Linear(W // 2, 3)

    @staticmethod
    def embed(x, n):
        return torch.cat(
            [x] + [f(x * 2.0**i) for i in range(n) for f in (torch.sin, torch.cos)], -1
        )

    def forward(self, pts, views):
        x = torch.cat([self.embed(pts, 2), self.embed(views, 1)], -1)
        input_pts, input_views = torch.split(x, [self.input_ch, self.input_ch_views], dim=-1)
        h = input_pts
        for i, _linear in enumerate(self.pts_linears):
            h = F.relu(self.pts_linears[i](h))
            if i in self.skips:
                h = torch.cat([input_pts, h], -1)
        alpha = self.alpha_linear(h)
        h = torch.cat([self.feature_linear(h), input_views], -1)
        for i, _linear in enumerate(self.views_linears):
            h = F.relu(self.views_linears[i](h))
        return torch.cat([self.rgb_linear(h), alpha], -1)


class SineLayer(nn.Module):
    def __init__(self, in_features, out_features, is_first=False, omega_0=30):
        super().__init__()
        self.omega_0, self.is_first, self.in_features = omega_0, is_first, in_features
        self.linear = nn.Linear(in_features, out_features)
        with torch.no_grad():
            bound = 1 / in_features if is_first else math.sqrt(6 / in_features) / omega_0
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, input):
        return torch.sin(self.omega_0 * self.linear(input))


class Siren(nn.Module):
    """The coordinates are cloned and detached so that derivatives can be taken."""

    def __init__(self, hidden=32, layers=2):
        super().__init__()
        net = [SineLayer(2, hidden, is_first=True)]
        net += [SineLayer(hidden, hidden) for _ in range(layers)]
        self.net = nn.Sequential(*net, nn.Linear(hidden, 1))

    def forward(self, coords):
        coords = coords.clone().detach().requires_grad_(True)
        return self.net(coords), coords


class PINN(nn.Module):
    """The residual of Burgers' equation: torch.autograd.grad inside the forward."""

    def __init__(self, layers=(2, 20, 20, 20, 1)):
        super().__init__()
        self.linears = nn.ModuleList(
            [nn.Linear(layers[i], layers[i + 1]) for i in range(len(layers) - 1)]
        )
        self.nu = nn.Parameter(torch.tensor(0.01))

    def net(self, x, t):
        a = torch.cat([x, t], dim=1)
        for i in range(len(self.linears) - 1):
            a = torch.tanh(self.linears[i](a))
        return self.linears[-1](a)

    def forward(self, x, t):
        with torch.enable_grad():
            x, t = x.requires_grad_(), t.requires_grad_()
            u = self.net(x, t)
            ones = torch.ones_like(u)
            u_t = torch.autograd.grad(u, t, ones, create_graph=True)[0]
            u_x = torch.autograd.grad(u, x, ones, create_graph=True)[0]
            u_xx = torch.autograd.grad(u_x, x, ones, create_graph=True)[0]
        return u, u_t + u * u_x - self.nu * u_xx


class SpectralConv2d(nn.Module):
    """zongyi-li's Fourier layer: complex weights on the low modes of both corners."""

    def __init__(self, in_channels, out_channels, modes1, modes2):
        super().__init__()
        self.out_channels, self.modes1, self.modes2 = out_channels, modes1, modes2
        scale = 1 / (in_channels * out_channels)
        shape = (in_channels, out_channels, modes1, modes2)
        self.weights1 = nn.Parameter(scale * torch.rand(*shape, dtype=torch.cfloat))
        self.weights2 = nn.Parameter(scale * torch.rand(*shape, dtype=torch.cfloat))

    def forward(self, x):
        batchsize, m1, m2 = x.shape[0], self.modes1, self.modes2
        x_ft = torch.fft.rfft2(x)
        out_ft = torch.zeros(
            batchsize, self.out_channels, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat
        )
        eq = "bixy,ioxy->boxy"
        out_ft[:, :, :m1, :m2] = torch.einsum(eq, x_ft[:, :, :m1, :m2], self.weights1)
        out_ft[:, :, -m1:, :m2] = torch.einsum(eq, x_ft[:, :, -m1:, :m2], self.weights2)
        return torch.fft.irfft2(out_ft, s=(x.size(-2), x.size(-1)))


class FNO2d(nn.Module):
    def __init__(self, modes=3, width=16):
        super().__init__()
        self.fc0 = nn.Linear(3, width)
        self.conv0, self.conv1 = (SpectralConv2d(width, width, modes, modes) for _ in range(2))
        self.w0, self.w1 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, 1)

    def get_grid(self, shape):
        batchsize, size_x, size_y = shape[0], shape[1], shape[2]
        gridx = torch.tensor(np.linspace(0, 1, size_x), dtype=torch.float)
        gridx = gridx.reshape(1, size_x, 1, 1).repeat([batchsize, 1, size_y, 1])
        gridy = torch.tensor(np.linspace(0, 1, size_y), dtype=torch.float)
        gridy = gridy.reshape(1, 1, size_y, 1).repeat([batchsize, size_x, 1, 1])
        return torch.cat((gridx, gridy), dim=-1)

    def forward(self, x):
        x = self.fc0(torch.cat((x, self.get_grid(x.shape)), dim=-1))
        x = x.permute(0, 3, 1, 2)
        x = F.gelu(self.conv0(x) + self.w0(x))
        x = self.conv1(x) + self.w1(x)
        x = x.permute(0, 2, 3, 1)
        return self.fc2(F.gelu(self.fc1(x)))


EDGES = integers(9, 2, 20)
BATCH = constant([0, 0, 0, 0, 1, 1, 1, 1, 1])
GRAPH = given(normal(9, 12), uniform(9, 9))

CASES: tuple[Case, ...] = (
    Case("plain/gcn", GCN, GRAPH),
    Case("plain/gat", GAT, GRAPH),
    Case("plain/graph_sage", GraphSAGE, given(normal(9, 12), EDGES)),
    Case("plain/mpnn", MPNN, given(normal(9, 6), EDGES, normal(20, 3), BATCH)),
    Case("plain/pointnet", PointNet, given(normal(3, 3, 20))),
    Case("plain/deep_sets", DeepSets, given(normal(3, 7, 3))),
    Case("plain/nerf", NeRF, given(normal(6, 3), normal(6, 3))),
    Case("plain/siren", Siren, given(uniform(10, 2))),
    Case("plain/pinn", PINN, given(uniform(10, 1), uniform(10, 1))),
    Case("plain/fno", FNO2d, given(normal(2, 8, 8, 1))),
)
