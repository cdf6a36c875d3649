"""Training from scratch: what it trains beside the mode, and when it leaves snapshots."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from welore.batches import Batches
from welore.cache import Cache
from welore.errors import Refused
from welore.stream import Stream
from welore.tasks import Task, Training


@dataclass
class Pretraining(Training):
    """A training that may start from random weights, and leaves snapshots.

    With `stream` the documents are read while it runs, and not all at first: for text that does not fit in memory.
    Their order is that of the source, shuffled by the seed, and sequences of one document follow each other.
    With `embeddings` the input and output embeddings train as well, whatever the mode is: AdamW steps them at `lr`.
    Snapshots are taken after 0, 1, 2, 4, 8, ... steps below `snapshot_every`, after every `snapshot_every` steps, and
    at the end; null takes none.
    """

    embeddings: bool
    stream: bool
    snapshot_every: int | None

    def __post_init__(self):
        super().__post_init__()
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise Refused(
                f"task.training.snapshot_every={self.snapshot_every} is no number of steps. Write 1 or more, or null "
                f"for no snapshots."
            )
        if self.stream and self.steps is None:
            raise Refused("task.training.stream=true reads as many steps as it is told. Write task.training.steps=N.")

    def batches(self, task: Task, tokenizer: Any, cache: Cache, seed: int) -> Batches | Stream:
        if not self.stream:
            return super().batches(task, tokenizer, cache, seed)
        return Stream(task.training_texts, tokenizer, self, seed)

    def unfreeze(self, model: PreTrainedModel) -> list[nn.Parameter]:
        if not self.embeddings:
            return []
        both = (model.get_input_embeddings(), model.get_output_embeddings())
        parameters = {id(p): p for module in both for p in module.parameters()}  # tied ones once
        return [p.requires_grad_(True) for p in parameters.values()]

    def snapshots(self, steps: int) -> list[int]:
        if self.snapshot_every is None:
            return []
        doubling = [2**power for power in range((self.snapshot_every - 1).bit_length())]
        regular = range(self.snapshot_every, steps, self.snapshot_every)
        return [0, *(step for step in doubling if step < steps), *regular, steps]
