"""An endpoint of OpenAI-compatible chat completions, which may fail in any way that a network knows."""

import http.client
import json
import os
import random
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from welore.errors import Refused

PASSING = (408, 409, 425, 429)  # worth another try, as is every 5xx
LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 600.0  # seconds: of our own accord, and because the endpoint asks for it
JITTER = random.Random()  # of its own, so that it disturbs no seeded draw


@dataclass(frozen=True)
class Reply:
    text: str
    model: str
    finish: str
    tokens_in: int
    tokens_out: int


class _Again(Exception):
    """A call that failed and may yet succeed, after `wait` seconds if the endpoint says so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Stay(urllib.request.HTTPRedirectHandler):
    """Another address may be another host, which must not get the key."""

    def redirect_request(self, *args, **options):
        return None


@dataclass(frozen=True)
class Endpoint:
    """`base_url` ends before /chat/completions. The key is read from the environment variable `key_env` for each call.

    A call that fails is tried `retries` times again, after `backoff` seconds, twice that, and so on up to a minute,
    each up to half as long or as short again by chance; longer where the endpoint asks for it by Retry-After.
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

    def complete(self, body: dict[str, Any], stop: Event) -> Reply:
        """The answer to one conversation; `stop` ends the waiting between tries."""
        for attempt in range(self.retries + 1):
            try:
                return self._call(body)
            except _Again as failed:
                reason, asked = str(failed), failed.wait
            if asked is not None and asked > LONGEST_WAIT:
                raise Refused(f"{self.base_url} asks to wait {asked:.0f} seconds ({reason}). {KEPT}")
            backoff = min(LONGEST_BACKOFF, self.backoff * 2**attempt) * JITTER.uniform(0.5, 1.5)
            if attempt < self.retries and stop.wait(max(backoff, asked or 0)):
                break
        raise Refused(f"{self.base_url} gave no answer in {attempt + 1} tries; the last: {reason}. {KEPT}")

    def _call(self, body: dict[str, Any]) -> Reply:
        try:
            raw = self._post(body)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, body) from None
        except (OSError, http.client.HTTPException) as error:  # a URLError or a time-out is an OSError
            cause = getattr(error, "reason", None) or error
            raise _Again(f"{type(cause).__name__}: {cause}") from None
        try:
            found = json.loads(raw)
            choice, usage = found["choices"][0], found.get("usage")
            text = choice["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError(f"the content is a {type(text).__name__}")
            tokens = [_count(usage, key) for key in ("prompt_tokens", "completion_tokens")]
            return Reply(text or "", str(found.get("model")), str(choice.get("finish_reason")), *tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._without_key(raw.decode(errors="replace"))[:200]
            raise _Again(f"an answer that is no chat completion ({type(error).__name__}): {shown!r}") from None

    def _post(self, body: dict[str, Any]) -> bytes:
        key = self.key()
        headers = {"Content-Type": "application/json", "User-Agent": "welore"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(_Stay).open(request, timeout=self.timeout) as answer:
            return answer.read()

    def _refusal(self, error: urllib.error.HTTPError, body: dict[str, Any]) -> Exception:
        """What an HTTP status means: to try again, or what to do about it."""
        try:
            told = self._without_key(error.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException):
            told = ""
        said = f"HTTP {error.code}: {' '.join(told.split())[:200]}"
        if error.code in (401, 403):
            return Refused(
                f"{self.base_url} refuses the key in the environment variable {self.key_env} ({said}). Put a key "
                f"there that may use the model {body['model']}."
            )
        if "insufficient_quota" in told:
            return Refused(f"the account behind {self.key_env} has no credit left at {self.base_url} ({said}). {KEPT}")
        if error.code in PASSING or error.code >= 500:
            return _Again(said, _retry_after(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            return Refused(f"{self.base_url} sends elsewhere ({said}). Write the address it means as judge.base_url.")
        return Refused(f"{self.base_url} refuses the question to judge.model={body['model']} ({said}).")

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat the key that they refuse."""
        key = os.environ.get(self.key_env or "", "").strip()
        return text.replace(key, "***") if key else text


KEPT = "All judgments so far are kept: the same command asks for the rest."


def _count(usage: Any, key: str) -> int:
    """How many tokens an endpoint says; 0 where it says nothing of use, for the answer is paid for all the same."""
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
