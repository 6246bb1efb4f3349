"""Changes made by hand: one edit, several in a transaction, and a trial that is taken back.

Run: python examples/one_edit.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroexapt import InsertConv, Narrow, Widen, apply, transaction
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard import Trial


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    images = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    train_a_step(model, optimizer, images)
    weight = model[0].weight

    # One edit. Everything that has this width follows: the norm, the next layer, Adam's moments.
    done = apply(model, Widen("0", by=8), args=(images,), optimizer=optimizer)
    print(f"{done.description}: {done.parameters_before:,} to {done.parameters_after:,} parameters")
    print(f"outputs differ by at most {done.max_difference:.1e}")
    assert model[0].weight is weight
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape

    # Several together, or none of them: an exception takes all of them back, bit for bit.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with transaction(model, optimizer) as tx:
            tx.apply(InsertConv("2"), (images,))
            tx.apply(Narrow("3", to=4), (images,))
            print(f"inside: {sum(p.numel() for p in model.parameters()):,} parameters")
            raise RuntimeError("changed my mind")
    except RuntimeError as error:
        after = model.state_dict()
        same = before.keys() == after.keys()
        same = same and all(torch.equal(before[name], after[name]) for name in before)
        print(f"{error}: every bit is as before: {same}")

    # A trial goes on through training steps, and can still be taken back.
    trial = Trial(model, optimizer)
    trial.apply(Narrow("0", by=0.5), (images,))
    for _ in range(3):
        train_a_step(model, optimizer, images)
    trial.roll_back()  # or trial.keep()
    print(f"after the trial: {model[0].out_channels} channels, as before it")

    # What cannot be done is refused, with the place, what was seen, and what to do next.
    try:
        apply(model, Widen("5", by=2), args=(images,))
    except NeuroExaptError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
