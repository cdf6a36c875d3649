"""Statistics of counts: how sure an accuracy is, whether two differ, and which accuracies are possible at all."""

import math
from collections.abc import Sequence

import torch

Z = 1.959964  # 95 %


def wilson(k: float, n: int, z: float = Z) -> tuple[float, float]:
    """The interval of a share of which k of n were seen (Wilson's score interval); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, width = k / n, z * z / n
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / n + width / (4 * n)) / (1 + width)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The two-sided p-value that two methods are as often right on the same questions (exact, binomial).

    Only questions that one of them answered right and the other wrong count.
    """
    won = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, tail * 2 / 2**n)


def sign_flips(differences: Sequence[int]) -> float:
    """The two-sided p-value that differences are as likely to have the other sign, each for itself (exact).

    Of differences of -1, 0 and 1 it is that of `mcnemar`.
    """
    sizes = [abs(difference) for difference in differences if difference]
    most, seen = sum(sizes), abs(sum(differences))
    chances = torch.zeros(2 * most + 1, dtype=torch.float64)  # of each sum from -most to most
    chances[most] = 1.0
    for size in sizes:
        chances = (chances.roll(size) + chances.roll(-size)) / 2
    extreme = (torch.arange(-most, most + 1).abs() >= seen).double()
    return min(1.0, float((chances * extreme).sum()))


def above_chance(k: int, n: int, chance: float) -> float:
    """The p-value of k or more of n right by guessing, each right with probability `chance`."""
    if k <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    # In logarithms: the number of ways to be right has hundreds of digits.
    ways = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k, n + 1))
    logs = (way + i * math.log(chance) + (n - i) * math.log1p(-chance) for i, way in enumerate(ways, k))
    return min(1.0, math.fsum(map(math.exp, logs)))


def is_possible(percent: str, n: int) -> bool:
    """Whether a printed percentage is k / n for some whole k, rounded or cut to its digits (the GRIM test)."""
    digits = len(percent.partition(".")[2])
    step = 10**-digits
    value = float(percent)
    k = round(value * n / 100)
    near = [100 * i / n for i in (k - 1, k, k + 1) if 0 <= i <= n]
    return any(abs(share - value) <= step / 2 + 1e-9 or 0 <= share - value < step - 1e-9 for share in near)
