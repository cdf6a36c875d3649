"""What is published of a run can be read on any machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import publish  # noqa: E402

from experiments import asked, table6  # noqa: E402
from experiments.cells import Row, Runs  # noqa: E402
from welore.errors import Refused  # noqa: E402
from welore.records import Record, records  # noqa: E402


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("WELORE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def ran(tmp_path, status="done", error=None, **config):
    outputs = tmp_path / "outputs"
    folder = outputs / "tiny" / "cut" / "welore" / "c4-0123"
    folder.mkdir(parents=True)
    known = {"outputs": str(outputs), "model": "a/name", "task": {"splits": [1, None], **config}}
    Record("0123", status, known, {"tuned/perplexity": 7.5}, started="2026", error=error).save(folder)
    (folder / "history.jsonl").write_text(json.dumps({"step": 0, "train/loss": 2.0}) + "\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    row = Row({}, folder, Record.read(folder))
    return row, outputs


def published(row, outputs, needs):
    folder = outputs.parent / "benchmarks" / row.folder.relative_to(outputs)
    publish.write(publish.told(row, outputs), row.folder, folder, needs)


def test_a_run_is_read_elsewhere_and_found_by_its_fingerprint(tmp_path, data):
    row, outputs = ran(tmp_path, path=str(data / "c4"))
    published(row, outputs, ["history.jsonl"])
    ((folder, record),) = records(tmp_path / "benchmarks")
    assert sorted(path.name for path in folder.iterdir()) == ["history.jsonl", "record.json"]
    assert folder.relative_to(tmp_path / "benchmarks") == row.folder.relative_to(outputs)
    assert record.config == {
        "outputs": "outputs",
        "model": "a/name",
        "task": {"splits": [1, None], "path": "$WELORE_DATA/c4"},
    }
    assert record.metrics == {"tuned/perplexity": 7.5}
    assert str(tmp_path) not in (folder / "record.json").read_text()
    (found,) = Runs.of(records(tmp_path / "benchmarks"), lambda cell: "0123").find(
        [{"mode": "welore"}], ["history.jsonl"]
    )
    assert not found.missing


def test_a_run_that_diverged_keeps_its_reason_without_lines_of_code(tmp_path, data):
    row, outputs = ran(tmp_path, "failed", f"FloatingPointError: the loss of step 3 is nan\n  File {tmp_path}/fit.py")
    published(row, outputs, [])
    ((_, record),) = records(tmp_path / "benchmarks")
    assert (record.status, record.error) == ("failed", "FloatingPointError: the loss of step 3 is nan")


def test_answers_keep_what_was_written_and_not_the_questions_of_a_data_set(tmp_path, data):
    row, outputs = ran(tmp_path)
    answers = [{"prompt": "Is it?", "right": "yes", "written": "no\u0085", "read": "no", "verdict": "wrong"}]
    answers += [{"prompt": "Is it so?", "right": "yes", "written": "yes", "read": "yes", "verdict": "right"}]
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    (row.folder / "answers-tuned.jsonl").write_text(lines, encoding="utf-8")
    published(row, outputs, table6.NEEDS)
    folder = tmp_path / "benchmarks" / row.folder.relative_to(outputs)
    assert asked.verdicts(folder) == asked.verdicts(row.folder) == [False, True]
    assert "Is it" not in (folder / "answers-tuned.jsonl").read_text()
    kept = json.loads((folder / "answers-tuned.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert kept == {"written": "no\u0085", "read": "no", "verdict": "wrong"}


def test_of_a_judgment_its_ratings_are_published_and_not_what_the_judge_was_asked():
    judgment = {"asked": [{"role": "user", "content": "An article."}], "text": "Good.", "ratings": {"fluency": 7.0}}
    line = json.dumps({"prompt": "An article.", "judgments": [judgment], "rouge_l": 0.25})
    assert json.loads(publish.judged(line)) == {"rouge_l": 0.25, "judgments": [{"ratings": {"fluency": 7.0}}]}


def test_a_path_that_nobody_else_has_is_refused(tmp_path, data):
    row, outputs = ran(tmp_path, path="/home/me/text")
    with pytest.raises(Refused, match="/home/me/text is a path of this machine"):
        publish.told(row, outputs)


def test_runs_that_an_artefact_lacks_are_counted_and_none_is_written(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(publish, "default_outputs", lambda: str(tmp_path))
    monkeypatch.setattr(publish, "TARGET", tmp_path / "benchmarks")
    assert publish.main(["figure4"]) == 0
    assert capsys.readouterr().out == "figure4: 0 runs published, 6 missing\n"
    assert not (tmp_path / "benchmarks").exists()
    assert publish.main([]) == 2
    assert publish.main(["figure44"]) == 2


def test_it_starts_from_anywhere_and_says_where_there_are_no_runs(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "publish.py"), "table5"]
    said = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 2 and "outputs is no folder of" in said.stderr
