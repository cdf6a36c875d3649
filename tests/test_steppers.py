"""APOLLO, Fira, Muon and LISA against their definitions, and from a saved state to the bit."""

import io
from copy import deepcopy

import pytest
import torch
from torch import nn

from welore.apollo import Apollo, Fira
from welore.modes import select
from welore.muon import MuonAdamW
from welore.optim import AdamW
from welore.parts import outlier_shares
from welore.steppers import EightBit

ADAM = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
FIRA = ADAM | dict(rank=3, gap=4, scale=0.5)
APOLLO = FIRA | dict(per="channel", seed=0)
MUON = ADAM | dict(momentum=0.9)
SHAPES = [(12, 8), (8, 12), (3, 20), (7,)]
OPTIMIZERS = {
    "apollo": (Apollo, APOLLO),
    "apollo-mini": (Apollo, APOLLO | dict(per="tensor", rank=1)),
    "fira": (Fira, FIRA),
    "muon": (MuonAdamW, MUON),
}
every = pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradient(shape, step):
    generator = torch.Generator().manual_seed(1000 * step + sum(shape))
    return torch.randn(shape, generator=generator) * (1 + step % 3)


def trajectory(optimizer, parameters, steps):
    for step in steps:
        for parameter in parameters:
            (parameter * gradient(parameter.shape, step).to(parameter.dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in parameters]


def reference(start, index, steps, kind, lr, betas, eps, weight_decay, rank, gap, scale, per="channel", seed=0):
    """Both papers in float64, always on the transpose with M <= N, where channels are columns; decay comes last."""
    flip = start.ndim == 2 and start.shape[0] >= start.shape[1]
    W = (start.T if flip else start).double()
    m, v, P, before = 0.0, 0.0, None, None
    for t in steps:
        G = gradient(start.shape, t).double()
        G = G.T if flip else G
        projected = G.ndim == 2 and min(G.shape) > rank
        if projected and t % gap == 0:
            draw = torch.Generator().manual_seed(seed + 1_000_003 * index + t)
            drawn = torch.randn(len(G), rank, generator=draw).double() / rank**0.5
            P = drawn if kind is Apollo else torch.linalg.svd(G).U[:, :rank]
        R = P.T @ G if projected else G
        m, v = betas[0] * m + (1 - betas[0]) * R, betas[1] * v + (1 - betas[1]) * R**2
        N = m / (v**0.5 + eps)
        if projected:
            ratio = N.norm() / R.norm() if per == "tensor" else N.norm(dim=0) / R.norm(dim=0)
            whole = (G if kind is Apollo else G - P @ R) * ratio
            if before is not None:
                whole = whole * min(1.0, 1.01 * before / whole.norm())
            before = whole.norm()
            N = scale**0.5 * whole if kind is Apollo else scale * (P @ N + whole)
        corrected = lr * (1 - betas[1] ** (t + 1)) ** 0.5 / (1 - betas[0] ** (t + 1))
        W = (W - corrected * N) * (1 - lr * weight_decay)
    return W.T if flip else W


@pytest.mark.parametrize("name", ["apollo", "apollo-mini", "fira"])
def test_it_follows_the_definition(name):
    kind, options = OPTIMIZERS[name]
    steps = range(4 if kind is Fira else 9)  # a new SVD may turn signs, which the old moments do not know
    ours = parameters()
    found = trajectory(kind(ours, **options), ours, steps)
    for index, (value, start) in enumerate(zip(found, parameters(), strict=True)):
        expected = reference(start.detach(), index, steps, kind, **options)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=5e-6)
        assert (value - start).norm() > 0.01


def test_muon_is_the_one_of_torch_on_matrices_and_adamw_on_vectors():
    ours, theirs = parameters(), parameters()
    found = trajectory(MuonAdamW(ours, **MUON), ours, range(8))
    muon = torch.optim.Muon(theirs[:3], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    expected = trajectory(muon, theirs[:3], range(8)) + trajectory(AdamW(theirs[3:], **ADAM), theirs[3:], range(8))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_holds_tensors_only_and_goes_on_to_the_bit(kind, options, dtype):
    through = parameters(dtype)
    expected = trajectory(kind(through, **options), through, range(10))
    first = parameters(dtype)
    optimizer = kind(first, **options)
    trajectory(optimizer, first, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = kind(second, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value, other in zip(trajectory(resumed, second, range(6, 10)), expected, strict=True):
        assert torch.equal(value, other)


@every
def test_masters_are_float32_and_the_model_is_their_rounding(kind, options):
    ours = parameters(torch.bfloat16)
    optimizer = kind(ours, **options)
    trajectory(optimizer, ours, range(3))
    assert len(optimizer.pairs) == len(SHAPES)
    assert all(m.dtype == torch.float32 and torch.equal(p, m.bfloat16()) for p, m in optimizer.pairs)


@pytest.mark.parametrize("mode", ["apollo mode.rank=8", "fira mode.rank=8", "muon"])
def test_they_train_what_full_trains(compressed, configured, mode):
    names = {id(p) for p in select(compressed, configured("mode=full").mode)}
    assert {id(p) for p in select(compressed, configured(*f"mode={mode}".split()).mode)} == names


def test_lisa_trains_the_drawn_layers_alone_and_drops_the_moments_of_the_others(compressed, configured, train):
    before = {name: p.detach().clone() for name, p in compressed.named_parameters()}
    tuner = train(compressed, "mode=lisa", "mode.layers=1", "mode.gap=50", "task.training.steps=3")
    (drawn,) = tuner.mode.drawn(0)
    moved = {name for name, p in compressed.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith(f"model.layers.{drawn}.") or name == "model.norm.weight" for name in moved)
    assert {name for name in tuner.names if f".{drawn}." in name} <= moved
    optimizer = tuner.optimizers(use_pl_optimizer=False)
    assert len(optimizer.state) == len(moved) < len(tuner.names)


def test_lisa_draws_every_gap_steps_from_its_seed(compressed, configured):
    mode = configured("mode=lisa", "mode.layers=1", "mode.gap=3").mode
    select(compressed, mode)
    draws = [mode.drawn(step) for step in range(60)]
    assert all(draws[step] == draws[step - step % 3] for step in range(60))
    assert {frozenset(d) for d in draws} == {frozenset({0}), frozenset({1})}
    mode.seed = 1
    assert draws != [mode.drawn(step) for step in range(60)]


def test_outliers_draw_their_layers_more_often_and_a_draw_is_that_of_its_step(family, compress, configured):
    model = family("llama")
    compress(model)
    mode = configured("mode=lisa", "mode.layers=1", "mode.gap=1", "mode.sampling=outlier", "mode.outlier=3").mode
    select(model, mode)
    shares = outlier_shares(model, 3)
    draws = [mode.drawn(step) for step in range(2000)]
    assert draws == [mode.drawn(step) for step in range(2000)] and all(len(drawn) == 1 for drawn in draws)
    share = float(shares[0] / shares.sum())
    assert 0 < share < 1 and sum(0 in drawn for drawn in draws) / 2000 == pytest.approx(share, abs=0.05)


def test_lisa_changes_layers_and_its_checkpoint_holds_all_of_them(compressed, train, tmp_path):
    before = {name: p.detach().clone() for name, p in compressed.named_parameters()}
    tuner = train(compressed, "mode=lisa", "mode.layers=1", "mode.gap=1", "task.training.steps=12")
    moved = {name for name, p in compressed.named_parameters() if not torch.equal(p, before[name])}
    assert moved == tuner.names
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in tuner.names}


def test_eight_bits_stand_before_every_mode_that_they_change(configured):
    for mode in EIGHT_BIT:
        assert type(configured(f"mode={mode}").mode).__mro__[1] is EightBit


EIGHT_BIT = ("welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit")
BIG = [(64, 70), (100, 100), (7,)]  # the last one is too small for 8 bits


@pytest.fixture
def eight_bit_mode(configured):
    options = (f"mode.{key}={list(value) if key == 'betas' else value}" for key, value in ADAM.items())
    return configured("mode=full_8bit", *options).mode


def big(dtype):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in BIG]


@pytest.mark.parametrize("mode", EIGHT_BIT)
def test_eight_bits_select_what_the_mode_without_them_selects(compressed, configured, mode):
    def selected(name):
        model = deepcopy(compressed)
        select(model, configured(f"mode={name}").mode)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert selected(mode) == selected(mode.removesuffix("_8bit"))


def test_an_eight_bit_state_holds_bytes_and_float32_masters(eight_bits, eight_bit_mode):
    ours = big(torch.bfloat16)
    optimizer = eight_bits(eight_bit_mode, ours)
    trajectory(optimizer, ours, range(3))
    assert all(m.dtype == torch.float32 and torch.equal(p, m.bfloat16()) for p, m in optimizer.pairs)
    kinds = [optimizer.state[master]["state1"].dtype for _, master in optimizer.pairs]
    assert kinds == [torch.uint8, torch.uint8, torch.float32]


def test_where_nothing_is_large_enough_for_eight_bits_it_is_adamw(eight_bits, eight_bit_mode):
    ours, theirs = parameters(), parameters()
    found = trajectory(eight_bits(eight_bit_mode, ours), ours, range(8))
    for value, other in zip(found, trajectory(AdamW(theirs, **ADAM), theirs, range(8)), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5)


def test_eight_bits_go_near_adamw(eight_bits, eight_bit_mode):
    ours, theirs = big(torch.float32), big(torch.float32)
    found = trajectory(eight_bits(eight_bit_mode, ours), ours, range(8))
    expected = trajectory(AdamW(theirs, **ADAM), theirs, range(8))
    for value, other, start in zip(found, expected, big(torch.float32), strict=True):
        assert (value - other).norm() < 0.1 * (other - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_of_eight_bits_goes_on_to_the_bit(eight_bits, eight_bit_mode, dtype):
    through = big(dtype)
    expected = trajectory(eight_bits(eight_bit_mode, through), through, range(10))
    first = big(dtype)
    optimizer = eight_bits(eight_bit_mode, first)
    trajectory(optimizer, first, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = eight_bits(eight_bit_mode, second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value, other in zip(trajectory(resumed, second, range(6, 10)), expected, strict=True):
        assert torch.equal(value, other)
