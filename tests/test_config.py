import itertools
import shutil
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml

from welore.budget import Budget
from welore.config import CONF, INFRASTRUCTURE, SCHEMAS, Config, compose, fingerprint, science, spell_out, to_config
from welore.errors import Refused
from welore.moments import Needs

OPTIONS = sorted(CONF.glob("*/*.yaml")) + sorted(CONF.glob("*/*/*.yaml"))
PARTS = {"amounts": "amounts@calibration", "texts": None}  # groups that options of other groups are made of
NEEDED = {"model/path": ["model.path=x.gguf"], "ranks/given": ["ranks.path={ranks}"]}
TINY = ("model=tiny", "trainer=cpu", "logger=none")


def option_name(file):
    return str(file.relative_to(CONF).with_suffix(""))


def group_of(file):
    return option_name(file).rpartition("/")[0]


@pytest.mark.parametrize("file", [file for file in OPTIONS if group_of(file) not in PARTS], ids=option_name)
def test_every_option_composes_to_a_typed_config(file, tmp_path):
    (tmp_path / "ranks.json").write_text("{}")
    group, _, option = option_name(file).rpartition("/")
    if group.startswith("hydra/"):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    needed = [value.format(ranks=tmp_path / "ranks.json") for value in NEEDED.get(option_name(file), [])]
    config = to_config(compose([f"{group}={option}", *needed]))
    if not group.startswith("hydra/"):
        chosen = config
        for part in group.split("/"):
            chosen = getattr(chosen, part)
        assert chosen.name == option and type(chosen) in SCHEMAS.values()


def test_every_amount_of_calibration_text_goes_with_every_calibration():
    amounts, texts = ([file.stem for file in CONF.glob(f"{group}/*.yaml")] for group in ("amounts", "calibration"))
    for amount, text in itertools.product(amounts, texts):
        calibration = to_config(compose([f"calibration={text}", f"amounts@calibration={amount}"])).calibration
        values = yaml.safe_load((CONF / "amounts" / f"{amount}.yaml").read_text())
        values.pop("defaults", None)
        assert calibration.name == text and asdict(calibration).items() >= values.items()


@pytest.mark.parametrize("file", [*OPTIONS, CONF / "config.yaml"], ids=option_name)
def test_an_option_is_short_and_is_named_after_its_file(file):
    text = file.read_text()
    group = group_of(file)
    longest = {"task/training": 16, "": 35}.get(group, 15)
    assert len(text.splitlines()) <= longest
    if not group.startswith("hydra") and group:  # tasks and calibrations are named by their texts
        assert yaml.safe_load(text).get("name", file.stem) == file.stem


def test_every_group_of_the_config_has_options_and_every_schema_is_used():
    used = "".join(file.read_text() for file in OPTIONS)
    assert [schema for schema in SCHEMAS if f"/schema/{schema}@_here_" not in used] == []
    groups = {f.name for f in fields(Config) if is_dataclass(f.type)}
    assert groups == {file.relative_to(CONF).parts[0] for file in OPTIONS} - {"hydra", *PARTS}


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
    unused = {*INFRASTRUCTURE} if config.needs else {*INFRASTRUCTURE, "calibration"}
    name = fingerprint(config)
    assert name == fingerprint(deepcopy(config))
    for path in leaves(config):
        if path[-1] != "path" or path[0] == "model":  # a file, whose content counts: below
            ignored = path[0] in unused and path != ("calibration", "predict")
            assert (fingerprint(changed(config, path)) == name) == ignored, path


def test_what_is_infrastructure_is_a_closed_list():
    assert set(INFRASTRUCTURE) == {"trainer", "logger", "group", "force", "save", "outputs"}
    counted = science(to_config(compose([*TINY, "svd=whitened"]))).keys() - {"identity"}
    assert {f.name for f in fields(Config)} - set(INFRASTRUCTURE) == counted


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


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        ([], {"err": 0.3}),
        (["err=0.5"], {"err": 0.5}),
        (["keep=0.8"], {"keep": 0.8}),
        (["err=null", "keep=0.8"], {"keep": 0.8}),
        (["bytes=0.7"], {"bytes": 0.7}),
        (["flops=0.7"], {"flops": 0.7}),
    ],
)
def test_the_budget_is_the_one_that_is_given_and_err_by_default(overrides, given):
    assert to_config(compose([*TINY, *overrides])).budget == Budget(**given)


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["svd=plain"], Needs.NOTHING),
        (["svd=plain", "svd.sequential=update"], Needs.INPUTS),
        (["svd=plain", "prune=wanda"], Needs.INPUTS),
        (["svd=plain", "ranks=owl"], Needs.INPUTS),
        (["svd=whitened", "calibration.predict=true"], Needs.GRADIENTS),
        (["svd=whitened", "ranks=lagrange", "ranks.value=fisher"], Needs.GRADIENTS),
        (["svd=kfac", "prune=sparsegpt"], Needs.GRADIENTS),
        (["svd=kfac", "ranks=lagrange", "ranks.value=first_order"], Needs.WEIGHT_GRADIENTS),
        (["svd=fwsvd"], Needs.WEIGHT_GRADIENTS),
    ],
)
def test_a_run_gathers_what_the_most_demanding_of_its_options_needs(overrides, needs):
    assert to_config(compose([*TINY, *overrides])).needs == needs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["err=0.3", "keep=0.8"], "give exactly one"),
        (["err=null"], "give exactly one"),
        (["bytes=0.5", "flops=0.5"], "give exactly one"),
        (["bytes=50"], "write bytes=0.8"),
        (["flops=0"], r"not a fraction in \(0, 1\]"),
        (["err=30"], "write err=0.3"),
        (["err=1"], r"not a fraction in \[0, 1\)"),
        (["err=-0.1"], r"not a fraction in \[0, 1\)"),
        (["keep=0"], r"not a fraction in \(0, 1\]"),
        (["keep=1.2"], r"not a fraction in \(0, 1\]"),
    ],
)
def test_a_budget_that_is_no_budget_is_refused(overrides, message):
    with pytest.raises(Refused, match=message):
        to_config(compose([*TINY, *overrides]))


@pytest.mark.parametrize(
    ("value", "path", "name"),
    [
        ("/models/my-llama", "/models/my-llama", "my-llama"),
        ("models/q4.gguf", "models/q4.gguf", "q4"),
        ("q4.gguf", "q4.gguf", "q4"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/models/my llama/", "/models/my llama/", "my-llama"),
    ],
)
def test_a_path_as_model_is_spelled_out(value, path, name):
    assert spell_out([f"model={value}", "err=0.5"]) == [
        "model=path",
        f"model.path={path}",
        f"model.name={name}",
        "err=0.5",
    ]
    if " " not in value:
        model = to_config(compose([f"model={value}"])).model
        assert (model.path, model.name) == (path, name)


def test_other_overrides_are_left_as_they_are():
    overrides = ["model=tiny", "task.path=/a/b", "err=0.1,0.2", "hydra/launcher=slurm"]
    assert spell_out(overrides) == overrides
    with pytest.raises(Refused, match="model=path model.path=A,B"):
        spell_out(["model=/a,/b"])
