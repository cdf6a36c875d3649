"""Questions with a right answer: where they come from, how they are split, put to a model and read.

The prompts, splits and rules of `style=paper` are those of the WeLore experiments (Section 4.2, Table 6), with the
answers that their rules drop counted as wrong.
"""

import hashlib
import json
import random
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
from welore.tasks import Task

BLURB = "Below is a question that describes a task. Write a response that appropriately completes the request."
PAPER = "{blurb}\n\n### \n{passage}Question: {question}\n\n\n### Response:\n{trigger}"
PAPER_END = ".\n\n### End"
SHUFFLE_SEED = 99  # of the authors, for the choices of date understanding

Raw = dict[str, Any]


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
        train, test = self.divide(self._raws())
        self._check_sizes(len(train), len(test))
        if split == "test":
            return self._parsed(test)
        kept = train[: len(train) - max(1, round(self.held_out * len(train)))]
        return self._parsed(kept if split == "train" else train[len(kept) :])

    def _check_sizes(self, train: int, test: int) -> None:
        if not test:
            raise Refused(f"{self._source()} holds no test question.")
        if self.sizes is not None and [train, test] != list(self.sizes):
            raise Refused(
                f"{self._source()} has {train} training and {test} test questions, and the benchmark "
                f"{self.sizes[0]} and {self.sizes[1]}. For questions of your own write task.sizes=null."
            )

    def _parsed(self, raws: Sequence[Raw]) -> list[Example]:
        found = []
        for number, raw in enumerate(raws):
            try:
                found.append(self.example(raw))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise Refused(
                    f"record {number} of {self._source()} is no question of {self.name}: {type(error).__name__}: "
                    f"{error}. It is {json.dumps(raw, default=str)[:200]}"
                ) from error
        return found

    def _source(self) -> str:
        return f"task.path={self.path}" if self.path else f"{self.repo} on the hub"

    def _raws(self) -> dict[str, list[Raw]]:
        return self._hub() if self.path is None else read_files(Path(self.path))

    def _hub(self) -> dict[str, list[Raw]]:
        from datasets import load_dataset

        repo, _, revision = self.repo.partition("@")
        try:
            parts = load_dataset(repo, self.subset, revision=revision or None)
        except (OSError, ValueError, RuntimeError) as error:  # no connection, no such set, a set that is a script
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(
                f"the questions of {self.name} are read from {self.repo} on the hub, which failed: {reason} Give a "
                f"local copy in the original format: task.path=FILE_OR_FOLDER."
            ) from error
        return {name: [dict(row) for row in rows] for name, rows in parts.items()}

    def identity(self) -> str:
        if self.path is None:
            return ""
        digest = hashlib.blake2b(digest_size=8)
        for file in question_files(Path(self.path)):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

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
        pattern = self.pattern if self.rule == "paper" else rf"(?<!\w)(?:{self.pattern})(?!\w)"
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
        questions = f"{len(asked)} of {len(test)} test questions, style {self.style}, rule {self.rule}"
        title = f"{self.name}: {questions}, greedy"
        return Exam(self.items(asked, tokenizer), self.items(practice, tokenizer), tokenizer, sitting, title)

    def rows(self, tokenizer: Any, cache: Cache, seed: int, split: str = "train", limit: int | None = None) -> Rows:
        """Whole texts, each in a row of its own; those that are longer than a row are left out, as in the paper."""
        examples, length = self.examples(split)[:limit], self.training.length
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


@dataclass
class CommonsenseQa(Questions):
    """Five choices by common sense; the dev set is the test set, as in the paper."""

    trigger: ClassVar[str] = "Among A through E, the answer is"
    pattern: ClassVar[str] = "A|B|C|D|E"

    def divide(self, raws):
        return named(raws, "train"), named(raws, "dev", "validation")

    def example(self, raw):
        inner = raw["question"]
        if isinstance(inner, str):  # the hub's format: flat, with the choices as two lists
            stem, choices = inner, list(zip(raw["choices"]["label"], raw["choices"]["text"], strict=True))
        else:
            stem, choices = inner["stem"], [(choice["label"], choice["text"]) for choice in inner["choices"]]
        return chosen(stem, [text for _, text in choices], [label for label, _ in choices].index(raw["answerKey"]))


@dataclass
class Svamp(Questions):
    """A sum in words, answered by a number. The first 70 % are for training."""

    trigger: ClassVar[str] = "The answer (arabic numerals) is"
    pattern: ClassVar[str] = r"-?\d+\.?\d*"

    def divide(self, raws):
        return (raws["train"], raws["test"]) if "test" in raws else head_and_tail(alone(raws), 0.7)

    def example(self, raw):
        return Example(f"{raw['Body']} {raw['Question']}", f"{float(raw['Answer']):g}")

    def right(self, read: str, item: Item) -> bool:
        return float(read) == float(item.answer)


@dataclass
class BoolQ(Questions):
    """True or false, by a passage. The dev set is the test set."""

    trigger: ClassVar[str] = "Among True and False, the answer is"
    pattern: ClassVar[str] = "True|False"

    def divide(self, raws):
        return named(raws, "train"), named(raws, "dev", "validation")

    def example(self, raw):
        if not isinstance(raw["answer"], bool):
            raise ValueError(f"the answer {raw['answer']!r} is neither true nor false")
        question = f"{raw['question']}? Answer Choices: (a) True (b) False"
        return Example(question, str(raw["answer"]), ("True", "False"), raw["passage"])


@dataclass
class YesOrNo(Questions):
    """What is answered by yes or no."""

    trigger: ClassVar[str] = "The answer is"
    pattern: ClassVar[str] = "yes|no"


@dataclass
class CoinFlip(YesOrNo):
    """Whether a coin is still heads up after four people have flipped it or not.

    Without a path the puzzles are generated, of the same kind as those of the paper: `generator_seed` says which.
    """

    generator_seed: int

    def _raws(self):
        if self.path is not None:
            return read_files(Path(self.path))
        return {"generated": coin_flips(sum(self.sizes or [350, 150]), self.generator_seed)}

    def divide(self, raws):
        return head_and_tail(alone(raws), 0.7)

    def example(self, raw):
        if raw["answer"] not in ("yes", "no"):
            raise ValueError(f"the answer {raw['answer']!r} is neither yes nor no")
        return Example(raw["question"], raw["answer"], ("yes", "no"))


@dataclass
class StrategyQa(YesOrNo):
    """Yes or no by reasoning in several steps, in BIG-bench's format."""

    def divide(self, raws):
        return head_and_tail(every(raws), 0.7)

    def example(self, raw):
        scores = {option.lower(): score for option, score in big_bench(raw).items()}
        if set(scores) != {"yes", "no"}:
            raise ValueError(f"the options {sorted(scores)} are not yes and no")
        return Example(question_of(raw), max(scores, key=scores.get), ("yes", "no"))


@dataclass
class DateUnderstanding(Questions):
    """A date out of five or six, in BIG-bench's format: the `BigBench` of the paper.

    The right one stands first in nearly every record, so that choices are shuffled, in one fixed way.
    """

    trigger: ClassVar[str] = "Among A through F, the answer is"
    pattern: ClassVar[str] = "A|B|C|D|E|F"

    def divide(self, raws):
        return head_and_tail(every(raws), 0.8)

    def example(self, raw):
        scores, question = big_bench(raw), question_of(raw)
        choices = sorted(scores)
        random.Random(f"{SHUFFLE_SEED} {question}").shuffle(choices)
        return chosen(question, choices, choices.index(max(scores, key=scores.get)))


@dataclass
class ObjectTracking(Questions):
    """Who holds what after three swaps: three choices, in BIG-bench's format."""

    trigger: ClassVar[str] = "Among A through C, the answer is"
    pattern: ClassVar[str] = "A|B|C"

    def divide(self, raws):
        return head_and_tail(every(raws), 0.8)

    def example(self, raw):
        scores = big_bench(raw)
        choices = list(scores)
        question = f"{question_of(raw).strip()} \nWhich choice is true ?"
        return chosen(question, [choice.rstrip(".") for choice in choices], choices.index(max(scores, key=scores.get)))


def chosen(stem: str, choices: Sequence[str], right: int) -> Example:
    """A question whose choices get letters, answered by the letter of the right one."""
    letters = tuple("ABCDEFGHIJ"[: len(choices)])
    written = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    return Example(f"{stem} Answer Choices: {written}", letters[right], letters)


def big_bench(raw: Raw) -> dict[str, float]:
    """The score of each choice, in the format of BIG-bench's files or that of its copy on the hub."""
    if "target_scores" in raw:
        scores = raw["target_scores"]
    else:
        scores = dict(zip(raw["multiple_choice_targets"], raw["multiple_choice_scores"], strict=True))
    if sorted(scores.values())[-2:] != [0, 1]:
        raise ValueError(f"the scores {scores} do not make one choice right")
    return scores


def question_of(raw: Raw) -> str:
    return raw["input"] if "input" in raw else raw["inputs"]


def coin_flips(count: int, seed: int) -> list[Raw]:
    """Puzzles about four people, each of whom flips the coin or does not; half of all answers are yes on average."""
    draw = random.Random(seed)
    puzzles = []
    for _ in range(count):
        flips = [draw.random() < 0.5 for _ in range(4)]
        acts = [
            f"{name} {'flips' if flip else 'does not flip'} the coin."
            for name, flip in zip(draw.sample(NAMES, 4), flips, strict=True)
        ]
        question = " ".join(["A coin is heads up.", *acts, "Is the coin still heads up?"])
        answer = "no" if sum(flips) % 2 else "yes"
        puzzles.append({"question": f'{question} Note that "flip" here means "reverse".', "answer": answer})
    return puzzles


# fmt: off
NAMES = (
    "Ada", "Amos", "Anna", "Basil", "Bruno", "Carla", "Cedric", "Clara", "Dora", "Edgar", "Edith", "Elena", "Emil",
    "Erika", "Felix", "Flora", "Gloria", "Hector", "Helena", "Hugo", "Ida", "Igor", "Irene", "Jasper", "Jonas",
    "Julia", "Karl", "Kira", "Laura", "Leo", "Lydia", "Marcus", "Mara", "Milo", "Nadia", "Nora", "Oscar", "Otto",
    "Paula", "Petra", "Quentin", "Rita", "Roman", "Rosa", "Silas", "Sonia", "Stella", "Theo", "Ursula", "Vera",
    "Victor", "Wanda", "Willa", "Xenia", "Yara", "Yusuf", "Zelda", "Zoe",
)
# fmt: on


# The records of local files, by the name of each file, and of hub splits, by the name of each split.


def question_files(path: Path) -> list[Path]:
    if not path.exists():
        raise Refused(f"task.path={path} does not exist. The working folder is {Path.cwd()}. Give the full path.")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl"))
    if not files:
        raise Refused(f"task.path={path} holds no .json or .jsonl file.")
    return files


def read_files(path: Path) -> dict[str, list[Raw]]:
    found = {file.stem: _records(file) for file in question_files(path)}
    if not any(found.values()):
        raise Refused(f"task.path={path} holds no question.")
    return found


def _records(file: Path) -> list[Raw]:
    """The objects of a JSON lines file, of a JSON list, or of the `examples` of a JSON object."""
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in content.split("\n") if line.strip()]
        found = json.loads(content)
        if isinstance(found, dict):
            found = found["Questions" if "Questions" in found else "examples"]  # FreebaseQA, and BIG-bench
        return list(found)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise Refused(
            f"{file} is not in a format of questions: {type(error).__name__}: {error}. Expected are JSON lines, a "
            f"JSON list, or a JSON object with a list `examples` or `Questions`."
        ) from error


def alone(raws: dict[str, list[Raw]]) -> list[Raw]:
    if len(raws) > 1:
        raise Refused(f"the questions should be in one file, and there are {sorted(raws)}. Give the path of one.")
    return next(iter(raws.values()))


def every(raws: dict[str, list[Raw]]) -> list[Raw]:
    """All records: of one file, or of all splits of the hub, whose own division is another."""
    return [raw for name in sorted(raws) for raw in raws[name]]


def named(raws: dict[str, list[Raw]], *words: str) -> list[Raw]:
    """The records of the file or split whose name has one of the words."""
    names = [name for name in raws if set(words) & set(re.split(r"[^a-z]+", name.lower()))]
    if len(names) != 1:
        raise Refused(f"one file or split named after {' or '.join(words)} is needed, and there are {sorted(raws)}.")
    return raws[names[0]]


def head_and_tail(raws: list[Raw], share: float) -> tuple[list[Raw], list[Raw]]:
    """The first `share` of the records for training, the rest for testing."""
    count = int(share * len(raws) + 1e-9)
    return raws[:count], raws[count:]
