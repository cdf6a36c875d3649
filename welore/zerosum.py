"""The zero-sum rule of ZS-SVD: components go in the order of their first-order effect, while the effects cancel."""

import heapq
from dataclasses import dataclass

from torch.nn.functional import pad

from welore.budget import DENSE_RULES, Budget, Plan, tally
from welore.errors import Refused
from welore.svd import Spectrum


@dataclass
class Tail:
    """What is left of a weight from which components are removed, the last `multiple` first: a rank at a time."""

    slopes: list[float]  # of the next removals, in order
    ranks: list[int]  # after each of them
    costs: list[int]  # before all, and after each of them
    done: int = 0

    @classmethod
    def of(cls, spectrum: Spectrum, budget: Budget, dense: str, multiple: int) -> "Tail":
        if spectrum.slope_K is None:
            raise Refused(
                "ranks.value=first_order needs the gradient of every weight, and these spectra have none. "
                "Write ranks.value=energy."
            )
        K, cap = len(spectrum.sigma_K), DENSE_RULES[dense](spectrum.shape)
        padded = pad(spectrum.slope_K.double(), (0, -K % multiple))
        slopes = padded.view(-1, multiple).sum(1).flip(0)[:-1].tolist()
        ranks = [multiple * blocks for blocks in range(len(slopes), 0, -1)]
        price, whole = budget.price(spectrum.shape), budget.dense_price(spectrum.shape)
        return cls(slopes, ranks, [whole, *(rank * price if rank <= cap else whole for rank in ranks)])

    @property
    def rank(self) -> int | None:
        return self.ranks[self.done - 1] if self.done else None


def zero_sum(spectra: dict[str, Spectrum], budget: Budget, dense: str, multiple: int) -> Plan:
    """Remove what changes the loss least to first order, while the changes cancel (ZS-SVD).

    Each weight offers its last component. While the running sum of the slopes of what is gone is positive, the offer
    of the smallest |slope| among those of negative slope is taken, and the other way round; of either sign where no
    other is left. A weight that ends above the dense rule stays dense, although its slopes were counted.
    """
    tails = [Tail.of(spectrum, budget, dense, multiple) for spectrum in spectra.values()]
    offers: tuple[list, list] = ([], [])  # slopes below 0, and the others: heaps of (|slope|, weight)
    for index, tail in enumerate(tails):
        _offer(offers, tail, index)
    cost, limit, total = sum(tail.costs[0] for tail in tails), budget.limit(spectra), 0.0
    budget.refuse_below(sum(tail.costs[-1] for tail in tails), spectra, "or write a smaller ranks.multiple")
    while cost > limit:
        heap = offers[total <= 0] or offers[total > 0]
        tail = tails[index := heapq.heappop(heap)[1]]
        total += tail.slopes[tail.done]
        cost += tail.costs[tail.done + 1] - tail.costs[tail.done]
        tail.done += 1
        _offer(offers, tail, index)
    attempted = {name: tail.rank or len(s.sigma_K) for (name, s), tail in zip(spectra.items(), tails, strict=True)}
    ranks = {name: r if r <= DENSE_RULES[dense](spectra[name].shape) else None for name, r in attempted.items()}
    return tally(ranks, spectra, attempted)


def _offer(offers: tuple[list, list], tail: Tail, index: int) -> None:
    if tail.done < len(tail.slopes):
        slope = tail.slopes[tail.done]
        heapq.heappush(offers[slope >= 0], (abs(slope), index))
