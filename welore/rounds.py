"""Steps 4 to 7 of a run: statistics, spectra, ranks, factors and zeros, in as many rounds as the calibration has.

Each round but the first takes its statistics from the model that the round before has compressed, and cuts the dense
weights anew: then the metric knows of the damage that the other weights take.
"""

import json
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore import metrics
from welore.batches import calibration_windows
from welore.cache import Cache, whole
from welore.calibrate import Statistics, gather
from welore.compress import (
    Coordinates,
    evidence,
    factorize,
    plan_ranks,
    predict,
    read_spectra,
    resolve,
    save_spectra,
    weight_digests,
)
from welore.config import Config
from welore.errors import Refused
from welore.lowrank import replace
from welore.models import components
from welore.moments import Needs
from welore.prune import prune_model
from welore.ranks import Plan
from welore.records import Record
from welore.report import announce
from welore.sequence import factorize_in_sequence
from welore.trainer import CHECKPOINTS


def compress(
    model: PreTrainedModel,
    tokenizer: Any,
    weights: dict[str, str],
    config: Config,
    folder: Path,
    cache: Cache,
    record: Record,
) -> Plan:
    """Compress the model in place as the config says; what is found on the way goes into the record.

    `weights` are the digests of the dense parameters.
    """
    windows_BL = calibration_windows(config.calibration, tokenizer, cache) if config.needs else None
    rounds = config.calibration.rounds if config.needs else 1
    safer: list[str] = []
    for number in range(rounds):
        statistics = None
        if config.needs:
            digests = weights if number == 0 else weight_digests(model)
            statistics = _statistics(model, digests, windows_BL, config, cache, record)
        if number > 0:
            bring_back_dense(model, folder / DENSE)
        coordinates = Coordinates(config.svd, weights, cache, statistics)
        plan = _plan(model, coordinates, windows_BL, config, folder)
        nats = predict(model, plan, coordinates)
        _announce(plan, config, nats)
        if number + 1 < rounds:
            keep_dense(model, plan, folder / DENSE)
        if config.svd.sequential == "none" and not config.refine.refines:
            factorize(model, plan, coordinates)
        else:
            autocast, refine = config.model.autocast, config.refine
            layers = Cache(folder / CHECKPOINTS / f"round{number}")
            refined = factorize_in_sequence(model, plan, coordinates, windows_BL, autocast, refine, layers)
            if refined:
                # Each layer is off from the dense stream, so the last one holds what is left of all before it.
                record.metrics |= dict(
                    zip((metrics.REFINED_FROM.key, metrics.REFINED_TO.key), refined[-1], strict=True)
                )
        safer += [f"{name}: {note}" for name, note in coordinates.notes.items()]
    if config.prune.prunes:
        pruned = prune_model(config.prune, components(model), lambda name: statistics.of(name, model.device))
        record.metrics |= sparsity(pruned, "compress")
        safer += pruned["notes"]
    record.metrics[metrics.PREDICTED_NATS.key] = nats
    record.environment["safer"] = safer
    for note in safer:
        announce(note)
    return plan


DENSE = "dense.safetensors"  # the weights that a round has cut, until the next one needs them


def keep_dense(model: PreTrainedModel, plan: Plan, path: Path) -> None:
    """Put the weights that a plan cuts on disk, so that there is never a second model in memory."""
    already = [name for name in plan.factored if not isinstance(model.get_submodule(name), nn.Linear)]
    if already:
        raise Refused(
            f"calibration.rounds above 1 cut the dense weights anew, and this model holds {len(already)} that are "
            f"factored already, such as {already[0]}. Write calibration.rounds=1."
        )
    save_file({name: model.get_submodule(name).weight.detach() for name in plan.factored}, path)


def bring_back_dense(model: PreTrainedModel, path: Path) -> None:
    """Undo what `factorize` did to the weights that `keep_dense` has kept."""
    with safe_open(path, framework="pt", device=str(model.device)) as tensors:
        for name in tensors.keys():  # noqa: SIM118, no mapping
            module = model.get_submodule(name)
            dense = nn.Linear(module.in_features, module.out_features, bias=module.A.bias is not None, device="meta")
            dense.weight = nn.Parameter(tensors.get_tensor(name), requires_grad=False)
            dense.bias = module.A.bias
            replace(model, name, dense)
    path.unlink()


def _statistics(
    model: PreTrainedModel, digests: dict[str, str], windows_BL: Tensor, config: Config, cache: Cache, record: Record
) -> Statistics:
    announce(f"calibrate on {windows_BL.numel()} tokens of {config.calibration.name}: {config.needs.name.lower()}")
    start = time.perf_counter()
    found = gather(model, digests, windows_BL, config.needs, config.calibration, config.model.autocast, cache)
    key = metrics.CALIBRATE_SECONDS.key
    record.metrics[key] = record.metrics.get(key, 0.0) + time.perf_counter() - start
    return found


def _plan(
    model: PreTrainedModel, coordinates: Coordinates, windows_BL: Tensor | None, config: Config, folder: Path
) -> Plan:
    """The plan of a round; the spectra that it was made from are left in the run folder, and its ranks."""
    chosen = coordinates.plain if config.ranks.coordinates == "plain" else coordinates
    spectra = read_spectra(model, chosen, config.ranks.needs >= Needs.GRADIENTS)
    save_spectra(spectra, folder / "spectra.safetensors")
    asked = evidence(model, coordinates, windows_BL, config.model.autocast)
    plan = plan_ranks(config.ranks, resolve(config.budget, model), model, spectra, asked)
    _refuse_empty(plan, config)
    with whole(folder / "ranks.json") as part:
        part.write_text(json.dumps(plan.ranks, indent=2))
    return plan


def _announce(plan: Plan, config: Config, nats: float | None) -> None:
    lrc = f"{len(plan.factored)} of {len(plan.ranks)} LRC"
    damage = "" if nats is None else f", predicted damage {nats:.4f} nats"
    announce(f"asked {config.asked}: err {plan.err:.4f}, keep {plan.keep:.4f}, {lrc}{damage}")
    asked, got = (config.keep, plan.keep) if config.err is None else (config.err, plan.err)
    if plan.lrc is None and asked is not None and abs(asked - got) > 0.01:
        announce(
            f"this is {abs(asked - got):.3f} off: ranks.dense={getattr(config.ranks, 'dense', None)} allows no nearer"
        )
    value = getattr(config.ranks, "value", None)
    if value == "energy" and not config.svd.in_nats:
        announce(
            "ranks.value=energy compares layers in nats with svd=kfac alone; write ranks.value=fisher or relative"
        )


def sparsity(counts: dict[str, Any], stage: str) -> dict[str, Any]:
    """The counts of zeros that a record keeps."""
    return {f"{stage}/{key}": counts[key] for key in ("sparsity", "n_lrc_sparsity", "zeros")}


def _refuse_empty(plan: Plan, config: Config) -> None:
    shares = (1 - (config.err or 0), config.keep, config.bytes, config.flops)
    if config.ranks.cuts and not plan.factored and min(share for share in shares if share is not None) < 1:
        raise Refused(
            f"{config.asked} with ranks={config.ranks.name} and ranks.dense={config.ranks.dense} leaves every weight "
            f"dense. Ask for a smaller model, or write ranks.dense=never."
        )
