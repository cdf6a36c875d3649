"""An endpoint of OpenAI-compatible chat completions, which may fail in any way that a network knows."""

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from welore.errors import Refused

PASSING = (408, 409, 425, 429)  # worth another try, as is every 5xx
LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 600.0  # seconds: of our own accord, and because the endpoint asks for it
GRACE = 0.5  # seconds for a time-out of the connection to be told: it says that nothing was sent
LARGEST = 2**24  # bytes of an answer, thousands of times those of a judgment
JITTER = random.Random()  # of its own, so that it disturbs no seeded draw


@dataclass(frozen=True)
class Reply:
    text: str
    model: str
    finish: str
    tokens_in: int
    tokens_out: int


class _Again(Exception):
    """A call that failed and may yet succeed, after `wait` seconds if the endpoint says so.

    `reached`: the endpoint has the question and has not refused it, so that it may charge for its answer.
    """

    def __init__(self, reason: str, wait: float | None = None, reached: bool = False):
        super().__init__(reason)
        self.wait, self.reached = wait, reached


@dataclass(frozen=True)
class _Answer:
    status: int
    retry_after: str | None
    raw: bytes


class _Stay(urllib.request.HTTPRedirectHandler):
    """Another address may be another host, which must not get the key."""

    def redirect_request(self, *args, **options):
        return None


@dataclass(frozen=True)
class Endpoint:
    """`base_url` ends before /chat/completions. The key is read from the environment variable `key_env` for each call.

    A call takes `timeout` seconds at most, from its beginning to the last byte of the answer. One that fails is tried
    `retries` times again, after `backoff` seconds, twice that, and so on up to a minute, each up to half as long or as
    short again by chance; longer where the endpoint asks for it by Retry-After.
    """

    base_url: str
    key_env: str | None
    timeout: float
    retries: int
    backoff: float

    def __post_init__(self):
        address = urlsplit(self.base_url)
        if address.username or address.password or address.query:
            raise Refused("judge.base_url holds a name, a password or a query, which records would show. Remove it.")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise Refused(f"judge.base_url={self.base_url} is no address. Write one like https://api.openai.com/v1.")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # It may be the key itself, which is not to be shown.
            raise Refused(
                "judge.key_env is not the name of an environment variable. Write its name, such as OPENAI_API_KEY, "
                "and never the key."
            )

    def key(self) -> str | None:
        """The key; refused where its variable is empty."""
        if self.key_env is None:
            return None
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise Refused(
                f"the environment variable {self.key_env} holds no key for {self.base_url}. Run: export "
                f"{self.key_env}=..., name another variable by judge.key_env, or write judge.key_env=null for an "
                f"endpoint without keys."
            )
        if not re.fullmatch(r"[!-~]+", found):
            # Refused here, for the header would be refused with an error that shows it.
            raise Refused(
                f"the key in the environment variable {self.key_env} is not one line of ASCII without spaces "
                f"({len(found)} characters, which are not shown). Put one key there and nothing else."
            )
        return found

    def complete(self, body: dict[str, Any], stop: Event, lost: Callable[[], None]) -> Reply:
        """The answer to one conversation; `stop` ends the waiting between tries.

        `lost` is called for each try that brought no answer and may be charged for all the same.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._call(body)
            except _Again as failed:
                reason, asked, reached = str(failed), failed.wait, failed.reached
            if reached:
                lost()
            if asked is not None and asked > LONGEST_WAIT:
                raise Refused(f"{self.base_url} asks to wait {asked:.0f} seconds ({reason}). {KEPT}")
            backoff = min(LONGEST_BACKOFF, self.backoff * 2**attempt) * JITTER.uniform(0.5, 1.5)
            if attempt < self.retries and stop.wait(max(backoff, asked or 0)):
                break
        raise Refused(f"{self.base_url} gave no answer in {attempt + 1} tries; the last: {reason}. {KEPT}")

    def _call(self, body: dict[str, Any]) -> Reply:
        answer = self._answer(body)
        told = self._without_key(answer.raw.decode(errors="replace"))
        if not 200 <= answer.status < 300:
            raise self._refusal(answer, told, body)
        if len(answer.raw) > LARGEST:
            raise _Again(f"an answer of more than {LARGEST} bytes", reached=True)
        try:
            found = json.loads(answer.raw)
            choice, usage = found["choices"][0], found.get("usage")
            text = choice["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError(f"the content is a {type(text).__name__}")
            tokens = [_count(usage, key) for key in ("prompt_tokens", "completion_tokens")]
            return Reply(text or "", str(found.get("model")), str(choice.get("finish_reason")), *tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            reason = f"an answer that is no chat completion ({type(error).__name__}): {told[:200]!r}"
            raise _Again(reason, reached=True) from None

    def _answer(self, body: dict[str, Any]) -> _Answer:
        """Whatever the endpoint says in time.

        A thread of its own waits for it, since the time-out of a socket begins anew with every byte. One that is given
        up ends with its next byte, or with the process.
        """
        key = self.key()
        headers = {"Content-Type": "application/json", "User-Agent": "welore"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        answer: Future[_Answer] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._asked(request, time.monotonic() + self.timeout))
            except BaseException as error:
                answer.set_exception(error)

        Thread(target=ask, daemon=True).start()
        try:
            return answer.result(self.timeout + GRACE)
        except urllib.error.URLError as error:  # of a connection that was not made
            raise _Again(_named(error.reason)) from None
        except TimeoutError:
            raise _Again(f"TimeoutError: no whole answer in {self.timeout:g} seconds", reached=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(_named(error), reached=True) from None

    def _asked(self, request: urllib.request.Request, until: float) -> _Answer:
        try:
            answer = urllib.request.build_opener(_Stay).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:  # an answer too, whose status says enough if its text breaks off
            with error:
                raw = b""
                with suppress(OSError, http.client.HTTPException):
                    raw = _read(error, until)
                return _Answer(error.code, error.headers.get("Retry-After"), raw)
        with answer:
            return _Answer(answer.status, None, _read(answer, until))

    def _refusal(self, answer: _Answer, told: str, body: dict[str, Any]) -> Exception:
        """What an HTTP status means: to try again, or what to do about it."""
        said = f"HTTP {answer.status}: {' '.join(told.split())[:200]}"
        if answer.status in (401, 403) and self.key_env is None:
            return Refused(
                f"{self.base_url} wants a key ({said}), and judge.key_env is null. Write the name of the environment "
                f"variable that holds one, such as judge.key_env=OPENAI_API_KEY."
            )
        if answer.status in (401, 403):
            return Refused(
                f"{self.base_url} refuses the key in the environment variable {self.key_env} ({said}). Put a key "
                f"there that may use the model {body['model']}."
            )
        if "insufficient_quota" in told:
            owner = f"the account behind {self.key_env}" if self.key_env else "the account"
            return Refused(f"{owner} has no credit left at {self.base_url} ({said}). {KEPT}")
        if answer.status in PASSING or answer.status >= 500:
            return _Again(said, _retry_after(answer.retry_after))
        if 300 <= answer.status < 400:
            return Refused(f"{self.base_url} sends elsewhere ({said}). Write the address it means as judge.base_url.")
        return Refused(f"{self.base_url} refuses the question to judge.model={body['model']} ({said}).")

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat the key that they refuse."""
        key = os.environ.get(self.key_env or "", "").strip()
        return text.replace(key, "***") if key else text


KEPT = "All judgments so far are kept: the same command asks for the rest."


def _named(error: Any) -> str:
    return f"{type(error).__name__}: {error}"


def _read(answer: Any, until: float) -> bytes:
    """The whole text, or little more than LARGEST of it; a TimeoutError where it is late."""
    raw = b""
    while len(raw) <= LARGEST and (part := answer.read1(2**16)):
        raw += part
        if time.monotonic() > until:
            raise TimeoutError
    return raw


def _count(usage: Any, key: str) -> int:
    """How many tokens an endpoint says; 0 where it says nothing of use."""
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
