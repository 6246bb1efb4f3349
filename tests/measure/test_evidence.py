"""What is collected for all signals: of the right tensors, paired with the right targets."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests import zoo
from tests.laws.world import mapped
from tests.measure.test_undisturbed import BATCHES, restless, state_of
from tests.measure.test_undisturbed import loss_fn as restless_loss
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import RemoveLayer, apply, map_axes
from neuroexapt.errors import MeasureError, NeuroExaptError
from neuroexapt.measure import (
    Evidence,
    Latency,
    Reading,
    Signal,
    Watch,
    ablation_losses,
    activation_memory,
    chosen_signals,
    effective_rank,
    evaluate,
    gate_slopes,
    gather,
    latency,
    measure,
    read_latency,
    read_signals,
    register_signal,
    signals,
    skips,
)
from neuroexapt.measure.places import width_places
from neuroexapt.measure.registry import _SIGNALS
from neuroexapt.measure.targets import TargetTap


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the zoo -------------------------------------------------------------------------------------

# All of them by `make nightly`.
EVERY = os.environ.get("NEUROEXAPT_SEEDS") is not None
SMALL = ("resnet_basic", "gpt", "llama", "vae", "preact_dict", "lstm", "moe", "graph_net")


@pytest.mark.parametrize("name", [row.name for row in zoo.ZOO] if EVERY else SMALL)
def test_every_default_signal_is_measured_on_any_model_and_changes_nothing(name: str) -> None:
    """Each reading has a unit, samples and a place; nothing is refused, nothing is disturbed."""
    model, axes = zoo.build(name), mapped(name)
    batches = [zoo.example(name, 16) for _ in range(4)]
    before = state_of(model)
    seen = gather(model, zoo.loss, batches, axes)
    found = read_signals(seen)
    assert state_of(model) == before
    assert seen.refused == []
    assert {r.signal for r in found} >= {"saturation", "usable_information", "noise_scale"}
    for reading in found:
        assert reading.unit == signals()[reading.signal].unit
        assert reading.samples > 0
        assert reading.value == reading.value
    places = {r.at for r in found}
    assert places & set(axes.widths)


@pytest.mark.parametrize("name", ["resnet_basic", "llama", "bert", "preact_dict"])
def test_a_skip_is_what_removing_the_layer_does(name: str) -> None:
    """Wherever RemoveLayer takes a module, the ablation loss is the change it makes, to the bit."""
    axes = mapped(name)
    batches = [zoo.example(name, 4)]
    rises = ablation_losses(zoo.build(name), zoo.loss, batches, axes)
    model = zoo.build(name).eval()
    whole = evaluate(model, zoo.loss, batches).loss
    compared = 0
    for path, reading in list(rises.items())[:6]:
        changed = zoo.build(name).eval()
        try:
            apply(changed, RemoveLayer(path), args=batches[0])
        except NeuroExaptError:
            continue
        compared += 1
        rise = evaluate(changed, zoo.loss, batches).loss - whole
        assert reading.value == pytest.approx(rise, abs=1e-6), path
    assert compared >= 3


def test_a_module_that_changes_the_shape_cannot_be_skipped() -> None:
    """The error names those that can."""
    axes = mapped("gpt")
    with pytest.raises(MeasureError, match="cannot be skipped"):
        ablation_losses(zoo.build("gpt"), zoo.loss, [zoo.example("gpt")], axes, ["nowhere"])
    assert skips(mapped("hardcoded_flatten")) == {}


def test_the_ablation_error_is_that_of_the_difference() -> None:
    """A layer that adds the same to every loss has an exact rise, however the losses scatter."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Linear(1, 1)
            nn.init.ones_(self.shift.weight)
            nn.init.constant_(self.shift.bias, -2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.shift(x)

    model, batches = Shifted(), list(100 * drawn(8, 4, 1))
    axes = map_axes(model, (batches[0],))
    reading = ablation_losses(model, lambda m, x: m(x).mean(), batches, axes)["shift"]
    assert reading.value == pytest.approx(2.0, abs=1e-5)
    assert reading.error == pytest.approx(0.0, abs=1e-5)
    assert evaluate(model, lambda m, x: m(x).mean(), batches).error > 1  # type: ignore[operator]


# --- rows ----------------------------------------------------------------------------------------


def test_a_width_is_looked_at_where_it_is_read() -> None:
    """Behind the activation, a flattened map by channel: equal to what a forward gives."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    x = drawn(6, 3, 8, 8)
    axes = map_axes(net, (x,))
    seen = gather(net, lambda m, b: m(b).square().mean(), [x], axes, needs=["rows"])
    first, second = net[:2](x).detach(), net[:4](x).detach()
    for name, truth in (("0.out", first), ("2.out", second)):
        rows = seen.rows[name]
        expected = truth.movedim(1, -1).flatten(0, -2)
        assert torch.equal(rows.values_NC, expected)
        places = expected.shape[0] // 6
        assert rows.sample_N.tolist() == [n // places for n in range(len(expected))]
        assert rows.position_N.tolist() == [n % places for n in range(len(expected))]
        assert rows.space == ((6, 6) if name == "0.out" else (16,))
    assert torch.equal(seen.rows["0.out"].pooled_SF, F.adaptive_avg_pool2d(first, 2).flatten(1))


def test_memory_is_bounded_and_wide_widths_are_sampled() -> None:
    """2,000 units are seen through 128; a small cap keeps few rows; counts are scaled to all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 2))
    with torch.no_grad():
        net[0].weight[::2] = 0.0
        net[0].bias[::2] = -1.0  # half of the units are dead
    batches = [drawn(64, 4, seed=s) for s in range(8)]
    axes = map_axes(net, (batches[0],))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()  # type: ignore[no-any-return]

    few = gather(net, loss, batches, axes, needs=["rows"], cap=1 << 19)
    rows = few.rows["0.out"]
    assert rows.values_NC.shape[1] == rows.features_NF.shape[1] == 128
    kept = (rows.values_NC, rows.features_NF, rows.pooled_SF)
    assert 1 << 17 < sum(part.numel() * 4 for part in kept) < 1 << 18  # and as much to sort in
    [dead] = read_signals(few, ["dead_units"])
    assert 800 < dead.value < 1200


# --- targets -------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two outputs in a dict, one a class, one a number; the loss is computed outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.kind, self.size = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


def two_targets(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    out = model(batch["x"])
    size = F.mse_loss(out["size"].squeeze(1), batch["size"])
    return F.cross_entropy(out["kind"], batch["kind"]) + size


def test_several_outputs_add_up() -> None:
    """A dict model with two losses: both targets are found, the bits of both are summed."""
    x = drawn(800, 6)
    whole = {"x": x, "kind": (x[:, 0] > 0).long() + (x[:, 0] > 1).long(), "size": x[:, 1]}
    batches = [
        {key: value[at : at + 100] for key, value in whole.items()} for at in range(0, 800, 100)
    ]
    torch.manual_seed(0)
    model = Heads()
    seen = gather(model, two_targets, batches, map_axes(model, (x[:4],)), needs=["rows", "targets"])
    assert {name: one[0].kind for name, one in seen.targets.items()} == {
        "0": "numbers", "1": "labels"
    }  # fmt: skip
    [reading] = read_signals(seen, ["usable_information"])
    assert reading.at == "body.out"
    assert reading.value > 2.0  # log2(3) less noise for the class, and the number besides
    assert reading.samples == 800


class Tagger(nn.Module):
    """Predicts the next token of a periodic text from an embedding that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def shifted_in_model(model: nn.Module, ids: Tensor) -> Tensor:
    """As Hugging Face does it: labels are shifted and padded with -100, logits stay whole."""
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("loss", [next_token, shifted_in_model])
def test_a_language_model_is_asked_token_by_token(loss: Any) -> None:
    """Each token tells the next one: log2(8) bits, tokens of one text counting as one sample."""
    starts = torch.randint(8, (40, 1), generator=torch.Generator().manual_seed(0))
    texts = (3 * (starts + torch.arange(9))) % 8
    batches = list(texts.split(10))
    torch.manual_seed(0)
    model = Tagger()
    seen = gather(model, loss, batches, map_axes(model, (texts[:2],)), needs=["rows", "targets"])
    readings = {r.at: r for r in read_signals(seen, ["usable_information"])}
    assert readings["embed.out"].value == pytest.approx(3.0, abs=0.1)
    assert readings["embed.out"].samples == 40
    # Random tokens cannot be told from the one before.
    noise = list(torch.randint(8, (40, 9), generator=torch.Generator().manual_seed(1)).split(10))
    seen = gather(model, loss, noise, map_axes(model, (texts[:2],)), needs=["rows", "targets"])
    for reading in read_signals(seen, ["usable_information"]):
        assert abs(reading.value) < 0.1


def test_a_map_of_targets_is_met_at_the_nearest_place() -> None:
    """Segmentation at half resolution: each place is asked about the pixels above it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2)
    )
    coarse = torch.randint(3, (24, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    images = (labels - 1.0)[:, None]
    batches = list(zip(images.split(8), labels.split(8), strict=True))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with torch.no_grad():
        net[0].weight.normal_(generator=torch.Generator().manual_seed(5))
    axes = map_axes(net, (images[:2],))
    [reading] = measure(net, loss, batches, axes, ["usable_information"])
    assert reading.value == pytest.approx(1.58, abs=0.1)
    shuffled = [(x, y.flip(0)) for x, y in batches]
    [other] = measure(net, loss, shuffled, axes, ["usable_information"])
    assert other.value < 0.1


def test_a_loss_by_hand_takes_the_batch_or_what_the_caller_says() -> None:
    """No loss of torch is called: the last tensor of the batch, or `targets`, else an error."""
    x = drawn(128, 4)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        given = batch[0] if isinstance(batch, tuple) else batch
        return (model(given) - given[:, :1]).square().mean()  # type: ignore[no-any-return]

    axes = map_axes(net, (x[:4],))
    pairs = [(part, part[:, :1]) for part in x.split(32)]
    [guessed] = measure(net, by_hand, pairs, axes, ["usable_information"])
    [told] = measure(
        net, by_hand, x.split(32), axes, ["usable_information"], targets=lambda b: b[:, :1]
    )
    assert guessed.value == told.value > 1.0
    with pytest.raises(MeasureError, match="pass targets"):
        measure(net, by_hand, x.split(32), axes, ["usable_information"])


class SequenceFirst(nn.Module):
    """Positions come before samples inside; as many of both as the example has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x.transpose(0, 1).contiguous()))
        return self.down(hidden).mean(0)


def test_samples_are_told_by_the_axis_of_the_batch_and_not_by_their_number() -> None:
    """With as many positions as samples: the label of a sample meets the features of that one."""
    labels = torch.randint(2, (160,), generator=torch.Generator().manual_seed(0))
    x = drawn(160, 8, 3) + 3 * labels[:, None, None]
    batches = list(zip(x.split(8), labels.split(8), strict=True))
    torch.manual_seed(0)
    model = SequenceFirst()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    seen = gather(model, loss, batches, map_axes(model, (x[:4],)), needs=["rows", "targets"])
    rows = seen.rows["up.out"]
    assert rows.place.batch == 1
    expected = torch.relu(model.up(x)).flatten(0, 1).detach()
    torch.testing.assert_close(rows.values_NC, expected[rows.sample_N * 8 + rows.position_N])
    [reading] = read_signals(seen, ["usable_information"])
    assert reading.value > 0.9


def test_rows_whose_samples_are_unknown_are_not_paired() -> None:
    """Rows picked by content belong to nobody: other signals are measured, the reason is kept."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x[x[:, 0] > 0])))

    batches = [(drawn(64, 3, seed=s), torch.zeros(64).long()) for s in range(4)]
    model = Picked()
    axes = map_axes(model, (batches[0][0],))
    seen = gather(
        model, lambda m, b: m(b[0]).square().mean(), batches, axes, needs=["rows", "targets"]
    )
    found = read_signals(seen, ["saturation", "usable_information"])
    assert [r.signal for r in found] == ["saturation"]
    assert "unknown" in seen.refused[0].seen


def test_a_loss_that_only_some_batches_have_is_left_out() -> None:
    """The first loss is paired with the targets of all batches; the other one is no target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [drawn(32, 4, seed=s) for s in range(4)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        first = F.mse_loss(out[:, 0], x[:, 0])
        return first + F.mse_loss(out[:, 1], x[:, 1]) if x is batches[1] else first

    seen = gather(model, loss, batches, map_axes(model, (batches[0],)), needs=["rows", "targets"])
    assert list(seen.targets) == ["0"]


def test_large_maps_of_targets_are_kept_coarse() -> None:
    """A map of 200 x 100 labels becomes one of 64 x 64; places still meet what is nearest."""
    labels = torch.arange(200)[None, :, None].expand(2, 200, 100).contiguous()
    with TargetTap(2) as tap:
        F.cross_entropy(torch.zeros(2, 200, 200, 100), labels)
    [wanted] = tap.found
    assert wanted.space == (64, 64)
    column = wanted.values.reshape(2, 64, 64)[0, :, 0]
    assert (column - (torch.arange(64) + 0.5) * 200 / 64).abs().max() <= 1


# --- cost ----------------------------------------------------------------------------------------


def test_latency_is_the_median_with_the_interval_of_order_statistics() -> None:
    """With a clock of our own: warm-up left out, a single slow call moves nothing."""
    now = [0.0]

    class Timed(nn.Module):
        spent = iter([9.0, *(1.0 + 0.1 * n for n in range(8)), 50.0])

        def forward(self, x: Tensor) -> Tensor:
            now[0] += next(self.spent)
            return x

    found = latency(Timed(), (torch.ones(1),), calls=9, warm_up=1, clock=lambda: now[0])
    assert found.median == pytest.approx(1.4)
    assert found.spread == pytest.approx(0.2)
    # Order statistics 4 and 6 of 9 enclose the median with 0.65 to 0.7.
    assert found.error == pytest.approx(0.15, abs=0.06)
    assert read_latency(found).samples == 9
    assert read_latency(Latency(1.0, 0.1, 0.2, 5)).error == 0.1


def test_activation_memory_counts_each_storage_once() -> None:
    """By hand: a linear layer keeps its input, ReLU its output; weights are not activations."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
    x = torch.ones(7, 3)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()  # type: ignore[no-any-return]

    # The second layer's input is the ReLU's output: one storage.
    assert activation_memory(net, loss, x) == 4 * 7 * (3 + 5)
    assert activation_memory(nn.Sequential(net, nn.Tanh()), loss, x) == 4 * 7 * (3 + 5 + 2)


def test_costs_as_readings_are_those_of_their_functions() -> None:
    """Parameters and FLOPs by hand, exact; latency has a spread; Taylor and Fisher by formula."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = map_axes(net, (BATCHES[0],))
    batches = [drawn(8, 4, seed=s) for s in range(5)]
    names = ["parameters", "flops", "latency", "taylor", "fisher"]
    found = {r.signal: r for r in measure(net, restless_loss, batches, axes, names)}
    assert (found["parameters"].value, found["parameters"].error) == (44, 0.0)
    assert found["flops"].value == 2 * (4 * 6 + 6 * 2)
    assert found["latency"].value > 0
    sums = gate_slopes(net, restless_loss, batches, axes)["0.out"]
    assert found["taylor"].value == pytest.approx(float(sums.mean(0).abs().mean()))
    square = 8 * sums.var(0) + sums.mean(0) ** 2 - sums.var(0) / 5
    assert found["fisher"].value == pytest.approx(float(square.mean()))


# --- watching ------------------------------------------------------------------------------------


def trained(watch: bool, steps: int = 12) -> tuple[dict[str, Tensor], Watch | None]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 2)
    )
    optimizer = torch.optim.Adam(model.parameters())
    watcher = Watch(model, map_axes(model, (torch.ones(4, 4),)), every=3) if watch else None
    for step in range(steps):
        optimizer.zero_grad()
        restless_loss(model, BATCHES[step % 3] + drawn(8, 4, seed=step)).backward()
        optimizer.step()
        if watcher:
            watcher.step()
    torch.manual_seed(torch.initial_seed())
    return {name: value.clone() for name, value in model.state_dict().items()}, watcher


def test_watched_training_is_the_same_to_the_bit() -> None:
    """With dropout and batch statistics; and no hook is left between watched steps."""
    plain, _ = trained(False)
    watched, watcher = trained(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert watcher is not None
    seen = watcher.evidence()
    assert seen.gates["0.out"].shape == (4, 6)  # steps 3, 6, 9 and 12 of 12
    assert seen.rows["0.out"].values_NC.shape == (32, 6)
    assert {r.signal for r in read_signals(seen)} >= {"saturation", "noise_scale", "removal_loss"}
    model = watcher.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_watched_gradients_and_gates_are_those_of_passes() -> None:
    """With a rate of 0 nothing moves: what steps show equals what passes of their own show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = map_axes(model, (BATCHES[0],))
    watch = Watch(model, axes, every=1)
    watch.step()
    for batch in BATCHES:
        model.zero_grad()
        (8 * restless_loss(model, batch)).backward()
        model.zero_grad(set_to_none=True)  # before the watch is asked: it has seen them already
        watch.scale = lambda: 8.0
        watch.step()
    seen, passes = (
        watch.evidence(),
        gather(model, restless_loss, BATCHES, axes, needs=["gradients"]),
    )
    for name, rows in passes.gradients.items():
        torch.testing.assert_close(seen.gradients[name], rows)
    torch.testing.assert_close(
        seen.gates["0.out"], gate_slopes(model, restless_loss, BATCHES, axes)["0.out"]
    )
    assert seen.batch_size == 8
    watch.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_watch_keeps_the_last_steps_and_starts_over_after_an_edit() -> None:
    """At most 16 rows of gradients; `renew` forgets."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = map_axes(model, (BATCHES[0],))
    watch = Watch(model, axes, every=1)
    for _ in range(20):
        model.zero_grad()
        restless_loss(model, BATCHES[0]).backward()
        watch.step()
    assert watch.evidence().gradients["0.weight"].shape == (16, 24)
    watch.renew(axes)
    assert watch.evidence().gradients == {}
    watch.close()
    with pytest.raises(MeasureError, match="every"):
        Watch(model, axes, every=0)


def test_a_model_can_be_saved_copied_and_evaluated_during_a_watched_step() -> None:
    """Hooks pickle as nothing, a copy is not watched, and what is evaluated does not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    watch = Watch(model, map_axes(model, (BATCHES[0],)), every=1)
    watch.step()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = pickle.loads(pickle.dumps(model))
    twin = copy.deepcopy(model)
    loaded(BATCHES[0]), twin(BATCHES[0])
    evaluate(model, restless_loss, BATCHES)
    assert watch.evidence().rows == {}
    restless_loss(model, BATCHES[0]).backward()
    watch.step()
    assert len(watch.evidence().rows["0.out"].values_NC) == 8
    torch.testing.assert_close(twin(BATCHES[1]), model(BATCHES[1]))
    watch.close()


def test_watching_under_autocast_and_checkpointing_goes_through() -> None:
    """Activations in bfloat16, and a block that runs again in backward."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    model = nn.ModuleDict({"body": body, "head": nn.Linear(6, 2)})

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.parts["body"], x, use_reentrant=False)
            return self.parts["head"](hidden)  # type: ignore[no-any-return]

    net = Checkpointed()
    watch = Watch(net, map_axes(net, (BATCHES[0],)), every=1)
    for batch in BATCHES:
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = restless_loss(net, batch)
        loss.backward()
        watch.step()
    found = read_signals(watch.evidence(), ["saturation", "taylor", "fisher", "noise_scale"])
    assert {r.signal for r in found} >= {"saturation"}
    watch.close()


def test_a_watch_does_not_stop_a_training_whose_inputs_change() -> None:
    """Longer sequences than the map knows, a model without a tensor as input: it says so."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(48, 2)

        def forward(self, rows: Any) -> Tensor:
            x = rows if isinstance(rows, Tensor) else torch.zeros(2, 8, 4)
            hidden = torch.relu(self.up(x)).transpose(1, 2).flatten(1)
            return self.down(F.pad(hidden, (0, 48 - hidden.shape[1])))

    model = Padded()
    watch = Watch(model, map_axes(model, (drawn(4, 8, 4),)), every=1)
    watch.step()
    for given in (drawn(4, 8, 4), drawn(4, 6, 4), "no tensor", drawn(4, 8, 4)):
        model(given).square().mean().backward()
        watch.step()
    seen = watch.evidence()
    assert seen.batch_size == 4
    assert watch.held_bytes() < 1 << 20
    assert {error.place for error in seen.refused} >= {"batch size"}
    assert read_signals(seen, ["noise_scale"])
    watch.close()


def test_gathering_disturbs_nothing_even_when_it_fails() -> None:
    """On a model that changes as much as a forward may; with an exception out of it too."""
    model = restless()
    axes = map_axes(restless(), (BATCHES[0],))
    before = state_of(model)
    gather(model, restless_loss, BATCHES, axes, needs=["rows", "blocks", "gradients", "gates"])
    assert state_of(model) == before
    model.fails_at = 2
    before = state_of(model)
    with pytest.raises(ValueError, match="half-way"):
        gather(model, restless_loss, BATCHES, axes, needs=["rows"])
    assert state_of(model) == before


# --- the table -----------------------------------------------------------------------------------


def test_a_signal_of_ones_own_joins_by_one_row() -> None:
    """Registered, chosen by name, measured with the rest, and gone again."""

    def loudness(seen: Evidence) -> list[Reading]:
        return [
            Reading("loudness", name, float(rows.values_NC.abs().mean()), "mean size", None, 1)
            for name, rows in seen.rows.items()
        ]

    row = Signal("loudness", "mean size", "how large values are", ("rows",), loudness)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    try:
        assert register_signal(row) is row
        axes = map_axes(net, (BATCHES[0],))
        [reading] = measure(net, restless_loss, BATCHES, axes, ["loudness"])
        assert reading.value > 0
        assert row in chosen_signals(None)
        with pytest.raises(MeasureError, match="loudness"):
            register_signal(Signal("loudness", "x", "another", (), lambda seen: []))
    finally:
        _SIGNALS.pop("loudness", None)
    with pytest.raises(MeasureError, match="saturation"):
        chosen_signals(["saturatoin"])
    with pytest.raises(MeasureError, match="needs"):
        register_signal(Signal("new", "x", "y", ("weights",), loudness))


def test_what_one_place_cannot_say_does_not_cost_the_others() -> None:
    """Two rows are too few for most signals: the reasons are kept, nothing is raised."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = drawn(2, 4)
    seen = gather(net, restless_loss, [x], map_axes(net, (x,)), needs=["rows"])
    found = read_signals(seen, ["participation_ratio", "saturation"])
    assert [r.signal for r in found] == ["saturation"]
    assert found[0].value == pytest.approx(effective_rank(seen.rows["0.out"].values_NC) / 6)
    assert [error.place for error in seen.refused] == ["participation_ratio"]


def test_places_of_widths_are_in_the_order_of_the_run() -> None:
    """So that a drop is from a layer to the next."""
    assert list(width_places(mapped("reference_cnn"))) == [
        "features.0.out", "features.4.out", "features.8.out", "classifier.1.out"
    ]  # fmt: skip
