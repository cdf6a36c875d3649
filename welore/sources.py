"""Records of data sets: from local files, by the name of each file, and from the hub, by the name of each split."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from httpx import HTTPError

from welore.cache import digest
from welore.errors import Refused

Raw = dict[str, Any]
T = TypeVar("T")


@contextmanager
def reading_hub(what: str, where: str, instead: str) -> Iterator[None]:
    """Say of whatever fails while the hub is read what was read, and what to give in its place."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # no connection, no such set, one that is a script
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"{what} are read from {where} on the hub, which failed: {reason} {instead}") from error


def content(path: str | None) -> str:
    """The hash of the files behind `task.path`, so that changed files are another experiment; empty without a path."""
    if path is None:
        return ""
    return digest(*(part for file in question_files(Path(path)) for part in (file.name, file.read_bytes())))


def question_files(path: Path) -> list[Path]:
    if not path.exists():
        raise Refused(f"task.path={path} does not exist. The working folder is {Path.cwd()}. Give the full path.")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl"))
    if not files:
        raise Refused(f"task.path={path} holds no .json or .jsonl file.")
    return files


def read_files(path: Path) -> dict[str, list[Raw]]:
    found = {file.stem: _records(file) for file in question_files(path)}
    if not any(found.values()):
        raise Refused(f"task.path={path} holds no question.")
    return found


def _records(file: Path) -> list[Raw]:
    """The objects of a JSON lines file, of a JSON list, or of the `examples` of a JSON object."""
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in content.split("\n") if line.strip()]
        found = json.loads(content)
        if isinstance(found, dict):
            found = found["Questions" if "Questions" in found else "examples"]  # FreebaseQA, and BIG-bench
        return list(found)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise Refused(
            f"{file} is not in a format of questions: {type(error).__name__}: {error}. Expected are JSON lines, a "
            f"JSON list, or a JSON object with a list `examples` or `Questions`."
        ) from error


def parsed(parse: Callable[[Any], T], raw: Any, number: int, where: str, form: str) -> T:
    """What `parse` makes of a record, which is named and shown where it is not in its form."""
    try:
        return parse(raw)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"record {number} of {where} is not in {form}: {type(error).__name__}: {error}. It is "
            f"{json.dumps(raw, default=str)[:200]}"
        ) from error


def text(raw: Raw, key: str) -> str:
    """A field that must hold words; raises ValueError where it does not."""
    if not is_text(raw[key]):
        raise ValueError(f"{key} holds no text but {raw[key]!r}")
    return raw[key]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def alone(raws: dict[str, list[Raw]]) -> list[Raw]:
    if len(raws) > 1:
        raise Refused(
            f"they should be in one file, and there are {sorted(raws)}. Give the path of one: task.path=FILE."
        )
    return next(iter(raws.values()))


def every(raws: dict[str, list[Raw]]) -> list[Raw]:
    """All records: of one file, or of all splits of the hub, whose own division is another."""
    return [raw for name in sorted(raws) for raw in raws[name]]


FOLDER = "Give the folder of the original files: task.path=FOLDER."


def named(raws: dict[str, list[Raw]], *words: str, instead: str = FOLDER) -> list[Raw]:
    """The records of the file or split whose name has one of the words."""
    names = [name for name in raws if set(words) & set(re.split(r"[^a-z]+", name.lower()))]
    if len(names) != 1:
        wanted = f"one file or split named after {' or '.join(words)} is needed"
        raise Refused(f"{wanted}, and there are {sorted(raws)}. {instead}")
    return raws[names[0]]


def alone_or_named(raws: dict[str, list[Raw]], path: str | None, *words: str) -> list[Raw]:
    """The records of the file `path`, or else those of the file or split whose name has one of the words."""
    if path is not None and Path(path).is_file():
        return alone(raws)
    return named(raws, *words, instead="Give the file itself: task.path=FILE.")


def train_and_dev(raws: dict[str, list[Raw]]) -> tuple[list[Raw], list[Raw]]:
    """For benchmarks whose test answers are secret: the dev set is the test set."""
    return named(raws, "train"), named(raws, "dev", "validation")


def head_and_tail(raws: list[Raw], share: float) -> tuple[list[Raw], list[Raw]]:
    """The first `share` of the records for training, the rest for testing."""
    count = int(share * len(raws) + 1e-9)
    return raws[:count], raws[count:]
