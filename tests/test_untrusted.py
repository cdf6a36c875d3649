"""Files of strangers are data: what they hold is never run, and what they name lies in their own folder."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from welore import checkpoint
from welore.batches import _ids
from welore.cache import Cache
from welore.calibrate import INDEX, Statistics
from welore.config import compose, fingerprint, to_config
from welore.errors import Refused
from welore.fit import _steps_done
from welore.lowrank import factored_ranks
from welore.models import count_parameters
from welore.moments import Needs
from welore.runner import MODEL, run


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that must never appear."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def load(folder: Path):
    return to_config(compose([f"model={folder}"])).model.load(folder / "cache")


def saved_model(pristine, folder):
    model, tokenizer = pristine
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_payload_of_these_tests_does_run_where_nothing_stops_it(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(pristine, tmp_path, mark):
    folder = saved_model(pristine, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "stranger", "auto_map": auto}))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(Refused, match="write model.trust_remote_code=true"):
        load(folder)
    judge = to_config(compose(["mode=none", "task=mt_bench", "judge=local", f"judge.path={folder}"])).judge
    with pytest.raises(Refused, match=r"^judge.path=.*which is not run for a judge. Take another one.$"):
        judge.source.load(tmp_path / "cache")


CODE = {
    "settings.py": """
from transformers import LlamaConfig

class StrangerConfig(LlamaConfig):
    model_type = "stranger"
""",
    "modeling.py": """
from transformers import LlamaForCausalLM
from .settings import StrangerConfig

class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig
""",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers puts the code that it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.mark.slow
def test_a_model_with_code_that_is_trusted_by_name_is_compressed_saved_and_loaded(
    pristine, configured, modules, tmp_path
):
    folder = saved_model(pristine, tmp_path / "model")
    for file, code in CODE.items():
        (folder / file).write_text(code)
    auto = {"AutoConfig": "settings.StrangerConfig", "AutoModelForCausalLM": "modeling.StrangerForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "stranger", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["StrangerForCausalLM"]}))
    small = ["model.dtype=float32", "task/protocol=smoke", "task/training=smoke", "trainer.progress=false"]
    overrides = [f"model={folder}", "err=0.3", "mode=welore", f"outputs={tmp_path}", *small]
    with pytest.raises(Refused, match="write model.trust_remote_code=true"):
        run(configured(*overrides), tmp_path / "refused")
    trusting = configured(*overrides, "model.trust_remote_code=true")
    assert fingerprint(trusting) != fingerprint(configured(*overrides))
    found = run(trusting, tmp_path / "run").metrics
    model, tokenizer = checkpoint.load(tmp_path / "run" / MODEL, torch.float32, trust_remote_code=True)
    assert type(model).__name__ == "StrangerForCausalLM" and factored_ranks(model)
    assert count_parameters(model) == found["tuned/parameters"]
    measured = trusting.task.benchmark(tokenizer, Cache(tmp_path / ".cache")).measure(model, None, "saved").stage
    assert measured["perplexity"] == found["tuned/perplexity"]
    (tmp_path / "described").mkdir()
    checkpoint.describe(model, tmp_path / "described")  # as snapshots do
    blank = checkpoint.blank(tmp_path / "described", trust_remote_code=True)
    assert type(blank).__name__ == "StrangerForCausalLM" and factored_ranks(blank) == factored_ranks(model)
    (folder / "settings.py").write_text(CODE["settings.py"] + "\nCHANGED = True\n")
    again = configured(*overrides, "model.trust_remote_code=true").model.load(tmp_path)[0]
    assert again.config.code != model.config.code


def test_pickled_weights_are_read_as_weights_alone(pristine, tmp_path, mark):
    folder = saved_model(pristine, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights|cannot be loaded|load"):
        load(folder)


def test_a_checkpoint_and_a_cached_file_are_read_as_tensors_alone(tokenizer, tmp_path, mark, capsys):
    torch.save({"global_step": Payload(mark)}, tmp_path / "last.ckpt")
    assert _steps_done(tmp_path / "last.ckpt") == 0
    assert "is damaged" in capsys.readouterr().err
    cache = Cache(tmp_path)
    expected = _ids(["some text"], tokenizer, cache, special=False)
    (file,) = (tmp_path / "tokens").iterdir()
    torch.save({"ids": Payload(mark), "lengths": Payload(mark)}, file)
    assert _ids(["some text"], tokenizer, cache, special=False) == expected


def test_statistics_are_read_from_their_own_folder_alone(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"w": {"file": "../secret.safetensors", "tensors": {}, "tokens": 1}}))
    with pytest.raises(FileNotFoundError, match="statistics/secret"):
        Statistics(folder, Needs.INPUTS, "", 0.0, 0.0).of("w")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", ".", ".."])
def test_a_model_name_cannot_put_a_run_elsewhere(name):
    with pytest.raises(Refused, match="model.name"):
        to_config(compose(["model=tiny", f"model.name={name}"]))


def test_ranks_of_weights_that_a_model_does_not_have_are_refused(configured, model, cache, tmp_path):
    from welore.compress import Coordinates, plan_ranks, read_spectra, resolve, weight_digests
    from welore.svd import Plain

    (tmp_path / "ranks.json").write_text(json.dumps({"../../elsewhere": 3}))
    config = configured("ranks=given", f"ranks.path={tmp_path / 'ranks.json'}")
    coordinates = Coordinates(Plain("plain", "none"), weight_digests(model), cache)
    spectra = read_spectra(model, coordinates)
    with pytest.raises(Refused, match="for another model"):
        plan_ranks(config.ranks, resolve(config.budget, model), model, spectra, None)
