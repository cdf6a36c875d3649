"""Tables of perplexity by model, err and method, ours beside the paper's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from experiments.cells import Cell, Row
from experiments.compare import BUDGET, below, dense, entry, least, measured, ratio
from experiments.page import Claim, Outcomes, Page
from welore.report import number

ERRS = [0.1, 0.2, 0.3, 0.4, 0.5]
NAN = math.nan

Numbers = dict[tuple[str, float, str], float]  # perplexity by model, err and column; NaN where the model breaks


@dataclass(frozen=True)
class Published:
    """What the paper prints for one model: the dense perplexity, if any, and a column of them a method, by ERRS."""

    title: str
    dense: float | None
    columns: dict[str, list[float]]


@dataclass(frozen=True)
class Grid:
    """The options of every column, and the paper's numbers by model.

    Beside a model that the paper does not have stand its numbers for the first.
    """

    columns: dict[str, Cell]
    paper: dict[str, Published]

    def cells(self, models: Sequence[str], setting: Cell) -> list[Cell]:
        options = self.columns.values()
        return [{"model": m, **column, "err": err, **setting} for m, err, column in product(models, ERRS, options)]

    def page(self, rows: Sequence[Row], notes: Sequence[str], claims: Callable[..., list[Claim]]) -> Page:
        """`claims` makes them of the models and of our numbers."""
        models = list(dict.fromkeys(row.cell["model"] for row in rows))
        found = dict(zip(product(models, ERRS, self.columns), rows, strict=True))
        header = ["model", "dense", "paper", "err"]
        for column in self.columns:
            header += [column, "paper"] if self._printed(models[0], column) else [column]
        body = [self._line(model, err, found) for model in models for err in ERRS]
        beside = [f"{model}: beside it the paper's {self._published(model).title}" for model in models]
        meaning = f"perplexity {BUDGET}; NaN (layer): the loss stops being finite in that layer"
        numbers = {place: row.perplexity for place, row in found.items() if not row.missing}
        return Page(header, body, [meaning, *notes, *beside, *measured(rows)], claims(models, numbers))

    def _line(self, model: str, err: float, found: dict[tuple[str, float, str], Row]) -> list[str]:
        rows = {column: found[model, err, column] for column in self.columns}
        line = [model, dense(list(rows.values())), number(self._published(model).dense, 2), f"{err:g}"]
        for column, row in rows.items():
            printed = self._printed(model, column)
            line += [entry(row), _written(printed[ERRS.index(err)])] if printed else [entry(row)]
        return line

    def _published(self, model: str) -> Published:
        return self.paper.get(model) or next(iter(self.paper.values()))

    def _printed(self, model: str, column: str) -> list[float] | None:
        return self._published(model).columns.get(column)

    def paper_numbers(self) -> Numbers:
        return {
            (model, err, column): perplexity
            for model, published in self.paper.items()
            for column, perplexities in published.columns.items()
            for err, perplexity in zip(ERRS, perplexities, strict=True)
        }

    def claim(
        self, text: str, models: Sequence[str], ours: Numbers, outcomes: Callable[..., Outcomes], *arguments
    ) -> Claim:
        """The same comparison on the paper's numbers, where it prints any for these columns, and on ours."""
        printed = {column for published in self.paper.values() for column in published.columns}
        named = {name for a in arguments for name in ([a] if isinstance(a, str) else a)}
        paper = outcomes(self.paper_numbers(), list(self.paper), *arguments) if named <= printed else None
        return Claim(text, paper, outcomes(ours, models, *arguments))


def _written(perplexity: float) -> str:
    return "NaN" if math.isnan(perplexity) else number(perplexity, 2)


def better(numbers: Numbers, models: Sequence[str], column: str, other: str) -> Outcomes:
    """Whether `column` has the lower perplexity."""
    return best(numbers, models, column, [other])


def best(numbers: Numbers, models: Sequence[str], column: str, others: Sequence[str]) -> Outcomes:
    """Whether `column` has a lower perplexity than each of the others."""
    return {
        f"{model} {err:g}": least(numbers.get((model, err, column)), [numbers.get((model, err, o)) for o in others])
        for model in models
        for err in ERRS
    }


def grows(numbers: Numbers, models: Sequence[str], before: str, after: str) -> Outcomes:
    """Whether the ratio of perplexities, before to after, is larger than at the err below. With NaN there is none."""
    outcomes = {}
    for model in models:
        ratios = [ratio(numbers.get((model, err, before)), numbers.get((model, err, after))) for err in ERRS]
        for err, low, high in zip(ERRS[1:], ratios, ratios[1:], strict=False):
            outcomes[f"{model} {err:g}"] = below(low, high)
    return outcomes


def worsens(numbers: Numbers, models: Sequence[str], columns: Sequence[str]) -> Outcomes:
    """Whether the perplexity is higher than at the err below; after NaN there is nothing worse to come."""
    outcomes = {}
    for model, column in product(models, columns):
        line = [numbers.get((model, err, column)) for err in ERRS]
        for err, low, high in zip(ERRS[1:], line, line[1:], strict=False):
            both = None if low is None or high is None else math.isnan(low) and math.isnan(high)
            outcomes[f"{model} {column} {err:g}"] = both or below(low, high)
    return outcomes
