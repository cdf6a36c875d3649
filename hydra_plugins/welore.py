"""How Hydra sweeps and launches here. It finds plugins in this name space alone, and imports them at every start."""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf


class Unfinished(BasicSweeper):
    """Hydra's own sweeper without the cells that are done: it prints their tables, and launches the others."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        batches = [
            [cell for cell in batch if not self._is_shown(cell)]
            for batch in super().split_arguments(overrides, max_batch_size)
        ]
        return [batch for batch in batches if batch]

    def _is_shown(self, cell: Sequence[str]) -> bool:
        from welore.finished import finished
        from welore.report import summary

        subdir = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]
        found = finished(cell, subdir)
        if found is not None:
            folder, record = found
            print(summary(record, folder), flush=True)
        return found is not None

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Every cell has been composed to find its record."""


class Slurm(Launcher):
    """One Slurm job a cell, through hydra-submitit: submitted together, and waited for whatever becomes of each."""

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, **context: Any) -> None:
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        self.job = SlurmLauncher(**self.params)
        self.job.setup(**context)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from welore.cluster import executor, wait

        cells = [list(overrides) for overrides in job_overrides]
        numbers = range(initial_job_idx, initial_job_idx + len(cells))
        jobs = executor(self.job.params).map_array(
            self.job,
            cells,
            ["hydra.sweep.dir"] * len(cells),
            numbers,
            [f"cell {number}" for number in numbers],
            [Singleton.get_state()] * len(cells),
        )
        return wait(jobs, [" ".join(filter_overrides(cell)) for cell in cells])
