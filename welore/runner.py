"""The story of one run: load, spectra, ranks, factorize, select, fit, evaluate, record."""

import gc
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from welore import checkpoint, metrics, processes
from welore.alone import alone_in
from welore.cache import Cache, digest, discard_halves
from welore.compress import weight_digests
from welore.config import Config, fingerprint
from welore.errors import Interrupted, Refused
from welore.evaluate import Benchmark
from welore.loggers import told
from welore.lowrank import FAST
from welore.measure import peak_memory
from welore.models import DTYPES, count_bytes, count_parameters, flops_per_token
from welore.provenance import commit, environment
from welore.ranks import Plan
from welore.records import Record, bring_back, discard_aside, set_aside
from welore.report import announce
from welore.rounds import compress
from welore.stage import measure, measure_once, noted
from welore.trainer import CHECKPOINTS, REQUEUE, discard_checkpoints
from welore.tune import tune

if TYPE_CHECKING:  # importing Lightning takes seconds, and a finished run should not
    from lightning.pytorch.loggers import Logger

MODEL = "model"
LEAVE = 60  # seconds
STOPPED = (Interrupted, KeyboardInterrupt, SystemExit)  # from outside: the same command goes on; submitit exits


def run(config: Config, folder: Path) -> Record:
    """The record of this config: read from `folder` where it is done, made and written there where it is not.

    Where another process is at it, this one waits, and then reads what the other has made or goes on from where it
    was killed. Where several train it together, the first does all but their share of the training. A run that fails
    leaves a record of status `failed` with all that it had measured. A finished run that is forced again is set aside
    until the new one is done, and comes back whole if that fails.
    """
    if config.mode.trains:
        config.trainer.spread()  # which refuses, before hours of compression, what does not fit the processes
    try:
        with processes.joined():
            if processes.index() == 0:
                return processes.told(_first(config, folder))
            while not isinstance(found := processes.told(), Record):
                _help(config, folder, found)
            return found
    except Interrupted as stopped:
        if stopped.signal == REQUEUE:
            _requeue()
        raise


def _requeue() -> None:
    """Let submitit, whose job this may be, put it into the queue again, now that all is written and closed."""
    handler = signal.getsignal(REQUEUE)
    if callable(handler):
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()  # Slurm ends its service with the job, and the exit of this process would miss it
        logging.raiseExceptions = False  # the signals of the requeue come while submitit is logging the one before
        handler(REQUEUE, None)  # it exits, or raises where the job was requeued too often
        time.sleep(LEAVE)  # in all processes but the first, which Slurm ends when it requeues the job


def _first(config: Config, folder: Path) -> Record:
    if not config.force and not config.probe.examines and (finished := _finished(folder)):
        _check_identity(finished, config, folder)
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        if finished := _finished(folder):
            if not config.force:
                _check_identity(finished, config, folder)
                _examine(config, folder, finished)
                return finished
            set_aside(folder)
        elif config.force and not _requeued():
            discard_checkpoints(folder)  # also those of a run that failed: it starts again
        return _made(config, folder)


def _finished(folder: Path) -> Record | None:
    record = Record.read(folder)
    return record if record is not None and record.status == "done" else None


def _check_identity(record: Record, config: Config, folder: Path) -> None:
    if record.fingerprint != fingerprint(config):
        raise Refused(
            f"{folder} holds the record of the run {record.fingerprint}, and this is {fingerprint(config)}: it was "
            f"copied there, or edited. Move it away, or write force=true."
        )


def _requeued() -> bool:
    """Whether Slurm has started this job before: it goes on, also where it was forced to start again then."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _made(config: Config, folder: Path) -> Record:
    gc.collect()  # the model of a sweep's cell before is held by cycles, and would count as memory of this one
    started = time.perf_counter()  # for the clock of a machine may be set while it works
    record = Record(
        fingerprint(config),
        "failed",
        asdict(config),
        commit=commit(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    for place in (folder, Path(config.outputs) / ".cache"):
        discard_halves(place)
    try:
        _story(config, folder, record)
        record.status, record.seconds = "done", time.perf_counter() - started
        record.save(folder)
    except BaseException as error:
        record.status, record.seconds = "failed", time.perf_counter() - started
        record.error = told(error)
        if not isinstance(error, Refused):
            record.error += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
        if isinstance(error, STOPPED) or not bring_back(folder):
            record.save(folder)
        raise
    discard_checkpoints(folder)
    discard_aside(folder)
    _examine(config, folder, record)
    return record


def _examine(config: Config, folder: Path, record: Record) -> None:
    """Add what the probe finds to a finished run, here and in W&B. The run stays finished if the probe fails."""
    if config.probe.examines:
        from welore.emergence import examine

        examine(config, folder, lambda: _logged_again(config, folder, record))


@contextmanager
def _logged_again(config: Config, folder: Path, record: Record) -> Iterator[None]:
    """A finished run once more in W&B, for files that it is given now."""
    with _loggers(config, folder, record) as loggers:
        _log(record.metrics, loggers)
        yield


def _loggers(config: Config, folder: Path, record: Record) -> AbstractContextManager[list["Logger"]]:
    tags = [config.asked, *(getattr(config, group).name for group in ("model", "svd", "ranks", "mode", "task"))]
    return config.logger.open(folder, record, config.group, tags)


def _log(found: Mapping[str, Any], loggers: Iterable["Logger"]) -> None:
    for logger in loggers:
        logger.log_metrics({key: value for key, value in found.items() if isinstance(value, int | float)})


def _story(config: Config, folder: Path, record: Record) -> None:
    """Steps 3 to 10 of a run; what they measure goes into the record at once."""
    config.mode.check_machine()
    config.logger.prepare()
    torch.manual_seed(config.seed)
    device, cache = config.trainer.place(), Cache(Path(config.outputs) / ".cache")
    announce(f"load {config.model.name}")
    model, tokenizer = config.model.load(cache.folder, config.task.training_texts)
    config.mode.check(model)
    benchmark = config.task.benchmark(tokenizer, cache, *config.judges)
    _check_positions(model, config, benchmark)
    weights = weight_digests(model)
    model.to(device)
    record.environment = environment(device) | {"protocol": benchmark.title, "weights": digest(*weights.values())}
    if config.mode.trains:
        # No science, but they decide speed and memory.
        record.environment["recompute"] = config.trainer.recompute
        if processes.count() > 1:
            record.environment["processes"] = f"{processes.count()} x {config.trainer.name}"
    with _loggers(config, folder, record) as loggers:
        plan, weights = _compressed(model, tokenizer, weights, benchmark, config, folder, cache, record)
        found = record.metrics
        _log(found, loggers)
        logged = dict(found)
        if config.mode.trains:
            config.mode.divide(plan.division)
            _call(model, tokenizer, folder, plan.division)
            found |= config.task.chance(tokenizer, cache, config.seed)
            found |= tune(model, tokenizer, config, folder, cache, loggers, weights)
            found |= noted(measure(model, benchmark, config, "tuned"), folder, "tuned")
            found[metrics.TUNED_PARAMETERS.key] = count_parameters(model)
        if config.save:
            checkpoint.save(model, tokenizer, folder / MODEL)
        _log({key: value for key, value in found.items() if logged.get(key) != value}, loggers)


def _compressed(
    model: PreTrainedModel,
    tokenizer: Any,
    weights: dict[str, str],
    benchmark: Benchmark,
    config: Config,
    folder: Path,
    cache: Cache,
    record: Record,
) -> tuple[Plan, dict[str, str]]:
    """Measure the model, compress it in place and measure it again. `weights` are the digests of its parameters; those
    of the compressed model come back with the plan."""
    device, found = next(model.parameters()).device, record.metrics
    found |= {metrics.DENSE_PARAMETERS.key: count_parameters(model), metrics.DENSE_BYTES.key: count_bytes(model)}
    found |= noted(measure_once(model, weights, benchmark, config, cache, "dense"), folder, "dense")
    found[metrics.DENSE_EVAL_TOKENS_PER_SECOND.key] = found.get(metrics.EVAL_TOKENS_PER_SECOND.key)

    started = time.perf_counter()
    with peak_memory(device) as peak:
        plan = compress(model, tokenizer, weights, config, folder, cache, record)
        found |= {metrics.COMPRESS_PEAK_GIB.key: peak.gib, metrics.COMPRESS_SECONDS.key: time.perf_counter() - started}
    found |= _compression(model, plan)
    _say_if_slow(plan, config, device)
    weights = weight_digests(model)
    found |= noted(measure_once(model, weights, benchmark, config, cache, "compressed"), folder, "compressed")
    found[metrics.NATS.key] = _damage(found)
    return plan, weights


def _say_if_slow(plan: Plan, config: Config, device: torch.device) -> None:
    """Ranks that a GPU multiplies slowly in half precision, where a row of a factor is no multiple of 16 bytes."""
    odd = sum(rank % FAST > 0 for rank in plan.factored.values())
    if device.type == "cuda" and odd and "float32" not in (config.model.autocast or config.model.dtype):
        instead = f"Write ranks.multiple={FAST}; for" if hasattr(config.ranks, "multiple") else "For"
        announce(
            f"{odd} of {len(plan.factored)} ranks are no multiples of {FAST}, and may cost a GPU more than twice the "
            f"time. {instead} a model that is only used there is welore.fuse"
        )


def _call(model: PreTrainedModel, tokenizer: Any, folder: Path, division: Mapping[str, int]) -> None:
    """Let the other processes train this compressed model too: they read it, and take part in `tune`."""
    if processes.count() > 1:
        checkpoint.save(model, tokenizer, folder / CHECKPOINTS / MODEL)
        processes.told(division)


def _help(config: Config, folder: Path, division: Mapping[str, int]) -> None:
    """What a process does that was called: its share of the training, and no more."""
    dtype, trust = DTYPES[config.model.dtype], config.model.runs_code
    model, tokenizer = checkpoint.load(folder / CHECKPOINTS / MODEL, dtype, trust)
    config.mode.divide(division)
    cache = Cache(Path(config.outputs) / ".cache")
    tune(model.to(config.trainer.place()), tokenizer, config, folder, cache, [], {})


def _compression(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    return {
        metrics.ERR.key: plan.err,
        metrics.ERR_ATTEMPTED.key: plan.err_attempted,
        metrics.KEEP.key: plan.keep,
        metrics.THRESHOLD.key: plan.threshold,
        metrics.LRC.key: len(plan.factored),
        metrics.N_LRC.key: len(plan.ranks) - len(plan.factored),
        metrics.PARAMETERS.key: count_parameters(model),
        metrics.BYTES.key: count_bytes(model),
        metrics.FLOPS_PER_TOKEN.key: flops_per_token(model),
    }


def _damage(found: dict[str, Any]) -> float | None:
    """What compression has cost in nats per token: the logarithm of the ratio of perplexities."""
    dense, compressed = (found.get(m.key, 0) for m in (metrics.DENSE_PERPLEXITY, metrics.COMPRESSED_PERPLEXITY))
    return math.log(compressed / dense) if 0 < dense < math.inf and 0 < compressed < math.inf else None


def _check_positions(model: PreTrainedModel, config: Config, benchmark: Benchmark) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = {benchmark.longest_key: benchmark.longest} if benchmark.longest is not None else {}
    if config.mode.trains:
        lengths["task.training.length"] = config.task.training.length
    if config.probe.examines:
        lengths["probe.length"] = config.probe.length
    if config.needs:
        lengths["calibration.window"] = config.calibration.window
    for key, length in lengths.items():
        if limit is not None and length > limit:
            raise Refused(
                f"{key}={length} is longer than the {limit} positions of {config.model.name}. Write {limit} or less."
            )
