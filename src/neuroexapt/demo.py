"""The demo: handwritten digits, one network trained as it is and one that evolves.

1,797 real images of 8x8 pixels that come with scikit-learn. Both arms start from the same
weights, see the same batches for the same number of steps and share the schedule. The evolving
arm decides on held-out data; test data is read once, at the end, by both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt.errors import SettingsError
from neuroexapt.measure import HoldoutScore, count_flops, count_parameters, evaluate, layers
from neuroexapt.plan import Budget, Settings
from neuroexapt.record import Journal, read_journal, write_report
from neuroexapt.train import Evolver

TRAIN, HOLDOUT = 600, 400  # the remaining 797 images are for the test
BATCH = 50
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in [0, 1] and labels, split by seed."""

    train: Batch
    holdout: Batch
    test: Batch

    @staticmethod
    def load(seed: int) -> Digits:
        """Read scikit-learn's bundled images.

        Raises:
            SettingsError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SettingsError(
                "demo",
                seen="no scikit-learn",
                needed="its bundled digits images",
                next_step="pip install 'neuroexapt[demo]'",
            ) from error
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
        images = torch.tensor(data.images, dtype=torch.float32)[:, None][order] / 16
        labels = torch.tensor(data.target)[order]
        parts = [TRAIN, HOLDOUT, len(labels) - TRAIN - HOLDOUT]
        return Digits(*zip(images.split(parts), labels.split(parts), strict=True))


class DigitsNet(nn.Module):
    """A first guess at a CNN: a generous start, a squeezed middle, an oversized head.

    Images (N, 1, 8, 8) to logits (N, 10).
    """

    def __init__(self, middle: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, middle, 3, padding=1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(middle, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 16, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a batch (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class Arm:
    """One trained network.

    ``points`` are held-out losses and accuracies by epoch; ``seconds`` is the whole arm,
    measuring included, of which ``overhead`` was the evolver's own.
    """

    name: str
    accuracy: float
    parameters: int
    flops: int
    seconds: float
    overhead: float
    points: tuple[dict[str, float], ...]
    model: nn.Module
    counts: tuple[int, int, int] | None = None


OnEpoch = Callable[[str, int, float, int, str], None]


def train(
    digits: Digits,
    seed: int,
    epochs: int,
    journal: Path | None,
    on_epoch: OnEpoch,
    network: Callable[[], nn.Module] = DigitsNet,
) -> tuple[Arm, Evolver | None]:
    """Train one arm: with a journal path it evolves, without it stays as it is."""
    name = "evolving" if journal else "fixed"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=5e-3, total_steps=epochs * (TRAIN // BATCH)
        )
        holdout = list(_batches(digits.holdout, torch.arange(HOLDOUT)))
        evolver = None
        started = time.perf_counter()
        if journal:
            evolver = Evolver(
                model,
                optimizer,
                loss_fn=loss_fn,
                holdout=holdout,
                budget=Budget(params=0.5),
                # So few images are looked at about as often as they are trained on.
                settings=Settings(epochs=epochs, seed=seed, overhead=1.0),
                journal=journal,
            )
        points = []
        shuffle = torch.Generator().manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            for batch in _batches(digits.train, torch.randperm(TRAIN, generator=shuffle)):
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
                schedule.step()
                if evolver:
                    evolver.step(batch)
            score, why = _end_epoch(model, holdout, digits, evolver)
            points.append(_point(epoch, score, _accuracy(model, digits.holdout)))
            on_epoch(name, epoch, score.loss, count_parameters(model), why)
        if evolver:
            evolver.close()
        arm = _arm(name, model, digits, time.perf_counter() - started, evolver, points)
    return arm, evolver


def _end_epoch(
    model: nn.Module, holdout: list[Batch], digits: Digits, evolver: Evolver | None
) -> tuple[HoldoutScore, str]:
    if evolver is None:
        return evaluate(model, loss_fn, holdout), ""
    end = evolver.end_epoch(accuracy=_accuracy(model, digits.holdout))
    return end.holdout, end.why


def _batches(data: Batch, order: Tensor) -> Iterator[Batch]:
    for index in order.split(BATCH):
        yield data[0][index], data[1][index]


def _point(epoch: int, score: HoldoutScore, accuracy: float) -> dict[str, float]:
    step = epoch * (TRAIN // BATCH)
    return {"epoch": epoch, "step": step, "holdout_loss": score.loss, "holdout_accuracy": accuracy}


@torch.no_grad()
def _accuracy(model: nn.Module, data: Batch) -> float:
    training = model.training
    model.eval()
    right = (model(data[0]).argmax(1) == data[1]).float().mean()
    model.train(training)
    return float(right)


def _arm(
    name: str,
    model: nn.Module,
    digits: Digits,
    seconds: float,
    evolver: Evolver | None,
    points: Sequence[dict[str, float]],
) -> Arm:
    return Arm(
        name,
        _accuracy(model, digits.test),
        count_parameters(model),
        count_flops(model, (digits.test[0][:1],)),
        seconds,
        evolver.overhead if evolver else 0.0,
        tuple(points),
        model,
        _counts(evolver) if evolver else None,
    )


def _counts(evolver: Evolver) -> tuple[int, int, int]:
    events = evolver.journal.events
    verdicts = [event["verdict"] for event in events if event["event"] == "verdict"]
    proposed = sum(event["event"] == "proposal" for event in events)
    return proposed, verdicts.count("kept"), proposed - verdicts.count("kept")


def run_seed(seed: int, epochs: int, out: Path, on_epoch: OnEpoch) -> tuple[Arm, Arm]:
    """Both arms of one seed; writes journal and report under ``out/seed<k>``."""
    folder = out / f"seed{seed}"
    journal = folder / "journal.jsonl"
    journal.unlink(missing_ok=True)
    digits = Digits.load(seed)
    fixed, _ = train(digits, seed, epochs, None, on_epoch)
    evolved, _ = train(digits, seed, epochs, journal, on_epoch)
    with Journal(journal) as more:
        more.write(
            "baseline",
            name=fixed.name,
            points=fixed.points,
            parameters=fixed.parameters,
            flops=fixed.flops,
            layers=layers(fixed.model),
        )
        more.write("result", rows=[_row(fixed), _row(evolved)])
    events = read_journal(journal)
    write_report(events, folder / "report.html", title=f"Digits, seed {seed}")
    return fixed, evolved


def _row(arm: Arm) -> dict[str, Any]:
    proposed, kept, back = arm.counts or (None, None, None)
    return {
        "name": arm.name,
        "test_accuracy": arm.accuracy,
        "parameters": arm.parameters,
        "flops": arm.flops,
        "seconds": arm.seconds,
        "proposed": proposed,
        "kept": kept,
        "rolled_back": back,
    }


def run(
    *, seeds: int = 3, epochs: int = 20, out: Path = Path("neuroexapt-demo"), console: Console
) -> list[tuple[Arm, Arm]]:
    """Run the demo and print its table.

    Args:
        seeds: number of repetitions, each with its own split, weights and batches.
        epochs: epochs of each arm.
        out: folder for journals and reports.
        console: where progress and the table go.

    Returns:
        Per seed the fixed and the evolved arm.

    Raises:
        SettingsError: scikit-learn is missing, or a number below 1.
    """
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if value < 1:
            raise SettingsError(
                name, seen=str(value), needed="1 or more", next_step=f"pass --{name} 3"
            )
    pairs = []
    threads = torch.get_num_threads()
    # One thread: the network is small, and the sums then come out alike on every machine.
    torch.set_num_threads(1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("digits", total=2 * seeds * epochs)
        for seed in range(seeds):

            def on_epoch(
                name: str, epoch: int, loss: float, parameters: int, why: str, seed: int = seed
            ) -> None:
                text = f"seed {seed} {name:8} holdout {loss:.3f}  {parameters:>8,} parameters"
                progress.update(task, advance=1, description=text)
                if why and console.is_terminal:
                    progress.console.print(f"[dim]seed {seed} epoch {epoch}:[/] {why}")

            pairs.append(run_seed(seed, epochs, out, on_epoch))
    torch.set_num_threads(threads)
    console.print(table(pairs))
    for seed in range(seeds):
        folder = out / f"seed{seed}"
        console.print(
            f"seed {seed}: journal {folder / 'journal.jsonl'}, report {folder / 'report.html'}",
            soft_wrap=True,
        )
    return pairs


def table(pairs: Sequence[tuple[Arm, Arm]]) -> Table:
    """Both arms side by side, mean and spread over seeds."""
    result = Table(title=f"Handwritten digits, {len(pairs)} seed(s), mean ± standard deviation")
    for title in ("", "fixed", "evolved"):
        result.add_column(title, justify="left" if not title else "right")
    rows: list[tuple[str, Callable[[Arm], float], str]] = [
        ("test accuracy", lambda arm: 100 * arm.accuracy, "{:.2f} %"),
        ("parameters", lambda arm: arm.parameters, "{:,.0f}"),
        ("FLOPs per image", lambda arm: arm.flops, "{:,.0f}"),
        ("time, seconds", lambda arm: arm.seconds, "{:.1f}"),
        ("  of it deciding", lambda arm: arm.overhead, "{:.1f}"),
    ]
    for title, value, form in rows:
        result.add_row(title, *(_spread([value(pair[k]) for pair in pairs], form) for k in (0, 1)))
    for place, title in enumerate(("mutations proposed", "  kept", "  rolled back or refused")):
        counts = [pair[1].counts[place] for pair in pairs if pair[1].counts]
        result.add_row(title, "-", _spread(counts, "{:.1f}"))
    return result


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(fmean(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean
