"""Recover: what a better cut is still worth after tuning: perplexity after 0, 30k and 300k tokens of LRC-only tuning.

Cost: laptop 9 runs and 17 that follow, 5 hours on 2 CPU cores; paper at least 12 runs, never measured.

On one core a run of 30k tokens took about 205 seconds, one of 300k tokens half an hour.

Three cuts at the same keep: WeLore's own, its ranks with whitened factors, and K-FAC factors at Lagrange ranks, all
calibrated on the text that they are tuned on. The learning rate of each is chosen on 30k tokens, and taken for 300k.
"""

from collections.abc import Sequence

from experiments import tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import MODELS, setting
from experiments.tuned import Numbers, better, lower, sure
from experiments.tuning import SURELY, Study, studies
from welore.plots import lines_figure

NEEDS = tuning.NEEDS
KEEP = 0.8
TOKENS = [30_000, 300_000]
_WELORE = {"ranks": "welore", "ranks.dense": "break_even"}
STARTS: dict[str, Cell] = {
    "welore + plain": {"svd": "plain", **_WELORE},
    "welore + whitened": {"svd": "whitened", **_WELORE},
    "lagrange + kfac": {"svd": "kfac", "ranks": "lagrange"},
}


def cells(scale: str) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "keep": KEEP, "mode": "welore", "task.training.tokens": TOKENS[0]}
    return [cell for start in STARTS.values() for cell in tuning.grid(shared | setting(scale) | start)]


def then(scale: str, rows: Sequence[Row]) -> list[Cell]:
    """The other seeds on the fewer tokens, and every seed on the more, at the rate that the fewer have chosen."""
    fewer = [row for row in rows if row.cell["task.training.tokens"] == TOKENS[0]]
    longer = tuning.carried(scale, tuning.wide_enough(fewer), [{"task.training.tokens": TOKENS[1]}])
    return tuning.then(scale, fewer) + longer


def render(rows: Sequence[Row]) -> Page:
    found = {_place(study): study for study in studies(rows)}
    numbers: Numbers = {place: study.perplexity for place, study in found.items()}
    for start in STARTS:
        numbers["0", start] = found[str(TOKENS[0]), start].untuned
    lines = [([start, tokens], study) for (tokens, start), study in found.items()]
    rate = f"{TOKENS[1]:,} tokens: at the rate that was chosen on {TOKENS[0]:,}, on every seed"
    notes = ["untuned: 0 tokens", rate]
    page = tuned.page(["cut", "tokens"], lines, rows, claims(found, numbers), notes, "claim")
    if len(numbers) == len(STARTS) * (1 + len(TOKENS)) and None not in numbers.values():
        page.figures = {"": _figure(numbers, next(iter(found.values())).cell["model"])}
    return page


def _place(study: Study) -> tuple[str, str]:
    return str(study.cell["task.training.tokens"]), cut(study.cell)


def cut(cell: Cell) -> str | None:
    """Which of STARTS a cell is tuned from; None where it is no cell of this artefact."""
    return next((name for name, options in STARTS.items() if {"keep": KEEP, **options}.items() <= cell.items()), None)


def _figure(numbers: Numbers, model: str):
    tokens = [0, *TOKENS]
    lines = {start: [(count / 1000, numbers[str(count), start]) for count in tokens] for start in STARTS}
    title = f"{model}, keep {KEEP:g}"
    return lines_figure({"LRC-only tuning": lines}, title, "thousand training tokens", "perplexity", "log")


def claims(found: dict[tuple[str, str], Study], numbers: Numbers) -> list[Claim]:
    plain, whitened, best = STARTS
    tuned_places = [str(tokens) for tokens in TOKENS]

    def claim(start: str, other: str) -> Claim:
        outcomes = lower(numbers, ["0"], start, other) | better(found, tuned_places, start, other)
        return Claim(f"{start} is better than {other}, before and after tuning", None, outcomes)

    return [
        claim(whitened, plain),
        claim(best, whitened),
        *sure(f"{best} is better than {plain} after tuning, {SURELY}", found, tuned_places, best, plain),
        Claim(
            f"{best}, never tuned, is better than {plain} after {TOKENS[-1]:,} tokens",
            None,
            _untuned_beats(numbers, best, plain),
        ),
    ]


def _untuned_beats(numbers: Numbers, start: str, other: str) -> dict[str, bool | None]:
    crossed = {("", start): numbers["0", start], ("", other): numbers.get((str(TOKENS[-1]), other))}
    return {f"0 against {TOKENS[-1]:,} tokens": lower(crossed, [""], start, other)[""]}
