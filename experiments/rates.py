"""Rates: whether the text that chooses a learning rate is enough of it.

Cost: laptop the runs of every_mode, recover and who_learns, and 20 and more that follow; paper never measured.

A rate is chosen by the validation perplexity at the end of training, on few windows at laptop scale. Where the test
text would have chosen another one, the two and what lies between them run again with eight times the windows, which
train the same model, and are offered on the other seeds at what these choose. Nothing else is chosen by the test text,
and no other artefact uses these rates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments import every_mode, recover, tuning, who_learns
from experiments.cells import Cell, Row
from experiments.compare import budget, dense, measured
from experiments.page import Claim, Page, cited
from experiments.tuning import SEEDS, SURELY, Study, better, studies, surely_below, validation
from welore.plots import lines_figure
from welore.report import number

NEEDS = tuning.NEEDS
TIMES = 8  # the windows of the training preset
WINDOWS = "task.training.validation_windows"
ONCE = {"task.training.validate_every": 100_000}  # steps: at the end alone


def cells(scale: str) -> list[Cell]:
    return every_mode.cells(scale) + recover.cells(scale) + who_learns.cells(scale)


def offered(scale: str, cell: Cell) -> bool:
    """The seeds: who chooses which rate is known without them."""
    return cell["seed"] != 0


def then(scale: str, rows: Sequence[Row]) -> list[Cell]:
    """Wider grids, the disputed rates on more text, and the seeds of what these choose."""
    grids = compared(rows)
    again = [
        grid.few.cell | _more_text(grid.few.cell) | {"mode.lr": rate, "seed": 0}
        for grid in grids
        for rate in grid.disputed
    ]
    seeds = [
        grid.few.cell | {"mode.lr": grid.more.chosen, "seed": seed}
        for grid in grids
        if grid.more is not None and grid.more.chosen is not None
        for seed in SEEDS[scale]
    ]
    return tuning.then(scale, [row for row in rows if WINDOWS not in row.cell]) + again + seeds


def _more_text(cell: Cell) -> Cell:
    return {WINDOWS: TIMES * _preset_windows(cell)} | ONCE


def _preset_windows(cell: Cell) -> int:
    return tuning.task_of(cell["task/training"]).training.validation_windows


@dataclass(frozen=True)
class Grid:
    """A study as every artefact chooses its rate, and the same with more validation text where that was asked for."""

    few: Study
    more: Study | None

    @property
    def place(self) -> str:
        cell = self.few.cell
        return recover.cut(cell) or who_learns.place(cell) or cell["mode"]

    @property
    def preferred(self) -> float | None:
        """The rate with the lowest perplexity on test text, on seed 0; None while the grid is not done, or where no
        rate has one."""
        if any(row.missing for row in self.few.grid.values()):
            return None
        best = min(self.few.grid, key=self.tested)
        return best if self.tested(best) < math.inf else None

    def tested(self, rate: float) -> float:
        """Test perplexity of seed 0; infinite where it is no number."""
        found = self.few.grid[rate].perplexity
        return found if found is not None and math.isfinite(found) else math.inf

    @property
    def disputed(self) -> list[float]:
        """The chosen rate, the one that the test text prefers, and those between; none where they are one, or the grid
        is not wide enough."""
        if None in (self.few.chosen, self.preferred) or self.few.beyond is not None:
            return []
        if self.few.chosen == self.preferred:
            return []
        low, high = sorted([self.few.chosen, self.preferred])
        return [rate for rate in sorted(self.few.grid) if low <= rate <= high]

    def over_seeds(self, rate: float) -> Study:
        """The runs at one rate."""
        return Study(self.few.cell, tuple(row for row in self.few.rows if row.cell["mode.lr"] == rate))


def compared(rows: Sequence[Row]) -> list[Grid]:
    """Every study of the rows, beside the one of the same cell with more validation text."""
    more = {_key(study.cell): study for study in studies([row for row in rows if WINDOWS in row.cell])}
    few = studies([row for row in rows if WINDOWS not in row.cell])
    return [Grid(study, more.get(_key(study.cell))) for study in few]


def _key(cell: Cell) -> frozenset:
    return frozenset((key, value) for key, value in cell.items() if key != WINDOWS and key not in ONCE)


def render(rows: Sequence[Row]) -> Page:
    grids = compared(rows)
    few = _preset_windows(rows[0].cell)
    header = ["tuned", "err", "keep", "parameters", "rates tried", "the test text prefers", "perplexity"]
    header += [f"{few} windows choose", "perplexity", "over seeds"]
    header += [f"{TIMES * few} windows choose", "perplexity", "over seeds"]
    notes = [
        "perplexity: on test text, of seed 0; over seeds: mean ± standard error at that rate",
        f"{TIMES * few} windows were asked of the rates from the one that the test text prefers to the one that {few} "
        f"windows choose, where these are two",
        "more windows train the same model: on one device the same numbers, but not on two",
        f"dense perplexity {dense(rows)}",
        *measured(rows),
    ]
    page = Page(header, [_line(grid) for grid in grids], notes, claims(grids, few), {}, "claim")
    if not any(row.missing and not row.offered for row in rows) and (
        drawn := [grid for grid in grids if grid.more is not None]
    ):
        page.figures = {"": _figure(drawn, few)}
    return page


def _line(grid: Grid) -> list[str]:
    tried = ", ".join(f"{rate:g}" for rate in sorted(grid.few.grid))
    first = grid.few.first
    line = [
        grid.place,
        *(["—"] * 3 if first is None else budget(first)),
        tried,
        *_at(grid, grid.preferred)[:2],
        *_at(grid, grid.few.chosen),
    ]
    return line + (["—"] * 3 if grid.more is None else _at(grid, grid.more.chosen))


def _at(grid: Grid, rate: float | None) -> list[str]:
    """A rate, the test perplexity of seed 0 there, and that over seeds."""
    if rate is None:
        return ["missing"] * 3
    study = grid.over_seeds(rate)
    mean = "missing" if study.missing else number(study.perplexity, 2)
    error = "" if study.error is None else f" ± {study.error:,.2f}"
    first = grid.few.grid[rate]
    return [f"{rate:g}", cited(number(first.perplexity, 2), [first]), cited(f"{mean}{error}", study.runs)]


def _figure(grids: Sequence[Grid], few: int):
    panels = {grid.place: _curves(grid, few) for grid in grids}
    title = f"{grids[0].few.cell['model']}: which rate each text prefers"
    return lines_figure(panels, title, "log 10 of the learning rate", "perplexity, relative", "linear")


def _curves(grid: Grid, few: int) -> dict[str, list[tuple[float, float]]]:
    """By disputed rate, each text's perplexity over its own at the rate that few windows chose."""
    read = {
        f"{few} windows of validation text": lambda rate: validation(grid.few.grid[rate]),
        f"{TIMES * few} windows": lambda rate: validation(grid.more.grid[rate]),
        "test text": grid.tested,
    }
    return {
        label: [(math.log10(rate), text(rate) / text(grid.few.chosen)) for rate in grid.disputed]
        for label, text in read.items()
    }


def claims(grids: Sequence[Grid], few: int) -> list[Claim]:
    known = [grid for grid in grids if None not in (grid.few.chosen, grid.preferred)]
    agree = dict.fromkeys((grid.place for grid in grids), None)
    agree |= {grid.place: grid.few.chosen == grid.preferred for grid in known}
    asked = {grid.place: grid for grid in grids if grid.more is not None}
    chosen = {place: grid.more.chosen for place, grid in asked.items()}
    mended = {place: None if rate is None else rate == asked[place].preferred for place, rate in chosen.items()}
    pairs = {
        place: (grid.over_seeds(chosen[place]), grid.over_seeds(grid.few.chosen))
        for place, grid in asked.items()
        if chosen[place] not in (None, grid.few.chosen)
    }
    lower = {place: better(new, old) for place, (new, old) in pairs.items()}
    surely = {place: surely_below(new, old) for place, (new, old) in pairs.items()}
    return [
        Claim(f"{few} windows choose the rate that the test text prefers", None, agree),
        Claim(f"where they do not, {TIMES * few} windows do", None, mended),
        Claim("where these choose another, its mean over seeds is lower", None, lower),
        Claim(f"the same, {SURELY}", None, surely),
    ]
