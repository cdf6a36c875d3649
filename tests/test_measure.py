import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from welore import measure
from welore.fit import Whole
from welore.measure import WARM_UP_STEPS, Flops, Throughput, give_back, peak_memory

CPU = torch.device("cpu")
MIB_200 = 200 / 1024


def allocate():
    """200 MiB, written so that they are resident, and freed."""
    torch.ones(200 * 2**20 // 4).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak")
def test_peak_memory_sees_what_is_allocated_inside_and_forgets_what_was_before():
    allocate()
    with peak_memory(CPU) as peak:
        before = peak.gib
        allocate()
        inside = peak.gib
    assert inside - before == pytest.approx(MIB_200, abs=0.03)
    with peak_memory(CPU) as again:
        after = again.gib
    assert inside - after == pytest.approx(MIB_200, abs=0.03)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to give memory back")
def test_what_was_freed_goes_back_so_that_the_next_peak_counts_it():
    """Pieces below the threshold at which glibc maps memory of its own stay with the process when they are freed."""
    pieces = [torch.ones(2**14) for _ in range(3200)]  # 64 KiB each, 200 MiB together
    last = torch.ones(2**14)  # above the others on the heap, which cannot shrink by itself
    del pieces
    give_back(CPU)
    with peak_memory(CPU) as peak:
        before = peak.gib
        pieces = [torch.ones(2**14) for _ in range(3200)]
        assert peak.gib - before == pytest.approx(MIB_200, abs=0.03)
    assert len(pieces) == 3200 and last.sum() == 2**14


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak")
def test_a_checkpoint_is_no_memory_of_training(tmp_path):
    checkpoints, last = Whole(), tmp_path / "last.ckpt"
    state = {"weights": torch.ones(200 * 2**20 // 4)}
    with peak_memory(CPU) as peak:
        before = peak.gib
        checkpoints.save_checkpoint(state, last)
        checkpoints.write()
        assert peak.gib - before < MIB_200 / 4
    assert torch.equal(torch.load(last, weights_only=True)["weights"], state["weights"])


def test_products_are_counted_forward_and_backward():
    W, x = torch.ones(5, 3, requires_grad=True), torch.ones(7, 3)
    with (flops := Flops()):
        y = torch.nn.functional.linear(x, W).relu().sum()
    assert flops.total == 2 * 7 * 3 * 5
    with flops:
        y.backward()
    assert flops.total == 2 * 2 * 7 * 3 * 5
    x @ W.T
    assert flops.total == 2 * 2 * 7 * 3 * 5


def test_the_count_is_that_of_torch_without_attention(monkeypatch):
    """On a CPU there is no formula for fused attention; one is given here, as GPUs have it."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(measure.flop_registry, fused, lambda *arguments, **options: 10**9)
    x, W = torch.ones(2, 4, 8, 16), torch.ones(16, 16)
    with FlopCounterMode(display=False) as torchs, Flops() as ours:
        torch.nn.functional.scaled_dot_product_attention(x @ W, x, x)
    assert ours.total == 2 * 2 * 4 * 8 * 16 * 16
    assert torchs.get_total_flops() == ours.total + 10**9


def test_a_product_that_no_formula_fits_is_computed_and_makes_the_count_unknown(monkeypatch):
    def strict(*arguments, **options):
        raise AssertionError("as of more heads than those of keys")

    monkeypatch.setitem(measure.flop_registry, torch.ops.aten.mm, strict)
    with (flops := Flops()):
        assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))
        torch.ones(2, 2, 3) @ torch.ones(2, 3, 2)
    assert flops.total is None


def test_the_gib_is_1024_cubed_bytes(monkeypatch):
    monkeypatch.setattr(measure, "_peak_resident_kib", lambda: 3 * 1024 * 1024)
    with peak_memory(CPU) as peak:
        assert peak.gib == 3.0


def run(throughput, monkeypatch, passes):
    """Give the callback passes of (seconds, real tokens) in batches of 2 x 8, by a clock that they move."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    module = SimpleNamespace(device=CPU)
    for seconds, real in passes:
        batch = {"ids_BL": torch.zeros(2, 8), "real": torch.tensor(real)}
        throughput.on_train_batch_start(None, module, batch, 0)
        now[0] += seconds
        throughput.on_train_batch_end(None, module, None, batch, 0)
        now[0] += 100.0  # validation and checkpoints between the passes


def test_tokens_per_second_is_the_median_step_without_the_warm_up(monkeypatch):
    throughput = Throughput(accumulate=1)
    assert throughput.tokens_per_second() is None
    run(throughput, monkeypatch, [(50.0, 10)] * WARM_UP_STEPS + [(1.0, 10), (2.0, 10), (8.0, 10)])
    assert throughput.tokens_per_second() == 5.0
    assert throughput.tokens_per_second(padding=True) == 8.0


def test_the_passes_of_a_step_are_measured_together(monkeypatch):
    throughput = Throughput(accumulate=2)
    run(throughput, monkeypatch, [(9.0, 1)] * 2 * WARM_UP_STEPS + [(1.0, 12), (3.0, 4)])
    assert throughput.seconds == [18.0] * WARM_UP_STEPS + [4.0]
    assert throughput.tokens_per_second() == 4.0 and throughput.tokens_per_second(padding=True) == 8.0
