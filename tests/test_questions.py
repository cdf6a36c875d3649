import json
import re
from collections import Counter

import pytest
import torch

from welore.errors import Refused
from welore.examine import Exam, Item, Sitting
from welore.greedy import Continuation
from welore.loss import IGNORED
from welore.quizzes import big_bench, coin_flips

CSQA = {
    "answerKey": "B",
    "question": {"stem": "Where?", "choices": [{"label": x, "text": t} for x, t in zip("ABC", "uvw", strict=True)]},
}
DATE = {"input": "Today is 1. What was yesterday?", "target_scores": {"12/31": 1, "01/02": 0, "01/03": 0}}
RECORDS = {
    "commonsenseqa": ({"train": [CSQA] * 10, "dev": [CSQA] * 3}, "Where? Answer Choices: (A) u (B) v (C) w", "B"),
    "svamp": ([{"Body": "He has 3.", "Question": "How many?", "Answer": 3.0}] * 10, "He has 3. How many?", "3"),
    "boolq": (
        {name: [{"question": "is it", "answer": True, "passage": "It is."}] * 10 for name in ("train", "dev")},
        "is it? Answer Choices: (a) True (b) False",
        "True",
    ),
    "coinflip": ({"examples": [{"question": "Heads?", "answer": "no"}] * 10}, "Heads?", "no"),
    "strategyqa": ({"examples": [{"input": "Does it?", "target_scores": {"Yes": 0, "No": 1}}] * 10}, "Does it?", "no"),
    "objects": (
        {"examples": [{"input": "He has the ", "target_scores": {"red ball.": 0, "blue ball.": 1}}] * 10},
        "He has the \nWhich choice is true ? Answer Choices: (A) red ball (B) blue ball",
        "B",
    ),
}


def written(records, folder):
    """The records as the files of their benchmark: a folder of JSON lines, or one JSON file."""
    if isinstance(records, dict) and "examples" not in records:
        for name, lines in records.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder
    (folder / "task.json").write_text(json.dumps(records))
    return folder / "task.json"


@pytest.fixture
def task(configured):
    """A function of overrides to a task of questions."""
    return lambda name, *overrides: configured(f"task={name}", *overrides).task


@pytest.mark.parametrize("name", RECORDS)
def test_each_benchmark_reads_its_original_format(task, tmp_path, name):
    records, question, answer = RECORDS[name]
    example = task(name, f"task.path={written(records, tmp_path)}", "task.sizes=null").examples("test")[0]
    assert (example.question, example.answer) == (question, answer)
    assert not example.options or answer in example.options


def test_commonsenseqa_reads_the_hubs_format_alike(task):
    flat = {"question": "Where?", "choices": {"label": ["A", "B", "C"], "text": ["u", "v", "w"]}, "answerKey": "B"}
    assert task("commonsenseqa").example(flat) == task("commonsenseqa").example(CSQA)


def test_big_bench_reads_the_hubs_format_alike():
    scores = DATE["target_scores"]
    flat = {"multiple_choice_targets": list(scores), "multiple_choice_scores": list(scores.values())}
    assert big_bench(flat) == big_bench(DATE)


@pytest.fixture
def hub(monkeypatch):
    """A function of splits, by their names, to the hub that holds them and nothing else."""

    def hub(**splits):
        monkeypatch.setattr("datasets.load_dataset", lambda repo, subset, revision: splits)

    return hub


def splits_of(questions):
    return [questions.examples(split) for split in ("train", "validation", "test")]


def test_svamp_of_the_hub_is_divided_as_the_original_file(task, tmp_path, hub):
    """The hub's own 700 and 300 are others: its first training record is chal-777."""
    records = [{"ID": f"chal-{n}", "Body": "He has", "Question": f"{n}?", "Answer": str(n)} for n in range(1, 1001)]
    mixed = records[776:] + records[:776]
    hub(train=mixed[:700], test=mixed[700:])
    assert splits_of(task("svamp")) == splits_of(task("svamp", f"task.path={written(records, tmp_path)}"))
    assert task("svamp").examples("test")[0].answer == "701"
    hub(train=[record | {"ID": None} for record in records], test=[])
    with pytest.raises(Refused, match="ID=None .* Expected is one like chal-7"):
        task("svamp").examples("test")


def test_a_folder_of_sums_that_is_divided_already_stays_so(task, tmp_path):
    lines = {
        name: [{"Body": "He has", "Question": f"{n}?", "Answer": n} for n in (1, 2, 3)] for name in ("train", "test")
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    assert len(task("svamp", f"task.path={tmp_path}", "task.sizes=null").examples("test")) == 3


def test_a_folder_of_sums_without_its_other_half_is_refused(task, tmp_path):
    (tmp_path / "test.json").write_text('[{"Body": "He has", "Question": "3?", "Answer": 3}]')
    for path in (tmp_path, tmp_path / "test.json"):
        with pytest.raises(Refused, match=r"named after train is needed, and there are \['test'\]"):
            task("svamp", f"task.path={path}").examples("test")


def shuffled_objects(count, number):
    """A record of the hub's tracking_shuffled_objects."""
    balls = [f"{place} ball." for place in range(count)]
    return {"inputs": f"Puzzle {number}: Bob has ", "multiple_choice_targets": balls, "targets": balls[:1]} | {
        "multiple_choice_scores": [1] + [0] * (count - 1)
    }


def test_object_tracking_of_the_hub_takes_the_puzzles_of_three_objects_alone(task, hub):
    pooled = [shuffled_objects(count, number) for number in range(750) for count in (3, 5, 7)]
    hub(train=pooled[:1800], validation=pooled[1800:])
    train, validation, test = splits_of(task("objects"))
    assert (len(train) + len(validation), len(test)) == (600, 150)
    assert {example.options for example in train + validation + test} == {("A", "B", "C")}
    hub(train=pooled[3:])
    with pytest.raises(Refused, match="599 training and 150 test .* task.path=FILE"):
        task("objects").examples("test")


@pytest.mark.parametrize("name", ["date", "strategyqa"])
def test_the_frame_that_the_hub_has_put_around_questions_is_no_part_of_them(task, name):
    record = {"input": "Is it so?", "target_scores": {"Yes": 1, "No": 0}}
    flat = {"inputs": "Q: Is it so?\nA:", "multiple_choice_targets": ["Yes", "No"], "multiple_choice_scores": [1, 0]}
    assert task(name).example(flat) == task(name).example(record)


def test_a_large_number_is_answered_in_full(task):
    record = {"Body": "He has many.", "Question": "How many?", "Answer": 22090603.0}
    assert task("svamp").example(record).answer == "22090603"


def test_the_choices_of_a_date_are_shuffled_in_one_fixed_way(task):
    records = [DATE | {"input": f"Today is {day}."} for day in range(200)]
    answers = [task("date").example(record).answer for record in records]
    assert answers == [task("date").example(record).answer for record in records]
    assert min(Counter(answers)[letter] for letter in "ABC") > 40  # a third each, and not the first of each record


def test_heads_train_and_tails_test_and_validation_comes_out_of_the_training_questions(task, tmp_path):
    records = {"examples": [{"question": str(number), "answer": "yes"} for number in range(100)]}
    coins = task("coinflip", f"task.path={written(records, tmp_path)}", "task.sizes=[70,30]", "task.held_out=0.2")
    numbers = {split: [int(e.question) for e in coins.examples(split)] for split in ("train", "validation", "test")}
    assert numbers == {"train": [*range(56)], "validation": [*range(56, 70)], "test": [*range(70, 100)]}


def test_generated_coin_flips_are_answered_by_parity_and_differ_by_seed():
    puzzles = coin_flips(400, seed=3)
    assert puzzles == coin_flips(400, seed=3) != coin_flips(400, seed=4)
    for puzzle in puzzles:
        flips = len(re.findall(r" flips the coin", puzzle["question"]))
        assert flips + len(re.findall(r"does not flip", puzzle["question"])) == 4
        assert puzzle["answer"] == ("yes" if flips % 2 == 0 else "no")
    assert 160 < sum(puzzle["answer"] == "yes" for puzzle in puzzles) < 240


def test_as_many_coin_flips_are_generated_as_are_asked_for(task):
    few = splits_of(task("coinflip", "task.sizes=[100,20]", "task.held_out=0.1"))
    assert [len(examples) for examples in few] == [90, 10, 20]
    assert splits_of(task("coinflip", "task.sizes=null")) == splits_of(task("coinflip"))
    with pytest.raises(Refused, match="the generator of coin flips holds no test question"):
        task("coinflip", "task.sizes=[9,0]").examples("test")


def test_the_published_prompt_is_put_word_for_word(task, tmp_path, tokenizer):
    boolq = task("boolq", f"task.path={written(RECORDS['boolq'][0], tmp_path)}", "task.sizes=null")
    assert boolq.prompt(boolq.examples("test")[0], tokenizer) == (
        "Below is a question that describes a task. Write a response that appropriately completes the request.\n\n"
        "### \nIt is.\n\nQuestion: is it? Answer Choices: (a) True (b) False\n\n\n### Response:\n"
        "Among True and False, the answer is"
    )


@pytest.mark.parametrize("name", ["coinflip", "svamp"])
def test_answer_only_training_scores_the_answer_and_its_end_alone(task, tmp_path, tokenizer, cache, name):
    path = written(RECORDS[name][0], tmp_path)
    coins = task(name, f"task.path={path}", "task.sizes=null", "task.scored=answer")
    batch = coins.rows(tokenizer, cache, 0).batch(torch.tensor([0, 1]))
    scored = batch["ids_BL"][0][batch["labels_BL"][0] != IGNORED]
    assert tokenizer.decode(scored) == f" {RECORDS[name][2]}.\n\n### End"
    whole = task(name, f"task.path={path}", "task.sizes=null").rows(tokenizer, cache, 0)
    assert (whole.batch(torch.tensor([0]))["labels_BL"] != IGNORED).all()
    assert whole.scored(torch.tensor([0])) == whole.lengths_B[0] - 1


def test_chat_training_ends_the_turn(task, tmp_path, tokenizer, cache, monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    path = written(RECORDS["coinflip"][0], tmp_path)
    coins = task("coinflip", f"task.path={path}", "task.sizes=null", "task.style=chat", "task.scored=answer")
    batch = coins.rows(tokenizer, cache, 0).batch(torch.tensor([0]))
    scored = batch["ids_BL"][0][batch["labels_BL"][0] != IGNORED]
    assert tokenizer.decode(scored) == f" no.{tokenizer.eos_token}" and scored[-1] == tokenizer.eos_token_id


def test_questions_longer_than_a_row_are_left_out_of_training_and_said(task, tmp_path, tokenizer, cache, capsys):
    records = {"examples": [{"question": "a b " * (1 + 40 * (n % 2)), "answer": "yes"} for n in range(20)]}
    coins = task("coinflip", f"task.path={written(records, tmp_path)}", "task.sizes=null", "task.training.length=200")
    rows = coins.rows(tokenizer, cache, 0)
    assert 0 < len(rows) < len(coins.examples("train")) and rows.ids_BL.shape[1] <= 200
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 3])
def test_no_question_that_is_left_to_train_on_is_named(task, tmp_path, tokenizer, cache, count):
    records = {"examples": [{"question": "a", "answer": "yes"}] * count}
    coins = task("coinflip", f"task.path={written(records, tmp_path)}", "task.sizes=null", "task.held_out=0.999")
    with pytest.raises(Refused, match="leaves no train question of task=coinflip with task.held_out=0.999"):
        coins.rows(tokenizer, cache, 0)


# What a model wrote, what the published rule reads in it, and what a word of its own would be.
TRICKY = [
    ("coinflip", " yes.\n\n### End", "yes", "yes"),
    ("coinflip", " no.", "no", "no"),
    ("coinflip", " not clear", "no", None),
    ("coinflip", " I do not know", "no", None),
    ("coinflip", " unknown", "no", None),
    ("coinflip", " Yes", None, None),
    ("coinflip", " NO", None, None),
    ("coinflip", " yesterday", "yes", None),
    ("coinflip", " eyes", "yes", None),
    ("coinflip", "", None, None),
    ("coinflip", " maybe", None, None),
    ("coinflip", " no, yes", "no", "no"),
    ("coinflip", "yes", "yes", "yes"),
    ("coinflip", " still heads up", None, None),
    ("strategyqa", " Noah said yes", "yes", "yes"),
    ("strategyqa", " none", "no", None),
    ("strategyqa", " (yes)", "yes", "yes"),
    ("boolq", " True.", "True", "True"),
    ("boolq", " False", "False", "False"),
    ("boolq", " true", None, None),
    ("boolq", " (a) True", "True", "True"),
    ("boolq", " Not True", "True", "True"),
    ("boolq", " Truely False", "True", "False"),
    ("boolq", " (b)", None, None),
    ("commonsenseqa", " A", "A", "A"),
    ("commonsenseqa", " (C) mall", "C", "C"),
    ("commonsenseqa", " Below is a question", "B", None),
    ("commonsenseqa", " Among A through E", "A", "A"),
    ("commonsenseqa", " bank", None, None),
    ("commonsenseqa", " Department store", "D", None),
    ("commonsenseqa", " F", None, None),
    ("date", " F.", "F", "F"),
    ("date", " 05/01/2021", None, None),
    ("objects", " D", None, None),
    ("objects", " Claire", "C", None),
    ("svamp", " 51.", "51.", "51."),
    ("svamp", " $4", "4", "4"),
    ("svamp", " -3.5 apples", "-3.5", "-3.5"),
    ("svamp", " 1,200", "1", None),
    ("svamp", " three", None, None),
    ("svamp", " 7/2", "7", "7"),
    ("svamp", " x2", "2", None),
    ("svamp", " 3.5kg", "3.5", None),
    ("svamp", " 10.30am", "10.30", None),
    ("svamp", " 12.50x", "12.50", None),
    ("svamp", " x3.5", "3.5", None),
    ("svamp", " 1,000 dollars", "1", None),
    ("svamp", " version 1.2.3", "1.2", None),
    ("svamp", " .5 of 12, or so", "5", "12"),
    ("svamp", " 3.5kg of 4.25", "3.5", "4.25"),
    ("svamp", " 12.50 dollars", "12.50", "12.50"),
]


# The patterns of the published scripts.
PUBLISHED = {
    "commonsenseqa": "A|B|C|D|E",
    "date": "A|B|C|D|E|F",
    "objects": "A|B|C",
    "boolq": "True|False",
    "coinflip": "yes|no",
    "strategyqa": "yes|no",
    "svamp": r"-?\d+\.?\d*",
}
PUT = "Below is a question. Does 1 coin not flip? Is it True?  The answer is"


def published(name, prompt, decoded):
    """What the published scripts take for the answer; None where they leave the question out of their count."""
    try:
        return re.findall(PUBLISHED[name], decoded.replace(prompt, ""))[0]
    except IndexError:
        return None


@pytest.fixture
def verdicts(task, model, tokenizer, monkeypatch):
    """A function of a task's name and of what a model writes after PUT to what our Exam makes of it."""

    def verdicts(name, wrote):
        monkeypatch.setattr(
            "welore.examine.write_greedily", lambda model, _, prompts, *how: [Continuation(wrote)] * len(prompts)
        )
        questions = task(name)
        sitting = Sitting(True, 1, 8, "written", questions.read, questions.right)
        exam = Exam([Item(PUT, "0")], [], tokenizer, sitting, "questions")
        (answer,) = exam.measure(model, None, "dense").answers
        return answer

    return verdicts


@pytest.mark.parametrize(("name", "wrote", "paper", "word"), TRICKY)
def test_what_the_published_scripts_read_is_read_and_what_they_leave_out_is_unparsed(
    task, verdicts, name, wrote, paper, word
):
    answer = verdicts(name, wrote)
    assert answer["read"] == paper == published(name, PUT, PUT + wrote)
    assert (answer["verdict"] == "unparsed") == (paper is None)
    questions = task(name)
    questions.rule = "word"
    assert questions.read(wrote) == word


# Where two spaces come back as one, the prompt stays in what the published scripts search, and they read in it.
TRAPS = [("commonsenseqa", " F", "B"), ("boolq", " False", "True"), ("coinflip", " yes", "no"), ("svamp", " 7", "1")]


@pytest.mark.parametrize(("name", "wrote", "misread"), TRAPS)
def test_a_prompt_that_does_not_come_back_from_its_tokens_is_not_searched_for_the_answer(
    verdicts, name, wrote, misread
):
    assert published(name, PUT, PUT.replace("  ", " ") + wrote) == misread
    answer = verdicts(name, wrote)
    assert answer["read"] == published(name, PUT, PUT + wrote) != misread
    assert (answer["verdict"] == "unparsed") == (answer["read"] is None)


def test_numbers_are_compared_as_numbers(task):
    svamp = task("svamp")
    for read, answer, right in [("51.", "51", True), ("0.50", "0.5", True), ("5", "51", False)]:
        assert svamp.right(read, Item("", answer)) == right


REFUSED = [
    ("task=coinflip task.style=plain", ["task.style=plain is unknown", "paper or chat"]),
    ("task=coinflip task.scoring=best", ["task.scoring=best is unknown"]),
    ("task=coinflip task.rule=last", ["task.rule=last is unknown"]),
    ("task=coinflip task.scored=none", ["task.scored=none is unknown", "all or answer"]),
    ("task=coinflip task.held_out=1", ["task.held_out=1.0 is no share"]),
    ("task=coinflip task.limit=0", ["task.limit=0 asks nothing"]),
    ("task=coinflip task.sizes=[100]", ["task.sizes=[100]", "Write two"]),
    ("task=coinflip task.sizes=[-1,9]", ["task.sizes=[-1, 9]", "Write two"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_an_unknown_way_of_asking_is_refused(configured, overrides, words):
    with pytest.raises(Exception) as stopped:
        configured(*overrides.split())
    assert all(word in str(stopped.value) for word in words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("coinflip", "[]", ["holds no question"]),
        ("coinflip", "{", ["is not in a format of questions", "JSONDecodeError"]),
        ("coinflip", '{"rows": []}', ["is not in a format of questions", "examples"]),
        ("coinflip", '[{"question": "x"}]', ["has 0 training and 1 test questions", "350 and 150", "task.sizes=null"]),
        ("svamp", '[{"Body": "x"}, {"Body": "x"}]', ["has 1 training and 1 test"]),
    ],
)
def test_a_file_in_another_format_is_named(task, tmp_path, name, content, words):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(Refused) as stopped:
        task(name, f"task.path={tmp_path / 'task.json'}").examples("test")
    assert all(word in str(stopped.value) for word in words)


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("coinflip", {"question": "x"}, ["record 0", "KeyError: 'answer'"]),
        ("coinflip", {"question": "x", "answer": "maybe"}, ["'maybe' is neither yes nor no"]),
        ("boolq", {"question": "x", "answer": "yes", "passage": "p"}, ["'yes' is neither true nor false"]),
        ("coinflip", {"question": None, "answer": "yes"}, ["question holds no text but None"]),
        ("svamp", {"Body": "x", "Question": "y", "Answer": "many"}, ["could not convert"]),
        ("svamp", {"Body": "x", "Question": "y", "Answer": "nan"}, ["'nan' is no number"]),
        ("svamp", {"Body": None, "Question": "y", "Answer": 1}, ["Body holds no text but None"]),
        ("svamp", {"Body": "x", "Question": " ", "Answer": 1}, ["Question holds no text but ' '"]),
        ("boolq", {"question": "x", "answer": True, "passage": ""}, ["passage holds no text but ''"]),
        ("boolq", {"question": "x", "answer": True, "passage": None}, ["passage holds no text but None"]),
        ("strategyqa", {"input": 7, "target_scores": {"Yes": 1, "No": 0}}, ["input holds no text but 7"]),
        ("strategyqa", {"input": "x", "target_scores": ["Yes", "No"]}, ["AttributeError"]),
        ("date", {"input": "x", "target_scores": {"1": 1, "": 0}}, ["are not texts for the letters A|B|C|D|E|F"]),
        ("objects", {"input": "x", "target_scores": {"1": 1, "2": 0, "3": 0, "4": 0}}, ["for the letters A|B|C"]),
        ("strategyqa", {"input": "x", "target_scores": {"Yes": 1, "Maybe": 0}}, ["are not yes and no"]),
        ("date", {"input": "x", "target_scores": {"1": 1, "2": 1}}, ["do not make one choice right"]),
        ("commonsenseqa", CSQA | {"answerKey": "Z"}, ["'Z' is not in list"]),
    ],
)
def test_a_record_without_what_a_question_needs_is_named(task, tmp_path, name, record, words):
    folder = {"train": [record] * 4, "dev": [record] * 4} if name in ("boolq", "commonsenseqa") else [record] * 4
    questions = task(name, f"task.path={written(folder, tmp_path)}", "task.sizes=null")
    with pytest.raises(Refused) as stopped:
        questions.examples("test")
    assert all(word in str(stopped.value) for word in [*words, f"not in the format of {name}"])


def test_a_folder_without_the_named_split_is_refused(task, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(CSQA))
    with pytest.raises(Refused, match="dev or validation is needed"):
        task("commonsenseqa", f"task.path={tmp_path}").examples("test")


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("boolq", ["SVAMP"], ["named after train is needed", "['SVAMP']", "task.path=FOLDER"]),
        ("coinflip", ["dev", "train"], ["in one file", "['dev', 'train']", "task.path=FILE"]),
    ],
)
def test_the_files_of_another_task_are_named_with_their_path(task, tmp_path, name, files, words):
    for file in files:
        (tmp_path / f"{file}.json").write_text('[{"Body": "x"}]')
    with pytest.raises(Refused) as stopped:
        task(name, f"task.path={tmp_path}").examples("test")
    assert all(word in str(stopped.value) for word in [f"task.path={tmp_path} ", f"task={name}", *words])


def test_another_content_of_a_file_is_another_experiment(task, tmp_path):
    path = written(RECORDS["coinflip"][0], tmp_path)
    first = task("coinflip", f"task.path={path}").identity()
    path.write_text(path.read_text().replace("Heads?", "Tails?"))
    assert task("coinflip", f"task.path={path}").identity() != first


FOLDERS = {
    "commonsenseqa": ("commonsenseqa", 9741, 1221),
    "svamp": ("svamp", 700, 300),
    "boolq": ("boolq", 9427, 3270),
    "coinflip": ("coinflip", 350, 150),
    "strategyqa": ("strategyqa", 1603, 687),
    "date": ("date_understanding", 295, 74),
    "objects": ("object_tracking", 600, 150),
}


@pytest.mark.real
@pytest.mark.parametrize("name", FOLDERS)
def test_the_real_files_have_the_published_sizes(task, data, name):
    folder, train, test = FOLDERS[name]
    questions = task(name, f"task.path={data / 'tasks' / folder}")
    counts = [len(questions.examples(split)) for split in ("train", "validation", "test")]
    assert counts[0] + counts[1] == train and counts[2] == test
