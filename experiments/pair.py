"""Two modes on the same model at 50 % rank reduction, drawn by step: what Figures 4 and 5 share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments import tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import MODELS, setting
from experiments.tuned import better, lower, sure, training_picture, within
from experiments.tuning import SURELY, Study, studies, validation_curve
from welore.metrics import Metric

# The paper's figures are at 0.5, where plain factors leave the small model no better than a guess.
ERR = {"laptop": 0.3, "paper": 0.5}


@dataclass(frozen=True)
class Ratio:
    """A ratio in the paper's text, of a number of one mode to that of the other, and the bounds that `about` means."""

    text: str
    metric: Metric
    over: str
    under: str
    low: float | None
    high: float | None


def cells(scale: str, modes: dict[str, str]) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "ranks": "welore", "err": ERR[scale]} | setting(scale)
    if scale == "paper":
        shared |= {"task/training": "authors"}
    return [cell for mode in modes.values() for cell in tuning.grid(shared | {"mode": mode})]


def render(rows: Sequence[Row], modes: dict[str, str], ratios: Sequence[Ratio], section: str) -> Page:
    by_mode = {study.cell["mode"]: study for study in studies(rows)}
    found = {label: by_mode[mode] for label, mode in modes.items()}
    lines = [([label, mode], found[label]) for label, mode in modes.items()]
    page = tuned.page(["trained", "mode"], lines, rows, claims(found, ratios, section))
    first = next(iter(found.values()))
    picture = training_picture(found, f"{first.cell['model']}, err {first.cell['err']:g}")
    page.figures = {} if picture is None else {"": picture}
    return page


def claims(found: dict[str, Study], ratios: Sequence[Ratio], section: str) -> list[Claim]:
    one, other = found
    place = " ".join(str(found[one].cell[key]) for key in ("model", "err"))
    seeded = {(place, label): study for label, study in found.items()}
    held_out = {key: _validation(study) for key, study in seeded.items()}
    stated = [
        Claim(f"{one} reaches a lower perplexity than {other} ({section})", None, better(seeded, [place], one, other)),
        *sure(SURELY, seeded, [place], one, other),
        Claim("and a lower validation perplexity", None, lower(held_out, [place], one, other)),
    ]
    for r in ratios:
        low, high = r.low or 0.0, math.inf if r.high is None else r.high
        outcome = within(seeded, r.metric, [place], r.over, r.under, low, high)
        stated.append(Claim(f"{r.text} ({section})", None, outcome))
    return stated


def _validation(study: Study) -> float | None:
    if study.missing:
        return None
    curve = [] if study.chosen is None else validation_curve(study.first.folder)
    return curve[-1][1] if curve else math.nan
