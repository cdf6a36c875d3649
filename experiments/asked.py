"""What a table prints of models that were asked questions, and when a mode counts as one that did not train."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments import compare, tuning
from experiments.cells import Row
from experiments.page import Outcomes, cited
from experiments.tuning import T_TAILS, Study, standard_error, surely_positive, t_quantile
from welore import metrics
from welore.counts import above_chance, sign_flips, wilson
from welore.report import number

COLUMNS = ["ours, %", "right / asked", "95 %", "by likelihood, %", "unparsed", "on training questions, %"]
COLUMNS += ["untuned, %", "dense, %", "seeds", "learning rate", "best at the edge", "trained", "flag"]
NOTES = [
    "every test question counts: an answer that cannot be read is wrong. 95 %: Wilson's interval for the number of "
    "questions, which all seeds answer, or Student's over seeds where that is wider; ±: standard error over seeds",
    "learning rate: the one with the least validation perplexity at the end, on seed 0; the other seeds run at it",
    tuning.SO_FAR,
    "did not train: diverged, no better than the most frequent answer (binomial, p > 0.05), or than untuned; "
    "where the better of two modes did not train, nothing can be said of them",
]
SURE = 0.05
SURELY = f"p < {SURE:g} by questions (signs) and by seeds (paired t test)"
NEEDS = (*tuning.NEEDS, "answers-tuned.jsonl")  # the questions that two modes answer alike are found in it


def budget(study: Study | None) -> list[str]:
    return ["—"] * 3 if study is None or study.first is None else compare.budget(study.first)


def accuracy(study: Study | None) -> float | None:
    """Mean over seeds, in percent; 0 where a run diverged, None while one is missing."""
    if study is None or not study.runs:
        return None
    return 100 * mean(_share(row) for row in study.runs)


def _share(row: Row) -> float:
    return 0.0 if row.diverged else row.number(metrics.TUNED_ACCURACY)


def flag(study: Study) -> str:
    """`did not train` and why, with the number of seeds where not all of them say so."""
    reasons = [reason for row in study.runs if (reason := _failing(row))]
    if not reasons:
        return ""
    share = "" if len(reasons) == len(study.runs) else f", {len(reasons)} of {len(study.runs)} seeds"
    return f"did not train: {', '.join(dict.fromkeys(reasons))}{share}"


def _failing(row: Row) -> str | None:
    if row.diverged:
        return "diverged"
    if row.breaks_at is not None:
        return f"breaks in {row.breaks_at}"
    chance = row.number(metrics.EVAL_CHANCE)
    if above_chance(row.number(metrics.TUNED_CORRECT), row.number(metrics.EVAL_EXAMPLES), chance) >= SURE:
        return f"at chance ({100 * chance:.1f} %)"
    return "no better than untuned" if _share(row) <= (row.found(metrics.COMPRESSED_ACCURACY) or 0) else None


def values(study: Study | None) -> list[str]:
    """By COLUMNS; None is a study of which no cell is known yet."""
    if study is None or study.so_far.missing:
        return ["missing", *["—"] * (len(COLUMNS) - 1)]
    seeds, partial, study = study.seeds, study.missing, study.so_far
    done = [row for row in study.runs if row.record]
    if not done:
        return ["diverged", *["—"] * (len(COLUMNS) - 2), flag(study)]
    questions = done[0].number(metrics.EVAL_EXAMPLES)
    low, high = interval(study)
    first, shares = done[0], [100 * _share(row) for row in study.runs]
    error = f" ± {standard_error(shares):.1f}" if len(shares) > 1 else ""
    chosen = "—" if study.chosen is None else f"{study.chosen:g}"
    return [
        cited(f"{mean(shares):.1f}{error}", done),
        f"{', '.join(str(row.number(metrics.TUNED_CORRECT)) for row in done)} / {questions}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        percent(_mean(done, metrics.TUNED_OPTION_ACCURACY)),
        str(sum(row.number(metrics.TUNED_UNPARSED) for row in done)),
        percent(_mean(done, metrics.TRAIN_ACCURACY)),
        percent(first.found(metrics.COMPRESSED_ACCURACY)),
        percent(first.found(metrics.DENSE_ACCURACY)),
        seeds,
        f"{chosen} of {', '.join(f'{rate:g}' for rate in sorted(study.grid))}",
        study.edge,
        f"{first.number(metrics.TRAINABLE_PARAMETERS) / 1e6:,.2f}M",
        "—" if partial else flag(study) or "—",
    ]


def interval(study: Study) -> tuple[float, float]:
    """95 % around the mean share: by the questions, of which seeds are not more, or by seeds that disagree more."""
    shares = [_share(row) for row in study.runs]
    questions = next(row for row in study.runs if row.record).number(metrics.EVAL_EXAMPLES)
    low, high = wilson(mean(shares) * questions, questions)
    if len(shares) > 1:
        half = t_quantile(len(shares) - 1, T_TAILS) * standard_error(shares)
        low, high = min(low, mean(shares) - half), max(high, mean(shares) + half)
    return max(0.0, low), min(1.0, high)


def _answers(study: Study) -> list[list[bool]]:
    """By seed and question; a run that diverged has no right answer."""
    found = [verdicts(row.folder) for row in study.runs if row.record]
    return found + [[False] * len(found[0]) for row in study.runs if row.diverged]


def _mean(rows: Sequence[Row], metric: metrics.Metric) -> float | None:
    found = [row.found(metric) for row in rows]
    return None if None in found else mean(found)


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)


def higher(found: dict[tuple[str, str], Study], places: Sequence[str], column: str, other: str) -> Outcomes:
    """Whether the mean accuracy of `column` lies above that of `other`; None where the better one did not train."""
    outcomes: Outcomes = {}
    for place in places:
        pair = found.get((place, column)), found.get((place, other))
        ours, theirs = map(accuracy, pair)
        known = None not in (ours, theirs) and not flag(pair[0] if ours > theirs else pair[1])
        outcomes[place] = ours > theirs if known else None
    return outcomes


def surely_higher(found: dict[tuple[str, str], Study], places: Sequence[str], column: str, other: str) -> Outcomes:
    """The same, where besides neither the questions nor the seeds are chance; of one seed each McNemar's test."""
    above = higher(found, places, column, other)
    return {
        place: outcome and _surely_more(found[place, column], found[place, other]) if outcome else outcome
        for place, outcome in above.items()
    }


def _surely_more(ours: Study, theirs: Study) -> bool | None:
    if not all(any(row.record for row in study.runs) for study in (ours, theirs)):
        return None
    one, two = _answers(ours), _answers(theirs)
    if len(one[0]) != len(two[0]):
        return None
    # Right answers to each question, over all seeds, as if both had as many.
    pairs = zip(zip(*one, strict=True), zip(*two, strict=True), strict=True)
    by_questions = sign_flips([len(two) * sum(a) - len(one) * sum(b) for a, b in pairs]) < SURE
    if len(one) == len(two) == 1:
        return by_questions
    first, second = ({row.cell["seed"]: _share(row) for row in study.runs} for study in (ours, theirs))
    by_seeds = surely_positive([first[seed] - second[seed] for seed in first if seed in second])
    return None if by_seeds is None else by_questions and by_seeds


def verdicts(folder: Path, stage: str = "tuned") -> list[bool]:
    """Whether each answer of a run was right, in the order of the questions."""
    file = folder / f"answers-{stage}.jsonl"
    # Not splitlines(): questions hold separators such as U+0085, which do not end a line of a jsonl.
    return [json.loads(line)["verdict"] == "right" for line in file.read_text().split("\n") if line]
