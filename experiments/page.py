"""An artefact on paper: a table or figure, what the paper claims about it, and whether that holds on our rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from welore.report import latex, latex_figure, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.cells import Row

# Whether a comparison comes out as claimed, by where it was made; None where a number for it is missing.
Outcomes = dict[str, bool | None]


class Cited(str):
    """Text of a table with the fingerprints of the runs that it says something of."""

    runs: tuple[str, ...]


def cited(text: str, rows: "Iterable[Row]") -> str:
    """The text with the runs behind it; bare where none of the rows has a run."""
    entry = Cited(text)
    entry.runs = tuple(dict.fromkeys(row.record.fingerprint for row in rows if row.record))
    return entry if entry.runs else text


@dataclass(frozen=True)
class Claim:
    """A statement, checked on the paper's own numbers (None where it prints none) and on ours."""

    text: str
    paper: Outcomes | None
    ours: Outcomes

    def row(self) -> list[str]:
        return [self.text, "—" if self.paper is None else verdict(self.paper), verdict(self.ours)]


def verdict(outcomes: Outcomes) -> str:
    """One exception refutes a claim, whatever is missing; a number that is absent or undecided leaves it open."""
    against = [where for where, outcome in outcomes.items() if outcome is False]
    unknown = [where for where, outcome in outcomes.items() if outcome is None]
    if against:
        return f"does not hold: {_some(against)}"
    if unknown or not outcomes:
        return f"cannot be said: {_some(unknown) or 'nothing is there'}"
    return f"holds ({len(outcomes)} of {len(outcomes)})"


def _some(places: Sequence[str], most: int = 5) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


@dataclass
class Page:
    """The content of an artefact, before it is Markdown or LaTeX."""

    header: Sequence[str]
    body: Sequence[Sequence[str]]
    notes: list[str]
    claims: list[Claim]
    figures: "dict[str, Figure]" = field(default_factory=dict)  # by a suffix of the file's name, "" for the only one
    claimant: str = "claim of the paper"

    def markdown(self, caption: str, name: str) -> str:
        images = [f"![{caption}]({name}{suffix}.png)" for suffix in self.figures]
        claims = markdown([self.claimant, "on the paper's numbers", "on ours"], [c.row() for c in self.claims])
        table = [markdown(self.header, self.body)] if self.body else []
        return "\n\n".join([f"# {caption}", *images, *table, "\n".join(f"* {note}" for note in self.notes), claims])

    def latex(self, caption: str, name: str) -> str:
        label = name.replace("-", ":")
        images = [latex_figure(f"{name}{suffix}.png", caption, f"fig:{label}{suffix}") for suffix in self.figures]
        table = [latex(self.header, self.body, caption, f"tab:{label}", self.notes)] if self.body else []
        return "\n\n".join([*images, *table]) + "\n"
