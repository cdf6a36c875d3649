"""The processes that train one cell together, one a device, as `srun` has started them.

The first one does everything that a run alone does; the others are told by it when there is something to train.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from welore.errors import Lost

PATIENCE = timedelta(days=30)  # the first one may compress for days before the others have something to do


def count() -> int:
    """The tasks of this step of a Slurm job; 1 anywhere else, also in a batch script that has yet to call srun."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def index() -> int:
    """0 for the first process, which alone writes."""
    return int(os.environ["SLURM_PROCID"]) if count() > 1 else 0


def device() -> int:
    """Which of the GPUs that a process of several sees is its own: those of one node take one each."""
    return int(os.environ["SLURM_LOCALID"]) % torch.cuda.device_count()


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, and part from them: whoever then waits for this one learns that it is gone."""
    if count() == 1:
        yield
        return
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    here = SLURMEnvironment(auto_requeue=False)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{here.main_address}:{here.main_port}",
        rank=index(),
        world_size=count(),
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def told(value: Any = None) -> Any:
    """What the first process has, in all of them. Raises Lost where the first one has ended."""
    if count() == 1:
        return value
    box = [value]
    try:
        dist.broadcast_object_list(box, src=0)
    except RuntimeError as error:  # what gloo makes of a closed connection
        raise Lost("another process of this run has ended early; the first error of the job says why") from error
    return box[0]
