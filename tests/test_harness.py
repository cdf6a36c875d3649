import json
import re
from ast import literal_eval

import pytest
import torch
from conftest import ROOT

from welore.checkpoint import load
from welore.config import compose, to_config
from welore.counts import wilson
from welore.errors import Refused
from welore.harness import answers as lines_of
from welore.harness import broken_tasks, counts, numbers, with_groups
from welore.lowrank import LowRankLinear
from welore.runner import run

QUESTIONS = [
    {"question": f"{a} and {b} is", "choices": ["small", "large"], "right": (a + b) // 10}
    for a in range(6)
    for b in range(9)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{{metric: acc}}]
"""

WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[right]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["\\n"]}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: first, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
"""


def answers(folder, stage):
    return [json.loads(line) for line in (folder / f"answers-{stage}.jsonl").read_text().split("\n") if line]


@pytest.fixture
def asked(configured, tmp_path):
    """A function of overrides to a config that asks the harness a task of our own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (folder / "sums.yaml").write_text(TASK.format(file=file))
    options = (f"task.path={folder}", "task.tasks=[sums]", f"outputs={tmp_path}", "save=false")
    return lambda *overrides: configured("task=lm_eval", "mode=none", "err=0.3", *options, *overrides)


def test_the_harness_measures_the_model_in_memory(asked, tmp_path):
    pytest.importorskip("lm_eval")
    found = run(asked("task.limit=20"), tmp_path / "run").metrics
    dense, compressed = (answers(tmp_path / "run", stage) for stage in ("dense", "compressed"))
    assert len(dense) == len(compressed) == 20 == found["eval/examples"]
    for stage, lines in {"dense": dense, "compressed": compressed}.items():
        right = sum(line["metrics"]["acc"] for line in lines)
        assert found[f"{stage}/lm_eval/sums/acc"] * 20 == pytest.approx(right)
        counted = [found[f"{stage}/lm_eval/sums/{key}"] for key in ("examples", "acc_correct", "acc_low", "acc_high")]
        assert counted == [20, right, *wilson(right, 20)]
    assert [line["answers"] for line in dense] != [line["answers"] for line in compressed]


def test_the_harness_reads_the_log_p_that_the_compressed_model_gives(asked, tmp_path):
    """Without it: the model that was saved, a prompt with its answer in one pass, and a sum in float64."""
    pytest.importorskip("lm_eval")
    run(asked("task.limit=5", "save=true"), tmp_path / "run")
    model, tokenizer = load(tmp_path / "run" / "model", torch.float32)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    for line in answers(tmp_path / "run", "compressed"):
        start = tokenizer(line["prompt"])["input_ids"]
        for option, found in zip(line["options"], line["answers"], strict=True):
            ids = tokenizer(line["prompt"] + option)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(log_p[place - 1, ids[place]].item() for place in range(len(start), len(ids)))
            assert literal_eval(found)[0] == pytest.approx(expected, abs=1e-4)


def test_a_question_that_is_read_by_two_filters_is_one_question(asked, tmp_path):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    (folder / "written.yaml").write_text(WRITTEN.format(file=folder / "sums.jsonl"))
    found = run(asked("task.limit=4", "task.tasks=[written]"), tmp_path / "run").metrics
    lines = answers(tmp_path / "run", "compressed")
    assert found["eval/examples"] == 4 and len(lines) == 8
    assert {line["filter"] for line in lines} == {"whole", "first"}
    for kind in ("whole", "first"):
        key = f"dense/lm_eval/written/exact_match,{kind}"
        assert found[f"{key}_correct"] == found[key] * 4 and found["dense/lm_eval/written/examples"] == 4


def test_data_that_changed_outside_the_folder_are_measured_anew(asked, tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer = asked().model.load(tmp_path / "cache")[1]
    outside = tmp_path / "outside.jsonl"
    outside.write_text((tmp_path / "tasks" / "sums.jsonl").read_text())
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(file=outside))
    first = asked().task.benchmark(tokenizer, None).identity
    assert asked().task.benchmark(tokenizer, None).identity == first
    outside.write_text(outside.read_text().replace("large", "huge"))
    assert asked().task.benchmark(tokenizer, None).identity != first


@pytest.mark.parametrize(
    ("name", "words"), [("summs", ["'summs'", "Did you mean sums", "task.path=FOLDER"]), ("lost", ["lost.jsonl"])]
)
def test_a_task_that_cannot_be_loaded_is_named(asked, tmp_path, name, words):
    pytest.importorskip("lm_eval")
    lost = TASK.format(file="lost.jsonl").replace("task: sums", "task: lost")
    (tmp_path / "tasks" / "lost.yaml").write_text(lost)
    with pytest.raises(Refused) as stopped:
        asked(f"task.tasks=[{name}]").task.benchmark(None, None)
    assert all(word in str(stopped.value) for word in words)


def question(*responses):
    """As the harness logs it: two options with their log p, or a text that was written."""
    options = [("2 and 3 is", " small"), ("2 and 3 is", " large")][: len(responses)]
    line = {"arguments": options, "filtered_resps": list(responses), "target": 0, "filter": "none"}
    return line | {"doc_id": 0, "metrics": ["acc"], "acc": 1.0}


WHOLE = question((-1.5, True), (-2.5, False))
BROKEN = question((-1.5, True), (float("nan"), False))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([WHOLE, BROKEN], {"sums": "2 and 3 is large"}),
        ([WHOLE, question((-float("inf"), False), (-1.0, True))], {"sums": "2 and 3 is small"}),
        ([question(float("nan"))], {"sums": "2 and 3 is small"}),  # of a whole text
        ([WHOLE], {}),
        ([question("nan")], {}),  # which the model wrote
    ],
)
def test_a_log_p_that_is_not_finite_breaks_its_task(lines, found):
    assert broken_tasks({"others": [WHOLE], "sums": lines}) == found


def test_a_broken_task_has_no_number_and_nor_have_the_groups_that_it_counts_in():
    broken = with_groups({"sums"}, {"all": ["hard", "whole"], "hard": ["sums", "whole"], "easy": ["whole"]})
    assert broken == {"sums", "hard", "all"}
    results = {name: {"acc,none": 0.5, "alias": name} for name in ("sums", "whole", "hard", "easy", "all")}
    missing = {"lm_eval/sums/acc": None, "lm_eval/hard/acc": None, "lm_eval/all/acc": None}
    assert numbers(results, broken) == missing | {"lm_eval/whole/acc": 0.5, "lm_eval/easy/acc": 0.5}


def test_only_shares_of_right_answers_are_counted():
    lines = [WHOLE | {"acc": right, "f1": right / 2, "word": right} for right in (1, 0, 1, 1)]
    lines = [line | {"metrics": ["acc", "f1", "word"], "doc_id": place} for place, line in enumerate(lines)]
    key = "lm_eval/sums/acc"
    told = {key: 0.75, "lm_eval/sums/f1": 0.375, "lm_eval/sums/word": 0.5}  # the last is not the mean
    low, high = wilson(3, 4)
    found = {"lm_eval/sums/examples": 4, f"{key}_correct": 3, f"{key}_low": low, f"{key}_high": high}
    assert counts({"sums": lines}, told) == found
    assert counts({"sums": lines}, dict.fromkeys(told)) == {"lm_eval/sums/examples": 4}  # broken


def test_a_broken_answer_is_marked_and_counts_for_nothing():
    whole, broken = lines_of({"sums": [WHOLE, BROKEN]})
    assert whole["metrics"] == {"acc": 1.0} and "verdict" not in whole
    assert broken["metrics"] == {"acc": None} and broken["verdict"] == "broken"


def test_a_model_that_breaks_has_no_accuracy_and_its_record_says_where(asked, tmp_path):
    pytest.importorskip("lm_eval")
    config = asked("task.limit=4")
    model, tokenizer = config.model.load(tmp_path / "cache")[:2]
    benchmark = config.task.benchmark(tokenizer, None)
    assert benchmark.measure(model, None, "x").stage["lm_eval/sums/acc"] is not None
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    outcome = benchmark.measure(model, None, "x")
    assert set(outcome.stage.items()) >= {("lm_eval/sums/acc", None), ("breaks_at", "model.layers.1")}
    assert [line["verdict"] for line in outcome.answers] == ["broken"] * 4


def test_a_task_that_only_measures_trains_nothing(asked):
    with pytest.raises(Refused, match="nothing to train on.*mode=none"):
        asked("mode=welore")


@pytest.mark.parametrize(("overrides", "words"), [("task.tasks=[]", "asks nothing"), ("task.limit=0", "limit=0")])
def test_a_harness_that_asks_nothing_is_refused(configured, overrides, words):
    with pytest.raises(Exception, match=words):
        configured("task=lm_eval", "mode=none", overrides)


def test_a_missing_package_is_named(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install -e \.\[harness\]"):
        asked().task.benchmark(None, None)


def test_a_path_that_is_no_folder_is_named(configured):
    with pytest.raises(Refused, match="is no folder of task files"):
        configured("task=lm_eval", "mode=none", "task.path=/no/such").task.identity()


@pytest.mark.real
def test_the_example_of_the_guide_is_answered_as_it_says(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    guide = (ROOT / "docs" / "tasks.md").read_text()
    task, questions = re.search(
        r"`my_tasks/sums.yaml`:\n\n```yaml\n(.*?)```.*?```json\n(.*?)```", guide, re.S
    ).groups()
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "sums.yaml").write_text(task)
    (tmp_path / "my_tasks" / "sums.jsonl").write_text(questions)
    monkeypatch.chdir(tmp_path)
    asked = ["task=lm_eval", "task.tasks=[sums]", "task.path=my_tasks", "err=0.3", "mode=none", "save=false"]
    config = to_config(compose([*asked, "trainer=cpu", "logger=none", f"outputs={tmp_path / 'outputs'}"]))
    record = run(config, tmp_path / "run")
    assert record.metrics["dense/lm_eval/sums/acc"] == pytest.approx(1 / 3)
    said = [float(value) for value in re.findall(r"-\d\.\d{4}", guide[guide.index("Its log p of") :])[:3]]
    assert record.metrics["eval/examples"] == 3 and len(said) == 3
    found = [literal_eval(answer)[0] for answer in answers(tmp_path / "run", "dense")[0]["answers"]]
    assert found == pytest.approx(said, abs=0.02)  # in bfloat16, which kernels of another processor round otherwise
