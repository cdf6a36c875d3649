"""What each mode trains, and where three steps of it lead.

Golden losses: `pytest tests/test_modes.py -k golden --write-golden` writes tests/golden/losses.json anew. Do that only
where new numbers are meant, and say in the commit which and why.
"""

import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from welore.config import CONF
from welore.errors import Refused
from welore.lowrank import LowRankLinear
from welore.models import components, count_parameters
from welore.modes import norm_parameters, select
from welore.ranks import Budget
from welore.records import read_history

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
CLOSE = 1e-4
PROJECTED = ("mode.rank=8", "mode.gap=2")
GALORE = ("mode=galore", *PROJECTED)
TRAINED = {
    "welore": ("mode=welore",),
    "nlrc": ("mode=nlrc",),
    "full": ("mode=full",),
    "galore": GALORE,
    "lora": ("mode=lora",),
    "lora_merged": ("mode=lora", "mode.lora_on=merged"),
}
# Golden losses of all the others, at options with which they differ from each other on a model of two layers.
OTHERS = {
    "apollo": ("mode=apollo", *PROJECTED),
    "chosen": ("mode=chosen", "mode.who=nlrc"),
    "dora": ("mode=dora",),
    "fira": ("mode=fira", "mode.rank=1", "mode.gap=2"),
    "lisa": ("mode=lisa", "mode.layers=1", "mode.gap=2"),
    "lora_plus": ("mode=lora_plus",),
    "lora_xs": ("mode=lora_xs",),
    "mica": ("mode=mica",),
    "muon": ("mode=muon",),
    "osf": ("mode=osf",),
    "pissa": ("mode=pissa",),
    "randlora": ("mode=randlora",),
    "random": ("mode=random",),
    "rslora": ("mode=rslora",),
    "sv": ("mode=sv",),
}
EIGHT_BIT = ("welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit")
NO_LOSSES = {"none": "trains nothing", **dict.fromkeys(EIGHT_BIT, "needs a GPU")}
every_trained = pytest.mark.parametrize("mode", TRAINED)
every_lora = pytest.mark.parametrize("lora_on", ["factors", "merged"])
IDS_BL = torch.arange(48).view(2, 24) * 11 % 259


@pytest.fixture
def trainables(compressed, configured):
    """A function of overrides to the names of the parameters that a mode selects on a copy of the compressed model."""

    def trainables(*overrides):
        model = deepcopy(compressed)
        selected = {id(p) for p in select(model, configured(*overrides).mode)}
        names = {name for name, p in model.named_parameters() if id(p) in selected}
        assert names == {name for name, p in model.named_parameters() if p.requires_grad}
        return names

    return trainables


def names_of(model, parameters):
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_lrc_and_n_lrc_split_full_in_two(trainables, compressed):
    lrc = trainables("mode=welore", "mode.norms=false")
    n_lrc = trainables("mode=nlrc", "mode.norms=false")
    assert lrc and n_lrc and lrc & n_lrc == set()
    assert lrc | n_lrc == trainables("mode=full", "mode.norms=false")
    assert all(name.endswith((".A.weight", ".B.weight")) for name in lrc)
    assert not any(name.endswith((".A.weight", ".B.weight")) for name in n_lrc)


def test_with_norms_what_lrc_and_n_lrc_share_is_the_norms(trainables, compressed):
    norms = names_of(compressed, norm_parameters(compressed))
    assert len(norms) == 5
    lrc, n_lrc = trainables("mode=welore"), trainables("mode=nlrc")
    assert lrc & n_lrc == norms
    assert lrc | n_lrc == trainables("mode=full") == trainables(*GALORE)


@every_trained
def test_embeddings_and_the_output_matrix_never_train(trainables, mode):
    assert trainables(*TRAINED[mode]).isdisjoint({"model.embed_tokens.weight", "lm_head.weight"})


def test_the_biases_of_a_component_train_with_it(family, compress, configured):
    model = family("opt")
    plan = compress(model)
    names = names_of(model, select(model, configured("mode=welore", "mode.norms=false").mode))
    assert names == {f"{name}.{part}" for name in plan.factored for part in ("A.weight", "A.bias", "B.weight")}


@every_trained
def test_after_one_step_only_what_was_selected_has_moved(compressed, train, mode):
    start = deepcopy(compressed)
    tuner = train(compressed, "task.training.steps=1", *TRAINED[mode])
    before = dict(start.named_parameters())
    # Of an adapter B starts at 0, so that A has no gradient in the first step; and what is frozen may be renamed.
    ends = ".lora_B.default.weight" if mode.startswith("lora") else ""
    moved = {
        name
        for name, p in compressed.named_parameters()
        if not torch.equal(p, before.get(name.replace(".base_layer", ""), torch.zeros_like(p)))
    }
    assert tuner.names and {n for n in moved if ".lora_A." not in n} == {n for n in tuner.names if n.endswith(ends)}


@pytest.mark.parametrize("mode", TRAINED | OTHERS)
def test_golden_losses(compressed, train, tmp_path, request, mode):
    train(compressed, "task.training.steps=3", "task.training.validate_every=3", *(TRAINED | OTHERS)[mode])
    losses = [line["train/loss"] for line in read_history(tmp_path) if "train/loss" in line]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(golden | {mode: losses}, indent=2, sort_keys=True) + "\n")
    else:
        assert len(losses) == 3 and losses == pytest.approx(golden[mode], rel=CLOSE)


def test_every_mode_goes_its_own_way_from_the_same_first_loss():
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == (TRAINED | OTHERS).keys()
    first = [losses[0] for losses in golden.values()]
    assert max(first) - min(first) < 1e-5  # some modes take weights apart and put them together again
    third = sorted(losses[2] for losses in golden.values())
    assert all(b > a * (1 + CLOSE) for a, b in pairwise(third))  # no mode could pass for another


def test_every_mode_has_golden_losses():
    named = {overrides[0].removeprefix("mode=") for overrides in (TRAINED | OTHERS).values()}
    assert {file.stem for file in (CONF / "mode").glob("*.yaml")} - named == NO_LOSSES.keys()


@every_lora
def test_lora_changes_nothing_before_it_is_trained(compressed, configured, lora_on):
    logits = compressed(IDS_BL).logits
    parameters = select(compressed, configured("mode=lora", f"mode.lora_on={lora_on}").mode)
    assert torch.equal(compressed(IDS_BL).logits, logits)
    assert count_parameters(compressed) > sum(p.numel() for p in parameters) > 0


@every_lora
@pytest.mark.parametrize("mode", ["lora", "rslora", "dora"])
def test_adapters_have_the_dtype_of_what_they_adapt(compressed, configured, mode, lora_on):
    """A float32 adapter of a bfloat16 weight would keep a float32 copy of every input that it reads."""
    found = select(compressed.bfloat16(), configured(f"mode={mode}", f"mode.lora_on={lora_on}").mode)
    assert {parameter.dtype for parameter in found} == {torch.bfloat16}


@every_lora
def test_lora_adapts_the_factors_or_their_product(compressed, configured, lora_on):
    n_lrc = [n for n, m in components(compressed).items() if isinstance(m, nn.Linear)]
    lrc = [n for n, m in components(compressed).items() if isinstance(m, LowRankLinear)]
    names = names_of(compressed, select(compressed, configured("mode=lora", f"mode.lora_on={lora_on}").mode))
    adapted = {name.partition(".lora_")[0] for name in names}
    on_lrc = [f"{n}.{factor}" for n in lrc for factor in "AB"] if lora_on == "factors" else lrc
    assert adapted == set(n_lrc + on_lrc)


@every_lora
def test_finishing_lora_leaves_the_outputs_equal_and_no_adapter(compressed, train, lora_on):
    ranks = {n: m.rank for n, m in components(compressed).items() if isinstance(m, LowRankLinear)}
    untrained = compressed(IDS_BL).logits
    tuner = train(compressed, "mode=lora", "mode.lr=0.01", f"mode.lora_on={lora_on}")
    trained = compressed(IDS_BL).logits
    assert (trained - untrained).abs().max() > 1e-2
    tuner.mode.finish(compressed)
    torch.testing.assert_close(compressed(IDS_BL).logits, trained, rtol=1e-4, atol=1e-5)
    found = components(compressed)
    assert {type(m) for m in found.values()} == {LowRankLinear, nn.Linear}
    assert not any("lora" in name or "base_layer" in name for name, _ in compressed.named_parameters())
    grown = 8 if lora_on == "merged" else 0
    assert {n: m.rank for n, m in found.items() if isinstance(m, LowRankLinear)} == {
        n: rank + grown for n, rank in ranks.items()
    }


@every_lora
def test_finishing_lora_keeps_the_biases_of_the_layers_it_adapted(family, compress, configured, lora_on):
    model = family("opt")
    compress(model)
    mode = configured("mode=lora", f"mode.lora_on={lora_on}").mode
    for parameter in select(model, mode):
        nn.init.normal_(parameter, std=0.1)
    trained = model(IDS_BL % 67).logits
    mode.finish(model)
    torch.testing.assert_close(model(IDS_BL % 67).logits, trained, rtol=1e-4, atol=1e-4)


def test_a_finished_lora_model_can_be_adapted_again(compressed, train):
    for _ in range(2):
        tuner = train(compressed, "mode=lora", "task.training.steps=1")
        tuner.mode.finish(compressed)
    assert {type(m) for m in components(compressed).values()} == {LowRankLinear, nn.Linear}


@pytest.mark.parametrize(("mode", "budget", "dense"), [("welore", 0.0, "half"), ("nlrc", 0.5, "never")])
def test_a_mode_that_selects_nothing_is_refused_with_what_there_is(model, compress, configured, mode, budget, dense):
    compress(model, Budget(err=budget), dense)
    kind = "14 Linear" if mode == "welore" else "14 LowRankLinear"
    with pytest.raises(Refused, match=f"mode={mode} selects no parameter.*{kind}"):
        select(model, configured(f"mode={mode}").mode)


@pytest.mark.parametrize("mode", ["welore", "full"])
def test_accumulating_two_passes_makes_the_same_update_as_one(compressed, train, mode):
    """Rows are padded to unequal lengths, so a mean of the means of two passes would be another number.

    A huge eps makes the update of Adam proportional to the gradient.
    """
    models = [compressed, deepcopy(compressed)]
    start = deepcopy(compressed)
    for model, accumulate in zip(models, [1, 2], strict=True):
        train(
            model,
            f"mode={mode}",
            "mode.lr=1e6",
            "mode.eps=1e4",
            "task.training.pack=false",
            "task.training.length=512",
            "task.training.batch=4",
            "task.training.steps=1",
            "task.training.clip=0",
            f"task.training.accumulate={accumulate}",
        )
    for one, two, first in zip(models[0].parameters(), models[1].parameters(), start.parameters(), strict=True):
        if one.requires_grad:
            assert (one - first).norm() > 1e-3
            torch.testing.assert_close(two - first, one - first, rtol=0, atol=1e-4 * float((one - first).norm()))
