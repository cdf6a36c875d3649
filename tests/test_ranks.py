import json
import re

import pytest
import torch

from welore.compress import Coordinates, read_spectra, weight_digests
from welore.errors import Refused
from welore.moments import Needs
from welore.ranks import DENSE_RULES, NORMALIZATIONS, Budget, Given, Uniform, Welore, apply_threshold, tally
from welore.svd import Plain, Spectrum

every_dense = pytest.mark.parametrize("dense", DENSE_RULES)
every_normalization = pytest.mark.parametrize("normalize", NORMALIZATIONS)
SHAPES = [(16, 16), (8, 16), (16, 44), (44, 16), (15, 20), (9, 9)]


def random_spectra(seed, shapes=SHAPES):
    """Descending positive values, from nearly flat to steep."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for index, shape in enumerate(shapes):
        values = torch.rand(min(shape), generator=generator, dtype=torch.float64) ** (1 + index)
        spectra[f"w{index}"] = Spectrum(shape, values.sort(descending=True).values)
    return spectra


def authors_plan(spectra, k, min_ratio):
    """Ranks and ERR as in the authors' scripts (recipes: min_ratio 0 for compression, .4999 for fine-tuning)."""
    ranks, removed, total = {}, 0, 0
    for name, spectrum in spectra.items():
        values = spectrum.sigma_K.tolist()
        low, high = min(values), max(values)
        pruned = sum((value - low) / (high - low) < k for value in values)
        replaced = pruned / len(values) > min_ratio
        ranks[name] = len(values) - pruned if replaced else None
        removed += pruned if replaced else 0
        total += len(values)
    return ranks, removed / total


def thresholds(spectra, normalize):
    """One threshold between every two distinct values of the pool, and one below all; none removes a whole weight."""
    pool = torch.cat([NORMALIZATIONS[normalize](s.sigma_K) for s in spectra.values()]).unique()
    return [0.0] + ((pool[1:] + pool[:-1]) / 2).tolist()


@every_normalization
@pytest.mark.parametrize("err", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_where_every_weight_is_cut_the_solved_threshold_reaches_err_within_one_rank(err, normalize):
    spectra = random_spectra(0)
    plan = Welore("welore", normalize, "never", "plain").plan(spectra, Budget(err=err))
    total = sum(len(s.sigma_K) for s in spectra.values())
    assert abs(plan.err - err) * total <= 1


@every_dense
@every_normalization
@pytest.mark.parametrize("kind", ["err", "keep"])
@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_comes_closer_to_the_budget_than_the_solved_one(seed, kind, normalize, dense):
    spectra = random_spectra(seed)
    every_plan = [apply_threshold(spectra, k, normalize, dense) for k in thresholds(spectra, normalize)]
    reach = sorted(getattr(plan, kind) for plan in every_plan)
    asked_within_reach = [asked for asked in [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95] if reach[0] <= asked <= reach[-1]]
    assert len(asked_within_reach) >= 3
    for asked in asked_within_reach:
        nearest = min(abs(value - asked) for value in reach)
        ranks, budget = Welore("welore", normalize, dense, "plain"), Budget(**{kind: asked})
        if nearest > 0.1:  # inside a jump of the dense rule
            with pytest.raises(Refused, match="out of reach"):
                ranks.plan(spectra, budget)
        else:
            assert abs(getattr(ranks.plan(spectra, budget), kind) - asked) == pytest.approx(nearest, abs=1e-12)


@every_dense
@pytest.mark.parametrize("budget", [Budget(err=0.99), Budget(keep=0.01)])
def test_a_budget_that_would_leave_a_weight_without_rank_is_refused_with_the_most_that_can_be_removed(budget, dense):
    spectra = random_spectra(0)
    most = apply_threshold(spectra, 1.0, "minmax", dense)
    assert set(most.ranks.values()) == {1}
    limit = f"err={most.err:.3f}" if budget.keep is None else f"keep={most.keep:.3f}"
    with pytest.raises(Refused, match=limit):
        Welore("welore", "minmax", dense, "plain").plan(spectra, budget)


@pytest.mark.parametrize("k", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_dense_never_is_the_plan_of_the_authors_compression_script(seed, k):
    spectra = random_spectra(seed)
    ranks, err = authors_plan(spectra, k, min_ratio=0.0)
    plan = apply_threshold(spectra, k, "minmax", "never")
    assert plan.ranks == ranks
    assert plan.err == plan.err_attempted == pytest.approx(err)


@pytest.mark.parametrize("k", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_dense_half_is_the_plan_of_the_authors_fine_tuning_scripts(seed, k):
    """With spectra of odd length no weight is at exactly half of its rank, where the two differ (below)."""
    spectra = random_spectra(seed, [(15, 20), (21, 13), (9, 9), (31, 11), (17, 17)])
    ranks, err = authors_plan(spectra, k, min_ratio=0.4999)
    plan = apply_threshold(spectra, k, "minmax", "half")
    assert plan.ranks == ranks
    assert plan.err == pytest.approx(err)
    assert plan.err_attempted == pytest.approx(authors_plan(spectra, k, min_ratio=0.0)[1])


def test_a_weight_at_exactly_half_of_its_rank_stays_dense_here_and_is_factored_by_the_authors_scripts():
    """The paper's LRC has r < rank / 2; the scripts ask for a pruned share above .4999, which one half is."""
    spectra = {"w": Spectrum((4, 6), torch.tensor([4.0, 3.0, 1.0, 0.0], dtype=torch.float64))}
    assert authors_plan(spectra, 0.5, min_ratio=0.4999) == ({"w": 2}, 0.5)
    plan = apply_threshold(spectra, 0.5, "minmax", "half")
    assert (plan.ranks, plan.err, plan.err_attempted) == ({"w": None}, 0.0, 0.5)


def test_values_that_tie_are_removed_together():
    spectra = {
        "a": Spectrum((4, 4), torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)),
        "b": Spectrum((4, 4), torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)),
    }
    ranks = Welore("welore", "minmax", "never", "plain")
    assert ranks.plan(spectra, Budget(err=0.25)).ranks == {"a": 3, "b": 3}
    assert ranks.plan(spectra, Budget(err=0.7)).ranks == {"a": 1, "b": 1}


@every_normalization
def test_a_constant_spectrum_keeps_all_its_ranks(normalize):
    flat = Spectrum((6, 6), torch.full((6,), 0.3, dtype=torch.float64))
    spectra = random_spectra(1) | {"flat": flat}
    assert Welore("welore", normalize, "never", "plain").plan(spectra, Budget(err=0.5)).ranks["flat"] is None


@every_normalization
@pytest.mark.parametrize("k", [0.05, 0.2, 0.4, 0.6, 0.8])
def test_break_even_never_stores_more_than_the_dense_weight(k, normalize):
    spectra = random_spectra(2)
    plan = apply_threshold(spectra, k, normalize, "break_even")
    for name, rank in plan.ranks.items():
        M, N = spectra[name].shape
        kept = int((NORMALIZATIONS[normalize](spectra[name].sigma_K) >= k).sum())
        assert (rank is not None) == (kept * (M + N) < M * N)
    assert plan.keep <= 1


def test_a_plan_counts_what_it_stores():
    spectra = random_spectra(0, [(10, 20), (10, 10)])
    plan = tally({"w0": 3, "w1": None}, spectra)
    assert plan.err == pytest.approx(7 / 20)
    assert plan.keep == pytest.approx((3 * 30 + 100) / 300)


@every_dense
@every_normalization
def test_err_never_falls_as_the_threshold_rises(normalize, dense):
    spectra = random_spectra(3)
    plans = [apply_threshold(spectra, k, normalize, dense) for k in thresholds(spectra, normalize)]
    for sequence in ([p.err for p in plans], [p.err_attempted for p in plans]):
        assert sequence == sorted(sequence) and sequence[0] < sequence[-1]


@every_dense
@pytest.mark.parametrize("multiple", [2, 8, 64])
def test_aligned_ranks_are_the_nearest_multiples_that_are_factored_still(dense, multiple):
    spectra = random_spectra(4, [(48, 48), (48, 132), (132, 48), (10, 6)])
    for budget in (Budget(err=0.3), Budget(err=0.6)):
        free = Welore("welore", "minmax", dense, "plain").plan(spectra, budget)
        plan = Welore("welore", "minmax", dense, "plain", multiple=multiple).plan(spectra, budget)
        assert plan.factored.keys() == free.factored.keys() and plan.threshold == free.threshold
        for name, rank in free.factored.items():
            allowed = [r for r in range(multiple, DENSE_RULES[dense](spectra[name].shape) + 1, multiple)] or [rank]
            assert abs(plan.ranks[name] - rank) == min(abs(r - rank) for r in allowed) and plan.ranks[name] in allowed
        assert plan.err == tally(plan.ranks, spectra).err and plan.err_attempted == free.err_attempted


def test_uniform_ranks_are_aligned_too():
    spectra = random_spectra(0, [(16, 16), (64, 32)])
    assert Uniform("uniform", "never", multiple=8).plan(spectra, Budget(err=0.3)).ranks == {"w0": 8, "w1": 24}


def test_a_multiple_below_one_is_refused():
    for rule in (
        lambda: Uniform("uniform", "never", multiple=0),
        lambda: Welore("w", "max", "half", "plain", multiple=0),
    ):
        with pytest.raises(Refused, match="ranks.multiple=0 is no count of ranks. Write 1"):
            rule()


@pytest.mark.parametrize("err", [0.0, 0.1, 0.33, 0.5, 0.95])
def test_uniform_removes_the_same_share_of_ranks_everywhere(err):
    spectra = random_spectra(0)
    plan = Uniform("uniform", "never").plan(spectra, Budget(err=err))
    for name, spectrum in spectra.items():
        d = min(spectrum.shape)
        assert (d if plan.ranks[name] is None else plan.ranks[name]) == d - int(err * d)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.66])
def test_uniform_keeps_the_same_share_of_parameters_everywhere(keep):
    spectra = random_spectra(0, [(16, 16), (16, 44), (44, 16), (64, 32)])
    plan = Uniform("uniform", "never").plan(spectra, Budget(keep=keep))
    for name, spectrum in spectra.items():
        m, n = spectrum.shape
        assert plan.ranks[name] == int(keep * m * n / (m + n))
    assert keep - 0.1 < plan.keep <= keep


@pytest.mark.parametrize("shape", [(16, 16), (9, 14), (23, 7), (64, 48)])
def test_uniform_refuses_a_keep_that_leaves_a_rank_of_0_and_the_one_it_names_instead_works(shape):
    spectra, uniform = random_spectra(0, [shape]), Uniform("uniform", "never")
    with pytest.raises(Refused, match=rf"w0 \({shape[0]} x {shape[1]}\) with rank 0") as refused:
        uniform.plan(spectra, Budget(keep=0.02))
    least = float(re.search(r"smallest keep for this weight is ([0-9.]+):", str(refused.value))[1])
    assert uniform.plan(spectra, Budget(keep=least)).ranks == {"w0": 1}
    with pytest.raises(Refused):
        uniform.plan(spectra, Budget(keep=least - 2e-4))


def test_an_unknown_option_is_refused_with_those_that_exist():
    with pytest.raises(Refused, match="half, break_even, never"):
        Welore("welore", "minmax", "quarter", "plain")
    with pytest.raises(Refused, match="minmax, max"):
        Welore("welore", "mean", "half", "plain")
    with pytest.raises(Refused, match="plain, same"):
        Welore("welore", "max", "half", "whitened")


def test_the_threshold_is_of_the_plain_spectrum_unless_asked_otherwise_and_needs_no_data():
    for spectrum in ("plain", "same"):
        ranks = Welore("welore", "max", "half", spectrum)
        assert (ranks.coordinates, ranks.needs) == (spectrum, Needs.NOTHING)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(err=0.3), "err=0.3"),
        (Budget(keep=0.8), "keep=0.8"),
        (Budget(bytes=0.5), "bytes=0.5"),
        (Budget(flops=0.7), "flops=0.7"),
    ],
)
def test_a_budget_is_written_as_it_was_asked_for(budget, text):
    assert str(budget) == text


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.9])
def test_a_limit_that_is_a_whole_number_is_not_lost_to_rounding(share):
    spectra = random_spectra(0, [(100, 100), (200, 300)])
    assert Budget(keep=share).limit(spectra) == round(share * 70_000)
    assert Budget(err=share).limit(spectra) == round((1 - share) * 300)


def test_a_plan_written_as_ranks_json_is_read_back_as_it_was(tmp_path):
    spectra = random_spectra(0)
    plan = Welore("welore", "minmax", "half", "plain").plan(spectra, Budget(err=0.5))
    assert None in plan.ranks.values() and plan.factored
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(plan.ranks))
    given = Given("given", str(file)).plan(spectra)
    assert (given.ranks, given.err, given.keep) == (plan.ranks, plan.err, plan.keep)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"w0": 3}, "lacks 1 .*w1"),
        ({"w0": 3, "w1": 2, "other": 1}, "does not have .*other"),
        ({"w0": 0, "w1": 2}, "the rank 0; write 1 to 10"),
        ({"w0": 11, "w1": 2}, "the rank 11; write 1 to 10"),
        ({"w0": 2.5, "w1": 2}, "the rank 2.5"),
        ([3, 2], "holds a list"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(tmp_path, ranks, message):
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(ranks))
    with pytest.raises(Refused, match=message):
        Given("given", str(file)).plan(random_spectra(0, [(10, 20), (10, 10)]))


@pytest.mark.real
@pytest.mark.parametrize(
    ("k", "attempted", "effective"),
    [(0.15, 0.316, 0.098), (0.20, 0.424, 0.244), (0.25, 0.524, 0.402), (0.30, 0.613, 0.525), (0.40, 0.754, 0.688)],
)
def test_the_default_model_has_the_err_that_an_independent_pilot_measured(default_spectra, k, attempted, effective):
    plan = apply_threshold(default_spectra, k, "minmax", "half")
    assert plan.err_attempted == pytest.approx(attempted, abs=0.01)
    assert plan.err == pytest.approx(effective, abs=0.01)


@pytest.fixture(scope="module")
def default_spectra(default_model):
    model, _, cache = default_model
    return read_spectra(model, Coordinates(Plain("plain", "none"), weight_digests(model), cache))
