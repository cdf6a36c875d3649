import math
from copy import deepcopy

import pytest
import torch

from welore.cache import Cache
from welore.calibrate import Statistics, Stream, calibrate
from welore.compress import Coordinates, read_spectra, weight_digests
from welore.errors import Refused
from welore.evaluate import perplexity
from welore.lowrank import LowRankLinear, factored_ranks
from welore.moments import Needs
from welore.ranks import Budget
from welore.refine import Blockwise, Refine
from welore.sequence import factorize_in_sequence
from welore.svd import Kfac

WINDOWS_BL = (torch.arange(384).view(16, 24) * 7 + 3) % 67


@pytest.fixture
def coordinates(trained, cache, tmp_path):
    calibrate(trained, WINDOWS_BL, Needs.GRADIENTS, tmp_path)
    statistics = Statistics(tmp_path, Needs.GRADIENTS, "test", 1e-3, 0.2)
    return Coordinates(Kfac("kfac", "none"), weight_digests(trained), cache, statistics)


@pytest.fixture
def trained(family):
    """A two-layer model that has learned the calibration text: only then does its loss feel what is cut."""
    torch.manual_seed(0)
    model = family("llama").train()
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=WINDOWS_BL, labels=WINDOWS_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def cut(model, coordinates, configured, refine, folder, keep=0.4):
    rule = configured("ranks=lagrange").ranks
    plan = rule.plan(read_spectra(model, coordinates), Budget(keep=keep))
    return factorize_in_sequence(model, plan, coordinates, WINDOWS_BL, None, refine, Cache(folder))


def test_a_refined_layer_is_closer_to_the_dense_one_and_the_model_loses_less(
    trained, coordinates, configured, tmp_path
):
    dense = perplexity(trained, WINDOWS_BL).perplexity
    plain, refined = deepcopy(trained), deepcopy(trained)
    assert cut(plain, coordinates, configured, Refine("none"), tmp_path / "plain") == []
    layers = cut(refined, coordinates, configured, Blockwise("block", 8, 3e-3), tmp_path / "refined")
    assert len(layers) == 2 and all(after < before for before, after in layers)
    assert factored_ranks(plain) == factored_ranks(refined)
    losses = [math.log(perplexity(model, WINDOWS_BL).perplexity / dense) for model in (plain, refined)]
    assert 0 < losses[1] < 0.8 * losses[0]


def test_refinement_moves_the_factors_and_nothing_else(trained, coordinates, configured, tmp_path):
    before = weight_digests(trained)
    cut(trained, coordinates, configured, Blockwise("block", 1, 1e-3), tmp_path / "trained")
    after = weight_digests(trained)
    assert {n for n in before.keys() & after.keys() if before[n] != after[n]} == set()
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert any(isinstance(module, LowRankLinear) for module in trained.modules())


def test_the_loss_of_a_layer_is_half_the_squared_difference_in_the_metric(trained):
    stream, refine = Stream(trained, WINDOWS_BL, None), Blockwise("block", 1, 1e-3)
    own_BLD = stream.first()[0]
    out_BLD = stream.through(0, own_BLD)
    off_BLD = torch.randn_like(out_BLD)
    root_DD = torch.randn(32, 32)
    loss = refine._loss(stream, 0, own_BLD, out_BLD - off_BLD, root_DD @ root_DD.T)
    expected = 0.5 * (off_BLD @ root_DD).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_refinement_that_makes_a_layer_worse_is_taken_back(trained, coordinates, configured, tmp_path):
    untouched, ruined = deepcopy(trained), deepcopy(trained)
    cut(untouched, coordinates, configured, Refine("none"), tmp_path / "untouched")
    layers = cut(ruined, coordinates, configured, Blockwise("block", 1, 10.0), tmp_path / "ruined")
    assert all(before == after for before, after in layers)
    assert weight_digests(untouched) == weight_digests(ruined)


def test_a_run_that_was_killed_fits_no_layer_twice_and_ends_the_same(trained, coordinates, configured, tmp_path):
    class Killed(Blockwise):
        def fit(self, stream, number, *others):
            if number == 1:
                raise KeyboardInterrupt
            return super().fit(stream, number, *others)

    class Counted(Blockwise):
        def fit(self, stream, number, *others):
            fitted.append(number)
            return super().fit(stream, number, *others)

    fitted, options = [], ("block", 2, 3e-3)
    undisturbed, killed, resumed = (deepcopy(trained) for _ in range(3))
    expected = cut(undisturbed, coordinates, configured, Blockwise(*options), tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        cut(killed, coordinates, configured, Killed(*options), tmp_path / "killed")
    assert cut(resumed, coordinates, configured, Counted(*options), tmp_path / "killed") == expected
    assert fitted == [1]
    assert weight_digests(undisturbed) == weight_digests(resumed)


def test_layers_kept_by_another_plan_or_another_refinement_are_not_taken(trained, coordinates, configured, tmp_path):
    expected, ours = deepcopy(trained), deepcopy(trained)
    cut(deepcopy(trained), coordinates, configured, Blockwise("block", 1, 1e-3), tmp_path / "kept")
    cut(expected, coordinates, configured, Blockwise("block", 2, 1e-3), tmp_path / "alone")
    cut(ours, coordinates, configured, Blockwise("block", 2, 1e-3), tmp_path / "kept")
    assert weight_digests(ours) == weight_digests(expected)
    less = deepcopy(trained)
    cut(less, coordinates, configured, Blockwise("block", 2, 1e-3), tmp_path / "kept", keep=0.3)
    assert sum(factored_ranks(less).values()) < sum(factored_ranks(ours).values())


def test_a_kept_layer_says_again_which_decomposition_failed(trained, coordinates, configured, tmp_path, monkeypatch):
    def failing(name, module, rank, coordinates, pairs):
        coordinates.notes[name] = "eigh failed"
        return coordinates.factors(name, module, rank)

    monkeypatch.setattr("welore.sequence._factors", failing)
    cut(deepcopy(trained), coordinates, configured, Refine("none"), tmp_path)
    notes = dict(coordinates.notes)
    coordinates.notes.clear()
    monkeypatch.setattr("welore.sequence._factors", None)
    cut(trained, coordinates, configured, Refine("none"), tmp_path)
    assert coordinates.notes == notes != {}


@pytest.mark.parametrize("options", [(0, 1e-3), (1, 0.0), (1, -1.0)])
def test_a_refinement_that_does_nothing_is_refused(options):
    with pytest.raises(Refused, match="refine has"):
        Blockwise("block", *options)
