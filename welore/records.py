"""What a run leaves behind (`Record`) and what a table asks for (`Sweep`)."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

FILE = "record.json"


@dataclass(frozen=True)
class Sweep:
    """A full product of Hydra overrides, e.g. Sweep({"model": ["tiny"], "err": [0.1, 0.3]})."""

    axes: dict[str, list]

    def cells(self) -> list[dict[str, Any]]:
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]


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
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps(_finite(asdict(self)), indent=2, sort_keys=True, allow_nan=False))
        part.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record in a run folder, or None where there is none or it cannot be read."""
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def records(root: Path) -> Iterator[Record]:
    """Every finished run under `root`."""
    for path in sorted(root.rglob(FILE)):
        record = Record.read(path.parent)
        if record is not None and record.status == "done":
            yield record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
