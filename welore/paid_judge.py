"""A judge behind an endpoint, which takes money for its answers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event
from typing import ClassVar

from tqdm import tqdm

from welore.chat import Messages
from welore.endpoint import Endpoint
from welore.errors import Refused, refuse_below
from welore.judges import CHARACTERS_PER_TOKEN, REMINDER, Language
from welore.report import announce


@dataclass
class OpenAi(Language):
    """An endpoint of chat completions, asked `parallel` questions at a time.

    Prices are per million tokens. What a whole run costs at most is said at its start, and what a round of judgments
    costs at most before its first call. A round is refused where the run would come above `max_cost` with it; a run
    also stops where it has spent that. A call without an answer counts as one with the longest, for the endpoint may
    have written it, and so does an answer whose tokens the endpoint does not count.
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
        refuse_below("judge", self, temperature=0, timeout=0.01, retries=0, backoff=0, parallel=1)
        refuse_below("judge", self, input_price=0, output_price=0, max_cost=0)
        if self.length_key not in ("max_tokens", "max_completion_tokens"):
            raise Refused(f"judge.length_key={self.length_key} is unknown. Write max_tokens or max_completion_tokens.")
        self.endpoint = Endpoint(self.base_url, self.key_env, self.timeout, self.retries, self.backoff)
        # Of each answer, and of each call without one. Threads append to them, which takes no lock.
        self.paid: list[float] = []
        self.lost: list[float] = []
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

    # What it costs.

    @property
    def spent(self) -> float:
        return sum(self.paid) + sum(self.lost)

    def foretell(self, requests, stages):
        # Each attempt reads the judgments before it, and what asked for another.
        told = [
            self.max_tokens + len(REMINDER.format(form=request.form)) / CHARACTERS_PER_TOKEN for request in requests
        ]
        read = _tokens([request.messages for request in requests]) * self.attempts
        read += sum(told) * self.attempts * (self.attempts - 1) / 2
        count = stages * len(requests) * self.attempts
        cost = self._cost_in_words(stages * read, count * self.max_tokens)
        announce(
            f"the whole run asks for at most {count:,} judgments of {self.model} ({stages} stages x {len(requests)} "
            f"questions x {self.attempts} attempts), {cost}; those that are kept are not asked for again"
        )

    def _estimate(self, talks: Sequence[Messages], title: str) -> None:
        most = self._most(talks)
        asked = f"{len(talks)} {title} of {self.model}"
        announce(f"ask for {asked}, {self._cost_in_words(_tokens(talks), self.max_tokens * len(talks))}")
        if self.max_cost is not None and self.spent + most > self.max_cost:
            raise Refused(
                f"{asked} may cost {most:.4f} beside {self.spent:.4f} spent, more than "
                f"judge.max_cost={self.max_cost}. Raise it, lower judge.max_tokens, or ask fewer questions: "
                f"task.limit or task.per_class."
            )

    def _cost_in_words(self, tokens_in: float, tokens_out: int) -> str:
        unknown = "unknown price (judge.input_price and judge.output_price are null)"
        cost = f"it costs about {self._cost(tokens_in, tokens_out):.4f} at most" if self._priced else unknown
        return f"about {tokens_in:,.0f} tokens in and at most {tokens_out:,} out: {cost}"

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.input_price + tokens_out * self.output_price) / 1e6 if self._priced else 0.0

    def _most(self, talks: Sequence[Messages]) -> float:
        return self._cost(_tokens(talks), self.max_tokens * len(talks))

    def _check_spent(self) -> None:
        if self.max_cost is not None and self.spent > self.max_cost:
            raise Refused(
                f"the judge has cost {self._spent_in_words()}, more than judge.max_cost={self.max_cost}. Its "
                f"judgments are kept: the same command with a higher judge.max_cost asks for the rest."
            )

    def _spent_in_words(self) -> str:
        lost = f", with {len(self.lost)} calls without an answer, which may be charged for" if self.lost else ""
        return f"{self.spent:.4f}{lost}"

    # What it says.

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
        if self._priced:
            announce(f"the judge has cost {self._spent_in_words()} so far")
        if failed:
            raise failed[0]

    def _one(self, talk, cache, device, stop: Event | None = None):
        def lost() -> None:
            self.lost.append(self._most([talk]))
            self._check_spent()

        self._check_spent()
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        body = {"model": self.model, "messages": talk, self.length_key: self.max_tokens} | sampling
        reply = self.endpoint.complete(body, stop or Event(), lost)
        # Of what an endpoint does not count, the estimate is booked.
        self.paid.append(self._cost(reply.tokens_in or _tokens([talk]), reply.tokens_out or self.max_tokens))
        return asdict(reply)


def _tokens(talks: Sequence[Messages]) -> float:
    """About as many, and rather too many."""
    return sum(len(message["content"]) for talk in talks for message in talk) / CHARACTERS_PER_TOKEN
