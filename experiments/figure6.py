"""Figure 6: WeLore, full and LoRA tuning of a 50 % compressed model on StrategyQA: loss, throughput, parameters.

Cost: laptop 9 runs and 6 that follow, a guess of 10 minutes each on 2 CPU cores; paper 9 runs, never measured.

It is Figure 8 of the paper's first version. The paper prints no number of it but what its text says. At laptop scale
the factors are K-FAC's, as in Table 6, and there are 60 steps: so small a model learns no facts in minutes, and the
curves are what the figure is about.
"""

from collections.abc import Sequence

from experiments import asked, tuned, tuning
from experiments.asked import SURELY, higher, surely_higher
from experiments.cells import Cell, Row
from experiments.compare import measured
from experiments.page import Claim, Page
from experiments.scales import MODELS, calibrated_on, factors, questions
from experiments.tuned import cheaper, training_picture, within
from experiments.tuning import Study, studies
from experiments.tuning import other_seeds as then  # noqa: F401, the cells that follow
from welore import metrics
from welore.report import number

NEEDS = asked.NEEDS
ERR = 0.5
MODES = ["welore", "full", "lora"]


def cells(scale: str) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "ranks": "welore", "err": ERR} | questions(scale, "strategyqa")
    if scale == "laptop":
        shared |= {"svd": "kfac", "task.training.steps": 60} | calibrated_on(scale, "c4")
    return [cell for mode in MODES for cell in tuning.grid(shared | {"mode": mode})]


def render(rows: Sequence[Row]) -> Page:
    found = {study.cell["mode"]: study for study in studies(rows)}
    head = ["mode", "err", "keep", "parameters", "training tokens/s", "peak GiB", *asked.COLUMNS]
    body = [[mode, *asked.budget(study), *_cost(study), *asked.values(study)] for mode, study in found.items()]
    steps = [f"{rows[0].cell['task.training.steps']} steps"] if "task.training.steps" in rows[0].cell else []
    costs = "tokens/s and peak GiB are those of seed 0; claims on them compare the modes seed by seed on one device, "
    costs += "and say nothing where the seeds disagree"
    page = Page(head, body, [*factors(rows), *steps, costs, *asked.NOTES, *measured(rows)], claims(found))
    picture = training_picture(found, f"{rows[0].cell['model']}, {rows[0].cell['task']}, err {ERR:g}")
    page.figures = {} if picture is None else {"": picture}
    return page


def _cost(study: Study) -> list[str]:
    costs = [(metrics.FIT_TOKENS_PER_SECOND, 0), (metrics.TRAIN_PEAK_GIB, 2)]
    return [number(tuned.value(study.so_far, metric), digits) for metric, digits in costs]


def claims(found: dict[str, Study]) -> list[Claim]:
    place = f"err {ERR:g}"
    seeded = {(place, mode): study for mode, study in found.items()}

    return [
        Claim(
            "WeLore has a higher throughput than LoRA (Section 4.2, 3)",
            None,
            cheaper(seeded, metrics.FIT_TOKENS_PER_SECOND, [place], "lora", "welore"),
        ),
        Claim(
            "WeLore needs less memory than full tuning (Section 4.2, 3)",
            None,
            cheaper(seeded, metrics.TRAIN_PEAK_GIB, [place], "welore", "full"),
        ),
        Claim(
            "WeLore's memory is close to LoRA's, at most 1.2 of it (Section 4.2, 3)",
            None,
            within(seeded, metrics.TRAIN_PEAK_GIB, [place], "welore", "lora", 0.0, 1.2),
        ),
        Claim("WeLore answers more questions than LoRA", None, higher(seeded, [place], "welore", "lora")),
        Claim(f"the same, {SURELY}", None, surely_higher(seeded, [place], "welore", "lora")),
    ]
