"""Tasks without right answers: a judge rates what a model writes, from 1 to 10."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from welore import metrics
from welore.cache import Cache, digest
from welore.chat import batches, conversation, longest, replies, said
from welore.compress import weight_digests
from welore.errors import refuse_below
from welore.evaluate import Benchmark, Outcome
from welore.greedy import Continuation
from welore.judges import CHARACTERS_PER_TOKEN, Judge, Judgment, Request
from welore.sources import content
from welore.tasks import Task

STAGES = 2  # dense and compressed: nothing is trained
UNASKED = Judgment("", None, 0)  # of what is not worth a question


@dataclass(frozen=True)
class Case:
    """What a user says in each turn, the category it counts in, and a reference for each answer, if there are some."""

    name: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """By case and turn: the whole prompt, and what the model wrote. `seconds` is what it took, whenever it did so.

    `breaks` is by case: the layer where numbers that are not finite start, if one of its answers has them.
    """

    prompts: list[list[str]]
    answers: list[list[str]]
    breaks: list[str | None]
    seconds: float


@dataclass
class Judged(Task):
    """A task whose answers, of at most `new_tokens` tokens each and `batch` at a time, go to a judge."""

    teaches: ClassVar[bool] = False
    judged: ClassVar[bool] = True
    what: ClassVar[str]  # its cases are
    shorter: ClassVar[str] = "a lower task.new_tokens"  # makes them
    repo: str
    batch: int
    new_tokens: int

    def __post_init__(self):
        refuse_below("task", self, batch=1, new_tokens=1)

    def cases(self) -> list[Case]:
        raise NotImplementedError

    def requests(self, case: Case, answers: Sequence[str]) -> list[Request]:
        """What the judge is asked about one case."""
        raise NotImplementedError

    @property
    def measures(self) -> tuple[str, ...]:
        """What can be measured of the answers to a case without a judge."""
        return ()

    def measured(self, cases: Sequence[Case], answers: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """The measures of each case."""
        return [{} for _ in cases]

    def benchmark(self, tokenizer: Any, cache: Cache, judge: Judge) -> "Hearing":
        judge.prepare()
        hearing = Hearing(self, tokenizer, cache, judge)
        if judge.judges:
            judge.foretell(hearing.requests("x" * CHARACTERS_PER_TOKEN * self.new_tokens), STAGES)
        return hearing

    def fetch(self) -> str | None:
        if self.path is not None:
            return None
        for case in self.cases():  # whatever they are read from, its client keeps it
            self.requests(case, [""] * len(case.turns))
        return f"{self.repo} from the hub"

    def identity(self) -> str:
        return content(self.path)

    def source(self) -> str:
        return f"task.path={self.path}" if self.path else f"{self.repo} on the hub"


class Hearing(Benchmark):
    """Models write answers, and a judge rates them.

    Neither is done twice, but for the batch or the judgments that are under way when a run is killed.
    """

    def __init__(self, task: Judged, tokenizer: Any, cache: Cache, judge: Judge):
        self.task, self.tokenizer, self.cache, self.judge = task, tokenizer, cache, judge
        self.cases = task.cases()
        turns = max(len(case.turns) for case in self.cases)
        self.title = f"{task.name}: {len(self.cases)} {task.what}, greedy, {judge.title()}"
        # The last prompt of each conversation, whose earlier answers may be as long as its last one.
        whole = [conversation(tokenizer, _talk(case, [""] * (len(case.turns) - 1))) for case in self.cases]
        self.longest = longest(tokenizer, whole) + turns * task.new_tokens
        self.longest_key = f"the longest of the {task.what} with its answers ({task.shorter} makes it shorter): tokens"

    @property
    def identity(self) -> tuple[str | bytes, ...]:
        asked = [(request.messages, request.aspects, request.form) for request in self.requests("")]
        found = [self.judge.science(), self.task.measures, asked]
        return f"{self.title} {self._how()} echoes are no ratings, nor what is not finite", *map(json.dumps, found)

    def requests(self, answer: str) -> list[Request]:
        """All that a judge is asked where every answer is this one."""
        return [request for case in self.cases for request in self.task.requests(case, [answer] * len(case.turns))]

    def _how(self) -> str:
        """What the answers depend on beside the model: the batch too, for sums differ by their padding."""
        cases = digest(json.dumps([asdict(case) for case in self.cases]), self.tokenizer.chat_template or "")
        return f"{cases} {self.task.batch} {self.task.new_tokens}"

    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        written = self._written(model, dtype, stage)
        found = {"empty": sum(not answer for answers in written.answers for answer in answers)}
        if broken := [place for place in written.breaks if place]:
            found |= {"broken": len(broken), metrics.BREAKS_AT: broken[0]}
        measured = self.task.measured(self.cases, written.answers)
        found |= _means([case.category for case in self.cases], measured)
        lines = [
            {"name": case.name, "category": case.category, "prompts": prompts, "written": answers}
            | ({metrics.BREAKS_AT: breaks_at} if breaks_at else {})
            | values
            for case, prompts, answers, breaks_at, values in zip(
                self.cases, written.prompts, written.answers, written.breaks, measured, strict=True
            )
        ]
        rate = len(self.cases) / written.seconds
        shared = {metrics.EVAL_EXAMPLES.key: len(self.cases), metrics.EVAL_QUESTIONS_PER_SECOND.key: rate}
        return Outcome(found, shared, lines)

    def rate(self, outcome: Outcome, device: torch.device, stage: str) -> Outcome:
        if not self.judge.judges:
            return outcome
        pairs = zip(self.cases, outcome.answers, strict=True)
        asked = [(line, request) for case, line in pairs for request in self.task.requests(case, line["written"])]
        # What a model says whose numbers are not finite means nothing: nobody is asked, or paid, to rate it.
        whole = [request for line, request in asked if metrics.BREAKS_AT not in line]
        found = iter(self.judge.judgments(whole, self.cache, device, f"{stage} judgments"))
        judgments = [UNASKED if metrics.BREAKS_AT in line else next(found) for line, _ in asked]
        for (line, request), judgment in zip(asked, judgments, strict=True):
            line.setdefault("judgments", []).append({"asked": request.messages} | asdict(judgment))
        ratings = counted([line["category"] for line, _ in asked], [request for _, request in asked], judgments)
        return Outcome(outcome.stage | ratings, outcome.shared, outcome.answers)

    def _written(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Written:
        """Turn by turn; each sees the answers of the turns before."""
        key, seconds = self._key(model, dtype), 0.0
        prompts: list[list[str]] = [[] for _ in self.cases]
        answers: list[list[str]] = [[] for _ in self.cases]
        breaks: list[str | None] = [None] * len(self.cases)
        for turn in range(max(len(case.turns) for case in self.cases)):
            places = [place for place, case in enumerate(self.cases) if turn < len(case.turns)]
            asked = [conversation(self.tokenizer, _talk(self.cases[place], answers[place])) for place in places]
            title = f"{stage} answers, turn {turn + 1}"
            for batch in batches(self.tokenizer, asked, self.task.batch, title):
                together = [asked[index] for index in batch]
                new, took = self._replies(model, dtype, key, together, title)
                seconds += took
                for index, reply in zip(batch, new, strict=True):
                    place = places[index]
                    prompts[place].append(asked[index])
                    answers[place].append(reply.text)
                    breaks[place] = breaks[place] or reply.breaks_at
        return Written(prompts, answers, breaks, seconds)

    def _key(self, model: PreTrainedModel, dtype: str | None) -> str:
        weights = (part for item in weight_digests(model).items() for part in item)
        device = next(model.parameters()).device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return digest(*weights, model.config.to_json_string(), f"{dtype} {place} {self._how()}")

    def _replies(
        self, model: PreTrainedModel, dtype: str | None, key: str, prompts: list[str], title: str
    ) -> tuple[list[Continuation], float]:
        """What the model says to one batch, and the seconds that it took.

        Kept by the weights: a run that was killed, a judge that fails, or another judge, finds the very same answers.
        """

        def make() -> tuple[list[Continuation], float]:
            started = time.perf_counter()
            new = replies(model, self.tokenizer, prompts, self.task.batch, self.task.new_tokens, dtype, title)
            return new, time.perf_counter() - started

        def read(path: Path) -> tuple[list[Continuation], float]:
            new, took = json.loads(path.read_text())
            return [Continuation(**reply) for reply in new], took

        def write(made: tuple[list[Continuation], float], path: Path) -> None:
            path.write_text(json.dumps(([asdict(reply) for reply in made[0]], made[1])))

        return self.cache.get("continuations", digest(key, *prompts), read, write, make)


def _talk(case: Case, answers: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the turn that follows the answers."""
    talk = []
    for turn, answer in zip(case.turns, answers, strict=False):
        talk += [said("user", turn), said("assistant", answer)]
    return [*talk, said("user", case.turns[len(answers)])]


def _means(categories: Sequence[str], measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every measure, over all cases and over those of each category."""
    found = {key: fmean(values[key] for values in measured) for key in measured[0]}
    for category in dict.fromkeys(categories):
        inside = [values for name, values in zip(categories, measured, strict=True) if name == category]
        found |= {f"{key}/{category}": fmean(values[key] for values in inside) for key in measured[0]}
    return found


def counted(
    categories: Sequence[str], requests: Sequence[Request], judgments: Sequence[Judgment]
) -> dict[str, float | int | None]:
    """The mean of all ratings that could be read, also by category and by aspect; how many could and could not."""
    ratings: list[tuple[str, str, float]] = []
    unjudged = 0
    for category, request, judgment in zip(categories, requests, judgments, strict=True):
        if judgment.ratings is None:
            unjudged += len(request.aspects)
            continue
        ratings += [(category, aspect, judgment.ratings[aspect]) for aspect in request.aspects]
    found: dict[str, Any] = {"judged": len(ratings), "unjudged": unjudged}
    found["score"] = fmean(value for *_, value in ratings) if ratings else None
    aspects = dict.fromkeys(aspect for request in requests for aspect in request.aspects)
    for name in (*aspects, *dict.fromkeys(categories)):
        values = [value for category, aspect, value in ratings if name in (category, aspect)]
        found[f"score/{name}"] = fmean(values) if values else None
    return found
