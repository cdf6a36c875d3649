"""The two scales of every artefact: `laptop`, a small model on a CPU, and `paper`, the paper's models and budgets."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from experiments.cells import Cell, Row
from welore.errors import Refused

MODELS = {"laptop": ["smollm2_135m"], "paper": ["llama2_7b", "llama2_13b", "mistral_7b"]}
# The perplexity of guessing every token alike.
VOCABULARY = {"smollm2_135m": 49_152, "llama2_7b": 32_000, "llama2_13b": 32_000, "mistral_7b": 32_000}


def setting(scale: str, text: str = "c4") -> Cell:
    """Text, protocol, training and amount of calibration of a scale.

    At laptop scale the text is read from local files where they are there, and is the packaged speeches where they are
    not: the protocol line under each artefact says which. At paper scale it is the authors' protocol, 0.7M tokens of
    training (Table 4) and 128 windows of calibration. The first 1,100 documents are those of C4: WikiText-2 is whole.
    """
    if scale == "paper":
        whole = {} if text == "c4" else {"task.protocol.documents": None}
        amounts = {"task/protocol": "authors", "task/training": "matched", "amounts@calibration": "field"}
        return {"task": text} | amounts | whole
    there = {"task": text, "task.path": str(local(text))} if local(text).is_dir() else {"task": "sotu"}
    return there | {"task/protocol": "laptop", "task/training": "laptop"}


def calibrated_on(scale: str, text: str) -> Cell:
    """Calibration on a text whatever the task is.

    The local WikiText-2 is calibrated on in its validation split, since it has no training split.
    """
    if scale == "paper":
        return {"calibration": text}
    if not local(text).is_dir():
        return {"calibration": "sotu"}
    split = "validation" if text == "wikitext2" else "calibration"
    return {"calibration": text, "calibration.path": str(local(text)), "calibration.split": split}


def factors(rows: Sequence[Row]) -> list[str]:
    """A note on cells whose factors are not those of the paper."""
    other = [row.cell["svd"] for row in rows if row.cell.get("svd", "plain") != "plain"]
    return [f"factors: {name}, at WeLore's ranks; the paper's are plain" for name in dict.fromkeys(other)]


def texts(scale: str) -> list[str]:
    """The texts that a scale can be measured on: C4 and WikiText-2, or the speeches where neither is there."""
    known = ["c4", "wikitext2"]
    return known if scale == "paper" else [text for text in known if local(text).is_dir()] or ["sotu"]


def local(text: str) -> Path:
    return Path(os.environ.get("WELORE_DATA", "../shared/data")) / text


# Benchmarks by the folder of their original files, beside the local texts.
FOLDERS = {"date": "date_understanding", "objects": "object_tracking"}


def questions(scale: str, task: str) -> Cell:
    """A benchmark and its training: as published at paper scale; at laptop scale minutes, on the answers alone.

    Local files are read where they are there. CoinFlip is generated: it needs none.
    """
    if scale == "paper":
        return {"task": task, "task/training": "downstream"}
    return {"task": task, "task/training": "questions", "task.scored": "answer"} | asked_of(scale, task)


def asked_of(scale: str, task: str) -> Cell:
    """A benchmark that nothing is trained on."""
    folder = local("tasks") / FOLDERS.get(task, task)
    there = scale == "laptop" and task != "coinflip" and folder.is_dir()
    return {"task": task} | ({"task.path": str(folder)} if there else {})


def judge(scale: str) -> Cell:
    """Who rates answers: the overrides in $WELORE_JUDGE, or else the paper's judge at paper scale and nobody at laptop
    scale, where an artefact leaves out what only a judge can fill."""
    told = os.environ.get("WELORE_JUDGE", "").strip()
    if not told:
        return {"judge": "openai"} if scale == "paper" else {}
    pairs = [override.partition("=") for override in shlex.split(told)]
    if odd := [key for key, equals, _ in pairs if not equals or key.partition(".")[0] != "judge"]:
        raise Refused(
            f"WELORE_JUDGE={told!r} holds {', '.join(odd)}. Write overrides of the judge alone, such as "
            f"WELORE_JUDGE='judge=local judge.path=FOLDER'."
        )
    found = {key: yaml.safe_load(value) for key, _, value in pairs}
    if found.get("judge", "none") in (None, "none"):
        raise Refused(f"WELORE_JUDGE={told!r} names no judge. Write judge=openai or judge=local, or unset it.")
    return found
