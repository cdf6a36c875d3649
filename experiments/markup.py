"""Pieces of the report as HTML: tables with their runs behind the numbers, claims, commands and small curves."""

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from experiments.page import Cited, Claim, Outcomes, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 96, 22  # of a small curve, in CSS pixels
LONG = 36  # characters, from where a column breaks its lines
STATES = {"holds": "holds", "does": "fails", "cannot": "open"}  # by the first word of a verdict
TITLES = {"holds": "holds", "fails": "does not hold", "open": "cannot be said"}
COUNTED = {"holds": "hold", "fails": "do not hold", "open": "cannot be said"}


def table(header: Sequence[str], body: Sequence[Sequence[str]], name: str) -> str:
    """A table that scrolls by itself where it is wider than the page; numbers are links to their runs."""
    numeric = [all(_is_number(line[column]) for line in body) for column in range(len(header))]
    long = [any(len(line[column]) > LONG for line in body) for column in range(len(header))]
    kinds = list(map(_kind, header, numeric, long))
    head = "".join(f'<th scope="col"{kind}>{escape(title)}</th>' for title, kind in zip(header, kinds, strict=True))
    lines = ["".join(_entry(text, kind) for text, kind in zip(line, kinds, strict=True)) for line in body]
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _kind(title: str, number: bool, long: bool) -> str:
    found = {"paper": title.startswith("paper"), "number": number, "long": long and not number}
    names = [name for name, holds in found.items() if holds]
    return f' class="{" ".join(names)}"' if names else ""


def _is_number(text: str) -> bool:
    return bool(re.match(r"[-+−±]?\d|—|NaN|missing|diverged", text))


def _entry(text: str, kind: str) -> str:
    """The number first, and what it was reached with in small print below it."""
    if text == "missing":
        return f"<td{kind}><em>missing</em></td>"
    first, bracket, rest = text.partition(" (")
    shown = escape(first)
    if isinstance(text, Cited):
        shown = f'<a href="#runs={escape(",".join(text.runs))}">{shown}</a>'
    below = f" <small>({escape(rest)}</small>" if bracket else ""
    return f"<td{kind}>{shown}{below}</td>"


def badge(state: str, text: str) -> str:
    return f'<span class="badge {state}">{escape(text)}</span>'


def state(outcomes: Outcomes) -> str:
    """`holds`, `fails` or `open`."""
    return STATES[verdict(outcomes).split()[0]]


def claims(stated: Sequence[Claim], claimant: str) -> str:
    """Each claim with its verdict on our numbers, and on the paper's where it prints any."""
    items = []
    for claim in stated:
        _, theirs, ours = claim.row()
        paper = "" if claim.paper is None else f"<small>on the paper's own numbers: {escape(theirs)}</small>"
        found = state(claim.ours)
        detail = ours.removeprefix(TITLES[found]).strip(":, ()")
        why = {"holds": f"in {detail} comparisons", "fails": f"against it: {detail}", "open": detail}[found]
        items.append(
            f"<li>{badge(found, TITLES[found])} <span>{escape(claim.text)} "
            f"<small>{escape(why)}</small> {paper}</span></li>"
        )
    return f'<h4>{escape(claimant.capitalize())}</h4>\n<ul class="claims">{"".join(items)}</ul>'


def listed(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def folded(title: str, content: str, opened: bool = False, kind: str = "") -> str:
    """What is shown on demand; `title` is HTML."""
    named = f' class="{kind}"' if kind else ""
    return f"<details{named}{' open' if opened else ''}><summary>{title}</summary>\n{content}\n</details>"


def commands(lines: Sequence[str], name: str) -> str:
    text = escape("\n".join(lines))
    return f'<pre class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><code>{text}</code></pre>'


def image(figure: "Figure", title: str, png: bytes) -> str:
    """A drawn figure inside the page itself."""
    data = base64.b64encode(png).decode()
    width, height = (round(figure.dpi * inches) for inches in figure.get_size_inches())
    return (
        f'<figure class="wide" role="region" tabindex="0" aria-label="{escape(title)}"><img '
        f'src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(title)}"></figure>'
    )


def sparkline(points: Points, title: str) -> str:
    """A curve in the space of a word; nothing where there are fewer than two numbers."""
    known = [(x, y) for x, y in points if math.isfinite(y)]
    if len(known) < 2:
        return ""
    (left, right), heights = (known[0][0], known[-1][0]), [y for _, y in known]
    low, high = min(heights), max(heights)

    def place(x: float, y: float) -> str:
        across = (x - left) / ((right - left) or 1) * (WIDTH - 2) + 1
        return f"{across:.1f},{(high - y) / ((high - low) or 1) * (HEIGHT - 4) + 2:.1f}"

    drawn = " ".join(place(x, y) for x, y in known)
    return (
        f'<svg class="spark" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><polyline points="{drawn}"/></svg>'
    )


def thinned(points: Points, most: int) -> Points:
    """At most so many of the points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
