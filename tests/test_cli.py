"""The command line: what it shows, that a finished run returns at once, and that a sweep trains each cell once."""

from collections import Counter
from pathlib import Path

import pytest

from welore.records import FILE, Record

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
GROUPS = ("model", "svd", "ranks", "mode", "task", "task/protocol", "task/training", "trainer", "logger")


def written(outputs):
    """When each record of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in outputs.rglob(FILE)}


def test_help_lists_every_group_with_its_options(cli):
    shown = cli("--help")
    assert shown.returncode == 0, shown.stderr
    options = {line.partition(": ")[0]: line.partition(": ")[2] for line in shown.stdout.splitlines() if ": " in line}
    for group in GROUPS:
        assert options[group].split(", ") == sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


def test_cfg_job_shows_the_config_and_runs_nothing(cli, tmp_path):
    shown = cli("mode=lora", "err=0.4", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "err: 0.4" in shown.stdout and "lora_on: factors" in shown.stdout
    assert written(tmp_path) == {}


def test_a_finished_run_returns_at_once_with_the_same_table(cli, tmp_path):
    first = cli("mode=welore")
    assert first.returncode == 0, first.stderr
    assert "perplexity" in first.stdout and "tuned" in first.stdout
    before = written(tmp_path / "outputs")
    assert len(before) == 1
    second = cli("mode=welore")
    assert second.stdout == first.stdout
    assert "· load" in first.stderr and "· load" not in second.stderr
    assert written(tmp_path / "outputs") == before


def test_force_runs_again(cli, tmp_path):
    cli("mode=none")
    before = written(tmp_path / "outputs")
    assert cli("mode=none", "force=true").returncode == 0
    after = written(tmp_path / "outputs")
    assert after.keys() == before.keys() and after != before


def test_twelve_cells_leave_twelve_records_and_the_second_time_train_nothing(cli, tmp_path):
    sweep = ["err=0.3,0.5", "mode=none,welore,nlrc,full,lora,galore"]
    sweep += ["model.config.hidden_size=320"]  # also at err=0.5 some factor is wider than the default rank of GaLore
    first = cli(*sweep, multirun=True, timeout=600)
    assert first.returncode == 0, first.stderr
    before = written(tmp_path / "outputs")
    records = [Record.read(path.parent) for path in before]
    cells = Counter((record.config["err"], record.config["mode"]["name"]) for record in records)
    modes = ("none", "welore", "nlrc", "full", "lora", "galore")
    assert cells == Counter((err, mode) for err in (0.3, 0.5) for mode in modes)
    assert {record.status for record in records} == {"done"}
    second = cli(*sweep, multirun=True)
    assert second.returncode == 0, second.stderr
    assert written(tmp_path / "outputs") == before
    assert "· load" not in second.stderr
    assert second.stdout.count("record.json") == 12
