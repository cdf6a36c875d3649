"""Statistics of the inputs and output gradients of every compressible weight, streamed one decoder layer at a time.

In memory are the model, the hidden states between the layers, and the statistics of one layer, which go to disk before
those of the next begin. Weights that share an input (q, k, v; gate, up) share its statistics.

Shape suffixes: B = windows, L = tokens of one, T = B L tokens, D = hidden size, M = out_features, N = in_features.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from welore.cache import Cache, digest, half
from welore.errors import Refused
from welore.evaluate import FORWARD_TOKENS, autocast, causal_loss
from welore.models import components, decoder_layers
from welore.moments import Moments, Needs, check_finite, summed
from welore.tasks import Calibration

FORMAT = "3"  # raised when more is kept, or otherwise: older statistics are then gathered again
INDEX = "index.json"  # written last: a folder without it is not whole
LEVELS = {
    "inputs_NN": Needs.INPUTS,
    "absolute_N": Needs.INPUTS,
    "gradients_MM": Needs.GRADIENTS,
    "fisher_N": Needs.WEIGHT_GRADIENTS,
    "gradient_MN": Needs.WEIGHT_GRADIENTS,
}


@dataclass(frozen=True)
class Statistics:
    """The moments of every compressible weight, read from disk one weight at a time, up to the level `needs`.

    `identity` names what they were gathered from and how they are damped.
    """

    folder: Path
    needs: Needs
    identity: str
    damping: float
    gradient_damping: float

    @cached_property
    def index(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.folder / INDEX).read_text())

    def of(self, name: str, device: torch.device | str = "cpu") -> Moments:
        """The moments of one weight, refused where they are not finite."""
        entry = self.index[name]
        with safe_open(self.folder / Path(entry["file"]).name, framework="pt", device=str(device)) as tensors:
            wanted = {field: key for field, key in entry["tensors"].items() if LEVELS[field] <= self.needs}
            found = {field: tensors.get_tensor(key) for field, key in wanted.items()}
        moments = Moments(entry["tokens"], **found, damping=self.damping, gradient_damping=self.gradient_damping)
        check_finite(moments, name)
        return moments


def gather(
    model: PreTrainedModel,
    weights: dict[str, str],
    windows_BL: Tensor,
    needs: Needs,
    calibration: Calibration,
    dtype: str | None,
    cache: Cache,
) -> Statistics:
    """The statistics of a model over the windows: those on disk, if they were gathered before, at this level or above.

    `weights` are the digests of the model's parameters: statistics are found again by content.
    """
    sampled = f"sampled {calibration.seed}" if calibration.labels == "sampled" else "text"
    pairs = (part for item in weights.items() for part in item)
    key = digest(
        FORMAT,
        model.config.to_json_string(),
        *pairs,
        windows_BL.numpy().tobytes(),
        str(tuple(windows_BL.shape)),
        f"{dtype} {sampled}",
    )
    root = cache.folder / "statistics"
    levels = [root / f"{key}-{level.name.lower()}" for level in Needs if level >= needs]
    folder = next((folder for folder in levels if (folder / INDEX).exists()), levels[0])
    if not (folder / INDEX).exists():
        with cache.alone("statistics", folder.name):
            if not (folder / INDEX).exists():  # another process was faster
                _gathered(model, windows_BL, needs, folder, dtype, calibration)
    dampings = calibration.damping, calibration.gradient_damping
    return Statistics(folder, needs, digest(key, str(dampings)), *dampings)


def _gathered(model, windows_BL: Tensor, needs: Needs, folder: Path, dtype: str | None, calibration) -> None:
    """A folder of statistics, which appears whole or not at all."""
    part = half(folder)
    rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        calibrate(model, windows_BL, needs, part, dtype, calibration.labels, calibration.seed)
        with suppress(OSError):  # another process was faster, where there are no locks
            part.rename(folder)
    finally:
        rmtree(part, ignore_errors=True)


class Stream:
    """Hidden states on their way through the decoder layers of a model, one layer for all windows at a time.

    What else a layer is called with (positions, masks) is taken from one whole forward pass, for every layer its own.
    """

    def __init__(self, model: PreTrainedModel, windows_BL: Tensor, dtype: str | None):
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device
        self.layers = decoder_layers(model)
        self.batches = windows_BL.split(_together(windows_BL))
        self._loss = causal_loss(model)
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._wraps: list[bool] = []
        self._record()

    @torch.no_grad()
    def _record(self) -> None:
        def before(layer, args, kwargs):
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self._calls.append((args[1:], rest))

        def after(layer, args, output):
            self._wraps.append(isinstance(output, tuple))

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers.values()]
        handles += [layer.register_forward_hook(after) for layer in self.layers.values()]
        try:
            self._forward(self.batches[0])
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids_BL: Tensor) -> Any:
        with autocast(self.device, self.dtype):
            return self.model.base_model(input_ids=ids_BL.to(self.device), use_cache=False)

    @torch.no_grad()
    def first(self) -> list[Tensor]:
        """The hidden states that enter the first layer, of every batch."""
        found: list[Tensor] = []

        class Enough(Exception):
            pass

        def stop(layer, args, kwargs):
            found.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())
            raise Enough

        handle = next(iter(self.layers.values())).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for ids_BL in self.batches:
                with suppress(Enough):
                    self._forward(ids_BL)
        finally:
            handle.remove()
        return found

    def through(self, index: int, hidden_BLD: Tensor, layer: nn.Module | None = None) -> Tensor:
        """What layer `index` (or another `layer` in its place) makes of the hidden states of one batch."""
        args, kwargs = self._calls[index]
        layer = list(self.layers.values())[index] if layer is None else layer
        with autocast(self.device, self.dtype):
            output = layer(hidden_BLD.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def loss(self, ids_BL: Tensor, hidden_BLD: Tensor, labels_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The summed next-token loss of one batch whose last layer gave `hidden_BLD`, and the tokens it is over."""
        ids_BL = ids_BL.to(self.device)
        with self._ending_in(hidden_BLD.to(self.device)), autocast(self.device, self.dtype):
            return self._loss(ids_BL, ids_BL if labels_BL is None else labels_BL)

    @torch.no_grad()
    def sampled_labels(self, ids_BL: Tensor, hidden_BLD: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from what the model itself predicts: E[gg^T] is then that of the true Fisher."""
        with self._ending_in(hidden_BLD.to(self.device)), autocast(self.device, self.dtype):
            logits_BLV = self.model(input_ids=ids_BL.to(self.device), use_cache=False).logits
        labels_BL = ids_BL.to(self.device).clone()
        for row, logits_LV in enumerate(logits_BLV):
            shares_LV = logits_LV[:-1].float().softmax(-1)
            labels_BL[row, 1:] = torch.multinomial(shares_LV, 1, generator=generator)[:, 0]
        return labels_BL

    @contextmanager
    def _ending_in(self, hidden_BLD: Tensor) -> Iterator[None]:
        """The model without its layers: the last one gives `hidden_BLD` whatever enters."""
        layers = list(self.layers.values())

        def given(wrap: bool) -> Callable[..., Any]:
            return lambda *args, **kwargs: (hidden_BLD,) if wrap else hidden_BLD

        try:
            for layer, wrap in zip(layers, self._wraps, strict=True):
                layer.forward = given(wrap)
            yield
        finally:
            for layer in layers:
                del layer.forward


def _together(windows_BL: Tensor) -> int:
    """Windows in one batch: as many as divide them all, up to FORWARD_TOKENS tokens."""
    count, most = len(windows_BL), max(1, FORWARD_TOKENS // windows_BL.shape[1])
    return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


class Sums:
    """Sums over tokens for the weights of one layer, collected by hooks while it runs forward and backward."""

    def __init__(self, weights: dict[str, nn.Module], needs: Needs, batch: torch.Size):
        self.weights, self.needs, self.batch = weights, needs, batch
        self.tensors = defaultdict(dict, {name: {} for name in weights})
        self.tokens = defaultdict(int, dict.fromkeys(weights, 0))
        self.windows = dict.fromkeys(weights, 0)
        self.shared: dict[str, str] = {}  # a weight to the first that has the same input
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.weights.items()]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def hook(module, args, output):
            x = args[0]
            x_TN = x.detach().reshape(-1, x.shape[-1]).float()
            self.tokens[name] += len(x_TN)
            self._inputs(name, x, x_TN)
            if self.needs >= Needs.GRADIENTS and output.requires_grad:
                # Some layers flatten their batch, and an expert sees only some of its tokens.
                windows = self.batch[0] if len(x_TN) == self.batch.numel() else 1
                output.register_hook(lambda g: self._gradients(name, g, x_TN, windows))

        return hook

    def _inputs(self, name: str, x: Tensor, x_TN: Tensor) -> None:
        """Add E[xx^T] and E|x|, once for weights that are called with the very same tensor after each other."""
        same = self._last is not None and self._last[0] is x
        owner = self._last[1] if same else name
        if self.shared.setdefault(name, owner) != owner:
            raise Refused(
                f"{name} shares its input with other weights in some batches only: its statistics would mix."
            )
        if same:
            return
        self._last = x, name
        self._add(name, "inputs_NN", summed(x_TN, x_TN))
        self._add(name, "absolute_N", x_TN.abs().sum(0))

    def _gradients(self, name: str, g: Tensor, x_TN: Tensor, windows: int) -> None:
        g_TM = g.detach().reshape(-1, g.shape[-1]).float()
        self._add(name, "gradients_MM", summed(g_TM, g_TM))
        if self.needs < Needs.WEIGHT_GRADIENTS:
            return
        for g_LM, x_LN in zip(g_TM.chunk(windows), x_TN.chunk(windows), strict=True):
            W_gradient_MN = summed(g_LM, x_LN)
            self._add(name, "gradient_MN", W_gradient_MN)
            self._add(name, "fisher_N", W_gradient_MN.square().mean(0))
        self.windows[name] += windows

    def _add(self, name: str, what: str, value: Tensor) -> None:
        """Sums are kept in float64 where they are small, and in float32 where they are matrices."""
        value = value.double() if value.ndim == 1 else value
        held = self.tensors[name].get(what)
        self.tensors[name][what] = value if held is None else held.add_(value)

    def add_output(self, layer: str, gradients: list[Tensor]) -> None:
        """E[gg^T] of what the whole layer puts out, kept under the name of the layer."""
        for g_BLD in gradients:
            g_TD = g_BLD.flatten(0, 1).float()
            self._add(layer, "gradients_MM", summed(g_TD, g_TD))
            self.tokens[layer] += len(g_TD)

    def means(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Tensors by key, and for every weight its tokens and which tensors are its own."""
        tensors, index = {}, {}
        for name in self.tensors:
            if self.tokens[name] == 0:  # an expert that no token was sent to
                self.tensors[name] = _nothing(self.weights[name], self.needs)
            owner = self.shared.get(name, name)
            own = {f: owner for f in self.tensors[owner] if f in ("inputs_NN", "absolute_N")}
            own |= {f: name for f in self.tensors[name] if f not in own}
            index[name] = {"tokens": self.tokens[name], "tensors": {f: f"{o}/{f}" for f, o in own.items()}}
            for field, holder in own.items():
                count = self.windows[name] if field == "fisher_N" else self.tokens[holder]
                tensors[f"{holder}/{field}"] = (self.tensors[holder][field] / max(count, 1)).float().cpu().contiguous()
        return tensors, index


def _nothing(module: nn.Module, needs: Needs) -> dict[str, Tensor]:
    M, N = module.out_features, module.in_features
    found = {"inputs_NN": torch.zeros(N, N), "absolute_N": torch.zeros(N)}
    if needs >= Needs.GRADIENTS:
        found["gradients_MM"] = torch.zeros(M, M)
    if needs >= Needs.WEIGHT_GRADIENTS:
        found |= {"gradient_MN": torch.zeros(M, N), "fisher_N": torch.zeros(N)}
    return found


def calibrate(
    model: PreTrainedModel,
    windows_BL: Tensor,
    needs: Needs,
    folder: Path,
    dtype: str | None = None,
    labels: str = "text",
    seed: int = 0,
) -> None:
    """Write the moments of every compressible weight over the windows into `folder`, a file for each layer.

    With gradients the hidden states before every layer are kept (tokens x D x layers numbers), and each layer runs
    once more, forward and backward, from the last to the first. Gradients are of the summed loss of each window with
    its own tokens as `labels` (`text`), or with labels drawn from the model (`sampled`).
    """
    stream = Stream(model, windows_BL, dtype)
    weights = components(model)
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        if needs >= Needs.GRADIENTS:
            index = _backward(stream, weights, needs, folder, labels, seed)
        else:
            index = _forward(stream, weights, needs, folder)
    finally:
        for parameter, trains in frozen.items():
            parameter.requires_grad_(trains)
    (folder / INDEX).write_text(json.dumps(index))


def _of_layer(weights: dict[str, nn.Module], prefix: str) -> dict[str, nn.Module]:
    return {name: module for name, module in weights.items() if name.startswith(f"{prefix}.")}


@torch.no_grad()
def _forward(stream: Stream, weights: dict[str, nn.Module], needs: Needs, folder: Path) -> dict:
    hidden, index = stream.first(), {}
    for number, prefix in enumerate(tqdm(stream.layers, desc="calibrate", unit="layer", leave=False)):
        sums = Sums(_of_layer(weights, prefix), needs, stream.batches[0].shape)
        with sums.collecting():
            hidden = [stream.through(number, hidden_BLD).cpu() for hidden_BLD in hidden]
        index |= _save(sums, folder, number)
    return index


def _backward(
    stream: Stream, weights: dict[str, nn.Module], needs: Needs, folder: Path, labels: str, seed: int
) -> dict:
    levels = [stream.first()]
    progress = tqdm(total=2 * len(stream.layers), desc="calibrate", unit="layer", leave=False)
    with torch.no_grad():
        for number in range(len(stream.layers)):
            levels.append([stream.through(number, hidden_BLD).cpu() for hidden_BLD in levels[-1]])
            progress.update()
    generator = torch.Generator(stream.device).manual_seed(seed)
    gradients = []
    for ids_BL, hidden_BLD in zip(stream.batches, levels.pop(), strict=True):
        drawn = stream.sampled_labels(ids_BL, hidden_BLD, generator) if labels == "sampled" else None
        hidden_BLD = hidden_BLD.detach().requires_grad_(True)
        total, _ = stream.loss(ids_BL, hidden_BLD, drawn)
        gradients.append(torch.autograd.grad(total, hidden_BLD)[0].cpu())
    index = {}
    for number, prefix in reversed(list(enumerate(stream.layers))):
        sums = Sums(_of_layer(weights, prefix), needs, stream.batches[0].shape)
        sums.add_output(prefix, gradients)
        with sums.collecting():
            gradients = [
                _layer_gradient(stream, number, hidden_BLD, gradient_BLD)
                for hidden_BLD, gradient_BLD in zip(levels.pop(), gradients, strict=True)
            ]
        index |= _save(sums, folder, number)
        progress.update()
    progress.close()
    return index


def _layer_gradient(stream: Stream, number: int, hidden_BLD: Tensor, gradient_BLD: Tensor) -> Tensor:
    hidden_BLD = hidden_BLD.detach().requires_grad_(True)
    output_BLD = stream.through(number, hidden_BLD)
    return torch.autograd.grad(output_BLD, hidden_BLD, gradient_BLD.to(output_BLD))[0].cpu()


def _save(sums: Sums, folder: Path, number: int) -> dict[str, dict[str, Any]]:
    tensors, index = sums.means()
    file = f"layer{number}.safetensors"
    save_file(tensors, folder / file)
    return {name: entry | {"file": file} for name, entry in index.items()}
