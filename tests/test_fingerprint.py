"""What names a run: all that its result depends on, and nothing else."""

import shutil
from copy import deepcopy
from dataclasses import fields, is_dataclass

import pytest

from welore.config import CONF, INFRASTRUCTURE, Config, compose, fingerprint, science, to_config

TINY = ("model=tiny", "trainer=cpu", "logger=none")


def leaves(node, path=()):
    """The path of every value of a config that is no config itself."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from leaves(value, (*path, f.name))
        else:
            yield (*path, f.name)


def changed(config, path):
    config = deepcopy(config)
    node = config
    for part in path[:-1]:
        node = getattr(node, part)
    value = getattr(node, path[-1])
    new = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value * 1.5 + 1e-9,
        str: lambda: value + "x",
    }
    setattr(node, path[-1], new[type(value)]() if type(value) in new else "another")
    return config


@pytest.mark.parametrize("mode", ["welore", "galore", "lora"])
@pytest.mark.parametrize("task", ["sotu", "c4"])
@pytest.mark.parametrize(("model", "svd"), [("tiny", "plain"), ("tiny", "asvd"), ("llama2_7b", "kfac")])
def test_the_fingerprint_depends_on_all_that_is_science_and_on_nothing_else(model, svd, task, mode):
    overrides = [f"model={model}", f"svd={svd}", f"task={task}", f"mode={mode}", "err=0.4"]
    config = to_config(compose(overrides))
    unused = {*INFRASTRUCTURE, "judge"} | (set() if config.needs else {"calibration"})
    name = fingerprint(config)
    assert name == fingerprint(deepcopy(config))
    for path in leaves(config):
        if path[-1] != "path" or path[0] == "model":  # a file, whose content counts: below
            ignored = path[0] in unused and path != ("calibration", "predict")
            assert (fingerprint(changed(config, path)) == name) == ignored, path


def test_what_is_infrastructure_is_a_closed_list():
    assert set(INFRASTRUCTURE) == {"trainer", "logger", "probe", "group", "force", "save", "outputs"}
    counted = science(to_config(compose([*TINY, "svd=whitened"]))).keys() - {"identity"}
    assert {f.name for f in fields(Config)} - {*INFRASTRUCTURE, "judge"} == counted  # the judge: test_judges.py


def test_the_order_of_overrides_and_the_way_to_a_value_do_not_matter():
    overrides = ["model=tiny", "err=0.5", "mode=nlrc", "task/training=smoke"]
    orders = [overrides[start:] + overrides[:start] for start in range(4)]
    names = {fingerprint(to_config(compose(order))) for order in orders}
    smoke = ["steps=5", "tokens=null", "length=64", "validate_every=5", "validation_windows=2", "name=smoke"]
    spelled = [f"task.training.{value}" for value in smoke]
    names.add(fingerprint(to_config(compose(["model=tiny", "mode=nlrc", "err=0.50", "seed=0", *spelled]))))
    assert len(names) == 1


def test_a_sweep_puts_each_cell_where_the_cell_alone_would_be(tmp_path):
    """The folder is made of the resolved config, in a run and in a multirun alike."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    overrides = [*TINY, "err=0.5", "mode=full"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", overrides, return_hydra_config=True)
    alone = composed.hydra.run.dir
    assert alone == f"{composed.hydra.sweep.dir}/{composed.hydra.sweep.subdir}"
    assert alone == f"outputs/tiny/plain-welore-err=0.5/full/sotu-{fingerprint(to_config(compose(overrides)))}"


def test_a_run_that_trains_nothing_is_the_same_under_every_training_and_seed():
    untrained, trained = (
        {
            fingerprint(to_config(compose([*TINY, f"mode={mode}", other])))
            for other in ("seed=1", "task/training=smoke")
        }
        for mode in ("none", "welore")
    )
    assert len(untrained) == 1
    assert len(trained) == 2
    assert fingerprint(to_config(compose([*TINY, "mode=none", "task/protocol=smoke"]))) not in untrained


def test_the_content_of_a_local_text_is_part_of_the_fingerprint_and_its_place_is_not(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one text")
    config = to_config(compose([*TINY, f"task.path={file}"]))
    before = fingerprint(config)
    assert fingerprint(config) == before
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(file, tmp_path / "elsewhere")
    assert fingerprint(to_config(compose([*TINY, f"task.path={copy}"]))) == before
    file.write_text("one test")
    assert fingerprint(config) != before


def test_calibration_text_counts_by_content_where_statistics_are_needed_and_is_that_of_the_task_unless_given(tmp_path):
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one text")
    other.write_text("other text")
    on_task = to_config(compose([*TINY, f"task.path={file}", "svd=whitened"]))
    assert on_task.calibration.path == str(file)
    apart = [*TINY, f"task.path={file}", f"calibration.path={other}"]
    before = [fingerprint(to_config(compose([*apart, f"svd={svd}"]))) for svd in ("plain", "whitened")]
    other.write_text("changed text")
    after = [fingerprint(to_config(compose([*apart, f"svd={svd}"]))) for svd in ("plain", "whitened")]
    assert before[0] == after[0] and before[1] != after[1]
    assert to_config(compose([*TINY, f"task.path={file}", "calibration=c4"])).calibration.path is None


def test_the_content_of_given_ranks_is_the_budget_and_part_of_the_fingerprint(tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text('{"w": 3}')
    config = to_config(compose([*TINY, "ranks=given", f"ranks.path={file}", "err=0.7"]))
    assert (config.err, config.keep, config.asked) == (None, None, "given")
    before = fingerprint(config)
    file.write_text('{"w": 4}')
    assert fingerprint(config) != before
