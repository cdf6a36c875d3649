import math

import pytest
import torch
from test_allocate import MODEL, cost, limit, random_spectra

from welore.allocate import VALUES, Lagrange
from welore.budget import DENSE_RULES, Budget
from welore.errors import Refused
from welore.moments import Moments, Needs
from welore.ranks import Evidence, Uniform, Welore
from welore.rules import EffectiveRank, Owl, RelativeEnergy, Sensitivity, StableRank, block_of, outlier_share
from welore.svd import Spectrum

# One decoder layer with grouped queries: k is wide, gate tall, down wide.
LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (12, 32),
    "mlp.gate_proj": (86, 32),
    "mlp.down_proj": (32, 86),
}
BUDGETS = [Budget(err=0.1), Budget(err=0.3), Budget(err=0.6), Budget(keep=0.9), Budget(keep=0.7), Budget(keep=0.45)]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def layers(count):
    return {f"model.layers.{index}.{name}": shape for index in range(count) for name, shape in LAYER.items()}


class Laboratory:
    """Random weights and inputs of which later layers have more outliers, and a loss that a table gives."""

    def __init__(self, shapes, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.weights, self.inputs = {}, {}
        for index, (name, (M, N)) in enumerate(shapes.items()):
            self.weights[name] = self._heavy_tailed(M, N, 1 + index / len(shapes))
            self.inputs[name] = self._heavy_tailed(4 * N, N, 1 + index / len(shapes)).double()
        self.losses, self.asked = {}, []

    def _heavy_tailed(self, rows, columns, power):
        normal = torch.randn(rows, columns, generator=self.generator)
        return normal.sign() * normal.abs() ** power

    def moments(self, name):
        X = self.inputs[name]
        return Moments(len(X), X.T @ X / len(X), X.abs().mean(0))

    def loss(self, ranks):
        self.asked.append(ranks)
        ((name, rank),) = ranks.items()
        key = name, rank
        if key not in self.losses:
            self.losses[key] = 3 + float(torch.rand(1, generator=self.generator)) / rank
        return self.losses[key]

    @property
    def evidence(self):
        return Evidence(self.weights.__getitem__, self.moments, self.loss)

    @property
    def spectra(self):
        spectra = {}
        for name, W in self.weights.items():
            sigma_K = torch.linalg.svdvals(W.double())
            slope_K = sigma_K * torch.randn(len(sigma_K), generator=self.generator, dtype=torch.float64)
            spectra[name] = Spectrum(tuple(W.shape), sigma_K, sigma_K**2, slope_K)
        return spectra


def rules(dense):
    """Every rule that takes a dense rule, and ASVD's search, which has one of its own."""
    return {
        "welore": Welore("welore", "minmax", dense, "plain"),
        "uniform": Uniform("uniform", dense),
        "owl": Owl("owl", 5.0, 0.08, "block", dense),
        "owl per matrix": Owl("owl", 5.0, 0.3, "matrix", dense),
        "stable_rank": StableRank("stable_rank", 1.0, dense),
        "effective_rank": EffectiveRank("effective_rank", 1.0, dense),
        "relative_energy": RelativeEnergy("relative_energy", dense),
        "sensitivity": Sensitivity("sensitivity", [0.2, 0.4, 0.6, 0.8]),
        **{value: Lagrange("lagrange", value, "same", 1, dense, 0.0) for value in (*VALUES, "first_order")},
    }


FILLED = ("owl", "owl per matrix", "stable_rank", "effective_rank")


@every_budget
@pytest.mark.parametrize("rule", rules("break_even"))
def test_under_break_even_no_weight_is_stored_larger_than_dense(rule, budget):
    for seed in range(2):
        laboratory = Laboratory(layers(2), seed)
        spectra = laboratory.spectra
        plan = rules("break_even")[rule].plan(spectra, budget, laboratory.evidence)
        assert plan.ranks.keys() == spectra.keys()
        assert plan.factored or (rule, budget) == ("uniform", Budget(err=0.1))  # which saves nothing anywhere
        for name, rank in plan.factored.items():
            M, N = spectra[name].shape
            assert rank >= 1 and rank * (M + N) < M * N


@every_budget
@pytest.mark.parametrize("dense", ["break_even", "never"])
@pytest.mark.parametrize("rule", FILLED)
def test_shares_add_up_to_the_budget_so_that_not_one_rank_more_fits(rule, dense, budget):
    laboratory = Laboratory(layers(3))
    spectra = laboratory.spectra
    plan = rules(dense)[rule].plan(spectra, budget, laboratory.evidence)
    left = limit(spectra, budget) - cost(plan.ranks, spectra, budget)
    assert left >= 0
    for name, rank in plan.factored.items():
        if rank < DENSE_RULES[dense](spectra[name].shape):
            assert left < budget.price(spectra[name].shape)


@every_budget
def test_one_eps_for_all_weights_comes_within_one_component_of_the_budget(budget):
    spectra = Laboratory(layers(3)).spectra
    plan = RelativeEnergy("relative_energy", "break_even" if budget.err is None else "never").plan(spectra, budget)
    largest = max(budget.price(spectrum.shape) for spectrum in spectra.values())
    assert abs(limit(spectra, budget) - cost(plan.ranks, spectra, budget)) <= largest


def test_every_weight_keeps_the_smallest_rank_whose_lost_energy_is_within_eps():
    spectra = Laboratory(layers(2)).spectra
    plan = RelativeEnergy("relative_energy", "never").plan(spectra, Budget(err=0.4))
    for name, spectrum in spectra.items():
        energies = [value**2 for value in spectrum.sigma_K.tolist()]
        lost = [sum(energies[rank:]) / sum(energies) for rank in range(len(energies) + 1)]
        smallest = next(rank for rank in range(1, len(lost)) if lost[rank] <= plan.threshold)
        assert (plan.ranks[name] or len(energies)) == smallest


def published_owl_ratios(laboratory, multiple, spread, sparsity):
    """Keep ratios per block as in the reference scripts, element by element."""
    outliers = []
    for block in sorted({block_of(name) for name in laboratory.weights}):
        scores = []
        for name, W in laboratory.weights.items():
            if name.startswith(block):
                norms = (laboratory.inputs[name] ** 2).sum(0)
                scores += (W.abs() * norms.sqrt() / math.sqrt(len(laboratory.inputs[name]))).flatten().tolist()
        mean = sum(scores) / len(scores)
        outliers.append(100 * sum(score > multiple * mean for score in scores) / len(scores))
    ratios = [(D - min(outliers)) / (max(outliers) - min(outliers)) * 2 * spread for D in outliers]
    return [ratio - sum(ratios) / len(ratios) + 1 - sparsity for ratio in ratios]


@pytest.mark.parametrize(("spread", "err"), [(0.08, 0.3), (0.08, 0.5), (0.2, 0.5)])
def test_owl_gives_every_block_the_ratio_of_the_reference(spread, err):
    laboratory = Laboratory(layers(4))
    spectra = laboratory.spectra
    plan = Owl("owl", 5.0, spread, "block", "never").plan(spectra, Budget(err=err), laboratory.evidence)
    ratios = published_owl_ratios(laboratory, 5, spread, err)
    assert sum(ratios) / 4 == pytest.approx(1 - err)
    assert max(ratios) - min(ratios) == pytest.approx(2 * spread)
    for name, rank in plan.ranks.items():
        block = int(name.split(".")[2])
        assert abs(rank - ratios[block] * min(spectra[name].shape)) < 1.1  # rounding, and its remainder
    assert plan.err == pytest.approx(err, abs=1 / sum(len(s.sigma_K) for s in spectra.values()))


def test_a_ratio_above_1_is_dense_and_what_it_cannot_take_goes_to_the_other_blocks():
    laboratory = Laboratory(layers(4))
    spectra = laboratory.spectra
    assert max(published_owl_ratios(laboratory, 5, 0.3, 0.05)) > 1
    plan = Owl("owl", 5.0, 0.3, "block", "never").plan(spectra, Budget(err=0.05), laboratory.evidence)
    assert None in plan.ranks.values()
    assert plan.err == pytest.approx(0.05, abs=1 / sum(len(s.sigma_K) for s in spectra.values()))


@every_budget
def test_without_a_difference_in_outliers_owl_is_uniform(budget):
    laboratory = Laboratory({"model.layers.0.q": (32, 48), "model.layers.1.q": (32, 48)})
    laboratory.weights["model.layers.1.q"] = laboratory.weights["model.layers.0.q"]
    laboratory.inputs["model.layers.1.q"] = laboratory.inputs["model.layers.0.q"]
    ranks = Owl("owl", 5.0, 0.4, "block", "never").plan(laboratory.spectra, budget, laboratory.evidence).ranks
    uniform = Uniform("uniform", "never").plan(laboratory.spectra, budget).ranks
    assert all(abs(ranks[name] - uniform[name]) <= 1 for name in ranks)


def test_per_matrix_the_weights_of_a_block_differ_and_per_block_they_do_not():
    laboratory = Laboratory(layers(3))
    square = {name: s for name, s in laboratory.spectra.items() if "q_proj" in name or "gate" in name}
    pairs = [(f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.mlp.gate_proj") for i in range(3)]
    by = {
        per: Owl("owl", 5.0, 0.2, per, "never").plan(square, Budget(err=0.5), laboratory.evidence)
        for per in ("block", "matrix")
    }
    apart = {per: [abs(plan.ranks[q] - plan.ranks[gate]) for q, gate in pairs] for per, plan in by.items()}
    assert max(apart["block"]) <= 1 < max(apart["matrix"])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.11"),
        ("model.decoder.layers.0.fc1", "model.decoder.layers.0"),
        ("transformer.h.3.attn.c_attn", "transformer.h.3"),
        ("alone", "alone"),
    ],
)
def test_a_block_is_the_decoder_layer_in_a_name(name, block):
    assert block_of(name) == block


def test_outliers_are_counted_over_all_the_weights_of_a_block_together():
    small, large = torch.full((2, 5), 1.0), torch.full((2, 5), 9.0)
    assert outlier_share([small], 1.5) == outlier_share([large], 1.5) == 0
    assert outlier_share([small, large], 1.5) == 0.5


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("kind", [StableRank, EffectiveRank])
def test_ranks_are_in_proportion_to_the_measure(kind, power):
    spectra = random_spectra(0, MODEL)
    rule = kind("measured", power, "never")
    plan = rule.plan(spectra, Budget(err=0.8))
    measures = {name: rule.measure(spectra[name].sigma_K) ** power for name in spectra}
    at_least = [(rank - 1) / measures[name] for name, rank in plan.factored.items() if rank > 1]
    below = [(rank + 1) / measures[name] for name, rank in plan.factored.items()]
    assert max(at_least) < min(below)  # so one scale gives them all, but for rounding and its remainder
    assert max(plan.factored.values()) > 2 * min(plan.factored.values())


def test_a_spectrum_of_r_equal_values_has_stable_and_effective_rank_r():
    sigma_K = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    assert StableRank("stable_rank", 1.0, "half").measure(sigma_K) == pytest.approx(3)
    assert EffectiveRank("effective_rank", 1.0, "half").measure(sigma_K) == pytest.approx(3)
    assert StableRank("stable_rank", 1.0, "half").measure(torch.zeros(5)) == 1
    assert EffectiveRank("effective_rank", 1.0, "half").measure(torch.zeros(5)) == pytest.approx(1)


def test_the_measures_of_an_uneven_spectrum_are_those_of_their_definitions():
    sigma_K = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert StableRank("stable_rank", 1.0, "half").measure(sigma_K) == pytest.approx(22 / 16)
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert EffectiveRank("effective_rank", 1.0, "half").measure(sigma_K) == pytest.approx(math.exp(entropy))


SHARES = [0.2, 0.4, 0.6, 0.8]


def cut_below(laboratory, spectra, harm):
    """Every weight at the smallest of its shares whose loss is at most `harm`, else dense."""
    ranks = {}
    for name, spectrum in spectra.items():
        M, N = spectrum.shape
        tried = [int(share * M * N) // (M + N) for share in SHARES]
        ranks[name] = min((rank for rank in tried if laboratory.losses[name, rank] <= harm), default=None)
    return ranks


@every_budget
@pytest.mark.parametrize("seed", range(3))
def test_the_search_makes_the_least_harmful_cuts_that_meet_the_budget_and_not_one_more(seed, budget):
    laboratory = Laboratory(layers(3), seed)
    spectra = laboratory.spectra
    plan = Sensitivity("sensitivity", SHARES).plan(spectra, budget, laboratory.evidence)
    levels = [-math.inf, *sorted(laboratory.losses.values())]
    meets = [
        cost(cut_below(laboratory, spectra, level), spectra, budget) <= limit(spectra, budget) for level in levels
    ]
    first = meets.index(True)
    assert first > 0
    assert plan.ranks == cut_below(laboratory, spectra, levels[first])


def test_the_search_asks_for_every_weight_and_share_once_and_alone():
    laboratory = Laboratory(layers(1))
    spectra = laboratory.spectra
    Sensitivity("sensitivity", SHARES).plan(spectra, Budget(keep=0.7), laboratory.evidence)
    asked = [next(iter(ranks.items())) for ranks in laboratory.asked]
    assert all(len(ranks) == 1 for ranks in laboratory.asked)
    expected = {(n, int(p * s.shape[0] * s.shape[1]) // sum(s.shape)) for n, s in spectra.items() for p in SHARES}
    assert len(asked) == len(expected) and set(asked) == expected


def test_a_cut_that_breaks_the_model_is_made_last():
    laboratory = Laboratory(layers(1))
    spectra = laboratory.spectra
    broken = "model.layers.0.mlp.down_proj"
    losses = {(broken, rank): math.nan for rank in range(1, 32)}
    evidence = Evidence(
        laboratory.weights.get, laboratory.moments, lambda r: losses.get(*r.items(), laboratory.loss(r))
    )
    plan = Sensitivity("sensitivity", SHARES).plan(spectra, Budget(keep=0.6), evidence)
    assert plan.ranks[broken] is None


def test_what_a_rule_needs_of_calibration_is_what_it_says():
    needs = {name: rule.needs for name, rule in rules("half").items() if name not in (*VALUES, "first_order")}
    assert {name for name, level in needs.items() if level == Needs.INPUTS} == {"owl", "owl per matrix", "sensitivity"}
    assert set(needs.values()) == {Needs.NOTHING, Needs.INPUTS}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Owl("owl", 0.0, 0.08, "block", "half"), "ranks.outlier=0.0 is no multiple"),
        (lambda: Owl("owl", 5.0, -0.1, "block", "half"), r"ranks.spread=-0.1 is not in \[0, 1\]"),
        (lambda: Owl("owl", 5.0, 0.08, "layer", "half"), "ranks.per=layer is unknown. Write one of block, matrix"),
        (lambda: Owl("owl", 5.0, 0.08, "block", "most"), "ranks.dense=most is unknown"),
        (lambda: StableRank("stable_rank", -1.0, "half"), "ranks.power=-1.0 is not in"),
        (lambda: EffectiveRank("effective_rank", 1.0, "most"), "ranks.dense=most is unknown"),
        (lambda: RelativeEnergy("relative_energy", "most"), "ranks.dense=most is unknown"),
        (lambda: Sensitivity("sensitivity", []), r"ranks.shares=\[\] are not shares"),
        (lambda: Sensitivity("sensitivity", [0.5, 1.0]), r"ranks.shares=\[0.5, 1.0\] are not shares"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(Refused, match=message):
        make()


@pytest.mark.parametrize("rule", ["owl", "sensitivity"])
def test_a_rule_that_needs_the_model_is_refused_without_it(rule):
    with pytest.raises(Refused, match=f"ranks={rule} needs the model"):
        rules("half")[rule].plan(Laboratory(layers(1)).spectra, Budget(keep=0.7))


@pytest.mark.parametrize("rule", [*FILLED, "sensitivity", "relative_energy"])
@pytest.mark.parametrize("budget", [Budget(err=0.99), Budget(keep=0.01)], ids=str)
def test_a_budget_that_leaves_a_weight_without_rank_is_refused(budget, rule):
    laboratory = Laboratory(layers(2))
    with pytest.raises(
        Refused, match=f"{budget} is out of reach: .*{'err' if budget.keep is None else 'keep'}( here is |=)0.[0-9]+"
    ):
        rules("break_even")[rule].plan(laboratory.spectra, budget, laboratory.evidence)
