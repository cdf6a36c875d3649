import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from welore import snapshots
from welore.errors import Refused
from welore.lowrank import LowRankLinear
from welore.models import components
from welore.modes import select
from welore.module import Tuner
from welore.optim import AdamW
from welore.records import Record, read_history
from welore.runner import run

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


SMALL = [
    "model=llama_5m",
    "model.config.vocab_size=300",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "task/training=pretrain_laptop",
    "task.training.stream=true",
    "task.training.pack=false",
    "task.training.length=48",
    "task.training.batch=4",
    "task.training.accumulate=2",
    "task.training.lr=0.01",
    "task.training.validate_every=20",
    "task.training.validation_windows=4",
    "task.training.snapshot_every=16",
    "task/protocol=smoke",
    "logger=none",
    "trainer=cpu",
    "trainer.progress=false",
]
# Dense, and what can be had of low-rank pretraining: the gradient, the update, or the weights themselves.
BASELINES = {
    "dense": ["mode=full", "err=0"],
    "galore": ["mode=galore", "mode.rank=4", "mode.gap=10", "err=0"],
    "lora": ["mode=lora", "mode.rank=4", "mode.norms=true", "mode.lr=0.01", "err=0"],
    "factors": ["mode=full", "ranks=uniform", "ranks.dense=never", "keep=0.5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_learns_from_random_weights_and_leaves_snapshots(configured, text_file, tmp_path, baseline):
    sizes = ["task.training.steps=40", "task.training.accumulate=1"]
    config = configured(*SMALL, *sizes, *BASELINES[baseline], f"task.path={text_file}", f"outputs={tmp_path}")
    found = run(config, tmp_path / "run").metrics
    assert 200 < found["dense/perplexity"] < 400  # it knows nothing: about as many as there are tokens
    assert found["tuned/perplexity"] < 0.5 * found["dense/perplexity"]
    assert snapshots.steps(tmp_path / "run") == [0, 1, 2, 4, 8, 16, 32, 40]
    first, last = (snapshots.model_at(tmp_path / "run", step) for step in (0, 40))
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)
    for name, before in components(first).items():
        after = components(last)[name]
        assert type(before) is type(after) is (LowRankLinear if baseline == "factors" else torch.nn.Linear)
        moved = _dense(after) - _dense(before)
        assert moved.abs().max() > 1e-3
        assert (torch.linalg.matrix_rank(moved, rtol=1e-4) <= 4) == (baseline == "lora")


def _dense(module):
    return (module.merged() if isinstance(module, LowRankLinear) else module).weight.detach()


@pytest.mark.parametrize("every", [0, -5])
def test_snapshots_every_no_step_are_refused(configured, every):
    with pytest.raises(Refused, match=f"snapshot_every={every} is no number of steps. Write 1 or more, or null"):
        configured("task/training=pretrain", f"task.training.snapshot_every={every}")


def test_snapshots_of_a_run_that_trains_nothing_are_refused(configured):
    with pytest.raises(Refused, match="mode=none trains nothing, and task/training=pretrain asks for snapshots"):
        configured("mode=none", "task/training=pretrain")
    assert configured("mode=none", "task/training=pretrain", "task.training.snapshot_every=null")


def _start(outputs, text_file, *overrides):
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, "mode=full", "err=0", "task.training.steps=300"]
    return subprocess.Popen(
        [*command, "trainer.checkpoint_minutes=0", f"task.path={text_file}", f"outputs={outputs}", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _folder(outputs):
    return next((path.parent for path in outputs.glob("llama_5m/*/*/*/history.jsonl")), None)


def _finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def _losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_history(folder) if "train/loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_file):
    """A function of overrides to the folder of a run that nothing has stopped, kept for the module."""
    done = {}

    def whole(*overrides):
        if overrides not in done:
            outputs = tmp_path_factory.mktemp("whole")
            _finish(_start(outputs, text_file, *overrides))
            done[overrides] = _folder(outputs)
        return done[overrides]

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("stream", [["task.training.stream=true"], ["task.training.stream=false"]], ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_pretraining_goes_on_to_the_same_losses_and_snapshots(tmp_path, text_file, whole, stream, number):
    """The text ends within the run, so that a resumed run also reads it again in the order of another pass."""
    expected = whole(*stream)
    process = _start(tmp_path, text_file, *stream)
    deadline = time.monotonic() + 600
    while (folder := _folder(tmp_path)) is None or len(_losses(folder)) < 100:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert 0 < len(_losses(folder)) < 300 and max(snapshots.steps(folder)) < 300

    _finish(_start(tmp_path, text_file, *stream))
    assert _losses(folder) == _losses(expected) and len(_losses(folder)) == 300
    assert snapshots.steps(folder) == snapshots.steps(expected)
    for step in snapshots.steps(folder):
        name = snapshots.file_name(step)
        ours, theirs = (place / snapshots.SNAPSHOTS / name for place in (folder, expected))
        assert ours.read_bytes() == theirs.read_bytes()
    metrics = [Record.read(place).metrics["tuned/perplexity"] for place in (folder, expected)]
    assert metrics[0] == metrics[1]
