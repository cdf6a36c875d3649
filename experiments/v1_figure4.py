"""Figure 4 of the first version: normalized singular values of every compressible weight of a pretrained model.

Cost: laptop 1 run, about a minute on 2 CPU cores; paper 1 run, never measured. The run and the picture of Figure 3.
"""

from collections.abc import Sequence

from experiments import figure3, spectra
from experiments.cells import Cell, Row
from experiments.page import Claim, Outcomes, Page
from experiments.spectra import Cut, mean, read_cut
from welore.plots import by_component

NEEDS = spectra.FILES
HEAVY, LIGHT = ("q_proj", "k_proj", "gate_proj"), ("v_proj", "down_proj")


def cells(scale: str) -> list[Cell]:
    return figure3.cells(scale)


def render(rows: Sequence[Row]) -> Page:
    page, cut = figure3.render(rows), read_cut(rows[0]) if rows[0].record else None
    page.claims = [
        Claim("q, k and gate have a heavier tail than v and down (Section 3)", None, heavier(cut)),
        Claim(
            "in most components the first and last quarter of the layers have heavier tails than the middle half "
            "(Section 3; claim C2)",
            None,
            heavier_ends(cut),
        ),
    ]
    return page


def heavier(cut: Cut | None) -> Outcomes:
    shares = {} if cut is None else {c: mean(list(v.values())) for c, v in by_component(cut.above).items()}
    return {
        f"{heavy} and {light}": shares[heavy] < shares[light] if shares else None
        for heavy in HEAVY
        for light in LIGHT
        if not shares or {heavy, light} <= shares.keys()
    }


def heavier_ends(cut: Cut | None) -> Outcomes:
    if cut is None:
        return {"the run": None}
    wins = []
    for panel in by_component(cut.above).values():
        shares = [panel[layer] for layer in sorted(panel)]
        quarter = max(1, len(shares) // 4)
        if middle := shares[quarter:-quarter]:
            wins.append(mean(shares[:quarter] + shares[-quarter:]) < mean(middle))
    if not wins:
        return {"a layer between the first and the last": None}
    return {f"so in {sum(wins)} of {len(wins)} components": 2 * sum(wins) > len(wins)}
