import pytest
import torch
from torch import nn

from welore.lowrank import LowRankLinear, break_even_rank, replace


@pytest.mark.parametrize("biased", [False, True])
def test_a_low_rank_layer_computes_a_times_b_times_x_plus_bias(biased):
    A_MR, B_RN, bias_M, x = torch.randn(7, 3), torch.randn(3, 5), torch.randn(7), torch.randn(2, 4, 5)
    layer = LowRankLinear.of(A_MR, B_RN, bias_M if biased else None)
    expected = x @ (A_MR @ B_RN).T + (bias_M if biased else 0)
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 3 * (7 + 5) + (7 if biased else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_dense_layer_of_the_product_rounded_once(dtype):
    A_MR, B_RN, bias_M = torch.randn(7, 3).to(dtype), torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype)
    dense = LowRankLinear.of(A_MR, B_RN, bias_M).merged()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, (A_MR.float() @ B_RN.float()).to(dtype))
    assert torch.equal(dense.bias, bias_M)


def test_wrapping_factors_copies_nothing():
    A_MR, B_RN = torch.randn(7, 3), torch.randn(3, 5)
    layer = LowRankLinear.of(A_MR, B_RN)
    assert (layer.A.weight.data_ptr(), layer.B.weight.data_ptr()) == (A_MR.data_ptr(), B_RN.data_ptr())


@pytest.mark.parametrize("shape", [(8, 8), (16, 44), (44, 16), (7, 5), (3, 2), (2, 2)])
def test_the_break_even_rank_is_the_last_that_saves_parameters(shape):
    M, N = shape
    saving = [rank for rank in range(1, min(shape) + 1) if rank * (M + N) < M * N]
    assert break_even_rank(shape) == max(saving, default=0)


@pytest.mark.parametrize("training", [False, True])
def test_a_replacement_is_in_the_training_state_of_what_it_takes_the_place_of(training):
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 7))).train(training)
    layer = LowRankLinear(5, 7, 2).train(not training)
    replace(model, "0.0", layer)
    assert model[0][0] is layer and layer.training == layer.A.training == training
