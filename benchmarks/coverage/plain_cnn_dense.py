"""Dense prediction: segmentation, detection, super-resolution."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, normal


class DoubleConv(nn.Module):
    """(convolution => [BN] => ReLU) * 2"""

    def __init__(self, in_channels, out_channels, mid_channels=None):
        super().__init__()
        if not mid_channels:
            mid_channels = out_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    """milesial/Pytorch-UNet: bilinear or transposed, padded to the skip's size, concatenated."""

    def __init__(self, in_channels, out_channels, bilinear=True):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class UNet(nn.Module):
    def __init__(self, n_channels=3, n_classes=4, bilinear=False):
        super().__init__()
        factor = 2 if bilinear else 1
        self.inc = DoubleConv(n_channels, 16)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(32, 64 // factor))
        self.up1 = Up(64, 32 // factor, bilinear)
        self.up2 = Up(32, 16, bilinear)
        self.outc = nn.Conv2d(16, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x)


class AttentionGate(nn.Module):
    """LeeJunHyun's gate: W_g, W_x, psi, sigmoid, product with the skip."""

    def __init__(self, F_g, F_l, F_int):
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(F_g, F_int, 1), nn.BatchNorm2d(F_int))
        self.W_x = nn.Sequential(nn.Conv2d(F_l, F_int, 1), nn.BatchNorm2d(F_int))
        self.psi = nn.Sequential(nn.Conv2d(F_int, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        g1 = self.W_g(g)
        x1 = self.W_x(x)
        psi = self.relu(g1 + x1)
        psi = self.psi(psi)
        return x * psi


class AttentionUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.Maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.Conv1 = DoubleConv(1, 16)
        self.Conv2 = DoubleConv(16, 32)
        self.Conv3 = DoubleConv(32, 48)
        self.Up3 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(48, 32, 3, 1, 1))
        self.Att3 = AttentionGate(F_g=32, F_l=32, F_int=16)
        self.Up_conv3 = DoubleConv(64, 32)
        self.Up2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, 1, 1))
        self.Att2 = AttentionGate(F_g=16, F_l=16, F_int=8)
        self.Up_conv2 = DoubleConv(32, 16)
        self.Conv_1x1 = nn.Conv2d(16, 1, kernel_size=1)

    def forward(self, x):
        x1 = self.Conv1(x)
        x2 = self.Conv2(self.Maxpool(x1))
        x3 = self.Conv3(self.Maxpool(x2))
        d3 = self.Up3(x3)
        x2 = self.Att3(g=d3, x=x2)
        d3 = self.Up_conv3(torch.cat((x2, d3), dim=1))
        d2 = self.Up2(d3)
        x1 = self.Att2(g=d2, x=x1)
        d2 = self.Up_conv2(torch.cat((x1, d2), dim=1))
        return torch.sigmoid(self.Conv_1x1(d2))


class SegNet(nn.Module):
    """Max-unpooling with the encoder's indices and sizes."""

    def __init__(self):
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.enc2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.mid = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU())
        self.back = nn.Sequential(nn.Conv2d(48, 32, 3, padding=1), nn.ReLU())
        self.dec2 = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.dec1 = nn.Conv2d(16, 5, 3, padding=1)
        self.pool = nn.MaxPool2d(2, stride=2, return_indices=True)

    def forward(self, x):
        x = self.enc1(x)
        size1 = x.size()
        x, id1 = self.pool(x)
        x = self.enc2(x)
        size2 = x.size()
        x, id2 = self.pool(x)
        x = self.back(self.mid(x))
        x = F.max_unpool2d(x, id2, kernel_size=2, stride=2, output_size=size2)
        x = self.dec2(x)
        x = F.max_unpool2d(x, id1, kernel_size=2, stride=2, output_size=size1)
        return self.dec1(x)


class FPN(nn.Module):
    """kuangliu's pyramid: lateral 1x1, up-sample and add, one smoothing layer a level."""

    def __init__(self, out=32):
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(True))
        self.c2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(True))
        self.c3 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(True))
        self.toplayer = nn.Conv2d(64, out, 1)
        self.latlayer1 = nn.Conv2d(32, out, 1)
        self.latlayer2 = nn.Conv2d(16, out, 1)
        self.smooth1 = nn.Conv2d(out, 8, 3, padding=1)
        self.smooth2 = nn.Conv2d(out, 8, 3, padding=1)

    def _upsample_add(self, x, y):
        _, _, H, W = y.size()
        return F.interpolate(x, size=(H, W), mode="bilinear", align_corners=False) + y

    def forward(self, x):
        c1 = self.c1(x)
        c2 = self.c2(c1)
        c3 = self.c3(c2)
        p3 = self.toplayer(c3)
        p2 = self._upsample_add(p3, self.latlayer1(c2))
        p1 = self._upsample_add(p2, self.latlayer2(c1))
        return self.smooth2(p1), self.smooth1(p2), p3


class YOLOHead(nn.Module):
    """eriklindernoren's layer: view to anchors, permute, sigmoid by position, cat of scales."""

    def __init__(self, anchors, num_classes):
        super().__init__()
        self.num_anchors = len(anchors)
        self.num_classes = num_classes
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float))

    def forward(self, x, img_dim):
        stride = img_dim // x.size(2)
        bs, _, ny, nx = x.shape
        x = x.view(bs, self.num_anchors, self.num_classes + 5, ny, nx)
        x = x.permute(0, 1, 3, 4, 2).contiguous()
        yv, xv = torch.meshgrid([torch.arange(ny), torch.arange(nx)], indexing="ij")
        grid = torch.stack((xv, yv), 2).view((1, 1, ny, nx, 2)).float()
        xy = (x[..., 0:2].sigmoid() + grid) * stride
        wh = torch.exp(x[..., 2:4]) * self.anchors.view(1, self.num_anchors, 1, 1, 2)
        conf = x[..., 4:].sigmoid()
        return torch.cat((xy, wh, conf), -1).view(bs, -1, self.num_classes + 5)


class TinyYOLO(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)
        )
        self.stage2 = nn.Sequential(
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.1)
        )
        self.stage3 = nn.Sequential(
            nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.1)
        )
        self.lateral = nn.Conv2d(64, 32, 1)
        self.out_small = nn.Conv2d(64, 3 * (num_classes + 5), 1)
        self.out_large = nn.Conv2d(64, 3 * (num_classes + 5), 1)
        self.yolo_small = YOLOHead([(10, 13), (16, 30), (33, 23)], num_classes)
        self.yolo_large = YOLOHead([(3, 5), (4, 8), (7, 6)], num_classes)

    def forward(self, x):
        img_dim = x.shape[2]
        c2 = self.stage2(self.backbone(x))
        c3 = self.stage3(c2)
        small = self.yolo_small(self.out_small(c3), img_dim)
        up = F.interpolate(self.lateral(c3), scale_factor=2, mode="nearest")
        large = self.yolo_large(self.out_large(torch.cat([up, c2], 1)), img_dim)
        return torch.cat([small, large], 1)


class L2Norm(nn.Module):
    """SSD's norm over channels with a learned scale."""

    def __init__(self, n_channels, scale):
        super().__init__()
        self.n_channels = n_channels
        self.eps = 1e-10
        self.weight = nn.Parameter(torch.empty(self.n_channels).fill_(scale))

    def forward(self, x):
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + self.eps
        x = torch.div(x, norm)
        return self.weight.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * x


class SSD(nn.Module):
    """amdegroot's heads: permute, view(o.size(0), -1), cat, view to boxes."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(48, 32, 3, stride=2, padding=1)
        self.norm = L2Norm(48, 20)
        mbox = [2, 3]
        self.loc = nn.ModuleList(
            [nn.Conv2d(c, m * 4, 3, padding=1) for c, m in zip([48, 32], mbox, strict=True)]
        )
        self.conf = nn.ModuleList(
            [
                nn.Conv2d(c, m * num_classes, 3, padding=1)
                for c, m in zip([48, 32], mbox, strict=True)
            ]
        )

    def forward(self, x):
        sources, loc, conf = [], [], []
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        sources.append(self.norm(x))
        sources.append(F.relu(self.conv3(x), inplace=True))
        for x, loc_layer, conf_layer in zip(sources, self.loc, self.conf, strict=True):
            loc.append(loc_layer(x).permute(0, 2, 3, 1).contiguous())
            conf.append(conf_layer(x).permute(0, 2, 3, 1).contiguous())
        loc = torch.cat([o.view(o.size(0), -1) for o in loc], 1)
        conf = torch.cat([o.view(o.size(0), -1) for o in conf], 1)
        return loc.view(loc.size(0), -1, 4), conf.view(conf.size(0), -1, self.num_classes)


class HourglassModule(nn.Module):
    """Recursive, with module lists in lists."""

    def __init__(self, depth, planes):
        super().__init__()
        self.depth = depth
        hg = []
        for i in range(depth):
            res = [self.residual(planes) for _ in range(4 if i == 0 else 3)]
            hg.append(nn.ModuleList(res))
        self.hg = nn.ModuleList(hg)

    @staticmethod
    def residual(planes):
        return nn.Sequential(
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, planes // 2, 1),
            nn.ReLU(),
            nn.Conv2d(planes // 2, planes, 3, padding=1),
        )

    def _hour_glass_forward(self, n, x):
        up1 = x + self.hg[n - 1][0](x)
        low1 = F.max_pool2d(x, 2, stride=2)
        low1 = low1 + self.hg[n - 1][1](low1)
        low2 = self._hour_glass_forward(n - 1, low1) if n > 1 else low1 + self.hg[0][3](low1)
        low3 = low2 + self.hg[n - 1][2](low2)
        return up1 + F.interpolate(low3, scale_factor=2)

    def forward(self, x):
        return self._hour_glass_forward(self.depth, x)


class HourglassNet(nn.Module):
    """Two stacks with intermediate supervision fed back."""

    def __init__(self, feats=32, joints=6, stacks=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, feats, 3, padding=1)
        self.hg = nn.ModuleList([HourglassModule(2, feats) for _ in range(stacks)])
        self.fc = nn.ModuleList([nn.Conv2d(feats, feats, 1) for _ in range(stacks)])
        self.score = nn.ModuleList([nn.Conv2d(feats, joints, 1) for _ in range(stacks)])
        self.fc_ = nn.ModuleList([nn.Conv2d(feats, feats, 1) for _ in range(stacks - 1)])
        self.score_ = nn.ModuleList([nn.Conv2d(joints, feats, 1) for _ in range(stacks - 1)])

    def forward(self, x):
        out = []
        x = F.relu(self.conv1(x))
        for i in range(len(self.hg)):
            y = F.relu(self.fc[i](self.hg[i](x)))
            score = self.score[i](y)
            out.append(score)
            if i < len(self.hg) - 1:
                x = x + self.fc_[i](y) + self.score_[i](score)
        return out


IMAGE = given(normal(2, 3, 16, 16))

CASES: tuple[Case, ...] = (
    Case("plain/unet_transposed", UNet, IMAGE),
    Case("plain/unet_bilinear", lambda: UNet(bilinear=True), given(normal(2, 3, 18, 18))),
    Case("plain/unet_attention_gate", AttentionUNet, given(normal(2, 1, 16, 16))),
    Case("plain/segnet_unpool", SegNet, IMAGE),
    Case("plain/fpn", FPN, IMAGE),
    Case("plain/yolo", TinyYOLO, given(normal(2, 3, 32, 32))),
    Case("plain/ssd", SSD, given(normal(2, 3, 32, 32))),
    Case("plain/hourglass", HourglassNet, IMAGE),
)
