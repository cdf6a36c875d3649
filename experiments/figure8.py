"""Figure 8: increase in perplexity when the weights that stayed dense are pruned, by sparsity, pruner and err.

Cost: laptop 52 runs, half an hour on one CPU core; paper 52 runs, never measured.

It is Figure 7 of the paper's first version. The increase counts from the model before pruning: the dense one (err 0,
whose compressible weights are all N-LRCs) or one cut by WeLore. The paper shows a figure without printed numbers, and
none are read off it here; the sparsities are a choice. At laptop scale the factors are whitened, with the ranks of the
plain spectra: plain factors break the small model from err 0.3 on (Table 1), where no increase could be seen.
"""

import math
from collections.abc import Sequence
from itertools import product

from experiments.cells import Cell, Row
from experiments.compare import below, budget, dense, joined, measured, perplexity
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, setting
from welore import metrics
from welore.plots import lines_figure
from welore.report import number

NEEDS = ()
ERRS = [0.0, 0.1, 0.3, 0.5]
PRUNERS = ["magnitude", "wanda", "sparsegpt"]
SPARSITIES = [0.2, 0.4, 0.5, 0.6]
FACTORS = {"laptop": "whitened", "paper": "plain"}

Increases = dict[tuple[float, str, float], float]  # of perplexity, by err, pruner and sparsity


def cells(scale: str) -> list[Cell]:
    model = {"model": MODELS[scale][0], "svd": FACTORS[scale], "ranks": "welore", "mode": "none"}
    prunings = [{"prune": p, "prune.sparsity": s} for p, s in product(PRUNERS, SPARSITIES)]
    options = [{"prune": "none"}, *prunings]
    return [model | {"err": err} | prune | setting(scale) for err, prune in product(ERRS, options)]


def render(rows: Sequence[Row]) -> Page:
    before = {row.cell["err"]: row for row in rows if row.cell["prune"] == "none"}
    pruned = {_place(row): row for row in rows if row.cell["prune"] != "none"}
    header = ["err", "pruner", "sparsity", "err achieved", "keep", "parameters", "zeros", "of the N-LRCs"]
    header += ["dense", "before pruning", "perplexity", "increase"]
    body = [_line(place, row, before[place[0]]) for place, row in pruned.items()]
    ours = {place: _increase(row, before[place[0]]) for place, row in pruned.items()}
    found = {place: increase for place, increase in ours.items() if increase is not None}
    factors = " and ".join(dict.fromkeys(row.cell["svd"] for row in rows))
    notes = [
        f"factors: svd={factors}, ranks of the plain spectra. keep and parameters count the zeros too",
        "the paper shows these increases in a figure and prints no number",
        *measured(rows),
    ]
    whole = all(row.record for row in rows)
    return Page(header, body, notes, claims(found), {"": _figure(found, rows)} if whole else {})


def _place(row: Row) -> tuple[float, str, float]:
    return row.cell["err"], row.cell["prune"], row.cell["prune.sparsity"]


def _increase(row: Row, before: Row) -> float | None:
    """In points of perplexity; NaN where the pruned model breaks."""
    return None if row.record is None or before.record is None else row.perplexity - before.perplexity


def _line(place: tuple[float, str, float], row: Row, before: Row) -> list[str]:
    err, pruner, sparsity = place
    line = [f"{err:g}", pruner, f"{sparsity:g}"]
    start = "missing" if before.record is None else cited(perplexity(before), [before])
    if row.record is None:
        return [*line, *["—"] * 5, dense([row, before]), start, "missing", "—"]
    zeros = [number(row.number(m), 3) for m in (metrics.SPARSITY, metrics.N_LRC_SPARSITY)]
    increase = _increase(row, before)
    written = "—" if increase is None or math.isnan(increase) else f"{increase:+,.2f}"
    return [*line, *budget(row), *zeros, dense([row, before]), start, cited(perplexity(row), [row]), written]


def _figure(increases: Increases, rows: Sequence[Row]):
    panels = {
        pruner: {f"err {err:g}": [(s, increases[err, pruner, s]) for s in SPARSITIES] for err in ERRS}
        for pruner in PRUNERS
    }
    title = f"{rows[0].record.config['model']['name']}: N-LRCs pruned"
    return lines_figure(panels, title, "share of zeros in the N-LRCs", "increase in perplexity", "symlog")


def claims(found: Increases) -> list[Claim]:
    return [
        Claim(
            "at err 0.5 Wanda prunes to some of these sparsities for less than 2 points (B.2, i)",
            None,
            spares(found),
        ),
        Claim(
            "pruning the dense model costs more than pruning the N-LRCs of a compressed one (B.2, ii)",
            None,
            joined(*(costs_more(found, err) for err in ERRS[1:])),
        ),
        Claim("Wanda and SparseGPT cost less than magnitude at every err (B.2, iii)", None, retained(found)),
    ]


def spares(found: Increases, points: float = 2.0) -> Outcomes:
    outcomes = [below(found.get((0.5, "wanda", sparsity)), points) for sparsity in SPARSITIES]
    holds = True if True in outcomes else None if None in outcomes else False
    return {f"a sparsity of {SPARSITIES[0]:g} to {SPARSITIES[-1]:g}": holds}


def costs_more(found: Increases, err: float) -> Outcomes:
    return {
        f"{pruner} {sparsity:g} err {err:g}": below(
            found.get((err, pruner, sparsity)), found.get((0.0, pruner, sparsity))
        )
        for pruner, sparsity in product(PRUNERS, SPARSITIES)
    }


def retained(found: Increases) -> Outcomes:
    return {
        f"{pruner} {sparsity:g} err {err:g}": below(
            found.get((err, pruner, sparsity)), found.get((err, "magnitude", sparsity))
        )
        for err, pruner, sparsity in product(ERRS, PRUNERS[1:], SPARSITIES)
    }
