"""A model, compressed in place: spectra of its weights, and factors where a plan says so; both cached by content."""

from dataclasses import replace as changed
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from welore.cache import Cache, digest
from welore.errors import Refused
from welore.lowrank import LowRankLinear, factored_ranks, replace
from welore.models import components
from welore.ranks import Budget, Plan, Ranks, tally
from welore.svd import Basis, Spectrum, basis, factors, singular_values


def weight_digests(model: PreTrainedModel) -> dict[str, str]:
    """The content of every parameter, hashed: the keys of all that is computed from weights."""
    return {
        name: digest(
            f"{tuple(p.shape)} {p.dtype}", memoryview(p.detach().contiguous().view(torch.uint8).numpy()).cast("B")
        )
        for name, p in model.named_parameters()
    }


def read_spectra(model: PreTrainedModel, weights: dict[str, str], cache: Cache) -> dict[str, Spectrum]:
    """The spectrum of every compressible weight, from the cache where that weight has been decomposed before."""
    spectra = {}
    for name, module in tqdm(components(model).items(), desc="spectra", unit="weight", leave=False):
        try:
            key = _content(name, weights)
            sigma_K = cache.get("spectra", key, torch.load, torch.save, lambda m=module: _singular_values(m))
        except Refused as error:
            raise Refused(
                f"{name}: {error} Give another copy of the model, or model.dtype=float32 where float16 overflows."
            ) from error
        spectra[name] = Spectrum((module.out_features, module.in_features), sigma_K)
    return spectra


def _content(name: str, weights: dict[str, str]) -> str:
    """The key of a weight, or of the two factors of one that is factored already."""
    dense = weights.get(f"{name}.weight")
    return dense or digest(weights[f"{name}.A.weight"], weights[f"{name}.B.weight"])


def _singular_values(module: nn.Linear | LowRankLinear) -> Tensor:
    if isinstance(module, nn.Linear):
        return singular_values(module.weight)
    sigma_K = singular_values(module.A.weight.float() @ module.B.weight.float())
    sigma_K[module.rank :] = 0  # a product of factors has no further rank; what is there is rounding
    return sigma_K


def save_spectra(spectra: dict[str, Spectrum], path: Path) -> None:
    """The singular values of every compressible weight under its name, descending, in float32: what figures draw."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: spectrum.sigma_K.float() for name, spectrum in spectra.items()}, part)
    part.replace(path)


def plan_ranks(ranks: Ranks, budget: Budget, model: PreTrainedModel, spectra: dict[str, Spectrum]) -> Plan:
    """The plan for a model, in which a weight that is factored already gets back none of the ranks that it has lost.

    Those count as removed: err and keep are always shares of the dense shapes. err=0 keeps such a model as it is.
    """
    held = factored_ranks(model)
    if not held:
        return ranks.plan(spectra, budget)
    now = tally({name: held.get(name) for name in spectra}, spectra)
    if (budget.err and budget.err < now.err - 0.01) or (budget.keep and now.keep + 0.01 < budget.keep < 1):
        raise Refused(
            f"{budget} is less than this model has lost: {len(held)} of its weights are factored already, which comes "
            f"to err={now.err:.3f} and keep={now.keep:.3f}. Ask for more, or write err=0 to leave it as it is."
        )
    plan = ranks.plan(spectra, budget)
    capped = {
        name: min((r for r in (rank, held.get(name)) if r is not None), default=None)
        for name, rank in plan.ranks.items()
    }
    kept = tally(capped, spectra, threshold=plan.threshold)
    return changed(kept, err_attempted=max(kept.err, plan.err_attempted))


def factorize(model: PreTrainedModel, plan: Plan, weights: dict[str, str], cache: Cache) -> None:
    """Put two factors in the place of every weight that the plan cuts, one weight at a time."""

    def read(path: Path) -> Basis:
        return Basis(**torch.load(path))

    def write(vectors: Basis, path: Path) -> None:
        torch.save({"sigma_K": vectors.sigma_K.cpu(), "vectors_KK": vectors.vectors_KK.cpu()}, path)

    for name, rank in tqdm(plan.factored.items(), desc="factorize", unit="weight", leave=False):
        dense = model.get_submodule(name)
        if isinstance(dense, LowRankLinear):
            if dense.rank == rank:
                continue
            dense = dense.merged()
        vectors = cache.get("bases", _content(name, weights), read, write, lambda W=dense.weight: basis(W))
        A_MR, B_RN = factors(dense.weight, vectors, rank)
        replace(model, name, LowRankLinear.of(A_MR, B_RN, dense.bias))
