"""The seven benchmarks that were published: their records, their splits, their prompts' triggers and patterns."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from welore.errors import Refused
from welore.examine import Item
from welore.questions import Example, Questions
from welore.sources import Raw, alone, every, head_and_tail, is_text, named, read_files, text, train_and_dev

PAPER_FLIPS = (350, 150)  # puzzles for training and testing
SHUFFLE_SEED = 99  # of the authors, for the choices of date understanding


@dataclass
class Lettered(Questions):
    """What is answered by the letter of a choice; its pattern names the letters."""

    def chosen(self, stem: str, choices: Sequence[str], right: int) -> Example:
        letters = tuple(self.pattern.split("|"))[: len(choices)]
        if not all(map(is_text, choices)) or len(choices) > len(letters):
            raise ValueError(f"the choices {choices} are not texts for the letters {self.pattern}")
        written = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
        return Example(f"{stem} Answer Choices: {written}", letters[right], letters)


@dataclass
class CommonsenseQa(Lettered):
    """Five choices by common sense; the dev set is the test set, as in the paper."""

    trigger: ClassVar[str] = "Among A through E, the answer is"
    pattern: ClassVar[str] = "A|B|C|D|E"

    def divide(self, raws):
        return train_and_dev(raws)

    def example(self, raw):
        inner = raw["question"]
        if isinstance(inner, str):  # the hub's format: flat, with the choices as two lists
            stem, labels, choices = text(raw, "question"), raw["choices"]["label"], raw["choices"]["text"]
        else:
            stem, labels = text(inner, "stem"), [choice["label"] for choice in inner["choices"]]
            choices = [choice["text"] for choice in inner["choices"]]
        return self.chosen(stem, choices, labels.index(raw["answerKey"]))


@dataclass
class Svamp(Questions):
    """A sum in words, answered by a number. The first 70 % of `SVAMP.json` are for training."""

    trigger: ClassVar[str] = "The answer (arabic numerals) is"
    pattern: ClassVar[str] = r"-?\d+\.?\d*"

    def _hub(self):
        """The hub has another order, and a split by it."""
        return {"SVAMP": sorted(every(super()._hub()), key=challenge)}

    def divide(self, raws):
        if {"train", "test"} & set(raws):
            return named(raws, "train"), named(raws, "test")
        return head_and_tail(alone(raws), 0.7)

    def example(self, raw):
        answer = float(raw["Answer"])
        if not math.isfinite(answer):
            raise ValueError(f"the answer {raw['Answer']!r} is no number")
        return Example(f"{text(raw, 'Body')} {text(raw, 'Question')}", f"{answer:.15g}")

    def right(self, read: str, item: Item) -> bool:
        return float(read) == float(item.answer)


@dataclass
class BoolQ(Questions):
    """True or false, by a passage. The dev set is the test set."""

    trigger: ClassVar[str] = "Among True and False, the answer is"
    pattern: ClassVar[str] = "True|False"

    def divide(self, raws):
        return train_and_dev(raws)

    def example(self, raw):
        if not isinstance(raw["answer"], bool):
            raise ValueError(f"the answer {raw['answer']!r} is neither true nor false")
        question = f"{text(raw, 'question')}? Answer Choices: (a) True (b) False"
        return Example(question, str(raw["answer"]), ("True", "False"), text(raw, "passage"))


@dataclass
class YesOrNo(Questions):
    """What is answered by yes or no."""

    trigger: ClassVar[str] = "The answer is"
    pattern: ClassVar[str] = "yes|no"


@dataclass
class CoinFlip(YesOrNo):
    """Whether a coin is still heads up after four people have flipped it or not.

    Without a path `sizes` puzzles are generated in the words of the paper's, and `generator_seed` says which. They are
    easier than the paper's: every name of a test puzzle is one of the 58 that training shows, and in the paper's file
    hardly any is.
    """

    generator_seed: int

    def _raws(self):
        if self.path is not None:
            return read_files(Path(self.path))
        return {"generated": coin_flips(sum(self._wanted), self.generator_seed)}

    @property
    def _wanted(self) -> list[int]:
        return list(self.sizes or PAPER_FLIPS)

    def _source(self):
        return super()._source() if self.path else "the generator of coin flips"

    def divide(self, raws):
        puzzles = alone(raws)
        if self.path is not None:
            return head_and_tail(puzzles, 0.7)
        return puzzles[: self._wanted[0]], puzzles[self._wanted[0] :]

    def example(self, raw):
        if raw["answer"] not in ("yes", "no"):
            raise ValueError(f"the answer {raw['answer']!r} is neither yes nor no")
        return Example(text(raw, "question"), raw["answer"], ("yes", "no"))


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
class DateUnderstanding(Lettered):
    """A date out of five or six, in BIG-bench's format: the `BigBench` of the paper.

    The right one stands first in nearly every record, so that choices are shuffled, in one fixed way: with the seed of
    the paper's scripts, but by the question, so that the order is not theirs.
    """

    trigger: ClassVar[str] = "Among A through F, the answer is"
    pattern: ClassVar[str] = "A|B|C|D|E|F"

    def divide(self, raws):
        return head_and_tail(every(raws), 0.8)

    def example(self, raw):
        scores, question = big_bench(raw), question_of(raw)
        choices = sorted(scores)
        random.Random(f"{SHUFFLE_SEED} {question}").shuffle(choices)
        return self.chosen(question, choices, choices.index(max(scores, key=scores.get)))


@dataclass
class ObjectTracking(Lettered):
    """Who holds what after three swaps: three choices, in BIG-bench's format.

    Left out are the spaces that end each question, which the published prompt keeps, and the dots behind choices.
    """

    trigger: ClassVar[str] = "Among A through C, the answer is"
    pattern: ClassVar[str] = "A|B|C"

    def _hub(self):
        """The hub has puzzles of five and of seven objects under the same name."""
        found = super()._hub()
        return {
            name: [r for r in raws if len(r.get("multiple_choice_targets", ())) == 3] for name, raws in found.items()
        }

    def divide(self, raws):
        return head_and_tail(every(raws), 0.8)

    def example(self, raw):
        scores = big_bench(raw)
        choices = list(scores)
        question = f"{question_of(raw).strip()} \nWhich choice is true ?"
        right = choices.index(max(scores, key=scores.get))
        return self.chosen(question, [choice.rstrip(".") for choice in choices], right)


def challenge(raw: Raw) -> int:
    """The place of a record in `SVAMP.json`, whose IDs are chal-1, chal-2, ..."""
    found = re.fullmatch(r"chal-(\d+)", str(raw.get("ID")))
    if found is None:
        raise Refused(
            f"ID={raw.get('ID')!r} of a record of SVAMP says nothing of its place. Expected is one like chal-7."
        )
    return int(found.group(1))


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
    """The question alone: the hub's copy has put `Q:` before and `A:` behind those of some tasks."""
    return text(raw, "input") if "input" in raw else re.sub(r"^\s*Q: |\s*\nA:\s*$", "", text(raw, "inputs"))


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
