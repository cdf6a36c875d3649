"""scripts/export.py: what it writes is the model of the run, and a merged one needs no welore."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModelForCausalLM

from welore.checkpoint import save
from welore.lowrank import factored_ranks
from welore.records import Record
from welore.runner import MODEL

SCRIPT = Path(__file__).parent.parent / "scripts" / "export.py"
IDS = [5, 7, 11]

# Loads every folder that it is given with transformers alone, and says what it generates.
PLAIN = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM
texts, ids = [], torch.tensor([{IDS}])
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    texts += model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False).tolist()
assert "welore" not in sys.modules
print(json.dumps(texts))
"""


@pytest.fixture
def export(monkeypatch, capsys, tmp_path):
    """A function of arguments to exit status and output: the script as the command line runs it, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def export(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return export


def greedy(model):
    ids = torch.tensor([IDS])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0].tolist()


@pytest.fixture
def a_run(compressed, tokenizer, tmp_path):
    """A finished run as far as it matters here: a record beside the saved model."""
    folder = tmp_path / "outputs" / "tiny" / "sotu-0123456789"
    Record("0123456789", "done", {"save": True}).save(folder)
    save(compressed, tokenizer, folder / MODEL)
    return folder


@pytest.mark.slow
def test_merged_exports_generate_the_same_text_in_a_process_without_welore(
    family, export, compress, tokenizer, tmp_path
):
    wanted, merged = [], []
    for name in FAMILIES:
        model = family(name)
        assert compress(model).factored
        save(model, tokenizer, tmp_path / name / MODEL)
        wanted.append(greedy(model))
        assert export(tmp_path / name / MODEL, "--merge")[0] == 0
        merged.append(tmp_path / name / "merged")
        assert "quantization_config" not in json.loads((merged[-1] / "config.json").read_text())
    command = [sys.executable, "-c", PLAIN, *map(str, merged)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == wanted


def test_a_run_is_found_by_its_fingerprint_and_written_in_another_dtype_and_in_shards(
    export, a_run, compressed, tmp_path
):
    out = tmp_path / "out"
    status, said = export("0123456789", "--dtype", "bfloat16", "--max-shard-size", "50KB", "--out", out)
    assert status == 0 and str(out) in said and "bfloat16" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and factored_ranks(model) == factored_ranks(compressed)
    assert len(list(out.glob("*.safetensors"))) > 1 and (out / "tokenizer.json").exists()


def test_without_options_the_factored_model_goes_beside_the_saved_one(export, a_run):
    assert export(a_run)[0] == 0
    weights = [(a_run / folder / "model.safetensors").read_bytes() for folder in (MODEL, "factored")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["9876543210"], "the fingerprint of none of the 1 finished runs"),
        (["outputs"], "no run folder either"),
        (["0123456789", "--merge"], "is not empty"),
        (["0123456789", "--out", "file"], "cannot be written"),
        (["0123456789", "--max-shard-size", "two"], "such as 2GB"),
    ],
)
def test_what_cannot_be_exported_says_why_and_touches_nothing(export, a_run, tmp_path, arguments, reason):
    (tmp_path / "file").touch()
    (a_run / "merged").mkdir()
    (a_run / "merged" / "notes").touch()
    status, said = export(*arguments)
    assert status == 2 and reason in said and "Traceback" not in said
    assert sorted(path.name for path in (a_run / "merged").iterdir()) == ["notes"]


@pytest.mark.parametrize(
    ("status", "save", "reason"),
    [("done", False, "force=true save=true"), ("done", True, "force=true"), ("failed", True, "is not finished")],
)
def test_a_run_without_a_model_says_how_to_get_one(export, tmp_path, status, save, reason):
    Record("0123456789", status, {"save": save}).save(tmp_path / "run")
    code, said = export(tmp_path / "run")
    assert code == 2 and reason in said
