"""Texts as token ids: the windows that perplexity is measured on, and the batches that a run trains on.

Shape suffixes: B = sequences, L = tokens of one sequence or window, T = tokens.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore import processes
from welore.cache import Cache, digest
from welore.errors import Refused
from welore.loss import IGNORED

if TYPE_CHECKING:
    from welore.tasks import Calibration, TextTask, Training

ENCODED_TOGETHER = 256  # documents in one cache entry


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
    saved = cache.get("tokens", key, partial(torch.load, weights_only=True), torch.save, make)
    return [row.tolist() for row in saved["ids"].split(saved["lengths"].tolist())]


def evaluation_windows(task: "TextTask", tokenizer: Any, cache: Cache, split: str = "test") -> Tensor:
    """The windows that a protocol scores, ids_BL. The text that is left after the last whole window is not scored."""
    protocol = task.protocol
    texts = list(islice(task.documents(split, as_is=protocol.as_is), protocol.documents))
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


def calibration_windows(calibration: "Calibration", tokenizer: Any, cache: Cache) -> Tensor:
    """The windows that statistics are gathered on, ids_BL: documents after each other, cut into whole windows."""
    wanted, length = calibration.tokens // calibration.window, calibration.window
    texts = calibration.documents(calibration.split, calibration.seed)
    rows = list(islice(_packed(texts, tokenizer, cache, length), wanted))
    if len(rows) < wanted:
        less = f"calibration.tokens={len(rows) * length} or less" if rows else "a smaller calibration.window"
        raise Refused(
            f"calibration={calibration.name} has {len(rows)} windows of {length} tokens in its split "
            f"{calibration.split}, and calibration.tokens={calibration.tokens} asks for {wanted}. Write "
            f"{less}, or calibration.split=train for more text."
        )
    return torch.tensor(rows)


@dataclass(frozen=True)
class Rows:
    """Training sequences: ids_BL, of which the first lengths_B tokens are real and the rest is padding.

    Scored are the real tokens from starts_B on, all but the first of a sequence where there is none.
    """

    ids_BL: Tensor
    lengths_B: Tensor
    starts_B: Tensor | None = None

    @classmethod
    def padded(cls, rows: list[list[int]], length: int, pad: int, starts: list[int] | None = None) -> "Rows":
        ids_BL = torch.full((len(rows), length), pad, dtype=torch.int32)
        for index, row in enumerate(rows):
            ids_BL[index, : len(row)] = torch.tensor(row, dtype=torch.int32)
        lengths_B = torch.tensor([len(row) for row in rows])
        return cls(ids_BL, lengths_B, None if starts is None else torch.tensor(starts))

    def __len__(self) -> int:
        return len(self.ids_BL)

    def batch(self, chosen: Tensor) -> dict[str, Tensor]:
        """The chosen rows, as long as the longest of them, as `ids_BL`, `labels_BL` (padding is not scored) and the
        number of `real` tokens."""
        lengths_B = self.lengths_B[chosen]
        ids_BL = self.ids_BL[chosen, : int(lengths_B.max())].long()
        place_L = torch.arange(ids_BL.shape[1])
        real_BL = place_L < lengths_B[:, None]
        scored_BL = real_BL if self.starts_B is None else real_BL & (place_L >= self.starts_B[chosen][:, None])
        return {"ids_BL": ids_BL, "labels_BL": ids_BL.masked_fill(~scored_BL, IGNORED), "real": real_BL.sum()}

    def share(self, of_pass: Tensor) -> dict[str, Tensor]:
        """The batch of this process: of the rows of a pass all, or its share where several processes train together.

        `real` counts the tokens of the whole pass.
        """
        real = self.lengths_B[of_pass].sum()
        return self.batch(of_pass[processes.index() :: processes.count()]) | {"real": real}

    def scored(self, chosen: Tensor) -> Tensor:
        """The number of scored tokens in the chosen rows; nothing predicts the first token of a sequence."""
        starts_B = torch.ones_like(self.lengths_B) if self.starts_B is None else self.starts_B.clamp_min(1)
        return (self.lengths_B - starts_B)[chosen].sum()


def training_rows(
    task: "TextTask", tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None
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
    return Rows.padded(rows, training.length, padding(tokenizer))


def frequency_perplexity(rows: Rows, windows_BL: Tensor, vocabulary: int) -> float:
    """Of the predicted tokens of every window, by nothing but the frequencies of the real tokens in `rows`.

    Each token of the vocabulary counts a tenth more, so that one that is in no row has a chance too.
    """
    real_BL = torch.arange(rows.ids_BL.shape[1]) < rows.lengths_B[:, None]
    known = max(vocabulary, int(windows_BL.max()) + 1)
    counts_V = torch.bincount(rows.ids_BL[real_BL], minlength=known).double() + 0.1
    return math.exp(-(counts_V / counts_V.sum()).log()[windows_BL[:, 1:]].mean())


def padding(tokenizer: Any) -> int:
    """A token to fill rows with; it is never attended to from, nor scored."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _sequences(texts: Iterator[str], tokenizer: Any, cache: Cache, training: "Training") -> Iterator[list[int]]:
    """Packed, or one document each, cut to the length."""
    if training.pack:
        yield from _packed(texts, tokenizer, cache, training.length)
        return
    while group := list(islice(texts, ENCODED_TOGETHER)):
        for ids in _ids(group, tokenizer, cache, special=True):
            if len(ids) > 1:
                yield ids[: training.length]


def _packed(texts: Iterator[str], tokenizer: Any, cache: Cache, length: int) -> Iterator[list[int]]:
    """Whole sequences of documents after each other, divided by the end-of-sequence token."""
    divider = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    carry: list[int] = []
    while group := list(islice(texts, ENCODED_TOGETHER)):
        for ids in _ids(group, tokenizer, cache, special=False):
            carry += ids + divider
            while len(carry) >= length:
                yield carry[:length]
                carry = carry[length:]


def check_shares(training: "Training") -> None:
    """Refuse passes that have no sequence for some of the processes that train together."""
    size = training.batch // training.accumulate
    if size < processes.count():
        raise Refused(
            f"task.training.batch={training.batch} in accumulate={training.accumulate} passes gives {size} sequences "
            f"to {processes.count()} processes. Start fewer processes, or write a smaller task.training.accumulate."
        )


class Batches:
    """The passes of a training run, `accumulate` to an optimizer step, in an order fixed by the seed.

    Each pass is a batch of `Rows` with `scored`, the number of scored tokens in the
    whole step: a loss divided by it is a mean over tokens, however the step is divided into passes and, where several
    processes train together, each pass among them (`Rows.share`). Where the rows run
    out, they are used again in another order. The position is saved with a checkpoint, so that a resumed run goes on
    with the batch after the last one that it stepped on.
    """

    def __init__(self, rows: Rows, training: "Training", seed: int):
        self.rows, self.training = rows, training
        self.generator_seed = seed
        self.position = 0
        self.order = self._order()
        self.size = training.batch // training.accumulate
        check_shares(training)
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
        start, self.position = self.position, 0
        for index in range(start, len(self)):
            step = index // self.training.accumulate
            of_step = self.order[step * self.training.batch : (step + 1) * self.training.batch]
            of_pass = self.order[index * self.size : (index + 1) * self.size]
            self.position = index + 1
            yield self.rows.share(of_pass) | {"scored": self.rows.scored(of_step)}
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
