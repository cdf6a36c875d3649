"""Figure 2 of the first version: cosine of gradients, and their singular values, between checkpoints of pretraining.

Cost: laptop 3 runs of pretraining with their probes, 8 minutes on 2 CPU cores; paper 3 runs, never measured.

Read beside Figure 2 of the final version, which shows subspaces in the place of cosines: both stories hold together
only where subspaces stay while cosines are near 0. The cells are those of figure2 and why_low_rank.
"""

from collections.abc import Sequence
from typing import Any

from experiments import emerged, figure2
from experiments.cells import Cell, Row
from experiments.emerged import HIGH, ORDER, Weight, decided, mean, read, weights
from experiments.figure2 import drawn, lower_by_block, normalized, short
from experiments.page import Claim, Outcomes, Page, cited
from welore.correlation import mean as mean_of
from welore.maps import Map, heat_figure

NEEDS = emerged.FILES


def cells(scale: str) -> list[Cell]:
    return emerged.pretraining(scale)


def render(rows: Sequence[Row]) -> Page:
    header = ["component", "cosine of successive checkpoints", "of two batches", "gradient r_90 at first", "at last"]
    if any(row.missing for row in rows):
        return Page(header, [], [], claims([], []))
    found = [read(row) for row in rows]
    seen = [w for row, one in zip(rows, found, strict=True) for w in weights(one, row.cell["seed"])]
    notes = [
        f"cosines of successive checkpoints are means over the second half, over layers and {len(rows)} seeds; those "
        f"of two batches, the floor of noise, are at the last checkpoint; r_90 is a share of all singular values",
        f"drawn is seed {rows[0].cell['seed']}, checkpoints {', '.join(map(str, found[0]['steps']))}",
        *emerged.cost(rows),
        *emerged.measured(rows),
    ]
    body = [_line(cited(component, rows), seen, found) for component in ORDER]
    return Page(header, body, notes, claims(seen, found), {"": _figure(found[0])})


def _line(component: str, seen: Sequence[Weight], found: Sequence[dict[str, Any]]) -> list[str]:
    return [
        component,
        f"{mean([w.numbers['cosine'] for w in seen if w.component == component]):.3f}",
        f"{mean(emerged.shown(found, component, -1, 'floor', 'cosine')):.3f}",
        f"{mean(emerged.shown(found, component, 0, 'gradient')):.3f}",
        f"{mean(emerged.shown(found, component, -1, 'gradient')):.3f}",
    ]


def _figure(found: dict[str, Any]):
    cosines = {short(name): found["pairs"][name]["cosine"] for name in drawn(found)}
    spectra = {
        f"{short(name)} ": [normalized(found, step, name, "gradient") for step in found["steps"]]
        for name in drawn(found)
    }
    rows = [
        Map(cosines, "cosine of gradients", -1.0, 1.0, True),
        Map(spectra, "singular value / largest", 0.0, 1.0, False),
    ]
    return heat_figure(rows, found["steps"], f"{found['model']}, seed {found['seed']}")


def claims(seen: Sequence[Weight], found: Sequence[dict[str, Any]]) -> list[Claim]:
    return [
        Claim(
            "gradients of the middle MLP saturate early (cosine of late checkpoints above 0.5), those of q and k of "
            "the first and last layer do not",
            None,
            saturates(seen),
        ),
        Claim(
            "gradients of q, k and gate are more low-rank than those of v, up and down (r_90, over the control)",
            None,
            lower_gradients(seen),
        ),
        Claim(
            "both stories fit: subspaces of q, k and gate stay alike (phi above 0.5) while their cosines are near 0",
            None,
            both_stories(found),
        ),
    ]


def saturates(seen: Sequence[Weight]) -> Outcomes:
    if not seen:
        return {"cosines": None}
    depth = 1 + max(w.layer for w in seen)
    middle = [w.numbers["cosine"] for w in seen if w.layer == depth // 2 and w.component in HIGH[1:]]
    ends = [w.numbers["cosine"] for w in seen if w.layer in (0, depth - 1) and w.component in ("q_proj", "k_proj")]
    return {
        f"middle MLP {mean(middle):.2f}": mean(middle) > 0.5,
        f"q and k of the ends {mean(ends):.2f}": mean(ends) < 0.5,
    }


def lower_gradients(seen: Sequence[Weight]) -> Outcomes:
    if not seen:
        return {"r_90": None}
    differences, blocks = lower_by_block(seen, "gradient r_90")
    return decided(mean_of(differences, blocks), -1, "the difference of r_90")


def both_stories(found: Sequence[dict[str, Any]]) -> Outcomes:
    if not found:
        return {"both numbers": None}
    low = [(one, name) for one in found for name in one["pairs"] if name.endswith(emerged.LOW)]
    phi = mean([figure2.stability(one, name) for one, name in low])
    cosine = mean([mean(emerged.late(one["pairs"][name]["cosine"])) for one, name in low])
    return {f"phi {phi:.2f}, cosine {cosine:.2f}": phi > 0.5 and abs(cosine) < 0.1}
