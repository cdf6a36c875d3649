"""Which processes train a cell together, and where."""

import pytest
import torch

from welore import processes


@pytest.mark.parametrize(("seen", "expected"), [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0])])
def test_the_processes_of_a_node_take_a_gpu_each_of_those_that_they_see(monkeypatch, seen, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    found = []
    for place in range(4):
        monkeypatch.setenv("SLURM_LOCALID", str(place))
        found.append(processes.device())
    assert found == expected
