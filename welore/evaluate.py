"""Perplexity, and where a model breaks.

Shape suffixes: B = windows or sequences, L = tokens of one, T = B (L - 1) scored tokens, D = hidden size.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from welore import metrics
from welore.loss import IGNORED, cross_entropy, linear_cross_entropy
from welore.models import DTYPES, decoder_layers

FORWARD_TOKENS = 2048  # windows are scored together up to this many tokens, or one by one where they are longer

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager:
    """Matrix products in `dtype`; as they are where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, DTYPES[dtype])


def causal_loss(model: PreTrainedModel) -> Loss:
    """A function of ids_BL and labels_BL that returns the summed next-token loss in nats and the number of tokens.

    Where the logits are the output matrix times the last hidden states, and nothing else (checked here on a few
    tokens), they are never formed for a whole window. Models that scale or cap their logits take the plain way.
    """
    head = model.get_output_embeddings()
    separable = isinstance(head, nn.Linear) and _logits_are_linear(model, head)
    output_matrix = _Cast()

    def loss(ids_BL: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        labels_T = labels_BL[:, 1:].reshape(-1)
        scored = (labels_T != IGNORED).sum()
        if separable and not (torch.is_grad_enabled() and head.weight.requires_grad):
            hidden_TD = _hidden(model, ids_BL)[:, :-1].flatten(0, 1)
            return linear_cross_entropy(hidden_TD, output_matrix(head.weight), head.bias, labels_T), scored
        logits_TV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits_TV, labels_T), scored

    return loss


class _Cast:
    """A frozen weight in the autocast dtype, cast again only when its content has changed."""

    def __init__(self):
        self.key, self.weight = None, None

    def __call__(self, weight: Tensor) -> Tensor:
        kind = weight.device.type
        if not torch.is_autocast_enabled(kind) or weight.dtype == torch.get_autocast_dtype(kind):
            return weight
        if weight.requires_grad:  # fused optimizers change content without a new version
            return weight
        key = (weight.data_ptr(), weight._version, torch.get_autocast_dtype(kind))
        if key != self.key:
            self.key, self.weight = key, weight.detach().to(torch.get_autocast_dtype(kind))
        return self.weight


@contextmanager
def frozen_weights_in(model: PreTrainedModel, dtype: str | None) -> Iterator[None]:
    """Cast the weights of frozen linear layers to the autocast dtype once, and give them back unchanged at the end.

    Autocast would cast them again in every step, and keep each cast until the backward pass has used it: the same
    numbers to the bit, in less time, at the same peak of memory unless layers are run again, where the casts of one
    layer at a time would do. Tied weights are left alone, for embeddings do not run in the autocast dtype.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and "weight" in module._parameters  # some adapters only show that of the layer inside them
        and not module.weight.requires_grad
        and id(module.weight) not in shared
    ]
    originals = [module.weight for module in frozen]
    try:
        for module in frozen if dtype is not None else []:
            module.weight = nn.Parameter(module.weight.detach().to(DTYPES[dtype]), requires_grad=False)
        yield
    finally:
        for module, original in zip(frozen, originals, strict=True):
            module.weight = original


@contextmanager
def float32_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let the output matrix multiply in float32, whatever the rest runs in.

    A logit in bfloat16 has 8 bits: options that differ by less than a sixteenth of a nat come out alike.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), weight, bias)

    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward  # the one of the class shows again
        if before is not None:
            head.forward = before


def _hidden(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    return model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state


@torch.no_grad()
def _logits_are_linear(model: PreTrainedModel, head: nn.Linear) -> bool:
    ids_BL = torch.arange(4, device=head.weight.device)[None]
    with _without_dropout(model):
        hidden_BLD, logits_BLV = _hidden(model, ids_BL), model(input_ids=ids_BL, use_cache=False).logits
    if hidden_BLD.shape[-1] != head.in_features:
        return False
    return torch.allclose(head(hidden_BLD), logits_BLV, rtol=1e-3, atol=1e-3, equal_nan=True)


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Two passes are alike inside, and draw nothing; each layer is left in the training state that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Score:
    """Perplexity over `tokens` scored tokens; `breaks_at` names the first layer whose output is not finite."""

    perplexity: float
    tokens: int
    tokens_per_second: float
    breaks_at: str | None = None


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows_BL: Tensor, dtype: str | None = None, title: str = "perplexity"
) -> Score:
    """exp of the mean loss over the L - 1 predicted tokens of every window; no window is ever left out.

    Losses are summed in float32 within a window and in float64 across them. Where one is not finite, the perplexity
    is NaN and the score says in which layer that starts.
    """
    device = next(model.parameters()).device
    loss = causal_loss(model)
    together = max(1, FORWARD_TOKENS // windows_BL.shape[1])
    nats, tokens, rates = 0.0, 0, []
    for ids_BL in tqdm(windows_BL.split(together), desc=title, unit="batch", leave=False):
        ids_BL = ids_BL.to(device)
        start = time.perf_counter()
        with autocast(device, dtype):
            total, scored = loss(ids_BL, ids_BL)
        total = float(total)  # waits for the device
        rates.append(ids_BL.numel() / (time.perf_counter() - start))
        if not math.isfinite(total):
            with autocast(device, dtype):
                return Score(math.nan, 0, 0.0, first_not_finite(model, ids_BL))
        nats, tokens = nats + total, tokens + int(scored)
    mean = nats / tokens
    return Score(math.exp(mean) if mean < 700 else math.inf, tokens, median(rates))


@dataclass(frozen=True)
class Outcome:
    """How a model did at one stage: `stage` metrics without their prefix, others, and an answer for each question.

    `practice` are its answers to training questions.
    """

    stage: dict[str, Any]
    shared: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)
    practice: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, stage: str) -> dict[str, Any]:
        return {f"{stage}/{key}": value for key, value in self.stage.items()} | self.shared


class Benchmark(ABC):
    """What models are measured on, whichever task it comes from."""

    title: str  # in one line, to stand beside every number
    longest: int | None = None  # tokens of its longest sequence, where it must not be cut
    longest_key: str = ""  # the option that sets it

    @property
    @abstractmethod
    def identity(self) -> tuple[str | bytes, ...]:
        """Whatever the numbers of one model on one device depend on."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        """How the model does; `stage` is for the progress bar."""

    def rate(self, outcome: Outcome, device: torch.device, stage: str) -> Outcome:
        """The outcome with what others say of it, whose memory is not that of the model."""
        return outcome


class Windows(Benchmark):
    """Perplexity on the windows that a protocol scores, ids_BL."""

    def __init__(self, windows_BL: Tensor, title: str, longest_key: str):
        self.windows_BL, self.longest, self.longest_key = windows_BL, windows_BL.shape[1], longest_key
        self.title = f"{title}, {windows_BL.numel()} tokens"

    @property
    def identity(self) -> tuple[str | bytes, ...]:
        return f"{tuple(self.windows_BL.shape)}", self.windows_BL.numpy().tobytes()

    def measure(self, model: PreTrainedModel, dtype: str | None, stage: str) -> Outcome:
        score = perplexity(model, self.windows_BL, dtype, f"{stage} perplexity")
        found: dict[str, Any] = {"perplexity": score.perplexity}
        if score.breaks_at is not None:
            found[metrics.BREAKS_AT] = score.breaks_at
        rate = {metrics.EVAL_TOKENS.key: score.tokens, metrics.EVAL_TOKENS_PER_SECOND.key: score.tokens_per_second}
        return Outcome(found, rate)


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, ids_BL: Tensor) -> str:
    """The full name of the first decoder layer whose output holds NaN or infinity; `lm_head` if none does."""
    found: list[str] = []

    def watch(name: str):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if not found and not hidden.isfinite().all():
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in decoder_layers(model).items()]
    try:
        model(input_ids=ids_BL, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "lm_head"
