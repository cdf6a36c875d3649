from copy import deepcopy

import pytest
import torch

from welore import rounds
from welore.compress import weight_digests
from welore.errors import Refused
from welore.ranks import Budget
from welore.rounds import bring_back_dense, keep_dense
from welore.runner import run

TEXT = ("task/protocol=smoke", "calibration.tokens=512", "calibration.window=32", "mode=none", "save=false")


@pytest.fixture
def ran(configured, text_file, tmp_path):
    def ran(*overrides):
        config = configured(*TEXT, f"task.path={text_file}", "svd=kfac", "ranks=lagrange", "keep=0.6", *overrides)
        config.outputs = str(tmp_path / "outputs")
        return run(config, tmp_path / f"run{len(list(tmp_path.glob('run*')))}")

    return ran


def test_dense_weights_that_were_kept_come_back_to_the_bit(model, compress, tmp_path):
    before = weight_digests(model)
    plan = compress(deepcopy(model), Budget(err=0.3))
    keep_dense(model, plan, tmp_path / "dense.safetensors")
    compress(model, Budget(err=0.3))
    assert weight_digests(model) != before
    bring_back_dense(model, tmp_path / "dense.safetensors")
    assert weight_digests(model) == before
    assert not (tmp_path / "dense.safetensors").exists()


def test_a_second_round_measures_the_model_that_the_first_has_cut(ran, tmp_path, monkeypatch):
    gathered, real = [], rounds.gather
    monkeypatch.setattr(
        rounds, "gather", lambda model, *rest: gathered.append(set(weight_digests(model))) or real(model, *rest)
    )
    record = ran("calibration.rounds=2")
    dense, cut = gathered
    assert "model.layers.0.self_attn.q_proj.weight" in dense
    assert any(name.endswith(".A.weight") for name in cut) and record.status == "done"
    assert not list(tmp_path.rglob("dense.safetensors"))


def test_a_second_round_of_a_model_that_is_factored_already_is_refused(compressed, compress, tmp_path):
    plan = compress(compressed, Budget(err=0.5))
    with pytest.raises(Refused, match="calibration.rounds=1"):
        keep_dense(compressed, plan, tmp_path / "dense.safetensors")


def test_what_is_recorded_of_a_compression_with_gradients(ran):
    found = ran("prune=wanda").metrics
    assert found["compress/predicted_nats"] > 0 and found["compress/calibrate_seconds"] > 0
    assert found["compress/seconds"] >= found["compress/calibrate_seconds"]
    assert found["compress/n_lrc_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["compress/keep"] <= 0.6
    assert isinstance(found["compress/nats"], float)


def test_refinement_is_recorded(ran):
    found = ran("refine=block", "refine.epochs=2").metrics
    assert 0 < found["compress/refined_to_nats"] <= found["compress/refined_from_nats"]
    assert torch.isfinite(torch.tensor(found["compressed/perplexity"]))
