"""What may remain of a model, what each rank costs of it, and the plan that comes out.

A rank of `None` means that the weight stays dense. A weight that is factored (LRC) at rank r stores r (m + n) numbers,
one that stays dense (N-LRC) stores m n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from welore.errors import Refused
from welore.lowrank import break_even_rank
from welore.svd import Spectrum

# The largest rank at which a weight of shape (m, n) is factored; above it the weight stays dense.
DENSE_RULES: dict[str, Callable[[tuple[int, int]], int]] = {
    "half": lambda shape: (min(shape) - 1) // 2,  # the paper's LRC: r < rank(W) / 2
    "break_even": break_even_rank,  # factored if and only if that saves parameters
    "never": lambda shape: min(shape) - 1,  # every weight is cut, as in the authors' compression script
}


@dataclass(frozen=True)
class Budget:
    """What may remain: `err`, the share of all ranks to remove, or `keep`, the share of the parameters to keep.

    `bytes` of the stored model and `flops` per token are resolved to a keep before any plan is made.
    """

    err: float | None = None
    keep: float | None = None
    bytes: float | None = None
    flops: float | None = None

    def __str__(self) -> str:
        given = {key: value for key, value in vars(self).items() if value is not None}
        return ", ".join(f"{key}={value}" for key, value in given.items())

    def price(self, shape: tuple[int, int]) -> int:
        """What one rank of a weight costs: 1 under err, m + n under keep."""
        return 1 if self.keep is None else shape[0] + shape[1]

    def dense_price(self, shape: tuple[int, int]) -> int:
        """What a weight costs that stays dense: all its ranks under err, m n under keep."""
        return min(shape) if self.keep is None else shape[0] * shape[1]

    def total(self, spectra: dict[str, Spectrum]) -> int:
        return sum(self.dense_price(spectrum.shape) for spectrum in spectra.values())

    def limit(self, spectra: dict[str, Spectrum]) -> int:
        """The most that a plan may cost. A share that is a whole number but for rounding counts as that number."""
        share = 1 - self.err if self.keep is None else self.keep
        return int(share * self.total(spectra) * (1 + 1e-12) + 1e-9)

    def refuse_below(self, least: float, spectra: dict[str, Spectrum], instead: str) -> None:
        """Stop where even the plan that costs `least` does not fit. `instead` is what to write, beside more."""
        if least <= self.limit(spectra):
            return
        share = least / self.total(spectra)
        if self.keep is None:
            limit = f"the largest err here is {math.floor((1 - share) * 1000) / 1000:.3f}: write that or less"
        else:
            limit = f"the smallest keep here is {math.ceil(share * 1000) / 1000:.3f}: write that or more"
        raise Refused(f"{self} is out of reach: {limit}, {instead}.")


@dataclass(frozen=True)
class Plan:
    """The rank of every compressible weight, `None` where it stays dense, and the budget that this comes to."""

    ranks: dict[str, int | None]
    err: float  # share of all ranks removed, counting only weights that are factored (the paper's ERR)
    err_attempted: float  # the same counting also the ranks that the threshold would remove from dense weights (Eq. 1)
    keep: float  # share of the parameters of the compressible weights that are still stored
    threshold: float | None = None  # k, or the price of a rank or parameter, where one number made the plan
    lrc: dict[str, int] | None = None  # WeLore's LRCs and their ranks, where others are cut than they

    @property
    def factored(self) -> dict[str, int]:
        return {name: rank for name, rank in self.ranks.items() if rank is not None}

    @property
    def division(self) -> dict[str, int]:
        """The LRCs with the ranks that WeLore gives them, whether they are factored or not."""
        return self.factored if self.lrc is None else self.lrc


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


def check_option(key: str, value: str, options: dict | tuple) -> None:
    """Refuse a value that is not among the options, and name those."""
    if value not in options:
        raise Refused(f"{key}={value} is unknown. Write one of {', '.join(options)}.")
