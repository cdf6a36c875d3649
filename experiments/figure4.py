"""Figure 4: tuning the LRCs against tuning the N-LRCs: loss, perplexity, tokens per second and trained parameters.

Cost: laptop 6 runs and 4 that followed, 20 minutes on 2 CPU cores; paper 6 runs of 10,000 steps, never measured.

It is Figure 5 of the paper's first version. The paper prints no number of it but the ratios in its text.
"""

from collections.abc import Sequence

from experiments import pair, tuning
from experiments.cells import Cell, Row
from experiments.page import Page
from experiments.pair import Ratio
from experiments.tuning import then  # noqa: F401, the cells that follow
from welore import metrics

NEEDS = tuning.NEEDS
MODES = {"LRC": "welore", "N-LRC": "nlrc"}
RATIOS = [
    Ratio("the N-LRCs have about 3 times the parameters", metrics.TRAINABLE_PARAMETERS, "N-LRC", "LRC", 2.5, 3.5),
    Ratio("tuning the LRCs has about 2 times the tokens/s", metrics.FIT_TOKENS_PER_SECOND, "LRC", "N-LRC", 1.8, None),
]


def cells(scale: str) -> list[Cell]:
    return pair.cells(scale, MODES)


def render(rows: Sequence[Row]) -> Page:
    return pair.render(rows, MODES, RATIOS, "Section 3.2, Figure 4")
