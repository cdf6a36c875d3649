"""The cells of an artefact: the runs it is made of, which of them are on disk, and how the others are made."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from welore import metrics
from welore.config import CONF, INFRASTRUCTURE, compose, fingerprint, to_config
from welore.errors import Refused
from welore.finished import composed
from welore.metrics import Metric
from welore.records import Record, Sweep, records, sweeps

Cell = dict[str, Any]  # Hydra overrides
DIVERGED = "FloatingPointError: the loss of step"  # how a record says that training met a loss that is not finite


@dataclass(frozen=True)
class Row:
    """A cell and the run that fills it. Where `record` is None, `why` says what is missing."""

    cell: Cell
    folder: Path | None = None
    record: Record | None = None
    why: str | None = None
    again: bool = False  # a record is there without the files that the artefact draws
    offered: bool = False  # the artefact is whole without it
    diverged: bool = False  # training came to a loss that is not finite: an outcome, which another run would repeat
    guess: float | None = None  # perplexity by token frequencies of its training text, by any record of these texts

    @property
    def missing(self) -> bool:
        return self.record is None and not self.diverged

    @property
    def stage(self) -> str:
        return "compressed" if self.cell["mode"] == "none" else "tuned"

    @property
    def breaks_at(self) -> str | None:
        """The layer where the loss stops being finite, in a model whose perplexity is NaN."""
        return self.record.metrics.get(f"{self.stage}/{metrics.BREAKS_AT}")

    @property
    def perplexity(self) -> float:
        """Of the compressed or the tuned model, whichever the cell is about; NaN where it breaks or diverged."""
        if self.diverged:
            return math.nan
        metric = metrics.COMPRESSED_PERPLEXITY if self.stage == "compressed" else metrics.TUNED_PERPLEXITY
        return math.nan if self.breaks_at is not None else self.number(metric)

    def number(self, metric: Metric) -> float:
        return self.record.metrics[metric.key]

    def found(self, metric: Metric) -> Any:
        """A number that not every record has."""
        return self.record.metrics.get(metric.key)

    def asked(self, name: str, outputs: str) -> Cell:
        """The cell with all that it takes to run it for the artefact `name`."""
        where = {} if outputs == default_outputs() else {"outputs": outputs}
        # A probe is added to a finished run, which need not be made again for it.
        force = {"force": True} if self.again and "probe" not in self.cell else {}
        return self.cell | {"save": False, "group": name} | force | where

    def command(self, name: str, outputs: str) -> str:
        return shlex.join(["python", "run.py", *overrides_of(self.asked(name, outputs))])


@cache
def default_outputs() -> str:
    return compose([]).outputs


@cache
def _fingerprint_of(*overrides: str) -> str:
    return fingerprint(to_config(composed(overrides)))


def fingerprint_of(cell: Cell) -> str:
    """That of `python run.py` with these overrides."""
    return _fingerprint_of(*overrides_of(cell))


def overrides_of(cell: Cell) -> list[str]:
    """The arguments of `python run.py` for this cell alone."""
    return Sweep({key: [value] for key, value in cell.items()}).overrides()


@dataclass(frozen=True)
class Runs:
    """The run of each fingerprint with its folder, and how the fingerprint of a cell is found."""

    latest: dict[str, tuple[Path, Record]]
    name: Callable[[Cell], str]
    fetch: Callable[[Path, str], None]  # brings a file of a run into its folder, where it is elsewhere
    guesses: dict[str, float]  # perplexity by token frequencies, by texts: older records do not hold their own

    @classmethod
    def of(
        cls,
        found: Iterable[tuple[Path, Record]],
        name: Callable[[Cell], str] = fingerprint_of,
        fetch: Callable[[Path, str], None] = lambda folder, file: None,
    ) -> "Runs":
        """Of several runs of one fingerprint the last that is finished, or else the first."""
        latest: dict[str, tuple[Path, Record]] = {}
        guesses: dict[str, float] = {}
        for folder, record in found:
            if (guess := record.metrics.get(metrics.EVAL_FREQUENCY_PERPLEXITY.key)) is not None:
                guesses[_texts(record)] = guess
            if record.status == "done" or record.fingerprint not in latest:
                latest[record.fingerprint] = folder, record
        return cls(latest, name, fetch, guesses)

    def find(self, cells: Sequence[Cell], needs: Sequence[str] = ()) -> list[Row]:
        """Each cell with its run: the finished record of its fingerprint, in a folder that holds the files `needs`."""
        return [self._row(cell, needs) for cell in cells]

    def _row(self, cell: Cell, needs: Sequence[str]) -> Row:
        folder, record = self.latest.get(self.name(cell), (None, None)) if self.latest else (None, None)
        if record is None:
            return Row(cell, why="never run")
        if record.status != "done":
            why = (record.error or "no reason given").splitlines()[0]
            return Row(cell, folder, why=f"failed: {why}", diverged=why.startswith(DIVERGED))
        for file in needs:
            if not (folder / file).exists():
                self.fetch(folder, file)
        absent = [file for file in needs if not (folder / file).exists()]
        if absent:
            return Row(cell, folder, why=f"its run folder has no {' and no '.join(absent)}", again=True)
        return Row(cell, folder, record, guess=self.guesses.get(_texts(record)) if self.guesses else None)


def _texts(record: Record) -> str:
    """Tokenizer, test text, training text and its order: what the frequencies of tokens and their score depend on.

    A path stands for what lies there.
    """
    task, training = record.config["task"], record.config["task"].get("training", {})
    read = {key: value for key, value in task.items() if key != "training"}
    read["path"] = os.path.expandvars(task.get("path") or "")  # published records name $WELORE_DATA
    sequences = {key: training.get(key) for key in ("length", "pack")}
    return json.dumps([_set(record.config["model"]), _set(read), sequences, record.config["seed"]], sort_keys=True)


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """Without what is off: records of before an option was there do not name it."""
    nested = {key: _set(value) if isinstance(value, dict) else value for key, value in options.items()}
    return {key: value for key, value in nested.items() if value is not None and value is not False}


def find(cells: Sequence[Cell], outputs: str, needs: Sequence[str] = ()) -> list[Row]:
    """Each cell with its run in a folder of outputs."""
    return Runs.of(records(Path(outputs))).find(cells, needs)


def check_infrastructure(overrides: Sequence[str]) -> None:
    """Refuse what would make other runs than the cells: they would stay missing."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition("/")[0].partition(".")[0].partition("@")[0] not in ("hydra", *INFRASTRUCTURE):
            raise Refused(
                f"{override} would change what the cells of an artefact measure. Only how they run is free here: "
                f"hydra/launcher, {', '.join(INFRASTRUCTURE)}. To run another combination: python run.py {override}"
            )


def launch(rows: Sequence[Row], name: str, outputs: str, overrides: Sequence[str]) -> None:
    """Run the missing cells: one multirun where they form a product, else as few as are easily found.

    A cell that fails does not stop the others; it is still missing afterwards, and the artefact says why. On this
    machine one multirun follows the other; those that only submit jobs and wait for them are started together.
    """
    commands = []
    for sweep in sweeps([row.asked(name, outputs) for row in rows if row.missing]):
        commands.append([sys.executable, str(CONF.parent / "run.py"), "-m", *sweep.overrides(), *overrides])
        print(f"· {len(sweep.cells())} cells: {shlex.join(commands[-1])}", file=sys.stderr, flush=True)
    together = max(1, len(commands)) if "hydra/launcher=slurm" in overrides else 1
    with ThreadPoolExecutor(together) as multiruns:
        list(multiruns.map(lambda command: subprocess.run(command, check=False), commands))
