"""Ranks from a share for every weight: what is left of the budget by clipping and rounding goes to the others.

Shape suffix: L = weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from welore.budget import DENSE_RULES, Budget
from welore.svd import Spectrum


@dataclass(frozen=True)
class Slot:
    """How a share of one weight becomes a rank, and what that costs."""

    full: float  # the rank, not rounded, at which the share is 1
    cap: int  # the largest rank at which the weight is factored
    price: int
    whole: int

    @classmethod
    def of(cls, shape: tuple[int, int], budget: Budget, dense: str) -> "Slot":
        price, whole = budget.price(shape), budget.dense_price(shape)
        return cls(whole / price, min(DENSE_RULES[dense](shape), (whole - 1) // price), price, whole)

    def rank(self, share: float) -> int:
        """At least 1, rounded down; any rank above the cap stands for dense."""
        return self.cap + 1 if share >= 1 else max(1, int(share * self.full + 1e-9))

    def cost(self, rank: int) -> int:
        return rank * self.price if rank <= self.cap else self.whole


def fill(
    wish: Callable[[float], Tensor],
    low: float,
    high: float,
    spectra: dict[str, Spectrum],
    budget: Budget,
    dense: str,
) -> dict[str, int | None]:
    """The ranks of a family that grows with one number, at the number that meets the budget.

    `wish` gives the real-valued share of every weight: of its ranks under err, of its parameters under keep. Shares
    are clipped to rank 1 and to dense, so what one weight cannot take goes to the others. Ranks are rounded down, and
    what is left of the budget buys single ranks, those with the largest fraction first.
    """
    weights = [Slot.of(spectrum.shape, budget, dense) for spectrum in spectra.values()]
    limit = budget.limit(spectra)

    def cost(at: float) -> int:
        return sum(w.cost(w.rank(share)) for w, share in zip(weights, wish(at).tolist(), strict=True))

    budget.refuse_below(cost(low), spectra, f"or choose another ranks.dense ({', '.join(DENSE_RULES)})")
    if cost(high) <= limit:
        low = high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    shares = wish(low).tolist()
    ranks = [w.rank(share) for w, share in zip(weights, shares, strict=True)]
    fractions = [share * w.full - rank for w, share, rank in zip(weights, shares, ranks, strict=True)]
    order = sorted(range(len(ranks)), key=lambda index: -fractions[index])
    _top_up(ranks, order, weights, limit - cost(low))
    return {name: r if r <= w.cap else None for name, w, r in zip(spectra, weights, ranks, strict=True)}


def _top_up(ranks: list[int], order: list[int], weights: list[Slot], left: int) -> None:
    """One rank more for every weight in turn, until none fits."""
    bought = True
    while bought:
        bought = False
        for index in order:
            step = weights[index].cost(ranks[index] + 1) - weights[index].cost(ranks[index])
            if 0 < step <= left:
                ranks[index], left, bought = ranks[index] + 1, left - step, True
