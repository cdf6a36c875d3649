"""Tasks whose answers are judged: what is asked of the model and of the judge, and how ratings are counted."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from endpoints import KEY, serving

import welore.judged
from experiments import table2
from welore.chat import conversation
from welore.errors import Refused
from welore.judged import Case, counted
from welore.judges import REMINDER, Judgment, Request
from welore.records import FILE, Record
from welore.runner import run
from welore.summaries import PROMPT, length_class

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 2, "category": "writing", "turns": ["Tell {me}.", "More."]},
    {"question_id": 3, "category": "math", "turns": ["What is 1 + 1?", "And twice that?"]},
    {"question_id": 4, "category": "math", "turns": ["What is 2 + 2?", "And half of that?"]},
]
REFERENCES = [
    {"question_id": number, "choices": [{"index": 0, "turns": [f"reference {number}a", f"reference {number}b"]}]}
    for number in (3, 4)
]
TWO = "{question_1}|{answer_1}|{question_2}|{answer_2}"
PROMPTS = [
    {"name": "single-v1", "system_prompt": "one", "prompt_template": "{question}|{answer}"},
    {"name": "single-math-v1", "system_prompt": "one", "prompt_template": "{question}|{ref_answer_1}|{answer}"},
    {"name": "single-v1-multi-turn", "system_prompt": "two", "prompt_template": TWO},
    {"name": "single-math-v1-multi-turn", "system_prompt": "two", "prompt_template": "{ref_answer_2}|" + TWO},
    {"name": "pair-v2", "system_prompt": "", "prompt_template": "{answer_a}"},
]
FOUR = "coherence: [[7]]\nconsistency: [[8]]\nfluency: [[9]]\nrelevance: [[6]]"
SMALL = ["save=false", "trainer.progress=false", "err=0.3", "mode=none", "task.new_tokens=6"]


def lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def bench(tmp_path):
    """A folder in MT-Bench's format with four questions."""
    folder = tmp_path / "bench"
    folder.mkdir()
    files = {"question": QUESTIONS, "reference_gpt-4": REFERENCES, "judge_prompts": PROMPTS}
    for name, records in files.items():
        lines(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def news(tmp_path):
    """Two articles of each class of length, and one at either edge of the middle one."""
    sizes = (100, 470, 471, 789, 790, 900)
    records = [{"id": f"n{size}", "article": "a " * size + "!", "highlights": "a b\nc"} for size in sizes]
    return lines(tmp_path / "news.jsonl", [r | {"article": r["article"].replace(" !", "")} for r in records])


@pytest.fixture
def judged(configured, tmp_path):
    """A function of a task, a path and overrides to the config of a run without training."""

    def judged(task, path, *overrides):
        return configured(f"task={task}", f"task.path={path}", f"outputs={tmp_path}", *SMALL, *overrides)

    return judged


def endpoint(server):
    return ["judge=openai", f"judge.base_url={server.url}", "judge.backoff=0.001", "judge.parallel=1"]


def told(folder, stage="compressed"):
    return [json.loads(line) for line in (folder / f"answers-{stage}.jsonl").read_text().splitlines()]


# MT-Bench.


def test_each_turn_is_asked_with_what_the_model_wrote_before(judged, bench, model, tokenizer, cache):
    task = judged("mt_bench", bench).task
    hearing = task.benchmark(tokenizer, cache, judged("mt_bench", bench).judge)
    (one, *_) = hearing.measure(model, None, "dense").answers
    assert one["prompts"][0] == "### User:\nWrite.\n\n### Assistant:\n"  # a model without a template
    assert one["prompts"][1] == f"{one['prompts'][0]}{one['written'][0]}\n\n### User:\nAgain.\n\n### Assistant:\n"
    assert "judgments" not in one


def test_a_model_with_a_template_is_asked_in_it(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert conversation(tokenizer, talk) == "<system>s<user>u<a>"
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    assert conversation(tokenizer, talk) == "<user>s\n\nu<a>"


def test_the_judge_sees_the_published_prompts_and_references_where_they_belong(judged, bench):
    task = judged("mt_bench", bench).task
    writing, _, math, _ = task.cases()
    first, second = task.requests(writing, ["A{}", "B"])
    assert first.messages == [{"role": "system", "content": "one"}, {"role": "user", "content": "Write.|A{}"}]
    assert second.messages[1]["content"] == "Write.|A{}|Again.|B" and second.aspects == ("turn_2",)
    first, second = task.requests(math, ["2", "4"])
    assert first.messages[1]["content"] == "What is 1 + 1?|reference 3a|2"
    assert second.messages[1]["content"] == "reference 3b|What is 1 + 1?|2|And twice that?|4"


def test_a_limit_spreads_over_the_categories(judged, bench):
    cases = judged("mt_bench", bench, "task.limit=2").task.cases()
    assert [(case.name, case.category) for case in cases] == [("1", "writing"), ("3", "math")]
    assert len(judged("mt_bench", bench, "task.limit=99").task.cases()) == 4


def test_a_run_is_judged_by_turn_and_category_and_keeps_every_judgment(judged, bench, tmp_path):
    def answer(messages):
        first = messages[0]["content"] == "one"
        if "Tell {me}" in messages[1]["content"] and not first:
            return "no rating"
        return f"Rating: [[{4 if first else 6}]]"

    with serving(answer) as server:
        record = run(judged("mt_bench", bench, *endpoint(server)), tmp_path / "run")
        calls = len(server.calls)
    found = record.metrics
    assert found["compressed/score"] == pytest.approx((4 * 4 + 3 * 6) / 7)
    assert (found["compressed/score/turn_1"], found["compressed/score/turn_2"]) == (4, 6)
    assert found["compressed/score/math"] == 5 and found["compressed/score/writing"] == pytest.approx(14 / 3)
    assert (found["compressed/judged"], found["compressed/unjudged"], found["eval/examples"]) == (7, 1, 4)
    assert "judged by gpt-4" in record.environment["protocol"]
    second = told(tmp_path / "run")[1]["judgments"][1]
    assert second["text"] == "no rating" and second["ratings"] is None and second["attempts"] == 3
    assert second["asked"][0] == {"role": "system", "content": "two"}
    everything = "".join(f.read_text(errors="replace") for f in tmp_path.rglob("*") if f.suffix in (".json", ".jsonl"))
    assert KEY not in everything
    assert calls <= 2 * (8 + 2)  # two stages, and one judgment of each asked for three times


def test_nobody_judges_and_answers_are_written_down(judged, bench, tmp_path):
    found = run(judged("mt_bench", bench), tmp_path / "run").metrics
    assert "compressed/score" not in found and found["compressed/empty"] <= 8
    assert all(len(answer["written"]) == 2 for answer in told(tmp_path / "run"))


def test_another_judge_rates_the_very_same_answers_without_writing_them_again(judged, bench, tmp_path, monkeypatch):
    run(judged("mt_bench", bench), tmp_path / "nobody")
    monkeypatch.setattr("welore.judged.replies", lambda *args: pytest.fail("all is written"))
    with serving() as server:
        found = run(judged("mt_bench", bench, *endpoint(server)), tmp_path / "judge").metrics
    assert found["dense/score"] == 7
    assert [a["written"] for a in told(tmp_path / "nobody")] == [a["written"] for a in told(tmp_path / "judge")]


def test_a_run_whose_judge_dies_goes_on_with_the_rest(judged, bench, tmp_path):
    with serving(plan=[{}] * 3 + [{"status": 500}] * 9) as server:
        config = judged("mt_bench", bench, *endpoint(server), "judge.retries=2")
        with pytest.raises(Refused, match="so far are kept"):
            run(config, tmp_path / "run")
        assert Record.read(tmp_path / "run").status == "failed"
        server.plan = []
        server.calls.clear()
        assert run(config, tmp_path / "run").metrics["dense/judged"] == 8
        dense = [c["messages"][-1]["content"] for c in server.calls]
    assert len(dense) == len(set(dense)) <= 16 - 3


def test_a_run_that_is_killed_while_the_model_writes_goes_on_with_the_batch_that_is_next(
    judged, bench, tmp_path, monkeypatch
):
    """Two stages of two turns of two batches, at each third of which the run is killed."""
    whole = run(judged("mt_bench", bench, "task.batch=2", f"outputs={tmp_path / 'whole'}"), tmp_path / "whole")
    written, started = welore.judged.replies, []

    def dying(*how):
        started.append(how)
        if len(started) % 3 == 0:
            raise KeyboardInterrupt
        return written(*how)

    monkeypatch.setattr("welore.judged.replies", dying)
    config = judged("mt_bench", bench, "task.batch=2")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    again = run(config, tmp_path / "run")
    assert len(started) == 8 + 3  # those that were killed alone are written again
    assert told(tmp_path / "run") == told(tmp_path / "whole")
    assert again.metrics.keys() == whole.metrics.keys() and again.metrics["eval/questions_per_second"] > 0


@pytest.mark.slow
def test_a_run_that_is_killed_has_paid_for_nothing_twice(bench, tmp_path):
    with serving(plan=[{"wait": 0.3}] * 40) as server:
        command = [sys.executable, str(ROOT / "run.py"), "model=tiny", "trainer=cpu", "logger=none", "task=mt_bench"]
        command += [f"task.path={bench}", f"outputs={tmp_path / 'outputs'}", *SMALL, *endpoint(server)]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while len(server.calls) < 4 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list((tmp_path / "outputs" / ".cache" / "judgments").iterdir()))
        server.calls.clear()
        server.plan = []
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        again = [call["messages"][-1]["content"] for call in server.calls]
    assert done.returncode == 0, done.stderr
    assert kept == 3 and len(again) == len(set(again)) <= 16 - kept
    assert Record.read(next((tmp_path / "outputs").rglob(FILE)).parent).metrics["dense/judged"] == 8


def test_what_a_run_may_cost_in_all_is_said_once_and_before_anything_else(judged, bench, tmp_path, capsys):
    with serving() as server:
        run(judged("mt_bench", bench, *endpoint(server)), tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "judgments of gpt-4" in line]
    assert "the whole run asks for at most 48 judgments of gpt-4 (2 stages x 8 questions x 3 attempts)" in lines[0]
    assert [("whole run" in line) for line in lines] == [True, False, False]


def test_what_a_broken_model_says_is_counted_and_nobody_is_paid_to_rate_it(
    judged, bench, tmp_path, monkeypatch, capsys
):
    written = welore.judged.replies

    def breaking(model, tokenizer, prompts, *how):
        """The answers to the math of the second turn."""
        found = written(model, tokenizer, prompts, *how)
        broken = ["twice that" in prompt or "half of that" in prompt for prompt in prompts]
        return [replace(r, breaks_at="layers.1") if b else r for r, b in zip(found, broken, strict=True)]

    monkeypatch.setattr("welore.judged.replies", breaking)
    with serving() as server:
        config = judged("mt_bench", bench, *endpoint(server))
        found = run(config, tmp_path / "run").metrics
        asked = [call["messages"][1]["content"] for call in server.calls]
        again = run(config, tmp_path / "again").metrics
    assert (found["dense/broken"], found["dense/breaks_at"]) == (2, "layers.1")
    assert (found["dense/judged"], found["dense/unjudged"], found["dense/score/math"]) == (4, 4, None)
    assert asked and not any("1 + 1" in question or "2 + 2" in question for question in asked)
    assert again["dense/broken"] == 2 and "the dense model gives numbers" in capsys.readouterr().err
    assert [answer.get("breaks_at") for answer in told(tmp_path / "run")] == [None, None, "layers.1", "layers.1"]
    assert table2.ratings(tmp_path / "run") == [7, 7, None, None]


def test_a_missing_key_ends_a_run_before_the_model_writes(judged, bench, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr("welore.judged.replies", lambda *args: pytest.fail("it has written"))
    with pytest.raises(Refused, match="OPENAI_API_KEY"):
        run(judged("mt_bench", bench, "judge=openai"), tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "records", "words"),
    [
        ("question", [{"question_id": 1}], ["record 0 of question.jsonl", "KeyError: 'turns'"]),
        ("question", [QUESTIONS[0] | {"turns": ["one"]}], ["record 0 of question.jsonl", "MT-Bench's format"]),
        ("question", [QUESTIONS[2] | {"question_id": 9}], ["needs a reference", "has none for it"]),
        ("question", [], ["question.jsonl is empty"]),
        ("reference_gpt-4", [{"question_id": 3, "choices": []}], ["record 0 of reference_gpt-4.jsonl"]),
        ("judge_prompts", PROMPTS[:2], ["lacks single-v1-multi-turn (two turns)", "'single-v1'"]),
        (
            "judge_prompts",
            [PROMPTS[0] | {"prompt_template": "{verdict}"}, *PROMPTS[1:]],
            ["cannot be filled", "verdict"],
        ),
    ],
    ids=lambda value: str(value)[:25],
)
def test_a_file_that_is_not_in_the_format_is_named(judged, bench, tokenizer, cache, file, records, words):
    lines(bench / f"{file}.jsonl", records)
    config = judged("mt_bench", bench)
    with pytest.raises(Refused) as stopped:
        _ = config.task.benchmark(tokenizer, cache, config.judge).identity
    assert all(word in str(stopped.value) for word in words)


def test_a_missing_file_is_named_with_those_that_are_there(judged, bench):
    (bench / "judge_prompts.jsonl").rename(bench / "prompts.jsonl")
    task = judged("mt_bench", bench).task
    with pytest.raises(Refused, match=r"needs judge_prompts.jsonl, and there is .*prompts.jsonl"):
        task.requests(task.cases()[0], ["", ""])


def test_without_a_path_and_a_hub_the_local_folder_is_asked_for(configured):
    with pytest.raises(Refused, match=r"lmsys/mt-bench.*task.path=FOLDER"):
        configured("task=mt_bench", "mode=none").task.cases()


def test_what_lies_on_the_hub_is_fetched_whole(configured, bench, news, monkeypatch):
    names = {"question.jsonl": "question", "gpt-4.jsonl": "reference_gpt-4", "judge_prompts.jsonl": "judge_prompts"}
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, repo_type, Path(file).name))
        return bench / f"{names[Path(file).name]}.jsonl"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert configured("task=mt_bench", "mode=none").task.fetch() == "lmsys/mt-bench from the hub"
    assert set(asked) == {("lmsys/mt-bench", "space", name) for name in names}
    records = [json.loads(line) for line in news.read_text().splitlines()]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, split: records)
    task = configured("task=cnn_dailymail", "mode=none", "task.per_class=1").task
    assert task.fetch() == "abisee/cnn_dailymail from the hub"


def test_what_lies_here_is_not_fetched(judged, bench, news):
    assert judged("mt_bench", bench).task.fetch() is None and judged("cnn_dailymail", news).task.fetch() is None


def test_a_hub_whose_connection_breaks_is_named(configured, monkeypatch):
    def download(*args, **options):
        raise httpx.ReadError("broken off")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(Refused, match="the space lmsys/mt-bench on the hub, which failed: broken off Give a local"):
        configured("task=mt_bench", "mode=none").task.cases()


@pytest.mark.parametrize("task", ["mt_bench", "cnn_dailymail"])
def test_a_mode_that_trains_is_refused(configured, task):
    with pytest.raises(Exception, match="Write mode=none"):
        configured(f"task={task}", "mode=welore")


def test_ratings_that_nobody_could_read_have_no_mean():
    requests = [Request([], ("turn_1",), "", lambda text: None)] * 2
    found = counted(["math"] * 2, requests, [Judgment("", None, 3)] * 2)
    assert found == {"judged": 0, "unjudged": 2, "score": None, "score/turn_1": None, "score/math": None}


@pytest.mark.real
def test_the_real_mt_bench_has_80_questions_and_30_references(judged, data):
    task = judged("mt_bench", data / "tasks" / "mt_bench").task
    cases = task.cases()
    assert len(cases) == 80 and len({case.category for case in cases}) == 8
    assert sum(bool(case.references) for case in cases) == 30
    for case in cases:
        for request in task.requests(case, ["first answer", "second answer"]):
            asked = request.messages[1]["content"]
            assert "answer" in asked and case.turns[0] in asked
            assert all((text in asked) == (request.aspects == ("turn_2",)) for text in case.references[1:])


# Summaries.


@pytest.mark.parametrize(
    ("words", "name"), [(1, "small"), (470, "small"), (471, "medium"), (789, "medium"), (790, "large")]
)
def test_articles_fall_into_the_classes_of_the_paper(words, name):
    assert length_class("word " * words) == name


def test_a_seed_chooses_as_many_articles_of_each_class(judged, news):
    def chosen(seed):
        cases = judged(
            "cnn_dailymail", news, "task.per_class=1", "task.rouge=false", f"task.choice_seed={seed}"
        ).task.cases()
        return [(case.category, case.name) for case in cases]

    assert chosen(1) == chosen(1) and len({tuple(chosen(seed)) for seed in range(8)}) > 1
    assert [category for category, _ in chosen(0)] == ["small", "medium", "large"]
    (case, *_) = judged("cnn_dailymail", news, "task.per_class=2").task.cases()
    assert isinstance(case, Case) and case.turns[0].startswith(PROMPT[:20]) and case.references == ("a b\nc",)


def test_summaries_are_judged_in_four_aspects(judged, news, tmp_path):
    with serving(lambda messages: FOUR) as server:
        options = ["task.per_class=1", "task.rouge=false", *endpoint(server)]
        found = run(judged("cnn_dailymail", news, *options), tmp_path / "run").metrics
        asked = server.calls[0]["messages"][1]["content"]
    assert found["compressed/score"] == 7.5 and found["compressed/score/fluency"] == 9
    assert found["compressed/score/small"] == 7.5 and found["compressed/judged"] == 12
    article = asked.partition("[The Start of the Article]\n")[2].partition("\n[The End of the Article]")[0]
    assert set(article.split()) == {"a"}  # the article, without the prompt around it


def test_a_summary_with_three_ratings_is_unjudged(judged, news, tmp_path):
    with serving(lambda messages: FOUR.replace("fluency", "style")) as server:
        options = ["task.per_class=1", "task.rouge=false", *endpoint(server), "judge.attempts=2"]
        found = run(judged("cnn_dailymail", news, *options), tmp_path / "run").metrics
    assert (found["compressed/judged"], found["compressed/unjudged"]) == (0, 12)
    assert found["compressed/score"] is None


def test_rouge_needs_no_judge(judged, news, tmp_path):
    pytest.importorskip("rouge_score")
    found = run(judged("cnn_dailymail", news, "task.per_class=1"), tmp_path / "run").metrics
    keys = [f"compressed/rouge_{kind}{place}" for kind in "12l" for place in ("", "/small", "/medium", "/large")]
    assert all(0 <= found[key] <= 1 for key in keys) and "compressed/score" not in found
    each = {line["category"]: line["rouge_l"] for line in told(tmp_path / "run")}
    assert each == {name: found[f"compressed/rouge_l/{name}"] for name in ("small", "medium", "large")}
    assert found["compressed/rouge_l"] == pytest.approx(sum(each.values()) / 3)


def test_rouge_is_measured_where_the_run_before_did_without_it(judged, news, tmp_path):
    pytest.importorskip("rouge_score")
    options = ["task.per_class=1", "task.rouge=false"]
    assert "dense/rouge_l" not in run(judged("cnn_dailymail", news, *options), tmp_path / "without").metrics
    assert "dense/rouge_l" in run(judged("cnn_dailymail", news, "task.per_class=1"), tmp_path / "with").metrics


def test_rouge_of_known_summaries():
    pytest.importorskip("rouge_score")
    from welore.summaries import rouge

    same, other, half = rouge(["the cat sat"] * 3, ["The cat sat.", "a dog", "the cat"])
    assert same == {"rouge_1": 1, "rouge_2": 1, "rouge_l": 1}
    assert other == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}
    assert half["rouge_1"] == pytest.approx(0.8) and half["rouge_2"] == pytest.approx(2 / 3)


def test_a_missing_rouge_is_named(judged, news, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = judged("cnn_dailymail", news, "task.per_class=1")
    with pytest.raises(Refused, match=r"pip install -e \.\[tasks\], or write task.rouge=false"):
        config.task.benchmark(None, None, config.judge)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"article": "a"}], ["record 0", "`highlights`"]),
        ([{"text": "a", "highlights": "b"}], ["record 0", "`article`"]),
        ([{"article": " ", "highlights": "b"}], ["record 0"]),
        ([{"article": "a", "highlights": "b"}], ["lacks articles of a class", "'medium': 0"]),
        ([{"article": "a " * n, "highlights": "b"} for n in (1, 1, 600, 900)], ["too few", "task.per_class=1"]),
        ([["a"]], ["record 0"]),
    ],
    ids=lambda value: str(value)[:25],
)
def test_articles_that_cannot_be_used_are_named(judged, tmp_path, records, words):
    task = judged("cnn_dailymail", lines(tmp_path / "bad.jsonl", records), "task.per_class=2").task
    with pytest.raises(Refused) as stopped:
        task.cases()
    assert all(word in str(stopped.value) for word in words)


def test_of_a_folder_the_articles_of_the_split_are_chosen(judged, tmp_path):
    sizes = (100, 600, 900)
    for split in ("train", "validation", "test"):
        records = [{"id": split, "article": "a " * size, "highlights": "a"} for size in sizes]
        lines(tmp_path / f"{split}.jsonl", records)
    for split in ("test", "validation"):
        task = judged("cnn_dailymail", tmp_path, "task.per_class=1", f"task.split={split}").task
        assert {case.name for case in task.cases()} == {split}
    with pytest.raises(Refused, match=r"task.split=tset: one file .* there are \['test', 'train', 'validation'\]"):
        judged("cnn_dailymail", tmp_path, "task.per_class=1", "task.split=tset").task.cases()


def test_articles_longer_than_wanted_are_not_chosen(judged, news):
    cases = judged("cnn_dailymail", news, "task.per_class=1", "task.most_words=800").task.cases()
    assert cases[-1].name == "n790"
    with pytest.raises(Exception, match="most_words=100"):
        judged("cnn_dailymail", news, "task.most_words=100")


def test_without_a_path_and_a_hub_the_local_file_is_asked_for(configured):
    with pytest.raises(Refused, match=r"abisee/cnn_dailymail.*task.path=FILE"):
        configured("task=cnn_dailymail", "mode=none").task.cases()


def test_a_local_model_judges(judged, bench, pristine, tmp_path):
    model, tokenizer = pristine
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    options = ["judge=local", f"judge.path={tmp_path / 'judge'}", "judge.dtype=float32", "judge.max_tokens=5"]
    found = run(judged("mt_bench", bench, *options, "judge.attempts=1"), tmp_path / "run").metrics
    assert found["dense/judged"] + found["dense/unjudged"] == 8


def test_a_conversation_that_does_not_fit_says_what_makes_it_shorter(judged, bench, news, tmp_path):
    for task, path, word in (("mt_bench", bench, "task.new_tokens"), ("cnn_dailymail", news, "task.most_words")):
        options = ["task.new_tokens=5000", *(["task.per_class=1", "task.rouge=false"] if path == news else [])]
        with pytest.raises(Refused, match=f"{word} makes it shorter.*4096 positions"):
            run(judged(task, path, *options), tmp_path / task)


def test_what_asks_again_holds_no_rating_that_a_weak_judge_could_repeat(judged, bench, news):
    for task, path in (("mt_bench", bench), ("cnn_dailymail", news)):
        config = judged(task, path, *(["task.per_class=1"] if path == news else []))
        (case, *_) = config.task.cases()
        for request in config.task.requests(case, ["", ""]):
            assert request.read(REMINDER.format(form=request.form)) is None
