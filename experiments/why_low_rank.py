"""Why low rank: what goes with low-rank weights in a pretrained model, and whether the claims C1 to C6 hold.

Cost: laptop 3 runs of pretraining with their probes, 8 minutes on 2 CPU cores; paper 3 runs, never measured.

The paper sees a strong correlation and prints no coefficient. Here are Spearman's over all weights of all seeds, with
intervals from resampled layers, and what is left of them in the same layer at the same lambda_1: its rival says that
low curvature, and not a gap, goes with low rank.
"""

from collections.abc import Sequence
from typing import Any

from experiments import emerged, figure2, v1_figure3
from experiments.cells import Cell, Row
from experiments.emerged import ORDER, VECTORS, Weight, decided, mean, read, weights
from experiments.page import Claim, Outcomes, Page, cited
from welore.correlation import Interval, curve, spearman
from welore.correlation import mean as mean_of
from welore.maps import scatter_figure

NEEDS = emerged.FILES
GAPS = ("hessian ratio", "hessian fall", "hessian relative", "hessian share", "gauss_newton fall")
LAMBDA = "hessian lambda_1"
CAUSES = (*GAPS, LAMBDA, "gauss_newton lambda_1", "subspace", "cosine")
SIGNS = {"r_90": -1, "below": 1, "nats at 0.25": -1}  # of what a larger gap or stability is to go with
ALIKE = ("layer", "lambda_1", "component")


def cells(scale: str) -> list[Cell]:
    return emerged.pretraining(scale)


def render(rows: Sequence[Row]) -> Page:
    header = ["", *(f"{effect}{what}" for effect in SIGNS for what in ("", *map(", same {}".format, ALIKE)))]
    if any(row.missing for row in rows):
        return Page(header, [], [], claims([], []), claimant="claim")
    found = [read(row) for row in rows]
    seen = [w for row, one in zip(rows, found, strict=True) for w in weights(one, row.cell["seed"])]
    body = [
        [cited(cause, rows), *(str(one) for effect in SIGNS for one in correlations(seen, cause, effect))]
        for cause in CAUSES
    ]
    notes = [
        f"Spearman's correlation over {len(seen)} weights of {len(found)} seeds (95 % of resamples of layers and "
        f"seeds); then partial ones: in the same layer, in the same layer at the same {LAMBDA}, and in the same "
        "layer and component",
        f"r_90: over that of the same entries in a random order, which takes out the shape; below: the share of "
        f"singular values below 0.2 of the largest, less that of the control; nats at 0.25: the rise of the loss "
        f"where a weight keeps a quarter of its ranks; subspace: phi_{emerged.RANK} of successive gradients, less "
        "chance",
        *eigen_notes(found),
        *emerged.cost(rows),
        *emerged.measured(rows),
    ]
    return Page(header, body, notes, claims(seen, found), {"": _figure(seen)}, claimant="claim")


def correlations(seen: Sequence[Weight], cause: str, effect: str) -> list[Interval | str]:
    """Plain; in the same layer; also at the same lambda_1 (a dash for lambda_1 itself), or in the same component."""
    x, y = ([w.numbers[key] for w in seen] for key in (cause, effect))
    depths = [[float(w.layer == layer) for w in seen] for layer in sorted({w.layer for w in seen})]
    blocks = [w.block for w in seen]
    same = [w.numbers[LAMBDA] for w in seen]
    curved = "—" if cause == LAMBDA else spearman(x, y, blocks, [*depths, same])
    kinds = [[float(w.component == kind) for w in seen] for kind in ORDER]
    return [
        spearman(x, y, blocks),
        spearman(x, y, blocks, depths),
        curved,
        spearman(x, y, blocks, [*depths, *kinds]),
    ]


def eigen_notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """How far the eigenvalues are converged, and whether their vectors are low-rank matrices."""
    curved = [one["checkpoints"][str(one["steps"][-1])]["curvature"] for one in found]
    hessians = [shown["hessian"] for one in curved for shown in one.values()]
    residuals = [h["residuals"][0] / h["values"][0] for h in hessians]
    later = [h["residuals"][VECTORS - 1] / h["values"][0] for h in hessians]
    ranks = sorted(rank for h in hessians for rank in h["stable_ranks"])
    return [
        f"residual / lambda_1 of the first eigenvalue: largest {max(residuals):.1e}; of the fifth: mean "
        f"{mean(later):.1e}, largest {max(later):.1e}",
        f"stable rank of the first {VECTORS} eigenvectors as matrices: median {ranks[len(ranks) // 2]:.2f}, largest "
        f"{ranks[-1]:.1f} (the bridge from a narrow Hessian to a low-rank update)",
    ]


def _figure(seen: Sequence[Weight]):
    def panel(below: str, left: str) -> tuple[str, str, dict]:
        clouds = {c: [(w.numbers[below], w.numbers[left]) for w in seen if w.component == c] for c in ORDER}
        return below, left, clouds

    pairs = [(cause, effect) for effect in ("r_90", "nats at 0.25") for cause in ("hessian fall", LAMBDA, "subspace")]
    title = f"{len(seen)} weights of {len({w.seed for w in seen})} seeds at the end of pretraining"
    return scatter_figure([panel(*pair) for pair in pairs], title, log=[LAMBDA, "nats at 0.25"])


def claims(seen: Sequence[Weight], found: Sequence[dict[str, Any]]) -> list[Claim]:
    claim = [
        ("C1: weights of q, k and gate become more low-rank than those of v, up and down", low_rank(seen)),
        ("C1: each of q, k and gate ends below its shuffled entries", controls(found)),
        ("C2: the first and last layers become more low-rank than the middle (Section 2.5)", depth_curve(seen)),
        ("C3: gradient subspaces of q, k and gate stabilize more than the others", figure2.stabilize_more(found)),
        ("C3: subspaces stay more alike in training than between two batches", above_floor(found)),
        ("C4: a larger gap goes with lower rank", each(seen, GAPS, ["r_90"], 0)),
        ("C4: it does in the same layer at the same lambda_1", each(seen, GAPS, ["r_90"], 2)),
        ("C4: it does in the same layer and component", each(seen, GAPS, ["r_90"], 3)),
        ("the rival: lower lambda_1 goes with lower rank", rising(seen, LAMBDA, "r_90")),
        ("the rival: lower lambda_1 goes with less loss where truncated", rising(seen, LAMBDA, "nats at 0.25")),
        ("more stable subspaces go with lower rank (Section 2.5)", each(seen, ["subspace"], list(SIGNS)[:2], 0)),
        (
            "gradients that keep changing go with lower rank: Spearman of cosine and r_90 above 0 (first version)",
            rising(seen, "cosine", "r_90"),
        ),
        ("C5: top eigenspaces of the Hessian settle (Theorem 2.1)", settles(found)),
        ("C6: the gradient falls into the top eigenspace (Theorem 2.2)", aligns(found)),
    ]
    return [Claim(text, None, outcome) for text, outcome in claim]


def low_rank(seen: Sequence[Weight]) -> Outcomes:
    outcomes: Outcomes = {}
    for key in ("r_90", "entropy rank"):
        if not seen:
            outcomes[key] = None
        else:
            outcomes |= decided(mean_of(*figure2.lower_by_block(seen, key)), -1, f"difference of {key}")
    return outcomes


def controls(found: Sequence[dict[str, Any]]) -> Outcomes:
    return {part: v1_figure3.below_control(found, part) for part in emerged.LOW}


def depth_curve(seen: Sequence[Weight]) -> Outcomes:
    """The quadratic term of r_90 over depth, the mean of the component taken off each weight."""
    if not seen:
        return {"curve over depth": None}
    typical = {c: mean([w.numbers["r_90"] for w in seen if w.component == c]) for c in {w.component for w in seen}}
    off = [w.numbers["r_90"] - typical[w.component] for w in seen]
    return decided(curve([w.layer for w in seen], off, [w.block for w in seen]), -1, "curve over depth")


def above_floor(found: Sequence[dict[str, Any]]) -> Outcomes:
    if not found:
        return {"phi less its floor": None}
    pairs = [(number, one, name) for number, one in enumerate(found) for name in one["pairs"]]
    differences = [emerged.stability(one, name) - emerged.floor(one, name) for _, one, name in pairs]
    blocks = [(number, emerged.layer_of(name)) for number, _, name in pairs]
    return decided(mean_of(differences, blocks), 1, "phi less its floor")


def each(seen: Sequence[Weight], causes: Sequence[str], effects: Sequence[str], which: int) -> Outcomes:
    outcomes: Outcomes = {}
    for cause in causes:
        for effect in effects:
            what = cause if len(effects) == 1 else f"{cause} and {effect}"
            if not seen:
                outcomes[what] = None
            else:
                outcomes |= decided(correlations(seen, cause, effect)[which], SIGNS[effect], what)
    return outcomes


def rising(seen: Sequence[Weight], cause: str, effect: str) -> Outcomes:
    """Whether the effect grows with the cause: over all weights, in the same layer, and also in the same component."""
    if not seen:
        return {cause: None}
    plain, same_layer, _, same_component = correlations(seen, cause, effect)
    return (
        decided(plain, 1, cause)
        | decided(same_layer, 1, "in the same layer")
        | decided(same_component, 1, "in the same component")
    )


def settles(found: Sequence[dict[str, Any]]) -> Outcomes:
    """phi_k of the last two checkpoints with curvature less that of the first two."""
    if not found:
        return {"rise of phi": None}
    rises, blocks = [], []
    for number, one in enumerate(found):
        for name, by_step in one["eigenspaces"].items():
            values = list(by_step.values())
            if len(values) < 2:
                return {"three checkpoints with curvature": None}
            rises.append(values[-1] - values[0])
            blocks.append((number, emerged.layer_of(name)))
    return decided(mean_of(rises, blocks), 1, "rise of phi")


def aligns(found: Sequence[dict[str, Any]]) -> Outcomes:
    """The median of rho_k falls, to less than half, for the gradients of the same, another and a large batch."""
    if not found:
        return {"rho": None}
    outcomes: Outcomes = {}
    for which in ("same", "other", "large"):
        first, last = (median(rho(found, which, place)) for place in (0, -1))
        outcomes[f"{which} batch {first:.2f} to {last:.2f}"] = last < 0.5 and last < first
    return outcomes


def rho(found: Sequence[dict[str, Any]], which: str, place: int) -> list[float]:
    values = []
    for one in found:
        curved = [shown for step in one["steps"] if "curvature" in (shown := one["checkpoints"][str(step)])]
        values += [shown["hessian"]["outside"][which][str(VECTORS)] for shown in curved[place]["curvature"].values()]
    return values


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
