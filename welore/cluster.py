"""Cells as Slurm jobs: submitted through submitit, and waited for until each has a record or a reason for none."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn

from welore.errors import Lost, Refused
from welore.explain import Failed, explain
from welore.records import Record
from welore.report import announce, summary

if TYPE_CHECKING:  # an extra
    from submitit import Job, SlurmExecutor

OF_EXECUTOR = ("submitit_folder", "max_num_timeout")


def executor(options: dict[str, Any]) -> "SlurmExecutor":
    """What submits jobs as the config of the launcher says, under the names that submitit has for it."""
    from submitit import SlurmExecutor

    try:
        found = SlurmExecutor(options["submitit_folder"], max_num_timeout=options["max_num_timeout"])
    except RuntimeError as error:  # no srun
        raise Refused(
            "hydra/launcher=slurm found no Slurm here: there is no srun. Start on a login node, or leave the launcher "
            "out to run the cells here one after the other."
        ) from error
    names = SlurmExecutor._equivalence_dict()
    found.update_parameters(
        **{
            names.get(key, key): value
            for key, value in options.items()
            if key not in OF_EXECUTOR and value is not None
        }
    )
    return found


def wait(jobs: Sequence["Job"], cells: Sequence[str]) -> list[JobReturn]:
    """What each job has returned, in order. One that fails or is killed does not keep the others from being waited
    for; then `Failed` is raised, with all that went wrong already said."""
    array = jobs[0].job_id.partition("_")[0]
    announce(f"{len(jobs)} jobs in Slurm: squeue -j {array}; logs are {jobs[0].paths.stderr.parent.parent}/{array}*")
    returns, failed = [], {}
    for job, cell in zip(jobs, cells, strict=True):
        try:
            returns.append(_returned(job))
            print(_told(returns[-1]), flush=True)
        except Exception as error:
            failed[cell] = explain(_reason(job, error), cell)
    if failed:
        raise Failed(failed)
    return returns


def _returned(job: "Job") -> JobReturn:
    """That of the first task: where a cell has several, it alone writes. Raises what the cell has raised."""
    returned = job.results()[0]
    with redirect_stderr(io.StringIO()):  # Hydra would print what is explained here
        returned.return_value  # noqa: B018, a property that raises
    return returned


def _reason(job: "Job", error: Exception) -> Exception:
    """The error of the cell itself; of a job that left no result, which it was and how Slurm says it ended."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    if not isinstance(error, FailedJobError | UncompletedJobError):
        return error
    return Lost(f"job {job.job_id} left no result (Slurm: {job.state}). Its log: {job.paths.stderr}")


def _told(returned: JobReturn) -> str:
    folder = Path(returned.hydra_cfg.hydra.runtime.output_dir)
    return summary(Record.read(folder), folder)
