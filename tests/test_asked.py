"""When a mode counts as trained on questions, and when one counts as better than another."""

import json

import pytest

from experiments import asked
from experiments.cells import Row
from experiments.tuning import Study
from welore.counts import wilson
from welore.records import Record


@pytest.fixture
def study(tmp_path):
    """A function of right answers of 150 by seed (None: diverged) to a study of one learning rate; answers 0 to n."""

    def study(name, *rights, untuned=0.0, first=0):
        rows = []
        for seed, right in enumerate(rights, first):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            (folder / "history.jsonl").write_text('{"step": 0, "validation/perplexity": 2.0}\n')
            cell = {"mode": name, "mode.lr": 1.0, "seed": seed}
            if right is None:
                rows.append(Row(cell, folder, diverged=True))
                continue
            lines = [{"verdict": "right" if place < right else "wrong"} for place in range(150)]
            (folder / "answers-tuned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            found = {"tuned/accuracy": right / 150, "tuned/correct": right, "eval/examples": 150, "eval/chance": 0.52}
            rows.append(Row(cell, folder, Record("0", "done", {}, found | {"compressed/accuracy": untuned})))
        return Study({"mode": name}, tuple(rows))

    return study


def test_seeds_on_the_same_questions_are_not_more_questions(study):
    """90 of 150 is no proof (p = 0.03 would need 92); 270 of 450 would be."""
    assert asked.flag(study("a", 88, 88, 88)) == "did not train: at chance (52.0 %)"
    assert asked.flag(study("b", 140, 88, 140)) == "did not train: at chance (52.0 %), 1 of 3 seeds"
    assert asked.flag(study("c", 140, 139, 141)) == ""


def test_a_mode_that_diverged_or_made_nothing_better_did_not_train(study):
    assert asked.flag(study("a", 140, None)) == "did not train: diverged, 1 of 2 seeds"
    assert asked.flag(study("b", 120, untuned=0.9)) == "did not train: no better than untuned"
    broken = study("c", 0)
    broken.runs[0].record.metrics["tuned/breaks_at"] = "model.layers.1"
    assert asked.flag(broken) == "did not train: breaks in model.layers.1"


def outcomes(ours, theirs):
    found = {("x", "ours"): ours, ("x", "theirs"): theirs}
    return asked.higher(found, ["x"], "ours", "theirs")["x"], asked.surely_higher(found, ["x"], "ours", "theirs")["x"]


def test_a_better_mode_is_surely_better_where_seeds_and_questions_say_so(study):
    assert outcomes(study("a", 140, 141, 142), study("b", 110, 111, 112)) == (True, True)
    assert outcomes(study("c", 112, 111, 113), study("d", 110, 112, 110)) == (True, False)  # by neither
    assert outcomes(study("e", 113, 113, 113), study("f", 112, 112, 112)) == (True, False)  # one question
    assert outcomes(study("g", 150, 150, 150), study("h", 150, 123, 150)) == (True, False)  # one seed


def test_a_mean_that_a_seed_contradicts_is_not_sure(study):
    assert outcomes(study("a", 110, 149, 149), study("b", 149, 100, 100)) == (True, False)


def test_one_seed_of_each_is_compared_on_the_same_questions(study):
    """Those of the fixture are right from the first on: 9 more are all that differ (p = 0.004), and 5 more (0.06)."""
    assert outcomes(study("a", 119), study("b", 110)) == (True, True)
    assert outcomes(study("c", 115), study("d", 110)) == (True, False)


def test_the_interval_of_seeds_that_disagree_holds_them(study):
    assert asked.interval(study("a", 69, 62, 150)) == (0, 1)  # of seeds like these three say nothing
    assert asked.interval(study("b", 110, 110, 110)) == asked.interval(study("c", 110)) == wilson(110, 150)
    low, high = asked.interval(study("d", 100, 110, 120))
    assert (low + high) / 2 == pytest.approx(110 / 150) and high - low == pytest.approx(2 * 4.3027 * 10 / 3**0.5 / 150)


def test_nothing_is_said_where_the_better_one_did_not_train(study):
    assert outcomes(study("a", 80), study("b", 70)) == (None, None)
    assert outcomes(study("c", 70), study("d", 80)) == (None, None)
    assert outcomes(study("e", 70), study("f", 140)) == (False, False)


def test_a_run_that_diverged_is_right_nowhere(study):
    assert outcomes(study("a", 140, 141, 139), study("b", None, 110, 112)) == (True, False)
    assert outcomes(study("c", 140, 141), study("d", None)) == (True, None)
    assert outcomes(study("e", 140, 141, 139), study("f", 110)) == (True, None)  # no seed twice


def test_an_answer_with_a_separator_in_it_is_one_line(tmp_path):
    lines = [{"prompt": "Barcelona \x85 and \u2028", "verdict": verdict} for verdict in ("right", "unparsed")]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "answers-compressed.jsonl").write_text(text)
    assert asked.verdicts(tmp_path, "compressed") == [True, False]
