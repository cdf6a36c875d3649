"""What each option prunes in a model, what it counts, and what it refuses."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from welore.config import CONF
from welore.errors import Refused
from welore.lowrank import LowRankLinear, replace
from welore.models import components
from welore.modes import Lora, select
from welore.moments import Moments, Needs
from welore.prune import Magnitude, Prune, SparseGpt, Wanda, count_zeros, prune_model
from welore.sparse import KeptZeros, mask_wanda, sparsegpt

SCHEMAS = {"none": Prune, "magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGpt}
every_pruner = pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
NEEDS = {"none": Needs.NOTHING, "magnitude": Needs.NOTHING, "wanda": Needs.INPUTS, "sparsegpt": Needs.INPUTS}


def option(name, **given):
    """The option as its file in conf/prune says, with `given` changed."""
    values = OmegaConf.load(CONF / "prune" / f"{name}.yaml")
    del values["defaults"]
    if "sparsity" in values:
        values["sparsity"] = None if "pattern" in given else 0.5
    return SCHEMAS[name](**(OmegaConf.to_container(values) | given))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(M, N, seed):
    layer = nn.Linear(N, M)
    layer.weight = nn.Parameter(random(M, N, seed=seed))
    return layer


@pytest.fixture
def modules():
    """An N-LRC, an LRC of rank 4, and another N-LRC."""
    lrc = LowRankLinear.of(random(12, 4, seed=1), random(4, 16, seed=2), random(12, seed=3))
    return {"block.q": linear(12, 16, 4), "block.k": lrc, "block.down": linear(16, 24, 5)}


def moments(name):
    """Inputs that share a few directions and differ in scale."""
    N = 24 if name == "block.down" else 16
    X_TN = (random(100, N, seed=6) @ random(N, N, seed=7) * torch.logspace(-1, 1, N)).double()
    return Moments(100, X_TN.T @ X_TN / 100, X_TN.abs().mean(0))


def no_moments(name):
    raise AssertionError(f"asked for the statistics of {name}")


def values_of(modules):
    return {f"{name}.{key}": p.detach().clone() for name, m in modules.items() for key, p in m.named_parameters()}


def zero_share(W_MN):
    return float((W_MN == 0).float().mean())


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_file_says_what_it_is_and_what_it_needs(name):
    prune = option(name)
    assert prune.name == name and prune.prunes == (name != "none") and prune.needs == NEEDS[name]


def test_no_pruning_changes_nothing_needs_nothing_and_still_counts(modules):
    before = values_of(modules)
    found = prune_model(option("none"), modules, no_moments)
    assert found == {"zeros": 0, "parameters": 0, "n_lrc_sparsity": 0.0, "sparsity": 0.0, "notes": []}
    after = values_of(modules)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_pruner
def test_by_default_half_of_every_weight_that_stayed_dense_goes_and_the_factors_stay(modules, name):
    before = values_of(modules)
    found = prune_model(option(name), modules, moments if NEEDS[name] else no_moments)
    after = values_of(modules)
    assert zero_share(after["block.q.weight"]) == zero_share(after["block.down.weight"]) == 0.5
    untouched = before.keys() - {"block.q.weight", "block.down.weight"}
    assert len(untouched) == 5 and all(torch.equal(after[key], before[key]) for key in untouched)
    dense, factors = 12 * 16 + 16 * 24, 4 * (12 + 16)
    assert found["zeros"] == dense / 2 and found["parameters"] == dense and found["n_lrc_sparsity"] == 0.5
    assert found["sparsity"] == pytest.approx(dense / 2 / (dense + factors)) and found["notes"] == []


@every_pruner
def test_everywhere_means_both_factors_as_well_and_no_bias(modules, name):
    before = values_of(modules)
    found = prune_model(option(name, where="all"), modules, moments)
    after = values_of(modules)
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert changed == {"block.q.weight", "block.k.A.weight", "block.k.B.weight", "block.down.weight"}
    assert all(zero_share(after[key]) == 0.5 for key in changed)
    assert found["parameters"] == 12 * 16 + 16 * 24 + 4 * (12 + 16) and found["sparsity"] == 0.5


@every_pruner
def test_sparsity_does_not_shrink_a_dense_tensor(modules, name):
    prune_model(option(name, sparsity=0.9), modules, moments)
    assert modules["block.q"].weight.untyped_storage().nbytes() == 12 * 16 * 4


def test_the_input_of_a_is_what_the_pruned_b_gives(modules):
    A_MR, B_RN = modules["block.k"].A.weight.detach().clone(), modules["block.k"].B.weight.detach().clone()
    C_NN = moments("block.k").inputs_NN
    prune_model(option("wanda", where="all"), modules, moments)
    B_RN = B_RN.masked_fill(mask_wanda(B_RN, C_NN.diagonal(), 0.5), 0).double()
    X_NT = torch.linalg.cholesky(C_NN) * 16**0.5  # sixteen inputs with this second moment
    squares_R = ((B_RN @ X_NT) ** 2).mean(1)
    assert torch.equal(modules["block.k"].B.weight.double(), B_RN)
    assert torch.equal(modules["block.k"].A.weight == 0, mask_wanda(A_MR, squares_R, 0.5))


def test_sparsegpt_takes_its_damping_and_block_from_the_option(modules):
    W_MN = modules["block.q"].weight.detach().clone()
    prune_model(option("sparsegpt", sparsity=0.3, damping=0.5, block=8), modules, moments)
    expected, _ = sparsegpt(W_MN, moments("block.q").inputs_NN, 0.3, None, 0.5, 8)
    assert torch.equal(modules["block.q"].weight, expected)


@every_pruner
@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1)])
def test_a_pattern_holds_in_every_group_of_inputs(modules, name, pattern, kept):
    prune = option(name, pattern=pattern, where="all")
    found = prune_model(prune, modules, moments)
    for linear in prune.matrices(modules).values():
        assert ((linear.weight.reshape(-1, 4) != 0).sum(1) == kept).all()
    assert found["sparsity"] == prune.sparsity == 1 - kept / 4


@every_pruner
def test_a_pattern_and_its_sparsity_are_the_same_option(name):
    assert option(name, pattern="2:4") == option(name, pattern="2:4", sparsity=0.5)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_weight_that_calibration_never_fed_is_pruned_by_magnitude_and_a_note_says_so(modules, name):
    def silent(key):
        found = moments(key)
        return found if key == "block.q" else Moments(100, found.inputs_NN * 0, found.absolute_N * 0)

    W_MN = modules["block.down"].weight.detach().clone()
    found = prune_model(option(name), modules, silent)
    (note,) = found["notes"]
    assert note.startswith("block.down: calibration saw no input")
    rowwise = name == "wanda"
    order = W_MN.abs() if rowwise else W_MN.abs().reshape(1, -1)
    smallest = order.argsort(1)[:, : order.shape[1] // 2]
    expected = torch.zeros_like(order, dtype=torch.bool).scatter(1, smallest, True).view(W_MN.shape)
    assert torch.equal(modules["block.down"].weight == 0, expected)
    assert torch.equal(modules["block.down"].weight, W_MN.masked_fill(expected, 0))


def test_damping_that_had_to_grow_is_noted_with_the_name_of_the_weight(modules):
    def spoiled(key):
        C_NN = moments(key).inputs_NN
        least, most = torch.linalg.eigvalsh(C_NN)[0], C_NN.diagonal().mean()
        return Moments(100, C_NN - (least + 0.05 * most) * torch.eye(len(C_NN)), torch.ones(len(C_NN)))

    notes = prune_model(option("sparsegpt"), modules, spoiled)["notes"]
    assert [note.partition(": ")[0] for note in notes] == ["block.q", "block.down"]
    assert all("damping 0.01" in note and "0.1 was taken" in note for note in notes)


def test_statistics_that_are_no_second_moment_are_refused_with_the_name_of_the_weight(modules):
    with pytest.raises(Refused, match=r"block\.q: .*not positive definite"):
        prune_model(option("sparsegpt"), modules, lambda key: Moments(1, -moments(key).inputs_NN, torch.ones(16)))


@every_pruner
def test_a_pattern_that_does_not_divide_the_inputs_is_refused_by_name_before_anything_changes(modules, name):
    modules["block.k"] = LowRankLinear.of(random(12, 5, seed=1), random(5, 16, seed=2))
    before = values_of(modules)
    with pytest.raises(Refused, match=r"block\.k\.A has 5 inputs.*2:4.*groups of 4\. Write prune\.where=nlrc"):
        prune_model(option(name, pattern="2:4", where="all"), modules, moments)
    after = values_of(modules)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_pruner
def test_where_no_weight_stayed_dense_there_is_nothing_to_prune(modules, name):
    with pytest.raises(Refused, match=f"prune={name} with prune.where=nlrc finds no weight.*prune.where=all"):
        prune_model(option(name), {"block.k": modules["block.k"]}, moments)
    found = prune_model(option(name, where="all"), {"block.k": modules["block.k"]}, moments)
    assert found["n_lrc_sparsity"] is None and found["sparsity"] == 0.5


REFUSED = [
    ("magnitude", dict(sparsity=1.0), "prune.sparsity=1.0 is not a share in [0, 1). Write 0.5"),
    ("wanda", dict(sparsity=50), "prune.sparsity=50 is not a share"),
    ("wanda", dict(sparsity=-0.1), "prune.sparsity=-0.1 is not a share"),
    ("wanda", dict(sparsity=float("nan")), "prune.sparsity=nan is not a share"),
    ("wanda", dict(sparsity=None, pattern=None), "prune.sparsity=None is not a share"),
    ("magnitude", dict(where="lrc"), "prune.where=lrc is unknown. Write nlrc or all"),
    ("magnitude", dict(pattern="2:4", sparsity=0.6), "prune.sparsity=0.6 contradicts prune.pattern=2:4"),
    ("magnitude", dict(pattern="1:4", sparsity=0.5), "keeps 1 of 4 and zeroes 0.75. Write prune.sparsity=null"),
    ("magnitude", dict(pattern="4:2"), "prune.pattern=4:2 is no pattern n:m with 0 < n < m. Write 2:4"),
    ("magnitude", dict(pattern="0:4"), "prune.pattern=0:4 is no pattern"),
    ("magnitude", dict(pattern="124"), 'in quotes, "2:4"'),
    ("sparsegpt", dict(damping=0.0), "prune.damping=0.0 is not a share in (0, 1). Write 0.01"),
    ("sparsegpt", dict(block=0), "prune.block=0"),
    ("sparsegpt", dict(pattern="2:4", block=6), "prune.block=6 with prune.pattern=2:4: write a block"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_bad_options_say_what_to_write(name, given, message):
    with pytest.raises(Refused) as error:
        option(name, **given)
    assert message in str(error.value)


@pytest.mark.parametrize("lora_on", ["factors", "merged"])
def test_after_adapters_are_merged_the_zeros_of_a_pruned_model_come_back(family, lora_on):
    model = family("llama")
    name, dense = next((n, m) for n, m in components(model).items() if n.endswith("down_proj"))
    replace(model, name, LowRankLinear.of(random(32, 8, seed=1), random(8, 48, seed=2)))
    prune = option("magnitude", where="all")
    prune_model(prune, components(model), no_moments)
    masks = {full: linear.weight == 0 for full, linear in prune.matrices(components(model)).items()}
    zeros = KeptZeros([linear.weight for linear in prune.matrices(components(model)).values()])
    mode = Lora("lora", 1e-3, (0.9, 0.99), 1e-8, 0.0, False, rank=2, alpha=4, dropout=0.0, lora_on=lora_on)
    with torch.no_grad():
        for adapter in select(model, mode):
            adapter.normal_()
    mode.finish(model)
    merged = prune.matrices(components(model))
    assert any((linear.weight[masks[full]] != 0).any() for full, linear in merged.items() if name not in full)
    zeros.apply()
    for full, mask in masks.items():
        W_MN = merged[full].weight[: mask.shape[0], : mask.shape[1]]  # merged adapters append ranks, which are dense
        assert (W_MN[mask] == 0).all() and zero_share(W_MN) == 0.5
    found = count_zeros(prune, components(model))
    assert found["n_lrc_sparsity"] == 0.5
    assert found["sparsity"] == 0.5 if lora_on == "factors" else 0.48 < found["sparsity"] < 0.5
