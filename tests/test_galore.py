import io

import pytest
import torch
from torch import nn

from welore.galore import GaLoreAdamW
from welore.optim import AdamW

ADAM = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
OPTIONS = ADAM | dict(rank=3, gap=4, scale=0.25)
SHAPES = [(12, 8), (8, 12), (8, 8), (3, 20), (7,)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradient(shape, step):
    generator = torch.Generator().manual_seed(1000 * step + sum(shape))
    return torch.randn(shape, generator=generator)


def trajectory(optimizer, parameters, steps, gradients=gradient):
    for step in steps:
        for parameter in parameters:
            parameter.grad = None
            (parameter * gradients(parameter.shape, step).to(parameter.dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in parameters]


def reference(start, steps, lr, betas, eps, weight_decay, rank, gap, scale):
    """GaLore in float64 by full SVDs: right singular vectors where M >= N, else left; moments outlive a projection."""
    W, mean, square, P = start.double(), 0.0, 0.0, None
    for step in steps:
        G = gradient(W.shape, step).double()
        projected = W.ndim == 2 and min(W.shape) > rank
        if projected and step % gap == 0:
            U, _, Vh = torch.linalg.svd(G)
            P = Vh[:rank] if W.shape[0] >= W.shape[1] else U[:, :rank]
        right = projected and W.shape[0] >= W.shape[1]
        low = (G @ P.T if right else P.T @ G) if projected else G
        mean = betas[0] * mean + (1 - betas[0]) * low
        square = betas[1] * square + (1 - betas[1]) * low**2
        N = (mean / (1 - betas[0] ** (step + 1))) / ((square / (1 - betas[1] ** (step + 1))).sqrt() + eps)
        N = (N @ P if right else P @ N) if projected else N
        W = W * (1 - lr * weight_decay) - lr * scale * N
    return W


def test_it_follows_the_definition_until_the_projection_changes():
    ours = parameters()
    start = [p.detach().clone() for p in ours]
    found = trajectory(GaLoreAdamW(ours, **OPTIONS), ours, range(4))
    for value, first in zip(found, start, strict=True):
        torch.testing.assert_close(value.double(), reference(first, range(4), **OPTIONS), rtol=0, atol=1e-5)


def test_a_new_projection_is_taken_after_gap_steps():
    """With rank = 1 and moments without memory no sign of a singular vector matters, so runs of any length compare."""
    options = OPTIONS | dict(rank=1, betas=(0.0, 0.99))
    ours = parameters()
    start = [p.detach().clone() for p in ours]
    found = trajectory(GaLoreAdamW(ours, **options), ours, range(10))
    for value, first in zip(found, start, strict=True):
        torch.testing.assert_close(value.double(), reference(first, range(10), **options), rtol=0, atol=1e-5)


def test_with_nothing_to_project_it_is_adamw():
    ours, theirs = parameters(), parameters()
    found = trajectory(GaLoreAdamW(ours, **ADAM, rank=100, gap=4, scale=1.0), ours, range(10))
    for value, expected in zip(found, trajectory(AdamW(theirs, **ADAM), theirs, range(10)), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_gradient_that_fits_in_the_projection_loses_nothing():
    """A huge eps makes Adam linear in the gradient; one of rank 3 in fixed directions passes a projection whole."""
    adam = ADAM | dict(lr=1e4, eps=1e6)
    directions = {shape: (gradient(shape, 99)[:, :3], gradient(shape, 98)[:3]) for shape in SHAPES[:3]}

    def thin(shape, step):
        left_MR, right_RN = directions[tuple(shape)]
        return left_MR @ gradient((3, 3), step) @ right_RN

    ours, theirs = parameters()[:3], parameters()[:3]
    found = trajectory(GaLoreAdamW(ours, **adam, rank=3, gap=4, scale=1.0), ours, range(10), thin)
    expected = trajectory(AdamW(theirs, **adam), theirs, range(10), thin)
    for value, other, start in zip(found, expected, parameters(), strict=False):
        assert (other - start).norm() > 0.1
        torch.testing.assert_close(value, other, rtol=0, atol=2e-4 * float((other - start).norm()))


def test_between_two_projections_a_weight_moves_in_rank_directions_only():
    ours = parameters()[:3]
    start = [p.detach().clone() for p in ours]
    found = trajectory(GaLoreAdamW(ours, **OPTIONS | dict(weight_decay=0.0)), ours, range(4))
    for value, first in zip(found, start, strict=True):
        assert int(torch.linalg.matrix_rank(value - first, rtol=1e-3)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_holds_tensors_only_and_goes_on_to_the_bit(dtype):
    through = parameters(dtype)
    expected = trajectory(GaLoreAdamW(through, **OPTIONS), through, range(10))
    first = parameters(dtype)
    optimizer = GaLoreAdamW(first, **OPTIONS)
    trajectory(optimizer, first, range(6))  # in the middle of a projection
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = GaLoreAdamW(second, **OPTIONS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value, other in zip(trajectory(resumed, second, range(6, 10)), expected, strict=True):
        assert torch.equal(value, other)
