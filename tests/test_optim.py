import io

import pytest
import torch
from torch import nn

from welore.optim import AdamW, state_bytes

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(6, 4), (5,)]]


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None
        (parameter * gradient).sum().backward()


def trajectory(optimizer, parameters, steps):
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in parameters]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_on_float32_parameters_it_is_torch_adamw_to_the_bit():
    ours, theirs = parameters(), parameters()
    mine = trajectory(AdamW(ours, **OPTIONS), ours, range(20))
    assert equal(mine, trajectory(torch.optim.AdamW(theirs, **OPTIONS, fused=True), theirs, range(20)))


def test_it_is_adamw_as_defined():
    """The definition in float64: decoupled decay, bias-corrected moments, eps outside of the root."""
    ours = parameters()
    expected = [p.detach().double() for p in ours]
    means, squares = [torch.zeros_like(p) for p in expected], [torch.zeros_like(p) for p in expected]
    lr, (beta1, beta2), eps, decay = OPTIONS.values()
    optimizer = AdamW(ours, **OPTIONS)
    for step in range(1, 11):
        give_gradients(ours, step)
        for index, parameter in enumerate(ours):
            gradient = parameter.grad.double()
            means[index] = beta1 * means[index] + (1 - beta1) * gradient
            squares[index] = beta2 * squares[index] + (1 - beta2) * gradient**2
            mean, square = means[index] / (1 - beta1**step), squares[index] / (1 - beta2**step)
            expected[index] = expected[index] * (1 - lr * decay) - lr * mean / (square.sqrt() + eps)
        optimizer.step()
    for parameter, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=1e-6)


def test_masters_keep_the_small_updates_that_a_bfloat16_step_loses():
    steps, options = range(50), OPTIONS | {"lr": 5e-5, "weight_decay": 0.0}
    start = [p.detach().float() for p in parameters(torch.bfloat16)]
    exact = [nn.Parameter(p.clone()) for p in start]
    with_masters, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer = AdamW(with_masters, **options)
    for step in steps:
        for group in (with_masters, plain, exact):
            give_gradients(group, step)
        for parameter, like in zip(exact, plain, strict=True):
            parameter.grad = like.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            adam, plain_adam = torch.optim.AdamW(exact, **options, fused=True), torch.optim.AdamW(plain, **options)
        adam.step()
        plain_adam.step()
    assert equal([master for _, master in optimizer.pairs], exact)
    assert equal(with_masters, [p.bfloat16() for p in exact])
    lost = torch.cat([(p.float() == s).flatten() for p, s in zip(plain, start, strict=True)])
    moved = torch.cat([(p != s).flatten() for p, s in zip(exact, start, strict=True)])
    assert moved.all() and lost.float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_to_the_bit(dtype):
    through = parameters(dtype)
    expected = trajectory(AdamW(through, **OPTIONS), through, range(8))
    first = parameters(dtype)
    optimizer = AdamW(first, **OPTIONS)
    trajectory(optimizer, first, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = parameters(dtype)
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value)
    resumed = AdamW(second, **OPTIONS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert equal(trajectory(resumed, second, range(5, 8)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_grad_clears_the_gradients_of_the_model(dtype):
    ours = parameters(dtype)
    optimizer = AdamW(ours, **OPTIONS)
    give_gradients(ours, 0)
    optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in ours]
    optimizer.step()
    assert all(parameter.grad is None for parameter in ours) and equal(ours, before)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_the_state_is_two_moments_and_a_master_where_the_model_is_not_float32(dtype, copies):
    ours = parameters(dtype)
    optimizer = AdamW(ours, **OPTIONS)
    trajectory(optimizer, ours, range(1))
    counters = 4 * len(ours)
    assert state_bytes(optimizer) == copies * 4 * sum(p.numel() for p in ours) + counters


def test_passes_accumulate_in_float32_and_no_gradient_is_held_twice():
    (parameter,) = weight = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = AdamW(weight, **OPTIONS)
    for small in (1.0, 2.0**-10, 2.0**-10):  # bfloat16 has 8 bits: the small ones would be lost
        (parameter * small).sum().backward()
        assert parameter.grad is None
    ((_, master),) = optimizer.pairs
    assert torch.equal(master.grad, torch.full((3,), 1 + 2.0**-9))
    optimizer.step()
    optimizer.zero_grad()
    assert master.grad is None


def test_after_release_the_model_holds_no_gradient_and_another_optimizer_can_take_it_up():
    (weight,) = parameters(torch.bfloat16)[:1]
    first = AdamW([weight], lr=1e-2)
    first.release()
    second = AdamW([weight], lr=1e-2)
    weight.float().square().sum().backward()
    assert second.pairs[0][1].grad is not None and first.pairs[0][1].grad is None
    second.release()
    assert weight.grad is None and second.pairs[0][1].grad is None
    first.attach()
    weight.float().square().sum().backward()
    assert first.pairs[0][1].grad is not None and second.pairs[0][1].grad is None and weight.grad is None
