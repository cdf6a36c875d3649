"""Every mode: one compressed model tuned in every way there is, each at its own best learning rate.

Cost: laptop 57 runs and at least 38 that follow, 18 of them Table 5's, about 4 minutes each on one CPU core; paper 57
runs and more, never measured.

The paper compares three modes. Here are all that train without a GPU, on the model of Table 5 at err 0.3, equal in
tokens and precision. What they train differs, from the singular values alone to every compressible weight, and so does
what is left: some let the rank of the factors grow. Both stand in the table.
"""

from collections.abc import Sequence

from experiments import table5, tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import factors
from experiments.tuned import better, sure
from experiments.tuning import SURELY, Study, studies, then  # noqa: F401, the cells that follow
from welore import metrics
from welore.plots import scatter_figure

NEEDS = tuning.NEEDS
ERR = 0.3
MODES = ["welore", "nlrc", "full", "random", "lisa", "galore", "fira", "apollo", "muon"]
MODES += ["lora", "rslora", "lora_plus", "dora", "pissa", "mica", "randlora", "osf", "sv", "lora_xs"]
OURS = "welore"


def cells(scale: str) -> list[Cell]:
    """The cells of Table 5 at one err, for all modes."""
    start = next(cell for cell in table5.starts(scale) if cell["err"] == ERR)
    return [cell for mode in MODES for cell in tuning.grid(start | {"mode": mode})]


def render(rows: Sequence[Row]) -> Page:
    found = {study.cell["mode"]: study for study in studies(rows)}
    lines = [([mode, _after(study)], study) for mode, study in found.items()]
    page = tuned.page(["mode", "parameters after"], lines, rows, claims(found), factors(rows), "claim")
    trained = {mode: tuned.value(study, metrics.TRAINABLE_PARAMETERS) for mode, study in found.items()}
    if not any(study.missing for study in found.values()):
        points = {mode: (count / 1e6, found[mode].perplexity) for mode, count in trained.items() if count is not None}
        title = f"{rows[0].cell['model']}, err {ERR:g}, {rows[0].cell['task/training']} training"
        page.figures = {"": scatter_figure(points, title, "trained parameters, millions", "perplexity after training")}
    return page


def _after(study: Study) -> str:
    """Of the model that a mode leaves: adapters on products let their rank grow."""
    count = tuned.value(study.so_far, metrics.TUNED_PARAMETERS)
    return "—" if count is None else f"{count / 1e6:,.1f}M"


def claims(found: dict[str, Study]) -> list[Claim]:
    others = [mode for mode in found if mode != OURS]
    seeded = {(mode, side): found[name] for mode in others for side, name in (("it", mode), ("ours", OURS))}
    text = "tuning the LRCs alone is better than every other mode"
    return [
        Claim(text, None, better(seeded, others, "ours", "it")),
        *sure(f"the same, {SURELY}", seeded, others, "ours", "it"),
    ]
