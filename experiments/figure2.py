"""Figure 2: similarity of gradient subspaces, and singular values of weights, between checkpoints of pretraining.

Cost: laptop 3 runs of pretraining with their probes, 8 minutes on 2 CPU cores; paper 3 runs, never measured.

The paper gives neither the formula nor the rank. Here phi_r = ||U_s^T U_t||_F^2 / r on either side, r = 16, on one
fixed batch, with chance subtracted; beside it the floor of noise, phi_r between two batches at one checkpoint. The
cells are those of why_low_rank.
"""

from collections.abc import Sequence
from typing import Any

from experiments import emerged
from experiments.cells import Cell, Row
from experiments.emerged import HIGH, LOW, ORDER, RANK, Weight, decided, floor, mean, read, stability, weights
from experiments.page import Claim, Outcomes, Page, cited
from welore.correlation import mean as mean_of
from welore.maps import Map, heat_figure
from welore.subspace import above_chance

NEEDS = emerged.FILES


def cells(scale: str) -> list[Cell]:
    return emerged.pretraining(scale)


def render(rows: Sequence[Row]) -> Page:
    header = [
        "component",
        "phi of successive checkpoints",
        "floor",
        "cosine",
        "r_90 at first",
        "at last",
        "of shuffled",
    ]
    if any(row.missing for row in rows):
        return Page(header, [], [], claims([], []))
    found = [read(row) for row in rows]
    seen = [w for row, one in zip(rows, found, strict=True) for w in weights(one, row.cell["seed"])]
    notes = [
        f"phi_{RANK} of gradients, chance subtracted, and cosines are means over successive checkpoints in the second "
        f"half, over layers and {len(rows)} seeds; the floor is phi_{RANK} of two batches at one checkpoint",
        "r_90 is a share of all singular values; of shuffled: the last one over that of the same entries in a random "
        "order, which takes out the shape",
        f"drawn is seed {rows[0].cell['seed']}, checkpoints {', '.join(map(str, found[0]['steps']))}",
        *emerged.cost(rows),
        *emerged.measured(rows),
    ]
    body = [line(cited(component, rows), seen, found) for component in ORDER]
    return Page(header, body, notes, claims(seen, found), {"": figure(found[0])})


def line(component: str, seen: Sequence[Weight], found: Sequence[dict[str, Any]]) -> list[str]:
    of = [w.numbers for w in seen if w.component == component]
    floors = [floor(one, name) for one in found for name in one["pairs"] if name.endswith(component)]
    return [
        component,
        f"{mean([n['subspace'] for n in of]):.3f}",
        f"{mean(floors):.3f}",
        f"{mean([n['cosine'] for n in of]):.3f}",
        f"{mean(emerged.shown(found, component, 0)):.3f}",
        f"{mean(emerged.shown(found, component, -1)):.3f}",
        f"{mean([n['r_90'] for n in of]):.3f}",
    ]


def drawn(found: dict[str, Any]) -> list[str]:
    """q and k of the first layer, down and up of the middle one: what the paper shows."""
    names = list(found["pairs"])
    depth = 1 + max(emerged.layer_of(name) for name in names)
    wanted = [(0, "q_proj"), (0, "k_proj"), (depth // 2, "down_proj"), (depth // 2, "up_proj")]
    return [n for layer, part in wanted for n in names if emerged.layer_of(n) == layer and n.endswith(part)]


def figure(found: dict[str, Any]):
    likeness, spectra = {}, {}
    for name in drawn(found):
        size = found["checkpoints"][str(found["steps"][0])]["weights"][name]["shape"][0]
        table = found["pairs"][name][f"left_{RANK}"]
        likeness[short(name)] = [[above_chance(phi, RANK, size) for phi in row] for row in table]
        spectra[f"{short(name)} "] = [normalized(found, step, name, "weight") for step in found["steps"]]
    rows = [
        Map(likeness, f"phi_{RANK} of gradients, left", 0.0, 1.0, True),
        Map(spectra, "singular value / largest", 0.0, 1.0, False),
    ]
    return heat_figure(rows, found["steps"], f"{found['model']}, seed {found['seed']}")


def short(name: str) -> str:
    return f"layer {emerged.layer_of(name)} {name.rpartition('.')[2]}"


def normalized(found: dict[str, Any], step: int, name: str, which: str) -> list[float]:
    sigma = found["checkpoints"][str(step)]["weights"][name][which]["sigma"]
    return [value / sigma[0] for value in sigma]


def claims(seen: Sequence[Weight], found: Sequence[dict[str, Any]]) -> list[Claim]:
    return [
        Claim(
            "gradient subspaces of q, k and gate stabilize more than those of v, up and down (Section 2.4, C3)",
            None,
            stabilize_more(found),
        ),
        Claim("low rank emerges early: most of the fall of r_90 is in the first quarter", None, emerges_early(found)),
        Claim(
            "low rank differs by component: r_90, over its control, of q, k and gate ends below that of v, up and "
            "down (C1)",
            None,
            ends_lower(seen),
        ),
    ]


def stabilize_more(found: Sequence[dict[str, Any]]) -> Outcomes:
    """In each layer of each run: the mean of the ones less that of the others; then of what lies above the floor."""
    if not found:
        return {"the difference": None}
    measures = {"phi": stability, "phi less its floor": lambda one, name: stability(one, name) - floor(one, name)}
    outcomes: Outcomes = {}
    for what, measure in measures.items():
        differences, blocks = [], []
        for number, one in enumerate(found):
            for layer in sorted({emerged.layer_of(name) for name in one["pairs"]}):
                names = [name for name in one["pairs"] if emerged.layer_of(name) == layer]
                low, high = (mean([measure(one, n) for n in names if n.endswith(side)]) for side in (LOW, HIGH))
                differences.append(low - high)
                blocks.append((number, layer))
        outcomes |= decided(mean_of(differences, blocks), 1, f"difference of {what}")
    return outcomes


def emerges_early(found: Sequence[dict[str, Any]]) -> Outcomes:
    """By component: the fall until the first checkpoint at or after a quarter of the steps, against the whole."""
    if not found:
        return {"the share": None}
    outcomes: Outcomes = {}
    for component in ORDER:
        falls = []
        for one in found:
            quarter = next(step for step in one["steps"] if 4 * step >= one["steps"][-1])
            for name in (n for n in one["pairs"] if n.endswith(component)):
                first, early, last = (
                    one["checkpoints"][str(step)]["weights"][name]["weight"]["r_90"]
                    for step in (one["steps"][0], quarter, one["steps"][-1])
                )
                falls.append((first - early, first - last))
        early, whole = (sum(fall) for fall in zip(*falls, strict=True))
        outcomes[f"{component} {early / len(falls):.3f} of {whole / len(falls):.3f}"] = whole > 0 and 2 * early > whole
    return outcomes


def ends_lower(seen: Sequence[Weight]) -> Outcomes:
    if not seen:
        return {"r_90": None}
    differences, blocks = lower_by_block(seen, "r_90")
    return decided(mean_of(differences, blocks), -1, "the difference of r_90")


def lower_by_block(seen: Sequence[Weight], key: str) -> tuple[list[float], list[tuple[int, int]]]:
    """In each layer of each run: the mean of a number over q, k and gate less that over v, up and down."""
    blocks = sorted({w.block for w in seen})
    differences = [
        mean([w.numbers[key] for w in seen if w.block == block and w.component in LOW])
        - mean([w.numbers[key] for w in seen if w.block == block and w.component in HIGH])
        for block in blocks
    ]
    return differences, blocks
