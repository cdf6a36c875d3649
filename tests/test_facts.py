import json

import pytest

from welore.errors import Refused
from welore.examine import Item
from welore.facts import normalized

TRIVIA = {"question": "Who?", "answer": "The Ace", "aliases": ["Ace", "A.C.E."]}
FREEBASE = {
    "Questions": [
        {"RawQuestion": "Who?", "Parses": [{"Answers": [{"AnswersName": ["ace"]}, {"AnswersName": [["the top"]]}]}]}
    ]
}


@pytest.fixture
def task(configured):
    return lambda name, *overrides: configured(f"task={name}", "mode=none", "task.sizes=null", *overrides).task


def written(folder, content):
    lines = content if isinstance(content, list) else None
    file = folder / ("validation.jsonl" if lines else "eval.json")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) if lines else json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Beatles", "beatles"),
        ("a  cat,  an\tox", "cat ox"),
        ("Campbell-Bannerman", "campbell bannerman"),
        ("U.S.A.", "u s"),  # the last letter passes for an article, on both sides
        ("O’Neill's", "o neill s"),
        ("snake_case", "snake case"),
        ("  ...  ", ""),
        ("Theatre", "theatre"),
        ("É", "é"),
        ("U.–S.–A.", "u –s –"),  # a dash that is no ASCII ends a word, and stays
    ],
)
def test_names_are_compared_without_case_punctuation_and_articles(text, plain):
    assert normalized(text) == plain


@pytest.mark.parametrize(
    ("wrote", "read", "right"),
    [
        (" the ace.\nQuestion: next", "the ace.", True),
        ("\n\n A.C.E\n", "A.C.E", True),
        (" The answer is the ace", "The answer is the ace", False),
        (" queen", "queen", False),
        (" ... \n", None, None),
        ("", None, None),
    ],
)
def test_the_first_line_is_right_if_it_is_any_alias(task, wrote, read, right):
    trivia = task("triviaqa")
    example = trivia.example(TRIVIA)
    assert trivia.read(wrote) == read
    assert read is None or trivia.right(read, Item("", example.answer, aliases=example.aliases)) == right


@pytest.mark.parametrize(("name", "content"), [("triviaqa", [TRIVIA]), ("freebaseqa", FREEBASE)])
def test_each_format_is_read_whole_as_test_questions(task, tmp_path, name, content):
    facts = task(name, f"task.path={written(tmp_path, content)}")
    (example,) = facts.examples("test")
    assert example.question == "Who?" and "ace" in {normalized(alias) for alias in example.aliases}
    assert facts.examples("train") == facts.examples("validation") == []


def test_the_hubs_triviaqa_is_read_alike(task):
    nested = {"question": "Who?", "answer": {"value": "The Ace", "aliases": ["Ace", "A.C.E."]}}
    assert task("triviaqa").example(nested) == task("triviaqa").example(TRIVIA)


def test_the_hubs_freebaseqa_is_read_alike(task):
    parses = {"Parse-Id": ["0"], "Answers": [{"AnswersMid": ["m.1", "m.2"], "AnswersName": [["ace"], ["the top"]]}]}
    nested = {"RawQuestion": "Who?", "Parses": parses}
    assert task("freebaseqa").example(nested) == task("freebaseqa").example(FREEBASE["Questions"][0])


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), ConnectionError("no hub")])
def test_a_hub_that_gives_no_questions_is_named(task, monkeypatch, error):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(Refused, match="KelvinJiang/freebase_qa.*failed.*task.path=FILE"):
        task("freebaseqa").examples("test")
    assert asked == [(("KelvinJiang/freebase_qa", None), {"revision": "refs/convert/parquet"})]


def test_the_eval_file_of_freebaseqa_is_asked(task, tmp_path):
    for name, question in {"train": "Train?", "dev": "Dev?", "eval": "Eval?"}.items():
        questions = [FREEBASE["Questions"][0] | {"RawQuestion": question}]
        (tmp_path / f"FreebaseQA-{name}.json").write_text(json.dumps({"Questions": questions}))
    (example,) = task("freebaseqa", f"task.path={tmp_path}").examples("test")
    assert example.question == "Eval?"


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("freebaseqa", ["FreebaseQA-train", "FreebaseQA-dev"], "eval or test"),
        ("triviaqa", ["a", "b"], "validation or dev"),
        ("triviaqa", ["train"], "validation or dev"),
    ],
)
def test_of_several_files_one_must_be_named_as_the_test_questions(task, tmp_path, name, files, words):
    content = {"triviaqa": [TRIVIA], "freebaseqa": FREEBASE}[name]
    for file in files:
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match=f"one file or split named after {words} is needed.*{files[-1]}"):
        task(name, f"task.path={tmp_path}").examples("test")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("triviaqa", [TRIVIA | {"question": None}], ["question holds no text but None"]),
        ("triviaqa", [TRIVIA | {"answer": None}], ["are not all texts"]),
        ("triviaqa", [TRIVIA | {"aliases": "Paris"}], ["record 0", "the aliases 'Paris' of 'Who?' are no list"]),
        ("triviaqa", [TRIVIA | {"answer": "...", "aliases": []}], ["record 0", "has a letter or a digit"]),
        ("triviaqa", [{"question": "Who?"}], ["record 0", "KeyError: 'answer'"]),
        ("freebaseqa", {"Questions": [{"RawQuestion": "Who?", "Parses": []}]}, ["record 0", "no answer"]),
        ("freebaseqa", {"Data": []}, ["not in a format of questions"]),
    ],
)
def test_a_record_without_an_answer_is_named(task, tmp_path, name, content, words):
    with pytest.raises(Refused) as stopped:
        task(name, f"task.path={written(tmp_path, content)}").examples("test")
    assert all(word in str(stopped.value) for word in words)


def test_nothing_is_trained_on_questions_that_are_all_for_testing(configured, tmp_path):
    from welore.runner import run

    path = written(tmp_path, [TRIVIA] * 3)
    options = [f"task.path={path}", "task.sizes=null", f"outputs={tmp_path}", "save=false", "trainer.progress=false"]
    found = run(configured("task=triviaqa", "mode=none", "err=0.3", *options), tmp_path / "run").metrics
    assert found["eval/examples"] == 3 and found["compressed/unparsed"] + found["compressed/correct"] <= 3
    with pytest.raises(Refused, match="nothing to train on.*mode=none"):
        configured("task=triviaqa", "mode=welore", "err=0.3", *options)


@pytest.mark.parametrize(("name", "content"), [("triviaqa", [TRIVIA]), ("freebaseqa", FREEBASE)])
def test_a_part_of_the_questions_is_not_taken_for_all(configured, tmp_path, name, content):
    facts = configured(f"task={name}", "mode=none", f"task.path={written(tmp_path, content)}").task
    with pytest.raises(Refused, match="1 test questions, and the benchmark 0 and .* task.sizes=null"):
        facts.examples("test")


@pytest.mark.real
def test_the_real_triviaqa_has_all_its_questions(configured, data):
    path = data / "tasks" / "triviaqa"
    examples = configured("task=triviaqa", "mode=none", f"task.path={path}").task.examples("test")
    assert len(examples) == 7993 and all(example.aliases for example in examples)


@pytest.mark.real
def test_aliases_are_normalized_as_triviaqa_itself_has_normalized_them(data):
    for line in (data / "tasks" / "triviaqa" / "validation.jsonl").open(encoding="utf-8"):
        raw = json.loads(line)
        assert set(raw["normalized_aliases"]) <= {normalized(name) for name in (raw["answer"], *raw["aliases"])}
