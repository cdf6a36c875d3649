import pytest
import torch

from welore.errors import Refused
from welore.moments import Moments, Needs, check_finite, damped, quadratic, roots, times


def positive(size, rank=None):
    X = torch.randn(size, rank or 3 * size, dtype=torch.float64)
    return X @ X.T


def test_each_level_of_need_holds_those_below_it():
    assert Needs.NOTHING < Needs.INPUTS < Needs.GRADIENTS < Needs.WEIGHT_GRADIENTS
    assert not Needs.NOTHING and all(list(Needs)[1:])


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.5])
def test_damping_moves_the_eigenvalues_towards_their_mean_and_keeps_the_trace(share):
    C = positive(6, rank=3)
    values, ours = torch.linalg.eigvalsh(C), torch.linalg.eigvalsh(damped(C, share))
    torch.testing.assert_close(ours, (1 - share) * values + share * values.mean(), rtol=0, atol=1e-12)
    assert damped(C, share).trace() == pytest.approx(float(C.trace()))


def test_a_diagonal_is_damped_as_the_matrix_with_that_diagonal():
    diagonal = torch.rand(5)
    torch.testing.assert_close(damped(diagonal, 0.2), damped(torch.diag(diagonal), 0.2).diagonal())
    assert damped(diagonal, 0.2).dtype == torch.float64


@pytest.mark.parametrize("nothing", [torch.zeros(4), torch.zeros(4, 4)])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_metric_of_a_weight_that_saw_nothing_is_the_identity(nothing, share):
    rows = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(times(rows, damped(nothing, share)), rows)


def test_the_root_squared_is_the_metric_and_its_inverse_undoes_it():
    C = positive(7)
    root, inverse, safer = roots(C)
    torch.testing.assert_close(root @ root, C)
    torch.testing.assert_close(root @ inverse, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(root, root.T)
    assert safer is None
    diagonal_root, diagonal_inverse, _ = roots(C.diagonal())
    torch.testing.assert_close(torch.diag(diagonal_root), roots(torch.diag(C.diagonal()))[0])
    torch.testing.assert_close(diagonal_root * diagonal_inverse, torch.ones(7, dtype=torch.float64))
    assert roots(None) == (None, None, None)


def test_a_direction_that_was_never_seen_has_a_millionth_of_the_largest_root():
    """The root of 1e-12, so that nothing is divided by 0."""
    seen = positive(6, rank=2)
    root, inverse, _ = roots(seen)
    values = torch.linalg.eigvalsh(root)
    assert values[0] == pytest.approx(1e-6 * float(values[-1]), rel=1e-3)
    assert inverse.isfinite().all()
    dead = torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)
    assert roots(dead)[0].tolist() == pytest.approx([2, 2e-6, 1])


def fails(*_):
    raise torch.linalg.LinAlgError("linalg: did not converge\nmore")


def test_where_eigh_of_a_metric_fails_its_svd_gives_the_same_roots_and_a_note(monkeypatch):
    C = positive(7)
    expected = roots(C)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    root, inverse, safer = roots(C)
    torch.testing.assert_close(root, expected[0])
    torch.testing.assert_close(inverse, expected[1])
    assert safer == "eigh failed (linalg: did not converge): svd of the metric"
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(Refused, match=r"neither eigh .* nor svd of the metric converges"):
        roots(C)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "matrix"])
def test_the_quadratic_form_of_a_row_is_its_squared_length_after_the_root(kind):
    metric = {"identity": None, "diagonal": torch.rand(5, dtype=torch.float64) + 0.1, "matrix": positive(5)}[kind]
    rows = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(quadratic(rows, metric), times(rows, roots(metric)[0]).square().sum(1))


@pytest.mark.parametrize("field", ["inputs_NN", "gradients_MM", "fisher_N", "gradient_MN"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name_and_kind(field, bad):
    shapes = {"inputs_NN": (3, 3), "absolute_N": (3,), "gradients_MM": (2, 2), "fisher_N": (3,), "gradient_MN": (2, 3)}
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    check_finite(Moments(8, **tensors), "a.weight")
    tensors[field].view(-1)[1] = bad
    with pytest.raises(Refused, match=rf"a\.weight \({field.split('_')[0]}\)"):
        check_finite(Moments(8, **tensors), "a.weight")
