"""Questions put to a model: what it writes greedily, and which option it holds most likely.

Shape suffixes: B = sequences, L = tokens, V = vocabulary.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from welore import metrics
from welore.batches import padding
from welore.counts import wilson
from welore.evaluate import Benchmark, Outcome, autocast, float32_logits

PASS_TOKENS = 8192  # of one pass, padding included
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
    finds an answer in what was written, `right` compares it with the right one."""

    special: bool
    batch: int
    new_tokens: int
    scoring: str
    read: Callable[[str], str | None]
    right: Callable[[str, Item], bool]


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
    """Accuracy on questions. No question is ever left out: what cannot be read is wrong, and counted."""

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
        return how, json.dumps([astuple(item) for item in self.items]), json.dumps(self.prompts)

    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        started = time.perf_counter()
        with float32_logits(model):
            answers = self._answers(model, dtype, self.items, stage)
            seconds = time.perf_counter() - started
            asked_again = self.practice if stage == "tuned" else []
            practised = self._answers(model, dtype, asked_again, "training questions")
        found = _counted(answers)
        found |= {f"train_{key}": value for key, value in _counted(practised).items() if key.endswith("accuracy")}
        shared = {
            metrics.EVAL_EXAMPLES.key: len(answers),
            metrics.EVAL_CHANCE.key: max(Counter(i.answer for i in self.items).values()) / len(answers),
            metrics.EVAL_ACCURACY.key: found.get("accuracy", found.get("option_accuracy")),
            metrics.EVAL_UNPARSED.key: found.get("unparsed", 0),
            metrics.EVAL_TOKENS_PER_SECOND.key: sum(map(len, self.prompts)) / seconds,
        }
        return Outcome(found, shared, answers)

    def _answers(self, model, dtype, items: list[Item], stage: str) -> list[dict[str, Any]]:
        """By question: the prompt, what was written and read, the likelihood of the options, and the verdicts."""
        answers = [{"prompt": item.prompt, "right": item.answer} for item in items]
        if self.sitting.scoring != "likelihood":
            for answer, item, written in zip(answers, items, self._written(model, dtype, items, stage), strict=True):
                read = self.sitting.read(written)
                verdict = "unparsed" if read is None else "right" if self.sitting.right(read, item) else "wrong"
                answer |= {"written": written, "read": read, "verdict": verdict}
        if self.sitting.scoring != "written" and items and items[0].options:
            for answer, item, nats in zip(answers, items, self._likelihoods(model, dtype, items, stage), strict=True):
                best = max(nats, key=nats.get)
                verdict = "right" if best == item.answer else "wrong"
                answer |= {"nats": {k: round(v, 4) for k, v in nats.items()}, "likeliest": best, "option": verdict}
        return answers

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

    def _written(self, model: PreTrainedModel, dtype: str | None, items: list[Item], stage: str) -> list[str]:
        prompts = self.prompts if items is self.items else self.encoded(items)
        sitting, ends = self.sitting, self.tokenizer.eos_token_id
        title = f"{stage} answers"
        return write_greedily(model, self.tokenizer, prompts, sitting.batch, sitting.new_tokens, ends, dtype, title)

    @torch.no_grad()
    def _likelihoods(self, model, dtype, items: list[Item], stage: str) -> list[dict[str, float]]:
        """log p of every option behind the prompt, in nats. Options that differ in their last token share one pass."""
        pairs = [(place, option) for place, item in enumerate(items) for option in item.options]
        prompts = [items[place].prompt for place, _ in pairs]
        texts = [f"{items[place].prompt} {option}" for place, option in pairs]
        encoded = encode(self.tokenizer, prompts, texts, self.sitting.special)
        wanted: dict[tuple[int, ...], list[tuple[int, str, int, int]]] = {}
        for (place, option), (ids, start) in zip(pairs, encoded, strict=True):
            wanted.setdefault(tuple(ids[:-1]), []).append((place, option, start, ids[-1]))
        sequences = [list(ids) for ids in wanted]
        found: list[dict[str, float]] = [{} for _ in items]
        tokens = CPU_TOKENS if next(model.parameters()).device.type == "cpu" else PASS_TOKENS
        for places in _passes(sequences, self.sitting.batch, f"{stage} options", tokens):
            self._score_pass(model, dtype, [sequences[p] for p in places], list(wanted.values()), places, found)
        return [{option: scores[option] for option in item.options} for scores, item in zip(found, items, strict=True)]

    def _score_pass(self, model, dtype, sequences, asked, places, found) -> None:
        device = next(model.parameters()).device
        ids_BL = torch.full((len(sequences), max(map(len, sequences))), padding(self.tokenizer))
        for row, ids in enumerate(sequences):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
        # The fewest positions that hold every prediction that is asked for.
        first = min(start for place in places for _, _, start, _ in asked[place]) - 1
        with autocast(device, dtype):
            # Padding stands behind every sequence, where nothing real attends to it.
            logits_BLV = model(
                input_ids=ids_BL.to(device), use_cache=False, logits_to_keep=ids_BL.shape[1] - first
            ).logits
        for row, place in enumerate(places):
            for item, option, start, last in asked[place]:
                targets = [*sequences[row][start:], last]
                positions = torch.arange(start - 1, start - 1 + len(targets)) - first
                log_p_LV = logits_BLV[row][positions].float().log_softmax(-1)
                found[item][option] = float(log_p_LV[torch.arange(len(targets)), targets].sum())


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
) -> list[str]:
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
    written = [""] * len(prompts)
    for places in _passes(prompts, batch, title):
        length = max(len(prompts[place]) for place in places)
        ids_BL = torch.full((len(places), length), pad)
        real_BL = torch.zeros(len(places), length, dtype=torch.long)
        for row, place in enumerate(places):
            ids_BL[row, length - len(prompts[place]) :] = torch.tensor(prompts[place])
            real_BL[row, length - len(prompts[place]) :] = 1
        with autocast(device, dtype), _defaults(model, greedy):
            out_BL = model.generate(
                input_ids=ids_BL.to(device), attention_mask=real_BL.to(device), generation_config=greedy
            )
        new = tokenizer.batch_decode(out_BL[:, length:], skip_special_tokens=True)
        for place, text in zip(places, new, strict=True):
            written[place] = text
    return written


@contextmanager
def _defaults(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model's own defaults would fill what `config` leaves open: a repetition penalty, suppressed tokens."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _passes(
    sequences: Sequence[Sequence[int]], batch: int, title: str, tokens: int = PASS_TOKENS
) -> Iterator[list[int]]:
    """The places of at most `batch` sequences of similar lengths, the longest first, so that memory peaks at once."""
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
    bar = tqdm(total=len(order), desc=title, unit="question", leave=False)
    while order:
        size = max(1, min(batch, tokens // len(sequences[order[0]])))
        places, order = order[:size], order[size:]
        yield places
        bar.update(len(places))
    bar.close()


def _counted(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, shares of all questions and their Wilson intervals, of what was written and of the likeliest options."""
    found: dict[str, Any] = {}
    for key, prefix in {"verdict": "", "option": "option_"}.items():
        if not answers or key not in answers[0]:
            continue
        correct = sum(answer[key] == "right" for answer in answers)
        low, high = wilson(correct, len(answers))
        found |= {
            f"{prefix}correct": correct,
            f"{prefix}accuracy": correct / len(answers),
            f"{prefix}accuracy_low": low,
            f"{prefix}accuracy_high": high,
        }
    if answers and "verdict" in answers[0]:
        found["unparsed"] = sum(answer["verdict"] == "unparsed" for answer in answers)
    return found
