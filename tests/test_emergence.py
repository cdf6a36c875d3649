"""A probe over the snapshots of a run: whole, cut short, and on the wrong files."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from welore import checkpoint, emergence
from welore.cache import Cache
from welore.config import fingerprint
from welore.emergence import Subject, examine, probe_file
from welore.errors import Refused
from welore.records import Record
from welore.runner import run

SMALL = ["probe=emergence", "probe.length=16", "probe.windows=2", "probe.curvature_windows=1", "probe.layers=[1]"]
LESS = ["probe.steps=6", "probe.eigenvalues=2", "probe.samples=1", "probe.curvature_at=2", "probe.snapshots=3"]
NAME = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def config(configured, text_file, tmp_path):
    """A pretraining run whose probe looks at little."""
    found = configured("mode=full", "err=0", "task/training=pretrain_laptop", f"task.path={text_file}", *SMALL, *LESS)
    return replace(found, outputs=str(tmp_path / "outputs"))


@pytest.fixture
def folder(pristine, tmp_path):
    """A run folder with snapshots of steps 0, 5, 6 and 10, each a little further from the first."""
    model, tokenizer = deepcopy(pristine[0]), pristine[1]
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    tokenizer.save_pretrained(run / "snapshots")
    for step in (0, 5, 6, 10):
        save_file(dict(model.named_parameters()), run / "snapshots" / f"step_{step:06d}.safetensors")
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    checkpoint.describe(model, run / "snapshots")
    return run


def found_in(folder):
    return json.loads((folder / probe_file("emergence")).read_text())


def test_a_probe_says_before_it_starts_what_it_will_cost(config, folder, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(emergence, "look", stop)
    with pytest.raises(KeyboardInterrupt):
        examine(config, folder)
    said = capsys.readouterr().err
    assert "7 weights at 3 checkpoints, at 3 times with curvature: about" in said and "GiB beyond model" in said


def test_a_probe_compares_the_checkpoints_of_a_run(config, folder):
    examine(config, folder)
    found = found_in(folder)
    assert found["steps"] == [0, 6, 10]  # evenly, the first and the last among them
    assert found["checkpoints"].keys() == {"0", "6", "10"}
    table = torch.tensor(found["pairs"][NAME]["left_4"])
    torch.testing.assert_close(table, table.T)
    assert (table.diagonal() == 1).all() and (table <= 1.0001).all()
    curved = [step for step, shown in found["checkpoints"].items() if "curvature" in shown]
    assert curved == ["6", "10"] and found["eigenspaces"][NAME].keys() == {"10"}
    assert found["checkpoints"]["10"]["curvature"][NAME].keys() == {"hessian", "gauss_newton"}
    assert found["checkpoints"]["10"]["truncated"].keys() == found["pairs"].keys()
    assert not (folder / "probe-emergence").exists()


def test_a_probe_that_is_cut_short_goes_on_to_the_same_numbers(config, folder, monkeypatch):
    looked = []

    def until(last):
        def look(model, *rest):
            if len(looked) == last:
                raise KeyboardInterrupt
            looked.append(model)
            return original(model, *rest)

        return look

    original = emergence.look
    monkeypatch.setattr(emergence, "look", until(2))
    with pytest.raises(KeyboardInterrupt):
        examine(config, folder)
    assert not (folder / probe_file("emergence")).exists()
    monkeypatch.setattr(emergence, "look", until(3))
    examine(config, folder)
    resumed = found_in(folder)
    assert len(looked) == 3
    (folder / probe_file("emergence")).unlink()
    monkeypatch.setattr(emergence, "look", original)
    examine(config, folder)
    for key in ("pairs", "eigenspaces", "key"):
        assert found_in(folder)[key] == resumed[key]
    assert found_in(folder)["checkpoints"]["6"]["weights"] == resumed["checkpoints"]["6"]["weights"]


def test_a_finished_probe_is_not_done_again_unless_it_asks_for_something_else(config, folder, monkeypatch):
    examine(config, folder)
    monkeypatch.setattr(emergence, "look", lambda *_: pytest.fail("looked again"))
    examine(config, folder)
    with pytest.raises(pytest.fail.Exception):
        examine(replace(config, probe=replace(config.probe, ranks=[4])), folder)


def test_a_snapshot_of_another_model_is_refused_by_its_name(config, folder):
    file = folder / "snapshots" / "step_000006.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(Refused, match="step_000006.safetensors is of another model"):
        examine(config, folder)


def test_a_run_that_trains_and_leaves_no_snapshots_is_refused(config, tmp_path):
    with pytest.raises(Refused, match="holds no snapshots"):
        examine(config, tmp_path)


def test_a_model_that_is_not_trained_is_its_own_only_checkpoint(configured, text_file, tmp_path):
    config = configured("mode=none", f"task.path={text_file}", *SMALL, *LESS)
    examine(replace(config, outputs=str(tmp_path)), tmp_path)
    found = found_in(tmp_path)
    assert found["steps"] == [0]
    assert found["checkpoints"]["0"].keys() >= {"curvature", "truncated", "weights"}


def test_a_probe_is_added_to_a_finished_run_and_changes_nothing_of_it(configured, text_file, tmp_path):
    overrides = ["mode=none", "task/protocol=smoke", f"task.path={text_file}", "save=false"]
    config = replace(configured(*overrides), outputs=str(tmp_path))
    first = run(config, tmp_path / "run")
    watched = replace(configured(*overrides, *SMALL, *LESS), outputs=str(tmp_path))
    assert fingerprint(watched) == fingerprint(config)
    assert run(watched, tmp_path / "run") == first == Record.read(tmp_path / "run")
    assert found_in(tmp_path / "run")["steps"] == [0]


def test_two_batches_share_no_sequence_and_must_be_there(config, folder):
    fixed, other = Subject(config, folder, Cache(folder / ".cache")).batches
    assert fixed["ids_BL"].shape == other["ids_BL"].shape == (2, 16)
    assert not (fixed["ids_BL"][:, None] == other["ids_BL"][None]).all(-1).any()
    greedy = replace(config, probe=replace(config.probe, windows=10_000))
    with pytest.raises(Refused, match="two batches of probe.windows=10000 need 20000"):
        _ = Subject(greedy, folder, Cache(folder / ".cache")).batches
