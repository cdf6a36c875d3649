"""Which values of a weight become zero, what makes up for them, and how they stay zero.

Masks are True where a value goes. Statistics are expectations over tokens, E[xx^T].

Shape suffixes: M = out_features, N = in_features, B = columns of one block.
"""

import torch
from torch import Tensor, nn

from welore.errors import Refused


def lowest(scores_MN: Tensor, share: float, group: int) -> Tensor:
    """True at the int(share x group) lowest scores of every `group` consecutive ones, row after row.

    Exactly so many: of equal scores, of which bfloat16 weights have plenty, the first go.
    """
    groups = scores_MN.reshape(-1, group)
    count = int(round(share * group, 6))  # 0.29 x 100 is 28.999... in floating point
    gone = torch.zeros_like(groups, dtype=torch.bool)
    gone.scatter_(1, groups.sort(dim=1, stable=True).indices[:, :count], True)
    return gone.view(scores_MN.shape)


def mask_magnitude(W_MN: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """True at the smallest |W| of the whole matrix, or of every `group` inputs of each output.

    The reference code also zeroes the first weight that is to stay, and all that are equal to it.
    """
    return lowest(W_MN.abs(), sparsity, group or W_MN.numel())


def mask_wanda(W_MN: Tensor, squares_N: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """True at the smallest |W_ij| sqrt(E[x_j^2]) of each row, or of every `group` inputs of it; scored in float32."""
    scores_MN = W_MN.abs() * squares_N.to(torch.promote_types(W_MN.dtype, torch.float32)).sqrt()
    return lowest(scores_MN, sparsity, group or W_MN.shape[1])


@torch.no_grad()
def sparsegpt(
    W_MN: Tensor, inputs_NN: Tensor, sparsity: float, group: int | None = None, damping: float = 0.01, block: int = 128
) -> tuple[Tensor, str | None]:
    """The pruned weight in the dtype of W, and a note where the damping was not enough; at sparsity 0 W itself.

    Column after column, what is zeroed is made up for by the columns after it, which is optimal for the outputs given
    the columns before. Each block of columns is chosen at once over all rows (a pattern: each group, when it is
    reached). The scale of E[xx^T] does not matter. A column whose input is always 0 becomes 0. The inverse is float64,
    the columns are updated in float32 (float64 for a float64 weight).

    The reference code zeroes one weight more per block, and adds 1 to the diagonal at a dead column, where the mean of
    the others is added here, so that damping does not depend on the scale of the inputs.
    """
    if sparsity == 0:
        return W_MN.clone(), None
    dtype = torch.promote_types(W_MN.dtype, torch.float32)
    U_NN, note = inverse_root(inputs_NN, damping)
    U_NN, W = U_NN.to(dtype), W_MN.to(dtype, copy=True)
    W[:, inputs_NN.diagonal() == 0] = 0
    for start in range(0, W.shape[1], block):
        end = start + block
        errors_MB = _prune_block(W[:, start:end], U_NN[start:end, start:end], sparsity, group)
        W[:, end:] -= errors_MB @ U_NN[start:end, end:]
    return W.to(W_MN.dtype), note


def _prune_block(W_MB: Tensor, U_BB: Tensor, sparsity: float, group: int | None) -> Tensor:
    """Prune a block in place; what it leaves to the columns after it, in units of the diagonal of U."""
    errors_MB = torch.zeros_like(W_MB)
    width = group or W_MB.shape[1]  # columns that are chosen together
    for i in range(W_MB.shape[1]):
        if i % width == 0:
            scores = (W_MB[:, i : i + width] / U_BB.diagonal()[i : i + width]) ** 2
            gone = lowest(scores, sparsity, group or scores.numel())
        kept_M = W_MB[:, i].masked_fill(gone[:, i % width], 0)
        errors_MB[:, i] = (W_MB[:, i] - kept_M) / U_BB[i, i]
        W_MB[:, i:] -= torch.outer(errors_MB[:, i], U_BB[i, i:])
        W_MB[:, i] = kept_M
    return errors_MB


def inverse_root(inputs_NN: Tensor, damping: float) -> tuple[Tensor, str | None]:
    """The upper triangular U with U^T U = (E[xx^T] + damping mean(diag) I)^-1 in float64.

    Where that is not positive definite, the damping is multiplied by 10 until it is, and a note says so.
    """
    H_NN = inputs_NN.double().clone()
    diagonal_N = H_NN.diagonal()
    dead_N = diagonal_N == 0
    scale = diagonal_N[~dead_N].mean()
    diagonal_N[dead_N] = scale
    eye_NN = torch.eye(len(H_NN), dtype=H_NN.dtype, device=H_NN.device)
    tried = damping
    while tried <= 10:
        # The Cholesky factor of H read backwards, inverted and read backwards again: one factorization instead of two.
        L_NN, failed = torch.linalg.cholesky_ex((H_NN + tried * scale * eye_NN).flip(0, 1))
        if not failed:
            U_NN = torch.linalg.solve_triangular(L_NN, eye_NN, upper=False).flip(0, 1)
            return U_NN, None if tried == damping else f"Cholesky failed with damping {damping:g}: {tried:g} was taken"
        tried *= 10
    raise Refused(
        f"E[xx^T] is not positive definite, not even with damping {tried / 10:g}. Calibrate in a wider dtype "
        f"(model.dtype=float32), or use prune=wanda, which needs no inverse."
    )


class KeptZeros:
    """Remembers where the given parameters are zero, at one byte a value, and keeps them zero.

    As `optimizer.register_step_post_hook(zeros)` it zeroes these values of every parameter that trains after each
    step, and of its float32 master (welore/optim.py). `apply` does so at any other time: after adapters are merged
    into a pruned weight, which loses what they had put where it is zero.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.gone = [(p, p.detach() == 0) for p in parameters if not p.detach().all()]

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, gone in self.gone:
            parameter.masked_fill_(gone.to(parameter.device), 0)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        masters = {id(parameter): master for parameter, master in getattr(optimizer, "pairs", ())}
        for parameter, gone in self.gone:
            if parameter.requires_grad:
                for stepped in {parameter, masters.get(id(parameter), parameter)}:
                    stepped.masked_fill_(gone.to(stepped.device), 0)
