"""A run that is cut short goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from welore import runner
from welore.config import CONF, to_config
from welore.errors import Interrupted, Refused
from welore.finished import composed
from welore.fit import Whole
from welore.history import History
from welore.lowrank import LowRankLinear
from welore.module import Tuner
from welore.parts import CoreLinear, LoraXs
from welore.records import Record, read_history
from welore.runner import run
from welore.steppers import EightBit

SMALL = [
    "model=tiny",
    "err=0.5",
    "logger=none",
    "trainer.progress=false",
    "task/protocol=smoke",
    "task/training=smoke",
]
TRAINING = ["task.training.steps=12", "task.training.accumulate=2", "task.training.validate_every=4"]


def losses(folder: Path) -> list[tuple]:
    return [
        (line["step"], line["train/loss"], line["train/tokens"])
        for line in read_history(folder)
        if "train/loss" in line
    ]


def config_of(outputs: Path, *overrides: str):
    return to_config(composed([*SMALL, *TRAINING, f"outputs={outputs}", *overrides]))


MODES = {
    "welore": ["mode=welore"],
    "welore with a validation out of turn at the end": ["mode=welore", "task.training.validate_every=5"],
    "nlrc": ["mode=nlrc"],
    "full": ["mode=full"],
    "full with layers run again": ["mode=full", "trainer.recompute=true"],
    "bfloat16 weights with float32 masters": ["mode=full", "model.dtype=bfloat16"],
    "galore": ["mode=galore", "mode.rank=8", "mode.gap=5"],
    "lora on factors": ["mode=lora"],
    "lora on the product": ["mode=lora", "mode.lora_on=merged"],
    "lora with dropout": ["mode=lora", "mode.dropout=0.3"],
    "rslora": ["mode=rslora"],
    "dora": ["mode=dora"],
    "dora on the product": ["mode=dora", "mode.lora_on=merged"],
    "pissa": ["mode=pissa"],
    "pissa on the product": ["mode=pissa", "mode.lora_on=merged"],
    "mica": ["mode=mica"],
    "lora plus with masters": ["mode=lora_plus", "model.dtype=bfloat16"],
    "randlora": ["mode=randlora"],
    "osf": ["mode=osf"],
    "singular values": ["mode=sv"],
    "lora-xs": ["mode=lora_xs"],
    "lisa in the middle of a turn": ["mode=lisa", "mode.layers=1", "mode.gap=3"],
    "lisa with masters": ["mode=lisa", "mode.layers=1", "mode.gap=5", "model.dtype=bfloat16"],
    "lisa by outliers": ["mode=lisa", "mode.layers=1", "mode.gap=3", "mode.sampling=outlier", "mode.outlier=2"],
    "chosen lrc": ["mode=chosen", "mode.who=lrc"],
    "chosen nlrc": ["mode=chosen", "mode.who=nlrc"],
    "chosen all": ["mode=chosen", "mode.who=all"],
    "random": ["mode=random"],
    "apollo": ["mode=apollo", "mode.rank=8", "mode.gap=4"],
    "apollo-mini": ["mode=apollo", "mode.rank=1", "mode.gap=4", "mode.scale=128", "mode.per=tensor"],
    "fira": ["mode=fira", "mode.rank=8", "mode.gap=4"],
    "muon": ["mode=muon"],
    "padded token budget": ["task.training.pack=false", "task.training.steps=null", "task.training.tokens=1500"],
}
# As if there were a GPU, with what stands in for their library.
EIGHT_BIT = {
    "welore in 8 bits": ["mode=welore_8bit"],
    "nlrc in 8 bits": ["mode=nlrc_8bit", "err=0.2"],
    "lora in 8 bits": ["mode=lora_8bit", "mode.rank=32"],
    "full in 8 bits with masters": ["mode=full_8bit", "model.dtype=bfloat16"],
}


# Three whole runs each: the default tests take the one with most state.
QUICK = ("lisa in the middle of a turn",)
TABLE = [pytest.param(v, id=k, marks=[] if k in QUICK else [pytest.mark.slow]) for k, v in MODES.items()]


def test_the_table_holds_every_mode():
    held = {override.removeprefix("mode=") for overrides in (MODES | EIGHT_BIT).values() for override in overrides[:1]}
    every = {file.stem for file in (CONF / "mode").glob("*.yaml")}
    assert every - held == {"none"}  # which trains nothing


def stop_in_step_5(outputs: Path, monkeypatch, *overrides: str) -> None:
    """Leave a run in the folder `cut` whose fifth step was its last."""
    steps = Tuner.training_step

    def signalled(tuner, batch, index):
        if index == 9:  # the first pass of the fifth step
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(tuner, batch, index)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after step 5"):
        patched.setattr(Tuner, "training_step", signalled)
        run(config_of(outputs, *overrides), outputs / "cut")
    assert Record.read(outputs / "cut").status == "failed"
    assert len(losses(outputs / "cut")) == 5


@pytest.mark.parametrize("overrides", TABLE)
def test_a_signalled_run_resumes_to_the_bit_in_every_mode(tmp_path, monkeypatch, overrides):
    resumes_to_the_bit(tmp_path, monkeypatch, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", EIGHT_BIT.values(), ids=EIGHT_BIT)
def test_a_signalled_run_in_eight_bits_resumes_to_the_bit(tmp_path, monkeypatch, bitsandbytes, overrides):
    monkeypatch.setattr(EightBit, "check_machine", lambda mode: None)
    saved, save = [], Whole.save_checkpoint

    def note(whole, checkpoint, path, storage_options=None):
        (optimizer,) = checkpoint["optimizer_states"]
        saved.append({getattr(kept, "dtype", None) for kept in tree_leaves(optimizer["state"])})
        save(whole, checkpoint, path)

    monkeypatch.setattr(Whole, "save_checkpoint", note)
    resumes_to_the_bit(tmp_path, monkeypatch, *overrides)
    assert all(torch.uint8 in dtypes for dtypes in saved) and len(saved) == 3  # both ends, and where it was cut


def resumes_to_the_bit(tmp_path: Path, monkeypatch, *overrides: str) -> None:
    whole = run(config_of(tmp_path, *overrides), tmp_path / "whole")
    stop_in_step_5(tmp_path, monkeypatch, *overrides)
    resumed = run(config_of(tmp_path, *overrides), tmp_path / "cut")

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed.metrics["tuned/perplexity"] == whole.metrics["tuned/perplexity"]
    for key in ("fit/tokens", "fit/flops_per_token"):
        assert resumed.metrics[key] == whole.metrics[key]
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["training_step", "on_validation_epoch_start"])
def test_a_signal_in_the_last_step_or_the_validation_after_it_stops_the_run_before_it_is_measured(
    tmp_path, monkeypatch, at
):
    whole = run(config_of(tmp_path), tmp_path / "whole")
    plain = getattr(Tuner, at)

    def signalled(tuner, *arguments):
        if tuner.global_step + (at == "training_step") == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(tuner, *arguments)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after step 12 of 12"):
        patched.setattr(Tuner, at, signalled)
        run(config_of(tmp_path), tmp_path / "cut")
    assert "tuned/perplexity" not in Record.read(tmp_path / "cut").metrics
    resumed = run(config_of(tmp_path), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed.metrics["tuned/perplexity"] == whole.metrics["tuned/perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "saved"), [(0, 12), (20, 4), (100000, 0)])
def test_a_checkpoint_is_written_after_the_step_in_which_its_minutes_have_passed(
    tmp_path, monkeypatch, minutes, saved
):
    """On a clock that goes on by seven minutes a step: after steps 3, 6, 9 and 12 twenty have passed."""
    clock = SimpleNamespace(monotonic=lambda: 60 * 7 * steps[0])
    steps, written, step, save = [0], [], Tuner.on_before_optimizer_step, Whole.save_checkpoint

    def tick(tuner, optimizer):
        steps[0] += 1
        return step(tuner, optimizer)

    def note(whole, checkpoint, path, storage_options=None):
        written.append(checkpoint["global_step"])
        save(whole, checkpoint, path)

    monkeypatch.setattr("welore.fit.time", clock)
    monkeypatch.setattr(Tuner, "on_before_optimizer_step", tick)
    monkeypatch.setattr(Whole, "save_checkpoint", note)
    run(config_of(tmp_path, f"trainer.checkpoint_minutes={minutes}"), tmp_path / "run")
    assert len(written) == saved + 1 and written[-1] == 12  # the last one is that of the end
    assert minutes != 20 or written == [3, 6, 9, 12, 12]


@torch.no_grad()
def turn_signs(model) -> None:
    """Give the first LRC the signs that another decomposition may find: the same product."""
    lrc = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    lrc.A.weight[:, 0].neg_()
    lrc.B.weight[0].neg_()


@torch.no_grad()
def turn_vectors(model) -> None:
    """The same of the vectors between which LoRA-XS trains."""
    core = next(module for module in model.modules() if isinstance(module, CoreLinear))
    core.A[:, 0].neg_()
    core.B[0].neg_()


def made_otherwise(monkeypatch, change: Callable, place: object, name: str) -> None:
    """Let the model be changed whenever the method `name` of `place` has prepared it."""
    method = getattr(place, name)

    def changed(*arguments):
        found = method(*arguments)
        change(next(argument for argument in arguments if isinstance(argument, PreTrainedModel)))
        return found

    monkeypatch.setattr(place, name, changed)


OTHERWISE = {
    "factors under adapters": (["mode=lora"], turn_signs, runner, "compress"),
    "factors under nothing that trains": (["mode=nlrc"], turn_signs, runner, "compress"),
    "vectors beside what trains": (["mode=lora_xs"], turn_vectors, LoraXs, "prepare"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "change", "place", "name"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_run_does_not_go_on_upon_another_base(tmp_path, monkeypatch, overrides, change, place, name):
    stop_in_step_5(tmp_path, monkeypatch, *overrides)
    with monkeypatch.context() as patched, pytest.raises(Refused, match="came out otherwise.*force=true"):
        made_otherwise(patched, change, place, name)
        run(config_of(tmp_path, *overrides), tmp_path / "cut")
    assert run(config_of(tmp_path, *overrides), tmp_path / "cut").status == "done"  # the checkpoint is still there
    assert len(losses(tmp_path / "cut")) == 12


@pytest.mark.slow
def test_what_a_checkpoint_holds_may_be_made_otherwise(tmp_path, monkeypatch):
    """Factors that train are taken from the checkpoint, and so are their signs."""
    run(config_of(tmp_path, "mode=welore"), tmp_path / "whole")
    stop_in_step_5(tmp_path, monkeypatch, "mode=welore")
    made_otherwise(monkeypatch, turn_signs, runner, "compress")
    run(config_of(tmp_path, "mode=welore"), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_without_the_digest_of_its_base_goes_on(tmp_path, monkeypatch):
    """As those that were written before there was one."""
    stop_in_step_5(tmp_path, monkeypatch, "mode=lora")
    file = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["base"]
    torch.save(checkpoint, file)
    assert run(config_of(tmp_path, "mode=lora"), tmp_path / "cut").status == "done"
    assert [line[0] for line in losses(tmp_path / "cut")] == list(range(12))


def lines(folder: Path) -> list[dict]:
    """The whole history, but for what depends on the machine."""
    told = ("step", "train/loss", "train/lr", "train/tokens", "validation/perplexity")
    return [{key: line[key] for key in told if key in line} for line in read_history(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("last", ["train/loss", "validation/perplexity"])
def test_a_run_that_ends_before_its_step_is_logged_has_the_whole_history_in_the_end(tmp_path, monkeypatch, last):
    """Validation and a checkpoint are due after the same step, and the end comes before one of the two lines."""
    overrides = ["trainer.checkpoint_minutes=0"]
    run(config_of(tmp_path, *overrides), tmp_path / "whole")
    log = History.log_metrics

    def end(history, metrics, step=None):
        if step == 7 and last in metrics:
            raise MemoryError
        log(history, metrics, step)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(History, "log_metrics", end)
        run(config_of(tmp_path, *overrides), tmp_path / "cut")
    run(config_of(tmp_path, *overrides), tmp_path / "cut")
    assert any(last in line for line in lines(tmp_path / "whole"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(tmp_path, monkeypatch):
    whole = run(config_of(tmp_path), tmp_path / "whole")
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cut" / "checkpoints" / "last.ckpt").write_bytes(b"half a file")
    resumed = run(config_of(tmp_path), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed.metrics["tuned/perplexity"] == whole.metrics["tuned/perplexity"]


def _start(outputs: Path) -> subprocess.Popen:
    command = [sys.executable, "run.py", *SMALL, "task.training.steps=400", "trainer.checkpoint_minutes=0.002"]
    return subprocess.Popen(
        [*command, f"outputs={outputs}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _folder(outputs: Path) -> Path | None:
    return next((path.parent for path in outputs.glob("tiny/*/*/*/history.jsonl")), None)


def _wait_for_step(outputs: Path, step: int) -> None:
    for _ in range(6000):
        folder = _folder(outputs)
        if folder is not None and len(read_history(folder)) > step:
            return
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} in a minute")


@pytest.fixture(scope="module")
def whole_process(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("whole")
    process = _start(outputs)
    process.communicate()
    assert process.returncode == 0
    return _folder(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_process_goes_on_from_its_checkpoint(tmp_path, whole_process, number, status):
    process = _start(tmp_path)
    _wait_for_step(tmp_path, 40)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in errors
    cut = _folder(tmp_path)
    assert 0 < len(losses(cut)) < 400
    assert (cut / "checkpoints" / "last.ckpt").exists()

    again = _start(tmp_path)
    again.communicate()
    assert again.returncode == 0
    assert losses(cut) == losses(whole_process)
    ours, theirs = (json.loads((folder / "record.json").read_text()) for folder in (cut, whole_process))
    assert ours["metrics"]["tuned/perplexity"] == theirs["metrics"]["tuned/perplexity"]
