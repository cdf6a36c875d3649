"""Questions put to a model: what it writes greedily, and which option it holds most likely.

Shape suffixes: B = sequences, L = tokens, V = vocabulary.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from welore import metrics
from welore.batches import padding
from welore.counts import wilson
from welore.evaluate import Benchmark, Outcome, autocast, float32_logits
from welore.greedy import PASS_TOKENS, Continuation, passes, where_it_breaks, write_greedily

CPU_TOKENS = 1024  # of a pass without a cache: activations of more leave the caches of a CPU, and it gets slower


@dataclass(frozen=True)
class Item:
    """A prompt, its right answer, its options, if it has some, and other names of the right answer."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sitting:
    """How questions are asked. `special` says whether prompts lack the special tokens of a text's beginning; `read`
    finds an answer in what was written, `right` compares it with the right one. A pass holds at most `batch` sequences
    and `tokens` tokens, padding included; None is what suits the device."""

    special: bool
    batch: int
    new_tokens: int
    scoring: str
    read: Callable[[str], str | None]
    right: Callable[[str, Item], bool]
    tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """log p of an option of the question at `place`, in nats; where it is not finite, the layer where that starts."""

    place: int
    option: str
    nats: float
    breaks_at: str | None


@dataclass(frozen=True)
class Asked:
    """An option of the question at `place`: what stands in a sequence from `start` on, and the token `last` behind."""

    place: int
    option: str
    start: int
    last: int


def encode(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], special: bool) -> list[tuple[list[int], int]]:
    """The ids of each text, and how many of them are those of the prompt that it begins with.

    A text is encoded as a whole: cut behind the prompt, its answer would get other tokens than in training.
    """
    if not texts:
        return []
    encoded = tokenizer([*prompts, *texts], add_special_tokens=special, verbose=False)["input_ids"]
    pairs = zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True)
    # Some tokenizers end every text of their own accord, and an answer would begin after its end.
    ending = tokenizer.eos_token_id if special else None
    without = [(_without(prompt, ending), _without(text, ending)) for prompt, text in pairs]
    return [(text, _shared(prompt, text)) for prompt, text in without]


def _without(ids: list[int], ending: int | None) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == ending else ids


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class Exam(Benchmark):
    """Accuracy on questions. No question is ever left out: what cannot be read is wrong, and counted, and so is what
    a model says whose logits are not finite (`broken`)."""

    longest_key = "the longest question and its answer: tokens"

    def __init__(self, items: list[Item], practice: list[Item], tokenizer: Any, sitting: Sitting, title: str):
        self.items, self.practice = items, practice
        self.tokenizer, self.sitting, self.title = tokenizer, sitting, title
        self.prompts = self.encoded(items)
        self.longest = sitting.new_tokens + max(map(len, self.prompts))

    @property
    def identity(self) -> tuple[str | bytes, ...]:
        sitting = self.sitting
        how = f"{self.title} {sitting.special} {sitting.new_tokens} {sitting.scoring} {sitting.batch}"
        if sitting.tokens is not None:
            how += f" {sitting.tokens}"
        return how, json.dumps([astuple(item) for item in self.items]), json.dumps(self.prompts)

    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        started = time.perf_counter()
        with float32_logits(model):
            answers = self._answers(model, dtype, self.items, stage)
            seconds = time.perf_counter() - started
            asked_again = self.practice if stage == "tuned" else []
            practised = self._answers(model, dtype, asked_again, "training questions")
        found = _counted(answers)
        if breaks_at := next((a[metrics.BREAKS_AT] for a in answers if metrics.BREAKS_AT in a), None):
            found[metrics.BREAKS_AT] = breaks_at
        found |= {f"train_{key}": value for key, value in _counted(practised).items()}
        if practised:
            found["train_examples"] = len(practised)
        shared = {
            metrics.EVAL_EXAMPLES.key: len(answers),
            metrics.EVAL_CHANCE.key: max(Counter(i.answer for i in self.items).values()) / len(answers),
            metrics.EVAL_ACCURACY.key: found.get("accuracy", found.get("option_accuracy")),
            metrics.EVAL_UNPARSED.key: found.get("unparsed", 0),
            metrics.EVAL_QUESTIONS_PER_SECOND.key: len(answers) / seconds,
        }
        return Outcome(found, shared, answers, practised)

    def _answers(self, model, dtype, items: list[Item], stage: str) -> list[dict[str, Any]]:
        """By question: the prompt, what was written and read, the likelihood of the options, and the verdicts."""
        answers = [{"prompt": item.prompt, "right": item.answer} for item in items]
        if self.sitting.scoring != "likelihood":
            for answer, item, reply in zip(answers, items, self._written(model, dtype, items, stage), strict=True):
                answer |= self._read(item, reply)
        if self.sitting.scoring != "written" and items and items[0].options:
            likelihoods = self._likelihoods(model, dtype, items, stage)
            for answer, item, scored in zip(answers, items, likelihoods, strict=True):
                answer |= _likeliest(item, scored)
        return answers

    def _read(self, item: Item, reply: Continuation) -> dict[str, Any]:
        if reply.breaks_at:
            place = {metrics.BREAKS_AT: reply.breaks_at}
            return {"written": reply.text, "read": None, "verdict": "broken"} | place
        read = self.sitting.read(reply.text)
        verdict = "unparsed" if read is None else "right" if self.sitting.right(read, item) else "wrong"
        return {"written": reply.text, "read": read, "verdict": verdict}

    def encoded(self, items: Sequence[Item]) -> list[list[int]]:
        """Up to where an answer begins in training, which may be before the end of the prompt's own tokens.

        The same for every option, or the place would tell which is right.
        """
        pairs = [(place, answer) for place, item in enumerate(items) for answer in item.options or (item.answer,)]
        prompts = [items[place].prompt for place, _ in pairs]
        texts = [f"{items[place].prompt} {answer}" for place, answer in pairs]
        encoded = encode(self.tokenizer, prompts, texts, self.sitting.special)
        shortest: dict[int, list[int]] = {}
        for (place, _), (ids, start) in zip(pairs, encoded, strict=True):
            if place not in shortest or start < len(shortest[place]):
                shortest[place] = ids[:start]
        return [shortest[place] for place in range(len(items))]

    def _written(self, model: PreTrainedModel, dtype: str | None, items: list[Item], stage: str) -> list[Continuation]:
        prompts = self.prompts if items is self.items else self.encoded(items)
        sitting, ends = self.sitting, self.tokenizer.eos_token_id
        how = sitting.batch, sitting.new_tokens, ends, dtype, f"{stage} answers", sitting.tokens or PASS_TOKENS
        return write_greedily(model, self.tokenizer, prompts, *how)

    @torch.no_grad()
    def _likelihoods(self, model, dtype, items: list[Item], stage: str) -> list[list[Scored]]:
        """log p of every option behind the prompt. Options that differ in their last token share one sequence."""
        pairs = [(place, option) for place, item in enumerate(items) for option in item.options]
        prompts = [items[place].prompt for place, _ in pairs]
        texts = [f"{items[place].prompt} {option}" for place, option in pairs]
        encoded = encode(self.tokenizer, prompts, texts, self.sitting.special)
        wanted: dict[tuple[int, ...], list[Asked]] = {}
        for (place, option), (ids, start) in zip(pairs, encoded, strict=True):
            wanted.setdefault(tuple(ids[:-1]), []).append(Asked(place, option, start, ids[-1]))
        sequences, asked = [list(ids) for ids in wanted], list(wanted.values())
        found: list[dict[str, Scored]] = [{} for _ in items]
        suited = CPU_TOKENS if next(model.parameters()).device.type == "cpu" else PASS_TOKENS
        for places in passes(sequences, self.sitting.batch, f"{stage} options", self.sitting.tokens or suited):
            together = [sequences[place] for place in places]
            for scored in self._score(model, dtype, together, [asked[place] for place in places]):
                found[scored.place][scored.option] = scored
        return [[scored[option] for option in item.options] for scored, item in zip(found, items, strict=True)]

    def _score(
        self, model: PreTrainedModel, dtype: str | None, sequences: list[list[int]], asked: list[list[Asked]]
    ) -> list[Scored]:
        """log p of what is asked of each sequence, in one pass."""
        device = next(model.parameters()).device
        ids_BL = torch.full((len(sequences), max(map(len, sequences))), padding(self.tokenizer))
        for row, ids in enumerate(sequences):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
        ids_BL = ids_BL.to(device)
        # The fewest positions that hold every prediction that is asked for.
        first = min(option.start for options in asked for option in options) - 1
        with autocast(device, dtype):
            # Padding stands behind every sequence, where nothing real attends to it.
            logits_BLV = model(input_ids=ids_BL, use_cache=False, logits_to_keep=ids_BL.shape[1] - first).logits
        scored = [
            (option, _log_p(logits_BLV[row], first, sequences[row], option))
            for row, options in enumerate(asked)
            for option in options
        ]
        whole = all(math.isfinite(nats) for _, nats in scored)
        breaks_at = None if whole else where_it_breaks(model, ids_BL, dtype)
        return [Scored(o.place, o.option, nats, None if math.isfinite(nats) else breaks_at) for o, nats in scored]


def _log_p(logits_LV: Tensor, first: int, ids: list[int], option: Asked) -> float:
    """Of the tokens of an option, by logits that begin at position `first` of its sequence; in nats."""
    targets = [*ids[option.start :], option.last]
    positions = torch.arange(option.start - 1, option.start - 1 + len(targets)) - first
    log_p_LV = logits_LV[positions].float().log_softmax(-1)
    return float(log_p_LV[torch.arange(len(targets)), targets].sum())


def _likeliest(item: Item, scored: list[Scored]) -> dict[str, Any]:
    nats = {option.option: round(option.nats, 4) for option in scored}
    if breaks_at := next((option.breaks_at for option in scored if option.breaks_at), None):
        return {"nats": nats, "likeliest": None, "option": "broken", metrics.BREAKS_AT: breaks_at}
    best = max(scored, key=lambda option: option.nats).option
    return {"nats": nats, "likeliest": best, "option": "right" if best == item.answer else "wrong"}


def _counted(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, shares of all questions and their Wilson intervals, of what was written and of the likeliest options."""
    found: dict[str, Any] = {}
    for key, prefix in {"verdict": "", "option": "option_"}.items():
        if not answers or key not in answers[0]:
            continue
        verdicts = Counter(answer[key] for answer in answers)
        low, high = wilson(verdicts["right"], len(answers))
        found |= {
            f"{prefix}correct": verdicts["right"],
            f"{prefix}accuracy": verdicts["right"] / len(answers),
            f"{prefix}accuracy_low": low,
            f"{prefix}accuracy_high": high,
        }
        if key == "verdict":
            found["unparsed"] = verdicts["unparsed"]
        if verdicts["broken"]:
            found[f"{prefix}broken"] = verdicts["broken"]
    return found
