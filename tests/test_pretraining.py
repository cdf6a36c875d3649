import pytest
import torch

from welore.modes import select
from welore.module import Tuner
from welore.optim import AdamW

PRETRAIN = ("task/training=pretrain_laptop", "err=0")


def optimizer_of(model, config, dtype=torch.float32):
    parameters = select(model, config.mode)
    besides = config.task.training.unfreeze(model)
    tuner = Tuner(model, config.mode, parameters, config.task.training, 10, besides=besides)
    return tuner.configure_optimizers()["optimizer"], besides


def test_pretraining_trains_every_parameter_where_tuning_leaves_the_embeddings_frozen(configured, model):
    optimizer_of(model, configured(*PRETRAIN, "mode=full"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer_of(model, configured("mode=full", "err=0"))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}
    optimizer_of(model, configured(*PRETRAIN, "mode=full", "task.training.embeddings=false"))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def test_tied_embeddings_are_stepped_once(configured, model):
    model.lm_head.weight = model.model.embed_tokens.weight
    _, besides = optimizer_of(model, configured(*PRETRAIN, "mode=full"))
    assert len(besides) == 1 and besides[0] is model.lm_head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mode", ["full", "galore mode.rank=4", "fira mode.rank=4", "apollo mode.rank=4", "muon", "lora", "lora_plus"]
)
def test_the_embeddings_step_as_adamw_does_whatever_steps_the_rest(configured, model, mode, dtype):
    mode, *options = f"mode={mode}".split()
    config = configured(*PRETRAIN, mode, *options, "task.training.lr=0.01", "mode.eps=1e-8", "task.training.warmup=0")
    optimizer, besides = optimizer_of(model.to(dtype), config)
    expected = [torch.nn.Parameter(p.detach().clone()) for p in besides]
    reference = AdamW(expected, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[-1] == pytest.approx(0.01)
    for step in range(3):
        for ours, theirs in zip(besides, expected, strict=True):
            draw = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            (ours * draw).sum().backward()
            (theirs * draw).sum().backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for ours, theirs in zip(besides, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # of moves of 0.03; bfloat16 rounds
