import pytest
import torch

from welore.errors import Refused
from welore.svd import decompose, short_vectors, singular_values

SHAPES = [(48, 80), (80, 48), (64, 64)]


def with_spectrum(shape, sigma_K):
    """A float32 matrix of the given shape with (up to rounding) the given singular values."""
    K = len(sigma_K)
    U_MK = torch.linalg.qr(torch.randn(shape[0], K, dtype=torch.float64)).Q
    V_NK = torch.linalg.qr(torch.randn(shape[1], K, dtype=torch.float64)).Q
    return ((U_MK * sigma_K) @ V_NK.T).float()


def gaussian(shape):
    return torch.randn(shape)


def power_law(shape):
    return with_spectrum(shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -1.5)


def exponential(shape):
    return with_spectrum(shape, torch.exp(-torch.arange(min(shape), dtype=torch.float64) / 2))


def rank_deficient(shape):
    """Exactly of rank 5: the product of two thin matrices of small integers."""
    left, right = torch.randint(-3, 4, (shape[0], 5)), torch.randint(-3, 4, (5, shape[1]))
    return (left @ right).float()


def cut(W_MN, rank):
    """A_MR and B_RN of the first components."""
    found = decompose(W_MN)
    return found.A_KM[:rank].T, found.B_KN[:rank]


KINDS = [gaussian, power_law, exponential, rank_deficient]
every_kind = pytest.mark.parametrize("make", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_kind
@every_shape
def test_singular_values_are_those_of_a_float64_svd(make, shape):
    W_MN = make(shape)
    expected_K = torch.linalg.svdvals(W_MN.double())
    assert (singular_values(W_MN) - expected_K).abs().max() <= 2e-8 * expected_K[0]


@every_kind
@every_shape
def test_the_components_have_the_singular_values_of_the_spectrum(make, shape):
    W_MN = make(shape)
    expected_K = torch.linalg.svdvals(W_MN.double())
    assert (decompose(W_MN).spectrum.sigma_K - expected_K).abs().max() <= 2e-8 * expected_K[0]


@every_kind
@every_shape
@pytest.mark.parametrize("rank", [1, 3, 17])
def test_the_error_of_the_factors_is_the_energy_of_the_dropped_tail(make, shape, rank):
    W_MN = make(shape)
    A_MR, B_RN = cut(W_MN, rank)
    assert A_MR.shape == (shape[0], rank) and B_RN.shape == (rank, shape[1])
    error = (W_MN.double() - A_MR.double() @ B_RN.double()).norm()
    sigma_K = torch.linalg.svdvals(W_MN.double())
    assert error == pytest.approx(float(sigma_K[rank:].norm()), rel=1e-4, abs=2e-6 * float(sigma_K[0]))


@every_shape
def test_the_factors_multiply_to_the_truncated_svd(shape):
    W_MN = power_law(shape)
    A_MR, B_RN = cut(W_MN, 4)
    U_MK, sigma_K, Vh_KN = torch.linalg.svd(W_MN.double(), full_matrices=False)
    expected = (U_MK[:, :4] * sigma_K[:4]) @ Vh_KN[:4]
    torch.testing.assert_close((A_MR @ B_RN).double(), expected, rtol=0, atol=1e-6)


@every_kind
@every_shape
def test_full_rank_changes_nothing(make, shape):
    W_MN = make(shape)
    A_MR, B_RN = cut(W_MN, min(shape))
    torch.testing.assert_close(A_MR @ B_RN, W_MN, rtol=0, atol=2e-6 * float(W_MN.norm()))


@every_shape
def test_the_factors_are_balanced(shape):
    W_MN = power_law(shape)
    A_MR, B_RN = cut(W_MN, 48)
    root_R = torch.linalg.svdvals(W_MN.double())[:48].sqrt().float()
    torch.testing.assert_close(A_MR.norm(dim=0), root_R, rtol=1e-3, atol=0)
    torch.testing.assert_close(B_RN.norm(dim=1), root_R, rtol=1e-3, atol=0)


@every_shape
def test_factors_of_bfloat16_weights_are_bfloat16(shape):
    W_MN = power_law(shape).bfloat16()
    A_MR, B_RN = cut(W_MN, 8)
    assert A_MR.dtype == B_RN.dtype == torch.bfloat16
    exact_A, exact_B = cut(W_MN.float(), 8)
    assert torch.equal(A_MR, exact_A.bfloat16()) and torch.equal(B_RN, exact_B.bfloat16())


@every_shape
def test_a_zero_matrix_has_zero_singular_values_and_zero_factors(shape):
    W_MN = torch.zeros(shape)
    assert torch.equal(singular_values(W_MN), torch.zeros(min(shape), dtype=torch.float64))
    A_MR, B_RN = cut(W_MN, 3)
    assert A_MR.isfinite().all() and B_RN.isfinite().all()
    assert torch.equal(A_MR @ B_RN, W_MN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("work", [singular_values, short_vectors, decompose])
def test_a_weight_that_is_not_finite_is_refused(bad, work):
    W_MN = torch.ones(4, 6)
    W_MN[1, 2] = bad
    with pytest.raises(Refused, match="1 of its 24 values"):
        work(W_MN)


def test_a_gram_matrix_formed_in_blocks_has_the_same_spectrum_and_components(monkeypatch):
    W_MN = torch.randn(50, 80, dtype=torch.float64)
    whole, metric_NN = decompose(W_MN), torch.diag(torch.rand(80, dtype=torch.float64))
    whole_weighted = decompose(W_MN, right=metric_NN)
    monkeypatch.setattr("welore.svd.GRAM_ROWS", 16)
    for blocks, expected in ((decompose(W_MN), whole), (decompose(W_MN, right=metric_NN), whole_weighted)):
        torch.testing.assert_close(blocks.spectrum.sigma_K, expected.spectrum.sigma_K, rtol=1e-12, atol=0)
        for rank in (1, 10, 50):
            ours_MN, theirs_MN = (c.A_KM[:rank].T @ c.B_KN[:rank] for c in (blocks, expected))
            torch.testing.assert_close(ours_MN, theirs_MN, rtol=0, atol=1e-10)
    torch.testing.assert_close(singular_values(W_MN), whole.spectrum.sigma_K, rtol=1e-12, atol=0)


@every_shape
def test_the_vectors_of_the_shorter_side_are_those_of_a_float64_svd(shape):
    W_MN = with_spectrum(shape, torch.arange(min(shape), 0, -1, dtype=torch.float64))
    U_MK, _, Vh_KN = torch.linalg.svd(W_MN.double(), full_matrices=False)
    expected_KK = U_MK if shape[0] <= shape[1] else Vh_KN.T
    cosine_K = (short_vectors(W_MN).double() * expected_KK).sum(0).abs()
    torch.testing.assert_close(cosine_K, torch.ones_like(cosine_K), rtol=0, atol=1e-6)


def fails(*_):
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge\nmore")


@every_kind
@every_shape
def test_where_eigh_fails_the_svd_of_the_gram_matrix_gives_the_same_components_and_a_note(make, shape, monkeypatch):
    W_MN = make(shape).double()
    usual = decompose(W_MN)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    safer = decompose(W_MN)
    assert usual.safer is None and "failed to converge): svd" in safer.safer and "\n" not in safer.safer
    scale = float(usual.spectrum.sigma_K[0])
    torch.testing.assert_close(safer.spectrum.sigma_K, usual.spectrum.sigma_K, rtol=0, atol=2e-7 * scale)
    for rank in (5, min(shape)):
        ours_MN, theirs_MN = (c.A_KM[:rank].T @ c.B_KN[:rank] for c in (safer, usual))
        torch.testing.assert_close(ours_MN, theirs_MN, rtol=0, atol=1e-6 * scale)
