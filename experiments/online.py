"""Runs as W&B holds them, in the place of a folder of outputs: source=wandb:ENTITY/PROJECT."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from experiments.cells import Cell, Runs
from welore.cache import digest, whole
from welore.errors import Refused
from welore.loggers import RECORD
from welore.records import Record, finite

if TYPE_CHECKING:
    from wandb.apis.public import Run

CURVES = ("_", "train/", "validation/", "trainer/", "epoch")  # how the keys of W&B's summary begin that are no metrics
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how W&B writes numbers that a record leaves empty


def read(source: str, outputs: str, name: Callable[[Cell], str]) -> Runs:
    """The runs of a project by fingerprint; their files come into the cache of `outputs` when they are asked for."""
    found = re.fullmatch(r"wandb:(\w[\w.-]*/\w[\w.-]*)", source)
    if found is None:
        raise Refused(f"source={source} is no source. Write source=wandb:ENTITY/PROJECT, or leave it out.")
    home = Path(outputs) / ".cache" / "wandb" / found[1]
    by_folder = {home / digest(run.id, record.started): (run, record) for run, record in _records(found[1])}

    def fetch(folder: Path, file: str) -> None:
        for there in by_folder[folder][0].files([file]):
            with whole(folder / file) as part, TemporaryDirectory() as elsewhere:
                there.download(root=elsewhere)
                shutil.copy(Path(elsewhere, file), part)

    return Runs.of(((folder, record) for folder, (_, record) in by_folder.items()), name, fetch)


def _records(project: str) -> "Iterator[tuple[Run, Record]]":
    """Every run of a project that has come to an end, the earliest first."""
    import wandb

    try:
        for run in wandb.Api().runs(project, order="+created_at", per_page=200, lazy=False):
            if RECORD in run.summary_metrics:
                with suppress(KeyError, TypeError, ValueError):  # a run of other code that uses this word
                    yield run, record_of(run.config, dict(run.summary_metrics))
    except (wandb.errors.Error, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(
            f"the runs of {project} cannot be read from W&B: {reason}. Run `wandb login`, or set WANDB_API_KEY, and "
            f"check the name."
        ) from error


def record_of(config: dict[str, Any], summary: dict[str, Any]) -> Record:
    """The record that `welore.loggers` has laid down in the config and in the summary of a W&B run."""
    about = dict(summary.pop(RECORD))
    empty = dict.fromkeys(about.pop("empty"))
    found = {key: value for key, value in summary.items() if not key.startswith(CURVES)}
    found = {key: None if value in NOT_FINITE else value for key, value in finite(found).items()}
    return Record(config=config, metrics=found | empty, **about)
