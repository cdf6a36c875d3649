"""Judges: what is read in their answers, and that nothing an endpoint does costs an answer twice or shows the key."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch
from endpoints import KEY, serving

from welore import endpoint
from welore.cache import Cache
from welore.chat import said
from welore.config import fingerprint, to_config
from welore.errors import Refused
from welore.finished import composed
from welore.judges import KIND, Request, rating
from welore.summaries import read_ratings

CPU = torch.device("cpu")
FORM = 'a rating in the form "[[rating]]"'


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def kept(tmp_path):
    return Cache(tmp_path / "kept")


@pytest.fixture
def judge(configured):
    """A function of a server and overrides to a judge that asks it one question at a time, and hardly waits."""

    def judge(server, *overrides):
        quick = ["judge.backoff=0.001", "judge.parallel=1", "judge.retries=3", "judge.timeout=5"]
        address = f"judge.base_url={server if isinstance(server, str) else server.url}"
        return configured("mode=none", "judge=openai", address, *quick, *overrides).judge

    return judge


def requests(count):
    def read(text):
        found = rating(text)
        return None if found is None else {"turn_1": found}

    return [Request([said("user", f"question {number}")], ("turn_1",), FORM, read) for number in range(count)]


def ratings(judgments):
    return [judgment.ratings and judgment.ratings["turn_1"] for judgment in judgments]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rating: [[5]]", 5),
        ("It is good. Rating: [[7.5]]", 7.5),
        ("[[10]]", 10),
        ("Rating: [[1]] and then [[9]]", 1),  # the first, as published
        ("Rating: [6]", 6),  # the published second pattern
        ("[3] is cited. Rating: [[8]]", 8),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[rating]]", None),
        ("Rating: 5", None),
        ("Rating: [[five]]", None),
        ("Rating: [[-3]]", None),
        ("Rating: [[5/10]]", None),
        ("Rating: [[ 5 ]]", None),
        ("", None),
    ],
)
def test_a_rating_is_read_by_the_published_patterns_and_lies_in_1_to_10(text, found):
    assert rating(text) == found


ASKED = 'Rate it by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\nHe cites [3] twice.'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{ASKED} It is good. Rating: [[8]]", 8),
        ('Following this format: "[[rating]]", for example: "Rating: [[5]]".', None),
        ("strictly following this format: [[5]]", 5),  # of which the prompt has another end
        ("Rating: [[5]]", 5),
        ('"Rating: [[5]]"', 5),
        ("It is good, on the whole. Rating: [[5]]", 5),
        ("It cites [3] in the end.", 3),  # as published
    ],
)
def test_what_a_judge_repeats_of_its_prompt_is_no_rating(text, found):
    assert rating(text, ASKED) == found


FOUR = "coherence: [[7]]\nconsistency: [[8]]\nfluency: [[9]]\nrelevance: [[6.5]]"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FOUR, (7, 8, 9, 6.5)),
        (f"Its coherence is [[3]] at first sight.\n{FOUR}", (7, 8, 9, 6.5)),
        (FOUR.replace("coherence:", "**Coherence:**"), (7, 8, 9, 6.5)),
        (FOUR.replace("\n", ", "), (7, 8, 9, 6.5)),
        (FOUR.replace("[[9]]", "[[12]]"), None),
        (FOUR.replace("fluency: [[9]]\n", ""), None),
        (FOUR.replace("[[", "[").replace("]]", "]"), None),
        ("[[7]] [[8]] [[9]] [[6]]", None),
        ("", None),
    ],
)
def test_four_ratings_are_read_by_their_aspects_or_not_at_all(text, found):
    ratings = read_ratings(text)
    assert (ratings and tuple(ratings.values())) == found


def test_every_judgment_is_asked_for_once_and_none_again_by_the_next_run(judge, kept):
    with serving() as server:
        asked = [*requests(5), *requests(2)]  # two of them are the same
        assert ratings(judge(server).judgments(asked, kept, CPU, "judgments")) == [7.0] * 7
        assert len(server.calls) == 5
        assert ratings(judge(server).judgments(asked, kept, CPU, "judgments")) == [7.0] * 7
        assert len(server.calls) == 5
        judge(server, "judge.model=another").judgments(requests(1), kept, CPU, "judgments")
        judge(server, "judge.temperature=0.5").judgments(requests(1), kept, CPU, "judgments")
        assert [call["model"] for call in server.calls[5:]] == ["another", "gpt-4"]
    assert server.calls[0].items() >= {"temperature": 0.0, "max_tokens": 1024, "model": "gpt-4"}.items()


def test_other_prices_and_another_way_of_waiting_make_no_other_judgment(judge, kept):
    with serving() as server:
        judge(server).judgments(requests(2), kept, CPU, "judgments")
        same = judge(server, "judge.parallel=3", "judge.input_price=1", "judge.output_price=1", "judge.attempts=1")
        same.judgments(requests(2), kept, CPU, "judgments")
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    "event",
    [
        {"status": 500},
        {"status": 503, "raw": b"<html>busy</html>"},
        {"status": 429},
        {"raw": b'{"choices": [{"mess'},
        {"raw": b"[]"},
        {"raw": b""},
        {"raw": b'{"error": "overloaded"}'},
        {"raw": b'{"choices": []}'},
        {"raw": b'{"choices": [{"message": {"content": 3}}]}'},
        {"raw": b"\xff\xfe"},
        {"raw": b"[" * 10**5},
        {"cut": 30},
        {"cut": 1},
        {"reset": True},
    ],
    ids=str,
)
def test_what_passes_is_tried_again_and_what_stays_is_named(judge, kept, event):
    with serving(plan=[event, event]) as server:
        assert ratings(judge(server).judgments(requests(2), kept, CPU, "judgments")) == [7.0, 7.0]
        assert len(server.calls) == 4
        server.plan = [event] * 4
        with pytest.raises(Refused, match="no answer in 4 tries") as stopped:
            judge(server).judgments(requests(4), kept, CPU, "judgments")
    assert KEY not in str(stopped.value)


def test_a_time_out_is_tried_again(judge, kept):
    with serving(plan=[{"wait": 1.5}]) as server:
        slow = judge(server, "judge.timeout=0.3")
        assert ratings(slow.judgments(requests(1), kept, CPU, "judgments")) == [7.0]
        assert len(server.calls) == 2


@pytest.mark.parametrize("of", ["header", "body"])
def test_an_answer_that_drips_is_given_up_when_its_time_is_over(judge, kept, of):
    """Every byte comes well before the time-out of a socket, which begins anew with it."""
    with serving(plan=[{"drip": 0.05, "of": of}]) as server:
        started = time.monotonic()
        assert ratings(judge(server, "judge.timeout=0.6").judgments(requests(1), kept, CPU, "judgments")) == [7.0]
        assert 0.6 < time.monotonic() - started < 3 and len(server.calls) == 2
        if of == "body":  # the connection is not kept open behind it either
            while not server.left:
                assert time.monotonic() - started < 5


def test_an_answer_without_end_is_read_no_further_than_an_answer_can_be(judge, kept, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST", 2**17)
    with serving(plan=[{"raw": b" " * 2**20}]) as server:
        assert ratings(judge(server).judgments(requests(1), kept, CPU, "judgments")) == [7.0]
        server.plan = [{"raw": b" " * 2**20}] * 2
        with pytest.raises(Refused, match="no answer in 2 tries; the last: an answer of more than 131072 bytes"):
            judge(server, "judge.retries=1", "judge.model=b").judgments(requests(1), kept, CPU, "judgments")


def test_an_endpoint_that_is_not_there_is_named(judge, kept):
    with serving() as server:
        address = server.url
    with pytest.raises(Refused, match="no answer in 2 tries.*refused"):
        judge(address, "judge.retries=1").judgments(requests(1), kept, CPU, "judgments")


@pytest.mark.parametrize("date", [False, True])
def test_an_endpoint_that_asks_to_wait_is_given_the_time(judge, kept, date):
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=4), usegmt=True) if date else "0.5"
    with serving(plan=[{"status": 429, "headers": {"Retry-After": until}}]) as server:
        judge(server).judgments(requests(1), kept, CPU, "judgments")
    first, second = (call["at"] for call in server.calls)
    assert second - first > 0.4


def test_an_endpoint_that_asks_to_wait_for_an_hour_is_not_waited_for(judge, kept):
    with serving(plan=[{"status": 429, "headers": {"Retry-After": "3600"}}]) as server:
        with pytest.raises(Refused, match="asks to wait 3600 seconds"):
            judge(server).judgments(requests(1), kept, CPU, "judgments")
        assert len(server.calls) == 1


def test_a_retry_after_that_is_no_time_is_ignored(judge, kept):
    with serving(plan=[{"status": 429, "headers": {"Retry-After": "soon"}}]) as server:
        assert ratings(judge(server).judgments(requests(1), kept, CPU, "judgments")) == [7.0]


def test_waits_double_up_to_a_minute(monkeypatch):
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    monkeypatch.setattr(endpoint.JITTER, "uniform", lambda low, high: 1.0)
    with serving(plan=[{"status": 500}] * 9) as server, pytest.raises(Refused):
        endpoint.Endpoint(server.url, "OPENAI_API_KEY", 5, 8, 1.0).complete(
            {"messages": [], "model": "m"}, Stop(), lambda: None
        )
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"status": 404, "raw": b"no such model"}, ["judge.model=gpt-4", "no such model"]),
        ({"status": 400, "raw": b"max_tokens is not supported"}, ["HTTP 400", "max_tokens is not supported"]),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:9/"}}, ["sends elsewhere", "judge.base_url"]),
        ({"status": 403}, ["OPENAI_API_KEY", "HTTP 403"]),
        ({"status": 429, "raw": b'{"error": {"code": "insufficient_quota"}}'}, ["OPENAI_API_KEY has no credit left"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_another_try_would_not_change_is_said_at_once(judge, kept, event, words):
    with serving(plan=[event]) as server:
        with pytest.raises(Refused) as stopped:
            judge(server).judgments(requests(3), kept, CPU, "judgments")
        assert len(server.calls) == 1 and all(word in str(stopped.value) for word in words)


def test_a_wrong_key_names_its_variable_and_is_shown_nowhere(judge, kept, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OTHER_KEY", "sk-wrong-987654321")
    with serving() as server:  # which repeats the key that it refuses
        with pytest.raises(Refused, match="OTHER_KEY") as stopped:
            judge(server, "judge.key_env=OTHER_KEY").judgments(requests(3), kept, CPU, "judgments")
        assert len(server.calls) == 1
    assert "sk-wrong" not in str(stopped.value) + "".join(capsys.readouterr())


def test_a_missing_key_is_named_before_anything_is_asked(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(Refused, match="OPENAI_API_KEY holds no key"):
        judge("http://127.0.0.1:9/v1").prepare()
    judge("http://127.0.0.1:9/v1", "judge.key_env=null").prepare()


@pytest.mark.parametrize("bad", ["sk-one-secret\nsk-two", "sk-secret and more", "sk-sécret", "sk-secret\x00"])
def test_a_key_that_is_no_key_is_refused_and_not_shown(judge, kept, monkeypatch, bad):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": bad})
    with serving() as server:
        for ask in (judge(server).prepare, lambda: judge(server).judgments(requests(1), kept, CPU, "judgments")):
            with pytest.raises(Refused, match="OPENAI_API_KEY is not one line of ASCII") as stopped:
                ask()
            assert "cret" not in str(stopped.value) and "sk-" not in str(stopped.value)
        assert server.calls == []


@pytest.mark.parametrize("usage", [None, "none", [], {"prompt_tokens": "many", "completion_tokens": None}])
def test_an_answer_is_kept_whatever_is_said_of_its_tokens(judge, kept, usage):
    message = {"role": "assistant", "content": "Rating: [[6]]"}
    raw = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
    with serving(plan=[{"raw": raw}]) as server:
        priced = judge(server, "judge.input_price=0", "judge.output_price=1000", "judge.max_cost=9")
        assert ratings(priced.judgments(requests(1), kept, CPU, "judgments")) == [6.0]
        assert len(server.calls) == 1
    assert priced.spent == pytest.approx(1.024)  # what 1,024 tokens cost, which is the longest that it may be


def test_an_endpoint_without_keys_gets_none(judge, kept):
    with serving(key=None) as server:
        keyless = judge(server, "judge.key_env=null")
        assert ratings(keyless.judgments(requests(1), kept, CPU, "judgments")) == [7.0]


def test_an_endpoint_that_wants_a_key_and_gets_none_is_named(judge, kept):
    with serving() as server, pytest.raises(Refused, match="wants a key .*judge.key_env is null"):
        judge(server, "judge.key_env=null").judgments(requests(1), kept, CPU, "judgments")


def test_a_malformed_rating_is_asked_for_again_and_then_given_up(judge, kept):
    def answer(messages):
        if "question 0" in messages[0]["content"]:
            return "It is a fine answer."
        return "no rating" if len(messages) == 1 else "Rating: [[4]]"

    with serving(answer) as server:
        judged = judge(server).judgments(requests(2), kept, CPU, "judgments")
        assert ratings(judged) == [None, 4.0] and [j.attempts for j in judged] == [3, 2]
        assert len(server.calls) == 5
        last = server.calls[-1]["messages"]
        assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"] and FORM in last[-1][
            "content"
        ]
        judge(server).judgments(requests(2), kept, CPU, "judgments")
        assert len(server.calls) == 5


def test_an_empty_answer_is_malformed(judge, kept):
    with serving(lambda messages: None) as server:
        assert ratings(judge(server).judgments(requests(1), kept, CPU, "judgments")) == [None]


def test_an_endpoint_that_dies_half_way_is_later_asked_for_the_rest_alone(judge, kept):
    with serving(plan=[{}] * 5 + [{"status": 500}] * 4) as server:
        with pytest.raises(Refused, match="All judgments so far are kept"):
            judge(server).judgments(requests(10), kept, CPU, "judgments")
        asked = {call["messages"][0]["content"] for call in server.calls}
        answered = len(list((kept.folder / KIND).iterdir()))
        assert answered == 5 and len(asked) == 6
        server.calls.clear()
        assert ratings(judge(server).judgments(requests(10), kept, CPU, "judgments")) == [7.0] * 10
        assert len(server.calls) == 5
    assert not list(kept.folder.rglob("*.part"))


ASK = """
import sys
from pathlib import Path
import torch
from welore.cache import Cache
from welore.chat import said
from welore.config import compose, to_config
from welore.judges import Request
folder, *overrides = sys.argv[1:]
judge = to_config(compose(overrides)).judge
asked = [Request([said("user", f"question {n}")], ("turn_1",), "", lambda text: {"turn_1": 7.0}) for n in range(8)]
print("ready", flush=True)
sys.stdin.readline()
judge.judgments(asked, Cache(Path(folder)), torch.device("cpu"), "judgments")
"""


@pytest.mark.slow
def test_two_processes_that_ask_at_once_pay_for_each_judgment_once(kept):
    with serving(plan=[{"wait": 0.2}] * 16) as server:
        overrides = ["model=tiny", "trainer=cpu", "logger=none", "mode=none", "task=mt_bench", "judge=openai"]
        command = [sys.executable, "-c", ASK, kept.folder, *overrides, f"judge.base_url={server.url}"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        both = [subprocess.Popen([*command, "judge.parallel=2"], **pipes) for _ in range(2)]
        try:
            assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
            for process in both:
                process.stdin.write("go\n")
                process.stdin.flush()
            told = [process.communicate(timeout=60)[1] for process in both]
        finally:
            for process in both:
                process.kill()
        asked = [call["messages"][0]["content"] for call in server.calls]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(asked) == [f"question {number}" for number in range(8)]
    assert "another process makes judgments; waiting for it" in "".join(told)


def test_a_damaged_judgment_alone_is_asked_for_again(judge, kept):
    with serving() as server:
        judge(server).judgments(requests(3), kept, CPU, "judgments")
        next((kept.folder / KIND).iterdir()).write_text('{"text": 3')
        assert ratings(judge(server).judgments(requests(3), kept, CPU, "judgments")) == [7.0] * 3
        assert len(server.calls) == 4


def test_many_are_asked_at_a_time_and_an_error_ends_them_all_soon(judge, kept):
    with serving(plan=[{"wait": 0.2}] * 8) as server:
        started = time.monotonic()
        judge(server, "judge.parallel=8").judgments(requests(8), kept, CPU, "judgments")
        assert time.monotonic() - started < 1.2
    with serving(plan=[{"status": 500}] * 3 + [{"status": 403}]) as server:
        started = time.monotonic()
        with pytest.raises(Refused, match="HTTP 403"):
            waiting = judge(server, "judge.parallel=4", "judge.backoff=100", "judge.model=b")
            waiting.judgments(requests(20), kept, CPU, "judgments")
        assert time.monotonic() - started < 5 and len(server.calls) <= 8


def test_the_cost_is_said_before_the_first_call_and_an_unknown_price_is_said_too(judge, kept, capsys):
    with serving() as server:
        judge(server).judgments(requests(2), kept, CPU, "judgments")
        assert "2 judgments of gpt-4" in (told := capsys.readouterr().err) and "unknown price" in told
        priced = judge(server, "judge.input_price=30", "judge.output_price=60", "judge.model=b")
        priced.judgments(requests(2), kept, CPU, "judgments")
    told = capsys.readouterr().err
    assert "about 0.12" in told  # 2 times 1024 tokens at 60 per million, and a short question
    assert "has cost 0.0720 so far" in told  # 2 times 1000 tokens in and 100 out
    assert priced.spent == pytest.approx(0.072)


def test_what_may_cost_too_much_is_not_begun(judge, kept):
    with serving() as server:
        dear = judge(server, "judge.input_price=30", "judge.output_price=60", "judge.max_cost=0.1")
        with pytest.raises(Refused, match="more than judge.max_cost=0.1"):
            dear.judgments(requests(2), kept, CPU, "judgments")
        assert server.calls == []
        dear.judgments(requests(1), kept, CPU, "judgments")
        with pytest.raises(Refused, match="beside 0.0360 spent"):
            dear.judgments(requests(3), kept, CPU, "judgments")


def test_a_run_stops_where_it_has_spent_more_than_it_may(judge, kept):
    """The estimate goes by the length of the questions, and an endpoint may count otherwise."""
    with serving() as server:
        dear = judge(server, "judge.input_price=100", "judge.output_price=0", "judge.max_cost=0.15")
        with pytest.raises(Refused, match="has cost 0.2000"):
            dear.judgments(requests(5), kept, CPU, "judgments")
        assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        ({"wait": 1.5}, True),
        ({"drip": 0.05, "of": "body"}, True),
        ({"reset": True}, True),
        ({"cut": 30}, True),
        ({"raw": b"{}"}, True),
        ({"status": 500}, False),
        ({"status": 429}, False),
    ],
    ids=str,
)
def test_a_call_without_an_answer_counts_unless_it_was_refused(judge, kept, capsys, event, counts):
    priced = ["judge.input_price=0", "judge.output_price=1000", "judge.timeout=0.5", "judge.max_cost=9"]
    with serving(plan=[event]) as server:
        dear = judge(server, *priced)
        assert ratings(dear.judgments(requests(1), kept, CPU, "judgments")) == [7.0]
    assert dear.spent == pytest.approx(0.1 + (1.024 if counts else 0))
    assert ("with 1 calls without an answer, which may be charged for" in capsys.readouterr().err) == counts


def test_calls_without_an_answer_end_at_the_limit_too(judge, kept):
    with serving(plan=[{"reset": True}] * 9) as server:
        dear = judge(server, "judge.input_price=0", "judge.output_price=1000", "judge.max_cost=2.5")
        with pytest.raises(Refused, match="has cost 3.0720, with 3 calls without an answer"):
            dear.judgments(requests(1), kept, CPU, "judgments")
        assert len(server.calls) == 3


def test_an_endpoint_that_is_not_there_charges_nothing(judge, kept):
    with serving() as server:
        address = server.url
    dear = judge(address, "judge.input_price=1", "judge.output_price=1", "judge.max_cost=9", "judge.retries=1")
    with pytest.raises(Refused, match="no answer in 2 tries"):
        dear.judgments(requests(1), kept, CPU, "judgments")
    assert dear.spent == 0


def test_an_endpoint_that_cannot_be_reached_in_time_charges_nothing(judge, kept):
    """As behind a firewall: nobody accepts, and the queue of connections is full."""
    with socket.socket() as deaf, ExitStack() as queue:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        prices = ("judge.input_price=1", "judge.output_price=1", "judge.max_cost=9")
        dear = judge(address, *prices, "judge.retries=1", "judge.timeout=0.2")
        with pytest.raises(Refused, match="no answer in 2 tries"):
            dear.judgments(requests(1), kept, CPU, "judgments")
    assert dear.spent == 0


def test_the_total_of_a_run_is_what_a_judge_that_is_never_read_costs(judge, kept, capsys):
    """Against the calls themselves: two stages of two questions, each asked three times."""
    with serving(lambda messages: "x" * 3 * 1024) as server:  # as long as a judgment may be
        dear = judge(server, "judge.input_price=1000", "judge.output_price=1000")
        dear.foretell(requests(2), 2)
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "at most 12 judgments of gpt-4 (2 stages x 2 questions x 3 attempts)" in told
        dear.judgments(requests(2), kept, CPU, "judgments")
        read = 2 * sum(len(m["content"]) for call in server.calls for m in call["messages"]) / 3
    assert f"about {read:,.0f} tokens in and at most {12 * 1024:,} out" in told
    assert f"it costs about {(read + 12 * 1024) / 1000:.4f} at most" in told


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["judge.max_cost=5"], ["judge.max_cost=5", "both prices"]),
        (["judge.base_url=api.example.com"], ["is no address"]),
        (["judge.base_url='https://me:secret@example.com/v1'"], ["holds a name, a password"]),
        (["judge.key_env=sk-live-1234"], ["is not the name of an environment variable"]),
        (["judge.length_key=tokens"], ["max_completion_tokens"]),
        (["judge.attempts=0"], ["judge.attempts=0", "1 or more"]),
        (["judge.parallel=0"], ["judge.parallel=0"]),
        (["judge.timeout=0"], ["judge.timeout=0"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_judge_that_cannot_judge_is_refused(configured, overrides, words):
    with pytest.raises(Exception) as stopped:  # OmegaConf wraps what a schema refuses
        configured("mode=none", "judge=openai", *overrides)
    assert all(word in str(stopped.value) for word in words)
    assert "secret" not in str(stopped.value) and "sk-live" not in str(stopped.value)


def test_the_judge_counts_where_it_judges_and_there_by_what_changes_its_judgments(tmp_path):
    def name(*overrides):
        return fingerprint(to_config(composed(["model=tiny", "trainer=cpu", "logger=none", "mode=none", *overrides])))

    assert name() == name("judge=openai") == name("judge=openai", "judge.model=b")
    judged = ["task=mt_bench", "judge=openai"]
    assert len({name("task=mt_bench"), name(*judged), name(*judged, "judge.model=b")}) == 3
    assert name(*judged) != name(*judged, "judge.temperature=1") != name(*judged, "judge.attempts=1")
    assert name(*judged) == name(*judged, "judge.key_env=MINE", "judge.retries=1", "judge.timeout=3")
    assert name(*judged) == name(*judged, "judge.input_price=3", "judge.output_price=3", "judge.max_cost=3")


def test_a_judge_on_this_machine_counts_by_its_files_and_not_by_its_place(configured, pristine, tmp_path):
    def name(folder):
        return fingerprint(configured("mode=none", "task=mt_bench", "judge=local", f"judge.path={folder}"))

    before = name(saved(pristine, tmp_path / "a" / "judge"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert name(tmp_path / "b" / "judge") == before
    (tmp_path / "b" / "judge" / "config.json").touch()
    assert name(tmp_path / "b" / "judge") != before


def saved(pristine, folder: Path) -> Path:
    model, tokenizer = pristine
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_judge_writes_in_passes_and_keeps_each(configured, pristine, kept, tmp_path, monkeypatch):
    options = [f"judge.path={saved(pristine, tmp_path / 'judge')}", "judge.dtype=float32", "judge.max_tokens=6"]
    local = configured("mode=none", "judge=local", *options, "judge.batch=2", "judge.attempts=2").judge
    judged = local.judgments(requests(5), kept, CPU, "judgments")
    assert ratings(judged) == [None] * 5 and {j.attempts for j in judged} == {2}  # a random model rates nothing
    assert len(list((kept.folder / KIND).iterdir())) == 10
    local.loaded = None
    monkeypatch.setattr(type(local.source), "load", lambda *args: pytest.fail("all of it is kept"))
    assert local.judgments(requests(5), kept, CPU, "judgments") == judged


def test_what_is_wrong_with_a_local_judge_is_said_of_the_judge(configured, tmp_path):
    with pytest.raises(Refused, match="^judge.path=/no/such is no file or folder"):
        configured("mode=none", "judge=local", "judge.path=/no/such").judge.prepare()
    with pytest.raises(Refused, match="^judge.path=.* holds no config.json"):
        configured("mode=none", "judge=local", f"judge.path={tmp_path}").judge.source.load(tmp_path)
    with pytest.raises(Refused, match="^judge=local comes with the Python package no_such"):
        configured("mode=none", "judge=local", "judge.path=package:no_such/a.gguf").judge.source.load(tmp_path)
    with pytest.raises(Exception, match="judge.dtype=float7 is unknown"):
        configured("mode=none", "judge=local", "judge.path=a/b", "judge.dtype=float7")


def test_a_judgment_longer_than_the_judge_can_read_is_refused(configured, pristine, kept, tmp_path):
    options = [f"judge.path={saved(pristine, tmp_path / 'judge')}", "judge.max_tokens=100000"]
    with pytest.raises(Refused, match="Lower judge.max_tokens"):
        configured("mode=none", "judge=local", *options).judge.judgments(requests(1), kept, CPU, "judgments")
