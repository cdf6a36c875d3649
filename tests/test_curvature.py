"""Lanczos against dense Hessians in float64, the gaps, and the quadratic on which Theorem 2.2 does not hold."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from welore.curvature import check_trains, gaps, gauss_newton, hessian, lanczos, outside, trace
from welore.errors import Refused

IDS = torch.tensor([[1, 5, 3, 9, 2, 7, 7, 4], [8, 2, 6, 1, 1, 3, 10, 5]])
WEIGHTS = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"]


@pytest.fixture(scope="module")
def small():
    """A LLaMA of two layers small enough that the Hessian of a weight can be written down."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model("llama", num_key_value_heads=1, max_position_embeddings=16, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def logits_of(model, **changed):
    return functional_call(model, changed, kwargs={"input_ids": IDS}).logits[:, :-1].flatten(0, 1)


def loss_of(logits_TV):
    return torch.nn.functional.cross_entropy(logits_TV, IDS[:, 1:].flatten())


def dense_hessian(model, name):
    weight = model.get_parameter(name).detach()
    H = torch.autograd.functional.hessian(lambda W: loss_of(logits_of(model, **{name: W})), weight)
    return H.reshape(weight.numel(), weight.numel())


def dense_gauss_newton(model, name):
    weight = model.get_parameter(name).detach()
    J = torch.autograd.functional.jacobian(lambda W: logits_of(model, **{name: W}), weight).flatten(2)
    p = logits_of(model).detach().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("tvd,tvw,twe->de", J, H, J) / len(p)


DENSE = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}
PRODUCTS = {
    "hessian": lambda model, weight: hessian(loss_of(logits_of(model)), weight),
    "gauss_newton": lambda model, weight: gauss_newton(logits_of(model), weight),
}


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", list(DENSE))
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_largest_eigenvalues_are_those_of_the_dense_matrix(small, name, kind):
    weight = small.get_parameter(name)
    reference = torch.linalg.eigvalsh(DENSE[kind](small, name)).flip(0)
    found = lanczos(PRODUCTS[kind](small, weight), weight, 5, 24, generator())
    assert ((found.values_K - reference[:5]).abs() <= 0.01 * reference[:5].abs()).all()
    assert (found.residuals_K[:3] < 0.01 * reference[0]).all()


def test_residuals_say_how_far_a_vector_is_from_an_eigenvector(small):
    weight, H = small.get_parameter(WEIGHTS[1]), dense_hessian(small, WEIGHTS[1])
    found = lanczos(PRODUCTS["hessian"](small, weight), weight, 4, 9, generator())
    V = found.vectors_KMN.flatten(1)
    torch.testing.assert_close((V @ H - found.values_K[:, None] * V).norm(dim=1), found.residuals_K)
    torch.testing.assert_close(V @ V.T, torch.eye(4, dtype=torch.float64))


def test_a_whole_run_gives_the_whole_spectrum_down_to_the_lowest(small):
    weight, H = small.get_parameter(WEIGHTS[0]), dense_hessian(small, WEIGHTS[0])
    found = lanczos(PRODUCTS["hessian"](small, weight), weight, 3, 10**6, generator())
    assert found.steps <= weight.numel()
    assert found.lowest == pytest.approx(float(torch.linalg.eigvalsh(H)[0]), rel=1e-6)
    assert found.lowest < 0


def test_gauss_newton_curves_up_everywhere(small):
    weight = small.get_parameter(WEIGHTS[0])
    assert lanczos(PRODUCTS["gauss_newton"](small, weight), weight, 3, 32, generator()).lowest > -1e-12


def test_the_trace_is_that_of_the_dense_matrix(small):
    weight, H = small.get_parameter(WEIGHTS[1]), dense_gauss_newton(small, WEIGHTS[1])
    product = PRODUCTS["gauss_newton"](small, weight)
    eigen = lanczos(product, weight, 10, 30, generator())
    assert trace(product, eigen, 60, generator()) == pytest.approx(float(H.trace()), rel=0.02)


def test_lanczos_finds_a_repeated_eigenvalue_once_and_ends_where_its_space_does():
    A = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    like = torch.zeros(2, 3, dtype=torch.float64)
    found = lanczos(lambda V: (A @ V.flatten()).reshape(2, 3), like, 6, 6, generator())
    assert found.steps == 3
    torch.testing.assert_close(found.values_K, torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))


def test_a_loss_that_is_linear_in_a_weight_has_no_curvature_in_it():
    W = torch.randn(2, 3, requires_grad=True)
    found = lanczos(hessian((W * torch.ones(2, 3)).sum(), W), W, 2, 5, generator())
    assert float(found.values_K.abs().max()) == 0


def test_gaps_of_a_known_spectrum():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    found = gaps(values, 16.0, 3)
    expected = {
        "first": 4,
        "ratio": 2,
        "fall": 0.75,
        "dominance": 4,
        "assumed": 1,
        "relative": 1 / 8,
        "share": 14 / 16,
    }
    assert found == pytest.approx(expected)
    scaled = gaps(10 * values, 160.0, 3)
    assert {key for key in found if scaled[key] != pytest.approx(found[key])} == {"first", "assumed"}


def test_a_gap_needs_an_eigenvalue_beyond_r():
    with pytest.raises(Refused, match="r=5 needs r >= 2 and 6 eigenvalues, and there are 5"):
        gaps(torch.ones(5), 5.0, 5)


def test_the_share_outside_is_that_of_a_projection_and_by_chance_nearly_all():
    U = torch.linalg.qr(torch.randn(60, 5)).Q.T.reshape(5, 6, 10)
    assert outside((U * torch.randn(5, 1, 1)).sum(0), U) == pytest.approx(0, abs=1e-6)
    found = [outside(torch.randn(6, 10), U) ** 2 for _ in range(400)]
    assert sum(found) / 400 == pytest.approx(1 - 5 / 60, abs=0.01)
    assert math.isnan(outside(torch.zeros(6, 10), U))


def test_gradient_descent_on_a_quadratic_leaves_the_top_eigenspace():
    """Theorem 2.2 says that this ratio goes to 0. The steep direction is learned first, and the ratio goes to 1."""
    H, x, step = torch.diag(torch.tensor([10.0, 1.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64), 0.05
    like = torch.zeros(1, 2, dtype=torch.float64)
    top = lanczos(lambda V: (H @ V.flatten()).reshape(1, 2), like, 1, 2, generator()).vectors_KMN
    ratios = []
    for _ in range(41):
        ratios.append(outside((H @ x).reshape(1, 2), top))
        x = x - step * H @ x
    assert ratios[0] == pytest.approx(1 / math.sqrt(101), abs=1e-4)  # 0.0995
    assert ratios[5] == pytest.approx(0.927, abs=1e-3)
    assert ratios[40] > 0.9999
    assert ratios == sorted(ratios)


def test_a_frozen_weight_is_refused_by_its_name():
    with pytest.raises(Refused, match="q_proj.weight is frozen"):
        check_trains(torch.zeros(2, 2), "q_proj.weight")
    with pytest.raises(Refused, match="q_proj.weight holds torch.int8"):
        check_trains(torch.zeros(2, 2, dtype=torch.int8), "q_proj.weight")


def test_an_attention_kernel_that_is_differentiable_once_is_named():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with pytest.raises(Refused, match="only once .*flash_attention.*math kernel"):
        hessian(attended.square().sum(), q)(torch.ones_like(q))
