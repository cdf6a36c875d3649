"""Two processes that each hold a shard of every weight train as one process does, and go on as one would."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from welore import module
from welore.config import to_config
from welore.errors import Interrupted, Refused
from welore.evaluate import causal_loss
from welore.finished import composed
from welore.records import Record, read_history
from welore.runner import run

CELL = [
    "model=tiny",
    "err=0.5",
    "logger=none",
    "save=true",
    "trainer.progress=false",
    "task/protocol=smoke",
    "task/training=smoke",
    "task.training.batch=4",
    "task.training.steps=12",
    "task.training.accumulate=2",
    "task.training.validate_every=4",
]
MODES = {
    "welore": ["mode=welore"],
    "without norms, clipped": ["mode=full", "mode.norms=false", "task.training.clip=0.1"],
    "bfloat16 weights with float32 masters": ["mode=full", "model.dtype=bfloat16"],
    "bfloat16 products, layers run again": ["mode=nlrc", "model.autocast=bfloat16", "trainer.recompute=true"],
    "one side of the division": ["mode=random"],
    "lora on factors": ["mode=lora"],
    "lora plus on products": ["mode=lora_plus", "mode.lora_on=merged"],
    "rslora with norms, in bfloat16": ["mode=rslora", "mode.norms=true", "model.dtype=bfloat16"],
    "dora": ["mode=dora"],
    "pissa": ["mode=pissa"],
    "mica": ["mode=mica"],
}
STOPPED = 143
ROOT = Path(__file__).parent.parent


def config_of(outputs: Path, *overrides: str):
    return to_config(composed([*CELL, f"outputs={outputs}", *overrides]))


def poisoned_loss(model):
    loss = causal_loss(model)
    return lambda ids_BL, labels_BL: tuple(part * torch.nan for part in loss(ids_BL, labels_BL))


def live(outputs: Path, overrides: list[str], index: int, port: int, poisoned: int | None) -> None:
    """One of two processes, as srun starts them; the loss of the one that is poisoned is never finite."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "cell", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    own = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "TQDM_DISABLE": "1"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(job | step | own | meet)
    torch.set_num_threads(1)
    if index == poisoned:
        module.causal_loss = poisoned_loss
    sys.stderr = (outputs / f"log{index}").open("a")
    try:
        run(config_of(outputs, "trainer=fsdp", *overrides), outputs / "run")
    except Interrupted:
        sys.exit(STOPPED)


def start(outputs: Path, *overrides: str, poisoned: int | None = None) -> list:
    """Two processes, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_sharded", "welore.fit", "welore.sharded"])
    outputs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [(outputs, overrides, index, port, poisoned) for index in range(2)]
    both = [context.Process(target=live, args=arguments, daemon=True) for arguments in told]
    for process in both:
        process.start()
    return both


def ended(processes: list) -> list[int | None]:
    """Their exit codes; -9 of one that had to be killed, since it waited for the other."""
    for process in processes:
        process.join(200)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def stopped(outputs: Path, *overrides: str) -> None:
    """Two processes that were stopped by a signal to one of them after 20 steps or more."""
    both, deadline = start(outputs, *overrides), time.monotonic() + 200
    while len(losses(outputs)) < 20:
        assert both[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(both[1].pid, signal.SIGTERM)
    assert ended(both) == [STOPPED, STOPPED], (outputs / "log0").read_text()
    assert 20 <= len(losses(outputs)) < 100


def losses(outputs: Path) -> list[float]:
    return [line["train/loss"] for line in read_history(outputs / "run") if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", MODES.values(), ids=MODES)
def test_two_processes_with_a_shard_each_train_as_one(tmp_path, overrides):
    two, alone = tmp_path / "two", tmp_path / "alone"
    expected = run(config_of(alone, *overrides), alone / "run")
    assert ended(start(two, *overrides)) == [0, 0], (two / "log0").read_text()
    found = Record.read(two / "run")
    close = 2e-3 if any("bfloat16" in override for override in overrides) else 1e-5
    assert len(losses(two)) == 12
    assert losses(two) == pytest.approx(losses(alone), rel=close)
    assert found.fingerprint == expected.fingerprint
    assert found.metrics["tuned/perplexity"] == pytest.approx(expected.metrics["tuned/perplexity"], rel=close)
    for key in ("fit/tokens", "fit/trainable_parameters", "fit/state_gib", "tuned/parameters"):
        assert found.metrics[key] == expected.metrics[key]
    ours, theirs = (load_file(outputs / "run" / "model" / "model.safetensors") for outputs in (two, alone))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        # Adam's step is +-lr whatever the gradient: where one is next to 0, the order of sums decides its sign.
        apart = (weight.float() - theirs[name].float()).abs().mean() / theirs[name].float().abs().mean()
        assert apart < (1e-2 if weight.dtype == torch.bfloat16 else 1e-3)
    assert not (two / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_stop_at_a_signal_to_one_and_go_on_to_the_same_losses(tmp_path, dtype):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = ["mode=welore", f"model.dtype={dtype}", "task.training.steps=100"]
    assert ended(start(whole, *overrides)) == [0, 0], (whole / "log0").read_text()
    stopped(cut, *overrides)
    assert ended(start(cut, *overrides)) == [0, 0], (cut / "log0").read_text()
    assert "go on after step" in (cut / "log1").read_text()
    assert losses(cut) == losses(whole)
    ours, theirs = (Record.read(outputs / "run").metrics["tuned/perplexity"] for outputs in (cut, whole))
    assert ours == theirs


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = ["mode=full", "model.dtype=bfloat16", "task.training.steps=100"]
    expected = run(config_of(whole, *overrides), whole / "run")
    stopped(cut, *overrides)
    found = run(config_of(cut, *overrides), cut / "run")
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-3)
    assert found.metrics["tuned/perplexity"] == pytest.approx(expected.metrics["tuned/perplexity"], rel=2e-3)


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = ["mode=full", "model.dtype=bfloat16", "task.training.steps=40"]
    expected = run(config_of(whole, *overrides), whole / "run")
    step = module.Tuner.training_step

    def signalled(tuner, batch, index):
        if index == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(tuner, batch, index)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(module.Tuner, "training_step", signalled)
        run(config_of(cut, *overrides), cut / "run")
    assert len(losses(cut)) == 21
    assert ended(start(cut, *overrides)) == [0, 0], (cut / "log0").read_text()
    assert "go on after step 21" in (cut / "log0").read_text()
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-3)
    found = Record.read(cut / "run")
    assert found.metrics["tuned/perplexity"] == pytest.approx(expected.metrics["tuned/perplexity"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_loss_that_is_not_finite_in_one_process_ends_both(tmp_path, poisoned):
    assert ended(start(tmp_path, "mode=welore", poisoned=poisoned)) == [1, 1]
    error = Record.read(tmp_path / "run").error
    assert error.startswith("FloatingPointError: the loss of step 0 is not finite in at least one of 2 processes")


def test_every_mode_is_either_trained_here_in_shards_or_refused():
    trained = {option.removeprefix("mode=") for overrides in MODES.values() for option in overrides[:1]}
    alike = {"chosen": "random"}  # one class
    for path in sorted((ROOT / "conf" / "mode").glob("*.yaml")):
        overrides = ["model=tiny", "err=0.5", "trainer=fsdp", f"mode={path.stem}"]
        if path.stem in trained or alike.get(path.stem) in trained or path.stem == "none":
            to_config(composed(overrides))
        else:
            with pytest.raises(Refused, match="trainer=ddp|trainer=gpu"):
                to_config(composed(overrides))


def test_masks_and_pretraining_are_refused():
    with pytest.raises(Refused, match="prune=magnitude needs weights whole"):
        to_config(composed(["model=tiny", "err=0.5", "trainer=fsdp", "mode=welore", "prune=magnitude"]))
    with pytest.raises(Refused, match="task/training=pretrain_laptop needs weights whole"):
        to_config(composed(["model=tiny", "err=0", "trainer=fsdp", "mode=full", "task/training=pretrain_laptop"]))
