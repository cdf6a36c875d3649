"""The logged steps of a run, in its folder, whatever else they are sent to."""

import json
from pathlib import Path

from lightning.pytorch.loggers import Logger

from welore.cache import whole
from welore.records import HISTORY, read_history


class History(Logger):
    """One JSON line for each logged step in `history.jsonl`; a resumed run drops what it is about to do again."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / HISTORY

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """The record holds the config."""

    def start_at(self, step: int) -> None:
        """Keep the lines before `step`; 0 starts anew."""
        kept = [line for line in read_history(self.path.parent) if line["step"] < step]
        with whole(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
