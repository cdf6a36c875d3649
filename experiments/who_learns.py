"""Who learns: LRCs, N-LRCs, random weights or all, tuned where LRCs, N-LRCs or nothing were compressed (claim C8).

Cost: laptop 60 runs and 51 that followed, under 4 hours on 2 busy CPU cores; paper at least 60, never measured.

The paper says that LRCs learn better than N-LRCs, and shows it on a model that was damaged in the LRCs alone, where
only they can repair it. Here the same division, WeLore's at one err, is tuned after damage on either side and after
none. The N-LRCs are cut to the keep of WeLore's cut. Both cuts are made with plain factors, as in the paper, and with
K-FAC's at the same ranks: plain ones may leave a small model that no tuning mends, of which nothing can be learnt.

Equal parameters: every set but `all` trains as many as the factors of WeLore's LRCs hold, in whole weights chosen at
random, and all the normalization weights; `all` trains more. Tokens are equal.
"""

from collections.abc import Sequence
from itertools import product

from experiments import tuned, tuning
from experiments.cells import Cell, Row
from experiments.page import Claim, Page
from experiments.scales import MODELS, calibrated_on, setting
from experiments.tuned import better, sure
from experiments.tuning import SURELY, Study, studies, then  # noqa: F401, `then` are the cells that follow

NEEDS = tuning.NEEDS
ERR = 0.3
LRC: Cell = {"ranks": "welore"}
NLRC: Cell = {"ranks": "partition", "ranks.cut": "nlrc"}
DAMAGES: dict[str, Cell] = {
    "LRC": LRC | {"svd": "plain"},
    "LRC by K-FAC": LRC | {"svd": "kfac"},
    "N-LRC": NLRC | {"svd": "plain"},
    "N-LRC by K-FAC": NLRC | {"svd": "kfac"},
    "nothing": {"ranks": "partition", "ranks.cut": "nothing"},
}
REPAIRED = [name for name, options in DAMAGES.items() if options["ranks"] == "welore"]
UNDAMAGED = [name for name in DAMAGES if name not in REPAIRED]
WHO = {"LRC": "lrc", "N-LRC": "nlrc", "random": "random", "all": "all"}


def cells(scale: str) -> list[Cell]:
    shared = {"model": MODELS[scale][0], "err": ERR, "mode": "chosen"} | setting(scale)
    damages = [d | calibrated_on(scale, "c4") if d.get("svd") == "kfac" else d for d in DAMAGES.values()]
    starts = [shared | damage | {"mode.who": who} for damage, who in product(damages, WHO.values())]
    return [cell for start in starts for cell in tuning.grid(start)]


def render(rows: Sequence[Row]) -> Page:
    found = {_place(study): study for study in studies(rows)}
    lines = [([damage, who], study) for (damage, who), study in found.items()]
    notes = ["err and keep are those of the model that is tuned; the division is WeLore's at err 0.3 in every line"]
    return tuned.page(["compressed", "tuned set"], lines, rows, claims(found), notes, "claim")


def _place(study: Study) -> tuple[str, str]:
    return damage_of(study.cell), next(name for name, who in WHO.items() if who == study.cell["mode.who"])


def damage_of(cell: Cell) -> str:
    return next(name for name, options in DAMAGES.items() if options.items() <= cell.items())


def place(cell: Cell) -> str | None:
    """Who is tuned after what; None where it is no cell of this artefact."""
    if cell["mode"] != "chosen":
        return None
    return f"{damage_of(cell)} cut: {cell['mode.who']} tuned"


def claims(found: dict[tuple[str, str], Study]) -> list[Claim]:
    cut_nlrcs = [name for name in UNDAMAGED if name != "nothing"]

    def claim(text: str, places: Sequence[str], who: str, other: str) -> list[Claim]:
        return [
            Claim(text, None, better(found, places, who, other)),
            *sure(f"{text}, {SURELY}", found, places, who, other),
        ]

    return [
        *claim(
            "LRCs learn better than N-LRCs where LRCs were compressed (the paper's case)", REPAIRED, "LRC", "N-LRC"
        ),
        *claim("LRCs learn better than N-LRCs where they were not compressed (C8)", UNDAMAGED, "LRC", "N-LRC"),
        *claim("LRCs learn better than random weights, whatever was compressed", list(DAMAGES), "LRC", "random"),
        *claim("what was compressed learns better than what was not: N-LRCs", cut_nlrcs, "N-LRC", "LRC"),
    ]
