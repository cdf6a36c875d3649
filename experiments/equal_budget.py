"""Equal budgets: damage in nats by the share of parameters kept, for pairs of factors and ranks, on and off domain.

Cost: laptop 120 runs, 50 minutes on one CPU core; paper 132 runs, never measured.

The paper has no such comparison: err counts ranks, at which methods keep different shares of the parameters. Here
every pair keeps the same share. All are calibrated on the same text (C4) and measured on it and on WikiText-2, with
the damage that K-FAC predicts before the cut beside the one measured. ASVD's search is left to the paper's scale: it
takes 1,260 evaluations of the small model.
"""

import math
from collections.abc import Sequence
from itertools import product

from experiments.cells import Cell, Row
from experiments.compare import budget, dense, joined, least, measured, perplexity
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, calibrated_on, setting, texts
from welore import metrics
from welore.plots import diagonal_figure, lines_figure
from welore.report import number

NEEDS = ()
KEEPS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
_WELORE = {"ranks": "welore", "ranks.dense": "break_even"}
PAIRS = {
    "plain + uniform": {"svd": "plain", "ranks": "uniform"},
    "plain + welore": {"svd": "plain", **_WELORE},
    "asvd + sensitivity": {"svd": "asvd", "ranks": "sensitivity"},
    "whitened + uniform": {"svd": "whitened", "ranks": "uniform"},
    "whitened + welore": {"svd": "whitened", **_WELORE, "ranks.spectrum": "plain"},
    "whitened + welore, same spectrum": {"svd": "whitened", **_WELORE, "ranks.spectrum": "same"},
    "whitened + relative_energy": {"svd": "whitened", "ranks": "relative_energy"},
    "whitened + lagrange, fisher": {"svd": "whitened", "ranks": "lagrange", "ranks.value": "fisher"},
    "kfac + uniform": {"svd": "kfac", "ranks": "uniform"},
    "kfac + welore, same spectrum": {"svd": "kfac", **_WELORE, "ranks.spectrum": "same"},
    "kfac + lagrange": {"svd": "kfac", "ranks": "lagrange"},
}
BEST = "kfac + lagrange"
TOLERANCE = 0.005  # of keep, within which two pairs count as equal
WITHIN = 0.6, 1.0  # of predicted over measured damage, the goal

Found = dict[tuple[str, float, str], Row]  # by text, keep and pair; without those that are missing


def cells(scale: str) -> list[Cell]:
    known = texts(scale)
    calibration = calibrated_on(scale, known[0]) | {"calibration.predict": True}
    model = {"model": MODELS[scale][0], "mode": "none"}
    pairs = [pair for name, pair in PAIRS.items() if scale == "paper" or name != "asvd + sensitivity"]
    return [
        model | pair | {"keep": keep} | setting(scale, text) | calibration
        for text, keep, pair in product(known, KEEPS, pairs)
    ]


def render(rows: Sequence[Row]) -> Page:
    found = {_place(row): row for row in rows if row.record}
    places = list(dict.fromkeys(_place(row)[0] for row in rows)), list(dict.fromkeys(_place(row)[2] for row in rows))
    header = ["text", "keep asked", "factors + ranks", "err", "keep", "parameters", "dense", "perplexity"]
    header += ["predicted nats", "measured nats", "predicted / measured"]
    calibrated = " and ".join(dict.fromkeys(row.cell["calibration"] for row in rows))
    notes = [f"calibrated on {calibrated}; nats are per token, above the dense model", *measured(rows)]
    whole = len(found) == len(rows)
    figures = {"": _against_keep(found, *places), "-predicted": _predicted(found, *places)} if whole else {}
    body = [_line(row) for row in rows]
    return Page(header, body, notes, claims(found, calibrated, *places), figures, "claim")


def _place(row: Row) -> tuple[str, float, str]:
    pair = next(name for name, options in PAIRS.items() if options.items() <= row.cell.items())
    return row.cell["task"], row.cell["keep"], pair


def _line(row: Row) -> list[str]:
    text, keep, pair = _place(row)
    line = [text, f"{keep:g}", pair]
    if row.record is None:
        return [*line, "—", "—", "—", "—", "missing", "—", "—", "—"]
    damage = [number(row.number(metric), 3) for metric in (metrics.PREDICTED_NATS, metrics.NATS)]
    return [*line, *budget(row), dense([row]), cited(perplexity(row), [row]), *damage, number(_ratio(row), 2)]


def _ratio(row: Row) -> float | None:
    """Predicted over measured damage; None where the model breaks, or has lost nothing."""
    predicted, nats = row.number(metrics.PREDICTED_NATS), row.number(metrics.NATS)
    return None if predicted is None or not nats else predicted / nats


def _against_keep(found: Found, known: Sequence[str], pairs: Sequence[str]):
    panels = {
        f"{text} (dense {dense([found[text, KEEPS[0], pairs[0]]])})": {
            pair: [(keep, _damages(found[text, keep, pair])[1]) for keep in KEEPS] for pair in pairs
        }
        for text in known
    }
    title = f"{_model(found)}: damage at equal budgets"
    return lines_figure(panels, title, "share of parameters kept", "nats per token above dense", "log")


def _predicted(found: Found, known: Sequence[str], pairs: Sequence[str]):
    panels = {text: {pair: [_damages(found[text, keep, pair]) for keep in KEEPS] for pair in pairs} for text in known}
    title = f"{_model(found)}: damage predicted by K-FAC and measured"
    return diagonal_figure(panels, title, "predicted, nats per token", "measured, nats per token")


def _damages(row: Row) -> tuple[float, float]:
    """Predicted and measured; NaN, which is not drawn, where there is no number."""
    found = row.number(metrics.PREDICTED_NATS), row.number(metrics.NATS)
    predicted, nats = (math.nan if value is None else value for value in found)
    return predicted, nats


def _model(found: Found) -> str:
    return next(iter(found.values())).record.config["model"]["name"]


def claims(found: Found, calibrated: str, known: Sequence[str], pairs: Sequence[str]) -> list[Claim]:
    def claim(text: str, *outcomes: Outcomes) -> Claim:
        return Claim(text, None, joined(*outcomes))

    others = [pair for pair in pairs if pair != BEST]
    within = f"{WITHIN[0]:g} to {WITHIN[1]:g} of the measured"
    elsewhere = [text for text in known if text != calibrated]
    found_claims = [
        claim(
            "WeLore ranks beat uniform ones at equal keep with plain factors (implied by the paper)",
            *(better(found, text, "plain + welore", ["plain + uniform"]) for text in known),
        ),
        claim(
            "WeLore ranks beat uniform ones at equal keep with whitened factors (implied by the paper)",
            *(better(found, text, "whitened + welore", ["whitened + uniform"]) for text in known),
        ),
        claim(f"{BEST} is the best at every keep", *(better(found, text, BEST, others) for text in known)),
        claim(f"{BEST}: the predicted damage is {within}", predicts(found, calibrated, [BEST])),
        claim(f"every pair: the predicted damage is {within}", predicts(found, calibrated, pairs)),
    ]
    for text in elsewhere:
        found_claims.append(
            claim(f"{BEST}, off domain: the predicted damage is {within}", predicts(found, text, [BEST]))
        )
    return found_claims


def better(found: Found, text: str, pair: str, others: Sequence[str]) -> Outcomes:
    """Whether a pair has a lower perplexity than each of the others, at every keep that all of them come close to."""
    numbers = {place: row.perplexity for place, row in found.items() if _on_budget(row)}
    return {
        f"{text} {keep:g}": least(
            numbers.get((text, keep, pair)), [numbers.get((text, keep, other)) for other in others]
        )
        for keep in KEEPS
    }


def _on_budget(row: Row) -> bool:
    return abs(row.number(metrics.KEEP) - row.cell["keep"]) <= TOLERANCE


def predicts(found: Found, text: str, pairs: Sequence[str]) -> Outcomes:
    """Whether predicted over measured damage lies within bounds; that of a model that breaks does not."""
    outcomes: Outcomes = {}
    for keep, pair in product(KEEPS, pairs):
        row = found.get((text, keep, pair))
        value = None if row is None else _ratio(row)
        holds = value is not None and WITHIN[0] <= value <= WITHIN[1]
        outcomes[f"{text} {keep:g} {pair}"] = None if row is None else holds
    return outcomes
