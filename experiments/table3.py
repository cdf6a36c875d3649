"""Table 3: perplexity against effective rank reduction for activation-guided factors, with uniform and WeLore ranks.

Cost: laptop 35 runs, 10 of them of Table 1, 50 minutes on one busy CPU core; paper 35 runs, never measured.

It holds Table 2 of the paper's first version. What the paper calls ASVD are the numbers that the first version calls
ActSVD and describes as the least Frobenius norm of the change of the outputs: svd=whitened here, not the diagonal
scaling that ASVD is (svd=asvd), which stands beside it. SVD-LLM has the same optimum as whitened; what it adds is the
update of each layer on the inputs that the compressed layers before it give. Calibration is on WikiText-2, as the
first version says of ActSVD (A.1). The paper's LLaMa-7B is its LLaMa-2 7B: the numbers of SVD are those of Table 1.
"""

from collections.abc import Sequence

from experiments.cells import Cell, Row
from experiments.grid import NAN, Grid, Numbers, Published, better
from experiments.page import Claim, Page
from experiments.scales import MODELS, calibrated_on, setting

NEEDS = ()


def _column(svd: str, ranks: str, sequential: str = "none") -> Cell:
    return {"svd": svd, "svd.sequential": sequential, "ranks": ranks, "mode": "none"}


GRID = Grid(
    {
        "plain, uniform": _column("plain", "uniform"),
        "asvd, uniform": _column("asvd", "uniform"),
        "whitened, uniform": _column("whitened", "uniform"),
        "whitened and updated, uniform": _column("whitened", "uniform", "update"),
        "plain, WeLore": _column("plain", "welore"),
        "asvd, WeLore": _column("asvd", "welore"),
        "whitened, WeLore": _column("whitened", "welore"),
    },
    {
        "llama2_7b": Published(
            "LLaMa-2 7B",
            7.03,
            {
                "plain, uniform": [10.58, 16.43, 91.99, NAN, NAN],
                "whitened, uniform": [7.24, 7.75, 8.85, 11.33, 17.03],
                "whitened and updated, uniform": [7.45, 7.58, 7.98, 10.04, 16.61],
                "plain, WeLore": [7.13, 8.28, 14.41, 78.17, 1836.62],
                "whitened, WeLore": [7.05, 7.21, 7.87, 9.75, 14.76],
            },
        ),
    },
)


def cells(scale: str) -> list[Cell]:
    return GRID.cells(MODELS[scale][:1], setting(scale) | calibrated_on(scale, "wikitext2"))


def render(rows: Sequence[Row]) -> Page:
    calibrated = dict.fromkeys(row.cell["calibration"] for row in rows)
    notes = [
        "the paper's SVD: plain, uniform; its ASVD, ActSVD in its first version: whitened; its SVD-LLM: whitened and "
        "updated; WeLore-COMP + ASVD: whitened, WeLore; plain, WeLore is Table 1's. For asvd it prints none",
        f"calibrated on {' and '.join(calibrated)}, where the factors need it; WeLore ranks are of the plain spectra",
    ]
    return GRID.page(rows, notes, claims)


def claims(models: Sequence[str], ours: Numbers) -> list[Claim]:
    def claim(text: str, *columns: str) -> Claim:
        return GRID.claim(text, models, ours, better, *columns)

    return [
        claim("whitened factors are better than plain ones (Section 4.1)", "whitened, uniform", "plain, uniform"),
        claim(
            "whitened and updated ones are better than plain ones (Section 4.1)",
            "whitened and updated, uniform",
            "plain, uniform",
        ),
        claim("WeLore ranks gain from activation-guided factors (Section 4.1)", "whitened, WeLore", "plain, WeLore"),
        claim(
            "with the same factors WeLore ranks are better than uniform ones (Table 3)",
            "whitened, WeLore",
            "whitened, uniform",
        ),
        claim(
            "with whitened factors WeLore is better than SVD-LLM (Table 3)",
            "whitened, WeLore",
            "whitened and updated, uniform",
        ),
        claim("the same for ASVD: its factors are better than plain ones", "asvd, uniform", "plain, uniform"),
        claim("the same for ASVD: WeLore ranks gain from its factors", "asvd, WeLore", "plain, WeLore"),
        claim("the same for ASVD: WeLore ranks are better than uniform ones", "asvd, WeLore", "asvd, uniform"),
    ]
