"""Tables and figures from records: python -m experiments NAME [scale=laptop|paper] [outputs=FOLDER] [overrides]

Without a name: every artefact with its cells and cost. With overrides the missing cells run first. The name `report`
stands for one page of them all. source=wandb:ENTITY/PROJECT reads runs from W&B in the place of a folder.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import online, report
from experiments.artefacts import SCALES, about, gather, load, missing, names
from experiments.cells import Cell, Row, Runs, check_infrastructure, default_outputs, launch
from experiments.memo import remembered
from experiments.page import Page
from welore import plots
from welore.errors import Refused
from welore.explain import explain
from welore.records import records

REPORT = "report"
OUTPUTS = "outputs"  # the source that is no other than the folder


@dataclass
class Request:
    """`scale`, `outputs` and `source` say what is read; every other override starts the cells that are missing."""

    name: str | None
    scale: str
    outputs: str
    overrides: list[str]
    source: str = OUTPUTS


def parse(arguments: Sequence[str]) -> Request:
    request = Request(None, "laptop", default_outputs(), [])
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals and request.name is None:
            request.name = argument
        elif key in ("scale", "outputs", "source"):
            setattr(request, key, value)
        else:
            request.overrides.append(argument)
    if request.scale not in SCALES:
        raise Refused(f"scale={request.scale} is unknown. Write scale={' or scale='.join(SCALES)}.")
    if request.name is None and request.overrides:
        raise Refused(f"{request.overrides[0]} needs an artefact: python -m experiments NAME {request.overrides[0]}")
    if request.source != OUTPUTS and request.overrides:
        raise Refused(f"source={request.source} is only read: leave it out to run what is missing, with logger=wandb.")
    if request.name == REPORT and request.overrides:
        raise Refused(f"the report starts no run: leave out {' '.join(request.overrides)}, or name one artefact.")
    return request


def read(request: Request, name: Callable[[Cell], str]) -> Runs:
    """The runs that a request is about."""
    if request.source == OUTPUTS:
        return Runs.of(records(Path(request.outputs)), name)
    return online.read(request.source, request.outputs, name)


def listing(runs: Runs) -> str:
    """Every artefact with its caption, its cells done, missing and offered beyond at each scale, and its cost."""
    lines = []
    for name in names():
        artefact = load(name)
        caption, cost = about(artefact)
        lines += [f"{name:13}{caption}", f"{'':13}{cost}"]
        for scale in SCALES:
            rows = gather(artefact, scale, runs)
            wanted, offered = map(len, missing(rows))
            beyond = f", {offered} more offered" if offered else ""
            more = ", more may follow from them" if wanted + offered and hasattr(artefact, "then") else ""
            done = len(rows) - wanted - offered
            lines.append(f"{'':13}{scale:8}{done} done, {wanted} missing{beyond}{more}")
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


def show(request: Request, known: Callable[[Cell], str]) -> tuple[str, int]:
    """What there is to say of an artefact, which is written if it is whole, and 1 where cells are missing."""
    artefact = load(request.name)
    check_infrastructure(request.overrides)
    rows = gather(artefact, request.scale, read(request, known))
    tried: list[Cell] = []
    while request.overrides and (new := [row for row in missing(rows)[0] if row.cell not in tried]):
        launch(new, request.name, request.outputs, request.overrides)
        tried += [row.cell for row in new]
        rows = gather(artefact, request.scale, read(request, known))
    page, name = artefact.render(rows), f"{request.name}-{request.scale}"
    caption = about(artefact)[0]
    said = [page.markdown(caption, name)]
    wanted, offered = missing(rows)
    if wanted:
        total = len(rows) - len(offered)
        said.append(f"\n{len(wanted)} of {total} cells are missing, so nothing is written. They are made by:")
        said.append(commands(wanted, request))
    else:
        files = write(page, caption, name, Path(request.outputs) / "artefacts")
        said.append("\nwritten: " + " ".join(map(str, files)))
    if offered:
        said.append(f"\n{len(offered)} more rows, which two cores take long for, are made by:")
        said.append(commands(offered, request))
    return "\n".join(said), 1 if wanted else 0


def commands(rows: Sequence[Row], request: Request) -> str:
    return "\n".join(f"{row.command(request.name, request.outputs)}  # {row.why}" for row in rows)


def main(arguments: Sequence[str]) -> int:
    try:
        said, status = answer(parse(arguments))
    except Exception as error:
        return explain(error)
    try:
        print(said, flush=True)
    except BrokenPipeError:
        # Whoever read this, such as `| head`, has read enough; Python must not write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def answer(request: Request) -> tuple[str, int]:
    with remembered(request.outputs) as known:
        if request.name is None:
            return listing(read(request, known)), 0
        if request.name == REPORT:
            return f"written: {report.write(read(request, known), request.outputs)}", 0
        return show(request, known)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
