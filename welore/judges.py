"""Who rates what a model wrote: nobody, or a language model, behind an endpoint or on this machine.

Every judgment is kept in the cache the moment it arrives, under the judge and the whole conversation with it, so that
none is made or paid for twice, whatever happens to the run and whoever else asks for it meanwhile.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from welore.cache import Cache, digest
from welore.chat import Messages, said
from welore.errors import refuse_below

KIND = "judgments"  # in the cache
PUBLISHED = (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")  # of a rating: the first that matches, as MT-Bench reads it
ECHO = 20  # characters before a rating with which it is one of the prompt, where they stand there too
REMINDER = "Your answer does not hold {form}. Give {form} and nothing else."  # ours
CHARACTERS_PER_TOKEN = 3  # fewer than in English prose, so that an estimate is rather too high


def rating(text: str, prompt: str = "") -> float | None:
    """The first rating in a judgment, by the published patterns; None where there is none from 1 to 10.

    What a judge repeats of its prompt is no rating, such as the example in it. As published it would be one.
    """
    found = (match for pattern in PUBLISHED for match in re.finditer(pattern, text) if not _echoes(match, prompt))
    first = next(found, None)
    return in_range(first.group(1)) if first else None


def _echoes(match: re.Match[str], prompt: str) -> bool:
    start = match.start() - ECHO
    return start >= 0 and match.string[start : match.end()] in prompt


def in_range(digits: str) -> float | None:
    return value if 1 <= (value := float(digits)) <= 10 else None


@dataclass(frozen=True)
class Request:
    """What a judge reads, the rating by aspect that `read` finds in its answer, and the `form` that it must have."""

    messages: Messages
    aspects: tuple[str, ...]
    form: str
    read: Callable[[str], dict[str, float] | None]


@dataclass(frozen=True)
class Judgment:
    """The last answer of a judge; `ratings` is None where none of its `attempts` could be read."""

    text: str
    ratings: dict[str, float] | None
    attempts: int


@dataclass
class Judge:
    """Nobody: answers are written down for people to read."""

    judges: ClassVar[bool] = False
    changes_nothing: ClassVar[tuple[str, ...]] = ()  # the fields that no judgment depends on
    name: str

    def title(self) -> str:
        return "judged by nobody"

    def science(self) -> dict[str, Any]:
        """What a judgment depends on beside its request."""
        return {key: value for key, value in asdict(self).items() if key not in self.changes_nothing}

    def prepare(self) -> None:
        """Refuse at once what could not judge at the end."""

    def foretell(self, requests: Sequence[Request], stages: int) -> None:
        """Say what a run costs at most that asks these requests, with answers of full length, at each stage."""


@dataclass
class Language(Judge):
    """A judge that writes. A judgment that cannot be read is asked for again, `attempts` times in all."""

    judges: ClassVar[bool] = True
    max_tokens: int
    attempts: int

    def __post_init__(self):
        refuse_below("judge", self, max_tokens=1, attempts=1)

    def judgments(self, requests: Sequence[Request], cache: Cache, device: torch.device, title: str) -> list[Judgment]:
        """One for each request. Asking again shows the judge its own answer, for the same prompt would repeat it."""
        found: dict[int, Judgment] = {}
        talks = [request.messages for request in requests]
        places = list(range(len(requests)))
        for attempt in range(1, self.attempts + 1):
            texts = self._answers([talks[place] for place in places], cache, device, title)
            for place, text in zip(places, texts, strict=True):
                found[place] = Judgment(text, requests[place].read(text), attempt)
                reminder = REMINDER.format(form=requests[place].form)
                talks[place] = [*talks[place], said("assistant", text or "(nothing)"), said("user", reminder)]
            places = [place for place in places if found[place].ratings is None]
            if not places:
                break
        return [found[place] for place in range(len(requests))]

    def _answers(self, talks: list[Messages], cache: Cache, device: torch.device, title: str) -> list[str]:
        """What the judge says next in each conversation, from the cache where it is there."""
        keys = [self._key(talk) for talk in talks]
        new = {key: talk for key, talk in zip(keys, talks, strict=True) if not cache.holds(KIND, key)}
        self._ask(new, cache, device, title)
        # All are kept now, but for damaged files, which are asked for once more here.
        pairs = zip(keys, talks, strict=True)
        return [self._kept(key, cache, partial(self._one, talk, cache, device)) for key, talk in pairs]

    def _key(self, talk: Messages) -> str:
        sampling = {key: value for key, value in self.science().items() if key != "attempts"}
        return digest(json.dumps(sampling, sort_keys=True), json.dumps(talk))

    def _kept(self, key: str, cache: Cache, make: Callable[[], dict[str, Any]]) -> str:
        def read(path: Path) -> dict[str, Any]:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found["text"], str):
                raise ValueError("it holds no text")
            return found

        def write(made: dict[str, Any], path: Path) -> None:
            path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")

        return cache.get(KIND, key, read, write, make)["text"]

    def _ask(self, new: dict[str, Messages], cache: Cache, device: torch.device, title: str) -> None:
        """Answer the conversations and keep each answer under its key."""
        raise NotImplementedError

    def _one(self, talk: Messages, cache: Cache, device: torch.device) -> dict[str, Any]:
        """What is kept of one answer: its `text`, and whatever else the judge says of it."""
        raise NotImplementedError
