"""Two processes that meet at one run: one works, and the other waits, whatever becomes of the first."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from welore.alone import LOCK, alone_in

pytestmark = pytest.mark.slow  # processes that import torch

HOLD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from welore.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "work").write_text("done")
"""


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which works in `tmp_path` from its first line on until it is told to end."""
    started = []

    def hold():
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_waits_until_the_first_is_done(tmp_path, hold):
    first = hold()
    assert first.stdout.readline() == "in\n"
    second = hold()
    waiting = second.stderr.readline()
    assert f"process {first.pid} on " in waiting and "waiting" in waiting
    first.communicate("end\n")
    assert second.stdout.readline() == "in\n"
    assert (tmp_path / "work").read_text() == "done"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(tmp_path, hold, number):
    first = hold()
    assert first.stdout.readline() == "in\n"
    first.send_signal(number)
    first.wait()
    with alone_in(tmp_path):
        assert f"process {first.pid}" not in (tmp_path / LOCK).read_text()
    assert not (tmp_path / "work").exists()


def test_a_process_that_is_done_holds_nothing(tmp_path, hold):
    with alone_in(tmp_path):
        second = hold()
        assert "waiting" in second.stderr.readline()
    assert second.stdout.readline() == "in\n"


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("welore.alone.fcntl.lockf", refuse)
    with alone_in(tmp_path):
        Path(tmp_path, "work").write_text("done")
    assert "has no locks" in capsys.readouterr().err


def test_of_two_processes_at_one_cell_one_trains_and_both_show_the_result(cli):
    with ThreadPoolExecutor(2) as processes:
        first, second = processes.map(lambda _: cli("mode=welore", "err=0.5", timeout=500), range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert [("· train" in process.stderr) for process in (first, second)].count(True) == 1
