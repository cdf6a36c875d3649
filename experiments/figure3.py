"""Figure 3: normalized singular values of every compressible weight, by component and decoder layer.

Cost: laptop 1 run, about a minute on 2 CPU cores; paper 1 run, never measured. A cell of Table 1 and of Figure 7 too.
"""

from collections.abc import Sequence

from experiments import spectra
from experiments.cells import Cell, Row
from experiments.page import Claim, Outcomes, Page, cited
from experiments.spectra import Cut, mean, read_cut
from welore.plots import by_component, spectra_figure

NEEDS = spectra.FILES


def cells(scale: str) -> list[Cell]:
    return [spectra.cell(scale)]


def render(rows: Sequence[Row]) -> Page:
    cut = read_cut(rows[0]) if rows[0].record else None
    header = ["component", "weights", "mean share of values >= k", "least (layer)", "most (layer)"]
    claim = Claim(
        "q_proj and k_proj have a heavier tail than up_proj and down_proj: a smaller share of their normalized "
        "singular values is at least k (Section 2.5)",
        None,
        heavier_tails(cut),
    )
    if cut is None:
        return Page(header, [], [], [claim])
    body = [_line(cited(component, rows), shares) for component, shares in by_component(cut.above).items()]
    factored = {name: rank is not None for name, rank in cut.ranks.items()}
    figure = spectra_figure({n: s.tolist() for n, s in cut.spectra.items()}, factored, cut.threshold, cut.title)
    return Page(header, body, cut.notes, [claim], {"": figure})


def _line(component: str, shares: dict[int, float]) -> list[str]:
    least, most = min(shares, key=shares.get), max(shares, key=shares.get)
    return [
        component,
        str(len(shares)),
        f"{mean(list(shares.values())):.3f}",
        f"{shares[least]:.3f} ({least})",
        f"{shares[most]:.3f} ({most})",
    ]


def heavier_tails(cut: Cut | None) -> Outcomes:
    """Each of the paper's examples of a heavy tail against each of those without one, where the model has them."""
    shares = {} if cut is None else {c: mean(list(v.values())) for c, v in by_component(cut.above).items()}
    pairs = [(heavy, light) for heavy in ("q_proj", "k_proj") for light in ("up_proj", "down_proj")]
    return {
        f"{heavy} and {light}": shares[heavy] < shares[light] if {heavy, light} <= shares.keys() else None
        for heavy, light in pairs
    }
