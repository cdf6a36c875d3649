"""Questions with a right answer: where they come from, how they are split, put to a model and read.

The prompts, splits and rules of `style=paper` are those of the WeLore experiments (Section 4.2, Table 6), with the
answers that their rules drop counted as wrong.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from welore.batches import Rows, padding
from welore.cache import Cache
from welore.errors import Refused
from welore.examine import Exam, Item, Sitting, encode
from welore.sources import Raw, content, parsed, read_files, reading_hub
from welore.tasks import Task

BLURB = "Below is a question that describes a task. Write a response that appropriately completes the request."
PAPER = "{blurb}\n\n### \n{passage}Question: {question}\n\n\n### Response:\n{trigger}"
PAPER_END = ".\n\n### End"
LOCAL_COPY = "Give a local copy in the original format: task.path=FILE_OR_FOLDER."


@dataclass(frozen=True)
class Example:
    """A question with its right answer, among `options` where there are some, below a passage where there is one.

    `aliases` are other names of the right answer.
    """

    question: str
    answer: str
    options: tuple[str, ...] = ()
    passage: str = ""
    aliases: tuple[str, ...] = ()


@dataclass
class Questions(Task):
    """A benchmark with right answers. `path` puts a local file or folder in its original format for the hub.

    `style` is how questions are put: `paper`, as published, or `chat`, in the template of the model. Trained are all
    tokens of the text (`scored=all`) or those of the answer alone (`answer`). `rule=paper` reads the first match of
    the published pattern in what the model wrote, `word` the first that is a word of its own. The share `held_out` of
    the training questions is for validation. `limit` test questions are asked (null for all), and `train_limit`
    training questions after tuning, to see what was learnt by heart. `scoring` is by what the model writes in
    `new_tokens` tokens (`written`), by the likelihood of each option (`likelihood`), or `both`. `sizes` are the
    numbers of training and test questions that must be there (null for any). `published_steps` are those of the
    paper, for task/training=downstream.
    """

    where: ClassVar[str] = "task"
    trigger: ClassVar[str]  # what stands before the answer
    pattern: ClassVar[str]  # of an answer, as published
    repo: str | None
    subset: str | None
    revision: str | None
    style: str
    scored: str
    rule: str
    scoring: str
    held_out: float
    limit: int | None
    train_limit: int
    batch: int
    new_tokens: int
    sizes: list[int] | None
    published_steps: int | None

    def __post_init__(self):
        choices = {
            "style": ("paper", "chat"),
            "scored": ("all", "answer"),
            "rule": ("paper", "word"),
            "scoring": ("written", "likelihood", "both"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise Refused(f"task.{key}={getattr(self, key)} is unknown. Write {' or '.join(known)}.")
        if not 0 < self.held_out < 1:
            raise Refused(f"task.held_out={self.held_out} is no share in (0, 1). Write 0.1 for a tenth.")
        if self.sizes is not None and (len(self.sizes) != 2 or min(self.sizes) < 0):
            raise Refused(
                f"task.sizes={list(self.sizes)} are not the numbers of training and of test questions. Write two, as "
                f"in task.sizes=[350,150], or null for any."
            )
        for key, least in {"limit": 1, "train_limit": 0, "batch": 1, "new_tokens": 1}.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise Refused(f"task.{key}={value} asks nothing. Write {least} or more.")

    # What a benchmark is made of; each says it for itself.

    def example(self, raw: Raw) -> Example:
        """One record of the file or of the hub; raises KeyError or ValueError where a field is missing or odd."""
        raise NotImplementedError

    def divide(self, raws: dict[str, list[Raw]]) -> tuple[list[Raw], list[Raw]]:
        """Training and test records, from the records of each file or hub split."""
        raise NotImplementedError

    def right(self, read: str, item: Item) -> bool:
        return read == item.answer

    # Where they come from.

    def examples(self, split: str) -> list[Example]:
        """`train`, `validation` (held out of the training questions) or `test`, in the order of their source."""
        train, test = self._divided()
        self._check_sizes(len(train), len(test))
        if split == "test":
            return self._parsed(test)
        kept = train[: len(train) - max(1, round(self.held_out * len(train)))]
        return self._parsed(kept if split == "train" else train[len(kept) :])

    def _divided(self) -> tuple[list[Raw], list[Raw]]:
        raws = self._raws()
        try:
            return self.divide(raws)
        except Refused as error:
            raise Refused(f"{self._source()} does not hold the questions of task={self.name}: {error}") from error

    def _check_sizes(self, train: int, test: int) -> None:
        if not test:
            raise Refused(f"{self._source()} holds no test question. {LOCAL_COPY}")
        if self.sizes is not None and [train, test] != list(self.sizes):
            instead = LOCAL_COPY if self.path is None else "For questions of your own write task.sizes=null."
            raise Refused(
                f"{self._source()} has {train} training and {test} test questions, and the benchmark "
                f"{self.sizes[0]} and {self.sizes[1]}. {instead}"
            )

    def _parsed(self, raws: Sequence[Raw]) -> list[Example]:
        form = f"the format of {self.name}"
        return [parsed(self.example, raw, number, self._source(), form) for number, raw in enumerate(raws)]

    def _source(self) -> str:
        return f"task.path={self.path}" if self.path else f"{self.repo} on the hub"

    def _raws(self) -> dict[str, list[Raw]]:
        return self._hub() if self.path is None else read_files(Path(self.path))

    def _hub(self) -> dict[str, list[Raw]]:
        from datasets import load_dataset

        with reading_hub(f"the questions of {self.name}", self.repo, LOCAL_COPY):
            parts = load_dataset(self.repo, self.subset, revision=self.revision)
            return {name: [dict(row) for row in rows] for name, rows in parts.items()}

    def fetch(self) -> str | None:
        if self.path is not None or self.repo is None:
            return None
        self._raws()  # whose client keeps them
        return f"{self.repo} from the hub"

    def identity(self) -> str:
        return content(self.path)

    # How they are put.

    def prompt(self, example: Example, tokenizer: Any) -> str:
        """All that stands before the answer, up to the space before it."""
        passage = f"{example.passage}\n\n" if example.passage else ""
        if self.style == "paper":
            return PAPER.format(blurb=BLURB, passage=passage, question=example.question, trigger=self.trigger)
        if tokenizer.chat_template is None:
            raise Refused("task.style=chat needs a model with a chat template. Write task.style=paper.")
        turns = [
            {"role": "user", "content": f"{passage}{example.question}"},
            {"role": "assistant", "content": self.trigger},
        ]
        return tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)

    def ending(self, tokenizer: Any) -> str:
        """What is trained to stand behind the answer."""
        return PAPER_END if self.style == "paper" else f".{tokenizer.eos_token or ''}"

    def items(self, examples: Sequence[Example], tokenizer: Any) -> list[Item]:
        return [Item(self.prompt(e, tokenizer), e.answer, e.options, e.aliases) for e in examples]

    def read(self, written: str) -> str | None:
        """The answer in what the model wrote after the prompt; None where there is none."""
        # A number is read whole or not at all: neither the 3 of 3.5kg nor the 5 of x3.5, nor the 1 of 1,000.
        word = rf"(?<!\w)(?!(?<=[.,])\d)(?>{self.pattern})(?!\w|[.,]\d)"
        pattern = self.pattern if self.rule == "paper" else word
        found = re.search(pattern, written)
        return found.group() if found else None

    # What a run asks for.

    def benchmark(self, tokenizer: Any, cache: Cache) -> Exam:
        test = self.examples("test")
        asked = test[: self.limit]
        if self.scoring == "likelihood" and not asked[0].options:
            raise Refused(f"task={self.name} has no options, so task.scoring=likelihood is impossible. Write written.")
        practice = self.examples("train")[: self.train_limit] if self.train_limit else []
        sitting = Sitting(self.style == "paper", self.batch, self.new_tokens, self.scoring, self.read, self.right)
        rule = {"word": "word, numbers whole"}.get(self.rule, self.rule)
        questions = f"{len(asked)} of {len(test)} test questions, style {self.style}, rule {rule}"
        title = f"{self.name}: {questions}, greedy"
        return Exam(self.items(asked, tokenizer), self.items(practice, tokenizer), tokenizer, sitting, title)

    def rows(self, tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None) -> Rows:
        """Whole texts, each in a row of its own; those that are longer than a row are left out, as in the paper."""
        examples, length = self.examples(split)[:limit], self.training.length
        if not examples:
            raise Refused(
                f"{self._source()} leaves no {split} question of task={self.name} with task.held_out={self.held_out}. "
                f"Give more training questions, or write another share."
            )
        prompts = [self.prompt(example, tokenizer) for example in examples]
        texts = [f"{p} {e.answer}{self.ending(tokenizer)}" for p, e in zip(prompts, examples, strict=True)]
        encoded = encode(tokenizer, prompts, texts, self.style == "paper")
        fitting = [(ids, start) for ids, start in encoded if len(ids) <= length]
        if not fitting:
            raise Refused(
                f"no {split} question of task={self.name} fits into task.training.length={length} tokens; the "
                f"shortest has {min(len(ids) for ids, _ in encoded)}."
            )
        if left_out := len(encoded) - len(fitting):
            told = f"· {left_out} of {len(encoded)} {split} questions are longer than {length} tokens and left out"
            print(told, file=sys.stderr, flush=True)
        starts = [start for _, start in fitting] if self.scored == "answer" else None
        rows = [ids for ids, _ in fitting]
        return Rows.padded(rows, max(map(len, rows)), padding(tokenizer), starts)
