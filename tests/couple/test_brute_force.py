"""Every rule against its operator: what a rule says cannot matter is tried out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from neuroexapt.couple import axis as algebra
from neuroexapt.couple.axis import Axis
from neuroexapt.couple.marks import Dims
from neuroexapt.couple.site import RULES, Rule, Site
from tests.couple.brute_force import RealCall, complaints, real_calls
from tests.couple.direct_calls import ELSEWHERE, direct_calls
from tests.couple.drawn import call, w, x
from tests.couple.operators import ROWS, Row


def random_model(row: Row) -> tuple[nn.Module, tuple[Any, ...]]:
    """The row's model with all weights drawn anew: equal weights would hide an exchange."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = row.make().double()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.detach().uniform_(0.5, 1.5)
        return model, (torch.randn(row.shape, dtype=torch.float64),)


def own_rules() -> dict[str, Rule]:
    """The rules of the library but for recurrent kernels, which have an oracle of their own."""
    return {
        op: rule
        for op, rule in RULES.items()
        if rule.__module__.startswith("neuroexapt.")
        and not rule.__module__.endswith("rules_recurrent")
    }


def in_rows() -> set[str]:
    return {made.op for row in ROWS for made in real_calls(*random_model(row))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_operators_of_a_row_do_what_their_rules_say(row: Row) -> None:
    """Each operator call of each tiny model, with the values it was made with."""
    found = [text for made in real_calls(*random_model(row)) for text in complaints(made)]
    assert found == []


def families() -> dict[str, list[RealCall]]:
    """The direct calls by the function that is the rule."""
    found: dict[str, list[RealCall]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in direct_calls():
            rule = RULES.get(made.op)
            found.setdefault(rule.__name__ if rule else "pointwise", []).append(made)
    return found


FAMILIES = families()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # operators that torch calls deprecated, or in beta
def test_operators_called_directly_do_what_their_rules_say(family: str) -> None:
    """Forms, options and variants that the tiny models do not reach."""
    assert [text for made in FAMILIES[family] for text in complaints(made)] == []


def test_every_operator_with_a_rule_is_tried() -> None:
    """By a row or by a direct call; else it is a kernel of another device, and named as such."""
    tried = in_rows() | {made.op for calls in FAMILIES.values() for made in calls}
    assert set(own_rules()) - tried == ELSEWHERE


def test_what_cannot_be_run_here_shares_a_rule_that_is_tried() -> None:
    """The kernels of other devices have no rule of their own."""
    tried = in_rows() | {made.op for calls in FAMILIES.values() for made in calls}
    rules = own_rules()
    assert {rules[op] for op in ELSEWHERE} <= {rules[op] for op in tried & set(rules)}


# Wrong rules, each with the call that must give it away and a word of the complaint.


def silent_sum(site: Site) -> Sequence[Dims]:
    """Sums without saying so."""
    return [site.dims(site.call.inputs[0])[:1]]


def free_order(site: Site) -> Sequence[Dims]:
    """Takes a running sum for pointwise."""
    return [site.dims(site.call.inputs[0])]


def uncoupled(site: Site) -> Sequence[Dims]:
    """Does not tie the operands of a product."""
    left, right = site.call.inputs
    site.contract(right, [-2])
    return [(site.axis(left, 0), site.axis(right, 1))]


def unread(site: Site) -> Sequence[Dims]:
    """Ties the operands of a product, but does not say which of them can be silent."""
    left, right = site.call.inputs
    site.same(site.axis(left, 1), site.axis(right, 0))
    return [(site.axis(left, 0), site.axis(right, 1))]


def wrong_operand(site: Site) -> Sequence[Dims]:
    """Says that the rows of a matrix are read, where its columns are."""
    left, right = site.call.inputs
    site.same(site.axis(left, 1), site.axis(right, 0))
    site.contract(right, [-1])
    return [(site.axis(left, 0), site.axis(right, 1))]


def exchanged_factors(site: Site) -> Sequence[Dims]:
    """Takes the inner factor of a view for the outer one."""
    rows, columns = site.dims(site.call.inputs[0])
    return [(algebra.product([columns, rows]),)]


def exchanged_segments(site: Site) -> Sequence[Dims]:
    """Puts the second part of a concatenation first."""
    parts = site.call.inputs
    return [(site.axis(parts[0], 0), algebra.concat([site.axis(p, 1) for p in parts[::-1]]))]


def untied_bias(site: Site) -> Sequence[Dims]:
    """Leaves the second operand of an addition alone."""
    return [site.dims(site.call.inputs[0])]


def untied_order(site: Site) -> Sequence[Dims]:
    """Gives what comes out of a roll new positions in an order of their own."""
    return [tuple(Axis(axis.size) for axis in site.dims(site.call.inputs[0]))]


def loose_choice(site: Site) -> Sequence[Dims]:
    """Does not say that a chosen position is named by number."""
    return [site.dims(site.call.inputs[0])[:1]]


WRONG = (
    (silent_sum, call("sum.dim_IntList", x(4, 5), [1]), "reaches others"),
    (free_order, call("cumsum", x(4, 5), 1), "the order of an axis of 5 matters"),
    (uncoupled, call("mm", x(4, 5), w(5, 3)), "the order of an axis of 5 matters"),
    (unread, call("mm", x(4, 5), w(5, 3)), "position 0 of 5 reaches others"),
    (unread, call("mm", x(4, 5), x(5, 3)), "position 0 of 5 reaches others"),
    (wrong_operand, call("mm", x(4, 5), w(5, 3)), "position 0 of 5 reaches others"),
    (exchanged_factors, call("view", x(4, 5), [20]), "matters"),
    (exchanged_segments, call("cat", [x(4, 2), x(4, 3)], 1), "matters"),
    (untied_bias, call("add.Tensor", x(4, 5), x(5)), "the order of an axis of 5 matters"),
    (untied_order, call("roll", x(4, 5), [1], [1]), "matters"),
    (loose_choice, call("argmax", x(4, 5), 1), "the order of an axis of 5 matters"),
)


@pytest.mark.parametrize(
    ("rule", "made", "word"), WRONG, ids=lambda part: getattr(part, "__name__", "")
)
def test_a_wrong_rule_is_caught(rule: Rule, made: RealCall, word: str) -> None:
    """The tests above can fail: each kind of mistake is complained of, the real rule is not."""
    assert any(word in text for text in complaints(made, rule))
    assert not list(complaints(made))
