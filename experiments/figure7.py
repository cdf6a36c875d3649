"""Figure 7: rank ratio by decoder layer and component at 50 % reduction, LRC green and N-LRC red.

Cost: laptop 1 run, about a minute on 2 CPU cores; paper 1 run, never measured. A cell of Table 1 and of Figure 3 too.
"""

from collections.abc import Sequence

from experiments import spectra
from experiments.cells import Cell, Row
from experiments.page import Claim, Outcomes, Page, cited
from experiments.spectra import Cut, mean, read_cut
from welore.plots import by_component, rank_ratio_figure

NEEDS = spectra.FILES


def cells(scale: str) -> list[Cell]:
    return [spectra.cell(scale)]


def render(rows: Sequence[Row]) -> Page:
    cut = read_cut(rows[0]) if rows[0].record else None
    header = ["component", "LRC", "N-LRC", "mean rank ratio", "of its LRCs", "least (layer)"]
    claims = [
        Claim("most weights of q_proj and k_proj lose over 90 % of their ranks (B.1)", None, mostly_removed(cut)),
        Claim(
            "in most components the first and last quarter of the layers keep fewer ranks than the middle half (B.1)",
            None,
            ends_lose_more(cut),
        ),
    ]
    if cut is None:
        return Page(header, [], [], claims)
    body = [_line(cited(component, rows), ratios) for component, ratios in by_component(cut.ratios).items()]
    return Page(header, body, cut.notes, claims, {"": rank_ratio_figure(cut.ratios, cut.title)})


def _line(component: str, ratios: dict[int, float | None]) -> list[str]:
    lrc = {layer: ratio for layer, ratio in ratios.items() if ratio is not None}
    least = min(lrc, key=lrc.get) if lrc else None
    return [
        component,
        str(len(lrc)),
        str(len(ratios) - len(lrc)),
        f"{mean(_filled(ratios)):.3f}",
        f"{mean(list(lrc.values())):.3f}" if lrc else "—",
        f"{lrc[least]:.3f} ({least})" if lrc else "—",
    ]


def _filled(ratios: dict[int, float | None]) -> list[float]:
    return [1.0 if ratio is None else ratio for ratio in ratios.values()]


def mostly_removed(cut: Cut | None) -> Outcomes:
    panels = {} if cut is None else by_component(cut.ratios)
    return {
        component: mean([ratio < 0.1 for ratio in _filled(panels[component])]) > 0.5 if component in panels else None
        for component in ("q_proj", "k_proj")
    }


def ends_lose_more(cut: Cut | None) -> Outcomes:
    """One comparison for the model: in how many components the ends keep a smaller mean share than the middle."""
    if cut is None:
        return {"the run": None}
    wins = []
    for panel in by_component(cut.ratios).values():
        ratios = _filled(dict(sorted(panel.items())))
        quarter = max(1, len(ratios) // 4)
        middle = ratios[quarter:-quarter]
        if middle:
            wins.append(mean(ratios[:quarter] + ratios[-quarter:]) < mean(middle))
    if not wins:
        return {"a layer between the first and the last": None}
    return {f"so in {sum(wins)} of {len(wins)} components": 2 * sum(wins) > len(wins)}
