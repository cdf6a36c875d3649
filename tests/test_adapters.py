"""Every adapter and part starts as the compressed model and ends as LRC and N-LRC that compute what was trained."""

import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from welore.evaluate import _logits_are_linear, causal_loss
from welore.lowrank import LowRankLinear, balanced, singular
from welore.models import components
from welore.modes import component_parameters, select

IDS_BL = torch.arange(48).view(2, 24) * 11 % 67
MERGED = "mode.lora_on=merged"
MODES = {
    "rslora": ("mode=rslora",),
    "rslora merged": ("mode=rslora", MERGED),
    "dora": ("mode=dora",),
    "dora merged": ("mode=dora", MERGED),
    "pissa": ("mode=pissa", "mode.rank=4"),
    "pissa merged": ("mode=pissa", "mode.rank=4", MERGED),
    "pissa above the rank of an LRC": ("mode=pissa", "mode.rank=24", MERGED),
    "rslora dora pissa": ("mode=pissa", "mode.rank=4", "mode.rslora=true", "mode.dora=true"),
    "mica": ("mode=mica", "mode.rank=4"),
    "mica merged": ("mode=mica", "mode.rank=4", MERGED),
    "lora_plus": ("mode=lora_plus",),
    "lora_plus merged": ("mode=lora_plus", MERGED),
    "randlora": ("mode=randlora",),
    "osf": ("mode=osf",),
    "sv": ("mode=sv",),
    "lora_xs": ("mode=lora_xs", "mode.rank=4"),
    "lora_xs above the rank of an LRC": ("mode=lora_xs", "mode.rank=32"),
    "random": ("mode=random",),
}
GROWS = {"rslora merged": 8, "dora merged": 8, "mica merged": 4, "lora_plus merged": 8}
every = pytest.mark.parametrize("mode", MODES)


def ranks(model):
    return {name: m.rank for name, m in components(model).items() if isinstance(m, LowRankLinear)}


@pytest.fixture
def biased(family, compress):
    """A compressed model of a family whose linear layers have biases."""
    model = family("opt")
    compress(model)
    assert 0 < len(ranks(model)) < len(components(model))
    return model


@every
def test_untrained_it_leaves_the_logits_unchanged_and_trained_it_is_an_lrc_again(biased, configured, mode):
    before, logits = ranks(biased), biased(IDS_BL).logits
    strategy = configured(*MODES[mode]).mode
    parameters = select(biased, strategy)
    torch.testing.assert_close(biased(IDS_BL).logits, logits, rtol=1e-4, atol=1e-4)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained = biased(IDS_BL).logits
    assert (trained - logits).abs().max() > 0.02
    strategy.finish(biased)
    torch.testing.assert_close(biased(IDS_BL).logits, trained, rtol=1e-4, atol=1e-4)
    assert {type(m) for m in components(biased).values()} == {LowRankLinear, nn.Linear}
    assert len(components(biased)) == 12
    assert ranks(biased) == {name: rank + GROWS.get(mode, 0) for name, rank in before.items()}
    assert not any("lora" in n or "osf" in n or "base" in n for n, _ in biased.named_parameters())


@every
def test_a_checkpoint_holds_what_trains_and_nothing_else(compressed, train, tmp_path, mode):
    tuner = train(compressed, "task.training.steps=2", *MODES[mode])
    names = {f"model.{name}" for name in tuner.names}
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == names
    states = checkpoint["optimizer_states"][0]
    assert len(states["state"]) == len(names)
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    logits = compressed(IDS_BL).logits
    tuner.mode.finish(compressed)
    torch.testing.assert_close(compressed(IDS_BL).logits, logits, rtol=1e-3, atol=1e-4)


def selected(model, strategy):
    chosen = {id(p) for p in select(model, strategy)}
    return {name: p for name, p in model.named_parameters() if id(p) in chosen}


def test_pissa_starts_from_the_largest_singular_directions_and_mica_from_the_smallest(compressed, configured):
    weights = {n: m.merged().weight if isinstance(m, LowRankLinear) else m.weight.detach().clone()
               for n, m in components(compressed).items()}  # fmt: skip
    select(compressed, configured("mode=pissa", "mode.rank=4", MERGED).mode)
    for name, weight in weights.items():
        layer = compressed.get_submodule(name)
        (up,), (down,), scale = layer.lora_B.values(), layer.lora_A.values(), layer.scaling["default"]
        U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = U[:, :4] * sigma[:4] @ Vh[:4]
        torch.testing.assert_close((scale * up.weight @ down.weight).double(), expected, rtol=1e-3, atol=1e-5)


def test_mica_trains_a_and_its_outputs_are_the_smallest_singular_directions(compressed, configured):
    dense = {n: m.weight.detach().clone() for n, m in components(compressed).items() if isinstance(m, nn.Linear)}
    names = selected(compressed, configured("mode=mica", "mode.rank=4").mode)
    assert all(".lora_A." in name for name in names)
    for name, weight in dense.items():
        up_MR = compressed.get_submodule(name).lora_B["default"].weight
        U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        projector = U[:, -4:] @ U[:, -4:].T
        torch.testing.assert_close((up_MR @ up_MR.T).double(), projector, rtol=0, atol=1e-3)


@pytest.mark.parametrize("plain", [True, False])
def test_osf_freezes_the_top_of_every_rank_and_keeps_gradients_out_of_it(compressed, configured, plain):
    """Also of factors that are not in the singular directions of their weight, as those of K-FAC are not."""
    for module in components(compressed).values() if not plain else []:
        if isinstance(module, LowRankLinear):
            mixed = torch.eye(module.rank) + 0.1 * torch.randn(
                module.rank, module.rank, generator=torch.Generator().manual_seed(0)
            )
            module.A.weight.data @= mixed
            module.B.weight.data = torch.linalg.solve(mixed, module.B.weight.data)
    lrc = {n: m.merged().weight.double() for n, m in components(compressed).items() if isinstance(m, LowRankLinear)}
    before = ranks(compressed)
    mode = configured("mode=osf", "mode.frozen=0.25").mode
    parameters = select(compressed, mode)
    compressed(IDS_BL).logits.logsumexp(-1).sum().backward()
    for parameter in parameters:  # a step along the gradient, which is orthogonal to what is frozen
        parameter.data -= 1e-5 * parameter.grad / parameter.grad.norm().clamp(min=1e-12) * parameter.norm()
    mode.finish(compressed)
    moved = 0
    for name, weight in lrc.items():
        U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
        top = max(round(0.25 * before[name]), 1)
        change = compressed.get_submodule(name).merged().weight.double() - weight
        inside = U[:, :top].T @ change @ Vh[:top].T
        assert inside.norm() < 0.02 * change.norm() + 1e-7
        moved += change.norm() > 0
    assert moved == len(lrc)


def test_the_random_matrices_of_randlora_follow_the_seed(compressed, configured):
    bases = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = deepcopy(compressed)
        select(model, configured("mode=randlora", "mode.rank=8").mode)
        bases.append(next(b for n, b in model.named_buffers() if "randlora_A" in n))
    assert torch.equal(bases[0], bases[1]) and not torch.equal(bases[0], bases[2])


@pytest.mark.parametrize("mode", ["pissa", "lora", "dora"])
def test_dropout_of_adapters_leaves_the_loss_in_chunks(compressed, configured, mode):
    select(compressed.train(), configured(f"mode={mode}", "mode.dropout=0.3").mode)
    before = torch.get_rng_state()
    causal_loss(compressed)
    assert torch.equal(torch.get_rng_state(), before) and compressed.training
    assert all(module.training for module in compressed.modules())
    assert _logits_are_linear(compressed, compressed.get_output_embeddings())


def test_lora_plus_gives_b_its_own_learning_rate_and_float32_masters(compressed, configured):
    mode = configured("mode=lora_plus", "mode.lr=0.001", "mode.lr_ratio=4").mode
    compressed.bfloat16()
    parameters = select(compressed, mode)
    slow, fast = mode.optimizer(parameters).param_groups
    assert (slow["lr"], fast["lr"]) == (0.001, 0.004)
    ups = [p for n, p in compressed.named_parameters() if ".lora_B." in n]
    assert [p.shape for p in fast["params"]] == [p.shape for p in ups]
    assert all(p.dtype == torch.float32 for group in (slow, fast) for p in group["params"])
    assert len(slow["params"]) + len(fast["params"]) == len(parameters)


@pytest.mark.parametrize("mode", ["lora", "dora"])
def test_an_adapter_wider_than_its_factor_is_announced_and_stays(compressed, configured, capsys, mode):
    thin = {name: rank for name, rank in ranks(compressed).items() if rank < 30}
    name, rank = min(thin.items(), key=lambda item: item[1])
    layer = compressed.get_submodule(name)
    select(compressed, configured(f"mode={mode}", "mode.rank=30").mode)
    assert layer.B.lora_A.default.weight.shape == (30, layer.in_features)
    found = capsys.readouterr().err
    assert f"mode.rank=30 is above the rank of {2 * len(thin)} factors, such as {name}.A with {rank}:" in found


@pytest.mark.parametrize(
    "overrides",
    [("mode=lora",), ("mode=lora", "mode.rank=30", MERGED), ("mode=pissa", "mode.rank=30")],
    ids=["no wider", "merged", "stops at its rank"],
)
def test_no_other_adapter_is_announced(compressed, configured, capsys, overrides):
    assert 8 < min(ranks(compressed).values()) < 30
    select(compressed, configured(*overrides).mode)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "mode", ["lora", "rslora", "dora", "pissa", "mica", "lora_plus", "randlora", "osf", "lora_xs"]
)
def test_adapters_need_no_lrc(model, configured, mode):
    names = set(components(model))
    select(model, configured(f"mode={mode}").mode)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = {re.match(r"(.*?)\.(lora_|randlora_|osf_|core)", name)[1] for name in trained}
    assert len(names) == 14 and adapted == names


def test_rslora_divides_by_the_root_of_the_rank(compressed, configured):
    select(compressed, configured("mode=rslora", "mode.rank=4", "mode.alpha=6").mode)
    layers = [m for m in compressed.modules() if hasattr(m, "lora_A")]
    assert layers and {layer.scaling["default"] for layer in layers} == {3.0}


def test_sv_trains_the_singular_values_of_the_lrcs_and_nothing_else(compressed, configured):
    spectra = {f"{n}.sigma": torch.linalg.svdvals(m.merged().weight.double())[: m.rank]
               for n, m in components(compressed).items() if isinstance(m, LowRankLinear)}  # fmt: skip
    found = selected(compressed, configured("mode=sv").mode)
    assert found.keys() == spectra.keys()
    for name, sigma in spectra.items():
        torch.testing.assert_close(found[name].detach().double(), sigma, rtol=1e-3, atol=1e-5)


def test_lora_xs_trains_rank_squared_numbers_for_each_weight(compressed, configured):
    found = selected(compressed, configured("mode=lora_xs", "mode.rank=4").mode)
    assert len(found) == 14 and {tuple(p.shape) for p in found.values()} == {(4, 4)}
    assert not any(p.any() for p in found.values())


@pytest.mark.parametrize("seed", range(6))
def test_random_fills_the_numbers_that_the_lrcs_hold_as_far_as_whole_weights_can(compressed, configured, seed):
    budget = sum(p.numel() for p in component_parameters(compressed, LowRankLinear))
    mode = configured("mode=random", "mode.norms=false", f"mode.seed={seed}").mode
    chosen = {id(p) for p in select(compressed, mode)}
    sizes = {
        name: (sum(p.numel() for p in module.parameters()), {id(p) for p in module.parameters()} <= chosen)
        for name, module in components(compressed).items()
    }
    left = budget - sum(size for size, taken in sizes.values() if taken)
    assert 0 <= left < min(size for size, taken in sizes.values() if not taken)


def test_random_follows_its_seed(pristine, compress, configured):
    from copy import deepcopy

    def chosen(*overrides):
        model = deepcopy(pristine[0])
        compress(model)
        return selected(model, configured("mode=random", *overrides).mode).keys()

    assert chosen() == chosen() != chosen("seed=1")
    assert chosen("seed=1") == chosen("mode.seed=1")


def test_singular_and_balanced_agree_with_a_float64_svd_of_the_product():
    A_MR, B_RN = torch.randn(12, 20), torch.randn(20, 9)  # more columns than the product has rank
    U, sigma, Vh = singular(A_MR, B_RN)
    product = A_MR.double() @ B_RN.double()
    torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(product), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((U * sigma @ Vh).double(), product, rtol=1e-4, atol=1e-4)
    left, right = balanced(A_MR, B_RN, 3, torch.float32)
    U, sigma, Vh = torch.linalg.svd(product)
    torch.testing.assert_close((left @ right).double(), U[:, :3] * sigma[:3] @ Vh[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
