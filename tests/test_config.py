import itertools
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml

from welore.budget import Budget
from welore.config import CONF, SCHEMAS, Config, compose, spell_out, to_config
from welore.errors import Refused
from welore.moments import Needs

OPTIONS = sorted(CONF.glob("*/*.yaml")) + sorted(CONF.glob("*/*/*.yaml"))
PARTS = {"amounts", "texts", "asking"}  # groups that options of other groups are made of
QUESTIONS = [
    file.stem for file in CONF.glob("task/*.yaml") if "/asking/" in file.read_text() or file.stem == "lm_eval"
]
NEEDED = {
    "model/path": ["model.path=x.gguf"],
    "ranks/given": ["ranks.path={ranks}"],
    "task/training/downstream": ["task=coinflip"],
    "task/training/downstream_code": ["task=coinflip"],
    "probe/emergence": ["mode=none"],
    "probe/trained": ["mode=none"],
    "task/triviaqa": ["mode=none"],
    "task/freebaseqa": ["mode=none"],
    "task/lm_eval": ["mode=none"],
    "task/mt_bench": ["mode=none"],
    "task/cnn_dailymail": ["mode=none"],
    "judge/local": ["judge.path=x/y"],
}
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
        # A task of questions is calibrated on the texts of another.
        assert chosen.name == ("sotu" if option in QUESTIONS and group == "calibration" else option)
        assert type(chosen) in SCHEMAS.values()


def test_every_amount_of_calibration_text_goes_with_every_calibration():
    amounts, texts = ([file.stem for file in CONF.glob(f"{group}/*.yaml")] for group in ("amounts", "calibration"))
    for amount, text in itertools.product(amounts, texts):
        calibration = to_config(compose([f"calibration={text}", f"amounts@calibration={amount}"])).calibration
        values = yaml.safe_load((CONF / "amounts" / f"{amount}.yaml").read_text())
        values.pop("defaults", None)
        assert (
            calibration.name == ("sotu" if text in QUESTIONS else text)
            and asdict(calibration).items() >= values.items()
        )


@pytest.mark.parametrize("file", [*OPTIONS, CONF / "config.yaml"], ids=option_name)
def test_an_option_is_short_and_is_named_after_its_file(file):
    text = file.read_text()
    group = group_of(file)
    longest = {"task/training": 22, "judge": 17, "": 35}.get(group, 15)
    assert len(text.splitlines()) <= longest
    if not group.startswith("hydra") and group:  # tasks and calibrations are named by their texts
        assert yaml.safe_load(text).get("name", file.stem) == file.stem


def test_every_group_of_the_config_has_options_and_every_schema_is_used():
    used = "".join(file.read_text() for file in OPTIONS)
    assert [schema for schema in SCHEMAS if f"/schema/{schema}@_here_" not in used] == []
    groups = {f.name for f in fields(Config) if is_dataclass(f.type)}
    assert groups == {file.relative_to(CONF).parts[0] for file in OPTIONS} - {"hydra", *PARTS}


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
