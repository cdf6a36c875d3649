"""Factors fitted layer by layer, on the inputs that the compressed layers before give them.

Let x be the input of a weight in the dense model and x~ the one in the compressed model. `update` keeps B and solves
for the A whose outputs are closest to W x~ (SVD-LLM). `anchored` decomposes W E[x x~^T] E[x~ x~^T]^-1, the weight that
makes the best of x~ towards the dense outputs W x (AA-SVD); whitened and kfac take E[x~ x~^T] for their metric, the
other coordinates stay what they are. Inside one layer every weight is fitted while the others are still dense.
With a refinement, the factors of each layer are then trained towards what the dense layer puts out.

Shape suffixes: M = out_features, N = in_features, R = rank, T = tokens.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from welore.cache import Cache, digest
from welore.calibrate import Stream
from welore.compress import Coordinates, bias_of, dense_weight
from welore.errors import Refused
from welore.lowrank import LowRankLinear, replace
from welore.moments import damped, summed
from welore.ranks import Plan
from welore.refine import Refine
from welore.svd import decompose


class Pairs:
    """E[x~ x~^T] of the weights of one layer and, where `crossed`, E[x x~^T]: then the dense inputs are seen first."""

    def __init__(self, weights: dict[str, nn.Module], crossed: bool):
        self.weights, self.crossed = weights, crossed
        self.dense: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys(weights, 0)
        self.owner: dict[str, str] = {}  # a weight to the first that has the same input
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def seeing(self, compressed: bool) -> Iterator[None]:
        see = self._pair if compressed else self._keep
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            for name, module in self.weights.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _owns(self, name: str, x: Tensor) -> bool:
        """Whether the weight is the first to get this input."""
        same = self._last is not None and self._last[0] is x
        self.owner[name] = self._last[1] if same else name
        if not same:
            self._last = x, name
        return not same

    def _keep(self, name: str, x: Tensor) -> None:
        if self._owns(name, x):
            self.dense[name] = x.reshape(-1, x.shape[-1])

    def _pair(self, name: str, x: Tensor) -> None:
        if not self._owns(name, x):
            return
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens[name] += len(x_TN)
        self.own[name] = self.own.get(name, 0) + summed(x_TN, x_TN)
        if not self.crossed:
            return
        dense_TN = self.dense.pop(name, x.new_empty(0, x.shape[-1]))
        if len(x_TN) != len(dense_TN):
            raise _unpaired(name, f"sees {len(dense_TN)} tokens of a batch in the dense model and {len(x_TN)}")
        self.cross[name] = self.cross.get(name, 0) + summed(dense_TN, x_TN)

    def means(self, name: str) -> tuple[Tensor, Tensor | None]:
        name = self.owner.get(name, name)
        if self.tokens[name] == 0:
            raise _unpaired(name, "sees no token in the dense model or none")
        cross_NN = self.cross[name] / self.tokens[name] if self.crossed else None
        return self.own[name] / self.tokens[name], cross_NN


def _unpaired(name: str, what: str) -> Refused:
    """An expert gets other tokens where the layers before are compressed: the two streams cannot be compared."""
    return Refused(
        f"{name} {what} in the compressed one: its inputs cannot be paired. Write svd.sequential=none and refine=none."
    )


@torch.no_grad()
def factorize_in_sequence(
    model: PreTrainedModel,
    plan: Plan,
    coordinates: Coordinates,
    windows_BL: Tensor,
    dtype: str | None,
    refine: Refine,
    layers: Cache,
) -> list[tuple[float, float]]:
    """Put two factors in the place of every weight that the plan cuts, each fitted as `svd.sequential` says.

    The compressed hidden states, and the dense ones where something is fitted to them, go through each layer while it
    is still dense; then the compressed ones go through it again, cut. The factors depend on the whole plan: `layers`
    holds those of this one run, so that a killed run fits no layer twice. Returns what the refinement of each layer
    came from and to, in nats per token.
    """
    refined, anchors = [], coordinates.svd.sequential == "anchored"
    key = _key(plan, coordinates, refine)
    stream = Stream(model, windows_BL, dtype)
    dense = stream.first()
    own = list(dense)
    bar = tqdm(stream.layers, desc="in sequence", unit="layer", leave=False)
    for number, prefix in enumerate(bar):
        cut = {name: rank for name, rank in plan.factored.items() if name.startswith(f"{prefix}.")}
        fitted = cut if coordinates.svd.sequential != "none" else {}
        pairs = Pairs({name: model.get_submodule(name) for name in fitted}, anchors)
        for batch, (dense_BLD, own_BLD) in enumerate(zip(dense, own, strict=True)):
            if anchors or refine.refines:
                with pairs.seeing(compressed=False):
                    dense[batch] = stream.through(number, dense_BLD).cpu()
            if fitted:
                with pairs.seeing(compressed=True):
                    stream.through(number, own_BLD)

        def fit(number=number, prefix=prefix, cut=cut, pairs=pairs, own=own) -> Layer:
            factors = {}
            for name, rank in cut.items():
                factors[name] = _factors(name, model.get_submodule(name), rank, coordinates, pairs)
            _put(model, factors)
            notes = {name: coordinates.notes[name] for name in cut if name in coordinates.notes}
            if not refine.refines:
                return Layer(factors, notes)
            trained = [p for name in cut for p in factor_parameters(model.get_submodule(name))]
            metric = coordinates.statistics.of(prefix, stream.device).gradient_metric().float()
            gain = refine.fit(stream, number, own, dense, trained, metric)
            return Layer({name: factor_parameters(model.get_submodule(name)) for name in cut}, notes, gain)

        if cut:
            layer = layers.get("layers", f"{key}-{number}", Layer.read, Layer.write, fit)
            _put(model, layer.factors)
            coordinates.notes.update(layer.notes)
            if layer.refined:
                refined.append(layer.refined)
                bar.set_postfix_str("{:.4f} to {:.4f} nats".format(*layer.refined))
        own = [stream.through(number, own_BLD).cpu() for own_BLD in own]
    return refined


def _key(plan: Plan, coordinates: Coordinates, refine: Refine) -> str:
    """What the factors of a layer depend on, with all layers before it."""
    options = json.dumps([plan.ranks, asdict(coordinates.svd), asdict(refine)], sort_keys=True)
    return digest(options, coordinates.statistics.identity, *coordinates.weights.values())


@dataclass(frozen=True)
class Layer:
    """The factors (A_MR, B_RN) of the weights of one layer, what was done instead where a decomposition failed, and
    what their refinement came from and to, if any."""

    factors: dict[str, tuple[Tensor, Tensor]]
    notes: dict[str, str]
    refined: tuple[float, float] | None = None

    def write(self, path: Path) -> None:
        tensors = {
            f"{name}/{side}": tensor.detach().cpu().contiguous()
            for name, pair in self.factors.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, path, metadata={"rest": json.dumps([self.notes, self.refined])})

    @classmethod
    def read(cls, path: Path) -> "Layer":
        with safe_open(path, framework="pt") as tensors:
            names = dict.fromkeys(key.rpartition("/")[0] for key in tensors.keys())  # noqa: SIM118, no mapping
            factors = {name: tuple(tensors.get_tensor(f"{name}/{side}") for side in "AB") for name in names}
            notes, refined = json.loads(tensors.metadata()["rest"])
        return cls(factors, notes, refined and tuple(refined))


def factor_parameters(module: LowRankLinear) -> tuple[nn.Parameter, nn.Parameter]:
    return module.A.weight, module.B.weight


def _put(model: PreTrainedModel, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, pair in factors.items():
        module = model.get_submodule(name)
        A_MR, B_RN = (tensor.detach().to(model.device) for tensor in pair)
        layer = LowRankLinear.of(A_MR, B_RN, bias_of(module))
        replace(model, name, layer.requires_grad_(False))


def _factors(name: str, module: nn.Module, rank: int, coordinates: Coordinates, pairs: Pairs) -> tuple[Tensor, Tensor]:
    if coordinates.svd.sequential == "none":
        return coordinates.factors(name, module, rank)
    own_NN, cross_NN = pairs.means(name)
    moments = coordinates.statistics.of(name, own_NN.device)
    if coordinates.svd.sequential == "update":
        A_MR, B_RN = coordinates.factors(name, module, rank)
        return updated(dense_weight(module), B_RN, damped(own_NN, moments.damping)), B_RN
    target_MN = anchored(dense_weight(module), own_NN, cross_NN, moments.damping)
    metrics = coordinates.svd.metrics(changed(moments, inputs_NN=own_NN))
    found = decompose(target_MN, *metrics)
    if found.safer is not None:
        coordinates.notes[name] = found.safer
    dtype = dense_weight(module).dtype
    return found.A_KM[:rank].T.to(dtype).contiguous(), found.B_KN[:rank].to(dtype).clone()


def updated(W_MN: Tensor, B_RN: Tensor, inputs_NN: Tensor) -> Tensor:
    """A = W C B^T (B C B^T)^-1: the least squares fit of A B x to W x, where C = E[x x^T] (SVD-LLM's update)."""
    C, B = inputs_NN.double(), B_RN.double()
    A_MR = W_MN.double() @ C @ B.T @ torch.linalg.pinv(B @ C @ B.T, hermitian=True)
    return A_MR.to(W_MN.dtype).contiguous()


def anchored(W_MN: Tensor, own_NN: Tensor, cross_NN: Tensor, damping: float) -> Tensor:
    """W E[x x~^T] E[x~ x~^T]^-1 in float64, both damped alike, so that equal streams leave W as it is.

    The damping is at least 1e-6, above the rounding of the float32 sums: fewer tokens than features are no error.
    """
    damping = max(damping, 1e-6)
    own, cross = own_NN.double(), cross_NN.double()
    ridge = damping / (1 - damping) * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.linalg.solve(own + ridge, (W_MN.double() @ (cross + ridge)).T).T
