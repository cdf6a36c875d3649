"""How low-rank a matrix is, how alike two subspaces are, and what chance alone would give.

Shape suffixes: M, N = the sides of one matrix, K = min(M, N), R = rank of a subspace, D = head size, H = heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from welore.errors import Refused
from welore.ranks import NORMALIZATIONS
from welore.svd import gram, singular_values


def stable_rank(sigma_K: Tensor) -> float:
    """||W||_F^2 / sigma_1^2, between 1 and the number of values that are not 0; 1 for a matrix of zeros."""
    return float((sigma_K / sigma_K[0]).square().sum()) if sigma_K[0] > 0 else 1.0


def entropy_rank(weights_K: Tensor) -> float:
    """exp(entropy of weights / sum): how many of them count.

    The effective rank of Roy and Vetterli where the weights are the singular values, its form for energies where they
    are their squares. 1 for a matrix of zeros.
    """
    share_K = weights_K / weights_K.sum() if weights_K.sum() > 0 else torch.tensor([1.0])
    return math.exp(-float(torch.xlogy(share_K, share_K).sum()))


def energy_rank(sigma_K: Tensor, share: float = 0.9) -> int:
    """r_90: the smallest rank that holds this share of the squared norm."""
    energy_K = sigma_K.double().square().cumsum(0)
    return int((energy_K < share * energy_K[-1] * (1 - 1e-12)).sum()) + 1


def fraction_below(sigma_K: Tensor, threshold: float, normalize: str = "max") -> float:
    """The share of the normalized singular values below k: what WeLore's one threshold removes (Eq. 1)."""
    return float((NORMALIZATIONS[normalize](sigma_K) < threshold).double().mean())


def edge(shape: tuple[int, int], std: float) -> float:
    """The largest singular value of a matrix of independent entries in the limit: std (sqrt(M) + sqrt(N)).

    The upper edge of Marchenko and Pastur. What lies above it is more than noise of this size.
    """
    return std * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def shuffled(W_MN: Tensor, generator: torch.Generator) -> Tensor:
    """The same entries in a random order: a control with the same histogram and no structure."""
    order = torch.randperm(W_MN.numel(), generator=generator)
    return W_MN.flatten()[order.to(W_MN.device)].reshape(W_MN.shape)


def leading(W_MN: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """All K singular values, and the first singular vectors of both sides as orthonormal columns, M x R and N x R.

    In float64. R is the smallest of `rank` and both sides. Vectors of values that are 0 are any that complete the
    basis.
    """
    W_MN = W_MN.detach().double()
    tall = W_MN.shape[0] > W_MN.shape[1]
    rows_KJ = W_MN.T if tall else W_MN
    squares_K, near_KK = torch.linalg.eigh(gram(rows_KJ))
    sigma_K, near_KR = squares_K.clamp(min=0).sqrt().flip(0), near_KK.flip(1)[:, :rank]
    far_JR = torch.linalg.qr(rows_KJ.T @ near_KR).Q
    return (sigma_K, far_JR, near_KR) if tall else (sigma_K, near_KR, far_JR)


def similarity(U_MR: Tensor, V_MR: Tensor) -> float:
    """phi_r = ||U^T V||_F^2 / r of two orthonormal bases, in [0, 1]: 1 for the same subspace, 0 for orthogonal ones.

    r is the smaller number of columns.
    """
    return float((U_MR.T @ V_MR).square().sum()) / min(U_MR.shape[1], V_MR.shape[1])


def chance(rank: int, size: int) -> float:
    """The mean of phi_r over random subspaces of this rank among `size` directions."""
    return rank / size


def above_chance(phi: float, rank: int, size: int) -> float:
    """phi_r on the scale on which chance is 0 and the same subspace is 1; 0 where r is the whole space."""
    by_chance = chance(rank, size)
    return (phi - by_chance) / (1 - by_chance) if rank < size else 0.0


def cosine(G_MN: Tensor, H_MN: Tensor) -> float:
    """<G, H>_F / (||G|| ||H||), by chance within about 1 / sqrt(MN) of 0; 0 where either is 0."""
    norms = float(G_MN.norm() * H_MN.norm())
    return float((G_MN * H_MN).sum()) / norms if norms > 0 else 0.0


@dataclass(frozen=True)
class Heads:
    """How the rows of the q, k and v weights and the columns of the o weight are divided into heads of D.

    With grouped queries one key head serves `queries // keys` query heads, in their order.
    """

    queries: int
    keys: int

    def __post_init__(self):
        if self.keys < 1 or self.queries % self.keys:
            raise Refused(f"{self.queries} query heads do not divide among {self.keys} key heads. Write a multiple.")

    def products(self, W_q: Tensor, W_k: Tensor, W_v: Tensor, W_o: Tensor) -> dict[str, list[Tensor]]:
        """W_Q^T W_K and W_O W_V of every query head: two matrices of rank at most D.

        They stay the same where a head's q and k (or v and o) are changed by inverse maps, which changes the spectra
        of all four weights and not the model: the part of a spectrum that is no choice of coordinates. Where rotary
        positions stand between q and k, W_Q^T W_K is what scores two tokens at one and the same position, and the
        model stays the same only under maps that commute with the rotations: one scale and angle a pair of rows.
        """
        share = self.queries // self.keys
        q, o = W_q.chunk(self.queries), W_o.chunk(self.queries, dim=1)
        k, v = ([part for part in W.chunk(self.keys) for _ in range(share)] for W in (W_k, W_v))
        return {
            "qk": [a.T @ b for a, b in zip(q, k, strict=True)],
            "ov": [a @ b for a, b in zip(o, v, strict=True)],
        }


def describe(W_MN: Tensor, thresholds: Sequence[float]) -> dict[str, float]:
    """What a figure says of one matrix in scalars, and of the edge of noise of the same size.

    `r_90` and `entropy_rank` are shares of K. `above_edge` counts singular values above the edge for the standard
    deviation of the entries.
    """
    return describe_spectrum(singular_values(W_MN), tuple(W_MN.shape), float(W_MN.double().std()), thresholds)


def describe_spectrum(
    sigma_K: Tensor, shape: tuple[int, int], std: float, thresholds: Sequence[float]
) -> dict[str, float]:
    """`describe` for singular values that are there already, of a matrix whose entries have this deviation."""
    K = len(sigma_K)
    found = {
        "norm": float(sigma_K.norm()),
        "sigma_1": float(sigma_K[0]),
        "stable_rank": stable_rank(sigma_K),
        "entropy_rank": entropy_rank(sigma_K) / K,
        "energy_entropy_rank": entropy_rank(sigma_K.square()) / K,
        "r_90": energy_rank(sigma_K) / K,
        "edge": edge(shape, std),
        "above_edge": int((sigma_K > edge(shape, std)).sum()),
    }
    for normalize in NORMALIZATIONS:
        found |= {f"below_{k:g}_{normalize}": fraction_below(sigma_K, k, normalize) for k in thresholds}
    return found
