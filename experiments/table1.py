"""Table 1: perplexity against effective rank reduction for uniform, OWL and WeLore ranks, and WeLore tuned.

Cost: laptop 15 runs, about 30 minutes on 2 CPU cores; paper 45 runs, never measured, one GPU of 80 GB each.

The tuned column is the gray one of Table 1 in the paper's first version, with the numbers of Table 4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.cells import Cell, Row
from experiments.page import Claim, Outcomes, Page
from experiments.scales import MODELS, setting
from welore import metrics
from welore.report import number

NEEDS = ()
ERRS = [0.1, 0.2, 0.3, 0.4, 0.5]
COLUMNS = {
    "uniform": {"ranks": "uniform", "mode": "none"},
    "OWL": {"ranks": "owl", "mode": "none"},
    "WeLore": {"ranks": "welore", "mode": "none"},
    "WeLore tuned": {"ranks": "welore", "mode": "welore"},
}


@dataclass(frozen=True)
class Published:
    """What the paper prints for one model: the dense perplexity, and a column of perplexities by ERRS."""

    title: str
    dense: float
    columns: dict[str, list[float]]


NAN = math.nan
PAPER = {
    "llama2_7b": Published(
        "LLaMa-2 7B",
        7.03,
        {
            "uniform": [10.58, 16.43, 91.99, NAN, NAN],
            "OWL": [12.11, 14.49, NAN, NAN, NAN],
            "WeLore": [7.13, 8.28, 14.41, 78.17, 1836.62],
            "WeLore tuned": [7.15, 7.40, 8.18, 9.47, 11.87],
        },
    ),
    "llama2_13b": Published(
        "LLaMa-2 13B",
        6.53,
        {
            "uniform": [7.17, 8.61, 13.99, 1178.03, 4167.79],
            "OWL": [7.2, 8.53, 11.63, 56.06, 7984.39],
            "WeLore": [6.55, 6.96, 8.66, 24.92, 1142.53],
            "WeLore tuned": [6.55, 6.68, 7.42, 8.69, 11.40],
        },
    ),
    "mistral_7b": Published(
        "Mistral-7B",
        8.14,
        {
            "uniform": [12.31, 78.69, 6746.48, 162301.04, 248042.97],
            "OWL": [11.63, NAN, NAN, NAN, NAN],
            "WeLore": [8.76, 11.90, 30.69, 429.08, 1351.32],
            "WeLore tuned": [8.32, 8.92, 9.71, 14.85, 21.37],
        },
    ),
}
# Beside a model that the paper does not have stand its numbers for this one.
STAND_IN = "llama2_7b"

Numbers = dict[tuple[str, float, str], float]  # perplexity by model, err and column; NaN where the model breaks


def cells(scale: str) -> list[Cell]:
    return [
        {"model": model, **options, "err": err, **setting(scale)}
        for model in MODELS[scale]
        for err in ERRS
        for options in COLUMNS.values()
    ]


def render(rows: Sequence[Row]) -> Page:
    found = {(row.cell["model"], row.cell["err"], _column(row)): row for row in rows}
    models = list(dict.fromkeys(row.cell["model"] for row in rows))
    header = ["model", "dense", "paper", "err", *(title for column in COLUMNS for title in (column, "paper"))]
    body = [_line(model, err, found) for model in models for err in ERRS]
    notes = [
        "perplexity (err achieved, share of the parameters of the compressible weights kept); NaN (layer): the loss "
        "stops being finite in that layer",
        *(f"{model}: beside it the paper's {_published(model).title}" for model in models),
    ]
    return Page(header, body, [*notes, *_measured(rows)], claims(models, _numbers(found)))


def _line(model: str, err: float, found: dict[tuple[str, float, str], Row]) -> list[str]:
    paper, rows = _published(model), [found[model, err, column] for column in COLUMNS]
    dense = dict.fromkeys(number(row.number(metrics.DENSE_PERPLEXITY), 2) for row in rows if row.record)
    line = [model, " / ".join(dense) or "missing", number(paper.dense, 2), f"{err:g}"]
    for row, published in zip(rows, paper.columns.values(), strict=True):
        line += [_entry(row), _printed(published[ERRS.index(err)])]
    return line


def _entry(row: Row) -> str:
    if row.record is None:
        return row.why if row.planned else "missing"
    budget = f"{row.number(metrics.ERR):.3f}, {row.number(metrics.KEEP):.3f}"
    if row.breaks_at is not None:
        return f"NaN ({row.breaks_at}) ({budget})"
    return f"{number(_perplexity(row), 2)} ({budget})"


def _perplexity(row: Row) -> float:
    metric = metrics.COMPRESSED_PERPLEXITY if row.stage == "compressed" else metrics.TUNED_PERPLEXITY
    return NAN if row.breaks_at is not None else row.number(metric)


def _column(row: Row) -> str:
    return next(name for name, options in COLUMNS.items() if options.items() <= row.cell.items())


def _published(model: str) -> Published:
    return PAPER.get(model, PAPER[STAND_IN])


def _printed(perplexity: float) -> str:
    return "NaN" if math.isnan(perplexity) else number(perplexity, 2)


def _measured(rows: Sequence[Row]) -> list[str]:
    """The protocol and the device behind the numbers, each said once."""
    done = [row.record for row in rows if row.record]
    protocols = dict.fromkeys(f"{r.config['model']['name']} on {r.environment['protocol']}" for r in done)
    devices = dict.fromkeys(str(record.environment["device"]) for record in done)
    return [f"protocol: {line}" for line in protocols] + [f"device: {line}" for line in devices]


def _numbers(found: dict[tuple[str, float, str], Row]) -> Numbers:
    return {key: _perplexity(row) for key, row in found.items() if row.record}


def paper_numbers(models: Sequence[str]) -> Numbers:
    return {
        (model, err, column): perplexity
        for model in models
        for column, perplexities in PAPER[model].columns.items()
        for err, perplexity in zip(ERRS, perplexities, strict=True)
    }


def claims(models: Sequence[str], ours: Numbers) -> list[Claim]:
    paper, every = paper_numbers(list(PAPER)), list(PAPER)

    def claim(text, outcomes, *arguments) -> Claim:
        return Claim(text, outcomes(paper, every, *arguments), outcomes(ours, models, *arguments))

    return [
        claim("WeLore is better than uniform at every err (Section 4.1)", better, "WeLore", "uniform"),
        claim("WeLore is better than OWL at every err (Section 4.1)", better, "WeLore", "OWL"),
        claim("WeLore tuned is better than only compressed at every err (Table 4)", better, "WeLore tuned", "WeLore"),
        claim("the benefit of tuning grows with err (Section 4.2, 1)", grows, "WeLore", "WeLore tuned"),
        claim("without tuning, perplexity rises with err (Section 4.1)", worsens, ["uniform", "WeLore"]),
    ]


def better(numbers: Numbers, models: Sequence[str], column: str, other: str) -> Outcomes:
    """Whether `column` has the lower perplexity. NaN is worse than any number, and not better than another NaN."""
    return {
        f"{model} {err:g}": _less(numbers.get((model, err, column)), numbers.get((model, err, other)))
        for model in models
        for err in ERRS
    }


def grows(numbers: Numbers, models: Sequence[str], before: str, after: str) -> Outcomes:
    """Whether the ratio of perplexities, before to after, is larger than at the err below. With NaN there is none."""
    outcomes = {}
    for model in models:
        ratios = [_ratio(numbers.get((model, err, before)), numbers.get((model, err, after))) for err in ERRS]
        for err, low, high in zip(ERRS[1:], ratios, ratios[1:], strict=False):
            outcomes[f"{model} {err:g}"] = _less(low, high)
    return outcomes


def worsens(numbers: Numbers, models: Sequence[str], columns: Sequence[str]) -> Outcomes:
    """Whether the perplexity is higher than at the err below; after NaN there is nothing worse to come."""
    outcomes = {}
    for model in models:
        for column in columns:
            line = [numbers.get((model, err, column)) for err in ERRS]
            for err, low, high in zip(ERRS[1:], line, line[1:], strict=False):
                both = None if low is None or high is None else math.isnan(low) and math.isnan(high)
                outcomes[f"{model} {column} {err:g}"] = both or _less(low, high)
    return outcomes


def _less(low: float | None, high: float | None) -> bool | None:
    if low is None or high is None:
        return None
    return (math.inf if math.isnan(low) else low) < (math.inf if math.isnan(high) else high)


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or math.isnan(before / after) else before / after
