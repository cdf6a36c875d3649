"""A model, compressed in place: spectra of its weights, and factors where a plan says so; both cached by content."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from welore.cache import Cache, digest
from welore.errors import Refused
from welore.lowrank import LowRankLinear, replace
from welore.models import components
from welore.ranks import Plan
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
            sigma_K = cache.get(
                "spectra",
                weights[f"{name}.weight"],
                torch.load,
                torch.save,
                lambda W=module.weight: singular_values(W),
            )
        except Refused as error:
            raise Refused(f"{name}: {error}") from error
        spectra[name] = Spectrum(tuple(module.weight.shape), sigma_K)
    return spectra


def save_spectra(spectra: dict[str, Spectrum], path: Path) -> None:
    """The singular values of every compressible weight under its name, descending, in float32: what figures draw."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: spectrum.sigma_K.float() for name, spectrum in spectra.items()}, part)
    part.replace(path)


def factorize(model: PreTrainedModel, plan: Plan, weights: dict[str, str], cache: Cache) -> None:
    """Put two factors in the place of every weight that the plan cuts, one weight at a time."""

    def read(path: Path) -> Basis:
        return Basis(**torch.load(path))

    def write(vectors: Basis, path: Path) -> None:
        torch.save({"sigma_K": vectors.sigma_K.cpu(), "vectors_KK": vectors.vectors_KK.cpu()}, path)

    for name, rank in tqdm(plan.factored.items(), desc="factorize", unit="weight", leave=False):
        dense = model.get_submodule(name)
        vectors = cache.get("bases", weights[f"{name}.weight"], read, write, lambda W=dense.weight: basis(W))
        A_MR, B_RN = factors(dense.weight, vectors, rank)
        replace(model, name, LowRankLinear.of(A_MR, B_RN, dense.bias))
