"""One page of all that was measured: every artefact beside the paper, and every run with its curves and its origin.

It is a single file without server or network: styles, script, pictures and records are inside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import markup, provenance
from experiments.artefacts import SCALES, about, gather, load, missing, names
from experiments.cells import Row, Runs
from experiments.memo import state
from experiments.page import Page
from welore import metrics
from welore.cache import Cache, digest, whole
from welore.plots import png
from welore.records import HISTORY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"


def write(runs: Runs, outputs: str) -> Path:
    """Write the page of these runs beside them; its path."""
    for folder, record in runs.latest.values():
        if metrics.FIT_STEPS.key in record.metrics and not (folder / HISTORY).exists():
            runs.fetch(folder, HISTORY)
    sheets = [sheet for name in names() for sheet in _sheets(name, runs, outputs)]
    path = Path(outputs) / FILE
    made = page(sheets, runs)
    with whole(path) as part:
        part.write_text(made, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Sheet:
    """An artefact at one scale. Where it cannot be rendered, `page` is None and `fault` says why."""

    name: str
    scale: str
    caption: str
    cost: str
    rows: list[Row]
    page: Page | None
    fault: str
    outputs: str

    @property
    def missing(self) -> list[Row]:
        return missing(self.rows)[0]

    @property
    def offered(self) -> list[Row]:
        return missing(self.rows)[1]

    @property
    def done(self) -> int:
        return sum(not row.missing for row in self.rows)

    @property
    def total(self) -> int:
        """Of the runs that are done or wanted; those that are offered count once they are done."""
        return len(self.rows) - len(self.offered)

    def drawn(self, suffix: str, figure: "Figure") -> bytes:
        """A figure as PNG, drawn once for the same runs: drawing takes longer than all the rest of the page."""
        runs = [f"{row.folder} {row.record and row.record.started} {row.why}" for row in self.rows]
        key = digest(state(), *_drawing(), self.name, self.scale, suffix, *runs)
        kept = Cache(Path(self.outputs) / ".cache")
        return kept.get(
            "figures", key, Path.read_bytes, lambda drawn, path: path.write_bytes(drawn), lambda: png(figure)
        )

    @property
    def states(self) -> list[str]:
        return [] if self.page is None else [markup.state(claim.ours) for claim in self.page.claims]


@cache
def _drawing() -> list[bytes]:
    """The code of the artefacts, which decides what a figure shows as much as the runs do."""
    return [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]


def _sheets(name: str, runs: Runs, outputs: str) -> list[Sheet]:
    artefact = load(name)
    caption, cost = about(artefact)
    sheets = []
    for scale in SCALES:
        page, fault, rows = None, "", []
        try:
            rows = gather(artefact, scale, runs)
            page = artefact.render(rows)
        except Exception as error:  # one record of another time must not cost the page
            fault = f"{type(error).__name__}: {error}"
        sheets.append(Sheet(name, scale, caption, cost, rows, page, fault, outputs))
    return sheets


def page(sheets: Sequence[Sheet], runs: Runs) -> str:
    """The whole document."""
    names = dict.fromkeys(sheet.name for sheet in sheets)
    by_name = {name: [sheet for sheet in sheets if sheet.name == name] for name in names}
    return _file("report.html").format(
        style=_file("report.css"),
        script=_file("report.js"),
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        counts=_counts(sheets, runs),
        contents="".join(f'<li><a href="#{name}">{_title(both[0])}</a></li>' for name, both in by_name.items()),
        overview=_overview(by_name),
        artefacts="\n".join(_section(name, both) for name, both in by_name.items()),
        total=f"{len(runs.latest):,}",
        runs="\n".join(provenance.line(folder, record) for folder, record in runs.latest.values()),
        data=provenance.data(runs),
    )


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _counts(sheets: Sequence[Sheet], runs: Runs) -> str:
    failed = sum(record.status != "done" for _, record in runs.latest.values())
    states = [state for sheet in sheets if sheet.done for state in sheet.states]
    whole = sum(not sheet.missing and not sheet.fault for sheet in sheets)
    facts = [
        (len(runs.latest) - failed, "runs done"),
        (failed, "runs failed"),
        (whole, "artefacts whole"),
        *((states.count(state), f"claims {title}") for state, title in markup.COUNTED.items()),
    ]
    return "".join(f"<div><dt>{title}</dt><dd>{count:,}</dd></div>" for count, title in facts)


def _title(sheet: Sheet) -> str:
    return escape(sheet.caption.partition(":")[0])


def _text(sheet: Sheet) -> str:
    text = sheet.caption.partition(":")[2].strip()
    return escape(text[:1].upper() + text[1:])


def _overview(by_name: dict[str, list[Sheet]]) -> str:
    lines = []
    for name, sheets in by_name.items():
        title, text = f'<a href="#{name}">{_title(sheets[0])}</a>', _text(sheets[0])
        cells = [f'<th scope="row">{title} <small>{text}</small></th>']
        cells += [f'<td class="number">{sheet.done} of {sheet.total}</td>' for sheet in sheets]
        states = [state for sheet in sheets if sheet.done for state in sheet.states]
        badges = [markup.badge(s, f"{states.count(s)} {markup.COUNTED[s]}") for s in markup.COUNTED if s in states]
        lines.append(f"<tr>{''.join(cells)}<td>{' '.join(badges)}</td></tr>")
    return "\n".join(lines)


def _section(name: str, sheets: Sequence[Sheet]) -> str:
    begun = any(sheet.done for sheet in sheets)
    blocks = [_scale(sheet, bool(sheet.done) or not begun and sheet.scale == SCALES[0]) for sheet in sheets]
    return (
        f'<section class="artefact" id="{name}"><h3>{_title(sheets[0])}</h3>\n'
        f'<p class="lead">{_text(sheets[0])}</p><p class="cost">{escape(sheets[0].cost)}</p>\n'
        f"{''.join(blocks)}</section>"
    )


def _scale(sheet: Sheet, opened: bool) -> str:
    title = f"<b>{sheet.scale} scale</b> <span>{sheet.done} of {sheet.total} runs</span>"
    parts = [_rendered(sheet.page, f"{sheet.name} at {sheet.scale} scale", sheet.drawn)] if sheet.page else []
    if sheet.fault:
        parts.append(f'<p class="fault">It cannot be shown: {escape(sheet.fault)}</p>')
    if sheet.missing:
        parts.append(_missing(sheet))
    if sheet.offered:
        beyond = f"{len(sheet.offered)} more runs are offered: the commands"
        parts.append(markup.folded(beyond, _commands(sheet, sheet.offered, "more commands")))
    return markup.folded(title, "\n".join(parts), opened, "scale")


def _rendered(page: Page, name: str, draw: Callable[[str, "Figure"], bytes]) -> str:
    pictures = [markup.image(figure, name + suffix, draw(suffix, figure)) for suffix, figure in page.figures.items()]
    table = [markup.table(page.header, page.body, name)] if page.body else []
    notes = [markup.folded("How it was measured", markup.listed(page.notes))] if page.notes else []
    return "\n".join([*pictures, *table, markup.claims(page.claims, page.claimant), *notes])


def _missing(sheet: Sheet) -> str:
    scale = "" if sheet.scale == SCALES[0] else f" scale={sheet.scale}"
    all_of_them = f"python -m experiments {sheet.name}{scale} logger=offline"
    single = _commands(sheet, sheet.missing, "commands")
    content = f"<p>All of them: <code>{escape(all_of_them)}</code></p>\n{single}"
    return markup.folded(f"{len(sheet.missing)} of {sheet.total} runs are missing: the commands", content)


def _commands(sheet: Sheet, rows: Sequence[Row], title: str) -> str:
    single = [f"{row.command(sheet.name, sheet.outputs)}  # {row.why}" for row in rows]
    return markup.commands(single, f"{title} for {sheet.name} at {sheet.scale} scale")
