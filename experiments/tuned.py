"""What a table prints of a study, and the comparisons between studies that claims are made of."""

import math
from collections.abc import Callable, Sequence

from experiments import tuning
from experiments.cells import Row
from experiments.compare import below, budget, joined, measured, ratio
from experiments.page import Claim, Outcomes, Page, cited
from experiments.tuning import FACTORS, SO_FAR, WIDEST, Study, curve, surely_below, validation_curve
from welore import metrics
from welore.measure import GIB
from welore.plots import training_figure
from welore.report import number

COLUMNS = ["err", "keep", "parameters", "dense", "untuned", "tuned", "seeds", "learning rate", "best at the edge"]
COLUMNS += ["trained", "tokens", "MFLOPs/token", "training MFLOPs/token", "tokens/s", "peak GiB", "optimizer MB"]
COLUMNS += ["evaluation peak GiB", "device", "flag"]
COSTS = COLUMNS[COLUMNS.index("trained") : COLUMNS.index("device")]  # left out where no record has any
AFTER_SEEDS = len(COLUMNS) - COLUMNS.index("seeds")
NOTES = [
    f"learning rate: the one with the least validation perplexity at the end, on seed 0; the other seeds run at it. "
    f"Tried: {', '.join(f'{factor:g}' for factor in FACTORS)} times the mode's default, and while the best was the "
    f"lowest or highest one beyond it, up to {WIDEST} in all. Tokens and precision are equal",
    "tuned: mean over the seeds ± standard error of the mean. Time, memory and device are those of seed 0; claims on "
    "them compare the modes seed by seed on one device, and say nothing where they share none or the seeds disagree",
    SO_FAR,
    "MFLOPs/token: of the compressed model, in the products with its weights for one token that it reads. Training "
    "MFLOPs/token: of the first forward and backward pass of the run, in products as torch counts them: the optimizer "
    "and fused attention are not in it, and lisa's follow the layers that a seed draws first. Older records and those "
    "of several processes lack it; scripts/step_flops.py counts it for every mode",
    "tokens/s: of the median step, in brackets with padding where there is any. Peak GiB: of the training steps, in "
    "brackets what torch reserved for them on a GPU; and of the evaluation of the tuned model. On a CPU that is the "
    "resident memory of the process",
    "did not train: diverged, broken, not below the untuned model, or not below a guess among all tokens or by the "
    "frequencies of tokens in 256 training sequences, where a record of these texts holds it. Where the better of two "
    "did not train, it is not said to be better",
    "a seed orders the training text: what seeds confirm is so on this test text, and another may order otherwise "
    "modes that are a few percent apart",
]

Numbers = dict[tuple[str, str], float | None]  # by place and column
Found = dict[tuple[str, str], Study]


def values(study: Study) -> list[str]:
    """By COLUMNS."""
    seeds, partial, study = study.seeds, study.missing, study.so_far
    row = study.first
    if row is None:
        return [*["—"] * 5, "missing" if study.missing else "diverged", *["—"] * (AFTER_SEEDS - 1), study.flag]
    line = [*budget(row), number(row.number(metrics.DENSE_PERPLEXITY), 2), _written(study.untuned)]
    if study.missing:
        return [*line, "missing", *["—"] * (AFTER_SEEDS - 1), ""]
    error = "" if study.error is None else f" ± {study.error:,.2f}"
    chosen = "—" if study.chosen is None else f"{study.chosen:g}"
    grid = ", ".join(f"{rate:g}" for rate in sorted(study.grid))
    return [
        *line,
        cited(f"{_written(study.perplexity)}{error}", study.runs),
        seeds,
        f"{chosen} of {grid}",
        study.edge,
        *_cost(row, [run for run in study.rows if run.record]),
        "—" if partial else study.flag or "—",
    ]


def _written(perplexity: float | None) -> str:
    return "NaN" if perplexity is not None and math.isnan(perplexity) else number(perplexity, 2)


def _cost(row: Row, runs: Sequence[Row]) -> list[str]:
    """Of one run; FLOPs of training, which older records lack, of the first of `runs` that holds them."""
    counted = next((found for run in runs if (found := run.found(metrics.FIT_FLOPS_PER_TOKEN))), None)
    trained, optimizer = row.found(metrics.TRAINABLE_PARAMETERS), optimizer_bytes(row)
    return [
        "—" if trained is None else f"{trained / 1e6:,.2f}M",
        number(row.found(metrics.FIT_TOKENS), 0),
        _millions(row.found(metrics.FLOPS_PER_TOKEN)),
        _millions(counted),
        _and(number(row.found(metrics.FIT_TOKENS_PER_SECOND), 0), row.found(metrics.FIT_PADDED_TOKENS_PER_SECOND), 0),
        _and(number(taken(row, metrics.TRAIN_PEAK_GIB), 2), row.found(metrics.FIT_RESERVED_GIB), 2),
        number(None if optimizer is None else optimizer / 1e6, 1),
        number(row.found(metrics.EVAL_PEAK_GIB), 2),
        _device(row),
    ]


def _and(text: str, other: float | None, digits: int) -> str:
    """The number with another in brackets, where that is there and reads otherwise."""
    beside = number(other, digits)
    return text if beside in ("—", text) else f"{text} ({beside})"


def _millions(flops: float | None) -> str:
    return "—" if flops is None else f"{flops / 1e6:,.0f}"


def optimizer_bytes(row: Row) -> float | None:
    """What the optimizer keeps between steps. Records of before it had a key of its own hold it with a float32
    gradient for every parameter that trains, also where the mode takes turns."""
    if (found := row.found(metrics.FIT_OPTIMIZER_GIB)) is not None:
        return found * GIB
    trained, state = row.found(metrics.TRAINABLE_PARAMETERS), row.found(metrics.FIT_STATE_GIB)
    return None if state is None else state * GIB - 4 * trained


def taken(row: Row, metric: metrics.Metric) -> float | None:
    """What a run took, by its record; memory by the log of its steps: what comes before and after is none of it.

    Of a run that was stopped it is that of the steps since.
    """
    if metric is not metrics.TRAIN_PEAK_GIB:
        return row.found(metric)
    logged = curve(row.folder, metric.key)
    return logged[-1][1] if logged else None


def _device(row: Row) -> str:
    """Where it ran, in how many processes if not one, and whether layers were run again for their gradients: speed and
    memory depend on all three."""
    environment = row.record.environment
    parts = [
        environment["device"],
        environment.get("processes"),
        "recompute" if environment.get("recompute") else None,
    ]
    return ", ".join(part for part in parts if part)


def page(
    head: Sequence[str],
    lines: Sequence[tuple[list[str], Study]],
    rows: Sequence[Row],
    claims: list[Claim],
    notes: Sequence[str] = (),
    claimant: str = "claim of the paper",
) -> Page:
    """A line a study, behind the labels that `head` names; figures are the caller's, where all is there."""
    body = [[*labels, *values(study)] for labels, study in lines]
    header = [*head, *COLUMNS]
    kept = [i for i, title in enumerate(header) if title not in COSTS or any(line[i] != "—" for line in body)]
    body = [[line[i] for i in kept] for line in body]
    return Page([header[i] for i in kept], body, [*notes, *NOTES, *measured(rows)], claims, {}, claimant)


def value(study: Study | None, metric: metrics.Metric) -> float | None:
    """Of the run that stands for a study; None while the study is not whole."""
    if study is None or study.missing or study.first is None:
        return None
    return taken(study.first, metric)


def costs(studies: Sequence[Study], metric: metrics.Metric) -> list[list[float | None] | None]:
    """Speed or memory of the studies by seed; None for a seed that not all of them ran on one device.

    What two devices take cannot be compared.
    """
    by_seed = [{row.cell["seed"]: row for row in study.runs if row.record} for study in studies]
    return [_on_one_device([runs.get(seed) for runs in by_seed], metric) for seed in sorted(set().union(*by_seed))]


def _on_one_device(rows: Sequence[Row | None], metric: metrics.Metric) -> list[float | None] | None:
    if None in rows or len({_device(row) for row in rows}) > 1:
        return None
    return [taken(row, metric) for row in rows]


def cheaper(found: Found, metric: metrics.Metric, places: Sequence[str], column: str, other: str) -> Outcomes:
    """`lower` for speed or memory: one run is slowed by whatever runs beside it, so that all seeds must say it."""
    return {place: _agreed(found, metric, place, column, other, below) for place in places}


def within(
    found: Found, metric: metrics.Metric, places: Sequence[str], over: str, under: str, low: float, high: float
) -> Outcomes:
    """`bounded` for speed or memory, as all seeds say."""

    def holds(one: float | None, two: float | None) -> bool | None:
        return _inside(ratio(one, two), low, high)

    return {place: _agreed(found, metric, place, over, under, holds) for place in places}


def _agreed(
    found: Found,
    metric: metrics.Metric,
    place: str,
    one: str,
    other: str,
    holds: Callable[[float | None, float | None], bool | None],
) -> bool | None:
    """What all seeds of two studies say; None where they disagree, or where one of them cannot be compared."""
    if (place, one) not in found or (place, other) not in found:
        return None
    pairs = costs([found[place, one], found[place, other]], metric)
    said = {None if pair is None else holds(*pair) for pair in pairs}
    return said.pop() if len(said) == 1 else None


def lower(numbers: Numbers, places: Sequence[str], column: str, other: str) -> Outcomes:
    """Whether the number of `column` lies below that of `other`, at each place."""
    return {place: below(numbers.get((place, column)), numbers.get((place, other))) for place in places}


def bounded(numbers: Numbers, places: Sequence[str], over: str, under: str, low: float, high: float) -> Outcomes:
    """Whether the ratio of two columns lies within bounds, at each place."""
    found = {place: ratio(numbers.get((place, over)), numbers.get((place, under))) for place in places}
    return {place: _inside(value, low, high) for place, value in found.items()}


def _inside(value: float | None, low: float, high: float) -> bool | None:
    return None if value is None else low <= value <= high


def rising(numbers: Numbers, lines: Sequence[Sequence[str]], over: str, under: str) -> Outcomes:
    """Whether the ratio of two columns is larger at each place of a line than at the place before."""
    outcomes: list[Outcomes] = []
    for places in lines:
        ratios = [ratio(numbers.get((place, over)), numbers.get((place, under))) for place in places]
        outcomes.append({place: below(a, b) for place, a, b in zip(places[1:], ratios, ratios[1:], strict=False)})
    return joined(*outcomes)


def better(found: Found, places: Sequence[str], column: str, other: str) -> Outcomes:
    """`lower` for means over seeds; None where the lower one did not train."""
    return {place: tuning.better(found.get((place, column)), found.get((place, other))) for place in places}


def surely_lower(found: Found, places: Sequence[str], column: str, other: str) -> Outcomes:
    """`better` by a paired t test."""
    return {place: surely_below(found.get((place, column)), found.get((place, other))) for place in places}


def sure(text: str, found: Found, places: Sequence[str], column: str, other: str) -> list[Claim]:
    """The claim of `surely_lower`; none where every study has its one seed and no error can be known."""
    if all(not study.missing and len(study.runs) == 1 for study in found.values()):
        return []
    return [Claim(text, None, surely_lower(found, places, column, other))]


def training_picture(labelled: dict[str, Study], title: str):
    """Loss and validation perplexity by step, and trained parameters, of seed 0 at the chosen rate; tokens per second.

    None where a study has no run to draw; no panel of speeds where the modes share no device on any seed.
    """
    firsts = {label: study.first for label, study in labelled.items()}
    if any(study.missing or study.chosen is None for study in labelled.values()):
        return None
    curves = {
        "training loss, nats": {k: curve(row.folder, metrics.TRAIN_LOSS.key) for k, row in firsts.items()},
        "validation perplexity": {k: validation_curve(row.folder) for k, row in firsts.items()},
    }
    speeds = costs(list(labelled.values()), metrics.FIT_TOKENS_PER_SECOND)
    shared = next((speed for speed in speeds if speed), [None] * len(firsts))
    bars = {
        "training tokens/s": dict(zip(firsts, shared, strict=True)),
        "trained parameters, millions": {
            k: _million(row.found(metrics.TRAINABLE_PARAMETERS)) for k, row in firsts.items()
        },
    }
    known = {panel: drawn for panel, drawn in bars.items() if None not in drawn.values()}
    return training_figure(curves, known, title)


def _million(count: int | None) -> float | None:
    return None if count is None else count / 1e6
