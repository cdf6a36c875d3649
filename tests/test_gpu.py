"""What only a GPU can show: run `pytest tests/test_gpu.py` where there is one."""

import importlib.util

import pytest
import torch
from test_resume import MODES, config_of, losses, stop_in_step_5

from welore import metrics
from welore.bench import measured, stand_in_model
from welore.config import compose, to_config
from welore.fuse import fuse
from welore.inference import compiled, generate, generate_replayed, prefill_parts, read_replayed
from welore.measure import give_back
from welore.memory import Step, predict
from welore.models import components
from welore.modes import select
from welore.optim import state_bytes
from welore.ranks import read_ranks
from welore.runner import run
from welore.shapes import factor, on_meta, sizes_of
from welore.svd import singular_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
# A model of 0.5 B parameters, of which a prediction is not about megabytes.
SIZES = ["hidden_size=2048", "intermediate_size=5504", "num_hidden_layers=10", "num_attention_heads=16"]
SIZES += ["num_key_value_heads=16", "vocab_size=32000"]
MIDDLE = [
    "model=tiny",
    "model.name=middle",
    "model.dtype=bfloat16",
    *(f"model.config.{size}" for size in SIZES),
    "err=0.5",
]


def middle(*overrides):
    config = to_config(compose([*MIDDLE, *overrides]))
    return stand_in_model(config, GPU, 8), config


def talkative():
    """A model that nobody has trained repeats one token, wherever it looks for it, unless its weights are larger."""
    model, _ = middle()
    model.requires_grad_(False)
    for module in components(model).values():
        for weight in module.parameters():
            weight.mul_(8)
    return model


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_spectra_of_a_gpu_are_those_of_float64_on_a_cpu(shape):
    W = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    exact = torch.linalg.svdvals(W.double())
    assert torch.allclose(singular_values(W.to(GPU)).cpu().double(), exact, atol=1e-6 * float(exact[0]), rtol=0)


def test_a_replayed_graph_writes_the_tokens_of_the_model():
    model = talkative()
    ids_BL = torch.randint(0, 32000, (2, 64), device=GPU)
    tokens, _ = generate(model.float(), ids_BL, 12)
    replayed, timing = generate_replayed(model, ids_BL, 12)
    assert torch.equal(tokens, replayed) and len(timing.steps) == 9
    assert tokens.unique().numel() > 12
    assert torch.equal(read_replayed(model, ids_BL, 2)[0], tokens[:, 0])


def test_a_prefill_is_taken_apart_by_its_kernels():
    model, _ = middle()
    ids_BL = torch.randint(0, 32000, (8, 2048), device=GPU)
    parts = prefill_parts(model.requires_grad_(False), ids_BL)
    assert parts["products"] > parts["attention"] > 0 and parts["rest"] > 0
    assert sum(parts.values()) == pytest.approx(min(read_replayed(model, ids_BL, 3)[1]), rel=0.3)


def test_a_compiled_step_can_be_captured_and_writes_the_tokens_of_the_model():
    model = talkative()
    for fused in (False, True):
        if fused:
            fuse(model)
        found = compiled(model.float(), torch.randint(0, 32000, (2, 64), device=GPU), 8, 1)
        assert found.same == 8 and found.decode_seconds > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["welore", "full", "nlrc", "lora", "galore"])
def test_the_memory_of_a_step_is_what_was_predicted_within_a_tenth(mode, recompute):
    give_back(GPU)
    model, config = middle(f"mode={mode}")
    _, found = measured(model, config, Step(4, 512, config.model.autocast, recompute), steps=1)
    assert found["predicted GiB"] == pytest.approx(found["measured GiB"], rel=0.1)


CUT = ["bfloat16 weights with float32 masters", "lora with dropout", "galore", "muon", "lisa with masters"]


@pytest.mark.parametrize("name", CUT)
def test_a_run_on_a_gpu_that_was_cut_goes_on(tmp_path, monkeypatch, name):
    """As on a CPU, but for the order in which attention adds up gradients."""
    asked = (*MODES[name], "trainer=gpu")
    whole = run(config_of(tmp_path, *asked), tmp_path / "whole")
    stop_in_step_5(tmp_path, monkeypatch, *asked)
    resumed = run(config_of(tmp_path, *asked), tmp_path / "cut")
    pairs = list(zip(losses(tmp_path / "cut"), losses(tmp_path / "whole"), strict=True))
    assert len(pairs) == 12 and all(ours == pytest.approx(theirs, rel=1e-3) for ours, theirs in pairs)
    assert resumed.metrics["fit/flops_per_token"] == whole.metrics["fit/flops_per_token"]
    assert resumed.metrics["tuned/perplexity"] == pytest.approx(whole.metrics["tuned/perplexity"], rel=1e-3)


WIDE = ["hidden_size=1024", "intermediate_size=2752", "num_hidden_layers=8", "num_attention_heads=16"]
STEPS = ["task.training.steps=4", "task.training.batch=8", "task.training.length=512"]


@pytest.mark.parametrize("mode", ["welore", "full", "galore", "lora"])
def test_the_peak_of_a_run_is_what_was_predicted_within_a_tenth(tmp_path, mode):
    """Through Lightning, which keeps gradients until the next forward pass is done unless they are freed before."""
    sizes = [f"model.config.{size}" for size in [*WIDE, "num_key_value_heads=16"]]
    config = config_of(tmp_path, "model.dtype=bfloat16", *sizes, *STEPS, f"mode={mode}", "trainer=gpu")
    record = run(config, tmp_path / "run")
    model = on_meta(sizes_of(config.model), "bfloat16")
    factor(model, read_ranks(tmp_path / "run" / "ranks.json"))
    footprint = predict(model, config.mode, select(model, config.mode), Step(4, 512, config.model.autocast))
    assert footprint.peak / 2**30 == pytest.approx(record.metrics[metrics.FIT_PEAK_GIB.key], rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("mode", ["welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit"])
def test_states_in_eight_bits_take_what_was_predicted_and_resume_to_the_bit(mode):
    model, config = middle(f"mode={mode}")
    parameters = select(model, config.mode)
    gradients = [torch.randn_like(p) for p in parameters]

    def step(optimizer):
        sum((p * gradient).sum() for p, gradient in zip(parameters, gradients, strict=True)).backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = config.mode.optimizer(parameters)
    step(optimizer)
    footprint = predict(model, config.mode, parameters, Step(2, 64, None))
    held = footprint.held["optimizer states"] + footprint.held["float32 masters"]
    assert state_bytes(optimizer) == pytest.approx(held, rel=0.01)
    saved = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, optimizer.state_dict()
    )
    step(optimizer)
    expected = [p.detach().clone() for p in parameters]
    optimizer.release()
    again = config.mode.optimizer(parameters)
    again.load_state_dict(saved)
    step(again)
    assert all(torch.equal(p, e) for p, e in zip(parameters, expected, strict=True))
