"""On which device a run computes, and how often it saves."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from welore.errors import Refused

CHECKPOINTS = "checkpoints"


@dataclass
class Trainer:
    """Nothing here changes a result: the device, the steps between two checkpoints, whether bars are shown, and
    whether every decoder layer is run again for its gradient, which takes less memory and more time (`recompute`)."""

    name: str
    device: str
    checkpoint_every: int
    progress: bool
    recompute: bool

    def __post_init__(self):
        if self.device not in ("auto", "cpu", "gpu"):
            raise Refused(f"trainer.device={self.device} is unknown. Write auto, cpu or gpu.")
        if self.checkpoint_every < 1:
            raise Refused(f"trainer.checkpoint_every={self.checkpoint_every} saves never. Write 1 or more steps.")

    def place(self) -> torch.device:
        """The device; under Slurm also as many threads as the job has CPUs, for torch sees those of the machine."""
        if self.device == "gpu" and not torch.cuda.is_available():
            raise Refused(
                "trainer.device=gpu, but torch sees no GPU here. Write trainer=cpu, or start where there is one."
            )
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE"):
            torch.set_num_threads(int(cpus))
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


def discard_checkpoints(folder: Path) -> None:
    """Drop what a finished run no longer needs, or what a forced one must not continue from."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
