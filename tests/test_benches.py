"""The scripts that measure training run on the tiny model; what they find of time and memory is not judged here."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from argparse import Namespace
from copy import deepcopy

import pytest
import torch
from conftest import ROOT

from welore.bench import apart
from welore.errors import Lost
from welore.examine import Item
from welore.shapes import PLANS

sys.path.insert(0, str(ROOT / "scripts"))

import equal_memory
from bench_questions import MANY, ONE, WAYS, WHOLE, agreement, sample

TINY = ("model=tiny", "trainer=cpu")
UNKNOWN = "there is no option nonsense"
REFUSED = [
    *[(f"{script} nonsense=1", UNKNOWN) for script in ("bench", "bench_inference", "bench_lora", "bench_questions")],
    *[(f"{script} nonsense=1", UNKNOWN) for script in ("bench_steps", "equal_memory", "memory", "step_flops")],
    ("bench --only=speed model=tiny", "--only speed is unknown"),
    ("bench --batch=0", "argument --batch: 0 is too small. Write 1 or more"),
    ("bench --length=x", "argument --length: invalid whole_number value: 'x'"),
    ("bench_calibration --shapes=tiny --tokens=64", "calibration.tokens=64"),
    ("bench_calibration --layers=0", "argument --layers: 0 is too small"),
    ("bench_inference --decode=3", "argument --decode: 3 is too small. Write 4 or more"),
    ("bench_inference --err 1.5 -- model=tiny", "err=1.5 is not a fraction"),
    ("bench_inference -- model=tiny svd=whitened", "svd=whitened ranks=welore refine=none prune=none needs calib"),
    ("bench_inference -- model=tiny ranks=given ranks.path=ranks.json", "--err asks for shares of them"),
    ("bench_lora --steps=2", "argument --steps: 2 is too small. Write 3 or more"),
    ("bench_lora --model=tiny --multiple=8 trainer=cpu", "--multiple 8 is of a stand-in. Write --random too"),
    *[
        (f"bench_lora mode={m}", f"mode={m} is not what stands beside it")
        for m in ("rslora", "welore", "dora", "none")
    ],
    (
        "bench_lora mode.lora_on=merged",
        "mode.lora_on=merged is of one alone, and what is compared has factors. Leave it out",
    ),
    ("bench_lora mode.norms=true", "mode.norms=true is of one alone, and what is compared has false"),
    (
        "bench_lora task.training.accumulate=2",
        "task.training.accumulate=2 is of one alone, and what is compared has 1",
    ),
    ("bench_lora trainer.recompute=true", "trainer.recompute=true"),
    ("bench_lora task.training.length=64", "task.training.length=64 is of one alone, and what is compared has 256"),
    ("bench_questions --questions=-1", "argument --questions: -1 is too small. Write 0 or more"),
    ("bench_questions --rounds=0", "argument --rounds: 0 is too small"),
    ("bench_questions " + " ".join(f"--skip='{way}'" for way in WAYS), "--skip leaves nothing to ask"),
    ("bench_steps --model=tiny -- prune=magnitude trainer=cpu", "prune=magnitude is not measured here"),
    ("bench_steps --model=tiny --random -- prune=magnitude trainer=cpu err=0.5", "prune=magnitude is not measured"),
    ("bench_steps --tokens 0", "argument --tokens: 0 is too small. Write 2 or more"),
    ("bench_steps --tokens 256 300 --length 256", "--tokens 300 is no number of whole sequences of --length 256"),
    ("bench_steps --model=tiny -- svd=whitened trainer=cpu", "needs calibration"),
    ("equal_memory --gib 0", "argument --gib: 0 GiB is no memory. Write a number above 0"),
    ("equal_memory --multiple=0", "argument --multiple: 0 is too small"),
    ("equal_memory --multiple=8", "--multiple 8 is of a stand-in. Write --random too"),
    *[
        (f"{s} --plan=paper", "--plan paper is of a stand-in. Write --random too")
        for s in ("bench_inference", "bench_steps", "equal_memory")
    ],
    (
        "bench_inference --model=llama2_7b --random --plan=paper --err 0.5 0.3 -- trainer=cpu",
        "at err=0.5, not for err=0.3 and weights of 4096 ranks. Ask for err 0.5 alone",
    ),
    ("equal_memory --steps=0", "argument --steps: 0 is too small"),
    ("memory --batch=0", "argument --batch: 0 is too small"),
    ("memory --length=1", "argument --length: 1 is too small. Write 2 or more"),
    ("step_flops --length=1", "argument --length: 1 is too small. Write 2 or more"),
]


def figures(script, tmp_path, *arguments, overrides=TINY):
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments, f"--out={out}", "--", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"outputs={tmp_path}"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def ended(script, monkeypatch):
    """The status of a script and its arguments that were run here as from a shell."""
    script, *arguments = shlex.split(script)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    return status.value.code


@pytest.mark.parametrize(("script", "said"), REFUSED, ids=[script for script, _ in REFUSED])
def test_what_a_script_cannot_measure_is_refused_in_a_line(tmp_path, monkeypatch, capsys, script, said):
    monkeypatch.chdir(tmp_path)
    assert ended(script, monkeypatch) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line and "error: " in line and not any(tmp_path.iterdir())


@pytest.mark.parametrize("modes", ["dora", "welore dora"])
def test_a_mode_whose_memory_nobody_can_tell_is_refused_before_any_is_measured(tmp_path, monkeypatch, capfd, modes):
    monkeypatch.chdir(tmp_path)
    sizes = "--random --gib 0.005 --length 32 -- err=0.5"
    assert ended(f"equal_memory --modes {modes} {sizes} {' '.join(TINY)}", monkeypatch) == 2
    found = capfd.readouterr()
    assert found.out == "" and "error: what mode=dora saves and keeps is not known here" in found.err
    assert "Traceback" not in found.err and not (tmp_path / "outputs" / "equal_memory.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_eight_bits_are_measured_nowhere_before_it_is_said_that_they_need_a_gpu(monkeypatch, capfd):
    overrides = f"--random -- err=0.5 {' '.join(TINY)}"
    assert ended(f"equal_memory --modes welore full_8bit {overrides}", monkeypatch) == 2
    found = capfd.readouterr()
    assert found.out == "" and "mode=full_8bit keeps its moments in 8 bits, which needs a GPU" in found.err


def test_a_budget_beyond_the_card_is_refused_before_anything_is_measured(monkeypatch, capfd):
    monkeypatch.setattr("welore.measure.capacity", lambda device: 79.25)
    assert ended("equal_memory --random --gib 24 80 -- model=llama2_7b err=0.5 trainer=cpu", monkeypatch) == 2
    found = capfd.readouterr()
    assert found.out == "" and "--gib 80 is more than the 79.2 GiB here. Write less, or --predict" in found.err


def test_the_measurement_of_a_process_that_failed_or_was_killed_is_none(capfd):
    assert apart(["-c", "print('hello'); print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(SystemExit) as status:
        apart(["-c", "raise SystemExit(2)"])
    assert status.value.code == 2
    with pytest.raises(Lost, match="signal 9 ended -c"):
        apart(["-c", "import os; os.kill(os.getpid(), 9)"])


@pytest.mark.slow
def test_lora_learns_what_it_learns_under_transformers_and_peft(tmp_path):
    """Loss for loss: the same adapters, batches, schedule, clipping and optimizer, by two trainers."""
    sizes = ("--steps=5", "--batch=2", "--length=64", "--rounds=1")
    found = figures("bench_lora", tmp_path, "--model=tiny", *sizes, overrides=("trainer=cpu",))
    ours, theirs = found["losses"].values()
    assert len(ours) == 5 and ours == pytest.approx(theirs, abs=2e-4) and ours[-1] < ours[0]
    assert all(rate > 0 for rate in found["tokens_per_second"].values())


@pytest.mark.slow
def test_the_parts_of_a_step_are_measured_for_both_modes(tmp_path):
    sizes = ("--tokens", "16", "64", "--length=32", "--rounds=1")
    found = figures("bench_steps", tmp_path, "--model=tiny", *sizes, overrides=("trainer=cpu",))
    assert [row["tokens"] for row in found["rows"]] == [16, 64]
    for row in found["rows"]:
        assert row["seconds"].keys() == {"welore", "full"} and all(ratio > 0 for ratio in row["ratios"].values())
        ours, full, ratios = *row["seconds"].values(), row["ratios"]
        passes = ours["forward"] + ours["backward"]
        whole = ratios["limit"] * passes + full["loop"]
        assert ratios["limit, loop"] == pytest.approx(whole / (passes + ours["loop"]))


@pytest.mark.slow
def test_random_weights_are_measured_without_a_model_or_a_decomposition(tmp_path):
    random = ("--random", "--multiple", "8")
    steps = figures("bench_steps", tmp_path, "--model=tiny", *random, "--tokens=32", "--length=32", "--rounds=1")
    assert steps["random"] and steps["multiple"] == 8 and steps["rows"][0]["ratios"]["limit"] >= 1
    rows = figures("equal_memory", tmp_path, *random, "--gib=0.005", "--modes=full", "--length=32")["rows"]
    assert [row["recompute"] for row in rows] == [False, True] and all(row["tokens_per_second"] > 0 for row in rows)
    sizes = ("--err=0.5", "--batch=1", "--prompt=8", "--decode=4", "--rounds=1")
    found = figures(
        "bench_inference", tmp_path, "--model=tiny", *random[:1], *sizes, "--parts", "--multiple", "1", "8"
    )
    names = ["dense", "dense fused", "compressed", "compressed fused", "compressed fused x8"]
    (row,) = found["speed"]
    assert list(row["tokens_per_second"]) == list(row["prefill parts"]) == names and len(found["memory"]) == 2
    assert 1 < row["prefill ratio if the rest stays"] < row["prefill FLOPs ratio"]
    sizes = ("--steps=4", "--batch=2", "--length=32", "--rounds=1", "--model=tiny")
    found = figures("bench_lora", tmp_path, *random, *sizes, overrides=("trainer=cpu", "err=0.5"))
    ours, theirs = found["losses"].values()
    assert found["shape"]["random"] and ours == pytest.approx(theirs, abs=2e-4) and len(ours) == 4


@pytest.mark.slow
def test_steps_and_budgets_are_of_the_plan_that_is_asked_for(tmp_path):
    overrides = (*TINY, "model.config.num_key_value_heads=4", "err=0.5")
    limits, fits = {}, {}
    for plan in PLANS:
        random = ("--random", f"--plan={plan}", "--length=32")
        steps = figures(
            "bench_steps", tmp_path, "--model=tiny", *random, "--tokens=32", "--rounds=1", overrides=overrides
        )
        found = figures(
            "equal_memory", tmp_path, *random, "--gib=0.02", "--modes=full", "--predict", overrides=overrides
        )
        assert steps["plan"] == found["shape"]["plan"] == plan
        limits[plan], fits[plan] = steps["rows"][0]["ratios"]["limit"], found["rows"][0]["largest batch"]
    assert limits["paper"] > limits["even"] and fits["paper"] != fits["even"]


@pytest.mark.slow
def test_the_faster_of_two_at_the_largest_batch_of_a_budget_is_the_best(tmp_path):
    plain, again = figures("equal_memory", tmp_path, "--gib", "0.005", "--modes", "welore", "--length=32")["rows"]
    assert 0 < plain["largest batch"] < again["largest batch"] and plain["measured GiB"] > 0
    assert all(row["batch"] == row["largest batch"] for row in (plain, again))
    assert plain["best"] == (plain["tokens_per_second"] > again["tokens_per_second"]) != again["best"]


@pytest.mark.slow
def test_a_batch_cut_short_of_its_budget_is_no_best(tmp_path):
    sizes = ("--gib", "0.1", "--modes", "welore", "--length=32", "--most=2")
    plain, again = figures("equal_memory", tmp_path, *sizes)["rows"]
    assert plain["batch"] == again["batch"] == 2 and not plain["best"] and not again["best"]


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch, tmp_path):
    def alone(mode, gib, recompute):
        if mode == "full" and recompute:
            raise KeyboardInterrupt
        return {"largest batch": 2, "batch": 2, "tokens_per_second": 1.0} | {"predicted GiB": 1, "measured GiB": 1}

    out = tmp_path / "found.json"
    arguments = ["--gib", "1", "--modes", "welore", "full", f"--out={out}", "--", *TINY]
    monkeypatch.setattr(sys, "argv", ["equal_memory.py", *arguments])
    monkeypatch.setattr(equal_memory, "alone", alone)
    with pytest.raises(KeyboardInterrupt):
        equal_memory.main()
    found = json.loads(out.read_text())
    assert [(row["mode"], row.get("best")) for row in found["rows"]] == [
        ("welore", True),
        ("welore", False),
        ("full", None),
    ]
    assert found["shape"]["steps"] == 5


def test_the_model_of_a_prediction_is_measured_and_another_where_it_ran_out_of_memory(
    compressed, monkeypatch, tmp_path
):
    models, batches = [], []

    def subject(*_):
        models.append(deepcopy(compressed))
        return models[-1]

    def measured(model, config, step, steps):
        assert model is models[-1] and steps == 7
        batches.append(step.batch)
        if len(batches) < 3:
            raise torch.cuda.OutOfMemoryError("as on a GPU")
        return None, {}

    monkeypatch.setattr(equal_memory, "subject", subject)
    monkeypatch.setattr(equal_memory, "measured", measured)
    arguments = Namespace(
        overrides=list(TINY), random=False, multiple=1, plan="even", length=32, predict=False, most=16, steps=7
    )
    assert equal_memory.one(arguments, "lora", 1.0, False)["batch"] == 12
    assert batches == [16, 14, 12] and len(models) == 3


@pytest.mark.slow
def test_inference_is_measured_by_length_and_a_compressed_model_as_it_was_saved(tmp_path):
    sizes = ("--model=tiny", "--err=0.5", "--batch", "1", "2", "--prompt", "16", "8", "--decode=4", "--rounds=1")
    found = figures("bench_inference", tmp_path, *sizes, overrides=("trainer=cpu",))
    assert [(row["batch"], row["prompt"]) for row in found["speed"]] == [(1, 16), (1, 8), (2, 16), (2, 8)]
    assert found["memory"].keys() == {"dense", "err 0.5"}
    for lengths in found["memory"].values():
        assert [(row["batch"], row["prompt"]) for row in lengths] == [(2, 8), (2, 16)]
        short, long = (row["KV cache GiB"] for row in lengths)
        assert long / short == pytest.approx(19 / 11) and all(row["peak GiB"] > row["weights GiB"] for row in lengths)
    dense, compressed = (lengths[0]["weights GiB"] for lengths in found["memory"].values())
    assert compressed < dense


@pytest.mark.slow
def test_compiled_models_stand_beside_the_others(tmp_path, cpp_compiler):
    sizes = ("--model=tiny", "--err=0.5", "--batch=1", "--prompt=8", "--decode=5", "--rounds=1", "--compile")
    found = figures("bench_inference", tmp_path, *sizes, overrides=("trainer=cpu",))
    (row,) = found["speed"]
    assert list(row["compiled"]) == ["dense", "compressed", "compressed fused"]
    for name, speed in row["compiled"].items():
        assert speed["same"] == 5 and speed["prefill_seconds"] > 0 < speed["decode_seconds"]
        for phase in ("prefill", "decode"):
            dense = row["tokens_per_second"]["dense"][phase]
            assert row[f"compiled {phase} ratio"][name] == pytest.approx(speed[phase] / dense)


@pytest.mark.slow
def test_memory_of_inference_can_be_measured_alone(tmp_path):
    sizes = ("--model=tiny", "--err=0.5", "--prompt", "8", "--rounds=0")
    found = figures("bench_inference", tmp_path, *sizes, overrides=("trainer=cpu",))
    assert found["speed"] == [] and len(found["memory"]) == 2


@pytest.mark.slow
def test_the_flops_of_a_step_are_counted_for_each_mode_on_a_model_of_its_own(tmp_path):
    modes = ("--modes", "lora", "welore", "full", "sv")  # adapters first: they are put on a copy
    found = figures(
        "step_flops", tmp_path, "--model=tiny", "--length=16", *modes, overrides=("err=0.5", "trainer=cpu")
    )
    rows = found["flops a token"]
    assert all(row["step"] == row["forward"] + row["backward"] for row in rows.values())
    assert rows["sv"]["step"] < rows["welore"]["step"] < rows["full"]["step"]
    assert rows["sv"]["forward"] == rows["welore"]["forward"] < rows["lora"]["forward"]
    assert found["commit"]


@pytest.mark.slow
def test_questions_are_asked_in_every_way_and_what_cannot_be_read_agrees_with_nothing(tmp_path):
    sizes = ("--task=coinflip", "--questions=5", "--batch=2", "--rounds=1")
    found = figures("bench_questions", tmp_path, *sizes, "--whole")
    ways = [f"{kind}, {how}" for how in (ONE, MANY, WHOLE) for kind in ("written", "likelihood")]
    assert list(found["questions per second"]) == list(found["verdicts"]) == ways
    speed, ratios = found["questions per second"], found["ratios"]
    assert len(ratios) == 3 and found["commit"] and found["questions"] == 4  # whole batches
    ours = speed["likelihood, in batches"] / speed["written, one by one"]
    assert ratios["likelihood in batches / written one by one"] == ours
    for how in (MANY, WHOLE):
        written, likely = (found[f"agreement with {ONE}"][f"{kind}, {how}"] for kind in ("written", "likelihood"))
        assert written["same"] == likely["same"] == likely["readable and same"] == 4
        assert written["readable"] == written["readable and same"] == 0 == found["verdicts"][ways[0]].get("right", 0)
        assert likely["largest difference in nats"] < 1e-3


@pytest.mark.slow
def test_a_way_that_is_skipped_leaves_the_rest_as_they_are(tmp_path):
    sizes = ("--task=coinflip", "--questions=2", "--batch=2", "--rounds=1", f"--skip=written, {MANY}")
    found = figures("bench_questions", tmp_path, *sizes, f"--skip=likelihood, {ONE}")
    assert list(found["questions per second"]) == [f"written, {ONE}", f"likelihood, {MANY}"]
    assert list(found["ratios"]) == [f"likelihood {MANY} / written {ONE}"] and found[f"agreement with {ONE}"] == {}


def test_two_answers_that_nobody_can_read_are_no_readable_agreement():
    one, many = (
        [{"verdict": v} for v in vs] for vs in (("right", "unparsed", "wrong"), ("right", "unparsed", "unparsed"))
    )
    found = {"questions": 3, "same": 2, "readable": 2, "readable and same": 1}
    assert agreement(one, many, "verdict") == found


def test_likelihoods_of_a_model_that_breaks_have_no_difference():
    broken = [{"option": "broken", "nats": {"yes": float("nan"), "no": -1.0}}]
    found = agreement(broken, [{"option": "right", "nats": {"yes": -1.5, "no": -1.25}}], "option")
    assert (found["same"], found["readable"], found["largest difference in nats"]) == (0, 1, 0.25)
    assert agreement(broken, broken, "option")["readable"] == 0


@pytest.mark.parametrize("count", [0, 7, 20])
def test_all_questions_are_asked_once(count):
    items = [Item("so " * length, "yes") for length in range(7)]
    assert sample(items, count, 2) == items and len(sample(items, 4, 2)) == 4
