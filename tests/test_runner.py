"""One run as a whole: what its caches tell apart, and what a forced run leaves of the one before."""

import gc
import re

import pytest
import torch
from transformers import PreTrainedModel

from welore import runner, tune
from welore.config import to_config
from welore.errors import Refused
from welore.evaluate import perplexity
from welore.finished import composed
from welore.measure import GIB
from welore.ranks import Plan
from welore.records import Record
from welore.runner import run

SMALL = ["model=tiny", "err=0.5", "trainer=cpu", "logger=none", "trainer.progress=false"]
SMOKE = ["task/protocol=smoke", "task/training=smoke"]


def config_of(outputs, *overrides):
    return to_config(composed([*SMALL, *SMOKE, f"outputs={outputs}", *overrides]))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_text_in_other_windows_has_a_dense_perplexity_of_its_own(tmp_path):
    found = []
    for index, window in enumerate((64, 128)):
        config = config_of(
            tmp_path, "mode=none", f"task.protocol.window={window}", f"task.protocol.windows={512 // window}"
        )
        found.append(run(config, tmp_path / str(index)).metrics)
    assert found[0]["eval/tokens"] == 8 * 63
    assert found[1]["eval/tokens"] == 4 * 127
    assert found[0]["dense/perplexity"] != found[1]["dense/perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_gradient_of_the_training_is_held_while_the_tuned_model_is_measured(tmp_path, monkeypatch, dtype):
    held, measure = [], runner.measure

    def look(model, *arguments):
        held.append(
            [name for name, p in model.named_parameters() if p.grad is not None or p._post_accumulate_grad_hooks]
        )
        return measure(model, *arguments)

    monkeypatch.setattr(runner, "measure", look)
    run(config_of(tmp_path, "mode=welore", f"model.dtype={dtype}"), tmp_path / "run")
    assert held == [[]]


@pytest.mark.parametrize("overrides", [["mode=full"], ["mode=lisa", "mode.layers=1", "mode.gap=1"]])
def test_gradients_and_optimizer_are_those_of_what_trained_last(tmp_path, monkeypatch, overrides):
    stepped, state_bytes = [], tune.state_bytes

    def look(optimizer):
        stepped.extend(parameter.numel() for parameter in optimizer.state)
        return state_bytes(optimizer)

    monkeypatch.setattr(tune, "state_bytes", look)
    found = run(config_of(tmp_path, *overrides), tmp_path / "run").metrics
    gradients = (found["fit/state_gib"] - found["fit/optimizer_gib"]) * GIB
    assert gradients == pytest.approx(4 * sum(stepped))
    assert (sum(stepped) < found["fit/trainable_parameters"]) == ("mode=lisa" in overrides)
    assert found["fit/flops_per_token"] > found["compress/flops_per_token"]
    assert found["fit/optimizer_gib"] * GIB == pytest.approx(2 * gradients, rel=0.01)  # and the counts of steps


def test_what_a_mode_cannot_do_costs_no_compression(tmp_path):
    with pytest.raises(Refused, match="mode.rank=33 is above the rank"):
        run(config_of(tmp_path, "mode=lora", "mode.rank=33"), tmp_path / "run")
    assert Record.read(tmp_path / "run").metrics == {} and not (tmp_path / "run" / "ranks.json").exists()


@pytest.mark.parametrize(("gap", "said"), [(1, False), (2, True), (200, True)])
def test_a_projection_that_no_step_renews_is_announced(tmp_path, capsys, gap, said):
    tune._say_if_fixed(config_of(tmp_path, "mode=galore", f"mode.gap={gap}").mode, 2)
    assert (f"mode.gap={gap}: what the first step draws stays for all 2 steps" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("overrides", "device", "said"),
    [
        (
            ["model.dtype=bfloat16"],
            "cuda",
            "3 of 4 ranks are no multiples of 8, .*Write ranks.multiple=8; for a model",
        ),
        (["model.dtype=bfloat16", "ranks=stable_rank"], "cuda", "3 of 4 ranks .* time. For a model"),
        (["model.dtype=float32", "model.autocast=null"], "cuda", None),
        (["model.dtype=bfloat16"], "cpu", None),
    ],
)
def test_ranks_that_a_gpu_multiplies_slowly_are_announced(tmp_path, capsys, overrides, device, said):
    plan = Plan({"a": 7, "b": 12, "c": 16, "d": 1, "e": None}, 0.5, 0.5, 0.5)
    runner._say_if_slow(plan, config_of(tmp_path, *overrides), torch.device(device))
    heard = capsys.readouterr().err
    assert (re.search(said, heard) is not None) if said else heard == ""


@pytest.mark.slow
def test_a_forced_run_that_fails_gives_back_the_finished_one_whole(tmp_path):
    run(config_of(tmp_path), tmp_path / "run")
    before = contents(tmp_path / "run")
    broken = config_of(tmp_path, "force=true")
    broken.mode.lr = 1e30
    with pytest.raises(FloatingPointError):
        run(broken, tmp_path / "run")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_a_forced_run_that_succeeds_leaves_nothing_of_the_one_before(tmp_path):
    first = run(config_of(tmp_path), tmp_path / "run")
    names = set(contents(tmp_path / "run"))
    second = run(config_of(tmp_path, "force=true"), tmp_path / "run")
    assert second.started >= first.started
    assert second.metrics["tuned/perplexity"] == first.metrics["tuned/perplexity"]
    assert set(contents(tmp_path / "run")) == names


@pytest.mark.slow
def test_a_run_that_fails_late_keeps_what_it_had_measured(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(runner.checkpoint, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(config_of(tmp_path), tmp_path / "run")
    record = runner.Record.read(tmp_path / "run")
    assert record.status == "failed"
    assert {"dense/perplexity", "compressed/perplexity", "tuned/perplexity", "fit/tokens"} <= record.metrics.keys()
    monkeypatch.undo()
    again = run(
        config_of(tmp_path), tmp_path / "run"
    )  # does not train again: the checkpoint of the last step is there
    assert again.status == "done"
    assert again.metrics["tuned/perplexity"] == record.metrics["tuned/perplexity"]


def models_alive():
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)]


@pytest.mark.slow
def test_a_finished_run_holds_no_model_in_memory(tmp_path):
    before = models_alive()  # those of the fixtures, held here so that their identities stay taken
    known = {id(model) for model in before}
    run(config_of(tmp_path), tmp_path / "run")
    assert not [model for model in models_alive() if id(model) not in known]


def test_the_saved_model_has_the_perplexity_of_the_record(tmp_path):
    from transformers import AutoModelForCausalLM

    from welore.batches import evaluation_windows
    from welore.cache import Cache
    from welore.models import byte_tokenizer

    config = config_of(tmp_path)
    record = run(config, tmp_path / "run")
    windows_BL = evaluation_windows(config.task, byte_tokenizer(), Cache(tmp_path / "cache"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert perplexity(reloaded, windows_BL).perplexity == record.metrics["tuned/perplexity"]


@pytest.mark.slow
def test_compressed_weights_that_two_runs_share_are_measured_once(configured, tmp_path, monkeypatch):
    from welore.evaluate import Windows

    stages = []
    measure = Windows.measure
    monkeypatch.setattr(Windows, "measure", lambda self, *args: stages.append(args[-1]) or measure(self, *args))
    records = []
    for mode in ("none", "welore", "nlrc"):
        options = ("task/training=smoke", "task/protocol=smoke", "trainer.progress=false", "save=false")
        config = configured("err=0.3", f"mode={mode}", f"outputs={tmp_path}", *options)
        records.append(run(config, tmp_path / mode).metrics)
    assert stages == ["dense", "compressed", "tuned", "tuned"]
    assert len({found["compressed/perplexity"] for found in records}) == 1
    assert records[1]["tuned/perplexity"] != records[2]["tuned/perplexity"]


def test_the_record_of_another_run_in_its_folder_is_refused(tmp_path):
    run(config_of(tmp_path, "mode=none"), tmp_path / "run")
    with pytest.raises(Refused, match="copied there, or edited"):
        run(config_of(tmp_path, "mode=none", "err=0.3"), tmp_path / "run")
