"""Who rates what a model wrote: nobody, an endpoint of chat completions, or a model on this machine.

Every judgment is kept in the cache the moment it arrives, under the judge and the whole conversation with it, so that
none is made or paid for twice, whatever happens to the run.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from welore.cache import Cache, digest
from welore.chat import Messages, conversation, longest, replies, said
from welore.endpoint import Endpoint, Reply
from welore.errors import Refused
from welore.models import Pretrained

KIND = "judgments"  # in the cache
PUBLISHED = (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")  # of a rating: the first that matches, as MT-Bench reads it
REMINDER = "Your answer does not hold {form}. Give {form} and nothing else."  # ours
CHARACTERS_PER_TOKEN = 3  # fewer than in English prose, so that an estimate is rather too high


def rating(text: str) -> float | None:
    """The first rating in a judgment, by the published patterns; None where there is none from 1 to 10."""
    found = next((match for pattern in PUBLISHED if (match := re.search(pattern, text))), None)
    return in_range(found.group(1)) if found else None


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


@dataclass
class Language(Judge):
    """A judge that writes. A judgment that cannot be read is asked for again, `attempts` times in all."""

    judges: ClassVar[bool] = True
    max_tokens: int
    attempts: int

    def __post_init__(self):
        self._at_least(max_tokens=1, attempts=1)

    def _at_least(self, **least: float) -> None:
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise Refused(f"judge.{key}={value} is too small. Write {smallest} or more.")

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


_SPENDING = Lock()


def _tell(line: str) -> None:
    print(f"· {line}", file=sys.stderr, flush=True)


@dataclass
class OpenAi(Language):
    """An endpoint of chat completions, asked `parallel` questions at a time.

    Prices are per million tokens. What a round of judgments costs at most is said before its first call, and refused
    where the run would come above `max_cost` with it; a run also stops where it has spent that.
    """

    changes_nothing: ClassVar[tuple[str, ...]] = (
        *("key_env", "length_key", "timeout", "retries", "backoff", "parallel"),
        *("input_price", "output_price", "max_cost"),
    )
    base_url: str
    model: str
    key_env: str | None
    temperature: float | None
    length_key: str
    timeout: float
    retries: int
    backoff: float
    parallel: int
    input_price: float | None
    output_price: float | None
    max_cost: float | None

    def __post_init__(self):
        super().__post_init__()
        self._at_least(temperature=0, timeout=0.01, retries=0, backoff=0, parallel=1)
        self._at_least(input_price=0, output_price=0, max_cost=0)
        if self.length_key not in ("max_tokens", "max_completion_tokens"):
            raise Refused(f"judge.length_key={self.length_key} is unknown. Write max_tokens or max_completion_tokens.")
        self.endpoint = Endpoint(self.base_url, self.key_env, self.timeout, self.retries, self.backoff)
        self.spent = 0.0
        if self.max_cost is not None and not self._priced:
            raise Refused(
                f"judge.max_cost={self.max_cost} cannot be kept with judge.input_price={self.input_price} and "
                f"judge.output_price={self.output_price}. Write both prices per million tokens, or max_cost=null."
            )

    @property
    def _priced(self) -> bool:
        return self.input_price is not None and self.output_price is not None

    def title(self) -> str:
        return f"judged by {self.model}"

    def prepare(self) -> None:
        self.endpoint.key()

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.input_price + tokens_out * self.output_price) / 1e6 if self._priced else 0.0

    def _ask(self, new, cache, device, title):
        if not new:
            return
        self._estimate(list(new.values()), title)
        stop, failed = Event(), []

        def call(key: str, talk: Messages) -> None:
            """Once one has failed no other begins, and those that wait for another try give up."""
            if stop.is_set():
                return
            try:
                self._kept(key, cache, partial(self._one, talk, cache, device, stop))
            except Exception as error:
                failed.append(error)
                stop.set()

        with ThreadPoolExecutor(self.parallel) as pool:
            calls = [pool.submit(call, key, talk) for key, talk in new.items()]
            try:
                for _ in tqdm(as_completed(calls), title, len(calls), leave=False, unit="judgment"):
                    pass
            finally:
                stop.set()  # where the run is told to end: an answer that is under way is still kept
        if failed:
            raise failed[0]
        if self._priced:
            _tell(f"the judge has cost {self.spent:.4f} so far")

    def _estimate(self, talks: Sequence[Messages], title: str) -> None:
        characters = sum(len(message["content"]) for talk in talks for message in talk)
        tokens_in, tokens_out = characters / CHARACTERS_PER_TOKEN, self.max_tokens * len(talks)
        most = self._cost(tokens_in, tokens_out)
        unknown = "unknown price (judge.input_price and judge.output_price are null)"
        cost = f"it costs about {most:.4f} at most" if self._priced else unknown
        asked = f"{len(talks)} {title} of {self.model}"
        _tell(f"ask for {asked}, about {tokens_in:,.0f} tokens in and at most {tokens_out:,} out: {cost}")
        if self.max_cost is not None and self.spent + most > self.max_cost:
            raise Refused(
                f"{asked} may cost {most:.4f} beside {self.spent:.4f} spent, more than "
                f"judge.max_cost={self.max_cost}. Raise it, lower judge.max_tokens, or ask fewer questions: "
                f"task.limit or task.per_class."
            )

    def _one(self, talk, cache, device, stop: Event | None = None):
        with _SPENDING:
            if self.max_cost is not None and self.spent > self.max_cost:
                raise Refused(
                    f"the judge has cost {self.spent:.4f}, more than judge.max_cost={self.max_cost}. Its judgments "
                    f"are kept: the same command with a higher judge.max_cost asks for the rest."
                )
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        body = {"model": self.model, "messages": talk, self.length_key: self.max_tokens} | sampling
        reply: Reply = self.endpoint.complete(body, stop or Event())
        with _SPENDING:
            self.spent += self._cost(reply.tokens_in, reply.tokens_out)
        return asdict(reply)


@dataclass
class Local(Language):
    """A model on this machine, greedy, in its chat template."""

    changes_nothing: ClassVar[tuple[str, ...]] = ("path",)  # its identity counts in its place
    path: str
    revision: str | None
    dtype: str
    autocast: str | None
    batch: int

    def __post_init__(self):
        super().__post_init__()
        self._at_least(batch=1)
        self.loaded: tuple[Any, Any] | None = None
        with _of_judge():
            self.source = Pretrained(self.name, self.dtype, self.autocast, self.path, self.revision, False)

    def title(self) -> str:
        return f"judged by {self.path.rstrip('/').rpartition('/')[2]}"

    def science(self) -> dict[str, Any]:
        with _of_judge():
            content = self.source.identity()
        place = Path(self.path).expanduser()
        model = place.name if place.exists() else self.path
        return super().science() | {"model": model, "content": content}

    def prepare(self) -> None:
        with _of_judge():
            self.source.identity()

    def _ask(self, new, cache, device, title):
        """Pass by pass, so that a kill loses the answers of one alone."""
        keys = sorted(new, key=lambda key: -sum(len(message["content"]) for message in new[key]))
        for start in tqdm(range(0, len(keys), self.batch), desc=title, unit="pass", leave=False):
            part = keys[start : start + self.batch]
            texts = self._written([new[key] for key in part], cache, device)
            for key, text in zip(part, texts, strict=True):
                self._kept(key, cache, lambda text=text: {"text": text})

    def _one(self, talk, cache, device):
        return {"text": self._written([talk], cache, device)[0]}

    def _written(self, talks: list[Messages], cache: Cache, device: torch.device) -> list[str]:
        if self.loaded is None:
            _tell(f"load the judge {self.path}")
            with _of_judge():
                self.loaded = self.source.load(cache.folder)
        model, tokenizer = self.loaded
        prompts = [conversation(tokenizer, talk) for talk in talks]
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tokens = longest(tokenizer, prompts) + self.max_tokens
        if limit is not None and tokens > limit:
            raise Refused(
                f"a judgment takes {tokens} tokens, judge.max_tokens={self.max_tokens} of them, and the judge "
                f"{self.path} has {limit} positions. Lower judge.max_tokens or take another judge."
            )
        model.to(device)
        texts = replies(model, tokenizer, prompts, self.batch, self.max_tokens, self.autocast, "judgments")
        model.cpu()  # the memory belongs to the model that is measured
        return texts


@contextmanager
def _of_judge() -> Iterator[None]:
    """What is refused of a model, said of the judge."""
    try:
        yield
    except Refused as refused:
        said = re.sub(r"which is not run unless .*", "which is not run: take another judge.", str(refused))
        raise Refused(re.sub(r"\bmodel([.=])", r"judge\1", said)) from refused
