"""A thousand finished runs: what it takes to find them again, and to show them on one page."""

import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from welore.config import fingerprint
from welore.records import FILE, Record

ROOT = Path(__file__).parent.parent
RUNS = 1000
PATIENCE = 4  # how many times as long as wanted it may take, on a machine that is busy with other tests
CELL = ["task/protocol=smoke", "task/training=smoke", "mode=welore", "err=0.5"]


@pytest.fixture
def thousand(cli, configured, tmp_path):
    """The outputs of one run, and of its copies under the fingerprints of other seeds."""
    assert cli(*CELL).returncode == 0
    folder = next((tmp_path / "outputs").rglob(FILE)).parent
    record, config = Record.read(folder), configured(*CELL)
    assert fingerprint(config) == record.fingerprint
    for seed in range(1, RUNS):
        other = replace(config, seed=seed)
        name = fingerprint(other)
        place = folder.with_name(folder.name.replace(record.fingerprint, name))
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("model"))
        replace(record, fingerprint=name, config=asdict(other)).save(place)
    return tmp_path / "outputs"


@pytest.mark.slow
def test_a_thousand_finished_runs_are_launched_in_a_minute_and_shown_in_another(cli, thousand):
    sweep = ["hydra/launcher=slurm", *CELL, f"seed=range({RUNS})"]
    done = cli(*sweep, multirun=True, timeout=PATIENCE * 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record.json") == RUNS

    command = [sys.executable, "-m", "experiments", "report", f"outputs={thousand}"]
    for wanted in (60, 10):  # seconds; the first time finds the fingerprints of all artefacts, and remembers them
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE * wanted)
        assert shown.returncode == 0, shown.stderr
    page = (thousand / "report.html").read_text()
    assert all(path.parent.name.rpartition("-")[2] in page for path in thousand.rglob(FILE))
