"""On which devices a run computes, and how often it saves."""

import os
import shutil
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from welore import processes
from welore.errors import Refused

CHECKPOINTS = "checkpoints"
REQUEUE = signal.SIGUSR2  # what submitit asks Slurm to send before the time limit and on preemption


@dataclass
class Trainer:
    """Nothing here changes a result: the device, the minutes between two checkpoints, whether bars are shown, and
    whether every decoder layer is run again for its gradient, which takes less memory and more time (`recompute`)."""

    together: ClassVar[bool] = False  # several processes for one cell
    shards: ClassVar[bool] = False  # each of which holds a part of every weight
    name: str
    device: str
    checkpoint_minutes: float
    progress: bool
    recompute: bool

    def __post_init__(self):
        if self.device not in ("auto", "cpu", "gpu"):
            raise Refused(f"trainer.device={self.device} is unknown. Write auto, cpu or gpu.")
        if self.checkpoint_minutes < 0:
            raise Refused(
                f"trainer.checkpoint_minutes={self.checkpoint_minutes} is no time. Write 0 for every step, or more."
            )

    def spread(self) -> dict[str, Any]:
        """How Lightning spreads the training over processes: here one process trains alone."""
        if processes.count() > 1:
            raise Refused(
                f"Slurm has started {processes.count()} processes for one cell, and trainer={self.name} trains in "
                f"one. Write trainer=ddp, or start one task."
            )
        return {"devices": 1}

    def share(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """The model as this process trains it: here itself."""
        return nullcontext(model)

    def place(self) -> torch.device:
        """The device; under Slurm also as many threads as the job has CPUs, for torch sees those of the machine."""
        if self.device == "gpu" and not torch.cuda.is_available():
            raise Refused(
                "trainer.device=gpu, but torch sees no GPU here. Write trainer=cpu, or start where there is one."
            )
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE"):
            torch.set_num_threads(int(cpus))
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if processes.count() > 1:
            torch.cuda.set_device(processes.device())  # or all of a node would load the model onto its first GPU
        return torch.device("cuda")


@dataclass
class Ddp(Trainer):
    """Every process holds the whole model and sees its share of every batch; their gradients are averaged."""

    together: ClassVar[bool] = True

    def spread(self) -> dict[str, Any]:
        if processes.count() == 1:
            raise Refused(
                f"trainer={self.name} trains in the processes that Slurm starts, and there is one. Write "
                f"hydra/launcher=slurm hydra.launcher.tasks_per_node=2, or "
                f"srun --nodes=1 --ntasks-per-node=2 python run.py ..."
            )
        nodes = int(os.environ["SLURM_NNODES"])
        return {"devices": processes.count() // nodes, "num_nodes": nodes, "strategy": "ddp"}


@dataclass
class Fsdp(Ddp):
    """As `Ddp`, but every process holds its share of every weight, of the gradient and of the optimizer's state."""

    shards: ClassVar[bool] = True

    def spread(self) -> dict[str, Any]:
        from welore.sharded import Sharded  # Lightning takes seconds to import

        return super().spread() | {"strategy": Sharded()}

    def share(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        from welore.sharded import sharded

        return sharded(model)


def discard_checkpoints(folder: Path) -> None:
    """Drop what a finished run no longer needs, or what a forced one must not continue from."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
