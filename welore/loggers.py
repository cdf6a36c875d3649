"""Where the curves of a run go: W&B online, W&B on disk to be synced later, or nowhere but the run folder."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.errors import Refused
from welore.records import HISTORY, Record

if TYPE_CHECKING:  # importing Lightning takes seconds, and a refused config should not
    from lightning.pytorch.loggers import Logger as LightningLogger

RECORD = "record"  # the key of the summary of a W&B run under which stands what W&B has no place for
ABOUT = ("fingerprint", "commit", "environment", "started")
# What artefacts read of a run folder.
FILES = (HISTORY, "ranks.json", "spectra.safetensors", "answers-*.jsonl", "probe-*.json")


@dataclass
class Logger:
    """The W&B side of a run. `history.jsonl` in the run folder is written whatever is chosen here."""

    name: str

    def prepare(self) -> None:
        """Refuse what cannot be logged to, before there is anything to log."""

    @contextmanager
    def open(
        self, folder: Path, record: Record, group: str | None, tags: list[str]
    ) -> "Iterator[list[LightningLogger]]":
        """The loggers beside the history. A resumed run goes on under the fingerprint of its record."""
        yield []


@dataclass
class Wandb(Logger):
    """W&B. `offline=true` sends nothing, asks nothing and never waits; `wandb sync` uploads the folder later."""

    project: str
    entity: str | None
    offline: bool

    def prepare(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # before the import: its start-up lines would break the bars
        if self.offline:
            return
        import wandb

        if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise Refused(
                "logger=wandb sends to W&B and there is no key. Run `wandb login` or set WANDB_API_KEY; "
                "or write logger=offline and `wandb sync` the run folder later."
            )

    @contextmanager
    def open(
        self, folder: Path, record: Record, group: str | None, tags: list[str]
    ) -> "Iterator[list[LightningLogger]]":
        self.prepare()
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        logger = WandbLogger(
            save_dir=str(folder),
            project=self.project,
            entity=self.entity,
            offline=self.offline,
            id=record.fingerprint,
            resume=None if self.offline else "allow",
            name=f"{'/'.join(tags)}-{record.fingerprint}",
            group=group,
            tags=tags,
            config=record.config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        logger.experiment  # noqa: B018, it is W&B's run, which begins when it is first asked for: now
        try:
            yield [logger]
        finally:  # the next run of a sweep is another W&B run
            raised = sys.exc_info()[1]
            error = None if record.status == "done" else raised  # what comes after its end takes nothing back
            # What stops a run may have stopped the process of W&B too, and must not be hidden by what that raises.
            with nullcontext() if raised is None else suppress(Exception):
                _conclude(logger.experiment, folder, record, error)
                logger.experiment.finish(exit_code=0 if error is None else 1)


def _conclude(run: Any, folder: Path, record: Record, error: BaseException | None) -> None:
    """What it takes to make the record again of the W&B run, whose config and history hold the rest."""
    text = {key: value for key, value in record.metrics.items() if isinstance(value, str)}
    about = {key: getattr(record, key) for key in ABOUT}
    so_far = max(0.0, time.time() - datetime.fromisoformat(record.started).timestamp())
    about["seconds"] = record.seconds if record.status == "done" else so_far
    # A metric without a value is not logged.
    about["empty"] = [key for key, value in record.metrics.items() if value is None]
    about |= {"status": "done", "error": None} if error is None else {"status": "failed", "error": told(error)}
    run.summary.update(text | {RECORD: about})
    for file in [path for pattern in FILES for path in sorted(folder.glob(pattern))]:
        run.save(str(file), base_path=str(folder), policy="now")


def told(error: BaseException) -> str:
    """The first line of what a record says of an error."""
    return f"{type(error).__name__}: {error}"
