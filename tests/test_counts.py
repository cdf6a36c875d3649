import math
import random
from fractions import Fraction
from itertools import product

import pytest
import torch

from welore.counts import above_chance, differ, is_possible, mcnemar, spread, wilson


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
    assert differ([[True, False]] * 2, [[True, False]] * 3) == 1.0


def verdicts(generator, seeds, questions, share):
    return (torch.rand(seeds, questions, generator=generator) < share).tolist()


def test_one_seed_spreads_as_wilson_says():
    found = verdicts(torch.Generator().manual_seed(1), 1, 400, 0.7)
    assert spread(found) == pytest.approx(wilson(sum(found[0]), 400), abs=0.01)


def test_the_spread_of_equal_questions_is_that_of_seeds():
    """All questions of a seed alike: the mean of three draws of (0, 0, 1), which is 0 in 8 of 27."""
    assert spread([[False] * 9, [False] * 9, [True] * 9]) == (0.0, 1.0)
    assert spread([[True, False]] * 50) == (0.0, 1.0)  # two questions, drawn for all seeds at once


def test_two_methods_that_are_alike_differ_as_often_as_p_says():
    """Of 200 pairs whose seeds agree about 5 % have p < 0.05, and fewer where each answer is drawn by itself."""
    generator = torch.Generator().manual_seed(2)
    agreed = [differ(*(verdicts(generator, 1, 60, 0.5) * 3 for _ in range(2))) for _ in range(200)]
    alone = [differ(*(verdicts(generator, 5, 60, 0.5) for _ in range(2))) for _ in range(200)]
    assert 3 <= sum(p < 0.05 for p in agreed) <= 20 and sum(p < 0.05 for p in alone) <= 10


def test_questions_are_paired():
    """One more right answer on every fifth question is sure, and unsure where the right ones are elsewhere."""
    theirs = [[place % 2 == 0 for place in range(100)]] * 3
    ours = [[place % 2 == 0 or place % 5 == 0 for place in range(100)]] * 3
    assert differ(ours, theirs) < 0.01 < 0.1 < differ([row[::-1][1:] + [True] for row in theirs], theirs)


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
