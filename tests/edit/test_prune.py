"""Which weights are pruned: places, shares, patterns, scores, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroexapt import Narrow, PruneWeights, apply, map_axes, transaction
from neuroexapt.capture.masks import is_mask
from neuroexapt.edit import Edit, MakePermanent
from neuroexapt.edit.sparsity import lamp, without_lowest
from neuroexapt.edit.weights import found_weights
from neuroexapt.errors import EditError, UnknownPlaceError
from neuroexapt.measure import dense_gradients
from neuroexapt.testing.snapshot import changes, snapshot
from tests import zoo
from tests.edit.pruned import X, masks_of, mlp, pruned, stored, zeroed
from tests.laws.world import NAMES, mapped, outputs

every = pytest.mark.parametrize("name", NAMES)


# --- the whole zoo ---------------------------------------------------------------------------


@every
def test_a_pruned_model_is_the_dense_model_with_zeros(name: str) -> None:
    """To the last roundings, in both modes; and exactly the share asked for is zero."""
    model, args = zoo.build(name), zoo.example(name)
    with transaction(model) as tx:
        done = tx.apply(PruneWeights("*", share=0.5), args, axes=mapped(name))
    masks = masks_of(model)
    dense = zeroed(zoo.build(name), masks)
    for training in (False, True):
        found, expected = outputs(model, args, training), outputs(dense, args, training)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    chosen = found_weights(mapped(name), "*")
    total = sum(stored(model)[n].numel() for n in chosen)
    assert sum(int((~masks[n]).sum()) for n in chosen) == int(total / 2 + 0.5)
    assert f"{int(total / 2 + 0.5):,} of {total:,} weights are zero (50.0 %)" in done.description


@every
def test_only_weights_that_multiply_are_pruned_by_a_pattern(name: str) -> None:
    """No bias, norm, position, gate or embedding: what a linear, a convolution, attention or a
    recurrent kernel reads with is left."""
    chosen = set(found_weights(mapped(name), "*"))
    model = zoo.build(name)
    linear: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            linear.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            linear.add(id(module.in_proj_weight))
        elif isinstance(module, nn.RNNBase):
            linear.update(id(w) for n, w in module.named_parameters() if "weight" in n)
    assert chosen == {n for n, p in model.named_parameters() if id(p) in linear}


# --- which weights ---------------------------------------------------------------------------


def test_a_global_share_is_one_threshold_over_all_weights() -> None:
    """Brute force: sort every magnitude."""
    dense, model = mlp(), pruned(0.3, score="magnitude")
    weights = {n: p.detach() for n, p in dense.named_parameters() if n in masks_of(model)}
    everything = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    threshold = everything[int(0.3 * everything.numel() + 0.5)]
    assert set(weights) == {"body.0.weight", "head.weight"}
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, weights[name].abs() >= threshold)


def test_the_threshold_of_many_weights_is_exact() -> None:
    """A sample brackets it; with ties, infinities and orders that mislead the sample too."""
    torch.manual_seed(0)
    spread, size = torch.rand(1_200_000), 1_200_000
    cases = [
        spread,
        torch.arange(size, dtype=torch.float32),
        torch.ones(size),
        torch.cat([torch.full((700_000,), -torch.inf), spread[:500_000]]),
        torch.cat([spread[:600_000], spread[600_000:] * 1e-3]),
    ]
    for values in cases:
        for count in (1, size // 2, size - 1):
            (kept,) = without_lowest([values], count)
            assert int(kept.sum()) == size - count
            assert values[kept].min() >= values[~kept].max()


def test_a_share_by_layer_is_that_share_in_each() -> None:
    model = pruned(0.25, scope="layer")
    for name, mask in masks_of(model).items():
        weight = stored(mlp())[name].abs()
        assert int((~mask).sum()) == int(0.25 * weight.numel() + 0.5)
        assert weight[mask].min() >= weight[~mask].max()


@pytest.mark.parametrize("count", [0.1, 0.5, 0.9])
def test_equal_weights_are_pruned_to_the_exact_count(count: float) -> None:
    """Ties do not take more or fewer than asked for."""
    model = nn.Linear(10, 10)
    nn.init.ones_(model.weight)
    apply(model, PruneWeights("weight", share=count), (torch.randn(3, 10),))
    assert int((model.weight == 0).sum()) == round(100 * count)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_every_m_inputs_are_kept(n: int, m: int) -> None:
    """The best n of each group, along the inputs of a linear, a convolution and its transpose."""
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    before = [layers[i].weight.detach().clone() for i in (0, 1, 3)]
    apply(layers, PruneWeights("*", pattern=(n, m)), (torch.randn(2, 8, 2, 2),))
    for i, weight, dim in zip((0, 1, 3), before, (1, 0, 1), strict=True):
        groups = weight.abs().movedim(dim, -1).reshape(-1, m)
        mask = layers[i].nx_mask_weight.movedim(dim, -1).reshape(-1, m)
        assert (mask.sum(1) == n).all()
        lowest_kept = groups.masked_fill(~mask, torch.inf).amin(1)
        assert (lowest_kept >= groups.masked_fill(mask, 0).amax(1)).all()


def test_a_pattern_leaves_and_names_what_it_does_not_fit() -> None:
    """By a glob; a weight that is named is refused, with the figures."""
    layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    args = (torch.randn(3, 6),)
    done = apply(layers, PruneWeights("*", pattern=(2, 4)), args)
    assert "'0.weight' stays: 6 inputs" in done.description
    assert set(masks_of(layers)) == {"1.weight"}
    with pytest.raises(EditError, match=r"0.weight: got 6 inputs; needed .* 4 divides.*to 8"):
        apply(layers, PruneWeights("0", pattern=(2, 4)), args)


def test_lamp_is_its_formula() -> None:
    """Brute force over every pair of weights."""
    weight = torch.randn(7, 5, dtype=torch.float64)
    squares = weight.flatten().square()
    expected = [float(s / squares[squares >= s].sum()) for s in squares]
    assert lamp(weight).flatten().tolist() == pytest.approx(expected)


def test_scores_of_the_user_decide() -> None:
    """The lowest scores go, whatever the weights are."""
    model = mlp()
    scores = {"body.0.weight": torch.rand(16, 6), "head.weight": torch.rand(3, 16) + 1}
    apply(model, PruneWeights("*", share=0.5, scores=scores), (X,))
    kept = masks_of(model)
    everything = torch.cat([s.flatten() for s in scores.values()]).sort().values
    for name, mask in kept.items():
        assert torch.equal(mask, scores[name] >= everything[72])


def test_random_scores_follow_their_seed() -> None:
    first, same, other = (pruned(score="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.body[0].nx_mask_weight, same.body[0].nx_mask_weight)
    assert not torch.equal(first.body[0].nx_mask_weight, other.body[0].nx_mask_weight)


def test_places_and_what_is_skipped() -> None:
    """Names, paths, globs; a path without such weights means the module's own."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    args = (torch.randint(0, 9, (3, 5)),)
    axes = map_axes(model, args)
    assert found_weights(axes, "*") == ("1.weight", "2.weight")
    assert found_weights(axes, "") == ("1.weight", "2.weight")
    assert found_weights(axes, "*", ("2",)) == ("1.weight",)
    assert found_weights(axes, "0") == ("0.weight",)
    assert found_weights(axes, "1.bias") == ("1.bias",)
    with pytest.raises(UnknownPlaceError, match=r"near names: .*'1.weight'"):
        found_weights(axes, "1.wieght")
    with pytest.raises(UnknownPlaceError):
        found_weights(axes, "*", ("fc",))
    with pytest.raises(EditError, match="none of them a weight"):
        found_weights(axes, "*.bias")


def test_pruning_goes_on_from_what_is_pruned() -> None:
    """A weight once masked stays masked; less than there is, is refused."""
    model = pruned(0.4)
    before = {n: mask.clone() for n, mask in masks_of(model).items()}
    apply(model, PruneWeights("*", share=0.7), (X,))
    after = masks_of(model)
    assert all(not after[n][~mask].any() for n, mask in before.items())
    assert sum(int((~mask).sum()) for mask in after.values()) == int(0.7 * 144 + 0.5)
    with pytest.raises(EditError, match=r"share=0.5 of 144 weights, 101 of which are masked"):
        apply(model, PruneWeights("*", share=0.5), (X,))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (PruneWeights("*"), "exactly one"),
        (PruneWeights("*", share=0.5, pattern=(2, 4)), "exactly one"),
        (PruneWeights("*", share=1.0), "between 0 and 1"),
        (PruneWeights("*", share=True), "between 0 and 1"),
        (PruneWeights("*", pattern=(4, 4)), "0 < n < m"),
        (PruneWeights("*", share=0.5, scope="row"), "one of"),
        (PruneWeights("*", share=0.5, score="l1"), "one of"),
        (PruneWeights("*", share=0.99), "a weight left in every tensor"),
        (PruneWeights("*", share=0.5, scores={"head.weight": torch.ones(3, 16)}), "no scores"),
        (PruneWeights("head", share=0.5, scores={"head.weight": torch.ones(3)}), r"\(3, 16\)"),
        (MakePermanent("head"), "have been pruned"),
    ],
    ids=repr,
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    edit: Edit, words: str
) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(EditError, match=words):
        apply(model, edit, (X,))
    assert changes(before, snapshot(model)) == []


def test_all_problems_are_listed() -> None:
    found = PruneWeights("nowhere", share=2, scope="row", score="l1").check(map_axes(mlp(), (X,)))
    assert len(found) == 4


def test_a_parametrized_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    apply(model, PruneWeights("*", share=0.5), (X,))
    assert set(masks_of(model)) == {"1.weight"}
    with pytest.raises(EditError, match="parametrization has to be removed"):
        apply(model, PruneWeights("0", share=0.5), (X,))


def test_a_transformers_model_is_pruned_with_its_config_in_step() -> None:
    """Layers that store (in, out), a tied head, a config that follows an edit made later."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    kwargs = {"input_ids": torch.arange(12).view(2, 6)}
    done = apply(model, PruneWeights("*", pattern=(2, 4)), (), kwargs)
    assert done.notes == ()
    attention = model.transformer.h[0].attn.c_attn
    groups = attention.nx_mask_weight.T.reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert "lm_head.weight" in masks_of(model)
    assert "transformer.wte.weight" in masks_of(model)

    def loss_fn(net: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(net(**batch).logits.square().mean())

    gradients = dense_gradients(model, loss_fn, [kwargs])
    assert gradients["transformer.wte.weight"].shape == (40, 16)
    done = apply(model, Narrow("*.mlp.c_fc.out", to=48), (), kwargs)
    assert done.notes == ()
    assert config.n_inner == 48
    expected = model(**kwargs).logits
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if not is_mask(n)})
    torch.testing.assert_close(twin(**kwargs).logits, expected)
