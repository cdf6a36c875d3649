"""Greedy writing, in batches of prompts of similar lengths.

Shape suffixes: B = sequences, L = tokens, V = vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from welore.batches import padding
from welore.evaluate import autocast, first_not_finite

PASS_TOKENS = 8192  # of one pass, padding included


@dataclass(frozen=True)
class Continuation:
    """What a model wrote; `breaks_at` is the first layer whose output is not finite, where the logits were not."""

    text: str
    breaks_at: str | None = None


def where_it_breaks(model: PreTrainedModel, ids_BL: Tensor, dtype: str | None) -> str:
    with autocast(ids_BL.device, dtype):
        return first_not_finite(model, ids_BL)


class Broken(LogitsProcessor):
    """Notes which sequences were given NaN or infinity for a next token: whatever is chosen then means nothing.

    A sequence that has ended behind its prompt of `length` tokens is given padding only for the others of its batch.
    """

    def __init__(self, length: int, ends: int | list[int] | None):
        self.length, self.ends = length, [] if ends is None else ends
        self.rows_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows_B = ~(scores < math.inf).all(-1)  # minus infinity is how a model rules out a token
        rows_B &= ~torch.isin(input_ids[:, self.length :], torch.tensor(self.ends, device=input_ids.device)).any(-1)
        self.rows_B = rows_B if self.rows_B is None else self.rows_B | rows_B
        return scores


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[list[int]],
    batch: int,
    new_tokens: int,
    ends: int | list[int] | None,
    dtype: str | None,
    title: str,
    tokens: int = PASS_TOKENS,
) -> list[Continuation]:
    """What the model writes after each prompt, up to one of the tokens `ends` and without special tokens."""
    device, pad = next(model.parameters()).device, padding(tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends,
    )
    written = [Continuation("")] * len(prompts)
    for places in passes(prompts, batch, title, tokens):
        length = max(len(prompts[place]) for place in places)
        ids_BL = torch.full((len(places), length), pad)
        real_BL = torch.zeros(len(places), length, dtype=torch.long)
        for row, place in enumerate(places):
            ids_BL[row, length - len(prompts[place]) :] = torch.tensor(prompts[place])
            real_BL[row, length - len(prompts[place]) :] = 1
        broken = Broken(length, ends)
        with autocast(device, dtype), _defaults(model, greedy):
            out_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=real_BL.to(device),
                generation_config=greedy,
                logits_processor=[broken],
            )
        breaks_at = where_it_breaks(model, out_BL, dtype) if broken.rows_B.any() else None
        new = tokenizer.batch_decode(out_BL[:, length:], skip_special_tokens=True)
        for place, text, breaks in zip(places, new, broken.rows_B.tolist(), strict=True):
            written[place] = Continuation(text, breaks_at if breaks else None)
    return written


@contextmanager
def _defaults(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model's own defaults would fill what `config` leaves open: a repetition penalty, suppressed tokens."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def passes(
    sequences: Sequence[Sequence[int]], batch: int, title: str, tokens: int = PASS_TOKENS
) -> Iterator[list[int]]:
    """The places of at most `batch` sequences of similar lengths, the longest first, so that memory peaks at once."""
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
    bar = tqdm(total=len(order), desc=title, unit="question", leave=False, disable=len(order) <= batch)  # one pass
    while order:
        size = max(1, min(batch, tokens // len(sequences[order[0]])))
        places, order = order[:size], order[size:]
        yield places
        bar.update(len(places))
    bar.close()
