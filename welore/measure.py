"""Time and memory, measured so that they can be compared: devices are waited for, first steps do not count."""

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from welore import metrics, processes

GIB = 2**30
WARM_UP_STEPS = 2  # the first steps allocate, compile and fill caches


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What `work` takes, with waits for the device before and after it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class Peak:
    """`gib` is the most memory used since the block began, after it or at any time inside it."""

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        return _peak_resident_kib() * 1024 / GIB

    @property
    def reserved_gib(self) -> float | None:
        """What torch took from the GPU for it, fragments included; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) / GIB if self.device.type == "cuda" else None

    def metrics(self, allocated: metrics.Metric, reserved: metrics.Metric) -> dict[str, float]:
        """Both peaks on a GPU; on a CPU the resident memory, as `allocated`."""
        found = {allocated.key: self.gib, reserved.key: self.reserved_gib}
        return {key: gib for key, gib in found.items() if gib is not None}


def capacity(device: torch.device) -> float:
    """GiB that torch may take of a device: a card of "80 GB" has less than 80. On a CPU nothing is enforced."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return math.inf


def give_back(device: torch.device) -> None:
    """Return what was freed to the system, or the next peak would depend on what ran before.

    What an allocator keeps for later is used again without being counted on a CPU, and counts as reserved on a GPU.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc alone has it


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak memory of what runs inside: allocated bytes on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak_resident()
    yield Peak(device)


def _reset_peak_resident() -> None:
    """Linux forgets the high-water mark of a process when it is asked to; elsewhere the mark only rises."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_resident_kib() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("VmHWM:")[1].split()[0])


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of the products of matrices that run inside, by the formulas of torch's FlopCounterMode.

    What no formula is for is not in them, nor is fused attention, which has none on a CPU: wherever attention is fused
    the same step counts alike. `total` is None where a formula does not fit what it is given: FlopCounterMode would
    end the training that it counts.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total: int | None = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = operator(*args, **kwargs)
        packet = getattr(operator, "_overloadpacket", operator)
        formula = None if "attention" in str(packet) else flop_registry.get(packet)
        if formula is not None and self.total is not None:
            try:
                self.total += formula(*args, **kwargs, out_val=found)
            except Exception:
                self.total = None
        return found


class Throughput(Callback):
    """Tokens per second of the optimizer steps, with and without padding, by the median step.

    Validation, checkpoints and the first steps are left out. A resumed run measures what it ran itself.
    """

    def __init__(self, accumulate: int):
        self.accumulate = accumulate
        self.seconds: list[float] = []
        self.real: list[int] = []
        self.padded: list[int] = []
        self._spent, self._real, self._padded, self._passes = 0.0, 0, 0, 0

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        synchronize(module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        synchronize(module.device)
        self._spent += time.perf_counter() - self._start
        self._real += int(batch["real"])
        self._padded += batch["ids_BL"].numel() * processes.count()
        self._passes += 1
        if self._passes == self.accumulate:
            self.seconds.append(self._spent)
            self.real.append(self._real)
            self.padded.append(self._padded)
            self._spent, self._real, self._padded, self._passes = 0.0, 0, 0, 0

    def tokens_per_second(self, padding: bool = False) -> float | None:
        """Of the median step after the warm-up; None before there is one."""
        tokens = self.padded if padding else self.real
        rates = [count / second for count, second in zip(tokens, self.seconds, strict=True)]
        return median(rates[WARM_UP_STEPS:] or rates) if rates else None

    def metrics(self) -> dict[str, float | None]:
        return {
            metrics.FIT_TOKENS_PER_SECOND.key: self.tokens_per_second(),
            metrics.FIT_PADDED_TOKENS_PER_SECOND.key: self.tokens_per_second(padding=True),
        }
