import json

import pytest

from welore.errors import Refused
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
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers-compressed.jsonl").read_text().splitlines()]
    assert len(answers) == 20 == found["eval/examples"]
    for stage in ("dense", "compressed"):
        assert found[f"{stage}/lm_eval/sums/acc"] * 20 % 1 == pytest.approx(0, abs=1e-9)


def test_a_task_that_only_measures_trains_nothing(asked, tmp_path):
    with pytest.raises(Refused, match="mode=none"):
        asked().task.rows(None, None, 0)


@pytest.mark.parametrize(("overrides", "words"), [("task.tasks=[]", "asks nothing"), ("task.limit=0", "limit=0")])
def test_a_harness_that_asks_nothing_is_refused(configured, overrides, words):
    with pytest.raises(Exception, match=words):
        configured("task=lm_eval", "mode=none", overrides)


def test_a_missing_package_is_named(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install lm-eval"):
        asked().task.benchmark(None, None)


def test_a_path_that_is_no_folder_is_named(configured):
    with pytest.raises(Refused, match="is no folder of task files"):
        configured("task=lm_eval", "mode=none", "task.path=/no/such").task.identity()
