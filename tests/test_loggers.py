"""What an offline W&B run holds, read back from its file."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from welore import metrics
from welore.config import to_config
from welore.errors import Refused
from welore.finished import composed
from welore.history import History
from welore.loggers import RECORD
from welore.records import Record, read_history
from welore.runner import run

HEADER, BLOCK = 7, 32768


def wandb_records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB, chunks with a 7-byte header) of protobufs."""
    data, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def whole_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """All of them: another process writes the file, and comes to its end a moment after the run."""
    for _ in range(300):
        found = list(wandb_records(path))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def summary(logged):
    return values(item for entry in logged for item in entry.summary.update)


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    overrides = ["model=tiny", "err=0.5", "task/protocol=smoke", "task/training=smoke", "group=table1"]
    config = to_config(composed([*overrides, "logger=offline", "trainer.progress=false", f"outputs={folder}"]))
    record = run(config, folder / "run")
    (file,) = (folder / "run").rglob("*.wandb")
    return record, whole_records(file)


def test_the_offline_run_holds_every_curve_and_the_result(offline_run):
    record, logged = offline_run
    history: dict[str, list] = {}
    for entry in logged:
        for item in entry.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    curves = (
        metrics.TRAIN_LOSS,
        metrics.TRAIN_LR,
        metrics.TRAIN_TOKENS,
        metrics.TRAIN_TOKENS_PER_SECOND,
        metrics.TRAIN_PEAK_GIB,
        metrics.VALIDATION_PERPLEXITY,
    )
    for metric in curves:
        assert metric.key in history, f"{metric.key} is not among {sorted(history)}"
    assert len(history[metrics.TRAIN_LOSS.key]) == record.metrics[metrics.FIT_STEPS.key]
    results = (
        metrics.DENSE_PERPLEXITY,
        metrics.COMPRESSED_PERPLEXITY,
        metrics.TUNED_PERPLEXITY,
        metrics.ERR,
        metrics.KEEP,
    )
    for metric in (*results, metrics.FIT_TOKENS_PER_SECOND, metrics.FIT_PEAK_GIB):
        assert history[metric.key] == [pytest.approx(record.metrics[metric.key])]


def test_the_offline_run_holds_group_tags_and_the_whole_config(offline_run):
    record, logged = offline_run
    (start,) = [entry.run for entry in logged if entry.HasField("run")][:1]
    assert start.run_id == record.fingerprint
    assert start.run_group == "table1"
    assert {"tiny", "plain", "welore", "err=0.5", "sotu"} <= set(start.tags)
    assert start.display_name == f"err=0.5/tiny/plain/welore/welore/sotu-{record.fingerprint}"
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["task"]["training"]["length"] == 64
    assert config["mode"]["norms"] is True


def test_the_offline_run_holds_what_a_record_is_made_of_again(offline_run):
    record, logged = offline_run
    about = summary(logged)[RECORD]
    assert (about["status"], about["error"], about["fingerprint"]) == ("done", None, record.fingerprint)
    assert (about["commit"], about["environment"]) == (record.commit, record.environment)
    saved = {file.path for entry in logged for file in entry.files.files}
    assert {"history.jsonl", "ranks.json", "spectra.safetensors"} <= saved


@pytest.mark.slow
def test_what_a_probe_adds_to_a_finished_run_goes_to_its_run_there_with_all_the_rest(tmp_path):
    probe = ["probe=trained", "probe.layers=[1]", "probe.length=16", "probe.windows=2", "probe.curvature_windows=1"]
    probe += ["probe.steps=6", "probe.eigenvalues=2", "probe.samples=1"]
    common = ["model=tiny", "mode=none", "task/protocol=smoke", "logger=offline", f"outputs={tmp_path}"]
    first = run(to_config(composed(common)), tmp_path / "run")
    for _ in range(2):  # the second time it has nothing to add
        run(to_config(composed([*common, *probe])), tmp_path / "run")
    before, after = map(whole_records, sorted((tmp_path / "run").rglob("*.wandb")))
    assert {entry.run.run_id for entry in before + after if entry.HasField("run")} == {first.fingerprint}
    assert "probe-trained.json" in {file.path for entry in after for file in entry.files.files}
    assert summary(after)[RECORD] == summary(before)[RECORD] | {"seconds": first.seconds}
    rows = [values(item for entry in logged for item in entry.history.item) for logged in (before, after)]
    results = {key: value for key, value in first.metrics.items() if isinstance(value, int | float)}
    assert all({key: row[key] for key in results} == results for row in rows)


def test_a_run_that_fails_is_a_failed_run_there_too_and_says_why(tmp_path):
    config = to_config(composed(["model=tiny", "logger=offline", f"outputs={tmp_path}"]))
    record = Record("0123456789", "failed", {"err": 0.3}, {"compressed/breaks_at": "model.layers.1"})
    record.started = "2026-01-01T00:00:00+00:00"
    error = FloatingPointError("the loss of step 3 is nan")
    with pytest.raises(FloatingPointError), config.logger.open(tmp_path, record, None, ["a"]) as (logger,):
        logger.log_metrics({"compress/err": 0.3})
        raise error
    (file,) = tmp_path.rglob("*.wandb")
    found = summary(whole_records(file))
    assert found[RECORD]["status"] == "failed"
    assert found[RECORD]["error"] == "FloatingPointError: the loss of step 3 is nan"
    assert found["compressed/breaks_at"] == "model.layers.1"


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["compress", "checkpoint.save"])
def test_a_run_that_dies_before_it_trains_or_when_it_is_saved_is_a_failed_run_there_too(tmp_path, monkeypatch, breaks):
    def end(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(f"welore.runner.{breaks}", end)
    overrides = ["model=tiny", "err=0.5", "mode=none", "task/protocol=smoke", "logger=offline", "save=true"]
    with pytest.raises(MemoryError):
        run(to_config(composed([*overrides, f"outputs={tmp_path}"])), tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("*.wandb")
    about = summary(whole_records(file))[RECORD]
    assert (about["status"], about["error"]) == ("failed", "MemoryError: no room")


def test_online_without_a_key_is_refused_at_once(tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = to_config(composed(["model=tiny", "mode=none", "logger=wandb", f"outputs={tmp_path}"]))
    with pytest.raises(Refused, match="wandb login"):
        run(config, tmp_path / "run")
    assert Record.read(tmp_path / "run").metrics == {}  # nothing was measured or compressed for it


def test_the_history_of_a_resumed_run_has_no_step_twice(tmp_path):
    history = History(tmp_path)
    history.start_at(0)
    for step in range(5):
        history.log_metrics({"train/loss": float(step)}, step)
    history.start_at(3)
    history.log_metrics({"train/loss": 30.0}, 3)
    assert [line["train/loss"] for line in read_history(tmp_path)] == [0.0, 1.0, 2.0, 30.0]
