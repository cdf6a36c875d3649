"""What a run leaves behind (`Record`) and what a table asks for (`Sweep`)."""

import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from welore.cache import digest, whole

FILE = "record.json"
HISTORY = "history.jsonl"  # one line for each logged step, written as they come
SEAL = "seal"  # a digest of all the rest, so that an edit by hand is noticed


@dataclass(frozen=True)
class Sweep:
    """A full product of Hydra overrides, e.g. Sweep({"model": ["tiny"], "err": [0.1, 0.3]})."""

    axes: dict[str, list]

    def cells(self) -> list[dict[str, Any]]:
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def overrides(self) -> list[str]:
        """The arguments of one multirun, or of one run where every axis has a single value."""
        return [f"{key}={','.join(map(_written, values))}" for key, values in self.axes.items()]


def sweeps(cells: Sequence[dict[str, Any]]) -> list[Sweep]:
    """Full products that hold exactly these cells, each once: one where they are one product, else a few."""
    boxes = [{key: [value] for key, value in cell.items()} for cell in cells]
    for key in dict.fromkeys(key for cell in cells for key in cell):
        merged: dict[str, dict[str, list]] = {}
        for box in boxes:
            alike = repr({axis: None if axis == key else values for axis, values in box.items()})
            if alike in merged:
                merged[alike][key] += box[key]
            else:
                merged[alike] = box
        boxes = list(merged.values())
    return [Sweep(box) for box in boxes]


@dataclass
class Record:
    """One run: what was asked, what came out, on what. `metrics` are numbers, or text where a number is impossible."""

    fingerprint: str
    status: Literal["done", "failed"]
    config: dict[str, Any]
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    started: str = ""
    seconds: float = 0.0
    error: str | None = None

    def save(self, folder: Path) -> None:
        """Write `record.json` whole or not at all. A number that is not finite is written as null."""
        content = finite(asdict(self))
        sealed = content | {SEAL: _seal(content)}
        with whole(folder / FILE) as part:
            part.write_text(json.dumps(sealed, indent=2, sort_keys=True, allow_nan=False))

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record in a run folder, or None where there is none, it cannot be read, or it was edited by hand."""
        try:
            content = json.loads((folder / FILE).read_text())
            seal = content.pop(SEAL, None)  # records of earlier versions have none
            record = cls(**content)
            record.config.keys(), record.metrics.keys()  # raises where they are no objects
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        if seal is not None and seal != _seal(content):
            print(f"{folder / FILE} was edited after its run had written it, and does not count", file=sys.stderr)
            return None
        return record


def _seal(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True))


def records(root: Path) -> list[tuple[Path, Record]]:
    """Every readable record under `root` with its run folder, those that failed too, the earliest first."""
    found = [(path.parent, Record.read(path.parent)) for path in root.rglob(FILE)]
    return sorted(((f, r) for f, r in found if r is not None), key=lambda pair: (pair[1].started, pair[0]))


def read_history(folder: Path) -> list[dict[str, float]]:
    """The logged steps of a run, in order; a line cut short by a kill is left out."""
    lines = []
    path = folder / HISTORY
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, for which JSON has no sign."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written(value: Any) -> str:
    """A value in Hydra's grammar, quoted where a sign of it has a meaning there."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    text = str(value)
    escaped = text.replace("'", "\\'")
    return text if re.fullmatch(r"[\w./:@+-]+", text) else f"'{escaped}'"


ASIDE = "before"  # a finished run inside its own folder, while the same run is forced again


def set_aside(folder: Path) -> None:
    """Move everything that a finished run has left in its folder out of the way of the next one."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in sorted(folder.iterdir(), key=lambda path: path.name != FILE):  # what is left is no finished run
        if path.name not in (ASIDE, ".hydra", ".lock") and path.suffix != ".log":
            path.rename(aside / path.name)


def bring_back(folder: Path) -> bool:
    """Put back what was set aside, in the place of what a failed run has left; False where there is nothing."""
    aside = folder / ASIDE
    if not aside.exists():
        return False
    for path in sorted(aside.iterdir(), key=lambda path: path.name == FILE):
        place = folder / path.name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        path.rename(place)
    aside.rmdir()
    return True


def discard_aside(folder: Path) -> None:
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
