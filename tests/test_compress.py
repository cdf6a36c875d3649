from copy import deepcopy

import pytest
import torch
from conftest import FAMILIES

from welore.cache import Cache
from welore.compress import factorize, read_spectra, weight_digests
from welore.errors import Refused
from welore.evaluate import causal_loss, perplexity
from welore.models import components, count_parameters
from welore.modes import Lrc, select
from welore.ranks import Budget, Welore

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


def test_spectra_are_read_from_the_cache_where_a_weight_was_decomposed_before(model, cache, monkeypatch):
    weights = weight_digests(model)
    first = read_spectra(model, weights, cache)
    monkeypatch.setattr("welore.compress.singular_values", lambda W: pytest.fail("decomposed again"))
    second = read_spectra(model, weights, cache)
    assert first.keys() == second.keys() == components(model).keys()
    assert all(torch.equal(first[name].sigma_K, second[name].sigma_K) for name in first)


def test_a_weight_that_changes_has_another_digest_and_is_decomposed_again(model, cache):
    before = weight_digests(model)
    spectra = read_spectra(model, before, cache)
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight.data.mul_(2)
    after = weight_digests(model)
    assert {n for n in before if before[n] != after[n]} == {f"{name}.weight"}
    torch.testing.assert_close(read_spectra(model, after, cache)[name].sigma_K, 2 * spectra[name].sigma_K)


def test_factors_from_the_cache_are_those_made_anew(pristine, cache, tmp_path):
    models = [deepcopy(pristine[0]) for _ in range(2)]
    empty = Cache(tmp_path)
    for model, folder in zip(models, [empty, empty], strict=True):
        weights = weight_digests(model)
        plan = Welore("welore", "minmax", "half").plan(read_spectra(model, weights, folder), Budget(err=0.3))
        factorize(model, plan, weights, folder)
    assert weight_digests(models[0]) == weight_digests(models[1])


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
        read_spectra(model, weight_digests(model), cache)
