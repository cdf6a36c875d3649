"""Every `svd` option against its published form: other roots, other decompositions, raw tokens; all in float64.

X_NT are the inputs and G_MT the output gradients of T tokens, one a column.
"""

from dataclasses import replace

import pytest
import torch

from welore.moments import Moments
from welore.svd import Asvd, Fwsvd, Kfac, Plain, Whitened, decompose, predicted_nats, valued

# Square, wide, tall, and a key projection under grouped queries.
SHAPES = [(24, 24), (16, 40), (40, 16), (8, 24)]
OPTIONS = {
    "plain": Plain("plain", "none"),
    "fwsvd": Fwsvd("fwsvd", "none"),
    "asvd": Asvd("asvd", "none", 0.5),
    "whitened": Whitened("whitened", "none"),
    "kfac": Kfac("kfac", "none"),
}
TOKENS, RANK = 200, 5
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_option = pytest.mark.parametrize("name", OPTIONS)
chol = torch.linalg.cholesky


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tokens(features, count=TOKENS):
    """Correlated features of very different sizes, as in a language model."""
    mix = double(features, features) * torch.logspace(0, -2, features, dtype=torch.float64)[:, None]
    return mix @ double(features, count)


def moments_of(X_NT, G_MT, damping=0.0):
    T = X_NT.shape[1]
    gradient_MN = G_MT @ X_NT.T / T
    fisher_N = (G_MT[:, :, None] * X_NT.T[None]).square().mean((0, 1))
    return Moments(
        T, X_NT @ X_NT.T / T, X_NT.abs().mean(1), G_MT @ G_MT.T / T, fisher_N, gradient_MN, damping, damping
    )


def setting(shape, count=TOKENS, damping=0.0):
    M, N = shape
    X_NT, G_MT = tokens(N, count), tokens(M, count)
    return double(M, N), X_NT, G_MT, moments_of(X_NT, G_MT, damping)


def decomposed(name, W_MN, moments):
    return decompose(W_MN, *OPTIONS[name].metrics(moments))


def cut(found, rank=RANK):
    return found.A_KM[:rank].T @ found.B_KN[:rank]


def published(W_MN, left_MM, right_NN, rank=RANK):
    """T_L^-1 SVD_r(T_L W T_R) T_R^-1, and all singular values, by explicit transforms and inverses."""
    U, sigma_K, Vh = torch.linalg.svd(left_MM @ W_MN @ right_NN, full_matrices=False)
    core = (U[:, :rank] * sigma_K[:rank]) @ Vh[:rank]
    return torch.linalg.inv(left_MM) @ core @ torch.linalg.inv(right_NN), sigma_K


def agrees(found, expected_MN, sigma_K):
    torch.testing.assert_close(cut(found), expected_MN, rtol=0, atol=1e-7 * float(expected_MN.abs().max()))
    torch.testing.assert_close(found.spectrum.sigma_K, sigma_K, rtol=0, atol=2e-8 * float(sigma_K[0]))


@every_shape
def test_whitened_is_the_cholesky_form_of_svd_llm(shape):
    W_MN, X_NT, _, moments = setting(shape)
    S_NN = chol(X_NT @ X_NT.T / TOKENS)
    agrees(decomposed("whitened", W_MN, moments), *published(W_MN, torch.eye(len(W_MN)).double(), S_NN))


@every_shape
def test_whitened_is_the_principal_subspace_of_the_outputs_as_in_actsvd(shape):
    W_MN, X_NT, _, moments = setting(shape)
    U_MR = torch.linalg.svd(W_MN @ X_NT, full_matrices=False).U[:, :RANK]
    expected_MN = U_MR @ U_MR.T @ W_MN
    torch.testing.assert_close(cut(decomposed("whitened", W_MN, moments)), expected_MN, rtol=0, atol=1e-7)


@every_shape
def test_kfac_is_cholesky_whitening_of_both_sides(shape):
    W_MN, X_NT, G_MT, moments = setting(shape)
    left_MM, right_NN = chol(G_MT @ G_MT.T / TOKENS).T, chol(X_NT @ X_NT.T / TOKENS)
    agrees(decomposed("kfac", W_MN, moments), *published(W_MN, left_MM, right_NN))


@every_shape
def test_fwsvd_is_an_svd_weighted_by_the_root_of_the_fisher_information_of_each_column(shape):
    W_MN, X_NT, G_MT, moments = setting(shape)
    squares = torch.stack([torch.outer(g, x).square() for g, x in zip(G_MT.T, X_NT.T, strict=True)])
    weights_NN = torch.diag(squares.mean(0).mean(0).sqrt())
    agrees(decomposed("fwsvd", W_MN, moments), *published(W_MN, torch.eye(len(W_MN)).double(), weights_NN))


@every_shape
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asvd_is_an_svd_scaled_by_a_power_of_the_mean_absolute_input(shape, alpha):
    W_MN, X_NT, _, moments = setting(shape)
    scale_NN = torch.diag(X_NT.abs().mean(1) ** alpha + 1e-6)
    found = decompose(W_MN, *Asvd("asvd", "none", alpha).metrics(moments))
    agrees(found, *published(W_MN, torch.eye(len(W_MN)).double(), scale_NN))
    if alpha == 0:
        torch.testing.assert_close(cut(found), cut(decompose(W_MN)), rtol=0, atol=1e-9)


@every_shape
def test_kfac_with_one_side_the_identity_is_whitened_or_weighted_from_the_left(shape):
    W_MN, _, G_MT, moments = setting(shape)
    M, N = shape
    flat_gradients = replace(moments, gradients_MM=torch.eye(M).double())
    whitened = decomposed("whitened", W_MN, moments)
    agrees(decomposed("kfac", W_MN, flat_gradients), cut(whitened), whitened.spectrum.sigma_K)
    flat_inputs = replace(moments, inputs_NN=torch.eye(N).double())
    left_MM = chol(G_MT @ G_MT.T / TOKENS).T
    agrees(decomposed("kfac", W_MN, flat_inputs), *published(W_MN, left_MM, torch.eye(N).double()))


@every_shape
@pytest.mark.parametrize("rank", [1, RANK])
def test_in_whitened_coordinates_the_dropped_energy_is_the_error_of_the_outputs_per_token(shape, rank):
    W_MN, X_NT, _, moments = setting(shape)
    found = decomposed("whitened", W_MN, moments)
    error = float(((W_MN - cut(found, rank)) @ X_NT).square().sum() / TOKENS)
    assert error == pytest.approx(float(found.spectrum.sigma_K[rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 4), (5, 3)])
def test_half_the_dropped_energy_of_kfac_is_its_quadratic_form_of_the_change(shape):
    """By an explicit Kronecker product, by all pairs of tokens, and by `predicted_nats`."""
    W_MN, X_NT, G_MT, moments = setting(shape, count=40)
    found = decomposed("kfac", W_MN, moments)
    dW_MN = W_MN - cut(found, 2)
    dropped = 0.5 * float(found.spectrum.sigma_K[2:].square().sum())
    column = dW_MN.T.reshape(-1)  # columns of dW after each other
    kronecker = torch.kron(moments.inputs_NN, moments.gradients_MM)
    pairs = (G_MT.T @ dW_MN @ X_NT).square().mean()  # the gradient of one token, the input of another
    assert dropped == pytest.approx(0.5 * float(column @ kronecker @ column), rel=1e-8)
    assert dropped == pytest.approx(0.5 * float(pairs), rel=1e-8)
    assert dropped == pytest.approx(predicted_nats(dW_MN, moments), rel=1e-8)


@every_option
@every_shape
def test_full_rank_gives_the_weight_back_in_every_coordinates(name, shape):
    W_MN, _, _, moments = setting(shape)
    found = decomposed(name, W_MN, moments)
    torch.testing.assert_close(cut(found, min(shape)), W_MN, rtol=0, atol=1e-8)


@every_option
@every_shape
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_fewer_tokens_than_features_leave_the_weight_whole_and_the_seen_outputs_right(name, shape, damping):
    """Seven tokens span 7 directions: rank 7 says all about them, and full rank still gives the weight back."""
    W_MN, X_NT, G_MT, moments = setting(shape, count=7, damping=damping)
    found = decomposed(name, W_MN, moments)
    assert found.A_KM.isfinite().all() and found.B_KN.isfinite().all() and found.spectrum.sigma_K.isfinite().all()
    torch.testing.assert_close(cut(found, min(shape)), W_MN, rtol=0, atol=1e-5)
    if name == "whitened" and damping == 0:
        torch.testing.assert_close(cut(found, 7) @ X_NT, W_MN @ X_NT, rtol=0, atol=1e-4)
    if name == "kfac" and damping == 0:
        seen = G_MT.T @ W_MN @ X_NT
        torch.testing.assert_close(G_MT.T @ cut(found, 7) @ X_NT, seen, rtol=0, atol=1e-4 * float(seen.abs().max()))


@every_option
@every_shape
def test_float32_factors_survive_a_dead_and_a_massive_input_channel(name, shape):
    W_MN, X_NT, G_MT, _ = setting(shape)
    X_NT[3] = 0
    X_NT[5] *= 1000
    found = decomposed(name, W_MN.float(), moments_of(X_NT, G_MT, damping=1e-3))
    assert found.A_KM.dtype == found.B_KN.dtype == torch.float32
    torch.testing.assert_close(cut(found, min(shape)), W_MN.float(), rtol=0, atol=1e-4 * float(W_MN.abs().max()))


@every_shape
def test_a_dead_input_channel_is_the_first_that_whitening_gives_up(shape):
    W_MN, X_NT, G_MT, _ = setting(shape)
    X_NT[3] = 0
    moments = moments_of(X_NT, G_MT)
    changed_MN = W_MN.clone()
    changed_MN[:, 3] *= 100
    for name in ("whitened", "kfac"):
        ours, other = (decomposed(name, V, moments) for V in (W_MN, changed_MN))
        live = [n for n in range(shape[1]) if n != 3]
        torch.testing.assert_close(cut(other)[:, live], cut(ours)[:, live], rtol=0, atol=1e-3)


@every_option
@every_shape
def test_a_weight_that_was_never_called_is_decomposed_as_it_is(name, shape):
    M, N = shape
    W_MN, nothing = double(M, N), moments_of(torch.zeros(N, 1).double(), torch.zeros(M, 1).double(), damping=1e-3)
    torch.testing.assert_close(cut(decomposed(name, W_MN, nothing)), cut(decompose(W_MN)), rtol=0, atol=1e-9)


@every_shape
def test_what_a_component_is_worth_is_its_energy_in_kfac_coordinates(shape):
    W_MN, _, _, moments = setting(shape)
    found = decomposed("kfac", W_MN, moments)
    energy_K = found.spectrum.sigma_K.square()
    torch.testing.assert_close(valued(found, moments).fisher_K, energy_K, rtol=1e-6, atol=1e-12 * float(energy_K[0]))


@every_option
@every_shape
def test_what_a_component_is_worth_is_twice_the_damage_of_removing_it_alone(name, shape):
    W_MN, X_NT, G_MT, moments = setting(shape)
    found = decomposed(name, W_MN, moments)
    spectrum = valued(found, moments)
    for k in (0, 3, min(shape) - 1):
        removed_MN = -torch.outer(found.A_KM[k], found.B_KN[k])
        damage = 0.5 * float(torch.trace(removed_MN @ moments.inputs_NN @ removed_MN.T @ moments.gradients_MM))
        assert float(spectrum.fisher_K[k]) == pytest.approx(2 * damage, rel=1e-8)
        assert float(spectrum.slope_K[k]) == pytest.approx(
            float((G_MT * (removed_MN @ X_NT)).sum() / TOKENS), rel=1e-7, abs=1e-10
        )


def test_without_gradients_a_component_has_no_worth():
    W_MN, _, _, moments = setting((8, 24))
    inputs_alone = replace(moments, gradients_MM=None, gradient_MN=None)
    spectrum = valued(decomposed("whitened", W_MN, moments), inputs_alone)
    assert spectrum.fisher_K is None and spectrum.slope_K is None
