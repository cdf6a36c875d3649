"""Masks and SparseGPT against references in float64 that are written differently, and against what defines them."""

import pytest
import torch
from torch import nn

from welore.errors import Refused
from welore.galore import GaLoreAdamW
from welore.optim import AdamW
from welore.sparse import KeptZeros, inverse_root, mask_magnitude, mask_wanda, sparsegpt

SPARSITIES = [0.1, 0.5, 0.77]
every_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)


def weight(M=12, N=16, seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(N=16, tokens=200, seed=1):
    """E[xx^T] of inputs that share a few directions and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    mix_NN = torch.randn(N, N, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, N).double()[:, None]
    scale_N = torch.logspace(-1, 1, N, dtype=torch.float64)[torch.randperm(N, generator=generator)]
    X_TN = torch.randn(tokens, N, generator=generator, dtype=torch.float64) @ mix_NN * scale_N
    return X_TN.T @ X_TN / tokens


def output_error(W_MN, pruned_MN, C_NN):
    """E||(W - W') x||^2."""
    dW_MN = pruned_MN - W_MN
    return float(((dW_MN @ C_NN) * dW_MN).sum())


def damped_hessian(C_NN, damping=0.01):
    return C_NN + damping * C_NN.diagonal().mean() * torch.eye(len(C_NN), dtype=torch.float64)


def lowest_pairs(scores, count):
    """The `count` smallest of a map of index to score, by sorting pairs."""
    return [index for _, index in sorted((float(score), index) for index, score in scores.items())[:count]]


def reference_sparsegpt(W_MN, C_NN, sparsity, group, block, damping=0.01):
    """Column after column with the explicit inverse of the Hessian of the columns that remain."""
    H_NN, W = damped_hessian(C_NN, damping), W_MN.clone()
    M, N = W.shape
    inverses = [torch.linalg.inv(H_NN[j:, j:]) for j in range(N)]
    for j in range(N):
        width = group or block
        if j % width == 0:
            columns = range(j, min(j + width, N))
            score = {(i, k): W[i, k] ** 2 / inverses[k][0, 0] for i in range(M) for k in columns}
            rows = [[i] for i in range(M)] if group else [range(M)]
            gone = set()
            for some in rows:
                inside = {index: value for index, value in score.items() if index[0] in some}
                gone |= set(lowest_pairs(inside, int(len(inside) * sparsity + 1e-9)))
        for i in range(M):
            if (i, j) in gone:
                W[i, j:] -= W[i, j] / inverses[j][0, 0] * inverses[j][0]
                W[i, j] = 0
    return W


@every_sparsity
def test_magnitude_zeroes_the_smallest_of_the_whole_matrix(sparsity):
    W_MN = weight()
    gone_MN = mask_magnitude(W_MN, sparsity)
    assert gone_MN.sum() == int(sparsity * W_MN.numel())
    assert W_MN[gone_MN].abs().max() < W_MN[~gone_MN].abs().min()


def test_of_equal_magnitudes_exactly_the_share_goes_the_first_ones():
    gone_MN = mask_magnitude(torch.tensor([[1.0, -1.0, 1.0], [1.0, 2.0, -1.0]]), 0.5)
    assert gone_MN.tolist() == [[True, True, True], [False, False, False]]


def test_zeros_go_first_and_count():
    W_MN = torch.tensor([[0.0, 3.0, 0.0, 4.0], [5.0, 1.0, 0.0, 2.0]])
    gone_MN = mask_magnitude(W_MN, 0.5)
    assert gone_MN.tolist() == [[True, False, True, False], [False, True, True, False]]


@every_sparsity
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_wanda_zeroes_the_same_number_in_every_row_as_the_reference_does(sparsity, dtype):
    W_MN, squares_N = weight().to(dtype), correlated().diagonal()
    gone_MN = mask_wanda(W_MN, squares_N, sparsity)
    for i, row in enumerate(W_MN.double()):
        scores = {j: float(abs(row[j]) * squares_N[j] ** 0.5) for j in range(16)}
        assert sorted(lowest_pairs(scores, int(sparsity * 16))) == gone_MN[i].nonzero().flatten().tolist()


def test_a_share_is_not_one_short_for_floating_point():
    assert 0.29 * 100 < 29
    assert (mask_wanda(weight(3, 100), torch.ones(100), 0.29).sum(1) == 29).all()


def test_wanda_with_equal_inputs_is_magnitude_in_each_row():
    W_MN = weight()
    rows = torch.cat([mask_magnitude(row[None], 0.5) for row in W_MN])
    assert torch.equal(mask_wanda(W_MN, torch.full((16,), 3.0), 0.5), rows)


@pytest.mark.parametrize(("sparsity", "group"), [(0.5, 4), (0.75, 4), (0.5, 8), (0.25, 8)])
def test_every_group_of_a_pattern_keeps_what_it_says(sparsity, group):
    W_MN, C_NN = weight(), correlated()
    for pruned in (
        W_MN.masked_fill(mask_magnitude(W_MN, sparsity, group), 0),
        W_MN.masked_fill(mask_wanda(W_MN, C_NN.diagonal(), sparsity, group), 0),
        sparsegpt(W_MN, C_NN, sparsity, group, block=8)[0],
    ):
        assert ((pruned.reshape(-1, group) == 0).sum(1) == sparsity * group).all()


@pytest.mark.parametrize("N", [16, 18])
@pytest.mark.parametrize(
    ("sparsity", "group", "block"), [(0.5, None, 128), (0.3, None, 4), (0.7, None, 1), (0.5, 2, 4)]
)
def test_sparsegpt_is_the_reference_with_explicit_inverses(N, sparsity, group, block):
    W_MN, C_NN = weight(N=N), correlated(N)
    expected = reference_sparsegpt(W_MN, C_NN, sparsity, group, block)
    pruned, note = sparsegpt(W_MN, C_NN, sparsity, group, block=block)
    assert note is None and torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-9)


def test_sparsegpt_shares_one_threshold_in_a_whole_block():
    W_MN = weight()
    W_MN[:6] *= 1e-3  # half of the rows are next to nothing: they pay for all
    zeros = sparsegpt(W_MN, correlated(), 0.5)[0] == 0
    assert zeros.sum() == W_MN.numel() / 2
    assert zeros[:6].float().mean() > 0.9 > 0.1 > zeros[6:].float().mean()


@pytest.mark.parametrize("first", [1, 3])
def test_what_follows_the_pruned_columns_is_the_exact_least_squares_optimum(first):
    """With the first columns gone, the rest minimizes E||(W - W') x||^2 + damping ||W - W'||^2, in one solve."""
    W_MN = weight().sign() * (1 + weight(seed=2).abs())
    X_TN = weight(400, 16, seed=3)
    X_TN[:, :first] = X_TN[:, 8 : 8 + first] + 0.05 * weight(400, first, seed=4)  # inputs that others explain go first
    C_NN = X_TN.T @ X_TN / 400
    pruned, _ = sparsegpt(W_MN, C_NN, first / 16)
    assert (pruned[:, :first] == 0).all() and (pruned[:, first:] != 0).all()
    H_NN = damped_hessian(C_NN)
    expected = W_MN[:, first:] + W_MN[:, :first] @ H_NN[:first, first:] @ torch.linalg.inv(H_NN[first:, first:])
    assert (expected - W_MN[:, first:]).abs().max() > 0.9  # the update is no small thing here
    torch.testing.assert_close(pruned[:, first:], expected, rtol=1e-9, atol=1e-11)


@every_sparsity
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_changes_the_outputs_least_and_wanda_less_than_magnitude(sparsity, seed):
    W_MN, C_NN = weight(48, 64, seed), correlated(64, seed=10 + seed)
    by_sparsegpt = output_error(W_MN, sparsegpt(W_MN, C_NN, sparsity)[0], C_NN)
    by_wanda = output_error(W_MN, W_MN.masked_fill(mask_wanda(W_MN, C_NN.diagonal(), sparsity), 0), C_NN)
    by_magnitude = output_error(W_MN, W_MN.masked_fill(mask_magnitude(W_MN, sparsity), 0), C_NN)
    assert by_sparsegpt < by_wanda < by_magnitude


def test_fewer_tokens_than_features_still_give_the_reference():
    W_MN, C_NN = weight(), correlated(tokens=5)
    assert torch.linalg.matrix_rank(C_NN) == 5
    pruned, note = sparsegpt(W_MN, C_NN, 0.5)
    assert note is None
    torch.testing.assert_close(pruned, reference_sparsegpt(W_MN, C_NN, 0.5, None, 128), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_inputs_does_not_matter_not_even_with_a_dead_channel(scale):
    W_MN, C_NN = weight(), correlated()
    C_NN[3], C_NN[:, 3] = 0, 0
    pruned, scaled = sparsegpt(W_MN, C_NN, 0.5)[0], sparsegpt(W_MN, C_NN * scale, 0.5)[0]
    assert torch.equal(pruned == 0, scaled == 0)
    torch.testing.assert_close(scaled, pruned, rtol=1e-9, atol=1e-10)


def test_a_dead_input_channel_is_zeroed_first_and_disturbs_nothing():
    W_MN, C_NN = weight(), correlated()
    C_NN[3], C_NN[:, 3] = 0, 0
    assert (mask_wanda(W_MN, C_NN.diagonal(), 0.1)[:, 3]).all()
    pruned, _ = sparsegpt(W_MN, C_NN, 1 / 16)  # as many zeros as the channel has
    alive = [j for j in range(16) if j != 3]
    assert (pruned[:, 3] == 0).all() and torch.equal(pruned[:, alive], W_MN[:, alive])


def test_the_inverse_root_is_one():
    C_NN = correlated()
    U_NN, note = inverse_root(C_NN, 0.01)
    assert note is None and torch.equal(U_NN, U_NN.triu())
    torch.testing.assert_close(U_NN.T @ U_NN @ damped_hessian(C_NN), torch.eye(16, dtype=torch.float64))


def indefinite():
    """A second moment that rounding has spoiled: its smallest eigenvalue is -0.05 of its mean diagonal."""
    C_NN = correlated()
    least = torch.linalg.eigvalsh(C_NN)[0]
    shift = (least + 0.05 * C_NN.diagonal().mean()) / 1.05  # what is taken off lowers the mean as well
    return C_NN - shift * torch.eye(16, dtype=torch.float64)


def test_where_cholesky_fails_ten_times_the_damping_is_taken_and_said():
    W_MN, C_NN = weight(), indefinite()
    pruned, note = sparsegpt(W_MN, C_NN, 0.5, damping=0.01)
    assert "damping 0.01" in note and "0.1 was taken" in note
    assert torch.equal(pruned, sparsegpt(W_MN, C_NN, 0.5, damping=0.1)[0])


def test_statistics_that_no_damping_helps_are_refused():
    with pytest.raises(Refused, match="not positive definite, not even with damping 10.*prune=wanda"):
        sparsegpt(weight(), -correlated(), 0.5)


def test_sparsity_0_changes_nothing():
    W_MN, C_NN = weight(), correlated()
    C_NN[3], C_NN[:, 3] = 0, 0
    assert not mask_magnitude(W_MN, 0.0).any() and not mask_wanda(W_MN, C_NN.diagonal(), 0.0).any()
    assert torch.equal(sparsegpt(W_MN, C_NN, 0.0)[0], W_MN)


def test_a_bfloat16_weight_is_pruned_in_float32_and_rounded_once():
    W_MN, C_NN = weight().bfloat16(), correlated()
    pruned, _ = sparsegpt(W_MN, C_NN.float(), 0.5)
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned, sparsegpt(W_MN.float(), C_NN.float(), 0.5)[0].bfloat16())
    assert (pruned == 0).sum() == W_MN.numel() / 2


def adamw(parameters):
    return AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def galore(parameters):
    options = dict(lr=3e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    return GaLoreAdamW(parameters, rank=3, gap=2, scale=1.0, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adamw, galore])
def test_zeros_stay_zero_through_training_and_all_else_moves(make, dtype):
    W_MN = weight().to(dtype)
    gone_MN = mask_magnitude(W_MN, 0.5)
    pruned, other = nn.Parameter(W_MN.masked_fill(gone_MN, 0)), nn.Parameter(torch.zeros(5, dtype=dtype))
    before = pruned.detach().clone()
    optimizer = make([pruned, other])
    optimizer.register_step_post_hook(KeptZeros([pruned]))
    for step in range(6):
        assert (pruned[gone_MN] == 0).all()
        ((pruned * weight(seed=step).to(dtype)).sum() + other.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(pruned == 0, gone_MN) and (other != 0).all()
    assert (pruned != before)[~gone_MN].float().mean() > 0.9
    for parameter, master in optimizer.pairs:
        assert parameter is other or torch.equal(master == 0, gone_MN)
    assert len(optimizer.pairs) == (0 if dtype == torch.float32 else 2)


def test_the_zeros_come_back_where_something_was_added():
    frozen, full = nn.Parameter(torch.tensor([[0.0, 2.0], [3.0, 0.0]])), nn.Parameter(torch.ones(2, 2))
    zeros = KeptZeros([frozen, full])
    with torch.no_grad():
        frozen += 1
        full -= 1
    zeros.apply()
    assert frozen.tolist() == [[0, 3], [4, 0]] and full.tolist() == [[0, 0], [0, 0]]
