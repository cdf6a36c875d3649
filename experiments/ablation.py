"""Ablation: what each step beyond one-shot K-FAC factors at Lagrange ranks pays, in nats above the dense model.

Cost: laptop 36 runs, about three hours on one CPU core; paper 36 runs, never measured.

The base is 20,480 calibration tokens, true labels, gradient damping 0.2, one round, one-shot factors. Every other row
changes one thing or more. 32,768 test tokens at laptop scale; base, the best one-shot rows and refinement on three
calibration seeds.
"""

import math
from collections.abc import Sequence
from itertools import product
from statistics import mean, stdev

from experiments.cells import Cell, Row
from experiments.compare import budget, measured
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, setting
from welore import metrics
from welore.report import number

NEEDS = ()
KEEPS = [0.8, 0.67]
SEEDS = [0, 1, 2]
GOALS = {0.8: 0.33, 0.67: 0.75}  # nats above dense
WITHIN = 0.6, 1.0  # of predicted over measured damage
VARIANTS: dict[str, Cell] = {
    "base": {},
    "3 x the calibration tokens": {"calibration.tokens": 61_440},
    "labels drawn from the model": {"calibration.labels": "sampled"},
    "gradient damping 0.05": {"calibration.gradient_damping": 0.05},
    "depth bias 1": {"ranks.depth_bias": 1.0},
    "3 x the tokens, damping 0.05": {"calibration.tokens": 61_440, "calibration.gradient_damping": 0.05},
    "3 x the tokens, damping 0.05, depth bias 1": {
        "calibration.tokens": 61_440,
        "calibration.gradient_damping": 0.05,
        "ranks.depth_bias": 1.0,
    },
    "two rounds of statistics": {"calibration.rounds": 2},
    "sequential, anchored": {"svd.sequential": "anchored"},
    "block refinement": {"refine": "block"},
}
# The best without any training, at keep 0.8 and at 0.67.
ONE_SHOT, DEEP = "3 x the tokens, damping 0.05", "3 x the tokens, damping 0.05, depth bias 1"
SEEDED = ("base", ONE_SHOT, DEEP, "block refinement")

Runs = dict[tuple[str, float], list[Row]]  # by variant and keep, one for each seed


def cells(scale: str) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "svd": "kfac", "ranks": "lagrange", "mode": "none"} | setting(scale)
    if scale == "laptop":
        shared |= {"task.protocol.windows": 64, "calibration.split": "train"}
    return [
        shared | options | {"keep": keep, "calibration.seed": seed}
        for (name, options), keep in product(VARIANTS.items(), KEEPS)
        for seed in (SEEDS if name in SEEDED else SEEDS[:1])
    ]


def render(rows: Sequence[Row]) -> Page:
    runs: Runs = {place: [] for place in product(VARIANTS, KEEPS)}
    for row in rows:
        runs[_variant(row), row.cell["keep"]].append(row)
    header = [
        "variant",
        "keep asked",
        "seeds",
        "err",
        "keep",
        "parameters",
        "dense",
        "nats above dense",
        "against base",
    ]
    header += ["predicted / measured", "seconds to compress"]
    body = [_line(runs, variant, keep) for variant, keep in runs]
    notes = ["mean over calibration seeds, ± their standard deviation; predicted before the cut, by K-FAC"]
    return Page(header, body, [*notes, *measured(rows)], claims(runs))


def _variant(row: Row) -> str:
    """The last one whose options the cell has: the base has none."""
    return [name for name, options in VARIANTS.items() if options.items() <= row.cell.items()][-1]


def _line(runs: Runs, variant: str, keep: float) -> list[str]:
    done = [row for row in runs[variant, keep] if row.record]
    line = [variant, f"{keep:g}", str(len(done))]
    if not done:
        return [*line, "—", "—", "—", "—", "missing", "—", "—", "—"]
    nats, base = damage(done), damage(runs["base", keep])
    spread = f" ± {stdev(row.number(metrics.NATS) for row in done):.3f}" if len(done) > 1 else ""
    gain = "—" if base is None or variant == "base" else f"{nats - base:+.3f}"
    first = done[0]
    return [
        *line,
        *budget(first),
        number(first.number(metrics.DENSE_PERPLEXITY), 2),
        cited(f"{nats:.3f}{spread}", done),
        gain,
        number(ratio(done), 2),
        number(max(row.number(metrics.COMPRESS_SECONDS) for row in done), 0),
    ]


def damage(rows: Sequence[Row]) -> float | None:
    """Mean nats above dense; NaN where a model breaks, None where nothing has run."""
    found = [row.record.metrics[metrics.NATS.key] for row in rows if row.record]
    return mean(math.nan if nats is None else nats for nats in found) if found else None


def ratio(rows: Sequence[Row]) -> float:
    """Mean predicted over measured damage."""
    return mean(row.number(metrics.PREDICTED_NATS) for row in rows) / damage(rows)


def claims(runs: Runs) -> list[Claim]:
    refined = "block refinement"
    return [
        *(
            Claim(f"{variant}: at most 0.33 and 0.75 nats above dense", None, reaches(runs, variant))
            for variant in (ONE_SHOT, DEEP)
        ),
        Claim(f"{refined}: at most 0.33 and 0.75 nats, mean of three seeds", None, reaches(runs, refined)),
        Claim("base: predicted over measured damage within 0.6 to 1.0", None, predicts(runs)),
        *(Claim(f"it pays: {variant}", None, pays(runs, variant)) for variant in VARIANTS if variant != "base"),
    ]


def reaches(runs: Runs, variant: str) -> Outcomes:
    found = {keep: damage(runs[variant, keep]) for keep in KEEPS}
    return {f"keep {keep:g}": None if nats is None else nats <= GOALS[keep] for keep, nats in found.items()}


def predicts(runs: Runs) -> Outcomes:
    done = {keep: [row for row in runs["base", keep] if row.record] for keep in KEEPS}
    return {f"keep {keep:g}": WITHIN[0] <= ratio(rows) <= WITHIN[1] if rows else None for keep, rows in done.items()}


def pays(runs: Runs, variant: str) -> Outcomes:
    """Whether the variant is better than the base on the same seeds."""
    outcomes: Outcomes = {}
    for keep in KEEPS:
        seeds = {row.cell["calibration.seed"] for row in runs[variant, keep]}
        base = damage([row for row in runs["base", keep] if row.cell["calibration.seed"] in seeds])
        ours = damage(runs[variant, keep])
        outcomes[f"keep {keep:g}"] = None if base is None or ours is None else ours < base
    return outcomes
