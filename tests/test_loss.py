import pytest
import torch
import torch.nn.functional as F

from welore import loss
from welore.loss import IGNORED, cross_entropy, linear_cross_entropy

V, D = 23, 9


@pytest.fixture(autouse=True)
def chunks_of_16_tokens(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    assert loss.chunk_tokens(V) == 16


def inputs(tokens):
    """Hidden states, an output matrix and labels of which about a quarter is not scored."""
    labels_T = torch.randint(0, V, (tokens,)).masked_fill(torch.rand(tokens) < 0.25, IGNORED)
    return torch.randn(tokens, D), torch.randn(V, D), torch.randn(V), labels_T


def reference(hidden_TD, W_VD, bias_V, labels_T, weight=1.0):
    """torch's own cross-entropy, with its gradient, in float64."""
    hidden_TD = hidden_TD.double().detach().requires_grad_()
    logits_TV = F.linear(hidden_TD, W_VD.double(), None if bias_V is None else bias_V.double())
    total = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")
    (weight * total).backward()
    return total.detach(), hidden_TD.grad


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48, 50])
@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_loss_is_cross_entropy_in_value_and_gradient(tokens, biased):
    hidden_TD, W_VD, bias_V, labels_T = inputs(tokens)
    bias_V = bias_V if biased else None
    labels_T[0] = 3  # at least one is scored
    expected, expected_TD = reference(hidden_TD, W_VD, bias_V, labels_T, weight=2.5)
    hidden_TD.requires_grad_()
    total = linear_cross_entropy(hidden_TD, W_VD, bias_V, labels_T)
    (2.5 * total).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_TD.grad.double(), expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
def test_the_loss_of_logits_is_cross_entropy_in_value_and_gradient(tokens):
    hidden_TD, W_VD, bias_V, labels_T = inputs(tokens)
    expected, expected_TD = reference(hidden_TD, W_VD, bias_V, labels_T)
    hidden_TD.requires_grad_()
    total = cross_entropy(F.linear(hidden_TD, W_VD, bias_V), labels_T)
    total.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_TD.grad.double(), expected_TD, rtol=1e-4, atol=1e-5)


def test_labels_that_are_all_ignored_give_no_loss_and_no_gradient():
    hidden_TD, W_VD, bias_V, labels_T = inputs(20)
    hidden_TD.requires_grad_()
    total = linear_cross_entropy(hidden_TD, W_VD, bias_V, labels_T.fill_(IGNORED))
    total.backward()
    assert total == 0 and torch.equal(hidden_TD.grad, torch.zeros(20, D))


def test_under_autocast_the_products_are_bfloat16_and_the_gradient_returns_in_float32():
    hidden_TD, W_VD, bias_V, labels_T = inputs(40)
    rounded = hidden_TD.bfloat16(), W_VD.bfloat16(), bias_V.bfloat16(), labels_T
    expected, expected_TD = reference(*rounded)
    hidden_TD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden_TD, W_VD, bias_V, labels_T)
    total.backward()
    assert total.dtype == hidden_TD.grad.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(hidden_TD.grad.double(), expected_TD, rtol=0, atol=0.05)


def test_an_output_matrix_that_trains_is_refused_rather_than_left_without_gradient():
    hidden_TD, W_VD, _, labels_T = inputs(4)
    with pytest.raises(ValueError, match="output matrix trains"):
        linear_cross_entropy(hidden_TD, W_VD.requires_grad_(), None, labels_T)
    with torch.no_grad():
        assert linear_cross_entropy(hidden_TD, W_VD, None, labels_T).isfinite()
