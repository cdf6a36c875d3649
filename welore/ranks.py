"""How many ranks each weight keeps: spectra and a budget in, a plan out.

A rank of `None` means that the weight stays dense. A weight that is factored (LRC) at rank r stores r (m + n) numbers,
one that stays dense (N-LRC) stores m n.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from welore.errors import Refused
from welore.lowrank import break_even_rank
from welore.svd import Spectrum

# The largest rank at which a weight of shape (m, n) is factored; above it the weight stays dense.
DENSE_RULES: dict[str, Callable[[tuple[int, int]], int]] = {
    "half": lambda shape: (min(shape) - 1) // 2,  # the paper's LRC: r < rank(W) / 2
    "break_even": break_even_rank,  # factored if and only if that saves parameters
    "never": lambda shape: min(shape) - 1,  # every weight is cut, as in the authors' compression script
}


def minmax(sigma_K: Tensor) -> Tensor:
    """(sigma - min) / (max - min), as in the authors' code: the smallest value is 0 whatever its size."""
    low, high = sigma_K.min(), sigma_K.max()
    return torch.ones_like(sigma_K) if high == low else (sigma_K - low) / (high - low)


def by_max(sigma_K: Tensor) -> Tensor:
    """sigma / max: the other reading of the paper's "normalized singular values"."""
    high = sigma_K.max()
    return torch.ones_like(sigma_K) if high == 0 else sigma_K / high


NORMALIZATIONS = {"minmax": minmax, "max": by_max}


@dataclass(frozen=True)
class Budget:
    """What may remain: `err`, the share of all ranks to remove, or `keep`, the share of the parameters to keep."""

    err: float | None = None
    keep: float | None = None

    def __str__(self) -> str:
        return f"keep={self.keep}" if self.err is None else f"err={self.err}"


@dataclass(frozen=True)
class Plan:
    """The rank of every compressible weight, `None` where it stays dense, and the budget that this comes to."""

    ranks: dict[str, int | None]
    err: float  # share of all ranks removed, counting only weights that are factored (the paper's ERR)
    err_attempted: float  # the same counting also the ranks that the threshold would remove from dense weights (Eq. 1)
    keep: float  # share of the parameters of the compressible weights that are still stored
    threshold: float | None = None  # k, where one threshold made the plan

    @property
    def factored(self) -> dict[str, int]:
        return {name: rank for name, rank in self.ranks.items() if rank is not None}


def tally(
    ranks: dict[str, int | None],
    spectra: dict[str, Spectrum],
    attempted: dict[str, int] | None = None,
    threshold: float | None = None,
) -> Plan:
    """Count what a rank map removes. `attempted` are the ranks before the dense rule, where there were any."""
    total = sum(len(spectrum.sigma_K) for spectrum in spectra.values())
    dense = sum(spectrum.shape[0] * spectrum.shape[1] for spectrum in spectra.values())
    removed, stored = 0, 0
    for name, spectrum in spectra.items():
        rank, (M, N) = ranks[name], spectrum.shape
        removed += 0 if rank is None else len(spectrum.sigma_K) - rank
        stored += M * N if rank is None else rank * (M + N)
    tried = {} if attempted is None else attempted
    cut = sum(len(s.sigma_K) - tried[name] for name, s in spectra.items()) if tried else removed
    return Plan(ranks, removed / total, cut / total, stored / dense, threshold)


def apply_threshold(spectra: dict[str, Spectrum], threshold: float, normalize: str, dense: str) -> Plan:
    """Keep the normalized singular values that are at least `threshold`; leave a weight dense where the rule says so.

    This is Eq. 1 with r = #{s >= k}. With `dense=never` it is the authors' compression script (min_ratio 0), with
    `dense=half` their fine-tuning scripts (min_ratio .4999), whose ERR counts the factored weights only.
    """
    attempted, ranks = {}, {}
    for name, spectrum in spectra.items():
        rank = int((NORMALIZATIONS[normalize](spectrum.sigma_K) >= threshold).sum())
        attempted[name] = rank
        ranks[name] = rank if rank <= DENSE_RULES[dense](spectrum.shape) else None
    return tally(ranks, spectra, attempted, threshold)


def solve_threshold(spectra: dict[str, Spectrum], budget: Budget, normalize: str, dense: str) -> float:
    """The threshold k whose plan comes closest to the budget, found exactly: no grid, no tolerance, no iteration.

    Every singular value but the largest of its weight is an event: at k just above its normalized value it is
    removed. An event pays one rank (or m + n parameters); those before the rank at which the dense rule lets the
    weight be factored pay nothing, and the one that reaches it pays for all. Sorting the events of the whole model
    gives err and keep as step functions of k. Of two thresholds equally close, the smaller one (more ranks) is taken.
    """
    values, gains = [], []
    for spectrum in spectra.values():
        K, (M, N) = len(spectrum.sigma_K), spectrum.shape
        normalized = NORMALIZATIONS[normalize](spectrum.sigma_K).flip(0)[:-1]  # ascending, the largest always stays
        first = K - DENSE_RULES[dense](spectrum.shape)  # ranks removed when the weight becomes an LRC
        gain = torch.full((K - 1,), 1.0 if budget.keep is None else float(M + N), dtype=torch.float64)
        gain[: first - 1] = 0.0
        if first <= K - 1:
            gain[first - 1] = float(first) if budget.keep is None else float(M * N - (K - first) * (M + N))
        values.append(normalized)
        gains.append(gain)
    pool, order = torch.cat(values).sort(stable=True)
    removed = torch.cat(gains)[order].cumsum(0)
    if budget.keep is None:
        total, asked = sum(len(s.sigma_K) for s in spectra.values()), budget.err
    else:
        total, asked = sum(s.shape[0] * s.shape[1] for s in spectra.values()), 1 - budget.keep
    last_of_tie = torch.cat([pool[1:] > pool[:-1], torch.tensor([True])])
    last_of_tie &= pool < 1  # a threshold above 1 would remove the largest value of some weight
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), removed[last_of_tie] / total])
    below = torch.cat([torch.full((1,), -1.0, dtype=torch.float64), pool[last_of_tie]])
    best = int((steps - asked).abs().argmin())
    _refuse_far(steps, best, budget)
    if best == 0:
        return 0.0
    above = float(below[best + 1]) if best + 1 < len(below) else 1.0
    return (float(below[best]) + above) / 2


def _refuse_far(steps: Tensor, best: int, budget: Budget) -> None:
    """Stop where the budget is out of reach; between two steps of the dense rule (a few percent) it is not."""
    asked = budget.err if budget.keep is None else 1 - budget.keep
    most, last = float(steps.max()), float(steps[-2:].diff().sum())
    if abs(float(steps[best]) - asked) > 0.1 or asked > most + last:
        limit = f"err={most:.3f}" if budget.keep is None else f"keep={1 - most:.3f}"
        raise Refused(
            f"{budget} is out of reach: every weight keeps at least rank 1, the most that one threshold removes "
            f"here is {limit}. Ask for less, or choose another ranks.dense ({', '.join(DENSE_RULES)})."
        )


@dataclass
class Ranks:
    """Turns spectra and a budget into a plan."""

    name: str

    def plan(self, spectra: dict[str, Spectrum], budget: Budget) -> Plan:
        raise NotImplementedError(f"ranks={self.name} does not say how it plans")


@dataclass
class Welore(Ranks):
    """One global threshold k on the normalized singular values of the whole model (WeLore-COMP, Eq. 1).

    Weights with a heavy-tailed spectrum lose more ranks. k is solved for the asked budget, never looked up.
    """

    normalize: str
    dense: str

    def __post_init__(self):
        _check_option("ranks.normalize", self.normalize, NORMALIZATIONS)
        _check_option("ranks.dense", self.dense, DENSE_RULES)

    def plan(self, spectra: dict[str, Spectrum], budget: Budget) -> Plan:
        threshold = solve_threshold(spectra, budget, self.normalize, self.dense)
        return apply_threshold(spectra, threshold, self.normalize, self.dense)


@dataclass
class Uniform(Ranks):
    """The same share of every weight: r = d - int(err d), or r = int(keep m n / (m + n)) (the paper's baseline)."""

    dense: str

    def __post_init__(self):
        _check_option("ranks.dense", self.dense, DENSE_RULES)

    def plan(self, spectra: dict[str, Spectrum], budget: Budget) -> Plan:
        attempted, ranks = {}, {}
        for name, spectrum in spectra.items():
            M, N = spectrum.shape
            rank = self._rank(budget, spectrum)
            if rank < 1:
                least = (
                    math.ceil((M + N) / (M * N) * 10_000) / 10_000
                )  # rounded up, so that it can be written as it is
                raise Refused(
                    f"{budget} leaves {name} ({M} x {N}) with rank 0. "
                    f"The smallest keep for this weight is {least:.4f}: write that or more."
                )
            attempted[name] = rank
            ranks[name] = rank if rank <= DENSE_RULES[self.dense](spectrum.shape) else None
        return tally(ranks, spectra, attempted)

    def _rank(self, budget: Budget, spectrum: Spectrum) -> int:
        K, (M, N) = len(spectrum.sigma_K), spectrum.shape
        if budget.keep is None:
            return K - int(budget.err * K)
        return K if budget.keep == 1 else min(K, int(budget.keep * M * N / (M + N)))


@dataclass
class Given(Ranks):
    """Ranks read from a `ranks.json`: the name of every compressible weight to its rank, or null where it is dense."""

    path: str

    def plan(self, spectra: dict[str, Spectrum], budget: Budget | None = None) -> Plan:
        """`budget` is ignored: the file is the budget."""
        ranks = read_ranks(Path(self.path))
        missing, unknown = sorted(spectra.keys() - ranks.keys()), sorted(ranks.keys() - spectra.keys())
        if missing or unknown:
            raise Refused(
                f"ranks.path={self.path} is for another model: it names {len(unknown)} weights that this one does not "
                f"have (such as {unknown[:1] or 'none'}) and lacks {len(missing)} (such as {missing[:1] or 'none'}). "
                f"Give the ranks.json of a run with this model."
            )
        for name, rank in ranks.items():
            K = len(spectra[name].sigma_K)
            if rank is not None and not (isinstance(rank, int) and 1 <= rank <= K):
                raise Refused(
                    f"ranks.path={self.path} gives {name} the rank {rank}; write 1 to {K}, or null for dense."
                )
        return tally(ranks, spectra)


def read_ranks(path: Path) -> dict[str, int | None]:
    """The map in a `ranks.json`, as a run writes it."""
    try:
        ranks = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise Refused(f"ranks.path={path} cannot be read as JSON: {error}. Give the ranks.json of a run.") from error
    if not isinstance(ranks, dict):
        raise Refused(f"ranks.path={path} holds a {type(ranks).__name__}; write a map of weight name to rank or null.")
    return ranks


def _check_option(key: str, value: str, options: dict) -> None:
    if value not in options:
        raise Refused(f"{key}={value} is unknown. Write one of {', '.join(options)}.")
