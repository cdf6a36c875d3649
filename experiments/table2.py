"""Table 2: models compressed by 25 % on real-world tasks: facts by dense, uniform, OWL, SVD-LLM and WeLore models.

Cost: laptop 5 runs of 1 to 3 minutes on 2 CPU cores; paper 5 runs, never measured.

Of the paper's three tasks only the first is here: facts, by exact match. Its conversations and summaries need a judge.
At laptop scale TriviaQA stands in for FreebaseQA, which is partly collected from it, and needs its local file.
"""

from collections.abc import Sequence

from experiments.asked import SURE, verdicts
from experiments.cells import Cell, Row
from experiments.compare import budget, measured
from experiments.page import Claim, Outcomes, Page
from experiments.scales import MODELS, calibrated_on, local
from welore import metrics
from welore.counts import mcnemar, wilson

NEEDS = ("answers-compressed.jsonl",)
ERR = 0.25
METHODS: dict[str, Cell] = {
    "dense": {"err": 0.0, "ranks": "welore"},
    "uniform": {"err": ERR, "ranks": "uniform"},
    "OWL": {"err": ERR, "ranks": "owl"},
    "SVD-LLM": {"err": ERR, "ranks": "uniform", "svd": "whitened"},
    "WeLore": {"err": ERR, "ranks": "welore"},
}
# Facts (%), conversation and summaries (judged, of 10), as printed.
PAPER = {
    "dense": (79.02, 7.61, 8.15),
    "uniform": (34.63, 4.88, 5.01),
    "OWL": (54.42, 5.27, 5.16),
    "SVD-LLM": (71.95, 5.79, 6.12),
    "WeLore": (71.89, 6.09, 6.46),
}


def cells(scale: str) -> list[Cell]:
    shared = {"model": "llama2_7b_chat" if scale == "paper" else MODELS[scale][0], "mode": "none"}
    if scale == "paper":
        shared |= {"task": "freebaseqa", "calibration": "wikitext2", "amounts@calibration": "field"}
    else:
        there = local("tasks/triviaqa")
        shared |= {"task": "triviaqa", "task.limit": 300} | ({"task.path": str(there)} if there.is_dir() else {})
        shared |= calibrated_on(scale, "c4")
    return [shared | options for options in METHODS.values()]


def render(rows: Sequence[Row]) -> Page:
    found = dict(zip(METHODS, rows, strict=True))
    header = ["method", "paper, %", "err", "keep", "parameters", "ours, %", "right / asked", "95 %", "nothing written"]
    header += ["differs from dense, p", "paper, conversation", "paper, summaries"]
    body = [_line(name, row, found["dense"]) for name, row in found.items()]
    notes = [
        "exact match of the first line with any alias; every question counts; 95 %: Wilson's interval",
        "p: McNemar's exact test on the same questions",
        "the paper's conversations and summaries are judged of 10 by GPT-4; ours are not made yet",
    ]
    return Page(header, body, [*notes, *measured(rows)], claims(found))


def _line(name: str, row: Row, dense: Row) -> list[str]:
    facts, conversation, summaries = PAPER[name]
    printed = [f"{conversation:g}", f"{summaries:g}"]
    if row.missing:
        return [name, f"{facts:g}", *["—"] * 3, "missing", *["—"] * 4, *printed]
    right, asked = (row.found(metric) for metric in (metrics.COMPRESSED_CORRECT, metrics.EVAL_EXAMPLES))
    low, high = wilson(right, asked)
    share, interval = f"{100 * right / asked:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
    unread = str(row.found(metrics.EVAL_UNPARSED))
    p = "—" if name == "dense" or dense.missing else f"{differs(row, dense):.3g}"
    return [name, f"{facts:g}", *budget(row), share, f"{right} / {asked}", interval, unread, p, *printed]


def differs(row: Row, other: Row) -> float:
    """The p-value that both are as often right, on the questions that both were asked."""
    return mcnemar(*(verdicts(r.folder, "compressed") for r in (row, other)))


def claims(found: dict[str, Row]) -> list[Claim]:
    def claim(text: str, better: str, worse: str) -> list[Claim]:
        above = _above(found[better], found[worse])
        surely = above and differs(found[better], found[worse]) < SURE
        return [
            Claim(f"{text} (Table 2)", {"facts": PAPER[better][0] > PAPER[worse][0]}, _place(above)),
            Claim(f"{text}, McNemar p < {SURE:g}", None, _place(surely)),
        ]

    return [
        *claim("WeLore answers more than uniform ranks", "WeLore", "uniform"),
        *claim("WeLore answers more than OWL ranks", "WeLore", "OWL"),
        *claim("SVD-LLM answers more than WeLore", "SVD-LLM", "WeLore"),
        Claim(
            "the dense model answers most (Table 2)",
            {name: PAPER["dense"][0] > PAPER[name][0] for name in METHODS if name != "dense"},
            {name: _above(found["dense"], found[name]) for name in METHODS if name != "dense"},
        ),
    ]


def _place(outcome: bool | None) -> Outcomes:
    return {"facts": outcome}


def _above(row: Row, other: Row) -> bool | None:
    if row.missing or other.missing:
        return None
    return row.found(metrics.COMPRESSED_CORRECT) > other.found(metrics.COMPRESSED_CORRECT)
