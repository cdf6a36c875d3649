"""Lightning's Trainer on one device: fit, checkpoint, resume."""

import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from welore.batches import Batches
from welore.errors import Interrupted
from welore.history import History
from welore.measure import Throughput
from welore.module import Tuner
from welore.trainer import Trainer

CHECKPOINTS = "checkpoints"


def fit(
    trainer: Trainer,
    tuner: Tuner,
    batches: Batches,
    validation: DataLoader,
    folder: Path,
    autocast: str | None,
    loggers: list[Logger],
    throughput: Throughput,
) -> None:
    """Train to the end, from the last checkpoint in `folder` where there is one. Raises Interrupted on SIGTERM."""
    history = History(folder)
    last = folder / CHECKPOINTS / "last.ckpt"
    checkpoint = str(last) if last.exists() else None
    history.start_at(_steps_done(last) if checkpoint else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints about workers, srun and services that do not concern this run
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        training = batches.training
        runner = LightningTrainer(
            accelerator="gpu" if trainer.place().type == "cuda" else "cpu",
            devices=1,
            precision={None: "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[autocast],
            max_epochs=1,
            max_steps=batches.steps,
            accumulate_grad_batches=training.accumulate,
            val_check_interval=min(training.validate_every * training.accumulate, len(batches)),
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=[history, *loggers],
            callbacks=[throughput, _checkpoints(folder, trainer.checkpoint_every), *_bar(trainer.progress)],
            plugins=_slurm_plugins(),
            enable_progress_bar=trainer.progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        runner.fit(tuner, batches, validation, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    if runner.interrupted or runner.received_sigterm:
        raise Interrupted(f"stopped after step {runner.global_step} of {batches.steps}; the same command goes on")


def _checkpoints(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder / CHECKPOINTS,
        filename="step",
        every_n_train_steps=every,
        save_top_k=0,
        save_last=True,
        save_on_exception=True,
        enable_version_counter=False,
    )


def _bar(progress: bool) -> list[TQDMProgressBar]:
    return [TQDMProgressBar(refresh_rate=1)] if progress else []


def discard_checkpoints(folder: Path) -> None:
    """Drop what a finished run no longer needs, or what a forced one must not continue from."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _steps_done(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["global_step"])


def _slurm_plugins() -> list:
    """Inside submitit the launcher owns the requeue signal: two owners would requeue twice."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]
