"""One price for every rank of the model: the Lagrangian allocator.

    maximize sum_l E_l(x_l)   such that   sum_l cost_l(x_l) <= budget,      x_l = argmax E_l(x) - price * cost_l(x)

E_l(r) is what the first r components of weight l are worth, and dense is an option of every weight, worth them all.
For decreasing component values this is a threshold: keep those worth at least price * cost. WeLore is the case of
normalized singular values, where every rank costs 1 and no weight is better off dense.

Shape suffixes: L = weights, O = options of one, K = ranks of one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from welore.budget import DENSE_RULES, Budget, Plan, check_option, tally
from welore.errors import Refused
from welore.moments import Needs
from welore.ranks import COORDINATES, Evidence, Ranks, block_of, check_multiple
from welore.svd import Spectrum
from welore.zerosum import zero_sum

FLIPS = 4  # weights that are nearly as good dense as factored, and are tried the other way round at the end


def squared_over(sigma_K: Tensor, scale: Tensor) -> Tensor:
    """(sigma / scale)^2, and no value at all where the scale is 0."""
    return torch.zeros_like(sigma_K) if scale == 0 else (sigma_K / scale) ** 2


def fisher(spectrum: Spectrum) -> Tensor:
    """What K-FAC says that each component is worth, where svd= has other coordinates than those of K-FAC."""
    if spectrum.fisher_K is None:
        raise Refused(
            "ranks.value=fisher needs output gradients, and these spectra have none. Write ranks.value=energy."
        )
    return spectrum.fisher_K.clamp(min=0)


# What one component is worth. Between weights sigma^2 compares only where it is a loss: doubled nats for svd=kfac.
VALUES: dict[str, Callable[[Spectrum], Tensor]] = {
    "energy": lambda spectrum: spectrum.sigma_K**2,
    "relative": lambda spectrum: squared_over(spectrum.sigma_K, spectrum.sigma_K.norm()),
    "normalized": lambda spectrum: squared_over(spectrum.sigma_K, spectrum.sigma_K[0]),
    "quantile": lambda spectrum: squared_over(spectrum.sigma_K, spectrum.sigma_K.quantile(0.99)),
    "fisher": fisher,
}
FIRST_ORDER = "first_order"


@dataclass(frozen=True)
class Menu:
    """The options of every weight: column i is rank (i + 1) * multiple, the last one dense; -inf is no option."""

    value_LO: Tensor
    cost_LO: Tensor

    @classmethod
    def of(
        cls, values: list[Tensor], shapes: list[tuple[int, int]], budget: Budget, dense: str, multiple: int
    ) -> "Menu":
        """A rank that the dense rule forbids, or that costs as much as the dense weight, is no option."""
        columns = max(len(value_K) // multiple for value_K in values) + 1
        value_LO = torch.full((len(values), columns), -math.inf, dtype=torch.float64)
        cost_LO = torch.zeros_like(value_LO)
        for row, (value_K, shape) in enumerate(zip(values, shapes, strict=True)):
            price, whole = budget.price(shape), budget.dense_price(shape)
            count = min(DENSE_RULES[dense](shape), (whole - 1) // price) // multiple
            worth_K = value_K.double().cumsum(0)
            value_LO[row, :count] = worth_K[multiple - 1 :: multiple][:count]
            value_LO[row, -1] = worth_K[-1]
            cost_LO[row] = torch.arange(1, columns + 1, dtype=torch.float64) * multiple * price
            cost_LO[row, -1] = whole
        return cls(value_LO, cost_LO)

    def best(self, price: float) -> Tensor:
        """The option of every weight that is worth most after paying; of equal ones the cheapest."""
        return torch.add(self.value_LO, self.cost_LO, alpha=-price).argmax(1)

    def cost(self, choice_L: Tensor) -> float:
        return float(self.cost_LO.gather(1, choice_L[:, None]).sum())

    def value(self, choice_L: Tensor) -> float:
        return float(self.value_LO.gather(1, choice_L[:, None]).sum())

    def cheapest(self) -> Tensor:
        return self.cost_LO.masked_fill(self.value_LO.isinf(), math.inf).argmin(1)

    def flipped(self, row: int, dense: bool) -> "Menu":
        """The same menu in which one weight must be dense, or must not be."""
        value_LO = self.value_LO.clone()
        if dense:
            value_LO[row, :-1] = -math.inf
        else:
            value_LO[row, -1] = -math.inf
        return replace(self, value_LO=value_LO)

    def upgrade(self, row: int, option: int, left: float) -> tuple[float, int]:
        """The costlier option of a weight that gains most per price and fits into what is left: (slope, option)."""
        step_O = self.cost_LO[row] - self.cost_LO[row, option]
        gain_O = self.value_LO[row] - self.value_LO[row, option]
        fits = (step_O > 0) & (step_O <= left) & (gain_O > 0)
        slope_O = torch.where(fits, gain_O / step_O, 0.0)
        best = int(slope_O.argmax())
        return float(slope_O[best]), best


def bisect_price(menu: Menu, limit: float) -> tuple[Tensor, float]:
    """The lowest price at which the best options fit the limit, and those options."""
    low_L = menu.cheapest()
    gain_LO = menu.value_LO - menu.value_LO.gather(1, low_L[:, None])
    step_LO = menu.cost_LO - menu.cost_LO.gather(1, low_L[:, None])
    high = float(torch.where((step_LO > 0) & (gain_LO > 0), gain_LO / step_LO, 0.0).max()) * (1 + 1e-9)
    free_L = menu.best(0.0)
    if high == 0 or menu.cost(free_L) <= limit:
        return free_L, 0.0
    low, choice_L = high * 1e-18, low_L
    while high > low * (1 + 1e-12):
        price = math.sqrt(low * high)
        tried_L = menu.best(price)
        if (cost := menu.cost(tried_L)) <= limit:
            high, choice_L = price, tried_L
            if cost == limit:
                break
        else:
            low = price
    return choice_L, high


def spend(menu: Menu, choice_L: Tensor, limit: float) -> Tensor:
    """Buy what still fits, the most value per price first, until nothing of value does."""
    choice, left = choice_L.tolist(), limit - menu.cost(choice_L)
    offers = [menu.upgrade(row, option, left) for row, option in enumerate(choice)]
    while True:
        row = max(range(len(offers)), key=lambda index: offers[index][0])
        slope, option = offers[row]
        if slope == 0:
            return torch.tensor(choice)
        step = float(menu.cost_LO[row, option] - menu.cost_LO[row, choice[row]])
        if step <= left:
            choice[row], left = option, left - step
        offers[row] = menu.upgrade(row, choice[row], left)


def allocate(menu: Menu, limit: float) -> tuple[Tensor, float]:
    """The best options within the limit, and their price: optimal but for the last component that fits.

    The jump to dense is not concave: one weight may be left for which dense does not fit any more although another
    split would have made room. So the weights that are nearest to being as good the other way are tried that way.
    """
    choice_L, price = bisect_price(menu, limit)
    best_L = spend(menu, choice_L, limit)
    score_LO = menu.value_LO - price * menu.cost_LO
    gap_L = score_LO[:, -1] - (score_LO[:, :-1].amax(1) if score_LO.shape[1] > 1 else -math.inf)
    for row in gap_L.abs().argsort()[:FLIPS].tolist():
        dense = bool(best_L[row] != score_LO.shape[1] - 1)
        other = menu.flipped(row, dense)
        if gap_L[row].isinf() or other.cost(other.cheapest()) > limit:
            continue
        other_L, other_price = bisect_price(other, limit)
        other_L = spend(other, other_L, limit)
        if menu.value(other_L) > menu.value(best_L):
            menu, best_L, price = other, other_L, other_price
    return best_L, price


def earliness(names: Iterable[str]) -> list[float]:
    """1 for the weights of the first decoder layer, 0 for those of the last, evenly in between."""
    blocks = [block_of(name) for name in names]
    order = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
    return [1 - order[block] / max(len(order) - 1, 1) for block in blocks]


@dataclass
class Lagrange(Ranks):
    """The ranks that keep the most value within the budget: one price for all weights.

    Ranks are multiples of `multiple`; a weight too small for one stays dense. With value=first_order see `zero_sum`.

    Values are those of one weight cut alone, and damage done early passes through all that is cut after it: those of
    the first decoder layer are worth 1 + depth_bias times their value, falling to once it in the last: a straight
    line in the place of LEMS's harmonic one.
    """

    value: str
    spectrum: str
    multiple: int
    dense: str
    depth_bias: float

    def __post_init__(self):
        check_option("ranks.value", self.value, (*VALUES, FIRST_ORDER))
        check_option("ranks.spectrum", self.spectrum, COORDINATES)
        check_option("ranks.dense", self.dense, DENSE_RULES)
        check_multiple(self.multiple)
        if not self.depth_bias > -1:
            raise Refused(f"ranks.depth_bias={self.depth_bias} makes values negative. Write more than -1; 0 is none.")
        if self.depth_bias and self.value == FIRST_ORDER:
            raise Refused(
                f"ranks.depth_bias={self.depth_bias} weighs values, and ranks.value={FIRST_ORDER} cuts by slopes that "
                f"cancel. Write ranks.depth_bias=0."
            )

    @property
    def needs(self) -> Needs:
        levels = {"fisher": Needs.GRADIENTS, FIRST_ORDER: Needs.WEIGHT_GRADIENTS}
        return levels.get(self.value, Needs.NOTHING)

    @property
    def coordinates(self) -> str:
        return self.spectrum

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        if self.value == FIRST_ORDER:
            return zero_sum(spectra, budget, self.dense, self.multiple)
        values = [
            VALUES[self.value](spectrum) * (1 + self.depth_bias * early)
            for spectrum, early in zip(spectra.values(), earliness(spectra), strict=True)
        ]
        menu = Menu.of(values, [spectrum.shape for spectrum in spectra.values()], budget, self.dense, self.multiple)
        budget.refuse_below(menu.cost(menu.cheapest()), spectra, "or write a smaller ranks.multiple")
        choice_L, price = allocate(menu, budget.limit(spectra))
        last = menu.value_LO.shape[1] - 1
        options = zip(spectra, choice_L.tolist(), strict=True)
        ranks = {name: None if option == last else (option + 1) * self.multiple for name, option in options}
        return tally(ranks, spectra, threshold=price)
