"""What stopped a run, said to the person who started it."""

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterable, Iterator

import torch
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from welore.config import compose
from welore.errors import Interrupted, Lost, Refused

OUT_OF_MEMORY = (
    "Where it calibrates: lower calibration.tokens or calibration.window. Where it trains: raise "
    "task.training.accumulate, which divides a step into more passes, lower task.training.length, or take mode=welore "
    "or mode=lora, which train fewer parameters."
)
# What torch and safetensors make of a full disk, whose error number they do not hand on.
FULL_DISK = re.compile(r"No space left on device|inline_container.*unexpected pos|file write failed")
TYPES = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT)


class Failed(Exception):
    """Cells of a sweep that failed elsewhere, each explained already, with its exit status."""

    def __init__(self, cells: dict[str, int]):
        super().__init__(f"failed: {', '.join(cells)}")
        self.cells = cells


def explain(error: BaseException, cell: str = "") -> int:
    """Print what stopped a run, as far as possible in one line, and return the exit status for it.

    In a sweep `cell` says which run it was. What is not foreseen here is a defect and keeps its traceback.
    """
    where = f" in {cell}" if cell else ""
    foreseen = _foreseen(error)
    if foreseen is None:
        traceback.print_exception(error)
        foreseen = f"this is a defect: {type(error).__name__}: {error}", 1
    message, status = foreseen
    print(f"error{where}: {message}", file=sys.stderr)
    return status


def conclude(failed: dict[str, int]) -> int:
    """After a sweep, name the cells that failed; the exit status is the largest of theirs."""
    count = f"{len(failed)} cells of the sweep" if len(failed) > 1 else "one cell of the sweep"
    print(f"error: {count} failed, as said above; the others are done. Run again:", file=sys.stderr)
    for cell in failed:
        print(f"  {cell}", file=sys.stderr)
    return max(failed.values())


def _foreseen(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit status of what is no defect."""
    for cause in _chain(error):
        if isinstance(cause, Refused):
            return str(cause), 2
        if isinstance(cause, Interrupted):
            return str(cause), 128 + cause.signal  # what a shell reports of a process that a signal ended
        if isinstance(cause, KeyboardInterrupt):
            going_on = "the same command goes on from the last checkpoint, unless it says force=true"
            return f"stopped from the keyboard; {going_on}", 130
        if isinstance(cause, FloatingPointError | Lost):
            return str(cause), 1
        if isinstance(cause, torch.OutOfMemoryError):
            return f"the device is out of memory. {OUT_OF_MEMORY} {str(cause).splitlines()[0]}", 1
        if not isinstance(cause, OSError) and (said := FULL_DISK.search(str(cause))):
            return f"the run cannot be written ({said[0]}). Make room and start it again: it goes on.", 1
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            place = f"{cause.filename} cannot be written" if cause.filename else "the run cannot be written"
            return f"{place} ({cause.strerror}). Give a folder that can be: outputs=FOLDER.", 1
    if isinstance(error, HydraException | OmegaConfBaseException) or _raised_by_hydra(error):
        return _of_hydra(error), 2
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_by_hydra(error: BaseException) -> bool:
    """Hydra refuses some input, such as `mode=null`, with a bare ValueError."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals["__name__"].partition(".")[0] in ("hydra", "omegaconf")


def _of_hydra(error: BaseException) -> str:
    """Hydra's own words, with what it says in the exception below, and the nearest name for a misspelled one."""
    message, cause = str(error).strip(), error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if option == "submitit_slurm":
            return "hydra/launcher=slurm needs submitit, which is not installed. Run: pip install -e '.[slurm]'"
        hint = _did_you_mean(option, error.options)
        return f"{group}={option} is no option.{hint} Write {group}= one of {', '.join(error.options)}."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value. Write {error.full_key}=VALUE."
    if isinstance(cause, ValidationError):
        fault, override = str(cause).splitlines()[0].rstrip("."), message.removeprefix("Error merging override ")
        wanted = next((words for kind, words in TYPES.items() if fault.endswith(f" to {kind}")), "a value of its type")
        if "is not a ListConfig" in fault:
            wanted = "{}=[{}]".format(*override.split("=", 1))
        return f"{override}: {fault}. Write {wanted}."
    if misspelled := re.search(r"Could not override '([\w.]+)'", message):
        beside = _keys_beside(cause, misspelled[1]) if isinstance(cause, ConfigKeyError | AttributeError) else []
        everywhere = list(_keys(OmegaConf.to_container(compose([]))))
        hint = _did_you_mean(misspelled[1], beside) or _did_you_mean(misspelled[1], everywhere)
        hint = hint or " `python run.py --cfg job` shows every key."
        return f"there is no option {misspelled[1]} in this combination.{hint}"
    return message


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = [key for key in known if key.endswith(f".{name}")] or difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _keys_beside(error: OmegaConfBaseException, misspelled: str) -> list[str]:
    """The keys that stand in the same node: those of the chosen mode, not those of the default one."""
    prefix = misspelled.rpartition(".")[0]
    return [f"{prefix}.{key}" if prefix else str(key) for key in error.parent_node or ()]


def _keys(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
