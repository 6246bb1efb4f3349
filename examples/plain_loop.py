"""The three lines in a training loop you already have.

Run: python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import Budget, Evolver, Settings

EPOCHS, BATCH = 14, 32


def data(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of points in 16 dimensions, in four classes that a curved border divides."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 16, generator=draw)
    labels = (points[:, 0] * points[:, 1] > 0).long() + 2 * (points[:, 2] > 0.5).long()
    return list(zip(points.split(BATCH), labels.split(BATCH), strict=True))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    points, labels = batch
    return F.cross_entropy(model(points), labels)


def main() -> None:
    torch.manual_seed(0)
    train, holdout, test = data(1, 1024), data(2, 512), data(3, 512)
    model = nn.Sequential(
        nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    evolver = Evolver(  # the first line
        model,
        optimizer,
        loss_fn=loss_fn,
        holdout=holdout,
        budget=Budget(params=0.5),
        settings=Settings(epochs=EPOCHS),
    )
    for _ in range(EPOCHS):
        for batch in train:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            evolver.step()  # the second line
        epoch = evolver.end_epoch()  # the third line
        print(f"{epoch.number:3} {epoch.holdout.loss:.4f} {epoch.parameters:7,}  {epoch.why}")
    evolver.close()

    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    print(f"test accuracy {right / 512:.1%}, deciding took {evolver.overhead:.1f} s")
    print(model)


if __name__ == "__main__":
    main()
