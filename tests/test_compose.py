"""Every option of svd, ranks, refine, prune and mode composes with every other: whole runs of a one-layer model.

Options are found by their files. All are slow: a sample in which every pair of options meets, and the whole cross of
svd, ranks and prune.
"""

import itertools
import math
import random

import pytest

from welore.config import CONF, fingerprint, science
from welore.moments import Needs
from welore.runner import run

SMALL = [
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "task/protocol=smoke",
    "task.protocol.window=32",
    "task.protocol.windows=2",
    "task/training=smoke",
    "task.training.steps=1",
    "task.training.batch=1",
    "task.training.accumulate=1",
    "task.training.length=16",
    "task.training.validation_windows=1",
    "calibration.tokens=128",
    "calibration.window=32",
    "trainer.progress=false",
    "save=false",
    "keep=0.9",
]


def options(group, *but):
    """Overrides, one for each file of a group."""
    return [f"{group}={file.stem}" for file in sorted((CONF / group).glob("*.yaml")) if file.stem not in but]


# Modes that meet every other option; each of the rest runs once, on a pruned model under autocast.
MODES = ("none", "welore", "nlrc", "full", "lora", "galore")
EIGHT_BIT = ("welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit")  # these need a GPU
REFACTORING = {"mode=sv", "mode=lora_xs", "mode=osf"}  # which would fill what is zeroed in factors
PROJECTED = {"mode=galore", "mode=fira", "mode=apollo"}  # whose default rank is above every side of this model

AXES = {
    "svd": options("svd"),
    "ranks": [
        *options("ranks", "given"),
        "ranks=welore ranks.spectrum=same",
        "ranks=lagrange ranks.value=fisher",
        "ranks=lagrange ranks.value=first_order",
    ],
    "refine": options("refine"),
    "prune": options("prune"),
    "sequential": [f"svd.sequential={value}" for value in ("none", "update", "anchored")],
    "mode": [f"mode={mode}" for mode in MODES],
}


def contradiction(cell):
    """These leave no weight dense, and so nothing for mode=nlrc to train."""
    return "mode=nlrc" in cell and "ranks=welore_all" in cell


def pairwise(axes, seed=0):
    """Few cells in which any two options of different axes meet, unless they contradict each other: greedy."""
    draw = random.Random(seed)
    left = {
        frozenset(pair)
        for one, other in itertools.combinations(axes, 2)
        for pair in itertools.product(axes[one], axes[other])
        if not contradiction(pair)
    }
    cells = []
    while left:
        first = draw.choice(sorted(map(sorted, left)))
        drawn = (
            [next((v for v in first if v in axis), draw.choice(axis)) for axis in axes.values()] for _ in range(60)
        )
        cells.append(max((c for c in drawn if not contradiction(c)), key=lambda c: len(met(c) & left)))
        left -= met(cells[-1])
    return cells


def met(cell):
    return {frozenset(pair) for pair in itertools.combinations(cell, 2)}


SAMPLE = pairwise(AXES)
CROSS = [list(cell) for cell in itertools.product(AXES["svd"], AXES["ranks"], AXES["prune"])]


@pytest.fixture(scope="module")
def ran(configured, text_file, tmp_path_factory):
    """A function of a cell to its config and its record. Cells share a cache, as those of a sweep do."""
    outputs = tmp_path_factory.mktemp("outputs")

    def ran(cell):
        overrides = " ".join(cell).split()
        dense = [] if "ranks=welore_all" in overrides or "ranks=sensitivity" in overrides else ["ranks.dense=half"]
        where = [] if "prune=none" in overrides or "prune.where" in " ".join(overrides) else ["prune.where=all"]
        epochs = ["refine.epochs=1"] if "refine=block" in overrides else []
        rank = ["mode.rank=8"] if PROJECTED & set(overrides) else []
        chosen = configured(
            *SMALL, f"task.path={text_file}", f"outputs={outputs}", *overrides, *dense, *where, *epochs, *rank
        )
        return chosen, run(chosen, outputs / fingerprint(chosen))

    return ran


def check(config, record):
    found = record.metrics
    assert record.status == "done" and record.environment["safer"] == []
    stages = ["dense", "compressed", *(["tuned"] if config.mode.trains else [])]
    assert all(1 < found[f"{stage}/perplexity"] < math.inf for stage in stages)
    assert 0 < found["compress/err"] < 1 and found["compress/keep"] == pytest.approx(0.9, abs=0.1)
    assert 0 < found["compress/parameters"] < found["dense/parameters"]
    assert (found["compress/predicted_nats"] is not None) == (config.needs >= Needs.GRADIENTS)
    assert (found.get("compress/zeros", 0) > 0) == config.prune.prunes
    assert ("compress/refined_to_nats" in found) == config.refine.refines


def test_in_the_sample_every_pair_of_options_meets():
    found = set().union(*map(met, SAMPLE))
    assert len(SAMPLE) < 100 and all(contradiction(pair) or frozenset(pair) in found for pair in all_pairs())


def all_pairs():
    for one, other in itertools.combinations(AXES.values(), 2):
        yield from itertools.product(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("cell", SAMPLE, ids=" ".join)
def test_any_two_options_compose(cell, ran):
    check(*ran(cell))


@pytest.mark.slow
@pytest.mark.parametrize("mode", options("mode", *MODES, *EIGHT_BIT))
def test_every_other_mode_trains_a_pruned_model_under_autocast(mode, ran):
    where = "nlrc" if mode in REFACTORING else "all"
    layers = ["mode.layers=1"] if mode == "mode=lisa" else []
    pruned = ["prune=wanda", f"prune.where={where}"]
    config, record = ran([mode, *layers, *pruned, "model.dtype=bfloat16", "model.autocast=bfloat16"])
    check(config, record)
    assert record.metrics["fit/trainable_parameters"] > 0
    assert record.metrics["tuned/zeros"] >= record.metrics["compress/zeros"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CROSS, ids=" ".join)
def test_every_svd_composes_with_every_rank_rule_and_every_pruner(cell, ran):
    check(*ran([*cell, "mode=none"]))


@pytest.mark.parametrize("rule", ["welore", "welore_all", "uniform", "partition"])
def test_aligned_ranks_are_another_run_and_any_ranks_the_run_of_before_there_was_a_choice(configured, rule):
    config = configured(f"ranks={rule}")
    assert "multiple" not in science(config)["ranks"]
    assert fingerprint(configured(f"ranks={rule}", "ranks.multiple=1")) == fingerprint(config)
    assert fingerprint(configured(f"ranks={rule}", "ranks.multiple=8")) != fingerprint(config)
