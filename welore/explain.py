"""What stopped a run, said to the person who started it."""

import difflib
import re
import sys
import traceback
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from welore.config import compose
from welore.errors import Interrupted, Refused


def explain(error: BaseException) -> int:
    """Print what stopped a run, as far as possible in one line, and return the exit status for it."""
    for cause in _chain(error):
        if isinstance(cause, Refused):
            return _say(str(cause), 2)
        if isinstance(cause, Interrupted):
            return _say(str(cause), 128 + cause.signal)  # what a shell reports of a process that a signal ended
        if isinstance(cause, FloatingPointError):
            return _say(str(cause), 1)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _say(_with_hint(error), 2)
    if isinstance(error, PermissionError):
        return _say(f"{error.filename} cannot be written. Give a folder that can: outputs=FOLDER.", 1)
    traceback.print_exception(error)
    return 1


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _say(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _with_hint(error: Exception) -> str:
    """Hydra's own words, and for a misspelled key the nearest one that there is."""
    message = str(error).strip()
    misspelled = re.search(r"Could not override '([\w.]+)'", message)
    if misspelled is None:
        return message

    near = difflib.get_close_matches(misspelled[1], list(_keys(OmegaConf.to_container(compose([])))), n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`python run.py --cfg job` shows every key."
    return f"there is no option {misspelled[1]} in this combination. {hint}"


def _keys(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
