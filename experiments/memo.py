"""Fingerprints of cells from one command to the next: composing the configs of all artefacts takes the better part of
a minute, and nearly every command needs the same ones."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import welore
from experiments.cells import Cell, fingerprint_of
from welore.cache import digest, whole
from welore.config import CONF


@contextmanager
def remembered(outputs: str) -> Iterator[Callable[[Cell], str]]:
    """`fingerprint_of`, which remembers. What it knows holds for the present state of conf/ and of the code."""
    path = Path(outputs) / ".cache" / "fingerprints" / f"{state()}.json"
    known = _read(path)
    before = len(known)

    def name(cell: Cell) -> str:
        key = digest(json.dumps(cell), *_files(cell))
        if key not in known:
            known[key] = fingerprint_of(cell)
        return known[key]

    yield name
    if len(known) > before:
        # A folder that is read alone costs the minute every time, and nothing else.
        with suppress(OSError), whole(path) as part:
            part.write_text(json.dumps(known))


def state() -> str:
    """That of conf/ and of the code."""
    files = sorted([*CONF.rglob("*.yaml"), *Path(welore.__file__).parent.glob("*.py")])
    return digest(*(part for file in files for part in (str(file.relative_to(CONF.parent)), file.read_bytes())))


def _files(cell: Cell) -> list[str]:
    """The local files that a cell names, by size and time of change: their content is part of a fingerprint."""
    named = [Path(value) for value in cell.values() if isinstance(value, str) and "/" in value]
    files = [file for path in named for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
