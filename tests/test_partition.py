"""WeLore's division with the other side cut, or nothing, and training one side of it with as many parameters."""

import pytest
import torch
from torch import nn

from welore.budget import Budget
from welore.chosen import WHO, Chosen, within
from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.errors import Refused
from welore.lowrank import LowRankLinear
from welore.models import components
from welore.modes import norm_parameters, select
from welore.partition import Partition
from welore.ranks import Welore
from welore.svd import Plain

BUDGET = Budget(err=0.3)


@pytest.fixture
def cut(model, cache):
    """A function of what is cut (lrc, nlrc, nothing) to the tiny model with that cut, and its plan."""

    def cut(what):
        coordinates = Coordinates(Plain("plain", "none"), weight_digests(model), cache)
        options = ("minmax", "half", "plain")
        rule = Welore("welore", *options) if what == "lrc" else Partition("partition", *options, what)
        plan = rule.plan(read_spectra(model, coordinates), BUDGET)
        factorize(model, plan, coordinates)
        return model, plan

    return cut


def chosen(who, plan, seed=0, norms=False):
    mode = Chosen("chosen", 1e-3, (0.9, 0.999), 1e-8, 0.0, norms, who, seed)
    mode.divide(plan.division)
    return mode


def count(parameters):
    return sum(p.numel() for p in parameters)


def trained_names(model, mode):
    """The compressible weights that train, and whether any of them trains in part."""
    select(model, mode)
    flags = {name: {p.requires_grad for p in module.parameters()} for name, module in components(model).items()}
    assert all(len(values) == 1 for values in flags.values())
    return {name for name, values in flags.items() if values == {True}}


def test_the_other_side_is_cut_to_the_same_keep(cut):
    model, plan = cut("nlrc")
    factored = {name for name, module in components(model).items() if isinstance(module, LowRankLinear)}
    assert factored == set(plan.factored) == set(plan.ranks) - set(plan.division)
    stored = count(p for module in components(model).values() for p in module.parameters())
    dense = sum(m.in_features * m.out_features for m in components(model).values())
    assert stored / dense == pytest.approx(plan.keep)
    (shapes,) = [{name: (m.out_features, m.in_features) for name, m in components(model).items()}]
    removed = sum(M * N - plan.division[name] * (M + N) for name, (M, N) in shapes.items() if name in plan.division)
    assert plan.keep == pytest.approx(1 - removed / dense, abs=0.02)  # a rank of this model is 1 % of its weights


def test_nothing_is_cut_and_the_division_is_that_of_welore(cut):
    model, plan = cut("nothing")
    assert all(type(module) is nn.Linear for module in components(model).values())
    assert plan.keep == 1 and plan.err == 0 and 0 < len(plan.division) < len(plan.ranks)


def test_welores_own_cut_is_its_own_division(cut):
    _, plan = cut("lrc")
    assert plan.division == plan.factored and plan.lrc is None


@pytest.mark.parametrize("what", ["lrc", "nlrc", "nothing"])
def test_sides_are_disjoint_and_within_the_parameters_of_the_lrc_factors(what, cut):
    model, plan = cut(what)
    found = components(model)
    budget = sum(r * (found[n].in_features + found[n].out_features) for n, r in plan.division.items())
    names = {who: trained_names(model, chosen(who, plan)) for who in WHO}
    assert names["lrc"] and names["lrc"] <= set(plan.division)
    assert names["nlrc"] and names["nlrc"] <= set(found) - set(plan.division)
    assert names["all"] == set(found)
    for who in ("lrc", "nlrc", "random"):
        sizes = {name: count(module.parameters()) for name, module in found.items()}
        trained = sum(sizes[name] for name in names[who])
        side = {"lrc": set(plan.division), "nlrc": set(found) - set(plan.division)}.get(who, set(found))
        left = min((sizes[name] for name in side - names[who]), default=budget)
        assert trained <= budget
        assert trained + left > budget or side == names[who]
    if what == "lrc":
        assert names["lrc"] == set(plan.division)


def test_norms_train_beside_every_side(cut):
    model, plan = cut("nothing")
    bare = count(select(model, chosen("nlrc", plan)))
    assert count(select(model, chosen("nlrc", plan, norms=True))) == bare + count(norm_parameters(model))


def test_a_seed_makes_a_choice_and_another_another():
    sizes = {f"w{index}": 10 for index in range(20)}
    choices = [within(sizes, 55, seed) for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2] and len(choices[0]) == 5
    assert within({"big": 9, "small": 2}, 3, 0) == ["small"]


def test_what_cannot_be_divided_is_refused(model, cut):
    with pytest.raises(Refused, match="WeLore's division"):
        select(model, Chosen("chosen", 1e-3, (0.9, 0.999), 1e-8, 0.0, True, "lrc", 0))
    with pytest.raises(Refused, match="mode.who=both"):
        Chosen("chosen", 1e-3, (0.9, 0.999), 1e-8, 0.0, True, "both", 0)
    with pytest.raises(Refused, match="ranks.cut=lrc"):
        Partition("partition", "minmax", "half", "plain", "lrc")


@pytest.mark.parametrize("what", ["nlrc", "nothing"])
def test_after_a_step_only_the_chosen_weights_have_moved(what, cut):
    model, plan = cut(what)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mode = chosen("random", plan)
    names = trained_names(model, mode)
    optimizer = mode.optimizer(select(model, mode))
    ids_BL = torch.arange(32).reshape(1, 32)
    model(input_ids=ids_BL, labels=ids_BL).loss.backward()
    optimizer.step()
    moved = {
        name.removesuffix(".weight").removesuffix(".A").removesuffix(".B")
        for name, p in model.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == names


@pytest.mark.parametrize(("mode", "inside"), [("welore", True), ("nlrc", False)])
def test_a_mode_of_one_side_follows_the_division_and_not_what_is_factored(mode, inside, cut, configured):
    model, plan = cut("nlrc")
    strategy = configured(f"mode={mode}", "mode.norms=false").mode
    strategy.divide(plan.division)
    chosen = {id(p) for p in select(model, strategy)}
    for name, module in components(model).items():
        assert {id(p) in chosen for p in module.parameters()} == {(name in plan.division) == inside}
