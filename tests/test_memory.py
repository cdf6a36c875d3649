"""Predicted footprints of a training step and of a prompt against what autograd, model and optimizer really hold."""

import json
import sys
import weakref
from copy import deepcopy

import pytest
import torch
from conftest import ROOT
from test_modes import OTHERS, TRAINED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from welore.bench import stand_in_model
from welore.config import fingerprint
from welore.errors import Refused
from welore.evaluate import autocast, causal_loss, frozen_weights_in
from welore.fit import recomputed
from welore.measure import GIB
from welore.memory import Step, largest_batch, predict, predict_prefill
from welore.models import components, count_bytes
from welore.modes import select
from welore.optim import state_bytes
from welore.prune import mask_bytes, prune_model
from welore.records import read_history
from welore.shapes import SHAPES, factor, on_meta, stand_in
from welore.sparse import KeptZeros

sys.path.insert(0, str(ROOT / "scripts"))

import memory

CPU = torch.device("cpu")
IDS_BL = torch.arange(80).view(2, 40) * 11 % 259
MODES = {
    "welore": ("mode=welore",),
    "welore without norms": ("mode=welore", "mode.norms=false"),
    "nlrc": ("mode=nlrc",),
    "nlrc without norms": ("mode=nlrc", "mode.norms=false"),
    "full": ("mode=full",),
    "galore": ("mode=galore", "mode.rank=8", "mode.gap=2"),
    "lora": ("mode=lora",),
    "lora merged": ("mode=lora", "mode.lora_on=merged"),
    "rslora": ("mode=rslora",),
    "lora_plus": ("mode=lora_plus",),
    "fira": ("mode=fira", "mode.rank=8"),
    "apollo": ("mode=apollo", "mode.rank=8"),
    "apollo-mini": ("mode=apollo", "mode.rank=1", "mode.per=tensor"),
    "muon": ("mode=muon",),
}
IN_PLACE = ("welore", "nlrc", "full", "lora", "rslora")  # begin the names of modes that AdamW steps


def saved_bytes(model, dtype, recompute=False):
    """Bytes that autograd keeps at the end of a forward pass: every storage once, without those of the parameters."""
    loss = causal_loss(model)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with frozen_weights_in(model, dtype), recomputed(model, recompute):
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, dtype):
            loss(IDS_BL, IDS_BL)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


# Autocast also holds the casts of the first factors, which autograd need not save: 1 %.
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_are_those_that_autograd_saves(mode, dtype, compressed, configured):
    config = configured(*MODES[mode])
    parameters = select(compressed.train(), config.mode)
    footprint = predict(compressed, config.mode, parameters, Step(2, 40, dtype))
    assert sum(footprint.saved.values()) == pytest.approx(saved_bytes(compressed, dtype), rel=0.015)


def test_recomputation_saves_the_inputs_of_layers_alone(compressed, configured):
    config = configured("mode=welore")
    parameters = select(compressed.train(), config.mode)
    footprint = predict(compressed, config.mode, parameters, Step(2, 40, None, recompute=True))
    kept = (
        sum(footprint.saved.values()) - footprint.saved["rotary positions"]
    )  # those wait as an argument, unseen by autograd
    assert kept == pytest.approx(saved_bytes(compressed, None, recompute=True), rel=0.01)
    plain = predict(compressed, config.mode, parameters, Step(2, 40, None))
    assert sum(footprint.saved.values()) < 0.3 * sum(plain.saved.values())


DROPPED = {
    f"{mode} with dropout": (f"mode={mode}", "mode.dropout=0.3") for mode in ("lora", "dora", "mica", "randlora")
}
MERGED = {f"{mode} on products": (f"mode={mode}", "mode.lora_on=merged") for mode in ("dora", "mica", "pissa")}
AGAIN = TRAINED | OTHERS | DROPPED | MERGED
# Two whole runs each: the default tests take those in which layers differ from one time to the next.
QUICK = ("lora with dropout", "lisa")
RUNS = [pytest.param(v, id=k, marks=[] if k in QUICK else [pytest.mark.slow]) for k, v in AGAIN.items()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mode", AGAIN)
def test_recomputation_changes_no_loss_and_no_gradient(mode, dtype, compressed, configured):
    parameters = select(compressed.train(), configured(*AGAIN[mode]).mode)
    loss = causal_loss(compressed)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        with frozen_weights_in(compressed, dtype), recomputed(compressed, on):
            with autocast(CPU, dtype):
                total, _ = loss(IDS_BL, IDS_BL)
            found.append((total.detach(), *torch.autograd.grad(total, parameters)))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("mode", RUNS)
def test_a_run_that_recomputes_is_the_same_run(mode, compressed, train, tmp_path):
    other, losses = deepcopy(compressed), []
    for model, recompute in ((compressed, "false"), (other, "true")):
        train(model, *mode, f"trainer.recompute={recompute}")
        losses.append([line.get("train/loss") for line in read_history(tmp_path)])
    assert losses[0] == losses[1] and len(losses[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(compressed.parameters(), other.parameters(), strict=True))
    assert "forward" not in other.model.layers[0].__dict__


def test_recomputation_is_no_part_of_a_fingerprint(configured):
    assert fingerprint(configured("trainer.recompute=true")) == fingerprint(configured())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_held_and_gradients_are_those_of_a_real_step(mode, dtype, compressed, configured):
    config = configured(*MODES[mode])
    model = compressed.to(getattr(torch, dtype)).train()
    parameters = select(model, config.mode)
    footprint = predict(model, config.mode, parameters, Step(2, 40, None))
    optimizer = config.mode.optimizer(parameters)
    total, _ = causal_loss(model)(IDS_BL, IDS_BL)
    total.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    assert footprint.gradients == sum(gradient.nbytes for gradient in gradients)
    optimizer.step()
    held = footprint.held["optimizer states"] + footprint.held["float32 masters"]
    counters = {
        id(count): count.nbytes for state in optimizer.state.values() if (count := state.get("step")) is not None
    }
    assert held == state_bytes(optimizer) - sum(counters.values())
    assert footprint.held["weights"] == count_bytes(model)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith(IN_PLACE)])
def test_what_an_optimizer_works_with_is_what_its_step_makes(mode, compressed, configured):
    """In a step that renews its projection, where there is one."""
    config = configured(*MODES[mode], *(["mode.gap=1"] if "mode.rank=8" in MODES[mode] else []))
    parameters = select(compressed.train(), config.mode)
    optimizer = config.mode.optimizer(parameters)
    causal_loss(compressed)(IDS_BL, IDS_BL)[0].backward()
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    with Live([*parameters, *(p.grad for p in parameters), *held]) as live:
        optimizer.step()
    assert live.peak == pytest.approx(config.mode.step_bytes(parameters), rel=0.1)


@pytest.mark.parametrize("mode", ["lisa", "dora", "pissa", "mica", "osf", "randlora", "sv", "lora_xs"])
def test_a_mode_that_cannot_be_foreseen_is_refused(mode, compressed, configured):
    with pytest.raises(Refused, match=f"mode={mode} saves and keeps is not known here. Measure it: fit/peak_gib"):
        predict(compressed, configured(f"mode={mode}").mode, [], Step(1, 8, None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit mode.rank=32"])
def test_eight_bit_states_are_those_of_their_optimizer(mode, dtype, compressed, configured, eight_bits):
    """Of matrices as large as to be kept in bytes, and of the small rest."""
    config = configured(*f"mode={mode}".split())
    model = compressed.to(getattr(torch, dtype)).train()
    parameters = select(model, config.mode)
    sizes = [p.numel() for p in parameters]
    assert min(sizes) < 4096 <= max(sizes)
    footprint = predict(model, config.mode, parameters, Step(2, 40, None))
    optimizer = eight_bits(config.mode, parameters)
    total, _ = causal_loss(model)(IDS_BL, IDS_BL)
    total.backward()
    optimizer.step()
    held = footprint.held["optimizer states"] + footprint.held["float32 masters"]
    assert held == state_bytes(optimizer)


def test_the_largest_batch_is_the_last_that_fits(compressed, configured):
    config = configured("mode=full")
    parameters = select(compressed, config.mode)
    peaks = [predict(compressed, config.mode, parameters, Step(batch, 40, None)).peak for batch in range(1, 8)]
    assert peaks == sorted(peaks)
    for batch, peak in enumerate(peaks, start=1):
        step = Step(1, 40, None)
        assert largest_batch(compressed, config.mode, parameters, step, peak / 2**30) == batch
        assert largest_batch(compressed, config.mode, parameters, step, (peak - 1) / 2**30) == batch - 1


class Live(TorchDispatchMode):
    """The most bytes at once of all that operations inside have made, without the tensors that were there."""

    def __init__(self, there):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return found


@pytest.mark.slow
# Adapters of peft that are run again under autocast hold up to 9 % more than what is counted of them.
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("weights", "dtype"), [("float32", None), ("float32", "bfloat16"), ("bfloat16", None)])
@pytest.mark.parametrize("mode", MODES)
def test_the_peak_of_the_backward_pass_is_that_of_its_tensors(mode, weights, dtype, recompute, compressed, configured):
    config, ids_BL = configured(*MODES[mode]), torch.arange(4096).view(8, 512) * 11 % 259
    model = compressed.to(getattr(torch, weights)).train()
    parameters = select(model, config.mode)
    step = Step(8, 512, dtype, recompute)
    moments = predict(model, config.mode, parameters, step).moments
    groups = config.mode.optimizer(parameters).param_groups
    there = [*model.parameters(), *model.buffers(), *(p for group in groups for p in group["params"]), ids_BL]
    loss = causal_loss(model)
    with frozen_weights_in(model, dtype), recomputed(model, recompute), Live(there) as live:
        with autocast(CPU, dtype):
            total, _ = loss(ids_BL, ids_BL)
        live.peak = 0
        total.backward()
    predicted = max(moments["start of the backward pass"], moments["backward pass of a layer"])
    adapters = mode.startswith(("lora", "rslora")) and dtype and recompute
    assert predicted == pytest.approx(live.peak, rel=0.09 if adapters else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True])
def test_the_peak_of_reading_a_prompt_is_that_of_its_tensors_to_the_byte(cut, dtype, pristine, compressed):
    model = (compressed if cut else deepcopy(pristine[0])).to(dtype).requires_grad_(False)
    with torch.no_grad(), Live([*model.parameters(), *model.buffers(), IDS_BL]) as live:
        cache = model(input_ids=IDS_BL, use_cache=True, logits_to_keep=1).past_key_values
    found = predict_prefill(model, 2, 40)
    assert found.weights == count_bytes(model)
    assert found.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.peak == found.weights + live.peak


def test_ranks_of_a_run_give_the_bytes_of_its_model(model, compress, configured, tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(compress(model).ranks))
    for config, path in ((configured(), file), (configured("ranks=given", f"ranks.path={file}"), None)):
        bare, origin = memory.shaped(config, path)
        assert origin == str(file) and next(bare.parameters()).is_meta
        assert predict_prefill(bare, 2, 40) == predict_prefill(model, 2, 40)


def test_memory_of_inference_is_told_by_length_dense_beside_compressed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "model=tiny", "err=0.5", "--inference", "--lengths", "8", "4096"])
    assert memory.main() == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in lines] == ["8", "4096"]
    short, long = (float(line.split()[-1]) for line in lines)
    assert short < long < 1  # the cache is not compressed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--measure"])
    assert memory.main() == 2 and "bench_inference.py" in capsys.readouterr().err


def test_the_peak_of_reading_a_prompt_is_what_was_measured_on_a_gpu():
    """LLaMA-2-7B's shapes on an H200, in GiB allocated; docs/memory.md says what is missing."""
    measured = json.loads((ROOT / "benchmarks" / "inference_memory-h200-7b.json").read_text())["memory"]
    for name, rows in measured.items():
        model = on_meta(SHAPES["llama2_7b"], "bfloat16")
        if name != "dense":
            factor(model, stand_in(model, float(name.removeprefix("err "))))
        for row in rows:
            found = predict_prefill(model, row["batch"], row["prompt"])
            assert found.weights / GIB == row["weights GiB"]
            assert 0.983 < found.peak / GIB / row["peak GiB"] < 0.998


def test_the_peak_of_a_step_is_what_was_measured_on_a_gpu(configured):
    """LLaMA-2-7B's shapes on an H200, in GiB allocated, with and without recomputation."""
    rows = json.loads((ROOT / "benchmarks" / "equal_memory-h200-7b-48.json").read_text())["rows"]
    for row in [row for row in rows if "measured GiB" in row]:
        config = configured("model=llama2_7b", "err=0.5", f"mode={row['mode']}")
        model = stand_in_model(config, torch.device("meta"), 8)
        parameters = select(model, config.mode)
        step = Step(row["batch"], 1024, config.model.autocast, row["recompute"])
        found = predict(model, config.mode, parameters, step).peak / GIB
        assert found == pytest.approx(row["measured GiB"], rel=0.005)


def printed(monkeypatch, capsys, *arguments):
    """The exit status of scripts/memory.py, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    status, found = memory.main(), capsys.readouterr()
    return status, found.out + found.err


def test_the_plan_of_a_stand_in_is_printed_and_refused_where_ranks_are_known(monkeypatch, capsys):
    size = ("model=llama2_7b", "err=0.5", "mode=welore", "--gib")
    for plan, trained in (("even", "2,865.8M"), ("paper", "1,219.9M")):
        status, text = printed(monkeypatch, capsys, *size, "--plan", plan)
        assert status == 0 and f"err=0.5, plan {plan};" in text and f"trains {trained}" in text
    for known in ("--measure", "--ranks=ranks.json"):
        status, text = printed(monkeypatch, capsys, *size, "--plan", "paper", known)
        assert status == 2 and "--plan paper is a stand-in" in text


@pytest.mark.parametrize("mode", ["welore", "lora"])
@pytest.mark.parametrize("where", ["nlrc", "all"])
def test_masks_of_a_pruned_model_are_those_that_keep_its_zeros(where, mode, compressed, configured):
    config = configured("prune=magnitude", f"prune.where={where}", f"mode={mode}")
    prune_model(config.prune, components(compressed), None)
    zeros = KeptZeros([linear.weight for linear in config.prune.matrices(components(compressed)).values()])
    masks = mask_bytes(config.prune, components(compressed))
    assert masks == sum(gone.nbytes for _, gone in zeros.gone)
    parameters = select(compressed, config.mode)
    plain, pruned = (predict(compressed, config.mode, parameters, Step(2, 40, None), held) for held in (0, masks))
    assert pruned.peak == plain.peak + masks
    gib = plain.peak / GIB
    assert largest_batch(compressed, config.mode, parameters, Step(1, 40, None), gib) == 2
    assert largest_batch(compressed, config.mode, parameters, Step(1, 40, None), gib, masks) < 2


def test_pruning_counts_in_what_is_printed_and_is_not_measured(monkeypatch, capsys):
    size = ("model=llama2_7b", "err=0.5", "mode=welore", "--gib")
    status, text = printed(monkeypatch, capsys, "prune=magnitude", *size)
    assert status == 0 and "masks of pruned weights             1.319" in text  # 1,416.6M values of the N-LRCs
    assert "masks of pruned weights             0.000" in printed(monkeypatch, capsys, *size)[1]
    status, text = printed(monkeypatch, capsys, "prune=magnitude", *size, "--measure")
    assert status == 2 and "prune=magnitude is not measured here" in text


def test_a_model_of_another_shape_is_refused(family, configured):
    model = family("opt")
    with pytest.raises(Refused, match="saved tensors of a opt model are not known"):
        predict(model, configured("mode=full").mode, [], Step(1, 8, None))
    with pytest.raises(Refused, match="activations of a opt model are not known"):
        predict_prefill(model, 1, 8)
