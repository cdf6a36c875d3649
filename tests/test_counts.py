import math
import random
from fractions import Fraction
from itertools import product

import pytest

from welore.counts import above_chance, is_possible, mcnemar, sign_flips, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # The published worked values of the score interval: 8 of 10, 0 of 20, 75 of 150.
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (75, 150, 0.4209, 0.5791)],
)
def test_wilsons_interval_has_its_known_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilsons_bounds_are_where_the_score_test_turns():
    for k, n in [(3, 9), (60, 150), (1, 74)]:
        for bound in wilson(k, n):
            z = abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_mcnemar_is_the_share_of_all_signs_at_least_as_one_sided():
    draw = random.Random(0)
    for _ in range(20):
        pairs = [(draw.random() < 0.6, draw.random() < 0.4) for _ in range(9)]
        signs = [a - b for a, b in pairs if a != b]
        extreme = [abs(sum(drawn)) >= abs(sum(signs)) for drawn in product([-1, 1], repeat=len(signs))]
        assert mcnemar(*zip(*pairs, strict=True)) == pytest.approx(sum(extreme) / len(extreme))


def test_two_methods_with_the_same_answers_do_not_differ():
    assert mcnemar([True, False], [True, False]) == 1.0
    assert sign_flips([]) == sign_flips([0, 0]) == sign_flips([1, -1]) == 1.0


def test_sign_flips_are_counted_exactly():
    draw = random.Random(1)
    for _ in range(20):
        found = [draw.randint(-3, 3) for _ in range(9)]
        extreme = [
            abs(sum(s * d for s, d in zip(signs, found, strict=True))) >= abs(sum(found))
            for signs in product([-1, 1], repeat=9)
        ]
        assert sign_flips(found) == pytest.approx(sum(extreme) / len(extreme))


def test_sign_flips_of_ones_are_mcnemars_test():
    ours, theirs = [True] * 40 + [False] * 9, [True] * 25 + [False] * 20 + [True] * 4
    assert sign_flips([a - b for a, b in zip(ours, theirs, strict=True)]) == pytest.approx(mcnemar(ours, theirs))


def test_the_chance_of_guessing_sums_to_one():
    assert above_chance(0, 12, 0.3) == pytest.approx(1.0)
    assert above_chance(2, 2, 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize(("k", "n"), [(1, 5), (60, 100), (1700, 3270), (5000, 9810)])
def test_the_chance_of_guessing_is_exact_for_any_number_of_questions(k, n):
    exact = Fraction(sum(math.comb(n, i) for i in range(k, n + 1)), 2**n)
    assert above_chance(k, n, 0.5) == pytest.approx(float(exact), rel=1e-9)


def test_nobody_is_above_a_certain_guess():
    assert above_chance(3, 3, 1.0) == 1.0 and above_chance(1, 3, 0.0) == 0.0


@pytest.mark.parametrize(
    ("percent", "n", "possible"),
    [
        ("98.667", 150, True),  # 148 of 150
        ("98.666", 150, True),  # the same, cut
        ("51.333", 150, True),
        ("94.666", 150, True),
        ("90.224", 74, False),
        ("83.742", 74, False),
        ("75.000", 150, False),  # 112.5 of 150
        ("40.672", 300, False),
        ("40.667", 300, True),
        ("88.189", 3270, False),
    ],
)
def test_an_accuracy_is_possible_only_as_a_whole_number_of_answers(percent, n, possible):
    rounded = any(
        f"{100 * k / n:.3f}" == percent or f"{math.floor(1e5 * k / n) / 1e3:.3f}" == percent for k in range(n + 1)
    )
    assert rounded == possible  # by enumeration
    assert is_possible(percent, n) == possible
