"""Every task: what the default model answers of each benchmark, dense and cut, before anything is tuned.

Cost: laptop 7 runs of 1 to 4 minutes on one CPU thread; paper 7, never measured.

The paper tunes before it asks (Table 6). What a model knew is shown here, and whether it answers in the form that the
published patterns read. At laptop scale the first 150 test questions of each are asked, of the original files where
they are there, and the factors are K-FAC's at WeLore's ranks, as in Table 6. Three of the seven test sets are then
whole: CoinFlip and object tracking have 150 questions, date understanding has 74.
"""

from collections.abc import Callable, Sequence

from experiments.asked import SURE, percent, verdicts
from experiments.cells import Cell, Row
from experiments.compare import budget, measured
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, asked_of, calibrated_on, factors
from welore import metrics
from welore.counts import above_chance, mcnemar, wilson

DENSE, CUT = STAGES = ("dense", "compressed")
NEEDS = tuple(f"answers-{stage}.jsonl" for stage in STAGES)
TASKS = ["commonsenseqa", "svamp", "boolq", "coinflip", "date", "objects", "strategyqa"]
ERR = 0.3
LIMIT = 150  # questions of a task at laptop scale


def cells(scale: str) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "err": ERR, "ranks": "welore", "mode": "none"}
    if scale == "laptop":
        shared |= {"svd": "kfac", "task.limit": LIMIT} | calibrated_on(scale, "c4")
    return [shared | asked_of(scale, task) for task in TASKS]


def render(rows: Sequence[Row]) -> Page:
    head = ["task", "model", "err", "keep", "parameters", "right, %", "right / asked", "95 %", "by likelihood, %"]
    head += ["unparsed", "most frequent answer, %", "differs from dense, p"]
    notes = [
        "every question counts: an answer that cannot be read is wrong. 95 %: Wilson's interval",
        "p: exact sign test on the same questions (McNemar). SVAMP asks for a number, and has no options",
        *factors(rows),
        *measured(rows),
    ]
    body = [_line(row, stage) for row in rows for stage in STAGES]
    return Page(head, body, notes, claims(rows), claimant="claim")


def _line(row: Row, stage: str) -> list[str]:
    labels = [row.cell["task"], "dense" if stage == DENSE else "cut"]
    if row.missing:
        return [*labels, *["—"] * 3, "missing", *["—"] * 6]
    right, asked = found(row, stage, "correct"), row.number(metrics.EVAL_EXAMPLES)
    low, high = wilson(right, asked)
    sizes = ["—", "—", f"{row.number(metrics.DENSE_PARAMETERS) / 1e6:,.1f}M"] if stage == DENSE else budget(row)
    return [
        *labels,
        *sizes,
        cited(f"{100 * right / asked:.1f}", [row]),
        f"{right} / {asked}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        percent(found(row, stage, "option_accuracy")),
        str(found(row, stage, "unparsed")),
        percent(row.found(metrics.EVAL_CHANCE)),
        "—" if stage == DENSE else f"{_differs(row):.3g}",
    ]


def found(row: Row, stage: str, what: str) -> float | None:
    return row.record.metrics.get(f"{stage}/{what}")


def _differs(row: Row) -> float:
    return mcnemar(*(verdicts(row.folder, stage) for stage in STAGES))


def claims(rows: Sequence[Row]) -> list[Claim]:
    by_task = {row.cell["task"]: row for row in rows}
    return [
        Claim("the dense model answers more than the cut one", None, _each(by_task, _less)),
        Claim(
            f"the same, McNemar p < {SURE:g}", None, _each(by_task, lambda row: _less(row) and _differs(row) < SURE)
        ),
        Claim(
            f"the dense model, untuned, answers more than the most frequent answer would (binomial, p < {SURE:g})",
            None,
            _each(by_task, _above_chance),
        ),
    ]


def _each(by_task: dict[str, Row], holds: Callable[[Row], bool]) -> Outcomes:
    return {task: None if row.missing else holds(row) for task, row in by_task.items()}


def _less(row: Row) -> bool:
    return found(row, CUT, "correct") < found(row, DENSE, "correct")


def _above_chance(row: Row) -> bool:
    chance = row.number(metrics.EVAL_CHANCE)
    return above_chance(found(row, DENSE, "correct"), row.number(metrics.EVAL_EXAMPLES), chance) < SURE
