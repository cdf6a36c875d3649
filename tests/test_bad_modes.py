"""What a mode cannot do is refused with what was wrong, what was there and what to write."""

import re
from importlib.util import find_spec

import pytest
import torch

from welore.errors import Refused
from welore.modes import select
from welore.ranks import Budget
from welore.runner import run

ADVICE = re.compile(r"\b(write|use|change|run|start)\b", re.IGNORECASE)

CONFIGS = [
    ("mode=lora_plus mode.lr_ratio=0", ["mode.lr_ratio=0.0 does not train B"]),
    ("mode=lora_plus mode.lr_ratio=nan", ["mode.lr_ratio=nan does not train B"]),
    ("mode=pissa mode.init=svd", ["mode.init=svd is unknown", "kaiming, pissa or mica"]),
    ("mode=dora mode.init=mica", ["mode.dora=true and mode.init=mica"]),
    ("mode=mica mode.lr_ratio=4", ["mode.lr_ratio=4.0 is of B, which mode.init=mica freezes"]),
    ("mode=rslora mode.rank=0", ["mode.rank=0 adapts nothing"]),
    ("mode=randlora mode.rank=0", ["rank=0", "rank >= 1"]),
    ("mode=randlora mode.dropout=1", ["dropout=1.0"]),
    *[
        (
            f"mode={mode} mode.alpha={alpha}",
            [f"mode.alpha={shown} is no scale", why, "Write a number above 0"],
        )
        for mode, alpha, shown, why in (
            *(("lora", 0, "0.0", "never train"), ("dora", -4, "-4.0", "is turned around")),
            *(("lora", "nan", "nan", "is no number"), ("lora", "inf", "inf", "is no number")),
            ("randlora", 0, "0", "never train"),
        )
    ],
    ("mode=osf mode.frozen=1", ["mode.frozen=1.0 is not a share in (0, 1)"]),
    ("mode=osf mode.frozen=0", ["mode.frozen=0.0 is not a share in (0, 1)"]),
    ("mode=lora_xs mode.rank=0", ["mode.rank=0 adapts nothing"]),
    ("mode=lisa mode.gap=0", ["layers=2, gap=0"]),
    ("mode=lisa mode.sampling=outliers", ["mode.sampling=outliers is unknown", "uniform or outlier"]),
    ("mode=lisa mode.outlier=0", ["mode.outlier=0", "no multiple of a mean"]),
    ("mode=lisa mode.layers=0", ["layers=0, gap=20"]),
    ("mode=apollo mode.per=row", ["mode.per=row is unknown", "channel", "tensor"]),
    ("mode=fira mode.rank=0", ["mode has rank=0"]),
    ("mode=apollo mode.scale=0", ["scale=0.0"]),
    ("mode=muon mode.momentum=1", ["mode.momentum=1.0 is not in [0, 1)"]),
    *[
        (f"mode={mode} prune=wanda prune.where=all", ["takes the factors of LRCs apart", "prune.where=nlrc"])
        for mode in ("osf", "sv", "lora_xs", "pissa mode.lora_on=merged")
    ],
    *[(f"mode=galore mode.scale={scale}", [f"scale={scale}", "above 0"]) for scale in ("nan", "inf")],
    *[(f"mode=welore mode.lr={lr}", [f"lr={lr}", "lr > 0"]) for lr in ("nan", "inf")],
    ("mode=full task.training.lr=inf", ["lr=inf", "lr > 0"]),
    ("mode=sv mode.lr=0", ["lr=0.0", "lr > 0"]),
]
# On the tiny compressed model, whose smallest weight is 32 x 64.
MODELS = [
    *[
        (
            f"mode={mode} mode.rank=33",
            ["mode.rank=33 is above the rank of model.layers.0", "32 x 64", "Write 32 or less"],
        )
        for mode in ("lora", "pissa", "mica", "randlora", "lora_xs")
    ],
    *[
        (
            f"mode={mode}",
            ["mode.rank=128 projects nothing", f"mode={mode} would be plain Adam", "side is 64", "a rank below 64"],
        )
        for mode in ("galore", "fira", "apollo")
    ],
    ("mode=galore mode.rank=64", ["mode.rank=64 projects nothing", "a rank below 64, or mode=full"]),
    ("mode=lisa mode.layers=3", ["mode.layers=3, and the model has 2"]),
]
NO_LRC = ["sv", "random"]


@pytest.mark.parametrize(("overrides", "pieces"), CONFIGS, ids=[overrides for overrides, _ in CONFIGS])
def test_a_config_is_refused(configured, overrides, pieces):
    with pytest.raises(Refused) as refused:
        configured(*overrides.split())
    assert [piece for piece in pieces if piece not in str(refused.value)] == [], refused.value
    assert ADVICE.search(str(refused.value))


@pytest.mark.parametrize(("overrides", "pieces"), MODELS, ids=[overrides for overrides, _ in MODELS])
def test_what_the_model_cannot_take_is_refused(compressed, configured, overrides, pieces):
    with pytest.raises(Refused) as refused:
        select(compressed, configured(*overrides.split()).mode)
    assert [piece for piece in pieces if piece not in str(refused.value)] == [], refused.value
    assert ADVICE.search(str(refused.value))


@pytest.mark.parametrize(("overrides", "pieces"), MODELS, ids=[overrides for overrides, _ in MODELS])
def test_it_is_refused_of_the_dense_model_already(model, configured, overrides, pieces):
    """So that nobody waits for a compression that no training can follow."""
    with pytest.raises(Refused) as refused:
        configured(*overrides.split()).mode.check(model)
    assert [piece for piece in pieces if piece not in str(refused.value)] == [], refused.value


@pytest.mark.parametrize("mode", ["galore", "fira", "apollo"])
def test_a_projection_of_the_widest_weights_alone_is_allowed(compressed, configured, mode):
    assert select(compressed, configured(f"mode={mode}", "mode.rank=63").mode)


@pytest.mark.parametrize("mode", NO_LRC)
def test_a_mode_of_lrcs_is_refused_where_there_are_none(model, compress, configured, mode):
    compress(model, Budget(err=0.0))
    with pytest.raises(Refused, match=f"mode={mode} (selects no parameter.*14 Linear|needs .* there is no LRC)"):
        select(model, configured(f"mode={mode}").mode)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", ["welore", "nlrc", "full", "lora"])
def test_eight_bits_are_refused_without_a_gpu(compressed, configured, mode):
    strategy = configured(f"mode={mode}_8bit").mode
    parameters = select(compressed, strategy)
    for attempt in (lambda: strategy.optimizer(parameters), strategy.check_machine):
        with pytest.raises(Refused, match=f"mode={mode}_8bit.*needs a GPU.*Write mode={mode},"):
            attempt()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_eight_bits_are_refused_before_a_model_is_loaded(configured, monkeypatch, tmp_path):
    config = configured("mode=full_8bit", f"outputs={tmp_path}")
    monkeypatch.setattr(type(config.model), "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(Refused, match="mode=full_8bit keeps its moments in 8 bits, which needs a GPU"):
        run(config, tmp_path / "run")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bits_are_refused_without_their_library(configured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Refused, match="mode=full_8bit needs bitsandbytes.*Run: pip install bitsandbytes"):
        configured("mode=full_8bit").mode.optimizer([])
