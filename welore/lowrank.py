"""A linear layer stored as the product of two thin matrices.

Shape suffixes: M = out_features, N = in_features, R = rank.
"""

import torch
from torch import Tensor, nn

FAST = 8  # a GPU multiplies matrices in half precision fast where their rows are multiples of so many numbers


class LowRankLinear(nn.Module):
    """y = A (B x) + bias, with A_MR and B_RN in place of one dense W_MN (Section 3.1).

    Both factors are plain `nn.Linear` layers, so whatever knows how to adapt, quantize or place a linear layer knows
    how to do it to them.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.B = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.A = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def of(cls, A_MR: Tensor, B_RN: Tensor, bias_M: Tensor | None = None) -> "LowRankLinear":
        """Wrap two factors, and the bias of the dense layer where it had one, without copying them."""
        (out_features, rank), in_features = A_MR.shape, B_RN.shape[1]
        layer = cls(in_features, out_features, rank, bias=bias_M is not None, device="meta")
        layer.A.weight, layer.B.weight = nn.Parameter(A_MR), nn.Parameter(B_RN)
        if bias_M is not None:
            layer.A.bias = nn.Parameter(bias_M)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.A(self.B(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The dense layer with W = A B, multiplied in float32 and rounded once to the dtype of the factors."""
        weight, bias = self.A.weight.float() @ self.B.weight.float(), self.A.bias
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(self.A.weight.dtype))
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def singular(A_MR: Tensor, B_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M x K), sigma (K) and V^T (K x N) of the product A B in float32, without forming it; K = min(M, N, R)."""
    Q_MR, left_RR = torch.linalg.qr(A_MR.float())
    Q_NR, right_RR = torch.linalg.qr(B_RN.float().T)
    U_RR, sigma_R, Vh_RR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    return Q_MR @ U_RR, sigma_R, Vh_RR @ Q_NR.T


def balanced(A_MR: Tensor, B_RN: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of the `rank` largest singular directions of the product A B, with sqrt(sigma) on each side."""
    U_MK, sigma_K, Vh_KN = singular(A_MR, B_RN)
    root_K = sigma_K[:rank].sqrt()
    return (U_MK[:, :rank] * root_K).to(dtype), (root_K[:, None] * Vh_KN[:rank]).to(dtype)


def factored_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every LRC of a model."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def break_even_rank(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors hold fewer parameters than the dense matrix: r (m + n) < m n."""
    M, N = shape
    return (M * N - 1) // (M + N)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name` of the model, in the training state of what it takes the place of."""
    module.train(model.get_submodule(name).training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
