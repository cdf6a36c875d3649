"""Figure 5: tuning the LRCs against tuning all compressible weights of the same compressed model.

Cost: laptop 6 runs and at least 4 that follow, half of them of Figure 4, about 20 minutes; paper 6, never measured.

The paper prints no number of it but the ratios in its text. What the FLOPs allow is far from 3 times the tokens/s.
"""

from collections.abc import Sequence

from experiments import pair, tuning
from experiments.cells import Cell, Row
from experiments.page import Page
from experiments.pair import Ratio
from experiments.tuning import then  # noqa: F401, the cells that follow
from welore import metrics

NEEDS = tuning.NEEDS
MODES = {"WeLore": "welore", "full": "full"}
RATIOS = [
    Ratio("about 35 % of the trained parameters", metrics.TRAINABLE_PARAMETERS, "WeLore", "full", 0.3, 0.4),
    Ratio("about 3 times the tokens/s", metrics.FIT_TOKENS_PER_SECOND, "WeLore", "full", 2.7, None),
    Ratio("about 0.6 of the memory (abstract)", metrics.TRAIN_PEAK_GIB, "WeLore", "full", None, 0.65),
]


def cells(scale: str) -> list[Cell]:
    return pair.cells(scale, MODES)


def render(rows: Sequence[Row]) -> Page:
    return pair.render(rows, MODES, RATIOS, "Section 3.2, Figure 5")
