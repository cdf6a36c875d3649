"""Figures from what runs left: spectra and ranks by component and decoder layer, and numbers against a budget.

matplotlib is imported by the first figure and not before, so that a table does not wait for it. Figures are made
without pyplot: nothing is global and no window opens.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
GREEN, RED, LIGHT_RED = "#1b7837", "#b2182b", "#f4a582"


def by_component(values: dict[str, T]) -> dict[str, dict[int, T]]:
    """Component and decoder layer of every weight, from names such as `model.layers.3.self_attn.q_proj`.

    The component is the last part of the name, the layer its first number.
    """
    found: dict[str, dict[int, T]] = {}
    for name, value in values.items():
        parts = name.split(".")
        layer = next(int(part) for part in parts if part.isdigit())
        found.setdefault(parts[-1], {})[layer] = value
    return found


def spectra_figure(
    spectra: dict[str, Sequence[float]], factored: dict[str, bool], threshold: float, title: str
) -> "Figure":
    """Normalized singular values, one panel a component and one line a decoder layer, divided at the threshold k.

    Weights that stay dense whatever their tail (N-LRC) are dashed.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels, dense = by_component(spectra), by_component(factored)
    layers = [layer for panel in panels.values() for layer in panel]
    colors = ScalarMappable(Normalize(min(layers), max(layers)), "viridis")
    figure, axes = _grid(len(panels), title)
    for axis, (component, panel) in zip(axes, panels.items(), strict=True):
        longest = max(len(sigma) for sigma in panel.values())
        axis.axhspan(threshold, 1.0, color=GREEN, alpha=0.12, linewidth=0)
        axis.axhspan(0.0, threshold, color=RED, alpha=0.12, linewidth=0)
        axis.axhline(threshold, color="black", linewidth=0.8)
        for layer, sigma in panel.items():
            style = "-" if dense[component][layer] else (0, (4, 1.5))
            axis.plot(range(1, len(sigma) + 1), sigma, linestyle=style, color=colors.to_rgba(layer), linewidth=0.9)
        lrcs = sum(dense[component].values())
        axis.set(title=f"{component}: {lrcs} of {len(panel)} LRC", xlim=(1, longest), ylim=(0, 1))
    _label(axes, _columns(len(panels)), "index of the singular value", "normalized singular value")
    key = [
        Patch(color=GREEN, alpha=0.25, label="kept (at least k)"),
        Patch(color=RED, alpha=0.25, label="removed in an LRC"),
        Line2D([], [], color="black", linewidth=0.8, label=f"threshold k = {threshold:.3f}"),
        Line2D([], [], color="gray", linestyle="-", label="LRC (factored)"),
        Line2D([], [], color="gray", linestyle=(0, (4, 1.5)), label="N-LRC (stays dense)"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False)
    figure.colorbar(colors, ax=axes, label="decoder layer", fraction=0.02, pad=0.01)
    return figure


def rank_ratio_figure(ratios: dict[str, float | None], title: str) -> "Figure":
    """Share of its ranks that each weight keeps, one panel a component: LRC green, N-LRC (None: all of them) red."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = by_component(ratios)
    figure, axes = _grid(len(panels), title)
    for axis, (component, panel) in zip(axes, panels.items(), strict=True):
        lrc = {layer: ratio for layer, ratio in panel.items() if ratio is not None}
        dense = [layer for layer, ratio in panel.items() if ratio is None]
        axis.bar(list(lrc), list(lrc.values()), width=0.85, color=GREEN)
        axis.bar(dense, [1.0] * len(dense), width=0.85, color=LIGHT_RED, edgecolor=RED, linewidth=0.4, hatch="////")
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{component}: {len(lrc)} of {len(panel)} LRC", ylim=(0, 1.02))
        axis.set_xlim(min(panel) - 0.7, max(panel) + 0.7)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _label(axes, _columns(len(panels)), "decoder layer", "rank / full rank")
    key = [
        Patch(color=GREEN, label="LRC: factored at this share of its ranks"),
        Patch(facecolor=LIGHT_RED, edgecolor=RED, hatch="////", label="N-LRC: stays dense, all ranks"),
        Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="half of the ranks"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False)
    return figure


Points = list[tuple[float, float]]


def lines_figure(panels: dict[str, dict[str, Points]], title: str, below: str, left: str, scale: str) -> "Figure":
    """One panel a setting and one line a method, such as damage against keep.

    `scale` is `log`, `linear`, or `symlog` for changes of either sign. A point that is not finite interrupts its line,
    as one below 0 does on a log scale.
    """
    figure, axes = _grid(len(panels), title)
    options = {"linthresh": 1.0} if scale == "symlog" else {}
    for axis, (panel, lines) in zip(axes, panels.items(), strict=True):
        for position, (label, points) in enumerate(lines.items()):
            axis.plot(*zip(*points, strict=True), label=label, markersize=4, linewidth=1.2, **_style(position))
        axis.set_yscale(scale, **options)
        if scale == "symlog":
            axis.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=panel)
    _finish(figure, axes, below, left)
    return figure


def scatter_figure(points: dict[str, tuple[float, float]], title: str, below: str, left: str) -> "Figure":
    """One point a method, with its name beside it, both axes logarithmic. One that is not positive has no place."""
    figure, (axis,) = _grid(1, title)
    figure.set_size_inches(7.0, 4.6)
    for position, (label, point) in enumerate(points.items()):
        axis.plot(*point, markersize=6, **_style(position))
        axis.annotate(label, point, xytext=(5, 3), textcoords="offset points", fontsize="small")
    axis.set(xscale="log", yscale="log")
    _label([axis], 1, below, left)
    return figure


def diagonal_figure(panels: dict[str, dict[str, Points]], title: str, below: str, left: str) -> "Figure":
    """What was predicted against what came, both on a log scale, with the diagonal on which they agree.

    A point that is not positive has no place on such a scale.
    """
    figure, axes = _grid(len(panels), title)
    for axis, (panel, clouds) in zip(axes, panels.items(), strict=True):
        for position, (label, points) in enumerate(clouds.items()):
            axis.plot(*zip(*points, strict=True), label=label, markersize=5, **_style(position) | {"linestyle": ""})
        axis.set(title=panel, xscale="log", yscale="log")
        axis.axline(
            (1.0, 1.0), (10.0, 10.0), color="black", linewidth=0.8, linestyle=":", label="predicted = measured"
        )
    _finish(figure, axes, below, left)
    return figure


def training_figure(curves: dict[str, dict[str, Points]], bars: dict[str, dict[str, float]], title: str) -> "Figure":
    """Panels of what changes by step, on scales of their own, then panels of one bar a method; one key for all.

    Where the largest number of a panel is ten times the smallest, its scale is logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * (len(curves) + len(bars)), 3.4), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, len(curves) + len(bars), squeeze=False).flat)
    for axis, (panel, lines) in zip(axes, curves.items(), strict=False):
        for position, (label, points) in enumerate(lines.items()):
            marker = _style(position)["marker"] if len(points) <= 20 else ""
            axis.plot(*zip(*points, strict=True), **_style(position) | {"marker": marker}, markersize=4, label=label)
        heights = [height for points in lines.values() for _, height in points if 0 < height < math.inf]
        wide = bool(heights) and max(heights) > 10 * min(heights)
        axis.set(title=panel, xlabel="optimizer steps", yscale="log" if wide else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis, (panel, values) in zip(axes[len(curves) :], bars.items(), strict=True):
        drawn = axis.bar(range(len(values)), list(values.values()), color=[f"C{i}" for i in range(len(values))])
        axis.bar_label(
            drawn, fmt=lambda height: f"{height:,.0f}" if height >= 100 else f"{height:.3g}", fontsize="small"
        )
        axis.set(title=panel, xticks=[])
        axis.margins(y=0.12)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size("medium")
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _style(position: int) -> dict[str, Any]:
    """Told apart by color and marker, those beyond the ten colors by the line too."""
    return {
        "color": f"C{position % 10}",
        "marker": "osD^vPX<>*"[position % 10],
        "linestyle": "-" if position < 10 else "--",
    }


def _finish(figure: "Figure", axes: "Sequence[Axes]", below: str, left: str) -> None:
    """Axes named, and one key for all panels, in the height that it needs and in columns of 2.4 inches."""
    _label(axes, _columns(len(axes)), below, left)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() / 2.4)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _columns(panels: int) -> int:
    return panels if panels <= 3 else (panels + 1) // 2


def _grid(panels: int, title: str) -> "tuple[Figure, list[Axes]]":
    """One or two rows of panels on one scale; a place that is not needed stays empty."""
    from matplotlib.figure import Figure

    columns = _columns(panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.1 * columns + 1, 2.6 * rows + 0.9), dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.suptitle(title)
    return figure, axes[:panels]


def _label(axes: "Sequence[Axes]", columns: int, below: str, left: str) -> None:
    for position, axis in enumerate(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size("medium")
        if position % columns == 0:
            axis.set_ylabel(left)
        if position + columns >= len(axes):
            axis.set_xlabel(below)


def save(figure: "Figure", path: Any) -> None:
    """Write the figure as PNG, the same bytes for the same figure."""
    figure.savefig(path, metadata={"Software": None})


def png(figure: "Figure") -> bytes:
    """The bytes that `save` writes."""
    file = io.BytesIO()
    save(figure, file)
    return file.getvalue()
