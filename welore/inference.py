"""How fast a model reads a prompt and writes tokens after it, with a KV cache, and what that costs in FLOPs and bytes.

Shape suffixes: B = sequences, L = tokens of a prompt.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from welore.lowrank import LowRankLinear
from welore.measure import seconds, synchronize
from welore.models import components, count_bytes

# Of matrices, by the names that torch gives them where no gradient is wanted.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn_linear", "_mkl_linear"}


@dataclass(frozen=True)
class Timing:
    """Seconds of one prefill, and of each decoding step after the first, which is a warm-up."""

    prefill: float
    steps: list[float]


@torch.inference_mode()
def generate(model: PreTrainedModel, ids_BL: Tensor, new: int) -> tuple[Tensor, Timing]:
    """`new` greedy tokens after a prompt, one forward pass each, and how long they took.

    The prefill forms the logits of its last position alone, as every generation does.
    """
    device, cache, inputs = ids_BL.device, None, ids_BL
    tokens, taken = [], []
    for _ in range(new):
        synchronize(device)
        start = time.perf_counter()
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        synchronize(device)
        taken.append(time.perf_counter() - start)
        cache = output.past_key_values
        tokens.append(inputs)
    return torch.cat(tokens, dim=1), Timing(taken[0], taken[2:])


def generate_replayed(model: PreTrainedModel, ids_BL: Tensor, new: int) -> tuple[Tensor, Timing]:
    """The tokens of `generate`, 4 or more, from a cache of fixed size, so that every step is the same work.

    A GPU gets the fourth step and those after it as one captured graph: a step launches hundreds of small kernels,
    more with factors than without, and Python takes longer to launch them than the GPU takes to run them. Elsewhere
    nothing is captured. Timed are the steps from the fourth on; the prefill attends to the whole cache, under a mask.
    """
    return Writer(model, ids_BL, new, model).write()


@torch.inference_mode()
def read_replayed(model: PreTrainedModel, ids_BL: Tensor, rounds: int) -> tuple[Tensor, list[float]]:
    """The token after each prompt, B, and the seconds of `rounds` prefills, on a GPU from one captured graph.

    A graph is of one batch and length. Elsewhere nothing is captured.
    """
    token_B = ids_BL.new_zeros(len(ids_BL))

    def read() -> None:
        output = model(input_ids=ids_BL, use_cache=True, logits_to_keep=1)
        token_B.copy_(output.logits[:, -1].argmax(dim=-1))

    with _aside(ids_BL.device):
        read()
    replay = _captured(read, ids_BL.device)
    return token_B, [seconds(replay, ids_BL.device) for _ in range(rounds + 1)][1:]


def prefill_parts(model: PreTrainedModel, ids_BL: Tensor) -> dict[str, float]:
    """Where the seconds of one prefill go on the device: products, attention, and the rest.

    Seconds are those of the kernels, or on a CPU of the operations, by the operation that ran them: what a GPU waits
    for Python is in none. With fused attention, the default, all products are with weights. The rest is norms,
    rotations, activations, residual sums, and the copies between them.
    """
    with torch.inference_mode():
        work = partial(model, input_ids=ids_BL, use_cache=True, logits_to_keep=1)
        work()
        synchronize(ids_BL.device)  # or the kernels of the warm-up would be in the profile
        with torch.profiler.profile() as profile:
            work()
            synchronize(ids_BL.device)
    found = dict.fromkeys(("products", "attention", "rest"), 0.0)
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel is in the operation that launched it
            taken = event.self_device_time_total if ids_BL.is_cuda else event.self_cpu_time_total
            found[_part(event.key)] += taken / 1e6
    return found


def _part(operation: str) -> str:
    if "attention" in operation:
        return "attention"
    return "products" if operation.rpartition("::")[2] in PRODUCTS else "rest"


class Writer:
    """What `generate_replayed` does, any number of times from one prompt and in one cache, with a `step` of its own.

    The prefill is the model's, as it is.
    """

    def __init__(self, model: PreTrainedModel, ids_BL: Tensor, new: int, step: Callable[..., Any]):
        self.model, self.ids_BL, self.new, self.step = model, ids_BL, new, step
        self.cache = StaticCache(config=model.config, max_cache_len=ids_BL.shape[1] + new)
        self.token_B1 = ids_BL.new_zeros(len(ids_BL), 1)

    @torch.inference_mode()
    def write(self) -> tuple[Tensor, Timing]:
        device, taken, tokens = self.ids_BL.device, [], []

        def timed(work: Callable[[], None]) -> None:
            taken.append(seconds(work, device))
            tokens.append(self.token_B1.clone())

        self.cache.reset()
        timed(lambda: self._forward(self.model, self.ids_BL))
        with _aside(device):
            for _ in range(2):
                timed(lambda: self._forward(self.step, self.token_B1))
        replay = _captured(lambda: self._forward(self.step, self.token_B1), device)
        for _ in range(self.new - 3):
            timed(replay)
        return torch.cat(tokens, dim=1), Timing(taken[0], taken[3:])

    def _forward(self, forward: Callable[..., Any], inputs: Tensor) -> None:
        output = forward(input_ids=inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token_B1.copy_(output.logits[:, -1].argmax(dim=-1, keepdim=True))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps a workspace of some 32 MiB for every stream that has multiplied matrices."""
    return torch.cuda.Stream(device)


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as what a GPU is to capture must have run before."""
    if device.type != "cuda":
        yield
        return
    aside = _side_stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        yield
    torch.cuda.current_stream(device).wait_stream(aside)


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@dataclass(frozen=True)
class Speed:
    """Tokens per second over all sequences of a batch, by the median prefill and the median decoding step.

    `replayed` and `read_replayed` are decoding and prefill from a captured graph on a GPU; None on a CPU.
    """

    prefill: float
    decode: float
    replayed: float | None = None
    read_replayed: float | None = None


def race(models: Mapping[str, PreTrainedModel], ids_BL: Tensor, new: int, rounds: int) -> dict[str, Speed]:
    """The speed of each model on one prompt, in turns, so that a machine that slows down slows all of them.

    `new` is 4 or more; one further round before the others does not count. Replaying a graph, on a GPU, is measured
    once for each model after that, and reading from one `rounds` times.
    """
    taken: dict[str, list[Timing]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            taken[name].append(generate(model, ids_BL, new)[1])
    replayed: dict[str, tuple[float, float]] = {}
    if ids_BL.is_cuda:
        for name, model in models.items():
            step, reading = generate_replayed(model, ids_BL, new)[1].steps, read_replayed(model, ids_BL, rounds)[1]
            replayed[name] = len(ids_BL) / median(step), ids_BL.numel() / median(reading)
    speeds = {}
    for name, timings in taken.items():
        prefill = median(timing.prefill for timing in timings[1:])
        step = median(second for timing in timings[1:] for second in timing.steps)
        speeds[name] = Speed(ids_BL.numel() / prefill, len(ids_BL) / step, *replayed.get(name, ()))
    return speeds


@dataclass(frozen=True)
class Compiled:
    """Tokens per second of a model behind torch.compile, and the seconds that compiling took, once for each shape.

    `same` is how many tokens were written before the first that is not the one of `generate`, of any sequence.
    """

    prefill: float
    decode: float
    prefill_seconds: float
    decode_seconds: float
    same: int


@torch.inference_mode()
def compiled(model: PreTrainedModel, ids_BL: Tensor, new: int, rounds: int) -> Compiled:
    """The speed of a model behind torch.compile: its prefill, and every step after it as `generate_replayed` does it.

    Each becomes one graph, or torch raises. On a GPU the compiled step is captured as the plain one is, and not by
    mode="reduce-overhead", which does without a graph, and says so in a log alone, where a pass changes its inputs.
    What was compiled before is forgotten, or the ninth model or shape of a process would be refused.
    """
    torch.compiler.reset()
    device, expected = ids_BL.device, generate(model, ids_BL, new)[0]
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def read() -> Tensor:
        return forward(input_ids=ids_BL, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

    writer = Writer(model, ids_BL, new, forward)
    # The first of each compiles, the second is a warm-up.
    reading = [seconds(read, device) for _ in range(rounds + 2)]
    writing = [seconds(writer.write, device) for _ in range(2)]
    found = [writer.write() for _ in range(rounds)]
    written = torch.cat([read()[:, None], found[-1][0][:, 1:]], dim=1)  # the first token is the prefill's
    alike_L = (written == expected).all(dim=0)
    prefill = median(reading[2:])
    return Compiled(
        prefill=ids_BL.numel() / prefill,
        decode=len(ids_BL) / median(second for _, timing in found for second in timing.steps),
        prefill_seconds=reading[0] - prefill,
        decode_seconds=writing[0] - writing[1],
        same=int(alike_L.cumprod(dim=0).sum()),
    )


def prefill_flops(model: PreTrainedModel, length: int) -> int:
    """Of one prompt: 2 per stored number and token, causal attention, and the logits of the last position."""
    return product_flops(model, length) + _attention_flops(model, length) * length // 2


def product_flops(model: PreTrainedModel, length: int) -> int:
    """Of one prompt, in products with weights and no others: factors save a share of these."""
    return length * _layer_flops(model) + _head_flops(model)


def decode_flops(model: PreTrainedModel, context: int) -> int:
    """Of one token of one sequence that attends to `context` positions."""
    return _layer_flops(model) + _attention_flops(model, context) + _head_flops(model)


def decode_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """What one decoding step of a batch reads: every weight once, and the KV cache of every sequence.

    Of embeddings that are not the output matrix too, it reads only a row for each token, which is left out.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rows = 0 if embedding is head else embedding.numel() * embedding.element_size()
    return count_bytes(model) - rows + cache_bytes(model.config, batch, context, embedding.element_size())


def cache_bytes(config, batch: int, length: int, itemsize: int) -> int:
    """Of keys and values of all layers: 2 x layers x KV heads x head size x tokens."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size(config) * batch * length * itemsize


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer_flops(model: PreTrainedModel) -> int:
    return 2 * sum(_numbers(module) for module in components(model).values())


def _numbers(module: nn.Linear | LowRankLinear) -> int:
    parts = (module.A, module.B) if isinstance(module, LowRankLinear) else (module,)
    return sum(part.weight.numel() for part in parts)


def _attention_flops(model: PreTrainedModel, context: int) -> int:
    """Of one token: a product with the keys and one with the values, in every layer."""
    config = model.config.get_text_config(decoder=True)
    return 4 * context * config.num_hidden_layers * config.num_attention_heads * head_size(config)


def _head_flops(model: PreTrainedModel) -> int:
    return 2 * model.get_output_embeddings().weight.numel()
