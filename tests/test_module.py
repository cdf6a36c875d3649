from copy import deepcopy

import pytest
import torch
from test_modes import OTHERS, TRAINED

from welore import module
from welore.bench import Steps
from welore.compress import weight_digests
from welore.errors import Refused
from welore.evaluate import perplexity
from welore.models import components
from welore.modes import select
from welore.module import base_digest, known_digests
from welore.records import read_history


def lines(folder, key):
    return [line for line in read_history(folder) if key in line]


def test_the_logged_curve_has_every_step_with_its_rate_and_tokens(compressed, train, tmp_path):
    tuner = train(compressed, "task.training.steps=4", "task.training.floor=0.0", "task.training.warmup=0.0")
    steps = lines(tmp_path, "train/loss")
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    factors = [1.0, 0.8535534, 0.5, 0.1464466]  # half a cosine
    assert [line["train/lr"] for line in steps] == pytest.approx([5e-4 * f for f in factors], rel=1e-6)
    assert [line["train/tokens"] for line in steps] == [128, 256, 384, 512]
    assert tuner.tokens_seen == 512


ONE = ("task.training.batch=1", "task.training.length=32", "task.training.pack=true")
QUICK = ("welore", "full", "lora_merged", "dora")
MODES = TRAINED | OTHERS
COUNTED = [pytest.param(v, id=k, marks=[] if k in QUICK else [pytest.mark.slow]) for k, v in MODES.items()]


@pytest.mark.parametrize("mode", COUNTED)
def test_the_first_pass_of_a_run_counts_the_flops_that_torch_counts_of_a_step(compressed, configured, train, mode):
    """As scripts/step_flops.py does. That of a layer that is run again is forward work done twice."""
    config = configured(*mode)
    found = Steps(deepcopy(compressed), config.mode, None, 1, 32).flops()
    again = deepcopy(compressed)
    assert train(compressed, *ONE, *mode).flops_per_token == found["forward"] + found["backward"]
    more = train(again, *ONE, *mode, "trainer.recompute=true").flops_per_token
    assert 0.3 * found["forward"] < more - found["forward"] - found["backward"] < found["forward"]


def test_the_flops_of_a_token_are_those_of_a_pass_of_a_step_of_many(compressed, train):
    one = train(deepcopy(compressed), *ONE).flops_per_token
    assert train(compressed, *ONE, "task.training.batch=4", "task.training.accumulate=4").flops_per_token == one


@pytest.mark.parametrize("mode", COUNTED)
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_counting_changes_no_number(compressed, train, tmp_path, monkeypatch, mode, recompute):
    other, losses = deepcopy(compressed), []
    for model, counts in ((compressed, True), (other, False)):
        if not counts:
            monkeypatch.setattr(module, "Flops", lambda: None)
        tuner = train(model, *mode, f"trainer.recompute={recompute}")
        assert (tuner.flops_per_token is not None) == counts
        losses.append([line["train/loss"] for line in lines(tmp_path, "train/loss")])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(compressed.parameters(), other.parameters(), strict=True))


def test_no_gradient_is_there_when_a_step_begins(compressed, train, monkeypatch):
    """Lightning leaves those of a step until the forward pass of the next is done, beside all that this one saves."""
    held, forward = [], module.Tuner.training_step

    def counted(tuner, batch, index):
        held.append(sum(p.grad is not None for p in tuner.parameters()))
        return forward(tuner, batch, index)

    monkeypatch.setattr(module.Tuner, "training_step", counted)
    two = ("task.training.steps=3", "task.training.batch=2", "task.training.accumulate=2")
    trained = len(list(train(compressed, "mode=full", *two).parameters_to_train))
    assert held == [0, trained] * 3


def test_training_lowers_the_loss(compressed, train, tmp_path):
    train(
        compressed, "task.training.steps=30", "task.training.lr=5e-3", "task.training.validate_every=15", "mode=full"
    )
    losses = [line["train/loss"] for line in lines(tmp_path, "train/loss")]
    assert losses[-1] < losses[0] - 0.3
    first, last = [line["validation/perplexity"] for line in lines(tmp_path, "validation/perplexity")]
    assert last < first < 259


def test_validation_perplexity_is_the_perplexity_of_the_held_out_rows(compressed, train, tmp_path, monkeypatch):
    tuner = train(compressed, "task.training.steps=2", "task.training.validate_every=2")
    (line,) = lines(tmp_path, "validation/perplexity")
    rows = torch.cat([batch["ids_BL"] for batch in tuner.trainer.val_dataloaders])
    assert len(rows) == 2
    assert line["validation/perplexity"] == pytest.approx(perplexity(compressed, rows).perplexity, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6, 7]), (7, [7]), (100, [7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_the_last_step_is_validated_whatever_the_interval(compressed, train, tmp_path, every, steps, accumulate):
    """Its perplexity chooses the learning rate, and a schedule has come to its end there alone."""
    training = ["steps=7", f"validate_every={every}", f"accumulate={accumulate}"]
    train(compressed, *(f"task.training.{option}" for option in training))
    assert [line["step"] + 1 for line in lines(tmp_path, "validation/perplexity")] == steps


def test_clipping_bounds_the_norm_of_the_gradient(compressed, train, monkeypatch):
    norms = []

    def record(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    monkeypatch.setattr("welore.optim.AdamW.step", _before(record))
    for clip in ("0", "0.01"):
        train(compressed, "task.training.steps=1", f"task.training.clip={clip}")
    assert norms[0] > 0.05 and norms[1] == pytest.approx(0.01, rel=1e-3)


def _before(record):
    step = torch.optim.AdamW.step

    def recorded(optimizer, closure=None):
        loss = closure()
        record(optimizer)
        step(optimizer)
        return loss

    return recorded


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_layer(compressed, train):
    name, module = list(components(compressed).items())[-1]
    assert name.startswith("model.layers.1.")
    next(module.parameters()).data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 0 is nan; it starts in model\.layers\.1$"):
        train(compressed)


def test_a_checkpoint_holds_what_trains_and_nothing_else(compressed, train):
    tuner = train(compressed, "task.training.steps=1")
    checkpoint = {"state_dict": tuner.state_dict()}
    tuner.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in tuner.names}
    assert checkpoint["tokens_seen"] == 128
    assert len(tuner.names) < len(tuner.state_dict())


def test_a_checkpoint_without_a_layer_that_an_adapter_is_on_is_refused_with_its_name(compressed, train, tmp_path):
    tuner = train(compressed, "mode=lora", "task.training.steps=1")
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(name for name in saved["state_dict"] if "k_proj" in name)
    tuner.on_load_checkpoint(saved)
    del saved["state_dict"][name]
    with pytest.raises(Refused, match=f"lacks .*{name}.*of another run. Write force=true"):
        tuner.on_load_checkpoint(saved)


MERGED = "mode.lora_on=merged"
PREPARED = [
    ["welore"],
    ["lora"],
    ["pissa"],
    ["pissa", MERGED],
    ["mica"],
    ["dora", MERGED],
    ["randlora"],
    ["osf"],
    ["sv"],
    ["lora_xs"],
]


@pytest.mark.parametrize("mode", PREPARED, ids=" ".join)
def test_digests_of_before_stand_for_nothing_that_a_mode_has_made(mode, compressed, configured):
    """PiSSA, for one, leaves other numbers in the same parameter."""
    known, none = (known_digests(compressed, weights) for weights in (weight_digests(compressed), {}))
    parameters = select(compressed, configured(f"mode={mode[0]}", *mode[1:]).mode)
    assert base_digest(compressed, parameters, known) == base_digest(compressed, parameters, none)


@pytest.mark.parametrize("mode", ["welore", "full", "lora", "mica"])
def test_what_a_mode_leaves_as_it_is_is_not_hashed_again(mode, compressed, configured, monkeypatch):
    hashed, digests = {}, module.digests
    monkeypatch.setattr(module, "digests", lambda tensors: hashed.update(tensors) or digests(tensors))
    known = known_digests(compressed, weight_digests(compressed))
    parameters = select(compressed, configured(f"mode={mode}").mode)
    base_digest(compressed, parameters, known)
    assert all(mode == "mica" and ".lora_B." in name for name in hashed) and bool(hashed) == (mode == "mica")


@pytest.mark.parametrize("mode", ["welore", "nlrc", "lora", "mica", "lora_xs", "sv"])
def test_the_base_is_all_that_does_not_train_but_the_buffers_of_the_model(mode, compressed, configured):
    known = known_digests(compressed, {})
    rotary = {id(buffer) for buffer in compressed.buffers()}
    parameters = select(compressed, configured(f"mode={mode}").mode)
    before, free = base_digest(compressed, parameters, known), {id(parameter) for parameter in parameters} | rotary
    assert rotary
    for tensor in (*compressed.parameters(), *compressed.buffers()):
        last = (-1,) * tensor.ndim
        number = tensor.data[last].clone()
        tensor.data[last] += 1
        assert (base_digest(compressed, parameters, known) == before) == (id(tensor) in free)
        tensor.data[last] = number
    assert base_digest(compressed, parameters, known) == before
