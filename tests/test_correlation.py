"""Rank correlations with intervals: known values, controls, and groups that are not independent."""

import math

import pytest
import torch

from welore.correlation import Interval, curve, mean, spearman


def normal(count):
    return torch.randn(count, dtype=torch.float64)


def test_the_correlation_is_one_for_any_rising_function_and_minus_one_for_any_falling():
    x = normal(30)
    assert spearman(x.tolist(), x.exp().tolist(), range(30)).value == pytest.approx(1)
    assert spearman(x.tolist(), (-(x**3)).tolist(), range(30)).value == pytest.approx(-1)


def test_ties_share_their_mean_rank():
    # By hand: ranks 1.5 1.5 3 4 and 1 2 3.5 3.5, centered products sum to 4, squares to 4.5 each.
    assert spearman([1, 1, 2, 3], [5, 6, 7, 7], range(4)).value == pytest.approx(4 / 4.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for _ in range(40):
        x = normal(60)
        y = 0.5 * x + math.sqrt(0.75) * normal(60)
        found = spearman(x.tolist(), y.tolist(), range(60))
        held += found.low <= 6 / math.pi * math.asin(0.5 / 2) <= found.high
    assert held >= 34


def test_a_control_takes_away_what_both_have_from_it_and_no_more():
    z = normal(300)
    x, y = z + 0.5 * normal(300), z + 0.5 * normal(300)
    groups = range(300)
    assert spearman(x.tolist(), y.tolist(), groups).sign == 1
    assert abs(spearman(x.tolist(), y.tolist(), groups, [z.tolist()]).value) < 0.15
    y = y + x
    assert spearman(x.tolist(), y.tolist(), groups, [z.tolist()]).sign == 1


def test_one_control_is_the_textbook_formula():
    x, y, z = (normal(50).tolist() for _ in range(3))
    xy, xz, yz = (spearman(a, b, range(50)).value for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, range(50), [z]).value == pytest.approx(expected)


def test_rows_of_one_group_count_as_one():
    x, y = normal(12), normal(12)
    repeated = [value for value in x.tolist() for _ in range(10)], [value for value in y.tolist() for _ in range(10)]
    alone = spearman(x.tolist(), y.tolist(), range(12))
    together = spearman(*repeated, [group for group in range(12) for _ in range(10)])
    apart = spearman(*repeated, range(120))
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_what_is_constant_correlates_with_nothing():
    found = spearman([1.0] * 9, normal(9).tolist(), range(9))
    assert math.isnan(found.value) and found.sign is None


def test_the_curve_is_that_of_a_parabola_whatever_the_scale():
    x = list(range(9))
    y = [3 + 2 * (value - 4) / 4 - 5 * ((value - 4) / 4) ** 2 for value in x]
    found = curve(x, y, x)
    assert found.value == pytest.approx(-5) and found.sign == -1
    assert curve([10 * value for value in x], y, x).value == pytest.approx(-5)


def test_a_mean_has_the_width_of_its_standard_error():
    y = normal(400)
    found = mean(y.tolist(), range(400))
    assert found.value == pytest.approx(float(y.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(y.std()) / 20, rel=0.1)


def test_an_interval_reads_as_a_number_with_its_bounds():
    assert str(Interval(0.5, -0.125, 0.75, 9)) == "+0.50 (-0.12 to +0.75)"
