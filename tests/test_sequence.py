"""Factors in sequence against least squares on raw tokens, the columns of X and of Y (x~ of the compressed model)."""

from copy import deepcopy

import pytest
import torch

from welore.cache import Cache
from welore.calibrate import Statistics, calibrate
from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.errors import Refused
from welore.models import components
from welore.moments import Needs
from welore.ranks import tally
from welore.refine import Refine
from welore.sequence import Pairs, anchored, factorize_in_sequence, updated
from welore.svd import Kfac, Whitened, decompose

SHAPES = [(24, 24), (16, 40), (40, 16), (8, 24)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
WINDOWS_BL = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(7))
UNREFINED = Refine("none")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def streams(shape, tokens=200):
    """A weight, its inputs in the dense model, and inputs that have drifted from them."""
    W_MN, X_NT = double(*shape), double(shape[1], shape[1]) @ double(shape[1], tokens)
    return W_MN, X_NT, 0.9 * X_NT + 0.5 * double(shape[1], tokens)


@every_shape
def test_the_update_is_the_least_squares_fit_to_what_the_weight_makes_of_the_same_inputs(shape):
    W_MN, _, Y_NT = streams(shape)
    B_RN = decompose(W_MN).B_KN[:5]
    expected_MR = torch.linalg.lstsq((B_RN @ Y_NT).T, (W_MN @ Y_NT).T).solution.T
    torch.testing.assert_close(updated(W_MN, B_RN, Y_NT @ Y_NT.T / 200), expected_MR, rtol=1e-7, atol=1e-9)


@every_shape
def test_the_update_lowers_the_error_of_plain_factors_and_leaves_whitened_ones_of_the_same_inputs(shape):
    W_MN, _, Y_NT = streams(shape)
    C_NN = Y_NT @ Y_NT.T / 200
    for metric, gains in ((None, True), (C_NN, False)):
        found = decompose(W_MN, None, metric)
        A_MR, B_RN = found.A_KM[:5].T, found.B_KN[:5]
        before, after = (((W_MN - A @ B_RN) @ Y_NT).norm() for A in (A_MR, updated(W_MN, B_RN, C_NN)))
        assert (after < 0.999 * before) == gains and after <= before * (1 + 1e-9)


@every_shape
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_anchored_to_equal_streams_is_the_weight_itself(shape, damping):
    W_MN, X_NT, _ = streams(shape)
    C_NN = X_NT @ X_NT.T / 200
    torch.testing.assert_close(anchored(W_MN, C_NN, C_NN, damping), W_MN, rtol=0, atol=1e-8)


@every_shape
def test_anchored_factors_are_the_best_of_their_rank_towards_the_dense_outputs(shape):
    """min ||W X - W_r Y||: the part of W X that Y can express at all, cut to the rank, by an SVD over raw tokens."""
    W_MN, X_NT, Y_NT = streams(shape)
    own_NN, cross_NN = Y_NT @ Y_NT.T / 200, X_NT @ Y_NT.T / 200
    found = decompose(anchored(W_MN, own_NN, cross_NN, 0.0), None, own_NN)
    ours_MN = found.A_KM[:5].T @ found.B_KN[:5]
    V_TN = torch.linalg.svd(Y_NT, full_matrices=False).Vh.T
    U, sigma, Vh = torch.linalg.svd(W_MN @ X_NT @ V_TN @ V_TN.T, full_matrices=False)
    best_MT = (U[:, :5] * sigma[:5]) @ Vh[:5]
    scale = float(best_MT.abs().max())
    torch.testing.assert_close(ours_MN @ Y_NT, best_MT, rtol=0, atol=1e-4 * scale)
    one_shot = decompose(W_MN, None, X_NT @ X_NT.T / 200)
    theirs_MN = one_shot.A_KM[:5].T @ one_shot.B_KN[:5]
    assert (W_MN @ X_NT - ours_MN @ Y_NT).norm() < (W_MN @ X_NT - theirs_MN @ Y_NT).norm()


@every_shape
def test_fewer_tokens_than_features_leave_anchored_weights_finite_and_right_where_they_were_seen(shape):
    W_MN, X_NT, _ = streams(shape, tokens=6)
    own_NN = (X_NT @ X_NT.T / 6).float()
    target_MN = anchored(W_MN, own_NN, own_NN, 0.0)
    torch.testing.assert_close(target_MN @ X_NT, W_MN @ X_NT, rtol=0, atol=1e-5 * float((W_MN @ X_NT).abs().max()))
    assert target_MN.norm() < 2 * W_MN.norm()


@pytest.fixture
def coordinates(model, cache, tmp_path):
    """A function of an svd option to the coordinates of the tiny model, without damping."""
    calibrate(model, WINDOWS_BL, Needs.GRADIENTS, tmp_path)
    statistics = Statistics(tmp_path, Needs.GRADIENTS, f"sequence {tmp_path}", 0.0, 0.0)
    return lambda svd: Coordinates(svd, weight_digests(model), cache, statistics)


def quarter(model, chosen):
    spectra = read_spectra(model, chosen)
    return tally({name: len(spectrum.sigma_K) // 4 for name, spectrum in spectra.items()}, spectra)


def inputs_of(model, layer):
    """The inputs of every weight of one layer, by ordinary forward passes."""
    seen = {name: [] for name in components(model) if name.startswith(f"model.layers.{layer}.")}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, held=held: held.append(args[0]))
        for name, held in seen.items()
    ]
    with torch.no_grad():
        model(WINDOWS_BL)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(held).flatten(0, 1).T.double() for name, held in seen.items()}


@pytest.mark.parametrize("sequential", ["update", "anchored"])
def test_in_sequence_every_weight_is_closer_to_its_aim_than_one_shot_on_the_inputs_that_it_gets(
    model, coordinates, sequential, tmp_path
):
    """Both layers are cut, one after the other; what enters the second has passed through the first as cut."""
    chosen = coordinates(Whitened("whitened", sequential))
    dense, one_shot, ours = model, deepcopy(model), deepcopy(model)
    plan = quarter(dense, chosen)
    factorize(one_shot, plan, chosen)
    factorize_in_sequence(ours, plan, chosen, WINDOWS_BL, None, UNREFINED, Cache(tmp_path / "layers"))
    half_cut = deepcopy(ours)  # the first layer cut, the second dense
    half_cut.model.layers[1] = deepcopy(dense.model.layers[1])
    for layer, own_model in ((0, dense), (1, half_cut)):
        dense_inputs, own_inputs = inputs_of(dense, layer), inputs_of(own_model, layer)
        for name, Y_NT in own_inputs.items():
            W_MN = dense.get_submodule(name).weight.double()
            aim_MT = W_MN @ (dense_inputs[name] if sequential == "anchored" else Y_NT)
            error, before = (
                float((aim_MT - m.get_submodule(name).merged().weight.double() @ Y_NT).norm())
                for m in (ours, one_shot)
            )
            assert error <= before * (1 + 1e-3), name
            assert layer == 0 or error < 0.999 * before, name


def test_anchored_the_first_layer_is_the_one_shot_one_for_its_inputs_are_those_of_the_dense_model(
    model, coordinates, tmp_path
):
    chosen = coordinates(Kfac("kfac", "anchored"))
    one_shot, ours = deepcopy(model), deepcopy(model)
    plan = quarter(model, chosen)
    factorize(one_shot, plan, chosen)
    factorize_in_sequence(ours, plan, chosen, WINDOWS_BL, None, UNREFINED, Cache(tmp_path / "layers"))
    for name, X_NT in inputs_of(model, 0).items():
        ours_MT, expected_MT = (m.get_submodule(name).merged().weight.double() @ X_NT for m in (ours, one_shot))
        torch.testing.assert_close(ours_MT, expected_MT, rtol=0, atol=1e-3 * float(expected_MT.abs().max()))


def test_in_sequence_the_plan_is_followed_and_what_stays_dense_is_not_touched(model, coordinates, tmp_path):
    chosen = coordinates(Whitened("whitened", "anchored"))
    ranks = quarter(model, chosen).ranks
    kept = [name for name in ranks if name.endswith("down_proj")]
    plan = tally(ranks | dict.fromkeys(kept), read_spectra(model, chosen))
    before = {name: model.get_submodule(name).weight.clone() for name in kept}
    factorize_in_sequence(model, plan, chosen, WINDOWS_BL, None, UNREFINED, Cache(tmp_path / "layers"))
    assert {name: components(model)[name].rank for name in plan.factored} == plan.factored
    assert all(torch.equal(model.get_submodule(name).weight, before[name]) for name in kept)


def test_a_weight_that_sees_other_tokens_in_the_compressed_model_is_refused():
    """An expert: which tokens it gets depends on the layers before."""
    expert = torch.nn.Linear(4, 4)
    pairs = Pairs({"expert": expert}, crossed=True)
    with pairs.seeing(compressed=False):
        expert(torch.randn(5, 4))
    with pytest.raises(Refused, match=r"expert .*5 tokens .*3 .*svd\.sequential=none"), pairs.seeing(compressed=True):
        expert(torch.randn(3, 4))
    with pytest.raises(Refused, match=r"never .*svd\.sequential=none"):
        Pairs({"never": expert}, crossed=True).means("never")
