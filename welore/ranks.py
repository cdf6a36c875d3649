"""How many ranks each weight keeps: spectra and a budget in, a plan out. Here: one threshold, uniform, and given."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from welore.budget import DENSE_RULES, Budget, Plan, check_option, tally
from welore.errors import Refused
from welore.moments import Moments, Needs
from welore.svd import Spectrum

COORDINATES = ("plain", "same")


def minmax(sigma_K: Tensor) -> Tensor:
    """(sigma - min) / (max - min), as in the authors' code: the smallest value is 0 whatever its size."""
    low, high = sigma_K.min(), sigma_K.max()
    return torch.ones_like(sigma_K) if high == low else (sigma_K - low) / (high - low)


def by_max(sigma_K: Tensor) -> Tensor:
    """sigma / max: the other reading of the paper's "normalized singular values"."""
    high = sigma_K.max()
    return torch.ones_like(sigma_K) if high == 0 else sigma_K / high


def tail_energy(sigma_K: Tensor) -> Tensor:
    """The share of the squared norm that is lost with this value and all smaller ones: 1 for the largest."""
    energy_K = sigma_K.double().square().flip(0).cumsum(0).flip(0)
    return torch.ones_like(energy_K) if energy_K[0] == 0 else energy_K / energy_K[0]


NORMALIZATIONS = {"minmax": minmax, "max": by_max}
SCORES = NORMALIZATIONS | {"tail_energy": tail_energy}


def apply_threshold(
    spectra: dict[str, Spectrum], threshold: float, normalize: str, dense: str, multiple: int = 1
) -> Plan:
    """Keep the normalized singular values that are at least `threshold`; leave a weight dense where the rule says so.

    This is Eq. 1 with r = #{s >= k}. With `dense=never` it is the authors' compression script (min_ratio 0), with
    `dense=half` their fine-tuning scripts (min_ratio .4999), whose ERR counts the factored weights only.
    """
    attempted, ranks = {}, {}
    for name, spectrum in spectra.items():
        rank = int((SCORES[normalize](spectrum.sigma_K) >= threshold).sum())
        attempted[name] = rank
        ranks[name] = rank if rank <= DENSE_RULES[dense](spectrum.shape) else None
    return tally(aligned(ranks, spectra, multiple, dense), spectra, attempted, threshold)


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
        normalized = SCORES[normalize](spectrum.sigma_K).flip(0)[:-1]  # ascending, the largest always stays
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


def aligned(
    ranks: dict[str, int | None], spectra: dict[str, Spectrum], multiple: int, dense: str
) -> dict[str, int | None]:
    """Every rank at the nearest multiple of `multiple` at which its weight is still factored; with none, as it is.

    A GPU multiplies matrices in half precision fast where their sides are multiples of 8.
    """

    def nearest(rank: int, most: int) -> int:
        return min(max(round(rank / multiple), 1), most // multiple) * multiple or rank

    return {
        name: None if rank is None else nearest(rank, DENSE_RULES[dense](spectra[name].shape))
        for name, rank in ranks.items()
    }


def check_multiple(multiple: int) -> None:
    if multiple < 1:
        raise Refused(f"ranks.multiple={multiple} is no count of ranks. Write 1 for any rank, or 8 or 16.")


@dataclass(frozen=True)
class Evidence:
    """What a rule may ask of the model and the calibration text beyond the spectra. Nothing is computed unasked."""

    weight: Callable[[str], Tensor]  # W_MN of a component
    moments: Callable[[str], Moments]
    loss: Callable[[dict[str, int]], float]  # nats per token with only these weights cut, at these ranks


@dataclass
class Ranks:
    """Turns spectra and a budget into a plan that needs no more calibration than `needs` says."""

    name: str

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def cuts(self) -> bool:
        """Whether a plan without a factored weight is a mistake."""
        return True

    @property
    def coordinates(self) -> str:
        """`same`: the spectra are those in the coordinates of svd=. `plain`: those of W, whatever svd= is."""
        return "same"

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        raise NotImplementedError(f"ranks={self.name} does not say how it plans")


def block_of(name: str) -> str:
    """The decoder layer of a weight: its name up to the first number."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


@dataclass
class Welore(Ranks):
    """One global threshold k on the normalized singular values of the whole model (WeLore-COMP, Eq. 1).

    Weights with a heavy-tailed spectrum lose more ranks. k is solved for the asked budget, never looked up; then ranks
    go to the nearest multiple of `multiple`, and the budget is met but for what that rounds.
    """

    normalize: str
    dense: str
    spectrum: str
    multiple: int = field(default=1, kw_only=True)

    def __post_init__(self):
        check_option("ranks.normalize", self.normalize, NORMALIZATIONS)
        check_option("ranks.dense", self.dense, DENSE_RULES)
        check_option("ranks.spectrum", self.spectrum, COORDINATES)
        check_multiple(self.multiple)

    @property
    def coordinates(self) -> str:
        return self.spectrum

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        threshold = solve_threshold(spectra, budget, self.normalize, self.dense)
        return apply_threshold(spectra, threshold, self.normalize, self.dense, self.multiple)


@dataclass
class Uniform(Ranks):
    """The same share of every weight: r = d - int(err d), or r = int(keep m n / (m + n)) (the paper's baseline).

    Then at the nearest multiple of `multiple`.
    """

    dense: str
    multiple: int = field(default=1, kw_only=True)

    def __post_init__(self):
        check_option("ranks.dense", self.dense, DENSE_RULES)
        check_multiple(self.multiple)

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
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
        return tally(aligned(ranks, spectra, self.multiple, self.dense), spectra, attempted)

    def _rank(self, budget: Budget, spectrum: Spectrum) -> int:
        K, (M, N) = len(spectrum.sigma_K), spectrum.shape
        if budget.keep is None:
            return K - int(budget.err * K)
        return K if budget.keep == 1 else min(K, int(budget.keep * M * N / (M + N)))


@dataclass
class Given(Ranks):
    """Ranks read from a `ranks.json`: the name of every compressible weight to its rank, or null where it is dense."""

    path: str

    def plan(
        self, spectra: dict[str, Spectrum], budget: Budget | None = None, evidence: Evidence | None = None
    ) -> Plan:
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
