"""Figures of how weights and gradients come about: heat maps over checkpoints, numbers by layer, and scatter plots.

matplotlib is imported by the first figure and not before, as in `plots`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Map:
    """A row of heat maps with one scale: matrices by title, whose rows are the checkpoints.

    Where `square`, the columns are the checkpoints too; else they are singular values from the first.
    """

    panels: dict[str, Sequence[Sequence[float]]]
    label: str
    low: float
    high: float
    square: bool


def heat_figure(maps: Sequence[Map], steps: Sequence[int], title: str) -> "Figure":
    """Rows of heat maps. Checkpoints stand at equal distances, whatever lies between them, with their steps beside."""
    from matplotlib.figure import Figure

    columns = max(len(row.panels) for row in maps)
    figure = Figure(figsize=(3.0 * columns + 1.2, 2.9 * len(maps) + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for places, row in zip(axes, maps, strict=True):
        image = None
        for axis, (name, matrix) in zip(places, row.panels.items(), strict=False):
            image = axis.imshow(
                matrix, vmin=row.low, vmax=row.high, aspect="auto", interpolation="nearest", cmap="viridis"
            )
            axis.set_title(name, size="medium")
            axis.set_yticks(range(len(steps)), steps, size="x-small")
            if row.square:
                axis.set_xticks(range(len(steps)), steps, size="x-small", rotation=90)
            else:
                axis.set_xlabel("index of the singular value", size="small")
                axis.tick_params(axis="x", labelsize="x-small")
        for axis in places[len(row.panels) :]:
            axis.set_axis_off()
        places[0].set_ylabel("optimizer steps")
        figure.colorbar(image, ax=list(places), label=row.label, fraction=0.03, pad=0.01)
    figure.suptitle(title)
    return figure


def layers_figure(panels: dict[str, dict[str, Points]], title: str, log: Sequence[str] = ()) -> "Figure":
    """One panel a number and one line a component, by decoder layer, each on a scale of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels), 3.6), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for position, (label, points) in enumerate(lines.items()):
            marker = "osD^vPX"[position % 7]
            axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, linewidth=1.1)
        axis.set(xlabel="decoder layer", yscale="log" if name in log else "linear")
        axis.set_title(name, size="medium")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def scatter_figure(
    panels: Sequence[tuple[str, str, dict[str, Points]]], title: str, log: Sequence[str] = ()
) -> "Figure":
    """Panels of one number against another, (below, left, points by component).

    Numbers in `log` are on a log scale, which is linear within 0.001 of 0 where some of them are not positive.
    """
    from matplotlib.figure import Figure

    columns = -(-len(panels) // 2) if len(panels) > 4 else len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows + 0.6), dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (below, left, clouds) in zip(axes, panels, strict=False):
        points = [point for cloud in clouds.values() for point in cloud]
        sides = zip((below, left), zip(*points, strict=True), (axis.set_xscale, axis.set_yscale), strict=True)
        for name, values, rescale in sides:
            if name in log:
                rescale("log") if min(values) > 0 else rescale("symlog", linthresh=1e-3)
        for position, (label, cloud) in enumerate(clouds.items()):
            marker = "osD^vPX"[position % 7]
            axis.plot(*zip(*cloud, strict=True), label=label, marker=marker, markersize=4, linestyle="", alpha=0.8)
        axis.set_xlabel(below, size="small")
        axis.set_ylabel(left, size="small")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure
