"""Truncated singular value decompositions of one weight, without ever running a full SVD.

For W_MN with the shorter side K = min(M, N), the K x K Gram matrix G = W W^T (or W^T W) is formed and decomposed in
float64. The square roots of its eigenvalues are the singular values, its eigenvectors are the singular vectors of the
shorter side, and the other side follows by one product: W_r = U_r U_r^T W is the best rank-r approximation
(Eckart-Young), whichever side U spans.

Error against a float64 SVD: sigma^2 is off by about 1e-16 sigma_max^2, so sigma is off by at most 1.5e-8 sigma_max,
and by far less for the larger values. Values below 1e-8 sigma_max are noise of either method.

Shape suffixes: M = out_features, N = in_features, K = min(M, N), R = rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from welore.errors import Refused

GRAM_ROWS = 1024  # rows of a Gram matrix that are formed together


@dataclass
class Svd:
    """How a weight is decomposed: in which coordinates, T_L W T_R = U S V^T."""

    name: str


@dataclass
class Plain(Svd):
    """The weight as it is: T_L = T_R = I (WeLore-COMP, Section 3.1). Needs no data."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one weight, descending, in float64, and the shape (M, N) that they came from."""

    shape: tuple[int, int]
    sigma_K: Tensor


@dataclass(frozen=True)
class Basis:
    """The singular vectors of the shorter side of one weight: columns of U if M <= N, else columns of V."""

    sigma_K: Tensor
    vectors_KK: Tensor


def gram(W_MN: Tensor) -> Tensor:
    """The float64 Gram matrix of the shorter side, of which only the lower triangle is filled in where it is large.

    The eigenvalue routines read no more than that. Raises on a weight that holds NaN or infinity.
    """
    if not W_MN.isfinite().all():
        bad = int((~W_MN.isfinite()).sum())
        raise Refused(f"{bad} of its {W_MN.numel()} values are NaN or infinite: a weight must be finite to decompose.")
    W = W_MN.detach().double()
    rows = W if W.shape[0] <= W.shape[1] else W.T
    G_KK = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), GRAM_ROWS):
        end = start + GRAM_ROWS
        G_KK[start:end, :end] = rows[start:end] @ rows[:end].T
    return G_KK


def singular_values(W_MN: Tensor) -> Tensor:
    """All K singular values, descending, float64, on the CPU."""
    return torch.linalg.eigvalsh(gram(W_MN)).clamp(min=0).sqrt().flip(0).cpu()


def basis(W_MN: Tensor) -> Basis:
    """All K singular values and the vectors of the shorter side, decomposed in float64, vectors kept in float32."""
    squares_K, vectors_KK = torch.linalg.eigh(gram(W_MN))
    return Basis(squares_K.clamp(min=0).sqrt().flip(0), vectors_KK.flip(1).float())


@torch.no_grad()
def factors(W_MN: Tensor, vectors: Basis, rank: int) -> tuple[Tensor, Tensor]:
    """A_MR and B_RN with A B the best rank-`rank` approximation of W in the Frobenius norm, sqrt(sigma) on each side.

    Computed in float32; the factors return in the dtype and on the device of W. A singular value below 1e-8 of the
    largest is noise: it is raised to that floor before the split, which changes the balance of A and B and not A B.
    """
    W = W_MN.detach().float()
    P_KR = vectors.vectors_KK[:, :rank].to(W.device)
    sigma_R = vectors.sigma_K[:rank].to(W.device)
    root_R = sigma_R.clamp(min=float(vectors.sigma_K[0]) * 1e-8 or 1.0).sqrt().float()
    if W.shape[0] <= W.shape[1]:
        A_MR, B_RN = P_KR * root_R, (P_KR.T @ W) / root_R[:, None]
    else:
        A_MR, B_RN = (W @ P_KR) / root_R, root_R[:, None] * P_KR.T
    return A_MR.to(W_MN.dtype).contiguous(), B_RN.to(W_MN.dtype).contiguous()
