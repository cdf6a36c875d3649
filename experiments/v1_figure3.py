"""Figure 3 of the first version: singular values of weights at the checkpoints of pretraining.

Cost: laptop 3 runs of pretraining with their probes, 8 minutes on 2 CPU cores; paper 3 runs, never measured.

A matrix is low-rank only beside what it was at first and beside the same entries in a random order. The cells are
those of figure2 and why_low_rank.
"""

from collections.abc import Sequence
from typing import Any

from experiments import emerged
from experiments.cells import Cell, Row
from experiments.emerged import ORDER, layer_of, mean, read
from experiments.figure2 import normalized, short
from experiments.page import Claim, Page, cited
from welore.counts import above_chance
from welore.maps import Map, heat_figure

NEEDS = emerged.FILES
DRAWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def cells(scale: str) -> list[Cell]:
    return emerged.pretraining(scale)


def render(rows: Sequence[Row]) -> Page:
    header = ["component", "r_90 at first", "at last", "shuffled", "stable rank at first", "at last", "above the edge"]
    if any(row.missing for row in rows):
        return Page(header, [], [], claims([]))
    found = [read(row) for row in rows]
    notes = [
        f"means over layers and {len(rows)} seeds; r_90 is a share of all singular values; above the edge: values at "
        f"the last checkpoint above that of Marchenko and Pastur for entries of the same variance",
        f"W_Q^T W_K of a head, which no choice of coordinates changes, has r_90 {_head(found, 'qk', 0)} at first and "
        f"{_head(found, 'qk', -1)} at last, W_O W_V {_head(found, 'ov', 0)} and {_head(found, 'ov', -1)}, as shares "
        f"of the head size",
        f"drawn is seed {rows[0].cell['seed']}",
        *emerged.measured(rows),
    ]
    body = [_line(cited(component, rows), found) for component in ORDER]
    return Page(header, body, notes, claims(found), {"": _figure(found[0])})


def _head(found: Sequence[dict[str, Any]], kind: str, place: int) -> str:
    shown = [one["checkpoints"][str(one["steps"][place])]["heads"] for one in found]
    return f"{mean([block[kind]['r_90'] for one in shown for block in one.values()]):.3f}"


def _shuffled(found: Sequence[dict[str, Any]], component: str) -> list[float]:
    shown = [one["checkpoints"][str(one["steps"][-1])]["shuffled"] for one in found]
    return [one[name]["r_90"] for one in shown for name in one if name.endswith(component)]


def _line(component: str, found: Sequence[dict[str, Any]]) -> list[str]:
    return [
        component,
        f"{mean(emerged.shown(found, component, 0)):.3f}",
        f"{mean(emerged.shown(found, component, -1)):.3f}",
        f"{mean(_shuffled(found, component)):.3f}",
        f"{mean(emerged.shown(found, component, 0, key='stable_rank')):.1f}",
        f"{mean(emerged.shown(found, component, -1, key='stable_rank')):.1f}",
        f"{mean(emerged.shown(found, component, -1, key='above_edge')):.1f}",
    ]


def _figure(found: dict[str, Any]):
    depth = 1 + max(layer_of(name) for name in found["pairs"])
    maps = []
    for layer in dict.fromkeys((0, depth // 2, depth - 1)):
        names = [n for part in DRAWN for n in found["pairs"] if layer_of(n) == layer and n.endswith(part)]
        spectra = {short(n): [normalized(found, step, n, "weight") for step in found["steps"]] for n in names}
        maps.append(Map(spectra, "singular value / largest", 0.0, 1.0, False))
    return heat_figure(maps, found["steps"], f"{found['model']}, seed {found['seed']}")


def claims(found: Sequence[dict[str, Any]]) -> list[Claim]:
    return [
        Claim(
            "weights become low-rank: r_90 ends below that of the shuffled entries (sign test over layers and seeds, "
            "p < 0.01; claim C1)",
            None,
            {part: below_control(found, part) for part in ORDER},
        ),
        Claim(
            "v, up and down do not become low-rank (their r_90 is not below that of the shuffled entries)",
            None,
            {part: None if (low := below_control(found, part)) is None else not low for part in emerged.HIGH},
        ),
    ]


def below_control(found: Sequence[dict[str, Any]], component: str) -> bool | None:
    """Whether a sign test decides for or against it; None where it decides nothing."""
    if not found:
        return None
    pairs = zip(emerged.shown(found, component, -1), _shuffled(found, component), strict=True)
    signs = [ours < control for ours, control in pairs if ours != control]
    if above_chance(sum(signs), len(signs), 0.5) < 0.01:
        return True
    return False if above_chance(len(signs) - sum(signs), len(signs), 0.5) < 0.01 else None
