"""Copy the runs of finished artefacts into benchmarks/, where others can read them and go on from them.

    python scripts/publish.py who_learns table5               from outputs/
    python -m experiments who_learns outputs=benchmarks       the table, rendered from what was published
    cp -r benchmarks/. outputs/                               go on from there: what is published is not run again

Each run keeps its record and the files that its artefact draws, and no weights. Paths are made those of any machine:
the folder of local data is written as $WELORE_DATA.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.artefacts import gather, load
from experiments.cells import Row, Runs, default_outputs
from experiments.scales import local
from welore.errors import Refused
from welore.explain import explain
from welore.records import Record, records

TARGET = Path("benchmarks")


def main(arguments: Sequence[str]) -> int:
    """Print how many runs of each artefact were copied. The exit status: 2 where one of them is not done."""
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            raise Refused(__doc__.strip())
        outputs = Path(default_outputs())
        runs = Runs.of(records(outputs))
        for name in arguments:
            artefact = load(name)
            rows = gather(artefact, "laptop", runs)
            missing = sum(row.missing for row in rows)
            if missing:
                raise Refused(
                    f"{name} lacks {missing} of {len(rows)} runs. First: python -m experiments {name} logger=none"
                )
            for row in rows:
                publish(row, artefact.NEEDS, outputs, TARGET)
            print(f"{name}: {len(rows)} runs")
    except Exception as error:
        return explain(error)
    return 0


def publish(row: Row, needs: Sequence[str], outputs: Path, target: Path) -> None:
    """One run: its record without the paths of this machine, and what is drawn of it."""
    record = Record.read(row.folder)
    record.config = portable(record.config, {str(outputs): "outputs", str(local("")): "$WELORE_DATA"})
    record.error = record.error and record.error.splitlines()[0]  # of a diverged run; below it are lines of code
    folder = target / row.folder.relative_to(outputs)
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    for file in needs:
        shutil.copy(row.folder / file, folder / file)


def portable(value: Any, names: dict[str, str]) -> Any:
    """The same, with each folder that has a name called by it. Raises Refused where it holds another path."""
    if isinstance(value, dict):
        return {key: portable(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, names) for item in value]
    if not isinstance(value, str):
        return value
    for folder, name in names.items():
        path = Path(value)
        if path.is_relative_to(folder):
            return str(Path(name) / path.relative_to(folder))
    if value.startswith(("/", "~", "../")):
        raise Refused(
            f"{value} is a path of this machine, which nobody else has. Run with WELORE_DATA set to its folder."
        )
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
