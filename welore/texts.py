"""Documents from local files, and their division into splits."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from welore.cache import digest
from welore.errors import Refused

SPLITS = ("train", "calibration", "validation", "test")
# A pool of documents is split by a hash of each text, so that a document and its copies fall on one side.
SHARES = {"train": 80, "calibration": 5, "validation": 5, "test": 10}
SPLIT_WORDS = {split: split for split in SPLITS} | {
    "training": "train",
    "calib": "calibration",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    pool = list(texts)
    random.Random(seed).shuffle(pool)
    return iter(pool)


def hashed_split(texts: list[str], split: str) -> list[str]:
    start = sum(SHARES[name] for name in SPLITS[: SPLITS.index(split)])
    return [text for text in texts if start <= int(digest(text), 16) % 100 < start + SHARES[split]]


def text_files(path: Path, where: str = "task") -> list[Path]:
    """The files behind the path of the texts of `where`, which is `task` or `calibration`."""
    if not path.exists():
        raise Refused(f"{where}.path={path} does not exist. The working folder is {Path.cwd()}. Give the full path.")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".txt", ".raw"))
    if not files:
        raise Refused(f"{where}.path={path} holds no .jsonl, .txt or .raw file.")
    return files


def read_documents(file: Path, alone: bool, as_is: bool = False) -> list[str]:
    """The documents of one file: the `text` of each line of a jsonl, the lines of a raw file, a whole txt file.

    A txt file that stands `alone` is divided into its paragraphs (at blank lines). Empty documents are left out;
    `as_is` they stay, and a line of a raw file is the row that the hub has of it: with its end, or empty.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}). Write it as UTF-8.") from error
    if file.suffix == ".jsonl":
        try:
            # Not splitlines(): web text holds separators such as U+2028, which do not end a line of a jsonl.
            texts = [_text_of(line) for line in content.split("\n") if line.strip()]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refused(
                f"{file} is not a jsonl with a string in the field `text` of each line: "
                f'{type(error).__name__}: {error}. Write lines such as {{"text": "..."}}.'
            ) from error
    elif file.suffix == ".raw":
        texts = content.removesuffix("\n").split("\n")
        if as_is:
            return [f"{text}\n" if text.strip() else "" for text in texts]
    else:
        texts = content.split("\n\n") if alone else [content]
    return texts if as_is else [text for text in texts if text.strip()]


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError(f"the text is a {type(text).__name__}")
    return text


def _split_of(file: Path) -> str | None:
    """The split that a file is named after, as a word of its own: `wiki.test.raw`, `train-1.jsonl`, not `latest`."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def local_split(path: Path, split: str, where: str = "task", as_is: bool = False) -> list[str]:
    """Files named after their split serve that split; where none is held out by name, all documents are pooled.

    What is drawn from a pool is no running text, and never `as_is`: a row has one place among the splits.
    """
    files = text_files(path, where)
    named = {split: [f for f in files if _split_of(f) == split] for split in SPLITS}
    if named["test"] or named["validation"]:
        texts = [text for file in named[split] for text in read_documents(file, alone=False, as_is=as_is)]
        if not texts and split == "calibration" and named["train"]:
            texts = _local_split_of_train(named["train"], "calibration")
        elif split == "train" and not named["calibration"]:
            texts = _local_split_of_train(named["train"], "train")
    else:
        texts = hashed_split([t for file in files for t in read_documents(file, alone=path.is_file())], split)
    if not texts:
        raise Refused(
            f"{where}.path={path} holds no {split} text. Its files are {[f.name for f in files]}. Give more "
            f"documents, or files named after their split (train.jsonl, validation.jsonl, test.jsonl)."
        )
    return texts


def _local_split_of_train(files: list[Path], split: str) -> list[str]:
    """Calibration texts taken out of the training files, where none are named."""
    texts = [text for file in files for text in read_documents(file, alone=False)]
    calibration = set(hashed_split(texts, "calibration"))
    return [text for text in texts if (text in calibration) == (split == "calibration")]
