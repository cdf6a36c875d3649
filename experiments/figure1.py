"""Figure 1: Hessian gap by decoder layer and component, under each reading of "gap".

Cost: laptop 1 run and its probe of 3 of 30 layers, about 20 minutes on 2 CPU cores; paper 1 run, never measured.

The paper gives neither the estimator nor the definition of the gap. Here eigenvalues are of one weight's block, by
Lanczos, on one fixed batch. The run is a cell of Table 1 too; its probe is of the model before the cut.
"""

from collections.abc import Sequence

from experiments import emerged
from experiments.cells import Cell, Row
from experiments.emerged import HIGH, LOW, ORDER, Weight, decided, mean, read, weights
from experiments.page import Claim, Outcomes, Page, cited
from welore.blocks import OPERATORS
from welore.correlation import spearman
from welore.maps import layers_figure
from welore.plots import by_component

FILE = "probe-trained.json"
NEEDS = (FILE,)
GAPS = ("ratio", "fall", "relative", "share")  # those without a scale: curvature.gaps
GAPPED, FLAT = (*LOW, "o_proj"), HIGH


def cells(scale: str) -> list[Cell]:
    return [emerged.trained(scale)]


def render(rows: Sequence[Row]) -> Page:
    header = [
        "component",
        "lambda_1",
        "of Gauss-Newton",
        *GAPS,
        "largest residual / lambda_1",
        "stable rank of vectors",
    ]
    if rows[0].record is None:
        return Page(header, [], [], claims([]))
    found = read(rows[0], FILE)
    seen, last = weights(found, 0), found["checkpoints"][str(found["steps"][-1])]
    body = [
        _line(cited(component, rows), names, last["curvature"])
        for component, names in _names(last["curvature"]).items()
    ]
    probe, tokens = found["probe"], found["probe"]["curvature_windows"] * found["probe"]["length"]
    title = f"{found['model']}: {tokens} tokens, r = {probe['eigenvalues']}, {probe['steps']} Lanczos steps"
    notes = [
        title,
        "means over the probed layers; ratio = lambda_1 / lambda_2, fall = (lambda_1 - lambda_r) / lambda_1, relative "
        "= (lambda_r - lambda_(r+1)) / lambda_1, share = the part of the trace in the first r, above 1 where the rest "
        "curves down",
        "the probe is of the dense model; the run cut it afterwards to",
        "intervals are of single weights, as if they were independent: there are too few layers to resample",
        f"seconds: {', '.join(f'{part} {spent:,.0f}' for part, spent in last['seconds'].items())}",
        *emerged.measured(rows),
    ]
    panels = {f"Hessian: {gap}": _lines(seen, f"hessian {gap}") for gap in GAPS}
    panels["Hessian: lambda_1"] = _lines(seen, "hessian lambda_1")
    figure = layers_figure(panels, title, log=["Hessian: lambda_1"])
    return Page(header, body, notes, claims(seen), {"": figure})


def _names(curvature: dict) -> dict[str, dict]:
    return {component: list(layers.values()) for component, layers in by_component({n: n for n in curvature}).items()}


def _line(component: str, names: Sequence[str], curvature: dict) -> list[str]:
    hessians = [curvature[name]["hessian"] for name in names]
    return [
        component,
        f"{mean([h['values'][0] for h in hessians]):.3g}",
        f"{mean([curvature[name]['gauss_newton']['values'][0] for name in names]):.3g}",
        *(f"{mean([h['gaps'][gap] for h in hessians]):.3f}" for gap in GAPS),
        f"{max(max(h['residuals'][:-1]) / h['values'][0] for h in hessians):.1e}",
        f"{mean([rank for h in hessians for rank in h['stable_ranks']]):.2f}",
    ]


def _lines(seen: Sequence[Weight], key: str) -> dict[str, list[tuple[int, float]]]:
    components = [name for name in ORDER if any(w.component == name for w in seen)]
    return {
        component: sorted((w.layer, w.numbers[key]) for w in seen if w.component == component)
        for component in components
    }


def claims(seen: Sequence[Weight]) -> list[Claim]:
    return [
        Claim(
            "q, k, o and gate have larger gaps than v, up and down, under each definition and operator (Figure 1)",
            None,
            by_definition(seen, gapped_components),
        ),
        Claim(
            "the first and last layers have larger gaps than those in the middle (Figure 1)",
            None,
            by_definition(seen, gapped_ends),
        ),
        Claim(
            "weights with a larger gap are more low-rank: Spearman of gap and r_90 below 0 (Figure 1)",
            None,
            by_definition(seen, gap_means_low_rank),
        ),
    ]


def by_definition(seen: Sequence[Weight], outcome) -> Outcomes:
    found: Outcomes = {}
    for operator in OPERATORS:
        for gap in GAPS:
            key = f"{operator} {gap}"
            found |= outcome(seen, key) if seen else {key: None}
    return found


def gapped_components(seen: Sequence[Weight], key: str) -> Outcomes:
    sides = [[w.numbers[key] for w in seen if w.component in side] for side in (GAPPED, FLAT)]
    if not all(sides):
        return {f"{key} on either side": None}
    return {f"{key} {mean(sides[0]):.3g} and {mean(sides[1]):.3g}": mean(sides[0]) > mean(sides[1])}


def gapped_ends(seen: Sequence[Weight], key: str) -> Outcomes:
    layers = sorted({w.layer for w in seen})
    ends = [w.numbers[key] for w in seen if w.layer in (layers[0], layers[-1])]
    middle = [w.numbers[key] for w in seen if w.layer not in (layers[0], layers[-1])]
    if not middle:
        return {f"{key} of a layer between": None}
    return {f"{key} {mean(ends):.3g} and {mean(middle):.3g}": mean(ends) > mean(middle)}


def gap_means_low_rank(seen: Sequence[Weight], key: str) -> Outcomes:
    gap, rank = ([w.numbers[name] for w in seen] for name in (key, "r_90"))
    return decided(spearman(gap, rank, [(w.seed, w.layer, w.component) for w in seen]), -1, key)
