"""The curvature of the loss in one weight: the largest eigenvalues of its block of the Hessian or of Gauss-Newton.

Neither is ever formed. A product with a direction is two backward passes; Lanczos needs some dozens of products.

Shape suffixes: M, N = the sides of the weight, S = Lanczos steps, K = eigenvalues kept, T = tokens, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from welore.errors import Refused

Product = Callable[[Tensor], Tensor]  # a symmetric operator on directions of shape (M, N)


def check_trains(weight: Tensor, name: str) -> None:
    """Refuse a weight whose gradient autograd will not form."""
    if not weight.requires_grad:
        kind = "is frozen" if weight.is_floating_point() else f"holds {weight.dtype}"
        raise Refused(
            f"{name} {kind}: the loss has no gradient in it to probe. Probe a dense model in float32, and a weight "
            f"that requires_grad."
        )


def _differentiate(outputs: Tensor, inputs: Tensor, direction: Tensor | None, again: bool) -> Tensor:
    try:
        (found,) = torch.autograd.grad(
            outputs, inputs, direction, create_graph=again, retain_graph=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "derivative for" not in str(error) and "twice" not in str(error) and "double" not in str(error):
            raise
        raise Refused(
            f"a kernel of the model can be differentiated only once ({str(error).splitlines()[0]}). Curvature needs "
            f"it twice: run attention by torch's math kernel or with attn_implementation=eager."
        ) from error
    return found


def hessian(loss: Tensor, weight: Tensor) -> Product:
    """V -> d<dL/dW, V>/dW. Holds the graph of the first backward pass as long as the product lives."""
    G_MN = _differentiate(loss, weight, None, again=True)
    if not G_MN.requires_grad:  # the loss is linear in this weight
        return torch.zeros_like
    return lambda V_MN: _differentiate(G_MN, weight, V_MN, again=False)


def gauss_newton(logits_TV: Tensor, weight: Tensor) -> Product:
    """V -> J^T H J V, with J the Jacobian of the logits and H the Hessian of the mean cross-entropy in them.

    The Hessian without the curvature of the network itself: never negative. For this loss it is the Fisher matrix.
    """
    # J^T u is linear in u, so that its derivative in u towards V is J V, whatever u is.
    u_TV = torch.zeros_like(logits_TV, requires_grad=True)
    pulled_MN = _differentiate(logits_TV, weight, u_TV, again=True)
    p_TV = logits_TV.detach().softmax(-1)

    def product(V_MN: Tensor) -> Tensor:
        pushed_TV = _differentiate(pulled_MN, u_TV, V_MN, again=False)
        curved_TV = p_TV * (pushed_TV - (p_TV * pushed_TV).sum(-1, keepdim=True)) / len(p_TV)
        return _differentiate(logits_TV, weight, curved_TV, again=False)

    return product


@dataclass(frozen=True)
class Eigen:
    """The largest eigenvalues, algebraically, descending, float64; their residuals ||A v - lambda v||; their vectors.

    `lowest` is the smallest eigenvalue that was seen: below 0 where the loss curves down.
    """

    values_K: Tensor
    residuals_K: Tensor
    vectors_KMN: Tensor
    lowest: float
    steps: int


@torch.no_grad()
def lanczos(product: Product, like_MN: Tensor, count: int, steps: int, generator: torch.Generator) -> Eigen:
    """The `count` largest eigenvalues of a symmetric operator, in at most `steps` products.

    Every new direction is made orthogonal to all before, twice, so that rounding makes no eigenvalue appear again. It
    ends early where the directions span an invariant space: of a repeated eigenvalue one vector is found.
    """
    steps = min(steps, like_MN.numel())
    q = torch.randn(like_MN.shape, generator=generator, dtype=torch.float64).flatten().to(like_MN)
    basis_SD = like_MN.new_zeros(steps, like_MN.numel())
    diagonal, beside = [], []
    for step in range(steps):
        basis_SD[step] = q / q.norm()
        with torch.enable_grad():
            w = product(basis_SD[step].reshape(like_MN.shape)).detach().flatten()
        diagonal.append(float(basis_SD[step] @ w))
        for _ in range(2):
            w = w - basis_SD[: step + 1].T @ (basis_SD[: step + 1] @ w)
        beside.append(float(w.norm()))
        q = w
        if beside[-1] <= 10 * torch.finfo(w.dtype).eps * max(map(abs, diagonal)):
            break
    taken = len(diagonal)
    T_SS = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    values_S, Y_SS = torch.linalg.eigh(T_SS + torch.diag(off, 1) + torch.diag(off, -1))
    top = torch.arange(taken - 1, max(-1, taken - 1 - count), -1)
    vectors = Y_SS[:, top].T.to(basis_SD) @ basis_SD[:taken]
    residuals = (beside[-1] * Y_SS[-1, top]).abs()
    return Eigen(values_S[top], residuals, vectors.reshape(-1, *like_MN.shape), float(values_S[0]), taken)


@torch.no_grad()
def trace(product: Product, eigen: Eigen, samples: int, generator: torch.Generator) -> float:
    """The trace: the found eigenvalues, and Hutchinson's estimate of the rest from random signs.

    Without the largest eigenvalues, what is estimated varies little.
    """
    U_KD = eigen.vectors_KMN.flatten(1)
    rest = 0.0
    for _ in range(samples):
        signs = torch.randint(0, 2, (U_KD.shape[1],), generator=generator).mul_(2).sub_(1).to(U_KD)
        z = signs - U_KD.T @ (U_KD @ signs)
        with torch.enable_grad():
            rest += float(z @ product(z.reshape(eigen.vectors_KMN.shape[1:])).detach().flatten()) / samples
    return float(eigen.values_K.sum()) + rest


def gaps(values_K: Tensor, of_trace: float, rank: int) -> dict[str, float]:
    """What "Hessian gap" may mean, which the paper does not say. Eigenvalues descend; `rank` is r of Assumption A.3.

    `first` lambda_1 - lambda_2, `ratio` lambda_1 / lambda_2, `fall` (lambda_1 - lambda_r) / lambda_1, `dominance`
    lambda_1 / lambda_r, `assumed` gamma of A.3, lambda_r - lambda_(r+1), `relative` the same over lambda_1, `share`
    the part of the trace in the first r. All but `first` and `assumed` are free of scale. NaN where one divides by 0.
    """
    if len(values_K) <= rank or rank < 2:
        raise Refused(f"a gap at r={rank} needs r >= 2 and {rank + 1} eigenvalues, and there are {len(values_K)}.")
    one, two, r, after = (float(values_K[i]) for i in (0, 1, rank - 1, rank))

    def over(a: float, b: float) -> float:
        return a / b if b != 0 else float("nan")

    return {
        "first": one - two,
        "ratio": over(one, two),
        "fall": over(one - r, one),
        "dominance": over(one, r),
        "assumed": r - after,
        "relative": over(r - after, one),
        "share": over(float(values_K[:rank].sum()), of_trace),
    }


def outside(G_MN: Tensor, vectors_KMN: Tensor) -> float:
    """rho_k = ||(I - U U^T) g|| / ||g||, which Theorem 2.2 sends to 0; by chance sqrt(1 - k / MN)."""
    U_KD, g = vectors_KMN.flatten(1).double(), G_MN.flatten().double()
    return float((g - U_KD.T @ (U_KD @ g)).norm() / g.norm()) if g.norm() > 0 else float("nan")
