"""Where the curves of a run go: W&B online, W&B on disk to be synced later, or nowhere but the run folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.errors import Refused

if TYPE_CHECKING:  # importing Lightning takes seconds, and a refused config should not
    from lightning.pytorch.loggers import Logger as LightningLogger


@dataclass
class Logger:
    """The W&B side of a run. `history.jsonl` in the run folder is written whatever is chosen here."""

    name: str

    @contextmanager
    def open(
        self, folder: Path, run: str, group: str | None, tags: list[str], config: dict[str, Any]
    ) -> "Iterator[list[LightningLogger]]":
        """The loggers beside the history; `run` is the fingerprint, so that a resumed run goes on under its name."""
        yield []


@dataclass
class Wandb(Logger):
    """W&B. `offline=true` sends nothing, asks nothing and never waits; `wandb sync` uploads the folder later."""

    project: str
    entity: str | None
    offline: bool

    @contextmanager
    def open(
        self, folder: Path, run: str, group: str | None, tags: list[str], config: dict[str, Any]
    ) -> "Iterator[list[LightningLogger]]":
        os.environ.setdefault("WANDB_SILENT", "true")  # before the import: its start-up lines would break the bars
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        if not self.offline and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise Refused(
                "logger=wandb sends to W&B and there is no key. Run `wandb login` or set WANDB_API_KEY; "
                "or write logger=offline and `wandb sync` the run folder later."
            )
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        logger = WandbLogger(
            save_dir=str(folder),
            project=self.project,
            entity=self.entity,
            offline=self.offline,
            id=run,
            resume=None if self.offline else "allow",
            name="/".join(tags),
            group=group,
            tags=tags,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        try:
            yield [logger]
        finally:  # the next run of a sweep is another W&B run
            logger.experiment.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
