"""The artefacts there are: which modules, what each says of itself, and its cells with their runs."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from experiments.cells import Row, Runs
from welore.errors import Refused

SCALES = ("laptop", "paper")


def names() -> list[str]:
    """The modules here that are named after a table or a figure of the paper, and the comparisons that it lacks."""
    found = [path.stem for path in Path(__file__).parent.glob("*.py")]
    return sorted(
        name
        for name in found
        if re.fullmatch(
            r"(v\d_)?(table|figure)\d+|equal_budget|ablation|who_learns|why_low_rank|recover|rates|every_(mode|task)",
            name,
        )
    )


def load(name: str) -> ModuleType:
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise Refused(f"there is no artefact {name}.{hint} There are {', '.join(names())}.")
    return importlib.import_module(f"experiments.{name}")


def about(artefact: ModuleType) -> tuple[str, str]:
    """The caption and the cost, as its docstring says them."""
    lines = [line for line in artefact.__doc__.splitlines() if line]
    return lines[0], lines[1]


def gather(artefact: ModuleType, scale: str, runs: Runs) -> list[Row]:
    """The cells of an artefact with their runs; after them those that follow from what these have found, if any do.

    An artefact may say by `offered` which of its cells it is whole without.
    """
    offered = getattr(artefact, "offered", lambda scale, cell: False)
    rows, more = [], artefact.cells(scale)
    while more:
        rows += [replace(row, offered=offered(scale, row.cell)) for row in runs.find(more, artefact.NEEDS)]
        known = [row.cell for row in rows]
        more = [cell for cell in artefact.then(scale, rows) if cell not in known] if hasattr(artefact, "then") else []
    return rows


def missing(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that an artefact lacks, and those beyond them that it offers."""
    found = [row for row in rows if row.missing]
    return [row for row in found if not row.offered], [row for row in found if row.offered]
