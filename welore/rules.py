"""The rank rules of the field: outliers (OWL), stable and effective ranks, relative energy, and ASVD's search.

Shape suffixes: M = out_features, N = in_features, K = singular values, L = weights.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from welore.budget import DENSE_RULES, Budget, Plan, check_option, tally
from welore.errors import Refused
from welore.moments import Needs
from welore.ranks import Evidence, Ranks, apply_threshold, block_of, solve_threshold
from welore.shares import fill
from welore.subspace import entropy_rank, stable_rank
from welore.svd import Spectrum


@dataclass
class Owl(Ranks):
    """Blocks with more outliers keep more (OWL): D = the share of |W| sqrt(E[x^2]) above `outlier` times its mean.

    Shares are spread linearly in D over 2 `spread`, around the budget. OWL is a rule for sparsity; that its ratio is
    taken as the share of ranks (err) or parameters (keep) is a choice. A share above 1 goes to the other weights.
    """

    outlier: float
    spread: float
    per: str
    dense: str

    def __post_init__(self):
        check_option("ranks.per", self.per, ("block", "matrix"))
        check_option("ranks.dense", self.dense, DENSE_RULES)
        if not self.outlier > 0:
            raise Refused(
                f"ranks.outlier={self.outlier} is no multiple of a mean. Write 5, or another number above 0."
            )
        if not 0 <= self.spread <= 1:
            raise Refused(f"ranks.spread={self.spread} is not in [0, 1]. Write 0.08; 0 is the same share everywhere.")

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        base_L = self._offsets(list(spectra), _required(evidence, self.name))
        low, high = -float(base_L.max()), 1 - float(base_L.min())
        ranks = fill(lambda mean: base_L + mean, low, high, spectra, budget, self.dense)
        return tally(ranks, spectra)

    def _offsets(self, names: list[str], evidence: Evidence) -> Tensor:
        """How far the share of every weight lies from the smallest: 0 to 2 spread."""
        groups = defaultdict(list)
        for name in names:
            groups[block_of(name) if self.per == "block" else name].append(name)
        outliers = {}
        for members in groups.values():
            scores = [_scores(evidence, name) for name in members]
            outliers |= dict.fromkeys(members, outlier_share(scores, self.outlier))
        D_L = torch.tensor([outliers[name] for name in names], dtype=torch.float64)
        width = D_L.max() - D_L.min()
        return torch.zeros_like(D_L) if width == 0 else (D_L - D_L.min()) / width * 2 * self.spread


def _scores(evidence: Evidence, name: str) -> Tensor:
    """|W| sqrt(E[x^2]), the score of Wanda."""
    W_MN = evidence.weight(name)
    scale_N = evidence.moments(name).inputs_NN.diagonal().clamp(min=0).sqrt()
    return W_MN.detach().float().abs() * scale_N.to(W_MN.device, torch.float32)


def outlier_share(scores: list[Tensor], multiple: float) -> float:
    """The share of all scores above `multiple` times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > multiple * mean).sum()) for score in scores) / count


@dataclass
class Proportional(Ranks):
    """Ranks in proportion to a measure of how many directions of a weight matter."""

    power: float
    dense: str

    def __post_init__(self):
        check_option("ranks.dense", self.dense, DENSE_RULES)
        if not 0 <= self.power <= 4:
            raise Refused(
                f"ranks.power={self.power} is not in [0, 4]. Write 1 for ranks in proportion to the measure."
            )

    def measure(self, sigma_K: Tensor) -> float:
        """At least 1, and at most the number of values that are not 0."""
        raise NotImplementedError(f"ranks={self.name} does not say what it measures")

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        wish_L = torch.tensor([self.measure(s.sigma_K) ** self.power for s in spectra.values()], dtype=torch.float64)
        full = [budget.dense_price(s.shape) / budget.price(s.shape) for s in spectra.values()]
        share_L = wish_L / torch.tensor(full, dtype=torch.float64)
        ranks = fill(lambda scale: scale * share_L, 0.0, 1 / float(share_L.min()), spectra, budget, self.dense)
        return tally(ranks, spectra)


@dataclass
class StableRank(Proportional):
    """Ranks in proportion to ||W||_F^2 / sigma_1^2."""

    def measure(self, sigma_K: Tensor) -> float:
        return stable_rank(sigma_K)


@dataclass
class EffectiveRank(Proportional):
    """Ranks in proportion to exp(entropy of sigma / sum(sigma)), the effective rank of Roy and Vetterli (D-Rank)."""

    def measure(self, sigma_K: Tensor) -> float:
        return entropy_rank(sigma_K)


@dataclass
class RelativeEnergy(Ranks):
    """r = the smallest rank whose lost energy is at most eps^2 of all, with one eps for all weights (PGSVD).

    It is the threshold of WeLore on the energy of the tail; the threshold of the plan is eps^2.
    """

    dense: str

    def __post_init__(self):
        check_option("ranks.dense", self.dense, DENSE_RULES)

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        threshold = solve_threshold(spectra, budget, "tail_energy", self.dense)
        return apply_threshold(spectra, threshold, "tail_energy", self.dense)


@dataclass
class Sensitivity(Ranks):
    """ASVD's search (STRS): the loss with one weight cut, for every weight and share; the least harmful cuts are made.

    Cuts are sorted by loss, and as few of the first are made as meet the budget; of several cuts of a weight the
    smallest share holds, and a weight without any stays dense. Under err the same cuts are counted in ranks.
    """

    shares: list[float]

    @property
    def needs(self) -> Needs:
        """The losses are on calibration text, which is read where statistics are wanted."""
        return Needs.INPUTS

    def __post_init__(self):
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise Refused(f"ranks.shares={self.shares} are not shares between 0 and 1. Write such as [0.4, 0.6, 0.8].")

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        evidence, cuts = _required(evidence, self.name), self._cuts(spectra)
        least = {name: min((rank for of, rank in cuts if of == name), default=None) for name in spectra}
        budget.refuse_below(self._cost(least, spectra, budget), spectra, "or add smaller ranks.shares")
        bar = tqdm(cuts, desc="sensitivity", unit="cut", leave=False)
        # A loss that is not a number is the worst of all, and would sort anywhere.
        harm = {cut: loss if math.isfinite(loss := evidence.loss(dict([cut]))) else math.inf for cut in bar}
        ranks: dict[str, int | None] = dict.fromkeys(spectra)
        cost, limit = budget.total(spectra), budget.limit(spectra)
        for name, rank in sorted(cuts, key=harm.__getitem__):
            if cost <= limit:
                break
            before = {name: ranks[name]}
            ranks[name] = rank if ranks[name] is None else min(rank, ranks[name])
            cost += self._cost({name: ranks[name]}, spectra, budget) - self._cost(before, spectra, budget)
        return tally(ranks, spectra)

    def _cuts(self, spectra: dict[str, Spectrum]) -> list[tuple[str, int]]:
        """Every weight with every rank that stores a share of it, the largest first, where that is at least 1."""
        cuts = []
        for name, spectrum in spectra.items():
            M, N = spectrum.shape
            ranks = {int(share * M * N) // (M + N) for share in self.shares}
            cuts += [(name, rank) for rank in sorted(ranks, reverse=True) if rank >= 1]
        return cuts

    @staticmethod
    def _cost(ranks: dict[str, int | None], spectra: dict[str, Spectrum], budget: Budget) -> int:
        shapes = {name: spectra[name].shape for name in ranks}
        return sum(
            budget.dense_price(shapes[name]) if rank is None else rank * budget.price(shapes[name])
            for name, rank in ranks.items()
        )


def _required(evidence: Evidence | None, name: str) -> Evidence:
    if evidence is None:
        raise Refused(f"ranks={name} needs the model and calibration text. Without them choose ranks=welore.")
    return evidence
