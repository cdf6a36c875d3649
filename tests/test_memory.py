"""The predicted footprint of a training step against what autograd, the model and the optimizer really hold."""

from copy import deepcopy

import pytest
import torch

from welore.config import fingerprint
from welore.errors import Refused
from welore.evaluate import autocast, causal_loss, frozen_weights_in
from welore.fit import recomputed
from welore.memory import Step, largest_batch, predict
from welore.models import count_bytes
from welore.modes import select
from welore.optim import state_bytes

CPU = torch.device("cpu")
IDS_BL = torch.arange(80).view(2, 40) * 11 % 259
MODES = {
    "welore": ("mode=welore",),
    "welore without norms": ("mode=welore", "mode.norms=false"),
    "nlrc": ("mode=nlrc",),
    "nlrc without norms": ("mode=nlrc", "mode.norms=false"),
    "full": ("mode=full",),
    "galore": ("mode=galore", "mode.rank=8", "mode.gap=2"),
    "lora": ("mode=lora",),
    "lora merged": ("mode=lora", "mode.lora_on=merged"),
}


def saved_bytes(model, dtype, recompute=False):
    """Bytes that autograd keeps at the end of a forward pass: every storage once, without those of the parameters."""
    loss = causal_loss(model)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with frozen_weights_in(model, dtype), recomputed(model, recompute):
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, dtype):
            loss(IDS_BL, IDS_BL)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


# Autocast also holds the casts of the first factors, which autograd need not save: 1 %.
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_are_those_that_autograd_saves(mode, dtype, compressed, configured):
    config = configured(*MODES[mode])
    parameters = select(compressed.train(), config.mode)
    footprint = predict(compressed, config.mode, parameters, Step(2, 40, dtype))
    assert sum(footprint.saved.values()) == pytest.approx(saved_bytes(compressed, dtype), rel=0.015)


def test_recomputation_saves_the_inputs_of_layers_alone(compressed, configured):
    config = configured("mode=welore")
    parameters = select(compressed.train(), config.mode)
    footprint = predict(compressed, config.mode, parameters, Step(2, 40, None, recompute=True))
    kept = (
        sum(footprint.saved.values()) - footprint.saved["rotary positions"]
    )  # those wait as an argument, unseen by autograd
    assert kept == pytest.approx(saved_bytes(compressed, None, recompute=True), rel=0.01)
    plain = predict(compressed, config.mode, parameters, Step(2, 40, None))
    assert sum(footprint.saved.values()) < 0.3 * sum(plain.saved.values())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mode", ["welore", "full", "lora"])
def test_recomputation_changes_no_loss_and_no_gradient(mode, dtype, compressed, configured):
    parameters = select(compressed.train(), configured(*MODES[mode]).mode)
    loss = causal_loss(compressed)
    found = []
    for on in (False, True):
        with frozen_weights_in(compressed, dtype), recomputed(compressed, on):
            with autocast(CPU, dtype):
                total, _ = loss(IDS_BL, IDS_BL)
            found.append((total.detach(), *torch.autograd.grad(total, parameters)))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_a_run_that_recomputes_is_the_same_run(compressed, configured, train):
    other = deepcopy(compressed)
    train(compressed, "mode=welore")
    train(other, "mode=welore", "trainer.recompute=true")
    assert all(torch.equal(a, b) for a, b in zip(compressed.parameters(), other.parameters(), strict=True))
    assert "forward" not in other.model.layers[0].__dict__
    assert fingerprint(configured("trainer.recompute=true")) == fingerprint(configured())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_held_and_gradients_are_those_of_a_real_step(mode, dtype, compressed, configured):
    config = configured(*MODES[mode])
    model = compressed.to(getattr(torch, dtype)).train()
    parameters = select(model, config.mode)
    footprint = predict(model, config.mode, parameters, Step(2, 40, None))
    optimizer = config.mode.optimizer(parameters)
    total, _ = causal_loss(model)(IDS_BL, IDS_BL)
    total.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    assert footprint.gradients == sum(gradient.nbytes for gradient in gradients)
    optimizer.step()
    held = footprint.held["optimizer states"] + footprint.held["float32 masters"]
    assert held == pytest.approx(state_bytes(optimizer), rel=0.001)  # and a counter of steps for each parameter
    assert footprint.held["weights"] == count_bytes(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["welore_8bit", "full_8bit"])
def test_eight_bit_states_are_those_of_their_optimizer(mode, dtype, compressed, configured, eight_bits):
    """Of matrices as large as to be kept in bytes, and of the small rest."""
    config = configured(f"mode={mode}")
    model = compressed.to(getattr(torch, dtype)).train()
    parameters = select(model, config.mode)
    sizes = [p.numel() for p in parameters]
    assert min(sizes) < 4096 <= max(sizes)
    footprint = predict(model, config.mode, parameters, Step(2, 40, None))
    optimizer = eight_bits(config.mode, parameters)
    total, _ = causal_loss(model)(IDS_BL, IDS_BL)
    total.backward()
    optimizer.step()
    held = footprint.held["optimizer states"] + footprint.held["float32 masters"]
    assert held == state_bytes(optimizer)


def test_the_largest_batch_is_the_last_that_fits(compressed, configured):
    config = configured("mode=full")
    parameters = select(compressed, config.mode)
    peaks = [predict(compressed, config.mode, parameters, Step(batch, 40, None)).peak for batch in range(1, 8)]
    assert peaks == sorted(peaks)
    for batch, peak in enumerate(peaks, start=1):
        step = Step(1, 40, None)
        assert largest_batch(compressed, config.mode, parameters, step, peak / 2**30) == batch
        assert largest_batch(compressed, config.mode, parameters, step, (peak - 1) / 2**30) == batch - 1


def test_a_model_of_another_shape_is_refused(family, configured):
    model = family("opt")
    with pytest.raises(Refused, match="saved tensors of a opt model are not known"):
        predict(model, configured("mode=full").mode, [], Step(1, 8, None))
