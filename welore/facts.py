"""Questions about facts, answered in a few words: exact match with any alias of the right answer.

The paper asks FreebaseQA (Table 2, appendix D.4.1) and prints no prompt: the one here is ours, with three questions
that are answered already, so that a model which knows also says it in a few words.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from welore.examine import Item
from welore.questions import Example, Questions
from welore.sources import alone_or_named, is_text, text

PROMPT = (
    "Question: What is the capital of France?\nAnswer: Paris\n\n"
    "Question: How many legs does a spider have?\nAnswer: eight\n\n"
    "Question: Who wrote the play Hamlet?\nAnswer: William Shakespeare\n\n"
    "Question: {question}\nAnswer:"
)


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: what TriviaQA's evaluation compares."""
    plain = "".join(" " if sign in string.punctuation + "‘’´`" else sign for sign in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


@dataclass
class Facts(Questions):
    """All records are test questions: nothing is trained on them."""

    teaches: ClassVar[bool] = False
    trigger: ClassVar[str] = "Answer:"

    def divide(self, raws):
        return [], self.test(raws)

    def test(self, raws: dict[str, list[Any]]) -> list[Any]:
        """The records that are asked, from those of each file or hub split."""
        raise NotImplementedError

    def examples(self, split: str) -> list[Example]:
        return super().examples(split) if split == "test" else []

    def prompt(self, example: Example, tokenizer: Any) -> str:
        return (
            PROMPT.format(question=example.question) if self.style == "paper" else super().prompt(example, tokenizer)
        )

    def read(self, written: str) -> str | None:
        """The first line, or what a chat model says before its turn ends; None where nothing is left of it."""
        line = next((line.strip() for line in written.split("\n") if line.strip()), "")
        return line if normalized(line) else None

    def right(self, read: str, item: Item) -> bool:
        return normalized(read) in {normalized(alias) for alias in (item.answer, *item.aliases)}


@dataclass
class TriviaQa(Facts):
    """TriviaQA's validation questions, without their documents."""

    def test(self, raws):
        return alone_or_named(raws, self.path, "validation", "dev")

    def example(self, raw):
        answer = raw["answer"]
        value, aliases = (answer["value"], answer["aliases"]) if isinstance(answer, dict) else (answer, raw["aliases"])
        return fact(text(raw, "question"), value, aliases)


@dataclass
class FreebaseQa(Facts):
    """FreebaseQA: a question is right by any of the names of any of its parses."""

    def test(self, raws):
        return alone_or_named(raws, self.path, "eval", "test")

    def example(self, raw):
        names = list(_texts(raw["Parses"], "AnswersName"))
        if not names:
            raise ValueError(f"no answer of {raw['RawQuestion']!r} has a name")
        return fact(text(raw, "RawQuestion"), names[0], names)


def fact(question: str, answer: str, aliases: list[str]) -> Example:
    if not isinstance(aliases, list):
        raise ValueError(f"the aliases {aliases!r} of {question!r} are no list")
    if not all(map(is_text, (answer, *aliases))):
        raise ValueError(f"the answers {[answer, *aliases]} of {question!r} are not all texts")
    if not normalized(answer) and not any(map(normalized, aliases)):
        raise ValueError(f"no answer of {question!r} has a letter or a digit")
    return Example(question, answer, aliases=tuple(aliases))


def _texts(node: Any, key: str, below: bool = False) -> Iterator[str]:
    """Every text below a key. The hub turns the lists of records in a file into records of lists."""
    if isinstance(node, dict):
        for name, inner in node.items():
            yield from _texts(inner, key, below or name == key)
    elif isinstance(node, list):
        for inner in node:
            yield from _texts(inner, key, below)
    elif below and isinstance(node, str):
        yield node
