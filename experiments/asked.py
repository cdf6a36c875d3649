"""What a table prints of models that were asked questions, and when a mode counts as one that did not train."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments import compare
from experiments.cells import Row
from experiments.page import Outcomes
from experiments.tuning import Study
from welore import metrics
from welore.counts import above_chance, mcnemar, wilson
from welore.report import number

COLUMNS = ["ours, %", "right / asked", "95 %", "by likelihood, %", "unparsed", "on training questions, %"]
COLUMNS += ["untuned, %", "dense, %", "seeds", "learning rate", "best at the edge", "trained", "flag"]
NOTES = [
    "every test question counts: an answer that cannot be read is wrong. 95 %: Wilson's interval over all seeds",
    "learning rate: the one with the least validation perplexity at the end, on seed 0; the other seeds run at it",
    "did not train: diverged, or by the written answers no better than the most frequent answer (binomial, p > 0.05)",
]
SURE = 0.05


def budget(study: Study) -> list[str]:
    return ["—"] * 3 if study.first is None else compare.budget(study.first)


def accuracy(study: Study | None) -> float | None:
    """Mean over seeds, in percent; 0 where a run diverged, None while one is missing."""
    if study is None or not study.runs:
        return None
    return 100 * mean(_share(row) for row in study.runs)


def _share(row: Row) -> float:
    return 0.0 if row.diverged else row.number(metrics.TUNED_ACCURACY)


def counts(study: Study) -> tuple[int, int]:
    """Right answers and questions, over all seeds."""
    rows = [row for row in study.runs if row.record]
    return (
        sum(row.number(metrics.TUNED_CORRECT) for row in rows),
        sum(row.number(metrics.EVAL_EXAMPLES) for row in rows),
    )


def flag(study: Study) -> str:
    if not study.runs:
        return ""
    if any(row.diverged for row in study.runs):
        return "did not train: diverged"
    right, asked = counts(study)
    chance = study.runs[0].number(metrics.EVAL_CHANCE)
    return "" if above_chance(right, asked, chance) < SURE else f"did not train: at chance ({100 * chance:.1f} %)"


def values(study: Study) -> list[str]:
    """By COLUMNS."""
    if study.missing:
        return ["missing", *["—"] * (len(COLUMNS) - 1)]
    done = [row for row in study.runs if row.record]
    if not done:
        return ["diverged", *["—"] * (len(COLUMNS) - 2), flag(study)]
    right, asked = counts(study)
    low, high = wilson(right, asked)
    first, shares = done[0], [100 * _share(row) for row in study.runs]
    error = f" ± {stdev(shares) / math.sqrt(len(shares)):.1f}" if len(shares) > 1 else ""
    chosen = "—" if study.chosen is None else f"{study.chosen:g}"
    return [
        f"{mean(shares):.1f}{error}",
        f"{right} / {asked}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        percent(_mean(done, metrics.TUNED_OPTION_ACCURACY)),
        str(sum(row.number(metrics.TUNED_UNPARSED) for row in done)),
        percent(_mean(done, metrics.TRAIN_ACCURACY)),
        percent(first.found(metrics.COMPRESSED_ACCURACY)),
        percent(first.found(metrics.DENSE_ACCURACY)),
        str(len(study.runs)),
        f"{chosen} of {', '.join(f'{rate:g}' for rate in sorted(study.grid))}",
        study.edge,
        f"{first.number(metrics.TRAINABLE_PARAMETERS) / 1e6:,.2f}M",
        flag(study) or "—",
    ]


def _mean(rows: Sequence[Row], metric: metrics.Metric) -> float | None:
    found = [row.found(metric) for row in rows]
    return None if None in found else mean(found)


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)


def higher(found: dict[tuple[str, str], Study], places: Sequence[str], column: str, other: str) -> Outcomes:
    """Whether the mean accuracy of `column` lies above that of `other`, at each place."""
    outcomes: Outcomes = {}
    for place in places:
        ours, theirs = accuracy(found.get((place, column))), accuracy(found.get((place, other)))
        outcomes[place] = None if None in (ours, theirs) else ours > theirs
    return outcomes


def surely_higher(found: dict[tuple[str, str], Study], places: Sequence[str], column: str, other: str) -> Outcomes:
    """The same, where besides McNemar's test on the answers of seed 0 says that they differ (p < 0.05)."""
    above = higher(found, places, column, other)
    return {
        place: outcome and _differ(found[place, column], found[place, other]) if outcome else outcome
        for place, outcome in above.items()
    }


def _differ(ours: Study, theirs: Study) -> bool | None:
    pairs = [verdicts(study.first.folder) for study in (ours, theirs) if study.first is not None]
    if len(pairs) < 2 or len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return None
    return mcnemar(*pairs) < SURE


def verdicts(folder: Path, stage: str = "tuned") -> list[bool]:
    """Whether each answer of a run was right, in the order of the questions; empty where there is no file."""
    file = folder / f"answers-{stage}.jsonl"
    if not file.exists():
        return []
    return [json.loads(line)["verdict"] == "right" for line in file.read_text().splitlines()]
