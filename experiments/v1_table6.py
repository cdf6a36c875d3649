"""Table 6 of the first version: perplexity of a chat model on WikiText-2, plain and activation-guided factors.

Cost: laptop 20 runs, 12 minutes on one CPU core; paper 20 runs, never measured.

ActSVD is svd=whitened: the least Frobenius norm of the change of the outputs, calibrated on WikiText-2 (A.1). The
paper prints no dense perplexity and no protocol, and the reader of WikiText-2 in the authors' code fails; at paper
scale the text is joined and cut as that code does with C4. The default model, SmolLM2-135M, is a chat model too.
"""

from collections.abc import Sequence

from experiments.cells import Cell, Row
from experiments.grid import NAN, Grid, Numbers, Published, best, better
from experiments.page import Claim, Page
from experiments.scales import calibrated_on, setting

NEEDS = ()
MODELS = {"laptop": ["smollm2_135m"], "paper": ["llama2_7b_chat"]}
GRID = Grid(
    {
        "uniform": {"svd": "plain", "ranks": "uniform", "mode": "none"},
        "WeLore": {"svd": "plain", "ranks": "welore", "mode": "none"},
        "uniform, ActSVD": {"svd": "whitened", "ranks": "uniform", "mode": "none"},
        "WeLore, ActSVD": {"svd": "whitened", "ranks": "welore", "mode": "none"},
    },
    {
        "llama2_7b_chat": Published(
            "LLaMa-2 7B chat",
            None,
            {
                "uniform": [10.97, 63.63, NAN, 28027.73, 22029.66],
                "WeLore": [6.65, 8.09, 19.60, 254.74, 3209.67],
                "uniform, ActSVD": [6.60, 7.08, 8.43, 12.56, 26.02],
                "WeLore, ActSVD": [6.53, 6.90, 8.24, 10.94, 15.80],
            },
        )
    },
)


def cells(scale: str) -> list[Cell]:
    return GRID.cells(MODELS[scale], setting(scale, "wikitext2") | calibrated_on(scale, "wikitext2"))


def render(rows: Sequence[Row]) -> Page:
    return GRID.page(rows, ["ActSVD: svd=whitened, calibrated on the texts of the task"], claims)


def claims(models: Sequence[str], ours: Numbers) -> list[Claim]:
    def claim(text, *comparison) -> Claim:
        return GRID.claim(text, models, ours, *comparison)

    return [
        claim("WeLore ranks are better than uniform ones (A.1)", better, "WeLore", "uniform"),
        claim("ActSVD is better than plain SVD with uniform ranks (5.2.1)", better, "uniform, ActSVD", "uniform"),
        claim("WeLore ranks gain from ActSVD (5.2.1)", better, "WeLore, ActSVD", "WeLore"),
        claim(
            "WeLore with ActSVD is the best at every err (A.1)",
            best,
            "WeLore, ActSVD",
            ["uniform", "WeLore", "uniform, ActSVD"],
        ),
    ]
