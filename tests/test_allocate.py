import itertools

import pytest
import torch

from welore.allocate import VALUES, Lagrange, Menu, earliness
from welore.budget import DENSE_RULES, Budget
from welore.errors import Refused
from welore.moments import Needs
from welore.ranks import Welore
from welore.svd import Spectrum

MODEL = [(64, 64), (24, 64), (64, 172), (172, 64)] * 3  # square, k and v of a GQA model, down, gate and up
SMALL = [[(4, 6), (5, 5), (6, 3)], [(5, 5), (3, 7)], [(6, 4), (4, 6), (5, 5)]]
BUDGETS = [Budget(err=0.0), Budget(err=0.2), Budget(err=0.45), Budget(keep=0.95), Budget(keep=0.75), Budget(keep=0.6)]
every_value = pytest.mark.parametrize("value", VALUES)


def random_spectra(seed, shapes):
    """Values that fall at a speed of their own for each weight, with fisher (not sorted) and slopes of either sign."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for index, shape in enumerate(shapes):
        K, speed = min(shape), 4 * torch.rand(1, generator=generator, dtype=torch.float64)
        sigma_K = (torch.rand(K, generator=generator, dtype=torch.float64) ** speed).sort(descending=True).values
        fisher_K = sigma_K**2 * (0.2 + torch.rand(K, generator=generator, dtype=torch.float64))
        slope_K = sigma_K * torch.randn(K, generator=generator, dtype=torch.float64)
        spectra[f"w{index}"] = Spectrum(shape, sigma_K, fisher_K, slope_K)
    return spectra


def cost(ranks, spectra, budget):
    """What a plan costs, counted anew: ranks under err, parameters under keep."""
    total = 0
    for name, rank in ranks.items():
        M, N = spectra[name].shape
        if budget.keep is None:
            total += min(M, N) if rank is None else rank
        else:
            total += M * N if rank is None else rank * (M + N)
    return total


def limit(spectra, budget):
    everything = cost(dict.fromkeys(spectra), spectra, budget)
    return (1 - budget.err if budget.keep is None else budget.keep) * everything + 1e-9


def worth(ranks, spectra, value):
    return sum(float(VALUES[value](spectra[name])[:rank].sum()) for name, rank in ranks.items())


def every_plan(spectra, dense, multiple):
    options = []
    for spectrum in spectra.values():
        ranks = range(multiple, DENSE_RULES[dense](spectrum.shape) + 1, multiple)
        options.append([*ranks, None])
    return [dict(zip(spectra, ranks, strict=True)) for ranks in itertools.product(*options)]


@pytest.mark.parametrize("dense", DENSE_RULES)
@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("shapes", SMALL, ids=["three", "two", "wide and tall"])
def test_of_all_plans_of_a_small_model_none_that_fits_is_worth_more(shapes, budget, multiple, dense):
    """The dense jump makes this a heuristic: of 2150 such cases (25 seeds) one is missed, by 9 % of the value."""
    allocator = Lagrange("lagrange", "energy", "same", multiple, dense, 0.0)
    for seed in range(6):
        spectra = random_spectra(seed, shapes)
        plans = every_plan(spectra, dense, multiple)
        fitting = [plan for plan in plans if cost(plan, spectra, budget) <= limit(spectra, budget)]
        if fitting:
            plan = allocator.plan(spectra, budget)
            assert plan.ranks in fitting
            best = max(worth(other, spectra, "energy") for other in fitting)
            assert worth(plan.ranks, spectra, "energy") == pytest.approx(best, rel=1e-12)
        else:
            with pytest.raises(Refused, match="out of reach"):
                allocator.plan(spectra, budget)


@every_value
@pytest.mark.parametrize("err", [0.1, 0.3, 0.5, 0.7])
def test_where_ranks_cost_the_same_and_no_weight_is_better_off_dense_the_plan_is_the_best_there_is(err, value):
    for seed in range(5):
        spectra = random_spectra(seed, [(5, 8), (5, 5), (9, 4)])
        spectra = {
            name: Spectrum(s.shape, s.sigma_K, s.fisher_K.sort(descending=True).values) for name, s in spectra.items()
        }
        budget = Budget(err=err)
        plan = Lagrange("lagrange", value, "same", 1, "never", 0.0).plan(spectra, budget)
        plans = [p for p in every_plan(spectra, "never", 1) if cost(p, spectra, budget) <= limit(spectra, budget)]
        best = max(worth(p, spectra, value) for p in plans)
        assert worth(plan.ranks, spectra, value) == pytest.approx(best, rel=1e-12)


def test_many_weights_come_within_half_a_percent_of_the_bound_that_no_plan_can_pass():
    """Weak duality: for any price, the sum of the best priced options plus price * limit is at least every plan."""
    spectra = random_spectra(0, [(64, 64), (64, 172), (172, 64), (24, 64)] * 8)
    for budget in (Budget(err=0.4), Budget(keep=0.7), Budget(keep=0.5)):
        for multiple in (1, 8):
            plan = Lagrange("lagrange", "energy", "same", multiple, "break_even", 0.0).plan(spectra, budget)
            shapes = [spectrum.shape for spectrum in spectra.values()]
            menu = Menu.of([s.sigma_K**2 for s in spectra.values()], shapes, budget, "break_even", multiple)
            priced = (menu.value_LO - plan.threshold * menu.cost_LO).amax(1).sum()
            bound = float(priced) + plan.threshold * limit(spectra, budget)
            lost = bound - worth(plan.ranks, spectra, "energy")
            assert -1e-9 <= lost <= 5e-3 * bound


@pytest.mark.parametrize("removed", [1, 5, 20, 40, 55])
@pytest.mark.parametrize("seed", range(3))
def test_with_normalized_values_and_no_dense_option_it_is_the_threshold_of_welore(seed, removed):
    spectra = random_spectra(seed, [(16, 16), (8, 16), (44, 16), (9, 9), (15, 20)])
    budget = Budget(err=removed / 64)
    welore = Welore("welore", "max", "never", "plain").plan(spectra, budget)
    plan = Lagrange("lagrange", "normalized", "plain", 1, "never", 0.0).plan(spectra, budget)
    assert plan.ranks == welore.ranks
    assert plan.err == pytest.approx(removed / 64)


@every_value
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("budget", [Budget(err=0.3), Budget(keep=0.8), Budget(keep=0.45)], ids=str)
def test_the_budget_is_kept_and_no_further_step_of_a_factored_weight_fits(budget, multiple, value):
    spectra = random_spectra(1, MODEL)
    plan = Lagrange("lagrange", value, "same", multiple, "break_even", 0.0).plan(spectra, budget)
    left = limit(spectra, budget) - cost(plan.ranks, spectra, budget)
    assert left >= 0 and plan.factored
    for name, rank in plan.factored.items():
        assert rank % multiple == 0
        if rank + multiple <= DENSE_RULES["break_even"](spectra[name].shape):
            assert left < multiple * budget.price(spectra[name].shape)


def test_a_weight_whose_values_are_all_alike_stays_dense_and_one_that_falls_fast_is_cut():
    flat, steep = torch.ones(24, dtype=torch.float64), 0.5 ** torch.arange(24, dtype=torch.float64)
    spectra = {"flat": Spectrum((24, 64), flat), "steep": Spectrum((24, 64), steep)}
    ranks = Lagrange("lagrange", "normalized", "same", 1, "break_even", 0.0).plan(spectra, Budget(keep=0.7)).ranks
    assert ranks["flat"] is None
    assert ranks["steep"] == int(0.4 * 24 * 64 / (24 + 64))


def test_components_of_no_value_are_not_bought_even_where_they_fit():
    sigma_K = torch.tensor([3.0, 2.0, 1.0] + [0.0] * 13, dtype=torch.float64)
    spectra = {"deficient": Spectrum((16, 16), sigma_K), "nothing": Spectrum((16, 16), torch.zeros(16).double())}
    for value in ("energy", "relative", "normalized", "quantile"):
        plan = Lagrange("lagrange", value, "same", 1, "break_even", 0.0).plan(spectra, Budget(keep=0.9))
        assert plan.ranks == {"deficient": 3, "nothing": 1}


def test_a_weight_too_small_for_one_multiple_stays_dense():
    spectra = random_spectra(0, [(9, 9), (64, 64)])
    plan = Lagrange("lagrange", "energy", "same", 8, "break_even", 0.0).plan(spectra, Budget(keep=0.6))
    assert plan.ranks["w0"] is None
    assert plan.ranks["w1"] % 8 == 0


def test_layers_count_more_the_earlier_they_are():
    names = ["model.layers.0.q", "model.layers.0.k", "model.layers.1.q", "model.layers.2.q"]
    assert earliness(names) == [1.0, 1.0, 0.5, 0.0]
    assert earliness(names[:2]) == [1.0, 1.0]


@pytest.mark.parametrize("bias", [-0.5, 0.5, 3.0])
def test_with_a_depth_bias_no_plan_that_fits_is_worth_more_in_weighted_values(bias):
    budget, allocator = Budget(keep=0.6), Lagrange("lagrange", "energy", "same", 1, "break_even", bias)
    for seed in range(6):
        spectra = {f"h.{index}.w": s for index, s in enumerate(random_spectra(seed, SMALL[0]).values())}
        weight = dict(zip(spectra, (1 + bias, 1 + bias / 2, 1), strict=True))

        def weighted(ranks, spectra=spectra, weight=weight):
            return sum(weight[name] * float((spectra[name].sigma_K[:rank] ** 2).sum()) for name, rank in ranks.items())

        plans = every_plan(spectra, "break_even", 1)
        fitting = [plan for plan in plans if cost(plan, spectra, budget) <= limit(spectra, budget)]
        best = max(weighted(other) for other in fitting)
        assert weighted(allocator.plan(spectra, budget).ranks) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("value", "bias"), [("energy", -1.0), ("first_order", 1.0)])
def test_a_depth_bias_that_means_nothing_is_refused(value, bias):
    with pytest.raises(Refused, match="ranks.depth_bias="):
        Lagrange("lagrange", value, "same", 1, "break_even", bias)


def naive_zero_sum(spectra, budget, dense):
    """Removes one last component at a time, looking at all the weights anew before each removal."""
    ranks, total = {name: len(s.sigma_K) for name, s in spectra.items()}, 0.0

    def plan():
        return {name: r if r <= DENSE_RULES[dense](spectra[name].shape) else None for name, r in ranks.items()}

    while cost(plan(), spectra, budget) > limit(spectra, budget):
        slopes = {name: float(spectra[name].slope_K[rank - 1]) for name, rank in ranks.items() if rank > 1}
        cancel = {name: slope for name, slope in slopes.items() if (slope < 0) == (total > 0)}
        name = min(cancel or slopes, key=lambda name: abs(slopes[name]))
        total += slopes[name]
        ranks[name] -= 1
    return plan()


@pytest.mark.parametrize("dense", DENSE_RULES)
@pytest.mark.parametrize("budget", [Budget(err=0.3), Budget(err=0.6), Budget(keep=0.8), Budget(keep=0.5)], ids=str)
def test_first_order_removes_what_a_naive_search_for_the_next_slope_that_cancels_removes(budget, dense):
    for seed in range(3):
        spectra = random_spectra(seed, MODEL)
        plan = Lagrange("lagrange", "first_order", "same", 1, dense, 0.0).plan(spectra, budget)
        assert plan.ranks == naive_zero_sum(spectra, budget, dense)
        assert cost(plan.ranks, spectra, budget) <= limit(spectra, budget)


def test_the_slopes_that_first_order_removes_cancel_to_less_than_the_largest_of_them():
    spectra = random_spectra(2, [(64, 64)] * 12)
    ranks = Lagrange("lagrange", "first_order", "same", 1, "never", 0.0).plan(spectra, Budget(err=0.3)).ranks
    removed = torch.cat([s.slope_K[ranks[name] or 64 :] for name, s in spectra.items()])
    assert len(removed) > 200
    assert abs(float(removed.sum())) <= float(removed.abs().max()) < float(removed.abs().sum()) / 20


def test_first_order_removes_whole_multiples():
    spectra = random_spectra(3, MODEL)
    plan = Lagrange("lagrange", "first_order", "same", 8, "break_even", 0.0).plan(spectra, Budget(keep=0.6))
    assert plan.factored and all(rank % 8 == 0 for rank in plan.factored.values())
    assert 0.55 < plan.keep <= 0.6


def test_only_values_of_gradients_need_a_backward_pass():
    needs = {value: Lagrange("lagrange", value, "same", 1, "half", 0.0).needs for value in (*VALUES, "first_order")}
    assert needs.pop("fisher") == Needs.GRADIENTS
    assert needs.pop("first_order") == Needs.WEIGHT_GRADIENTS
    assert set(needs.values()) == {Needs.NOTHING}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("loss", "same", 1, "half"), "ranks.value=loss is unknown. Write one of energy, .*first_order"),
        (("energy", "white", 1, "half"), "ranks.spectrum=white is unknown. Write one of plain, same"),
        (("energy", "same", 0, "half"), "ranks.multiple=0 is no count"),
        (("energy", "same", 1, "most"), "ranks.dense=most is unknown"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(fields, message):
    with pytest.raises(Refused, match=message):
        Lagrange("lagrange", *fields, 0.0)


@pytest.mark.parametrize("value", ["fisher", "first_order"])
def test_values_that_the_spectra_do_not_hold_are_refused(value):
    spectra = {"w": Spectrum((8, 8), torch.ones(8, dtype=torch.float64))}
    with pytest.raises(Refused, match=f"ranks.value={value} needs .* Write ranks.value=energy"):
        Lagrange("lagrange", value, "same", 1, "half", 0.0).plan(spectra, Budget(keep=0.5))


@pytest.mark.parametrize("value", ["energy", "first_order"])
@pytest.mark.parametrize("budget", [Budget(err=0.99), Budget(keep=0.01)])
def test_a_budget_out_of_reach_is_refused_with_what_can_be_asked_for(budget, value):
    with pytest.raises(
        Refused,
        match=f"{budget} is out of reach: the (largest err|smallest keep) here is [0-9.]+: write that or (less|more)",
    ):
        Lagrange("lagrange", value, "same", 1, "break_even", 0.0).plan(random_spectra(0, MODEL), budget)
