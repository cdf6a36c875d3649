"""What one checkpoint shows: its spectra, its gradients beside the floor of noise, its curvature."""

import pytest
import torch
import torch.nn.functional as F

from welore.blocks import curvature, memory, products
from welore.config import to_config
from welore.curvature import hessian, lanczos
from welore.errors import Refused
from welore.finished import composed
from welore.observe import controls, gradients, look, mean_loss, truncations, weights_of

NAME = "model.layers.1.mlp.up_proj"


def batch_of(seed, windows=4, length=16):
    ids = torch.randint(0, 259, (windows, length), generator=torch.Generator().manual_seed(seed))
    return {"ids_BL": ids, "labels_BL": ids.clone()}


@pytest.fixture
def probe():
    overrides = ["probe.layers=[1]", "probe.length=16", "probe.steps=12", "probe.eigenvalues=2", "probe.samples=1"]
    return to_config(composed(["model=tiny", "mode=none", "probe=emergence", *overrides])).probe


def test_only_the_layers_asked_for_are_looked_at(model, probe):
    found = weights_of(model, probe.layers)
    assert len(found) == 7 and all(".layers.1." in name for name in found)
    with pytest.raises(Refused, match="no layer 2. The model has 0 to 1"):
        weights_of(model, [0, 2])


def test_a_frozen_weight_is_refused_by_its_name(model):
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    with pytest.raises(Refused, match="model.layers.1.self_attn.k_proj.weight is frozen"):
        weights_of(model, None)


def test_a_factored_weight_is_refused_by_its_name(compressed):
    with pytest.raises(Refused, match="is factored. Probe the dense model"):
        weights_of(compressed, None)


def test_a_gradient_is_that_of_the_mean_loss_whatever_runs_together(model, probe, monkeypatch):
    batch = batch_of(0)
    batch["labels_BL"][0, 8:] = -100  # padding
    logits = model(input_ids=batch["ids_BL"]).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch["labels_BL"][:, 1:].flatten())
    weight = model.get_submodule(NAME).weight
    (expected,) = torch.autograd.grad(loss, weight)
    monkeypatch.setattr("welore.observe.FORWARD_TOKENS", 16)
    value, found = gradients(model, weights_of(model, probe.layers), batch)
    assert value == pytest.approx(float(loss))
    assert mean_loss(model, batch) == pytest.approx(float(loss))
    torch.testing.assert_close(found[NAME], expected)


def test_a_model_whose_loss_is_not_finite_is_refused(model, probe):
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(Refused, match="the loss of the batch is nan"):
        gradients(model, weights_of(model, probe.layers), batch_of(0))


def test_a_checkpoint_shows_the_spectra_of_weights_and_gradients(model, probe):
    seen = look(model, probe, batch_of(0), batch_of(1))
    weight = model.get_submodule(NAME).weight
    (G,) = gradients(model, {NAME: weight}, batch_of(0))[1].values()
    shown = seen.numbers["weights"][NAME]
    for which, matrix in (("weight", weight), ("gradient", G)):
        expected = torch.linalg.svdvals(matrix.detach().double())
        torch.testing.assert_close(
            torch.tensor(shown[which]["sigma"], dtype=torch.float64), expected, rtol=1e-3, atol=1e-6
        )
    control = controls(model, probe)[NAME]
    assert control["norm"] == pytest.approx(shown["weight"]["norm"])
    assert control["sigma_1"] < shown["weight"]["sigma_1"] * 1.5
    heads = seen.numbers["heads"]["model.layers.1.self_attn"]
    assert heads.keys() == {"qk", "ov"} and 0 < heads["qk"]["r_90"] <= 1


def test_the_floor_of_noise_is_below_one_and_one_for_the_same_batch(model, probe):
    same = look(model, probe, batch_of(0), batch_of(0)).numbers["weights"][NAME]["floor"]
    apart = look(model, probe, batch_of(0), batch_of(1)).numbers["weights"][NAME]["floor"]
    assert same.keys() == apart.keys() == {"cosine", *(f"{s}_{r}" for s in ("left", "right") for r in (4, 16, 64))}
    assert all(value == pytest.approx(1, abs=1e-4) for value in same.values())
    assert apart["cosine"] < 0.9 and apart["left_4"] < 0.999


def test_truncating_a_weight_costs_what_its_dropped_part_was_worth(model, probe):
    weight = model.get_submodule(NAME).weight
    with torch.no_grad():
        weight.copy_(torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1])))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = truncations(model, probe, batch_of(0))
    assert found[NAME] == pytest.approx({"0.25": 0, "0.5": 0}, abs=1e-5)
    assert any(abs(costs["0.25"]) > 1e-4 for costs in found.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_curvature_is_that_of_the_same_batch_and_gradients_are_of_three(model, probe):
    batches = {"same": batch_of(0), "other": batch_of(1), "large": batch_of(2, 8)}
    seen = curvature(model, probe, batches)
    shown = seen.numbers[NAME]
    weight = model.get_submodule(NAME).weight
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(input_ids=batches["same"]["ids_BL"]).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, batches["same"]["ids_BL"][:, 1:].flatten())
        reference = lanczos(hessian(loss, weight), weight, 2, 40, torch.Generator().manual_seed(1))
    assert shown["hessian"]["values"][0] == pytest.approx(float(reference.values_K[0]), rel=0.01)
    assert shown["gauss_newton"]["lowest"] > -1e-6
    assert len(shown["hessian"]["values"]) == 3 and len(shown["hessian"]["stable_ranks"]) == 2
    assert shown["hessian"]["outside"].keys() == {"same", "other", "large"}
    assert all(0 <= rho <= 1 for which in shown["hessian"]["outside"].values() for rho in which.values())


def test_attention_that_cannot_be_differentiated_twice_is_refused_before_anything_runs(model, probe):
    model.config._attn_implementation_internal = "flash_attention_2"
    batches = dict.fromkeys(("same", "other", "large"), batch_of(0))
    with pytest.raises(Refused, match="flash_attention_2, which cannot be differentiated twice"):
        curvature(model, probe, batches)


def test_the_cost_counts_what_lies_above_a_weight_and_the_memory_the_basis(model, probe):
    assert products(model, probe) == 7 * (12 + 1) / 2  # 7 weights of the second of two layers
    more = to_config(composed(["model=tiny", "mode=none", "probe=emergence", "probe.steps=112"])).probe
    assert memory(model, more, 259) > memory(model, probe, 259)


def test_a_weight_on_which_the_loss_does_not_depend_is_named(model, probe):
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    batches = {"same": batch_of(0), "other": batch_of(1), "large": batch_of(2)}
    with pytest.raises(Refused, match=r"layers.1.self_attn.q_proj, hessian: a gap at r=2"):
        curvature(model, probe, batches)
