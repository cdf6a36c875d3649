"""Whatever stops a run, and whenever: it goes on to the same result, and nothing half-done stays behind."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from welore.config import Config, to_config
from welore.explain import explain
from welore.finished import composed
from welore.records import FILE, Record, read_history
from welore.runner import run

pytestmark = pytest.mark.slow

CELL = [
    "model=tiny",
    "err=0.5",
    "mode=welore",
    "logger=none",
    "trainer=cpu",
    "trainer.progress=false",
    "trainer.checkpoint_minutes=0",
    "task/protocol=smoke",
    "task/training=smoke",
    "task.training.steps=20",
    "task.training.validate_every=5",
]
KILLS = 20


@pytest.fixture(scope="module")
def config_of(text_file):
    """A function of a folder and overrides to the config of the run that writes there."""

    def config_of(outputs, *overrides):
        return to_config(composed([*CELL, f"task.path={text_file}", f"outputs={outputs}", *overrides]))

    return config_of


def live(config: Config) -> None:
    """One life of the run, in a process of its own."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)  # as in the tests: the device, and with it a cached outcome, is named after them
    outputs = Path(config.outputs)
    sys.stderr = (outputs / "log").open("a")
    run(config, outputs / "run")


def losses(folder: Path) -> list[tuple]:
    """Of training and of validation, each with its step."""
    return [
        (line["step"], key, line[key])
        for line in read_history(folder)
        for key in ("train/loss", "validation/perplexity")
        if key in line
    ]


def cached(outputs: Path) -> dict[str, object]:
    """What runs share, but for the outcomes of benchmarks, which hold times."""
    files = [path for path in (outputs / ".cache").rglob("*") if path.is_file() and path.parent.name != "benchmark"]
    return {str(path.relative_to(outputs)): content(path) for path in files}


def content(path: Path) -> object:
    if path.parent.name == "tokens":  # torch writes the name of the file into it
        return {key: tensor.tolist() for key, tensor in torch.load(path, weights_only=True).items()}
    return path.read_bytes()


def names(outputs: Path) -> set[str]:
    return {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.name != "log"}


@pytest.fixture(scope="module")
def start(config_of):
    """A function that starts a life in `outputs`: forked from a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "welore.runner", "welore.fit", "lightning.pytorch"])

    def start(outputs):
        outputs.mkdir(exist_ok=True)
        process = context.Process(target=live, args=(config_of(outputs),))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The outputs of a run that nothing has stopped, and the seconds that it took."""
    for _ in range(2):  # the first one waits for the imports
        outputs = tmp_path_factory.mktemp("whole")
        began = time.monotonic()
        process = start(outputs)
        process.join()
        assert process.exitcode == 0, (outputs / "log").read_text()
    return outputs, time.monotonic() - began


def test_a_run_killed_at_20_random_moments_ends_as_one_that_never_was(start, whole, tmp_path):
    """In turn early and late in a life: while it loads, compresses, trains, measures, saves and records."""
    expected, seconds = whole
    draw = random.Random(0)
    moments = [(number + draw.random()) / KILLS for number in range(KILLS)]
    draw.shuffle(moments)
    lives, kills = 0, 0
    outputs = tmp_path / "0"
    while kills < KILLS:
        fresh, began = not outputs.exists(), time.monotonic()
        process = start(outputs)
        process.join(moments[kills] * seconds)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -9), (outputs / "log").read_text()
        if process.exitcode == 0:  # it was done before its moment came
            check(outputs, expected)
            if fresh:  # the machine is faster by now, and some moments would never come
                seconds = min(seconds, time.monotonic() - began)
            lives += 1
            outputs = tmp_path / str(lives)
    process = start(outputs)
    process.join()
    check(outputs, expected)


def check(outputs: Path, expected: Path) -> None:
    record, theirs = Record.read(outputs / "run"), Record.read(expected / "run")
    assert record.status == "done", (outputs / "log").read_text()
    assert losses(outputs / "run") == losses(expected / "run")
    for stage in ("dense", "compressed", "tuned"):
        assert record.metrics[f"{stage}/perplexity"] == theirs.metrics[f"{stage}/perplexity"]
    assert names(outputs) == names(expected)
    assert cached(outputs) == cached(expected)
    weights = [folder / "run" / "model" / "model.safetensors" for folder in (outputs, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own at `folder`."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *options, folder], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("size", [64, 256, 768, 1280, 1792])
def test_a_full_disk_is_told_and_what_it_holds_is_whole(whole, config_of, tmp_path, capsys, size):
    """At sizes (KiB) that end before, while and after it trains; with more room the same command goes on."""
    expected, _ = whole
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs") as disk:
        with pytest.raises(Exception) as stopped:
            run(config_of(disk), disk / "run")
        assert explain(stopped.value) == 1
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert "No space left on device" in told and "defect" not in told
        assert not list(disk.rglob("*.part"))
        assert (
            not (disk / "run" / FILE).exists() or json.loads((disk / "run" / FILE).read_text())["status"] == "failed"
        )
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        (disk / "log").touch()
        run(config_of(disk), disk / "run")
        check(disk, expected)


def test_outputs_that_cannot_be_written_are_told(config_of, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs") as disk:
        with pytest.raises(OSError) as stopped:
            run(config_of(disk), disk / "run")
        assert explain(stopped.value) == 1
        assert "Read-only file system" in capsys.readouterr().err


def test_a_finished_run_is_read_from_where_nothing_can_be_written(config_of, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as disk:
        made = run(config_of(disk, "mode=none"), disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert run(config_of(disk, "mode=none"), disk / "run") == made


def test_a_clock_that_goes_backwards_changes_no_result(whole, config_of, tmp_path, monkeypatch):
    expected, _ = whole
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    (tmp_path / "log").touch()
    assert run(config_of(tmp_path), tmp_path / "run").seconds > 0
    check(tmp_path, expected)
