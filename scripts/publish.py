"""Copy the runs of artefacts into benchmarks/, where others can read them and go on from them.

    python scripts/publish.py who_learns table5               from outputs/
    python -m experiments who_learns outputs=benchmarks       the table, rendered from what was published
    cp -rn benchmarks/. outputs/                              go on from there: what is published is not run again

Each run keeps its record and the files that its artefact draws, and no weights; of answers it keeps what the model
wrote and the verdicts, without the questions, which are those of a data set. Paths are made those of any machine: the
folder of local data is $WELORE_DATA.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # experiments/ is run from there, and is not installed

from experiments.artefacts import gather, load, missing
from experiments.cells import Row, Runs, default_outputs
from experiments.scales import local
from welore.errors import Refused
from welore.explain import explain
from welore.metrics import BREAKS_AT
from welore.records import Record, records

TARGET = Path("benchmarks")
OF_ANSWERS = ("written", "read", "verdict", "option", "rouge_l", BREAKS_AT)


def main(arguments: Sequence[str]) -> int:
    """Print how many runs of each artefact were copied, and how many it lacks. Exit status 2 where one is refused."""
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            raise Refused(__doc__.strip())
        outputs = Path(default_outputs())
        if not outputs.is_dir():
            raise Refused(f"{outputs} is no folder of {Path.cwd()}. Start where the runs were started.")
        runs = Runs.of(records(outputs))
        found = {name: gather(load(name), "laptop", runs) for name in arguments}
        done = {name: [row for row in rows if not row.missing] for name, rows in found.items()}
        published = {row.folder: told(row, outputs) for rows in done.values() for row in rows}
        for name, rows in done.items():
            for row in rows:
                folder = TARGET / row.folder.relative_to(outputs)
                write(published[row.folder], row.folder, folder, load(name).NEEDS)
            print(f"{name}: {len(rows)} runs published, {len(missing(found[name])[0])} missing")
    except Exception as error:
        return explain(error)
    return 0


def told(row: Row, outputs: Path) -> Record:
    """The record of a run without the paths of this machine."""
    record = Record.read(row.folder)
    names = {outputs: "outputs", outputs.resolve(): "outputs", local(""): "$WELORE_DATA"}
    record.config = portable(record.config, names)
    record.error = record.error and record.error.splitlines()[0]  # of a diverged run; below it are lines of code
    return record


def portable(value: Any, names: dict[Path, str]) -> Any:
    """The same, with `$WELORE_DATA/c4` for a path in the folder of that name. Raises Refused for any other path."""
    if isinstance(value, dict):
        return {key: portable(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, names) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~", "../")):
        return value
    for folder, name in names.items():
        if Path(value).is_relative_to(folder):
            return str(Path(name) / Path(value).relative_to(folder))
    raise Refused(
        f"{value} is a path of this machine, which nobody else has. Set WELORE_DATA to its folder, and run again."
    )


def write(record: Record, run: Path, folder: Path, needs: Sequence[str]) -> None:
    """The record, and what is drawn of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    for file in needs:
        if not (run / file).exists():  # one that diverged has no answers
            continue
        if file.startswith("answers-"):
            lines = (run / file).read_text(encoding="utf-8").split("\n")[:-1]
            (folder / file).write_text("".join(f"{judged(line)}\n" for line in lines), encoding="utf-8")
        else:
            shutil.copy(run / file, folder / file)


def judged(line: str) -> str:
    """An answer, what was read of it and what it was found to be, without the question."""
    answer = json.loads(line)
    kept = {key: answer[key] for key in OF_ANSWERS if key in answer}
    if "judgments" in answer:
        kept["judgments"] = [{"ratings": judgment["ratings"]} for judgment in answer["judgments"]]
    return json.dumps(kept, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
