"""Rank correlations with intervals: Spearman's, partial ones, and a curve over depth, from resampled groups.

Rows that share a group (such as the weights of one layer of one seed) are drawn together, since they are not
independent. A resample is a vector of how often each row was drawn, so that all of them are one matrix product.

Shape suffixes: I, J = rows, B = resamples, X = variables.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A number with the 2.5 % and 97.5 % points of its resamples, over `rows` rows."""

    value: float
    low: float
    high: float
    rows: int

    @property
    def sign(self) -> int | None:
        """1 or -1 where the interval lies on one side of 0, else None."""
        return 1 if self.low > 0 else -1 if self.high < 0 else None

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def spearman(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable], controls: Sequence[Sequence[float]] = ()
) -> Interval:
    """The rank correlation of x and y; with `controls`, what is left of it between rows that are alike in those.

    NaN where a variable is constant.
    """
    values_XI = torch.tensor([list(x), list(y), *map(list, controls)], dtype=torch.float64)
    counts_BI = _counts(groups)
    ranks_BXI = torch.stack([_ranks(values_I, counts_BI) for values_I in values_XI], dim=1)
    return _interval(_partial(ranks_BXI, counts_BI), values_XI.shape[1])


def curve(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """The coefficient c of the parabola a + b x + c x^2 through y, with x scaled to -1 to 1.

    Negative where the ends lie below the middle.
    """
    x_I, y_I = torch.tensor(list(x), dtype=torch.float64), torch.tensor(list(y), dtype=torch.float64)
    x_I = 2 * (x_I - x_I.min()) / (x_I.max() - x_I.min()) - 1
    powers_I3 = torch.stack([torch.ones_like(x_I), x_I, x_I**2], dim=1)
    weighted_B3I = powers_I3.T * _counts(groups)[:, None]
    found_B3 = torch.linalg.pinv(weighted_B3I @ powers_I3) @ (weighted_B3I @ y_I)[..., None]
    return _interval(found_B3[:, 2, 0], len(x_I))


def mean(y: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """The mean over rows."""
    y_I, counts_BI = torch.tensor(list(y), dtype=torch.float64), _counts(groups)
    return _interval((counts_BI @ y_I) / counts_BI.sum(1), len(y_I))


def _counts(groups: Sequence[Hashable]) -> Tensor:
    """How often each row was drawn, B x I: once each in the first, which is the data itself."""
    names = list(dict.fromkeys(groups))
    place_I = torch.tensor([names.index(group) for group in groups])
    drawn_BG = torch.randint(len(names), (RESAMPLES, len(names)), generator=torch.Generator().manual_seed(0))
    often_BG = torch.zeros(RESAMPLES, len(names), dtype=torch.float64)
    often_BG.scatter_add_(1, drawn_BG, torch.ones_like(often_BG))
    return torch.cat([torch.ones(1, len(names), dtype=torch.float64), often_BG])[:, place_I]


def _ranks(values_I: Tensor, counts_BI: Tensor) -> Tensor:
    """The ranks of the rows within each resample; ties share their mean."""
    difference_IJ = values_I[:, None] - values_I[None]
    before_IJ = (difference_IJ > 0).double() + 0.5 * (difference_IJ == 0).double()
    return counts_BI @ before_IJ.T


def _partial(ranks_BXI: Tensor, counts_BI: Tensor) -> Tensor:
    """The correlation of what the others leave of the first two variables; a constant one leaves all of it."""
    weight_B1I = counts_BI[:, None] / counts_BI.sum(1)[:, None, None]
    centered_BXI = ranks_BXI - (weight_B1I * ranks_BXI).sum(-1, keepdim=True)
    covariance_BXX = (weight_B1I * centered_BXI) @ centered_BXI.mT
    deviation_BX = covariance_BXX.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    correlation_BXX = covariance_BXX / (deviation_BX[:, :, None] * deviation_BX[:, None])
    bad_B = ~correlation_BXX[:, :2, :2].isfinite().all(-1).all(-1)
    correlation_BXX = correlation_BXX.nan_to_num(0.0, 0.0, 0.0)
    correlation_BXX[bad_B] = torch.eye(correlation_BXX.shape[1], dtype=torch.float64)
    asked, controls = slice(0, 2), slice(2, None)
    toward_BXX = correlation_BXX[:, asked, controls] @ torch.linalg.pinv(
        correlation_BXX[:, controls, controls], hermitian=True
    )
    left_BXX = correlation_BXX[:, asked, asked] - toward_BXX @ correlation_BXX[:, controls, asked]
    spread_BX = left_BXX.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    found_B = left_BXX[:, 0, 1] / (spread_BX[:, 0] * spread_BX[:, 1]).sqrt()
    return torch.where(bad_B, torch.nan, found_B)


def _interval(found_B: Tensor, rows: int) -> Interval:
    resampled = found_B[1:][found_B[1:].isfinite()]
    value = float(found_B[0])
    if not len(resampled) or not math.isfinite(value):
        return Interval(math.nan, math.nan, math.nan, rows)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high, rows)
