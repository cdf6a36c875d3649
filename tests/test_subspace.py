"""Measures of low rank and of alike subspaces: identities, chance and the edge of noise."""

import math

import pytest
import torch

from welore.errors import Refused
from welore.subspace import (
    Heads,
    above_chance,
    chance,
    cosine,
    describe,
    edge,
    energy_rank,
    entropy_rank,
    fraction_below,
    leading,
    shuffled,
    similarity,
    stable_rank,
)
from welore.svd import singular_values


def orthonormal(size, rank):
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q


def test_random_subspaces_are_alike_by_chance_and_no_more():
    found = [similarity(orthonormal(40, 8), orthonormal(40, 8)) for _ in range(200)]
    assert sum(found) / 200 == pytest.approx(chance(8, 40), abs=0.01)
    assert sum(above_chance(phi, 8, 40) for phi in found) / 200 == pytest.approx(0, abs=0.0125)


def test_a_subspace_is_one_with_itself_in_any_basis_and_zero_with_its_complement():
    basis = orthonormal(20, 20)
    U, rest = basis[:, :6], basis[:, 6:12]
    assert similarity(U, U @ orthonormal(6, 6)) == pytest.approx(1)
    assert above_chance(similarity(U, U), 6, 20) == pytest.approx(1)
    assert similarity(U, rest) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_leading_vectors_are_those_of_a_full_svd(shape):
    W = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    sigma, left, right = leading(W, 5)
    torch.testing.assert_close(sigma, S, rtol=1e-6, atol=1e-6)
    assert similarity(left, U[:, :5]) == pytest.approx(1)
    assert similarity(right, Vh[:5].T) == pytest.approx(1)
    torch.testing.assert_close(right.T @ right, torch.eye(5, dtype=torch.float64))


def test_leading_vectors_end_where_the_matrix_does():
    _, left, right = leading(torch.randn(3, 9), 64)
    assert left.shape == (3, 3) and right.shape == (9, 3)


def test_cosine_is_one_along_and_zero_across_and_for_nothing():
    G = torch.randn(4, 6)
    assert cosine(G, 3 * G) == pytest.approx(1)
    assert cosine(G, -G) == pytest.approx(-1)
    assert cosine(torch.eye(3), torch.eye(3).flip(0) - torch.diag(torch.tensor([0.0, 1.0, 0.0]))) == 0
    assert cosine(G, torch.zeros(4, 6)) == 0


def test_r_equal_values_have_every_rank_r():
    sigma = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0])
    assert stable_rank(sigma) == pytest.approx(3)
    assert entropy_rank(sigma) == pytest.approx(3)
    assert entropy_rank(sigma.square()) == pytest.approx(3)
    assert energy_rank(sigma) == 3
    assert energy_rank(torch.tensor([3.0, 1.0])) == 1  # 9 of 10
    assert energy_rank(torch.tensor([2.9, 1.0])) == 2


def test_the_fraction_below_k_is_what_one_threshold_removes():
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.4])
    assert fraction_below(sigma, 0.3) == 0.5
    assert fraction_below(sigma, 0.3, "minmax") == 0.5
    assert fraction_below(sigma, 0.05) == 0
    assert fraction_below(sigma, 0.05, "minmax") == 0.25  # the smallest is 0 whatever its size


def test_noise_ends_at_the_edge_and_a_planted_direction_stands_above_it():
    noise = 0.02 * torch.randn(300, 500)
    assert float(singular_values(noise)[0]) == pytest.approx(edge((300, 500), 0.02), rel=0.02)
    planted = noise + 2 * edge((300, 500), 0.02) * torch.outer(orthonormal(300, 1)[:, 0], orthonormal(500, 1)[:, 0])
    assert describe(planted.float(), [])["above_edge"] == 1


def test_shuffling_keeps_the_entries_and_loses_the_structure():
    W = torch.outer(torch.randn(60), torch.randn(80)) + 0.01 * torch.randn(60, 80)
    control = shuffled(W, torch.Generator().manual_seed(0))
    torch.testing.assert_close(control.flatten().sort().values, W.flatten().sort().values)
    assert describe(W, [])["stable_rank"] < 1.1
    assert describe(control, [])["stable_rank"] > 10


def head_weights(heads, size, hidden):
    rows = {"W_q": heads.queries, "W_k": heads.keys, "W_v": heads.keys}
    return {name: torch.randn(n * size, hidden, dtype=torch.float64) for name, n in rows.items()} | {
        "W_o": torch.randn(hidden, heads.queries * size, dtype=torch.float64)
    }


def test_head_products_stay_the_same_in_other_coordinates_of_the_heads():
    heads, size = Heads(4, 2), 3
    weights = head_weights(heads, size, 12)
    before = heads.products(**weights)
    maps = [torch.randn(size, size, dtype=torch.float64) + 2 * torch.eye(size) for _ in range(heads.keys)]
    spread = torch.block_diag(*[m for m in maps for _ in range(2)])  # a query head in the coordinates of its key head
    changed = {
        "W_q": torch.linalg.inv(spread).T @ weights["W_q"],
        "W_k": torch.block_diag(*maps) @ weights["W_k"],
        "W_v": torch.block_diag(*maps) @ weights["W_v"],
        "W_o": weights["W_o"] @ torch.linalg.inv(spread),
    }
    after = heads.products(**changed)
    for kind in ("qk", "ov"):
        assert len(after[kind]) == 4
        torch.testing.assert_close(after[kind], before[kind])
    assert not torch.allclose(singular_values(changed["W_k"]), singular_values(weights["W_k"]))


def test_head_products_sum_to_what_attention_sees():
    heads, size = Heads(4, 2), 3
    weights = head_weights(heads, size, 12)
    x, y = torch.randn(2, 12, dtype=torch.float64)
    q, k = (weights["W_q"] @ x).reshape(4, 3), (weights["W_k"] @ y).reshape(2, 3).repeat_interleave(2, 0)
    found = heads.products(**weights)
    torch.testing.assert_close(torch.stack([x @ product @ y for product in found["qk"]]), (q * k).sum(1))
    v = (weights["W_v"] @ y).reshape(2, 3).repeat_interleave(2, 0).flatten()
    torch.testing.assert_close(sum(product @ y for product in found["ov"]), weights["W_o"] @ v)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(Refused, match="4 query heads do not divide among 3"):
        Heads(4, 3)


def test_scalars_of_a_matrix_agree_with_numpy():
    W = torch.randn(20, 30)
    sigma = torch.linalg.svdvals(W.double())
    found = describe(W, [0.5])
    assert found["norm"] == pytest.approx(float(W.norm()), rel=1e-5)
    assert found["below_0.5_max"] == pytest.approx(float((sigma < 0.5 * sigma[0]).double().mean()))
    assert found["edge"] == pytest.approx(float(W.std()) * (math.sqrt(20) + math.sqrt(30)), rel=1e-5)
