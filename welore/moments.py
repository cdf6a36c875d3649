"""What calibration knows of the inputs and output gradients of one weight, and the metrics that are made of it.

Everything is an expectation over tokens. A gradient is that of the summed loss of its window, in nats, with respect to
the output y = W x of one token, so that 1/2 tr(dW E[xx^T] dW^T E[gg^T]) is a loss in nats per token (K-FAC).

A metric is None (the identity), a vector (a diagonal) or a symmetric positive matrix.

Shape suffixes: M = out_features, N = in_features.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from welore.errors import Refused

Metric = Tensor | None


class Needs(IntEnum):
    """How much calibration an option asks for; each level holds those below it."""

    NOTHING = 0
    INPUTS = 1  # one forward pass
    GRADIENTS = 2  # and a backward pass
    WEIGHT_GRADIENTS = 3  # and the gradient of every weight in every window


@dataclass(frozen=True)
class Moments:
    """The statistics of one weight over `tokens` tokens. What its level does not hold is None.

    Those of a whole decoder layer are the gradients of its output alone.

    The two metrics are damped, by shares of their mean diagonal; the statistics themselves are not.
    """

    tokens: int
    inputs_NN: Tensor | None = None  # E[x x^T]
    absolute_N: Tensor | None = None  # E|x|
    gradients_MM: Tensor | None = None  # E[g g^T]
    fisher_N: Tensor | None = None  # mean over windows and rows of the squared gradient of W
    gradient_MN: Tensor | None = None  # E[g x^T]
    damping: float = 0.0
    gradient_damping: float = 0.0

    def input_metric(self) -> Tensor:
        return damped(self.inputs_NN, self.damping)

    def gradient_metric(self) -> Tensor:
        return damped(self.gradients_MM, self.gradient_damping)


def summed(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """The sum over tokens of left right^T in float32, also where autocast would form it in bfloat16.

    The eigenvalues of a second moment span many orders of magnitude, and 8 bits would leave the larger ones only.
    """
    with torch.autocast(left_TM.device.type, enabled=False):
        return left_TM.float().T @ right_TN.float()


def damped(moment: Tensor, damping: float) -> Tensor:
    """(1 - a) C + a mean(diag C) I in float64; the identity where C is 0, for such a weight saw nothing."""
    C = moment.detach().to(torch.float64, copy=True)
    diagonal = C if C.ndim == 1 else C.diagonal()
    scale = float(diagonal.mean())
    C.mul_(1 - damping)
    diagonal.add_(damping * scale if scale else 1.0)
    return C


def times(rows: Tensor, metric: Metric) -> Tensor:
    """rows @ C."""
    if metric is None:
        return rows
    return rows * metric if metric.ndim == 1 else rows @ metric


def eigh(C: Tensor, what: str) -> tuple[Tensor, Tensor, str | None]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix >= 0, of which the lower triangle is read.

    Where that fails, its SVD, which gives the same, and a note of it. Refused where that fails as well.
    """
    try:
        return *torch.linalg.eigh(C), None
    except torch.linalg.LinAlgError as error:
        reason = str(error).splitlines()[0]
    try:
        U, values, _ = torch.linalg.svd(C.tril() + C.tril(-1).T)
    except torch.linalg.LinAlgError as error:
        raise Refused(f"neither eigh ({reason}) nor svd of the {what} converges.") from error
    return values.flip(0), U.flip(1), f"eigh failed ({reason}): svd of the {what}"


def roots(metric: Metric) -> tuple[Metric, Metric, str | None]:
    """C^(1/2) and its inverse, symmetric, by an eigendecomposition in float64, and a note where that failed.

    Eigenvalues below 1e-12 of the largest are raised to that: a direction that calibration never saw (fewer tokens
    than features, a dead channel) then costs next to nothing, and still comes back at full rank.
    """
    if metric is None:
        return None, None, None
    if metric.ndim == 1:
        root = metric.clamp(min=float(metric.max()) * 1e-12).sqrt()
        return root, 1 / root, None
    values, Q, safer = eigh(metric, "metric")
    root = values.clamp(min=float(values[-1]) * 1e-12).sqrt()
    return (Q * root) @ Q.T, (Q / root) @ Q.T, safer


def quadratic(rows_KN: Tensor, metric: Metric) -> Tensor:
    """z^T C z for every row z."""
    return (times(rows_KN, metric) * rows_KN).sum(1)


def check_finite(moments: Moments, name: str) -> None:
    """Refuse statistics that are not finite: a metric made of them would be no metric."""
    for what in ("inputs_NN", "gradients_MM", "fisher_N", "gradient_MN"):
        value = getattr(moments, what)
        if value is not None and not value.isfinite().all():
            raise Refused(
                f"the calibration statistics of {name} ({what.split('_')[0]}) hold NaN or infinity. "
                f"Run the model in a wider dtype: model.dtype=float32, or model.autocast=null."
            )
