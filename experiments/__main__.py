"""Tables and figures from records: python -m experiments [NAME [scale=laptop|paper] [outputs=FOLDER] [overrides]]

Without a name: every artefact with its cells and cost. With overrides the missing cells run first.
"""

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from experiments.cells import Cell, Row, check_infrastructure, default_outputs, find, launch
from experiments.page import Page
from welore import plots
from welore.errors import Refused
from welore.explain import explain

SCALES = ("laptop", "paper")


@dataclass
class Request:
    """`scale` and `outputs` say what is read; every other override starts the cells that are missing."""

    name: str | None
    scale: str
    outputs: str
    overrides: list[str]


def names() -> list[str]:
    """The modules here that are named after a table or a figure of the paper, and the comparisons that it lacks."""
    found = [path.stem for path in Path(__file__).parent.glob("*.py")]
    return sorted(
        name
        for name in found
        if re.fullmatch(r"(v\d_)?(table|figure)\d+|equal_budget|ablation|who_learns|recover", name)
    )


def parse(arguments: Sequence[str]) -> Request:
    request = Request(None, "laptop", default_outputs(), [])
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals and request.name is None:
            request.name = argument
        elif key in ("scale", "outputs"):
            setattr(request, key, value)
        else:
            request.overrides.append(argument)
    if request.scale not in SCALES:
        raise Refused(f"scale={request.scale} is unknown. Write scale={' or scale='.join(SCALES)}.")
    if request.name is None and request.overrides:
        raise Refused(f"{request.overrides[0]} needs an artefact: python -m experiments NAME {request.overrides[0]}")
    return request


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


def gather(artefact: ModuleType, scale: str, outputs: str) -> list[Row]:
    """The cells of an artefact with their runs; after them those that follow from what these have found, if any do."""
    rows = find(artefact.cells(scale), outputs, artefact.NEEDS)
    if not hasattr(artefact, "then"):
        return rows
    return rows + find(artefact.then(scale, rows), outputs, artefact.NEEDS)


def listing(outputs: str) -> str:
    """Every artefact with its caption, its cells done and missing at each scale, and its cost."""
    lines = []
    for name in names():
        artefact = load(name)
        caption, cost = about(artefact)
        lines += [f"{name:13}{caption}", f"{'':13}{cost}"]
        for scale in SCALES:
            rows = gather(artefact, scale, outputs)
            missing = sum(row.missing for row in rows)
            more = ", more may follow from them" if missing and hasattr(artefact, "then") else ""
            lines.append(f"{'':13}{scale:8}{len(rows) - missing} done, {missing} missing{more}")
    return "\n".join(lines)


def write(page: Page, caption: str, name: str, folder: Path) -> list[Path]:
    """The Markdown, LaTeX and images of an artefact, all named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.md", folder / f"{name}.tex"]
    paths[0].write_text(page.markdown(caption, name) + "\n")
    paths[1].write_text(page.latex(caption, name))
    for suffix, figure in page.figures.items():
        paths.append(folder / f"{name}{suffix}.png")
        plots.save(figure, paths[-1])
    return paths


def show(request: Request) -> int:
    """Print an artefact; write it if it is whole. The exit status: 1 where cells are missing."""
    artefact = load(request.name)
    check_infrastructure(request.overrides)
    rows = gather(artefact, request.scale, request.outputs)
    tried: list[Cell] = []
    while request.overrides and (new := [row for row in rows if row.missing and row.cell not in tried]):
        launch(new, request.name, request.outputs, request.overrides)
        tried += [row.cell for row in new]
        rows = gather(artefact, request.scale, request.outputs)
    page, name = artefact.render(rows), f"{request.name}-{request.scale}"
    caption = about(artefact)[0]
    print(page.markdown(caption, name))
    missing = [row for row in rows if row.missing]
    if missing:
        print(f"\n{len(missing)} of {len(rows)} cells are missing, so nothing is written. They are made by:")
        print("\n".join(f"{row.command(request.name, request.outputs)}  # {row.why}" for row in missing))
        return 1
    print("\nwritten:", *write(page, caption, name, Path(request.outputs) / "artefacts"))
    return 0


def main(arguments: Sequence[str]) -> int:
    try:
        request = parse(arguments)
        if request.name is None:
            print(listing(request.outputs))
            return 0
        return show(request)
    except Exception as error:
        return explain(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
