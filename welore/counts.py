"""Statistics of counts: how sure an accuracy is, whether two differ, and which accuracies are possible at all.

Shape suffixes: S = seeds, Q = questions, D = draws.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Z = 1.959964  # 95 %
DRAWS = 10_000  # of a bootstrap

Verdicts = Sequence[Sequence[bool]]  # by seed and question: whether the answer was right


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


def spread(verdicts: Verdicts) -> tuple[float, float]:
    """95 % of the shares of right answers when both the seeds and the questions are drawn anew (bootstrap).

    Few seeds say little of how much seeds vary: with two or three it is rather too narrow.
    """
    (shares_D,) = _drawn([verdicts])
    low, high = shares_D.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, min(high, 1.0)


def differ(ours: Verdicts, theirs: Verdicts) -> float:
    """The two-sided p-value that two methods are as often right, over seeds and questions (paired bootstrap).

    The questions are drawn for both at once, the seeds for each alone: a p-value that is too large where every answer
    is luck by itself. No less than 2 / DRAWS.
    """
    ours_D, theirs_D = _drawn([ours, theirs])
    sides = [int((ours_D <= theirs_D).sum()), int((ours_D >= theirs_D).sum())]
    return min(1.0, 2 * (min(sides) + 1) / (DRAWS + 1))


def _drawn(methods: Sequence[Verdicts]) -> list[Tensor]:
    """The share of right answers of each method in every draw; the same draws whenever they are asked for."""
    generator = torch.Generator().manual_seed(0)
    right = [torch.tensor(verdicts, dtype=torch.float64) for verdicts in methods]
    questions_DQ = _weights(right[0].shape[1], generator)
    return [((_weights(len(right_SQ), generator) @ right_SQ) * questions_DQ).sum(1) for right_SQ in right]


def _weights(count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` is drawn of as many, as shares, for each draw."""
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    ones = torch.full(drawn.shape, 1 / count, dtype=torch.float64)
    return torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, ones)


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
