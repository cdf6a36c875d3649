from copy import deepcopy
from dataclasses import replace as changed

import pytest
import torch
from conftest import FAMILIES

from welore.allocate import Lagrange
from welore.cache import Cache
from welore.calibrate import Statistics, calibrate
from welore.compress import Coordinates, evidence, factorize, predict, read_spectra, resolve, weight_digests
from welore.errors import Refused
from welore.evaluate import causal_loss, perplexity
from welore.models import components, count_bytes, count_parameters, flops_per_token
from welore.modes import Lrc, select
from welore.moments import Needs
from welore.ranks import Budget, Welore, tally
from welore.svd import Kfac, Plain, Whitened, predicted_nats

WINDOWS_BL = (torch.arange(96).view(4, 24) * 7 + 3) % 67


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_compressed_scored_and_stepped(family, compress, name):
    model = family(name)
    dense = count_parameters(model)
    plan = compress(model, Budget(err=0.35), "break_even")
    assert plan.factored and count_parameters(model) < dense
    before = perplexity(model, WINDOWS_BL)
    assert before.breaks_at is None and 1 < before.perplexity < float("inf")

    mode = Lrc("welore", 1e-3, (0.9, 0.999), 1e-8, 0.0, norms=True)
    optimizer = mode.optimizer(select(model, mode))
    total, scored = causal_loss(model)(WINDOWS_BL, WINDOWS_BL)
    (total / scored).backward()
    optimizer.step()
    assert perplexity(model, WINDOWS_BL).perplexity < before.perplexity


def plain(model, cache):
    return Coordinates(Plain("plain", "none"), weight_digests(model), cache)


def test_weights_are_decomposed_once_and_then_read_from_the_cache(model, tmp_path, monkeypatch):
    coordinates = plain(model, Cache(tmp_path))
    first = read_spectra(model, coordinates)
    monkeypatch.setattr("welore.compress.decompose", lambda *_: pytest.fail("decomposed again"))
    second = read_spectra(model, coordinates)
    assert first.keys() == second.keys() == components(model).keys()
    for name, spectrum in first.items():
        assert torch.equal(spectrum.sigma_K, second[name].sigma_K) and spectrum.shape == second[name].shape
    factorize(model, tally({name: 3 for name in first}, first), coordinates)


def test_of_a_large_weight_the_values_come_without_the_vectors_until_it_is_cut(model, tmp_path, monkeypatch):
    coordinates = plain(model, Cache(tmp_path))
    name, module = next(iter(components(model).items()))
    expected_K = coordinates.spectrum(name, module).sigma_K
    monkeypatch.setattr("welore.compress.VALUES_FIRST", 16)
    apart = plain(model, Cache(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr("welore.compress.decompose", lambda *_: pytest.fail("decomposed"))
        torch.testing.assert_close(apart.spectrum(name, module).sigma_K, expected_K)
    assert all(map(torch.equal, apart.factors(name, module, 5), coordinates.factors(name, module, 5)))


def test_a_decomposition_that_failed_is_noted_also_where_it_is_read_from_the_cache(model, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("did not converge")

    name, module = next(iter(components(model).items()))
    expected_K = plain(model, Cache(tmp_path / "usual")).spectrum(name, module).sigma_K
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        first = plain(model, Cache(tmp_path))
        torch.testing.assert_close(first.spectrum(name, module).sigma_K, expected_K)
    second = plain(model, Cache(tmp_path))
    second.factors(name, module, 3)
    assert first.notes == second.notes == {name: "eigh failed (did not converge): svd of the Gram matrix"}


def test_a_weight_that_changes_has_another_digest_and_is_decomposed_again(model, cache):
    before = plain(model, cache)
    spectra = read_spectra(model, before)
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight.data.mul_(2)
    after = plain(model, cache)
    assert {n for n in before.weights if before.weights[n] != after.weights[n]} == {f"{name}.weight"}
    torch.testing.assert_close(read_spectra(model, after)[name].sigma_K, 2 * spectra[name].sigma_K)


def test_factors_from_the_cache_are_those_made_anew(pristine, tmp_path):
    models, cache = [deepcopy(pristine[0]) for _ in range(2)], Cache(tmp_path)
    for model in models:
        spectra = read_spectra(model, plain(model, cache))
        plan = Welore("welore", "minmax", "half", "plain").plan(spectra, Budget(err=0.3))
        factorize(model, plan, plain(model, cache))
    assert weight_digests(models[0]) == weight_digests(models[1]) != weight_digests(pristine[0])


@pytest.fixture
def calibrated(model, cache, tmp_path):
    """A function of an svd option to the coordinates of the tiny model, with statistics of every kind, undamped."""
    calibrate(model, WINDOWS_BL, Needs.WEIGHT_GRADIENTS, tmp_path)
    statistics = Statistics(tmp_path, Needs.WEIGHT_GRADIENTS, f"compress {tmp_path}", 0.0, 0.0)
    return lambda svd: Coordinates(svd, weight_digests(model), cache, statistics)


@pytest.mark.parametrize("svd", [Plain("plain", "none"), Kfac("kfac", "none")], ids=["plain", "kfac"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_the_slope_of_a_component_is_how_the_loss_changes_while_it_goes(model, calibrated, svd, name):
    """Central differences of the loss of the whole model per token, while 2 % of the component come and go."""
    chosen, module = calibrated(svd), components(model)[name]
    slope_K, (A_MK, B_KN) = chosen.valued(name, module).slope_K, chosen.factors(name, module, 16)
    model.double()
    W_MN, scale = module.weight.data.clone(), float(slope_K.abs().max())
    assert scale > 0
    for k in (0, 1, 7):
        losses = []
        for share in (0.02, -0.02):
            module.weight.data = W_MN - share * torch.outer(A_MK[:, k], B_KN[k]).double()
            logits_TV = model(WINDOWS_BL).logits[:, :-1].flatten(0, 1)
            total = torch.nn.functional.cross_entropy(logits_TV, WINDOWS_BL[:, 1:].flatten(), reduction="sum")
            losses.append(float(total) / WINDOWS_BL.numel())
        assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(slope_K[k]), rel=1e-2, abs=1e-3 * scale)


def test_the_predicted_damage_of_a_plan_is_half_what_kfac_drops_and_is_least_in_its_own_coordinates(model, calibrated):
    spectra = read_spectra(model, calibrated(Kfac("kfac", "none")))
    plan = tally({name: len(spectrum.sigma_K) // 2 for name, spectrum in spectra.items()}, spectra)
    dropped = sum(float(s.sigma_K[plan.ranks[name] :].square().sum()) / 2 for name, s in spectra.items())
    options = (Kfac("kfac", "none"), Whitened("whitened", "none"), Plain("plain", "none"))
    damage = [predict(model, plan, calibrated(svd)) for svd in options]
    assert damage[0] == pytest.approx(dropped) and damage[0] < min(damage[1:])
    by_the_change = sum(
        predicted_nats(module.weight - A_MR @ B_RN, calibrated(options[0]).statistics.of(name))
        for name, module in components(model).items()
        for A_MR, B_RN in [calibrated(options[0]).factors(name, module, plan.ranks[name])]
    )
    assert damage[0] == pytest.approx(by_the_change, rel=1e-4)
    inputs_alone = changed(calibrated(options[1]).statistics, needs=Needs.INPUTS)
    assert predict(model, plan, changed(calibrated(options[1]), statistics=inputs_alone)) is None


def test_a_plan_cuts_the_weights_that_it_names_and_no_other(model, compress):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = compress(model)
    for name, rank in plan.ranks.items():
        module = components(model)[name]
        if rank is None:
            assert torch.equal(module.weight, before[f"{name}.weight"])
        else:
            U, sigma, Vh = torch.linalg.svd(before[f"{name}.weight"].double(), full_matrices=False)
            expected = (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
            assert module.rank == rank
            torch.testing.assert_close(module.merged().weight.double(), expected, rtol=0, atol=1e-5)


def test_a_weight_with_nan_is_refused_by_its_name(model, cache):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(Refused, match=r"model\.layers\.1\.mlp\.up_proj: 1 of its"):
        read_spectra(model, plain(model, cache))


SIZES = {"bytes": count_bytes, "flops": flops_per_token}


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
@pytest.mark.parametrize("measure", SIZES)
@pytest.mark.parametrize("name", ["llama", "opt", "gemma"])
def test_a_budget_of_bytes_or_flops_is_met_to_within_one_rank_and_never_exceeded(family, cache, name, measure, share):
    """Embeddings, biases and a tied output are counted and never cut."""
    model = family(name).bfloat16()
    whole, unit = SIZES[measure](model), 2  # bytes of a bfloat16 number, FLOPs of one that is stored
    budget = resolve(Budget(**{measure: share}), model)
    spectra = read_spectra(model, plain(model, cache))
    plan = Lagrange("lagrange", "energy", "same", 1, "never", 0.0).plan(spectra, budget)
    factorize(model, plan, plain(model, cache))
    largest = max(sum(spectrum.shape) for spectrum in spectra.values())
    assert plan.factored and 0 <= share * whole - SIZES[measure](model) < unit * largest


def test_other_budgets_are_left_alone_and_a_share_below_what_is_never_compressed_is_refused(model):
    for budget in (Budget(err=0.3), Budget(keep=0.8)):
        assert resolve(budget, model) is budget
    assert resolve(Budget(bytes=1.0), model).keep == pytest.approx(1)
    fixed = count_bytes(model) - 4 * sum(m.weight.numel() for m in components(model).values())
    with pytest.raises(Refused, match=f"a share of {fixed / count_bytes(model):.3f} is never compressed"):
        resolve(Budget(bytes=0.1), model)


def test_of_a_model_that_is_factored_already_bytes_are_a_share_of_those_that_it_had_dense(model, compress):
    dense = resolve(Budget(bytes=0.8), model)
    compress(model, dense="break_even")
    assert resolve(Budget(bytes=0.8), model).keep == pytest.approx(dense.keep)


def test_the_same_tokens_in_other_windows_have_losses_of_trial_cuts_of_their_own(model, cache):
    coordinates = Coordinates(Plain("plain", "none"), weight_digests(model), cache)
    ids_T = torch.randint(0, 200, (512,), generator=torch.Generator().manual_seed(0))
    cut = {next(iter(components(model))): 4}
    short, long = (evidence(model, coordinates, ids_T.view(-1, length), None).loss for length in (64, 128))
    assert short(cut) != long(cut)
    assert short(cut) == short(cut)
