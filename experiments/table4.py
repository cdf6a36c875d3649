"""Table 4: perplexity that training the LRCs alone recovers, by effective rank reduction.

Cost: laptop 15 runs and 11 that followed, 5 of Figure 4, 41 minutes on 2 CPU cores; paper 45 runs, never measured.

The paper trains each model once, at one learning rate, on 0.7M tokens.
"""

from collections.abc import Sequence
from itertools import product

from experiments import tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import MODELS, setting
from experiments.tuned import Numbers, lower, rising
from experiments.tuning import Study, studies, then  # noqa: F401, the cells that follow

NEEDS = tuning.NEEDS
ERRS = [0.1, 0.2, 0.3, 0.4, 0.5]
PAPER = {
    "llama2_7b": ([7.13, 8.28, 14.41, 78.17, 1836.62], [7.15, 7.40, 8.18, 9.47, 11.87]),
    "llama2_13b": ([6.55, 6.96, 8.66, 24.92, 1142.53], [6.55, 6.68, 7.42, 8.69, 11.40]),
    "mistral_7b": ([8.76, 11.90, 30.69, 429.08, 1351.32], [8.32, 8.92, 9.71, 14.85, 21.37]),
}


def cells(scale: str) -> list[Cell]:
    shared = {"ranks": "welore", "mode": "welore"} | setting(scale)
    starts = [{"model": model, "err": err} | shared for model, err in product(MODELS[scale], ERRS)]
    return [cell for start in starts for cell in tuning.grid(start)]


def render(rows: Sequence[Row]) -> Page:
    found = studies(rows)
    head = ["model", "err asked", "paper, untuned", "paper, tuned"]
    notes = ["beside a model that the paper does not have stand its numbers for LLaMa-2 7B"]
    return tuned.page(head, [(_labels(study), study) for study in found], rows, claims(found), notes)


def _labels(study: Study) -> list[str]:
    untuned, after = PAPER.get(study.cell["model"], PAPER["llama2_7b"])
    place = ERRS.index(study.cell["err"])
    return [study.cell["model"], f"{study.cell['err']:g}", f"{untuned[place]:,.2f}", f"{after[place]:,.2f}"]


def claims(found: Sequence[Study]) -> list[Claim]:
    printed: Numbers = {}
    for model, columns in PAPER.items():
        for err, untuned, after in zip(ERRS, *columns, strict=True):
            printed |= {(f"{model} {err:g}", "untuned"): untuned, (f"{model} {err:g}", "tuned"): after}
    ours: Numbers = {}
    for study in found:
        place = f"{study.cell['model']} {study.cell['err']:g}"
        ours |= {(place, "untuned"): study.untuned, (place, "tuned"): study.perplexity}
    models = list(dict.fromkeys(study.cell["model"] for study in found))

    def lines(names: Sequence[str]) -> list[list[str]]:
        return [[f"{name} {err:g}" for err in ERRS] for name in names]

    def flat(names: Sequence[str]) -> list[str]:
        return [place for line in lines(names) for place in line]

    return [
        Claim(
            "tuning the LRCs lowers perplexity at every err (Table 4)",
            lower(printed, flat(list(PAPER)), "tuned", "untuned"),
            lower(ours, flat(models), "tuned", "untuned"),
        ),
        Claim(
            "the benefit of tuning grows with err (Section 4.2, 1)",
            rising(printed, lines(list(PAPER)), "untuned", "tuned"),
            rising(ours, lines(models), "untuned", "tuned"),
        ),
    ]
