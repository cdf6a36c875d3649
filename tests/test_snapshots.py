import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from welore import snapshots
from welore.compress import weight_digests
from welore.errors import Refused
from welore.lowrank import LowRankLinear, factored_ranks
from welore.models import components
from welore.runner import run

SMALL = [
    "task/training=pretrain_laptop",
    "task.training.steps=6",
    "task.training.batch=2",
    "task.training.length=32",
    "task.training.snapshot_every=4",
    "task.training.validate_every=6",
    "task.training.validation_windows=1",
    "task/protocol=smoke",
    "trainer.progress=false",
]


@pytest.fixture(scope="module")
def trained(configured, text_file, tmp_path_factory):
    """A function of overrides to the folder of a finished run of six steps, kept for the module."""
    outputs, done = tmp_path_factory.mktemp("outputs"), {}

    def trained(*overrides):
        if overrides not in done:
            done[overrides] = outputs / str(len(done))
            chosen = configured(*SMALL, f"task.path={text_file}", f"outputs={outputs}", *overrides)
            run(chosen, done[overrides])
        return done[overrides]

    return trained


def test_snapshots_are_taken_at_doubling_steps_then_regularly_and_at_both_ends(configured):
    def schedule(every, steps):
        return configured(
            "task/training=pretrain_laptop", f"task.training.snapshot_every={every}"
        ).task.training.snapshots(steps)

    assert schedule(10, 35) == [0, 1, 2, 4, 8, 10, 20, 30, 35]
    assert schedule(8, 16) == [0, 1, 2, 4, 8, 16]
    assert schedule(1, 3) == [0, 1, 2, 3]
    assert schedule(1000, 5) == [0, 1, 2, 4, 5]
    assert schedule("null", 5) == []
    assert configured("task/training=laptop").task.training.snapshots(5) == []


def test_the_first_snapshot_is_the_untrained_model_and_the_last_is_what_the_run_has_saved(trained, configured):
    folder = trained("mode=full", "err=0")
    assert snapshots.steps(folder) == [0, 1, 2, 4, 6]
    untrained, _ = configured().model.load(folder)
    assert weight_digests(snapshots.model_at(folder, 0)) == weight_digests(untrained)
    saved = load_file(folder / "model" / "model.safetensors")
    last = snapshots.load(folder, 6)
    assert last.keys() == saved.keys() and all(torch.equal(last[name], saved[name]) for name in saved)
    first = snapshots.load(folder, 1)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], last["model.layers.0.mlp.up_proj.weight"])


def test_the_tokenizer_lies_beside_the_snapshots(trained, tokenizer):
    folder = trained("mode=full", "err=0") / snapshots.SNAPSHOTS
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("lora_on", ["factors", "merged"])
def test_a_snapshot_of_adapters_is_the_model_into_which_they_are_merged(trained, lora_on):
    folder = trained("mode=lora", "err=0.3", f"mode.lora_on={lora_on}", "model.autocast=bfloat16")
    ids_BL = torch.arange(20)[None]
    last, saved = snapshots.load(folder, 6), load_file(folder / "model" / "model.safetensors")
    assert last.keys() == saved.keys() and all(torch.equal(last[name], saved[name]) for name in saved)
    model = snapshots.model_at(folder, 6)
    assert len(factored_ranks(model)) > 0
    assert any(isinstance(module, LowRankLinear) for module in components(model).values())
    assert not torch.equal(model(ids_BL).logits, snapshots.model_at(folder, 0)(ids_BL).logits)


def test_the_snapshots_of_a_model_in_bfloat16_are_in_bfloat16(trained):
    folder = trained("mode=full", "err=0", "model.dtype=bfloat16")
    model = snapshots.model_at(folder, 2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in snapshots.load(folder, 2).values()} == {torch.bfloat16}


def test_tied_weights_are_kept_once_and_come_back_tied(trained):
    folder = trained("mode=full", "err=0", "+model.config.tie_word_embeddings=true")
    assert "lm_head.weight" not in snapshots.load(folder, 4)
    model = snapshots.model_at(folder, 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loading_a_snapshot_draws_no_random_number(trained):
    folder = trained("mode=full", "err=0")
    state = torch.get_rng_state()
    snapshots.model_at(folder, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_without_snapshots_and_a_step_that_is_not_there_are_refused(trained, tmp_path):
    with pytest.raises(Refused, match="holds no snapshots. Give the folder of a run"):
        snapshots.steps(tmp_path)
    with pytest.raises(Refused, match=r"no snapshot of step 3. It holds those of \[0, 1, 2, 4, 6\]"):
        snapshots.load(trained("mode=full", "err=0"), 3)


@pytest.fixture
def copied(trained, tmp_path):
    """A folder with the description of one model and the weights of it at step 1, to be damaged."""
    source, target = trained("mode=full", "err=0") / snapshots.SNAPSHOTS, tmp_path / snapshots.SNAPSHOTS
    target.mkdir()
    for name in ("config.json", "step_000001.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_a_snapshot_of_another_model_is_refused_by_what_differs(copied, tmp_path):
    file = copied / "step_000001.safetensors"
    state = load_file(file)
    norm = state.pop("model.norm.weight")
    save_file(state, file)
    with pytest.raises(Refused, match="another model than the config.json.*1 names differ, such as model.norm.weight"):
        snapshots.model_at(tmp_path, 1)
    save_file(state | {"model.norm.weight": norm[:10].clone()}, file)
    with pytest.raises(Refused, match=r"model.norm.weight is \(10,\), and there it is \(64,\)"):
        snapshots.model_at(tmp_path, 1)


def test_a_snapshot_that_was_cut_short_or_has_lost_its_config_is_refused(copied, tmp_path):
    file = copied / "step_000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(Refused, match="damaged or not whole"):
        snapshots.model_at(tmp_path, 1)
    file.write_bytes(whole)
    (copied / "config.json").unlink()
    with pytest.raises(Refused, match="no readable config.json"):
        snapshots.model_at(tmp_path, 1)
