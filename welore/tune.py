"""Steps 8 and 9 of a run: train what the mode selects, and say what it took."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from welore import metrics, processes
from welore.cache import Cache
from welore.config import Config
from welore.evaluate import frozen_weights_in
from welore.measure import GIB, Throughput, give_back, peak_memory
from welore.models import components, count_parameters
from welore.modes import Mode, norm_parameters, select
from welore.optim import state_bytes
from welore.prune import count_zeros
from welore.report import announce
from welore.rounds import sparsity
from welore.sparse import KeptZeros


def tune(
    model, tokenizer, config: Config, folder: Path, cache: Cache, loggers: list, weights: dict[str, str]
) -> dict[str, Any]:
    """Train what the mode selects, and say how much that was and what it took. `weights` are the digests of the model.

    They count in the first process alone.
    """
    from welore.fit import fit  # Lightning takes seconds to import, and a run without training does not need it
    from welore.module import Tuner, base_digest, known_digests
    from welore.snapshots import Snapshots

    training = config.task.training
    batches = training.batches(config.task, tokenizer, cache, config.seed)
    held_out = config.task.rows(tokenizer, cache, config.seed, "validation", training.validation_windows)
    validation = DataLoader([held_out.batch(torch.tensor([row])) for row in range(len(held_out))], batch_size=None)

    torch.manual_seed(config.seed)  # adapters start the same whatever was drawn before
    pruned = config.prune.matrices(components(model)).values()
    zeros = KeptZeros([linear.weight for linear in pruned])
    known = known_digests(model, weights)
    parameters = select(model, config.mode)
    besides = training.unfreeze(model)
    first = processes.index() == 0
    base = processes.told(base_digest(model, (*parameters, *besides), known) if first else None)
    del known
    norms = {id(p) for p in norm_parameters(model)}
    trained = sum(p.numel() for p in (*parameters, *besides))
    announce(f"train {trained:,} of {count_parameters(model):,} parameters for {batches.steps} steps")
    _say_if_fixed(config.mode, batches.steps)
    throughput = Throughput(training.accumulate)
    after = training.snapshots(batches.steps)
    snapshots = [Snapshots(model, tokenizer, config.mode, after, folder)] if after else []
    watching = snapshots if first else []
    device = next(model.parameters()).device
    give_back(device)  # of what compression freed
    started = time.perf_counter()
    with peak_memory(device) as peak, config.trainer.share(model) as twin:
        trainables = parameters if twin is model else config.mode.trainables(twin)
        tuner = Tuner(twin, config.mode, trainables, training, batches.steps, zeros, besides, base)
        autocast = config.model.autocast
        with frozen_weights_in(twin, None if config.trainer.shards else autocast):  # a weight that is cast is whole
            fit(config.trainer, tuner, batches, validation, folder, autocast, loggers, throughput, watching)
        memory = peak.metrics(metrics.FIT_PEAK_GIB, metrics.FIT_RESERVED_GIB)
    # Of what trained in the last step: where a mode takes turns, the rest has none.
    gradients = torch.float32.itemsize * sum(p.numel() for p in (*parameters, *besides) if p.requires_grad)
    optimizer = tuner.optimizers(use_pl_optimizer=False)
    kept = state_bytes(optimizer)
    optimizer.release()  # gradients are no part of the model that is measured now
    model.to(device).eval().requires_grad_(False)
    config.mode.finish(model)
    zeros.apply()  # adapters that were merged into a pruned weight had filled them
    zeroed = sparsity(count_zeros(config.prune, components(model)), "tuned") if config.prune.prunes else {}
    return (
        zeroed
        | throughput.metrics()
        | memory
        | {
            metrics.FIT_FLOPS_PER_TOKEN.key: tuner.flops_per_token,
            metrics.FIT_STATE_GIB.key: (gradients + kept) / GIB,
            metrics.FIT_OPTIMIZER_GIB.key: kept / GIB,
            metrics.TRAINABLE_PARAMETERS.key: trained,
            metrics.TRAINABLE_NORMS.key: sum(p.numel() for p in parameters if id(p) in norms),
            metrics.FIT_TOKENS.key: tuner.tokens_seen,
            metrics.FIT_STEPS.key: batches.steps,
            metrics.FIT_EPOCHS.key: batches.epochs,
            metrics.FIT_SECONDS.key: time.perf_counter() - started,
        }
    )


def _say_if_fixed(mode: Mode, steps: int) -> None:
    """GaLore and its like with fewer steps than a projection lasts are another method: one subspace for the run."""
    gap = getattr(mode, "gap", None)
    if gap is not None and gap >= steps:
        announce(
            f"mode.gap={gap}: what the first step draws stays for all {steps} steps. Write mode.gap="
            f"{max(1, steps // 4)} to renew it"
        )
