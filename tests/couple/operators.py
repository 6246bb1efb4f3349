"""One row per family of operators: a tiny model around it, and the widths that it must have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.couple.operators_index import INDEX_ROWS
from tests.couple.operators_whole import WHOLE_ROWS
from tests.couple.tiny import (
    FLAT,
    IMAGE,
    TOKENS,
    VECTOR,
    Between,
    Heads,
    Row,
    Weighted,
    by_hand,
    conv,
    image,
    vector,
)

ROWS = (
    Row("mm", lambda: Weighted(lambda x, a, b: x @ a @ b, (5, 6), (6, 3)), VECTOR, (6,)),
    Row("addmm", vector(F.relu), VECTOR, (6,)),
    Row("linear on tokens", vector(F.gelu), TOKENS, (6,)),
    Row("bmm attention", lambda: Heads(by_hand), TOKENS, (3, 4), "equal parts"),
    Row(
        "fused attention",
        lambda: Heads(F.scaled_dot_product_attention),
        TOKENS,
        (3, 4),
        "equal parts",
    ),
    Row("mv", lambda: Weighted(lambda x, a, b: (x @ a) @ b, (5, 6), (6,)), VECTOR, (6,)),
    Row(
        "dot",
        lambda: Weighted(lambda x, a, b: x * torch.dot(a, b), (6,), (6,)),
        VECTOR,
        (),
        "no layer produces it",
    ),
    Row("conv", conv(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)), IMAGE, (4, 6)),
    Row("conv groups", conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2)), IMAGE, (3,)),
    Row(
        "depthwise",
        conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)),
        IMAGE,
        (6,),
    ),
    Row(
        "depth multiplier",
        conv(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 2, 1)),
        IMAGE,
        (2, 6),
    ),
    Row(
        "grouped conv inside",
        conv(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)),
        IMAGE,
        (2, 3, 4),
    ),
    Row(
        "transposed conv",
        conv(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1)),
        IMAGE,
        (4, 6),
    ),
    Row(
        "transposed conv groups",
        conv(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.Conv2d(8, 2, 1)),
        IMAGE,
        (2, 3, 4),
    ),
    Row(
        "kernel over a whole input",
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.Unflatten(1, (1, 7)), nn.Conv2d(1, 4, (2, 6)), nn.Conv2d(4, 2, 1)
        ),
        TOKENS,
        (4, 6),
        "a kernel size",
    ),
    Row(
        "embedding",
        lambda: Weighted(lambda x, e, w: F.embedding(x.long().abs() % 9, e) @ w, (9, 6), (6, 2)),
        VECTOR,
        (6,),
        "rows taken by number",
    ),
    Row("batch norm", conv(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), IMAGE, (6,)),
    Row("layer norm", vector(nn.LayerNorm(6)), VECTOR, (6,)),
    Row("rms norm", vector(nn.RMSNorm(6)), VECTOR, (6,)),
    Row("group norm", image(nn.GroupNorm(2, 6)), IMAGE, (2, 3)),
    Row(
        "group norm, a number",
        image(lambda x: F.group_norm(x, 2)),
        IMAGE,
        (3,),
        "a number of groups",
    ),
    Row("instance norm", image(nn.InstanceNorm2d(6, affine=True)), IMAGE, (6,)),
    Row("pointwise with itself", vector(lambda x: x * torch.sigmoid(x) + x), VECTOR, (6,)),
    Row("prelu", image(nn.PReLU(6)), IMAGE, (6,)),
    Row(
        "residual",
        lambda: nn.Sequential(
            nn.Linear(5, 6),
            Between(nn.Identity(), lambda x: x + 1, nn.Linear(6, 6)),
            nn.Linear(6, 3),
        ),
        VECTOR,
        (6, 6),
    ),
    Row("softmax", vector(lambda x: x.softmax(-1)), VECTOR, (6,)),
    Row("mean", image(lambda x: x.mean((2, 3), keepdim=True)), IMAGE, (6,)),
    Row("max with indices", image(lambda x: x.flatten(2).max(2)[0][..., None, None]), IMAGE, (6,)),
    Row("sum over the width", vector(lambda x: x - x.sum(-1, keepdim=True)), VECTOR, (6,)),
    Row("cumsum", vector(lambda x: x.cumsum(-1)), VECTOR, (), "an order that matters"),
    Row("glu", vector(lambda x: F.glu(x, -1), 12, 6), VECTOR, (6,), "two halves"),
    Row(
        "flatten",
        lambda: Between(nn.Conv2d(3, 6, 1), lambda x: x.flatten(1), nn.Linear(6 * 64, 3)),
        IMAGE,
        (6,),
    ),
    Row(
        "unflatten",
        lambda: Between(
            nn.Linear(5, 12),
            lambda x: x.view(4, 3, -1).transpose(1, 2).flatten(1),
            nn.Linear(12, 2),
        ),
        VECTOR,
        (4,),
        "holds its size as a number",
    ),
    Row("squeeze", vector(lambda x: x[:, None].unsqueeze(-1).squeeze()), VECTOR, (6,)),
    Row(
        "permute",
        lambda: Between(nn.Conv2d(3, 6, 1), lambda x: x.permute(0, 2, 3, 1), nn.Linear(6, 3)),
        IMAGE,
        (6,),
    ),
    Row(
        "expand", vector(lambda x: (x[:, None].expand(4, 7, x.shape[-1]) * 2).sum(1)), VECTOR, (6,)
    ),
    Row("repeat", vector(lambda x: x.repeat(1, 2), 6, 12), VECTOR, (6,)),
    Row("cat", vector(lambda x: torch.cat([x, x.relu()], -1), 6, 12), VECTOR, (6,)),
    Row(
        "cat of two",
        lambda: Weighted(
            lambda x, a, b, c: torch.cat([x @ a, (x @ b).relu()], 1) @ c, (5, 4), (5, 6), (10, 2)
        ),
        VECTOR,
        (4, 6),
    ),
    Row("stack", vector(lambda x: torch.stack([x, -x], 1).flatten(1), 6, 12), VECTOR, (6,)),
    Row(
        "select", vector(lambda x: x * x[:, :1] + x.select(1, 2)[:, None]), VECTOR, (), "by number"
    ),
    Row("unbind", vector(lambda x: torch.stack(x.unbind(1)[::-1], 1)), VECTOR, (), "by number"),
    Row(
        "slices",
        vector(lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)),
        VECTOR,
        (3,),
    ),
    Row("every second", vector(lambda x: x[:, ::2], 6, 3), VECTOR, (3,), "every n-th position"),
    Row(
        "every second of a part",
        vector(lambda x: x[:, 1:5:2], 6, 2),
        VECTOR,
        (),
        "every n-th position taken",
    ),
    Row(
        "split in parts",
        vector(lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1)),
        VECTOR,
        (),
        "holds its size as a number",
    ),
    Row(
        "chunk",
        vector(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 12, 6),
        VECTOR,
        (6,),
        "equal parts",
    ),
    Row("pad", vector(lambda x: F.pad(x, (1, 2)), 6, 9), VECTOR, (6,), "an amount of padding"),
    Row("pixel shuffle", image(nn.PixelShuffle(2), 12, 3), IMAGE, (3,), "an upscale factor"),
    Row("pixel unshuffle", image(nn.PixelUnshuffle(2), 6, 24), IMAGE, (6,), "a downscale factor"),
    Row("channel shuffle", image(nn.ChannelShuffle(2), 6), IMAGE, (2, 3)),
    Row(
        "channel shuffle, a number",
        image(lambda x: F.channel_shuffle(x, 2)),
        IMAGE,
        (3,),
        "a number of groups",
    ),
    Row("max pool", image(nn.MaxPool2d(2)), IMAGE, (6,), "kernel size"),
    Row("adaptive pool", image(nn.AdaptiveAvgPool2d(3)), IMAGE, (6,)),
    Row("upsample", image(nn.Upsample(scale_factor=2)), IMAGE, (6,)),
    Row(
        "unfold",
        lambda: Between(
            nn.Conv2d(3, 6, 1), lambda x: F.unfold(x, 2).transpose(1, 2), nn.Linear(24, 2)
        ),
        IMAGE,
        (6,),
        "a kernel size",
    ),
    Row(
        "fold",
        lambda: Between(
            nn.Linear(5, 24), lambda x: F.fold(x.transpose(1, 2), (3, 4), 2), nn.Conv2d(6, 2, 1)
        ),
        (2, 6, 5),
        (6,),
        "a kernel size",
    ),
    Row("roll", vector(lambda x: x.roll(1, -1)), VECTOR, (), "change places"),
    Row("flip", image(lambda x: x.flip(-1)), IMAGE, (6,)),
    Row(
        "triangle",
        vector(lambda x: x[:, None].expand(4, x.shape[1], x.shape[1]).tril().sum(1)),
        VECTOR,
        (),
        "a triangle",
    ),
    Row("index", vector(lambda x: x[:, FLAT], 6, 4), VECTOR, (), "index tensor"),
    Row("index of the batch", vector(lambda x: x[FLAT % 4]), VECTOR, (6,)),
    Row(
        "index_select", vector(lambda x: x.index_select(1, FLAT), 6, 4), VECTOR, (), "index tensor"
    ),
    Row(
        "gather", vector(lambda x: x.gather(1, FLAT.expand(4, 4)), 6, 4), VECTOR, (), "index tensor"
    ),
    Row(
        "index_put",
        vector(lambda x: x.clone().index_put_((FLAT[:3],), x[:3] * 2)),
        VECTOR,
        (6,),
    ),
    Row("create", vector(lambda x: x + torch.ones(x.shape[-1])), VECTOR, (6,)),
    Row("constant table", vector(lambda x: x + torch.arange(6.0)), VECTOR, (), ""),
    *INDEX_ROWS,
    *WHOLE_ROWS,
)
