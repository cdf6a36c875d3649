"""One singular value decomposition in changed coordinates, which is every factorizer of the field.

    T_L W T_R = U S V^T,     W_r = T_L^-1 U_r S_r V_r^T T_R^-1

with T = C^(1/2) of a metric C on each side. The metrics are what an `svd` option is; the rest is the code of all of
them. No full SVD is run: with W on its shorter side K (rows of W if M <= N, else columns), the K x K Gram matrix
G = T W C_far W^T T is formed and decomposed in float64. Its eigenvectors U are the singular vectors of the shorter
side, and W_r = (T^-1 U_r) (U_r^T T W) is the best rank-r approximation in these coordinates (Eckart-Young), so that
the metric of the longer side needs no root and no inverse.

Error against a float64 SVD: sigma^2 is off by about 1e-16 sigma_max^2, so sigma is off by at most 1.5e-8 sigma_max,
and by far less for the larger values. Values below 1e-8 sigma_max are noise of either method.

Shape suffixes: M = out_features, N = in_features, K = min(M, N), R = rank.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from welore.errors import Refused
from welore.moments import Metric, Moments, Needs, damped, eigh, quadratic, roots, times

GRAM_ROWS = 1024  # rows of a Gram matrix that are formed together
GRAM = "Gram matrix"

SEQUENTIAL = ("none", "update", "anchored")


@dataclass
class Svd:
    """How a weight is decomposed: the metric on its outputs and on its inputs.

    `sequential` refits the factors layer by layer on the inputs that the compressed layers before give them.
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    in_nats: ClassVar[bool] = False  # whether half the dropped energy is a loss increase
    name: str
    sequential: str

    def __post_init__(self):
        if self.sequential not in SEQUENTIAL:
            raise Refused(f"svd.sequential={self.sequential} is unknown. Write one of {', '.join(SEQUENTIAL)}.")

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        """C_L over the M outputs and C_R over the N inputs, in float64."""
        raise NotImplementedError(f"svd={self.name} does not say in which coordinates it works")


@dataclass
class Plain(Svd):
    """The weight as it is: T_L = T_R = I (WeLore-COMP, Section 3.1). Needs no data."""

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        return None, None


@dataclass
class Fwsvd(Svd):
    """T_R = diag(I)^(1/2), with I_j the mean squared gradient of input column j (FWSVD)."""

    needs: ClassVar[Needs] = Needs.WEIGHT_GRADIENTS

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        return None, damped(moments.fisher_N, moments.damping)


@dataclass
class Asvd(Svd):
    """T_R = diag((E|x|)^alpha + 1e-6) (ASVD): a diagonal stand-in for whitening."""

    needs: ClassVar[Needs] = Needs.INPUTS
    alpha: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 2:
            raise Refused(f"svd.alpha={self.alpha} is no exponent of ASVD. Write 0 to 2; 0.5 is the published one.")

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        return None, (moments.absolute_N.double() ** self.alpha + 1e-6) ** 2


@dataclass
class Whitened(Svd):
    """T_R = E[xx^T]^(1/2): minimizes the error of the outputs, ||(W - W_r) X|| (SVD-LLM, ActSVD, DRONE)."""

    needs: ClassVar[Needs] = Needs.INPUTS

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        return None, moments.input_metric()


@dataclass
class Kfac(Svd):
    """T_L = E[gg^T]^(1/2), T_R = E[xx^T]^(1/2): minimizes the loss increase in nats that K-FAC predicts."""

    needs: ClassVar[Needs] = Needs.GRADIENTS
    in_nats: ClassVar[bool] = True

    def metrics(self, moments: Moments | None) -> tuple[Metric, Metric]:
        return moments.gradient_metric(), moments.input_metric()


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one weight in some coordinates, descending, float64, and the shape (M, N) of the weight.

    Where calibration gives them, also what each component is worth alone: `fisher_K`, the doubled loss increase in
    nats that K-FAC predicts without it, and `slope_K`, the first-order change of the loss.
    """

    shape: tuple[int, int]
    sigma_K: Tensor
    fisher_K: Tensor | None = None
    slope_K: Tensor | None = None


@dataclass(frozen=True)
class Components:
    """A weight as the sum of its K components, sorted: W = A B, and the first r of them are its best rank-r form.

    sqrt(sigma) is on each side. `safer` says what was done instead where the usual decomposition failed.
    """

    spectrum: Spectrum
    A_KM: Tensor  # transposed, so that a rank is a slice of rows on both sides
    B_KN: Tensor
    safer: str | None = None


def gram(rows_KJ: Tensor, metric: Metric = None) -> Tensor:
    """The float64 matrix rows C rows^T, of which only the lower triangle is filled in where it is large.

    The eigenvalue routines read no more than that.
    """
    weighted = times(rows_KJ, metric)
    G_KK = rows_KJ.new_zeros(len(rows_KJ), len(rows_KJ))
    for start in range(0, len(rows_KJ), GRAM_ROWS):
        end = start + GRAM_ROWS
        G_KK[start:end, :end] = rows_KJ[start:end] @ weighted[:end].T
    return G_KK


def singular_values(W_MN: Tensor) -> Tensor:
    """All K plain singular values, descending, float64, on the CPU, without the vectors."""
    return torch.linalg.eigvalsh(gram(_short_rows(W_MN))).clamp(min=0).sqrt().flip(0).cpu()


def short_vectors(W_MN: Tensor) -> Tensor:
    """The plain singular vectors of the shorter side as columns, K x K, of the largest value first, in float32."""
    return eigh(gram(_short_rows(W_MN)), GRAM)[1].flip(1).float()


def _short_rows(W_MN: Tensor) -> Tensor:
    """The weight in float64 with its shorter side first. Raises on a weight that holds NaN or infinity."""
    if not W_MN.isfinite().all():
        bad = int((~W_MN.isfinite()).sum())
        raise Refused(f"{bad} of its {W_MN.numel()} values are NaN or infinite: a weight must be finite to decompose.")
    W = W_MN.detach().double()
    return W if W.shape[0] <= W.shape[1] else W.T


@torch.no_grad()
def decompose(W_MN: Tensor, left: Metric = None, right: Metric = None) -> Components:
    """All K components of W in the coordinates of the metrics on its outputs (`left`) and inputs (`right`).

    Decomposed in float64; the factors return in the dtype of W, on its device. A singular value below 1e-8 of the
    largest is noise: it is raised to that floor before the split, which changes the balance of A and B and not A B.
    """
    M, N = W_MN.shape
    rows_KJ = _short_rows(W_MN)
    near, far = (left, right) if M <= N else (right, left)
    root, inverse, safer_root = roots(near)
    seen_KJ = rows_KJ if root is None else times(rows_KJ.T, root).T  # T W
    squares_K, U_KK, safer = eigh(gram(seen_KJ, far), GRAM)
    sigma_K = squares_K.clamp(min=0).sqrt().flip(0)
    U_KK = U_KK.flip(1)
    split_K = sigma_K.clamp(min=float(sigma_K[0]) * 1e-8 or 1.0).sqrt()
    lift_KK = U_KK.T if inverse is None else times(U_KK.T, inverse)  # (T^-1 U)^T, for T is symmetric
    near_K = (lift_KK * split_K[:, None]).to(W_MN.dtype)
    far_K = ((U_KK.T @ seen_KJ) / split_K[:, None]).to(W_MN.dtype)
    A_KM, B_KN = (near_K, far_K) if M <= N else (far_K, near_K)
    safer = "; ".join(note for note in (safer_root, safer) if note) or None
    return Components(Spectrum((M, N), sigma_K.cpu()), A_KM.contiguous(), B_KN.contiguous(), safer)


@torch.no_grad()
def valued(components: Components, moments: Moments) -> Spectrum:
    """The spectrum with the worth of each component, `fisher_K` and `slope_K`, as far as the moments go."""
    A_KM, B_KN, spectrum = components.A_KM.double(), components.B_KN.double(), components.spectrum
    fisher_K = slope_K = None
    if moments.gradients_MM is not None:
        fisher_K = (quadratic(A_KM, moments.gradient_metric()) * quadratic(B_KN, moments.input_metric())).cpu()
    if moments.gradient_MN is not None:
        slope_K = -((A_KM @ moments.gradient_MN.double()) * B_KN).sum(1).cpu()
    return Spectrum(spectrum.shape, spectrum.sigma_K, fisher_K, slope_K)


@torch.no_grad()
def predicted_nats(dW_MN: Tensor, moments: Moments) -> float:
    """1/2 tr(dW C_x dW^T C_g): the loss increase per token that K-FAC predicts for a change dW of the weight.

    In float32, which keeps four digits of it, since nothing is decomposed here.
    """
    dW_MN = dW_MN.float()
    C_x, C_g = moments.input_metric().float(), moments.gradient_metric().float()
    return 0.5 * float((times(dW_MN, C_x) * times(dW_MN.T, C_g).T).sum(dtype=torch.float64))
