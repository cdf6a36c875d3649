"""A model, compressed in place: spectra of its weights, and factors where a plan says so; both cached by content."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from welore.cache import Cache, digest, whole
from welore.calibrate import Statistics
from welore.errors import Refused
from welore.evaluate import perplexity
from welore.lowrank import LowRankLinear, factored_ranks, replace
from welore.models import components, count_bytes, flops_per_token
from welore.moments import Needs
from welore.ranks import Budget, Evidence, Plan, Ranks, tally
from welore.svd import Components, Plain, Spectrum, Svd, decompose, predicted_nats, singular_values, valued

Weight = nn.Linear | LowRankLinear
T = TypeVar("T")

SAFER = "safer"  # in the metadata of components on disk: what was done where the usual decomposition failed
VALUES_FIRST = 2048  # shorter sides above this are decomposed without vectors until a plan cuts the weight


def weight_digests(model: PreTrainedModel) -> dict[str, str]:
    """The content of every parameter, hashed: the keys of all that is computed from weights."""
    return digests(dict(model.named_parameters()))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The shape, the dtype and the content of each, hashed."""

    def hashed(tensor: Tensor) -> str:
        raw = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest(f"{tuple(tensor.shape)} {tensor.dtype}", hashlib.sha256(raw).digest())

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(hashed, tensors.values()), strict=True))


@dataclass(frozen=True)
class Coordinates:
    """The weights of one model in the coordinates of an `svd` option: what every decomposition here starts from.

    `weights` are their digests, `statistics` the moments where the option, or anything else, asked for them. `notes`
    says of which weights the decomposition failed, and what was done instead.
    """

    svd: Svd
    weights: dict[str, str]
    cache: Cache
    statistics: Statistics | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> "Coordinates":
        """The same weights as they are."""
        return changed(self, svd=Plain("plain", "none"))

    @property
    def has_gradients(self) -> bool:
        return self.statistics is not None and self.statistics.needs >= Needs.GRADIENTS

    def key(self, name: str) -> str:
        """What a decomposition depends on: the weight, the option, and the statistics that the option uses."""
        options = {key: value for key, value in asdict(self.svd).items() if key != "sequential"}
        used = (self.statistics.identity, name) if self.svd.needs else ()
        return digest(self.content(name), json.dumps(options, sort_keys=True), *used)

    def content(self, name: str) -> str:
        """The digest of a weight, or of the two factors of one that is factored already."""
        dense = self.weights.get(f"{name}.weight")
        return dense or digest(self.weights[f"{name}.A.weight"], self.weights[f"{name}.B.weight"])

    def decomposed(self, name: str, module: Weight) -> Components:
        """All components of one weight. Raises where the weight or its statistics are not finite."""
        W_MN = dense_weight(module)
        moments = self.statistics.of(name, W_MN.device) if self.svd.needs else None
        with _named(name):
            components = decompose(W_MN, *self.svd.metrics(moments))
        if components.safer is not None:
            self.notes[name] = components.safer
        return _without_rounding(components, module)

    def spectrum(self, name: str, module: Weight) -> Spectrum:
        """The singular values; the components are kept as well where that takes little more."""
        shape = module.out_features, module.in_features
        if isinstance(self.svd, Plain) and min(shape) > VALUES_FIRST:
            return self.cache.get(
                "spectra", self.key(name), _read_spectrum, _write_spectrum, lambda: _values_alone(name, module)
            )
        found = self._components(name, module, _read_spectrum)
        return found.spectrum if isinstance(found, Components) else found

    def valued(self, name: str, module: Weight) -> Spectrum:
        """The spectrum with the worth of every component, as far as the statistics go."""

        def make() -> Spectrum:
            device = next(module.parameters()).device
            A_MK, B_KN = self.factors(name, module, min(module.out_features, module.in_features))
            moments = self.statistics.of(name, device)
            return valued(Components(self.spectrum(name, module), A_MK.T, B_KN), moments)

        key = digest(self.key(name), self.statistics.identity, str(int(self.statistics.needs)), name)
        return self.cache.get("values", key, _read_spectrum, _write_spectrum, make)

    def factors(self, name: str, module: Weight, rank: int) -> tuple[Tensor, Tensor]:
        """A_MR and B_RN: the first `rank` components, of which no more is read from the cache."""
        found = self._components(name, module, lambda path: _read_factors(path, rank))
        A_RM, B_RN = (found.A_KM[:rank], found.B_KN[:rank]) if isinstance(found, Components) else found
        device = next(module.parameters()).device
        return A_RM.T.to(device).contiguous(), B_RN.to(device).clone()

    def _components(self, name: str, module: Weight, read: Callable[[Path], T]) -> Components | T:
        """All components where they are made now, else what `read` reads of them; with the note of then."""

        def noting(path: Path) -> T:
            with safe_open(path, framework="pt") as tensors:
                if note := (tensors.metadata() or {}).get(SAFER):
                    self.notes[name] = note
            return read(path)

        return self.cache.get(
            "components", self.key(name), noting, _write_components, lambda: self.decomposed(name, module)
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which weight a refusal is."""
    try:
        yield
    except Refused as error:
        raise Refused(
            f"{name}: {error} Give another copy of the model, or model.dtype=float32 where float16 overflows."
        ) from error


def _without_rounding(components: Components, module: Weight) -> Components:
    """A product of factors has no rank beyond theirs; what is there is rounding."""
    if isinstance(module, LowRankLinear):
        components.spectrum.sigma_K[module.rank :] = 0
    return components


def dense_weight(module: Weight) -> Tensor:
    """W_MN, multiplied out where it is factored."""
    return module.weight.detach() if isinstance(module, nn.Linear) else module.merged().weight.detach()


def _values_alone(name: str, module: Weight) -> Spectrum:
    with _named(name):
        sigma_K = singular_values(dense_weight(module))
    if isinstance(module, LowRankLinear):
        sigma_K[module.rank :] = 0
    return Spectrum((module.out_features, module.in_features), sigma_K)


def _write_spectrum(spectrum: Spectrum, path: Path) -> None:
    save_file(_tensors(spectrum), path)


def _tensors(spectrum: Spectrum) -> dict[str, Tensor]:
    found = {"sigma_K": spectrum.sigma_K, "fisher_K": spectrum.fisher_K, "slope_K": spectrum.slope_K}
    return {"shape": torch.tensor(spectrum.shape)} | {k: v.contiguous() for k, v in found.items() if v is not None}


def _read_spectrum(path: Path) -> Spectrum:
    with safe_open(path, framework="pt") as tensors:
        there = set(tensors.keys())
        found = {k: tensors.get_tensor(k) for k in ("sigma_K", "fisher_K", "slope_K") if k in there}
        return Spectrum(tuple(tensors.get_tensor("shape").tolist()), **found)


def _write_components(components: Components, path: Path) -> None:
    factors = {"A_KM": components.A_KM.cpu(), "B_KN": components.B_KN.cpu()}
    note = None if components.safer is None else {SAFER: components.safer}
    save_file(_tensors(components.spectrum) | factors, path, metadata=note)


def _read_factors(path: Path, rank: int) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_slice("A_KM")[:rank], tensors.get_slice("B_KN")[:rank]


def read_spectra(model: PreTrainedModel, coordinates: Coordinates, values: bool = False) -> dict[str, Spectrum]:
    """The spectrum of every compressible weight, from the cache where that weight has been decomposed before.

    With `values` also what each of its components is worth by itself.
    """
    weights = tqdm(components(model).items(), desc="spectra", unit="weight", leave=False)
    read = coordinates.valued if values else coordinates.spectrum
    return {name: read(name, module) for name, module in weights}


def save_spectra(spectra: dict[str, Spectrum], path: Path) -> None:
    """The singular values of every compressible weight under its name, descending, in float32: what figures draw."""
    with whole(path) as part:
        save_file({name: spectrum.sigma_K.float() for name, spectrum in spectra.items()}, part)


def predict(model: PreTrainedModel, plan: Plan, coordinates: Coordinates) -> float | None:
    """The loss increase in nats per token that K-FAC predicts for a plan, before anything is cut.

    In the coordinates of K-FAC that is half the energy of the dropped components. None without gradient statistics.
    """
    if not coordinates.has_gradients:
        return None
    total = 0.0
    for name, rank in tqdm(plan.factored.items(), desc="predict", unit="weight", leave=False):
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear) and module.rank == rank:
            continue
        if coordinates.svd.in_nats:
            total += 0.5 * float(coordinates.spectrum(name, module).sigma_K[rank:].square().sum())
        else:
            A_MR, B_RN = coordinates.factors(name, module, rank)
            dW_MN = dense_weight(module).float() - A_MR.float() @ B_RN.float()
            total += predicted_nats(dW_MN, coordinates.statistics.of(name, dW_MN.device))
    return total


def resolve(budget: Budget, model: PreTrainedModel) -> Budget:
    """A budget of bytes or FLOPs, shares of those of the dense model, as the `keep` that it comes to."""
    if budget.bytes is None and budget.flops is None:
        return budget
    weights = components(model)
    dense = sum(module.out_features * module.in_features for module in weights.values())
    held = [p for module in weights.values() for key, p in module.named_parameters() if key.endswith("weight")]
    stored = sum(parameter.numel() for parameter in held)
    if budget.flops is not None:
        unit, whole, asked = 2, flops_per_token(model), budget.flops
    else:
        unit, whole, asked = held[0].element_size(), count_bytes(model), budget.bytes
    fixed = whole - unit * stored  # embeddings, norms and biases, which nothing here compresses
    keep = (asked * (fixed + unit * dense) - fixed) / (unit * dense)
    if keep <= 0:
        least = fixed / (fixed + unit * dense)
        raise Refused(f"{budget} is out of reach: a share of {least:.3f} is never compressed. Write more than that.")
    return Budget(keep=min(keep, 1.0))


def evidence(
    model: PreTrainedModel, coordinates: Coordinates, windows_BL: Tensor | None, dtype: str | None
) -> Evidence:
    """What a rule may ask of the model beyond its spectra; nothing is computed until it does."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def loss(cut: dict[str, int]) -> float:
        """Nats per token of the model on the calibration text with only these weights cut at these ranks."""
        whole = {name: model.get_submodule(name) for name in cut}
        try:
            for name, rank in cut.items():
                A_MR, B_RN = coordinates.factors(name, whole[name], rank)
                replace(model, name, LowRankLinear.of(A_MR, B_RN, bias_of(whole[name])))
            return math.log(perplexity(model, windows_BL, dtype, "trial").perplexity)
        finally:
            for name, module in whole.items():
                replace(model, name, module)

    def cached_loss(cut: dict[str, int]) -> float:
        parts = [f"{coordinates.key(name)} {rank}" for name, rank in sorted(cut.items())]
        weights = (part for item in coordinates.weights.items() for part in item)
        windows = windows_BL.numpy().tobytes(), str(tuple(windows_BL.shape))
        key = digest(model.config.to_json_string(), *weights, *windows, str(dtype), *parts)
        read, write = (lambda path: float(path.read_text())), (lambda value, path: path.write_text(repr(value)))
        return coordinates.cache.get("trials", key, read, write, lambda: loss(cut))

    return Evidence(
        weight=lambda name: dense_weight(model.get_submodule(name)),
        moments=lambda name: coordinates.statistics.of(name, device),
        loss=cached_loss,
    )


def bias_of(module: Weight) -> nn.Parameter | None:
    return module.bias if isinstance(module, nn.Linear) else module.A.bias


def plan_ranks(
    ranks: Ranks,
    budget: Budget,
    model: PreTrainedModel,
    spectra: dict[str, Spectrum],
    evidence: Evidence | None = None,
) -> Plan:
    """The plan for a model, in which a weight that is factored already gets back none of the ranks that it has lost.

    Those count as removed: err and keep are always shares of the dense shapes. err=0 keeps such a model as it is.
    """
    held = factored_ranks(model)
    if not held:
        return ranks.plan(spectra, budget, evidence)
    now = tally({name: held.get(name) for name in spectra}, spectra)
    if (budget.err and budget.err < now.err - 0.01) or (budget.keep and now.keep + 0.01 < budget.keep < 1):
        raise Refused(
            f"{budget} is less than this model has lost: {len(held)} of its weights are factored already, which comes "
            f"to err={now.err:.3f} and keep={now.keep:.3f}. Ask for more, or write err=0 to leave it as it is."
        )
    plan = ranks.plan(spectra, budget, evidence)
    capped = {
        name: min((r for r in (rank, held.get(name)) if r is not None), default=None)
        for name, rank in plan.ranks.items()
    }
    kept = tally(capped, spectra, threshold=plan.threshold)
    return changed(kept, err_attempted=max(kept.err, plan.err_attempted))


def factorize(model: PreTrainedModel, plan: Plan, coordinates: Coordinates) -> None:
    """Put two factors in the place of every weight that the plan cuts, one weight at a time."""
    for name, rank in tqdm(plan.factored.items(), desc="factorize", unit="weight", leave=False):
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear) and module.rank == rank:
            continue
        replace(model, name, LowRankLinear.of(*coordinates.factors(name, module, rank), bias_of(module)))
