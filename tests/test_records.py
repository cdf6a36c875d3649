import json
import math

import pytest

from welore.records import FILE, Record, Sweep, records


def record(**options):
    return Record("abc", "done", {"err": 0.3, "mode": {"betas": [0.9, 0.999]}}, **options)


def test_a_record_is_read_back_as_it_was_saved(tmp_path):
    saved = record(metrics={"dense/perplexity": 12.5, "compress/lrc": 7, "x": None}, commit="1234", seconds=3.5)
    saved.save(tmp_path / "new" / "folder")
    assert Record.read(tmp_path / "new" / "folder") == saved


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null_so_that_the_file_is_json(tmp_path, value):
    record(metrics={"tuned/perplexity": value, "list": [1.0, value]}).save(tmp_path)

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    found = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert found["metrics"] == {"tuned/perplexity": None, "list": [1.0, None]}


def test_a_save_that_fails_leaves_the_earlier_record(tmp_path):
    record(seconds=1.0).save(tmp_path)
    with pytest.raises(TypeError):
        record(metrics={"bad": object()}, seconds=2.0).save(tmp_path)
    assert Record.read(tmp_path).seconds == 1.0


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"fingerprint": "a"}', '{"unknown": 1}', '{"fingerprint": "a", "status": "done", "config": []}'],
)
def test_a_file_that_is_no_record_reads_as_none(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    assert Record.read(tmp_path) is None


@pytest.mark.parametrize(
    "key, value", [("metrics", {"tuned/perplexity": 5.0}), ("fingerprint", "abd"), ("config", {})]
)
def test_a_record_that_was_edited_by_hand_is_told_and_does_not_count(tmp_path, capsys, key, value):
    record(metrics={"tuned/perplexity": 12.5}).save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | {key: value}))
    assert Record.read(tmp_path) is None
    assert "was edited" in capsys.readouterr().err
    (tmp_path / FILE).write_text(json.dumps(content))  # laid out in another way, with the same content
    assert Record.read(tmp_path) == record(metrics={"tuned/perplexity": 12.5})


def test_no_file_reads_as_none(tmp_path):
    assert Record.read(tmp_path) is None


def test_the_records_under_a_folder_are_the_readable_ones_the_earliest_first(tmp_path):
    later, first = record(started="2026-01-02T00:00:00+00:00"), record(started="2026-01-01T00:00:00+00:00")
    failed = Record("abd", "failed", {}, started="2026-01-03T00:00:00+00:00", error="x")
    later.save(tmp_path / "a" / "b")
    first.save(tmp_path / "c")
    failed.save(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / FILE).write_text("{")
    assert list(records(tmp_path)) == [
        (tmp_path / "c", first),
        (tmp_path / "a" / "b", later),
        (tmp_path / "d", failed),
    ]


def test_a_sweep_is_the_full_product_of_its_axes():
    cells = Sweep({"model": ["tiny"], "err": [0.1, 0.3], "mode": ["none", "full"]}).cells()
    assert cells == [{"model": "tiny", "err": err, "mode": mode} for err in (0.1, 0.3) for mode in ("none", "full")]
