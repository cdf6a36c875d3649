"""Table 5: perplexity and memory of LoRA, GaLore and WeLore tuning of the same compressed model, by rank reduction.

Cost: laptop 27 runs and 42 or so that follow, about 3 hours on 2 CPU cores; paper at least 72, never measured.

It holds the memory rows of Table 4 in the paper's first version. The paper tunes all three at one learning rate; here
each has its own. At laptop scale the factors are K-FAC's at WeLore's ranks, as in Table 6: with plain ones the small
model is broken from err 0.4 on (Table 4), and no mode mends it on so few tokens. At err 0.3 the paper's plain ones
stand beside them. Rates are tried at err 0.3 and 0.5 there, and those of 0.5 are taken for 0.6 and 0.7. Memory of a
whole process on a CPU is not that of a GPU: on one, read the ratios.
"""

from collections.abc import Sequence
from itertools import product

from experiments import tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import MODELS, calibrated_on, factors, setting
from experiments.tuned import Numbers, better, bounded, lower, rising, sure, within
from experiments.tuning import SURELY, Study, studies
from welore import metrics

NEEDS = tuning.NEEDS
ERRS = [0.3, 0.5, 0.6, 0.7]
TRIED = {"laptop": [0.3, 0.5], "paper": ERRS}  # errs at which rates are tried; the others take those of the last one
MODES = ["lora", "galore", "welore"]
PARAMETERS = {"llama2_7b": [0.85, 0.67, 0.56, 0.45], "llama2_13b": [0.83, 0.64, 0.53, 0.43]}
PERPLEXITY = {
    "llama2_7b": {
        "lora": [8.21, 12.48, 21.23, 382.24],
        "galore": [9.02, 18.57, 396.05, 670.29],
        "welore": [8.18, 11.87, 17.87, 47.92],
    },
    "llama2_13b": {
        "lora": [7.49, 21.53, 27.99, 124.44],
        "galore": [8.02, 60.07, 2454.03, 3396.19],
        "welore": [7.42, 11.40, 19.20, 73.59],
    },
}
MEGABYTES = {
    "llama2_7b": {
        "lora": [26_859, 25_129, 24_621, 23_711],
        "galore": [29_773, 25_673, 24_155, 22_777],
        "welore": [30_197, 28_281, 27_193, 25_955],
    },
    "llama2_13b": {
        "lora": [46_162, 42_293, 41_191, 40_513],
        "galore": [54_378, 45_810, 41_703, 37_448],
        "welore": [52_452, 47_091, 43_136, 42_922],
    },
}


def cells(scale: str) -> list[Cell]:
    return [cell for start, mode in product(starts(scale), MODES) for cell in tuning.grid(start | {"mode": mode})]


def starts(scale: str) -> list[Cell]:
    """The compressed models at which rates are tried."""
    shared = {"ranks": "welore"} | setting(scale)
    plain = [{"model": model, "err": err} | shared for model, err in product(MODELS[scale][:2], TRIED[scale])]
    if scale == "paper":
        return plain
    sound = [start | {"svd": "kfac"} | calibrated_on(scale, "c4") for start in plain]
    return [*sound, *(start for start in plain if start["err"] == TRIED[scale][0])]


def then(scale: str, rows: Sequence[Row]) -> list[Cell]:
    """Wider grids and other seeds; and the models that take the rates which won at the last err with a grid."""
    tried = [row for row in rows if row.cell["err"] in TRIED[scale]]
    last = [row for row in tuning.wide_enough(tried) if row.cell["err"] == TRIED[scale][-1]]
    rest = [{"err": err} for err in ERRS if err not in TRIED[scale]]
    return tuning.then(scale, tried) + tuning.carried(scale, last, rest)


def render(rows: Sequence[Row]) -> Page:
    found = sorted(studies(rows), key=lambda study: (_factors(study) == "plain", study.cell["err"]))
    head = ["model", "factors", "err asked", "mode", "paper, parameters", "paper, tuned", "paper, MB"]
    notes = ["beside a model that the paper does not have stand its numbers for LLaMa-2 7B", *factors(rows)]
    if any(len(study.grid) == 1 for study in found):
        notes.append("one learning rate alone: the one that won at the last err where several were tried")
    return tuned.page(head, [(_labels(study), study) for study in found], rows, claims(found), notes)


def _labels(study: Study) -> list[str]:
    model, mode, err = study.cell["model"], study.cell["mode"], study.cell["err"]
    place = ERRS.index(err)
    beside = model if model in PERPLEXITY else "llama2_7b"
    share, after, memory = PARAMETERS[beside], PERPLEXITY[beside][mode], MEGABYTES[beside][mode]
    printed = [f"{share[place]:g}", f"{after[place]:,.2f}", f"{memory[place]:,}"]
    return [model, _factors(study), f"{err:g}", mode, *printed]


def _factors(study: Study) -> str:
    return study.cell.get("svd", "plain")


def claims(found: Sequence[Study]) -> list[Claim]:
    lines: dict[tuple[str, str], dict[str, None]] = {}  # by model and factors its places, by err
    seeded = {}
    for study in found:
        model, cut = study.cell["model"], _factors(study)
        place = " ".join([_place(model, study.cell["err"]), *([cut] if cut != "plain" else [])])
        lines.setdefault((model, cut), {})[place] = None
        seeded[place, study.cell["mode"]] = study
    ours = {place: study.perplexity for place, study in seeded.items()}

    by_line = [list(places) for places in lines.values()]
    theirs_by_model = [[_place(model, err) for err in ERRS] for model in PERPLEXITY]
    places, their_places = sum(by_line, []), sum(theirs_by_model, [])

    def claim(text: str, mode: str) -> Claim:
        paper = lower(printed(PERPLEXITY), their_places, "welore", mode)
        return Claim(text, paper, better(seeded, places, "welore", mode))

    return [
        claim("WeLore is better than LoRA at every err (Table 5)", "lora"),
        claim("WeLore is better than GaLore at every err (Table 5)", "galore"),
        *sure(f"the same, below lora {SURELY}", seeded, places, "welore", "lora"),
        *sure(f"the same, below galore {SURELY}", seeded, places, "welore", "galore"),
        Claim(
            "the benefit over LoRA grows with err (first version, 5.2.2)",
            rising(printed(PERPLEXITY), theirs_by_model, "lora", "welore"),
            rising(ours, by_line, "lora", "welore"),
        ),
        Claim(
            "memory is close to LoRA's, at most 1.2 of it (Section 4.2, 3)",
            bounded(printed(MEGABYTES), their_places, "welore", "lora", 0.0, 1.2),
            within(seeded, metrics.TRAIN_PEAK_GIB, places, "welore", "lora", 0.0, 1.2),
        ),
    ]


def printed(numbers: dict[str, dict[str, list]]) -> Numbers:
    return {
        (_place(model, err), mode): value
        for model, columns in numbers.items()
        for mode, line in columns.items()
        for err, value in zip(ERRS, line, strict=True)
    }


def _place(model: str, err: float) -> str:
    return f"{model} {err:g}"
