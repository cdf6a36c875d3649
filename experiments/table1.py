"""Table 1: perplexity against effective rank reduction for uniform, OWL and WeLore ranks, and WeLore tuned.

Cost: laptop 20 runs, 5 of them Table 4's, the others 4 minutes on 2 CPU cores; paper 60 runs, never measured.

The tuned column is the gray one of Table 1 in the paper's first version, with the numbers of Table 4.
"""

from collections.abc import Sequence

from experiments.cells import Cell, Row
from experiments.grid import NAN, Grid, Numbers, Published, better, grows, worsens
from experiments.page import Claim, Page
from experiments.scales import MODELS, setting

NEEDS = ()
GRID = Grid(
    {
        "uniform": {"ranks": "uniform", "mode": "none"},
        "OWL": {"ranks": "owl", "mode": "none"},
        "WeLore": {"ranks": "welore", "mode": "none"},
        "WeLore tuned": {"ranks": "welore", "mode": "welore"},
    },
    {
        "llama2_7b": Published(
            "LLaMa-2 7B",
            7.03,
            {
                "uniform": [10.58, 16.43, 91.99, NAN, NAN],
                "OWL": [12.11, 14.49, NAN, NAN, NAN],
                "WeLore": [7.13, 8.28, 14.41, 78.17, 1836.62],
                "WeLore tuned": [7.15, 7.40, 8.18, 9.47, 11.87],
            },
        ),
        "llama2_13b": Published(
            "LLaMa-2 13B",
            6.53,
            {
                "uniform": [7.17, 8.61, 13.99, 1178.03, 4167.79],
                "OWL": [7.2, 8.53, 11.63, 56.06, 7984.39],
                "WeLore": [6.55, 6.96, 8.66, 24.92, 1142.53],
                "WeLore tuned": [6.55, 6.68, 7.42, 8.69, 11.40],
            },
        ),
        "mistral_7b": Published(
            "Mistral-7B",
            8.14,
            {
                "uniform": [12.31, 78.69, 6746.48, 162301.04, 248042.97],
                "OWL": [11.63, NAN, NAN, NAN, NAN],
                "WeLore": [8.76, 11.90, 30.69, 429.08, 1351.32],
                "WeLore tuned": [8.32, 8.92, 9.71, 14.85, 21.37],
            },
        ),
    },
)


def cells(scale: str) -> list[Cell]:
    return GRID.cells(MODELS[scale], setting(scale))


def render(rows: Sequence[Row]) -> Page:
    mapping = (
        "OWL: outliers on the task's own texts; that its ratios count ranks is our reading, the paper does not say"
    )
    return GRID.page(rows, [mapping], claims)


def claims(models: Sequence[str], ours: Numbers) -> list[Claim]:
    def claim(text, *comparison) -> Claim:
        return GRID.claim(text, models, ours, *comparison)

    return [
        claim("WeLore is better than uniform at every err (Section 4.1)", better, "WeLore", "uniform"),
        claim("WeLore is better than OWL at every err (Section 4.1)", better, "WeLore", "OWL"),
        claim("WeLore tuned is better than only compressed at every err (Table 4)", better, "WeLore tuned", "WeLore"),
        claim("the benefit of tuning grows with err (Section 4.2, 1)", grows, "WeLore", "WeLore tuned"),
        claim("without tuning, perplexity rises with err (Section 4.1)", worsens, ["uniform", "WeLore"]),
    ]
