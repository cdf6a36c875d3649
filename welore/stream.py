"""Training batches from more text than fits in memory: documents are read, and made tokens, as they are needed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.batches import ENCODED_TOGETHER, Rows, check_shares, padding
from welore.errors import Refused

if TYPE_CHECKING:
    from welore.tasks import Training

Documents = Callable[[int], Iterator[str]]


@dataclass
class Place:
    """How far the text is read: whole passes over it, documents of the next pass, tokens read and not yet used."""

    epoch: int = 0
    documents: int = 0
    carry: list[int] = field(default_factory=list)


class Stream:
    """The passes of a training run, as `Batches` gives them, over `documents` in the order that a seed gives them.

    Where the documents end they are read again in another order, that of the next seed. The place in the text is saved
    with a checkpoint. A resumed run reads over the documents before it without making them tokens.
    """

    def __init__(self, documents: Documents, tokenizer: Any, training: "Training", seed: int):
        self.documents, self.tokenizer, self.training, self.seed = documents, tokenizer, training, seed
        check_shares(training)
        self.steps = training.steps
        self.position, self.place = 0, Place()  # the place is where the step begins that the next pass is of

    def __len__(self) -> int:
        return self.steps * self.training.accumulate

    @property
    def epochs(self) -> float:
        """How many times the text was read to its end."""
        return float(self.place.epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        passes, batch = self.training.accumulate, self.training.batch
        first, skipped = divmod(self.position, passes)
        reading = self._sequences(self.place)
        for step in range(first, self.steps):
            drawn = list(islice(reading, batch))
            rows = Rows.padded([ids for ids, _ in drawn], self.training.length, padding(self.tokenizer))
            scored = rows.scored(torch.arange(batch))
            for number, chosen in enumerate(torch.arange(batch).chunk(passes)):
                if step == first and number < skipped:
                    continue
                self.position = step * passes + number + 1
                if number + 1 == passes:
                    self.place = drawn[-1][1]
                yield rows.share(chosen) | {"scored": scored}

    def _sequences(self, start: Place) -> Iterator[tuple[list[int], Place]]:
        """Token ids of sequence after sequence, for ever, each with the place after it."""
        divider = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        length, epoch, skipped, carry = self.training.length, start.epoch, start.documents, list(start.carry)
        while True:
            found = skipped > 0
            for number, ids in enumerate(self._ids(epoch, skipped), skipped + 1):
                if self.training.pack:
                    carry = carry + ids + divider  # a new list: the place of the last sequence keeps the old
                    while len(carry) >= length:
                        row, carry, found = carry[:length], carry[length:], True
                        yield row, Place(epoch, number, carry)
                elif len(ids) > 1:
                    found = True
                    yield ids[:length], Place(epoch, number)
            if not found:
                raise Refused(f"the training text is too little for one sequence of {length} tokens. Give more text.")
            epoch, skipped = epoch + 1, 0

    def _ids(self, epoch: int, skipped: int) -> Iterator[list[int]]:
        texts = islice(self.documents(self.seed + epoch), skipped, None)
        while group := list(islice(texts, ENCODED_TOGETHER)):
            special = not self.training.pack
            yield from self.tokenizer(group, add_special_tokens=special, verbose=False)["input_ids"]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "place": asdict(self.place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.place = state["position"], Place(**state["place"])
