"""Modes compared fairly: each at the learning rate of a grid that is best on validation text, then on more seeds.

A study is one way to tune one model. Its grid runs on the first seed, and is widened where the best rate is the last
on its side; the other seeds run at the rate that won. Both are cells only once the grid is done (`then`). Tokens and
precision are those of the setting, for all alike.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.cells import Cell, Row
from experiments.compare import below
from experiments.scales import VOCABULARY
from welore import metrics
from welore.config import CONF, compose
from welore.records import HISTORY, read_history

NEEDS = (HISTORY,)
FACTORS = (0.25, 1.0, 4.0)  # of the learning rate that a mode has by default
WIDEST = 5  # rates of a grid that was widened
SEEDS = {"laptop": [0, 1, 2], "paper": [0]}
# Of Student's t with 1, 2, 3, ... degrees of freedom: what it exceeds with a probability of 5 and of 2.5 %.
T_QUANTILES = (6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331)
T_TAILS = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
SO_FAR = (
    "seeds: `1 of 3` where the others are still to come; no claim and no flag is decided by a study that lacks seeds"
)
SURELY = "by a paired t test over seeds, p < 0.05"

Key = str


def grid(cell: Cell, factors: Sequence[float] = FACTORS) -> list[Cell]:
    """The cell at each learning rate, on the first seed."""
    default = default_rate(cell["mode"], cell["task/training"])
    return [cell | {"mode.lr": float(f"{default * factor:.6g}"), "seed": 0} for factor in factors]


@cache
def default_rate(mode: str, training: str) -> float:
    """That of a composed run. Composing takes a fifth of a second, so that it is done once for all modes."""
    return float(OmegaConf.create({"task": task_of(training), "lr": _written_rate(mode)}).lr)


def _written_rate(mode: str) -> Any:
    """Of its file, or of the one that it starts from."""
    written = OmegaConf.to_container(OmegaConf.load(CONF / "mode" / f"{mode}.yaml"))
    return written["lr"] if "lr" in written else _written_rate(written["defaults"][0])


@cache
def task_of(training: str) -> DictConfig:
    """The composed task with a training preset."""
    return compose([f"task/training={training}"]).task


def then(scale: str, rows: Sequence[Row]) -> list[Cell]:
    """The next rate of every study that is best at an edge of its grid, and the other seeds of those that are not."""
    edges = [study.cell | {"mode.lr": study.beyond, "seed": 0} for study in studies(rows) if study.beyond is not None]
    return edges + other_seeds(scale, wide_enough(rows))


def other_seeds(scale: str, rows: Sequence[Row]) -> list[Cell]:
    """Those of every study whose grid is done, at its best learning rate."""
    return [cell for cell in carried(scale, rows, [{}]) if cell["seed"] != 0]


def wide_enough(rows: Sequence[Row]) -> list[Row]:
    """Those of studies that `then` gives no other rate."""
    return [row for study in studies(rows) if study.beyond is None for row in study.rows]


def carried(scale: str, rows: Sequence[Row], changes: Sequence[Cell]) -> list[Cell]:
    """Every seed of every study whose grid is done with each of the changes, at the rate that won without them."""
    chosen = [study for study in studies(rows) if study.chosen is not None]
    return [
        study.cell | change | {"mode.lr": study.chosen, "seed": seed}
        for study in chosen
        for change in changes
        for seed in SEEDS[scale]
    ]


def studies(rows: Sequence[Row]) -> "list[Study]":
    """In the order of their first rows."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(_base(row.cell), sort_keys=True), []).append(row)
    return [Study(_base(members[0].cell), tuple(members)) for members in found.values()]


def _base(cell: Cell) -> Cell:
    return {key: value for key, value in cell.items() if key not in ("mode.lr", "seed")}


@dataclass(frozen=True)
class Study:
    """The runs that differ in learning rate and seed alone."""

    cell: Cell
    rows: tuple[Row, ...]

    @property
    def grid(self) -> dict[float, Row]:
        return {row.cell["mode.lr"]: row for row in self.rows if row.cell["seed"] == 0}

    @property
    def chosen(self) -> float | None:
        """The rate with the lowest validation perplexity; None while the grid is not done, or where all diverged."""
        if any(row.missing for row in self.grid.values()):
            return None
        scores = {lr: validation(row) for lr, row in self.grid.items()}
        best = min(scores, key=scores.get)
        return best if scores[best] < math.inf else None

    @property
    def edge(self) -> str:
        """Whether the best rate is the last that was tried on its side, so that a better one may lie beyond."""
        rates = sorted(self.grid)
        if self.chosen is None or len(rates) < 2:
            return "—"
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.chosen, "no")

    @property
    def beyond(self) -> float | None:
        """The next rate on the side where the best one is the last, or below the lowest where all diverged; None where
        there is none to try, or one of the grid is missing."""
        rates = sorted(self.grid)
        if len(rates) < 2 or len(rates) >= WIDEST or any(row.missing for row in self.grid.values()):
            return None
        if self.chosen is not None and self.edge == "no":
            return None
        last, before = rates[:-3:-1] if self.edge == "highest" else rates[:2]
        return float(f"{last**2 / before:.6g}")

    @property
    def missing(self) -> bool:
        """Nothing can be said: the grid or one of the seeds that follow from it is not done."""
        return any(row.missing for row in self.rows)

    @property
    def runs(self) -> list[Row]:
        """One a seed, at the chosen rate; those of the grid where every rate diverged."""
        if self.missing:
            return []
        return [row for row in self.rows if self.chosen in (None, row.cell["mode.lr"])]

    @property
    def so_far(self) -> "Study":
        """The same without the seeds that are missing, once the grid is done: to be shown, and for no claim."""
        return self if self.chosen is None else Study(self.cell, tuple(row for row in self.rows if not row.missing))

    @property
    def seeds(self) -> str:
        """How many are done, and of how many where some are missing."""
        done, missing = len(self.so_far.runs), sum(row.missing for row in self.rows)
        return f"{done} of {done + missing}" if missing else str(done)

    @property
    def first(self) -> Row | None:
        """The run that stands for what does not depend on the seed; the compressed model is the same in all."""
        return next((row for row in [*self.runs, *self.rows] if row.record), None)

    @property
    def by_seed(self) -> dict[int, float]:
        return {row.cell["seed"]: _perplexity(row) for row in self.runs}

    @property
    def perplexity(self) -> float | None:
        """The mean over seeds; NaN where one breaks or diverged, None where one is missing."""
        return mean(_perplexity(row) for row in self.runs) if self.runs else None

    @property
    def error(self) -> float | None:
        """Of the mean, from the spread of the seeds; None for a single one."""
        found = [_perplexity(row) for row in self.runs]
        return standard_error(found) if len(found) > 1 and all(map(math.isfinite, found)) else None

    @property
    def untuned(self) -> float | None:
        """Perplexity of the same model before training; NaN where it breaks."""
        if self.first is None:
            return None
        found = self.first.found(metrics.COMPRESSED_PERPLEXITY)
        return math.nan if found is None else found

    @property
    def flag(self) -> str:
        """`did not train` and why, where a seed shows no more than a model that was left alone, or than chance."""
        if not self.runs:
            return ""
        reasons = [reason for row in self.runs if (reason := self._failing(row))]
        if not reasons:
            return ""
        share = "" if len(reasons) == len(self.runs) else f", {len(reasons)} of {len(self.runs)} seeds"
        return f"did not train: {', '.join(dict.fromkeys(reasons))}{share}"

    def _failing(self, row: Row) -> str | None:
        if row.diverged:
            return "diverged"
        if math.isnan(_perplexity(row)):
            return "perplexity too large for a number" if row.breaks_at is None else f"breaks in {row.breaks_at}"
        if row.perplexity >= VOCABULARY.get(self.cell["model"], math.inf):
            return "at chance"
        if row.guess is not None and row.perplexity >= row.guess:
            return "no better than token frequencies"
        return "no better than untuned" if row.perplexity >= self.untuned else None


def _perplexity(row: Row) -> float:
    """NaN where it is too large for a number, too."""
    return math.nan if row.perplexity is None else row.perplexity


def validation(row: Row) -> float:
    """The last validation perplexity of a run, at the same step for all of a study; infinite where it is no number."""
    curve = [] if row.diverged else validation_curve(row.folder)
    last = curve[-1][1] if curve else math.inf
    return last if math.isfinite(last) else math.inf


def validation_curve(folder: Path) -> list[tuple[float, float]]:
    """Perplexity on validation text by optimizer steps done."""
    return curve(folder, metrics.VALIDATION_PERPLEXITY.key)


def curve(folder: Path, key: str) -> list[tuple[float, float]]:
    """A logged number by optimizer steps done; the file is read once for as long as it stays as it is."""
    file = folder / HISTORY
    if not file.exists():
        return []
    state = file.stat()
    return _curves(folder, state.st_mtime_ns, state.st_size).get(key, [])


@cache
def _curves(folder: Path, *state: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for line in read_history(folder):
        for key, value in line.items():
            if value is not None:
                found.setdefault(key, []).append((line["step"] + 1, value))
    return found


def better(one: Study | None, other: Study | None) -> bool | None:
    """Whether one mean lies below the other; None where the lower one did not train: of who fails less, nothing can be
    said."""
    if one is None or other is None or _none_trained(one, other):
        return None
    return below(one.perplexity, other.perplexity)


def _none_trained(one: Study, other: Study) -> bool:
    if None in (one.perplexity, other.perplexity):
        return False
    return bool((one if below(one.perplexity, other.perplexity) else other).flag)


def surely_below(low: Study | None, high: Study | None) -> bool | None:
    """Whether one mean lies below the other by a paired t test over seeds, one-sided at 5 %; None on one seed.

    Studies run on the same seeds, which order the batches of both alike: what a seed does to both is no difference. A
    study that broke or diverged lies above one that did not; None too where the better one did not train.
    """
    if low is None or high is None or None in (low.perplexity, high.perplexity) or _none_trained(low, high):
        return None
    if math.isnan(low.perplexity):
        return False
    if math.isnan(high.perplexity):
        return None  # it is the worse one, but no test says so
    ours, theirs = low.by_seed, high.by_seed
    return surely_positive([theirs[seed] - ours[seed] for seed in ours if seed in theirs])


def surely_positive(differences: Sequence[float]) -> bool | None:
    """By a t test, one-sided at 5 %; None of fewer than two."""
    if len(differences) < 2:
        return None
    return mean(differences) > t_quantile(len(differences) - 1) * standard_error(differences)


def standard_error(numbers: Sequence[float]) -> float:
    """The standard error of the mean of two numbers or more."""
    return stdev(numbers) / math.sqrt(len(numbers))


def t_quantile(freedom: int, quantiles: Sequence[float] = T_QUANTILES) -> float:
    """What Student's t of so many degrees of freedom exceeds with the probability of the table, which is 5 %."""
    if not 1 <= freedom <= len(quantiles):
        raise ValueError(f"{freedom} degrees of freedom are not in the table, which ends at {len(quantiles)}")
    return quantiles[freedom - 1]
