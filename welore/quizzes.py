"""The seven benchmarks that were published: their records, their splits, their prompts' triggers and patterns."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from welore.examine import Item
from welore.questions import Example, Questions
from welore.sources import Raw, alone, every, head_and_tail, read_files, train_and_dev

SHUFFLE_SEED = 99  # of the authors, for the choices of date understanding


@dataclass
class CommonsenseQa(Questions):
    """Five choices by common sense; the dev set is the test set, as in the paper."""

    trigger: ClassVar[str] = "Among A through E, the answer is"
    pattern: ClassVar[str] = "A|B|C|D|E"

    def divide(self, raws):
        return train_and_dev(raws)

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
        return train_and_dev(raws)

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
