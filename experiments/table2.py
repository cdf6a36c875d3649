"""Table 2: models compressed by 25 % on real-world tasks: dense, uniform, OWL, SVD-LLM and WeLore models.

Cost: laptop 5 runs of 1 to 3 minutes on 2 CPU cores, 5 or 10 more with news or a judge; paper 15 runs, 10 pay a judge.

None was made at paper scale; there are about 2,300 judgments. Conversations and summaries are rated by the judge that
$WELORE_JUDGE names. Where it names none that is judge=openai at paper scale. At laptop scale there are then facts, and
summaries by their ROUGE-L alone, for a small model cannot judge: 5 runs of some 4 minutes by the speed of the model,
none of which was made, for there was no news. ROUGE-L (pip install -e .[tasks]) stands in rows and claims of its own,
beside a judge too: it is no number of the paper. At laptop scale TriviaQA stands in for FreebaseQA, which is partly
collected from it, conversations and summaries are few, and all need their local files.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.asked import SURE, verdicts
from experiments.cells import Cell, Row
from experiments.compare import budget, measured
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, calibrated_on, judge, local
from welore import metrics
from welore.counts import mcnemar, wilson
from welore.report import number

NEEDS = ("answers-compressed.jsonl",)
ERR = 0.25
METHODS: dict[str, Cell] = {
    "dense": {"err": 0.0, "ranks": "welore"},
    "uniform": {"err": ERR, "ranks": "uniform"},
    "OWL": {"err": ERR, "ranks": "owl"},
    "SVD-LLM": {"err": ERR, "ranks": "uniform", "svd": "whitened"},
    "WeLore": {"err": ERR, "ranks": "welore"},
}


@dataclass(frozen=True)
class Kind(ABC):
    """What a task is measured by, and the paper's numbers by method; none where it is ours alone."""

    title: str
    digits: int
    paper: dict[str, float]

    @abstractmethod
    def value(self, row: Row) -> float | None:
        """In the unit of the paper; None where nothing could be read."""

    @abstractmethod
    def shown(self, row: Row) -> list[str]:
        """What the value is of, how sure it is, and how much could not be read."""

    @abstractmethod
    def differs(self, row: Row, other: Row) -> float:
        """The p-value that both are as often the better one, on the same questions."""


class Answers(Kind):
    """Right answers, in percent."""

    def value(self, row):
        return 100 * row.number(metrics.COMPRESSED_CORRECT) / row.number(metrics.EVAL_EXAMPLES)

    def shown(self, row):
        right, asked = (row.number(metric) for metric in (metrics.COMPRESSED_CORRECT, metrics.EVAL_EXAMPLES))
        low, high = wilson(right, asked)
        unread = row.found(metrics.EVAL_UNPARSED) + (row.found(metrics.COMPRESSED_BROKEN) or 0)
        return [f"{right} / {asked}", f"{100 * low:.1f} to {100 * high:.1f}", str(unread)]

    def differs(self, row, other):
        return mcnemar(*(verdicts(r.folder, "compressed") for r in (row, other)))


class Ratings(Kind):
    """The mean rating of a judge, of 10."""

    def value(self, row):
        return whole(row, metrics.COMPRESSED_SCORE)

    def shown(self, row):
        judged, unjudged = (row.found(m) for m in (metrics.COMPRESSED_JUDGED, metrics.COMPRESSED_UNJUDGED))
        return [f"{judged} of {judged + unjudged} ratings", "—", str(unjudged)]

    def differs(self, row, other):
        return _sign_test(ratings(row.folder), ratings(other.folder))


class Overlap(Kind):
    """ROUGE-L of summaries with the highlights of their articles, from 0 to 1."""

    def value(self, row):
        return whole(row, metrics.COMPRESSED_ROUGE_L)

    def shown(self, row):
        return [f"{row.number(metrics.EVAL_EXAMPLES)} summaries", "—", "—"]

    def differs(self, row, other):
        return _sign_test(*([line["rouge_l"] for line in _answers(r.folder)] for r in (row, other)))


def whole(row: Row, mean: metrics.Metric) -> float | None:
    """A mean over all answers; None where the model broke at one: that of the others would be another one's."""
    return None if row.found(metrics.COMPRESSED_BROKEN) else row.found(mean)


def _sign_test(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """Ties do not count, nor questions that one of both has no number for."""
    pairs = zip(ours, theirs, strict=True)
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    return mcnemar([one > other for one, other in both], [other > one for one, other in both])


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NEEDS[0]).read_text(encoding="utf-8").split("\n")[:-1]]


def ratings(folder: Path) -> list[float | None]:
    """The mean rating of each question of a run, in their order; None where one of its ratings could not be read."""
    rated = [[judgment["ratings"] for judgment in line["judgments"]] for line in _answers(folder)]
    return [None if None in found else fmean(v for one in found for v in one.values()) for found in rated]


def _paper(*numbers: float) -> dict[str, float]:
    return dict(zip(METHODS, numbers, strict=True))


FACTS = Answers("facts, %", 1, _paper(79.02, 34.63, 54.42, 71.95, 71.89))
CONVERSATION = Ratings("conversation, of 10", 2, _paper(7.61, 4.88, 5.27, 5.79, 6.09))
SUMMARIES = Ratings("summaries, of 10", 2, _paper(8.15, 5.01, 5.16, 6.12, 6.46))
ROUGE = Overlap("summaries, ROUGE-L", 4, {})
EVERY = (FACTS, CONVERSATION, SUMMARIES)  # that the paper prints
KINDS = {"freebaseqa": FACTS, "triviaqa": FACTS, "mt_bench": CONVERSATION, "cnn_dailymail": SUMMARIES}


def kinds_of(cell: Cell) -> list[Kind]:
    """What the run of a cell is measured by: a summary has its ROUGE, whether a judge rates it too or not."""
    if cell["task"] != "cnn_dailymail":
        return [KINDS[cell["task"]]]
    return [SUMMARIES, ROUGE] if "judge" in cell else [ROUGE]


# A conversation of each category, and as many summaries as take minutes.
FEW: dict[str, Cell] = {
    "mt_bench": {"task.limit": 8, "task.new_tokens": 256},
    "cnn_dailymail": {"task.per_class": 4},
}


def tasks(scale: str) -> list[Cell]:
    rated = judge(scale)
    if scale == "paper":
        # The model has 4,096 positions, and a word of news takes up to two tokens.
        articles = {"task": "cnn_dailymail", "task.most_words": 1900}
        return [{"task": "freebaseqa"}, {"task": "mt_bench"} | rated, articles | rated]
    facts = {"task": "triviaqa", "task.limit": 300} | _local("triviaqa")
    few = [{"task": task} | few | _local(task) | rated for task, few in FEW.items() if _local(task)]
    return [facts, *(task for task in few if rated or task["task"] == "cnn_dailymail")]


def _local(task: str) -> Cell:
    there = local("tasks") / task
    return {"task.path": str(there)} if there.is_dir() else {}


def cells(scale: str) -> list[Cell]:
    shared = {"model": "llama2_7b_chat" if scale == "paper" else MODELS[scale][0], "mode": "none"}
    if scale == "paper":
        calibration = {"calibration": "wikitext2", "amounts@calibration": "field"}
    else:
        calibration = calibrated_on(scale, "c4")
    return [shared | task | calibration | options for task, options in product(tasks(scale), METHODS.values())]


@dataclass(frozen=True)
class Column:
    """The runs of a task by method, seen by one of its kinds."""

    task: str
    kind: Kind
    rows: dict[str, Row]


def render(rows: Sequence[Row]) -> Page:
    asked = list(dict.fromkeys(row.cell["task"] for row in rows))
    pairs = dict(zip(product(asked, METHODS), rows, strict=True))
    by_method = {task: {method: pairs[task, method] for method in METHODS} for task in asked}
    found = [Column(task, kind, runs) for task, runs in by_method.items() for kind in kinds_of(runs["dense"].cell)]
    header = ["task", "measure", "method", "paper", "err", "keep", "parameters", "ours", "of", "95 %", "not read"]
    header += ["differs from dense, p"]
    notes = [
        "facts: exact match of the first line with any alias; every question counts; 95 %: Wilson's interval",
        "p: exact sign test on the same questions, by right answers (McNemar), the higher mean rating or the higher "
        "ROUGE-L",
        "the paper's facts are FreebaseQA's; its conversations and summaries are judged by GPT-4 beside answers of "
        "GPT-3.5, ours one by one",
        *_elsewhere([column.kind for column in found]),
    ]
    body = [_line(column, method) for column in found for method in METHODS]
    return Page(header, body, [*notes, *measured(rows)], claims(found))


def _elsewhere(kinds: Sequence[Kind]) -> list[str]:
    """What the paper prints of tasks that have no rows here."""
    left = [kind for kind in EVERY if kind not in kinds]
    return [
        f"not asked here, {kind.title}: {', '.join(f'{method} {value:g}' for method, value in kind.paper.items())}; a "
        f"judge is named by WELORE_JUDGE='judge=local judge.path=FOLDER' or 'judge=openai'"
        for kind in left
    ]


def _line(found: Column, method: str) -> list[str]:
    kind, row, dense = found.kind, found.rows[method], found.rows["dense"]
    printed = f"{kind.paper[method]:g}" if kind.paper else "—"
    labels = [found.task, kind.title, method, printed]
    if row.missing:
        return [*labels, *["—"] * 3, "missing", *["—"] * 4]
    known = method != "dense" and not dense.missing and None not in (kind.value(row), kind.value(dense))
    p = f"{kind.differs(row, dense):.3g}" if known else "—"
    ours = cited(number(kind.value(row), kind.digits), [row])
    return [*labels, *budget(row), ours, *kind.shown(row), p]


def claims(found: Sequence[Column]) -> list[Claim]:
    """Of the numbers that the paper prints, then of ROUGE-L."""

    def claim(text: str, better: str, worse: str, *kinds: Kind) -> list[Claim]:
        of_kinds = [column for column in found if column.kind in kinds]
        printed: Outcomes = {kind.title: kind.paper[better] > kind.paper[worse] for kind in kinds if kind.paper}
        both = [
            Claim(
                f"{text} (Table 2)" if printed else text, printed or None, _outcomes(of_kinds, better, worse, _above)
            ),
            Claim(f"{text}, sign test p < {SURE:g}", None, _outcomes(of_kinds, better, worse, _surely_above)),
        ]
        return [claim for claim in both if claim.ours]  # none where no task of the kind is asked

    return [
        *claim("WeLore is better than uniform ranks", "WeLore", "uniform", *EVERY),
        *claim("WeLore is better than OWL ranks", "WeLore", "OWL", *EVERY),
        *claim("SVD-LLM answers more facts than WeLore", "SVD-LLM", "WeLore", FACTS),
        *claim("WeLore is rated higher than SVD-LLM", "WeLore", "SVD-LLM", CONVERSATION, SUMMARIES),
        _dense_is_best([column for column in found if column.kind in EVERY]),
        *claim("WeLore has a higher ROUGE-L than uniform ranks", "WeLore", "uniform", ROUGE),
        *claim("WeLore has a higher ROUGE-L than OWL ranks", "WeLore", "OWL", ROUGE),
        *claim("WeLore has a higher ROUGE-L than SVD-LLM", "WeLore", "SVD-LLM", ROUGE),
    ]


def _dense_is_best(found: Sequence[Column]) -> Claim:
    printed, ours = {}, {}
    for method in [name for name in METHODS if name != "dense"]:
        printed |= {f"{k.title} {method}": k.paper["dense"] > k.paper[method] for k in EVERY}
        above = _outcomes(found, "dense", method, _above)
        ours |= {f"{task} {method}": outcome for task, outcome in above.items()}
    return Claim("the dense model is best (Table 2)", printed, ours)


def _outcomes(
    found: Sequence[Column], better: str, worse: str, holds: Callable[[Kind, Row, Row], bool | None]
) -> Outcomes:
    """By task, none of which may be measured by two kinds here."""
    pairs = {column.task: (column.kind, column.rows[better], column.rows[worse]) for column in found}
    return {
        task: None if one.missing or two.missing else holds(kind, one, two) for task, (kind, one, two) in pairs.items()
    }


def _above(kind: Kind, row: Row, other: Row) -> bool | None:
    ours, theirs = kind.value(row), kind.value(other)
    if ours == theirs == 0:  # nothing is left of either, so that nothing tells them apart
        return None
    return None if ours is None or theirs is None else ours > theirs


def _surely_above(kind: Kind, row: Row, other: Row) -> bool | None:
    above = _above(kind, row, other)
    return above and kind.differs(row, other) < SURE
