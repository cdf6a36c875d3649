"""A sweep finds its finished cells without composing each, and means the same cells as Hydra does."""

import pytest
from omegaconf import OmegaConf

from welore.config import compose
from welore.finished import composed, finished
from welore.records import Record
from welore.runner import run

CELLS = [
    [],
    ["model=tiny", "err=0.5", "seed=3", "mode=lora", "mode.lora_on=merged"],
    ["keep=0.8", "svd=kfac", "ranks=lagrange", "ranks.depth_bias=1"],
    ["task=c4", "task/protocol=field", "task/training=matched", "task.training.steps=12"],
    ["calibration=wikitext2", "task.path='a folder, with a comma'"],
    ["+task.training.extra=1"],
    ["mode.betas=[0.9,0.99]", "group=null", "force=true"],
]


@pytest.mark.parametrize("overrides", CELLS)
def test_what_is_composed_in_a_copy_is_what_hydra_composes(overrides):
    try:
        expected = compose(overrides)
    except Exception as error:
        with pytest.raises(type(error)):
            composed(overrides)
        return
    assert OmegaConf.to_container(composed(overrides)) == OmegaConf.to_container(expected)


def test_a_value_set_for_one_cell_is_not_seen_by_the_next():
    composed(["seed=5", "mode=welore", "mode.lr=1"])
    assert OmegaConf.to_container(composed(["mode=welore"])) == OmegaConf.to_container(compose(["mode=welore"]))


@pytest.mark.parametrize("overrides", [["mode=nothing"], ["eror=0.3"], ["err=much"]])
def test_what_cannot_be_composed_raises_what_hydra_raises(overrides):
    with pytest.raises(Exception) as ours:
        composed(overrides)
    with pytest.raises(Exception) as theirs:
        compose(overrides)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


SUBDIR = "${model.name}/${mode.name}-${asked:}-${fingerprint:}"


def test_a_cell_is_finished_when_its_own_folder_holds_a_record_that_is_done(configured, tmp_path):
    options = [f"outputs={tmp_path}", "model=tiny", "trainer=cpu", "logger=none", "mode=none", "err=0.5"]
    small = [*options, "task/protocol=smoke", "trainer.progress=false"]
    assert finished(small, SUBDIR) is None
    folder = tmp_path / "tiny"
    run(configured(*small), folder / "elsewhere")
    assert finished(small, SUBDIR) is None
    record = Record.read(folder / "elsewhere")
    record.save(folder / f"none-err=0.5-{record.fingerprint}")
    assert finished(small, SUBDIR) == (folder / f"none-err=0.5-{record.fingerprint}", record)
    assert finished([*small, "force=true"], SUBDIR) is None
    assert finished([*small, "seed=1"], SUBDIR) is not None  # a run that trains nothing draws nothing
    assert finished([*small, "err=1.5"], SUBDIR) is None
    record.save(folder / "none-err=0.3-copied")
    assert finished([*small, "err=0.3"], "${model.name}/none-err=0.3-copied") is None  # the run itself will refuse it
    record.status = "failed"
    record.save(folder / f"none-err=0.5-{record.fingerprint}")
    assert finished(small, SUBDIR) is None
