"""Lightning's Trainer: fit, checkpoint, resume."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils.checkpoint import checkpoint as run_again
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from welore import processes
from welore.batches import Batches
from welore.cache import half
from welore.errors import Interrupted
from welore.history import History
from welore.measure import Throughput
from welore.models import decoder_layers
from welore.module import Tuner
from welore.report import announce
from welore.stream import Stream
from welore.trainer import CHECKPOINTS, REQUEUE, Trainer


def fit(
    trainer: Trainer,
    tuner: Tuner,
    batches: Batches | Stream,
    validation: DataLoader,
    folder: Path,
    autocast: str | None,
    loggers: list[Logger],
    throughput: Throughput,
    watching: Sequence[Callback] = (),
) -> None:
    """Train to the end, from the last checkpoint in `folder` where there is one. Raises Interrupted on a signal.

    What is `watching` sees each step before the checkpoint of that step is written.
    """
    last = folder / CHECKPOINTS / "last.ckpt"
    done = processes.told(_steps_done(last))
    checkpoint = str(last) if done else None
    if done:
        announce(f"go on after step {done} of {batches.steps}")
    first = processes.index() == 0
    bars = trainer.progress and first
    if first:
        loggers = [History(folder), *loggers]
        loggers[0].start_at(done)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # stdout is for the table alone
        warnings.simplefilter("ignore")  # hints about workers, srun and services that do not concern this run
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        training = batches.training
        checkpoints = Whole()
        saves = Saves(last, checkpoints, trainer.checkpoint_minutes)
        runner = LightningTrainer(
            accelerator="gpu" if trainer.place().type == "cuda" else "cpu",
            **trainer.spread(),
            precision={None: "32-true", "bfloat16": "bf16-mixed"}[autocast],
            max_epochs=1,
            max_steps=batches.steps,
            accumulate_grad_batches=training.accumulate,
            val_check_interval=min(training.validate_every * training.accumulate, len(batches)),
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=loggers,
            callbacks=[throughput, *watching, ValidatesLast(), saves, *_bar(bars)],
            plugins=[checkpoints, *_slurm_plugins()],
            enable_checkpointing=False,
            enable_progress_bar=bars,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            with recomputed(tuner.model, trainer.recompute):
                runner.fit(tuner, batches, validation, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
            runner.save_checkpoint(last)  # what comes after training may fail, and must not cost it
            checkpoints.write()
            saves.after_training(runner, tuner)
        finally:
            checkpoints.discard()


SIGNALS = (signal.SIGINT, signal.SIGTERM, REQUEUE)  # the last one wins: Slurm sends SIGTERM after it


@contextmanager
def recomputed(model: PreTrainedModel, on: bool = True) -> Iterator[None]:
    """Keep only the input of every decoder layer; the backward pass runs the layer again, to the same numbers."""
    layers = list(decoder_layers(model).values()) if on else []
    for layer in layers:
        layer.forward = partial(run_again, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the one of the class shows again


class ValidatesLast(Callback):
    """Validation after the last step too, which Lightning does only where that is a multiple of its interval."""

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if index + 1 == trainer.num_training_batches:
            trainer.val_check_batch = trainer.num_training_batches


class Saves(Callback):
    """A checkpoint after the optimizer step in which `minutes` have passed since the last one; and on SIGTERM, Ctrl-C
    or the signal that a job is to be requeued, after which it raises Interrupted.

    Inside a step nothing may be saved: half of its gradients, or half of its updated weights, would be lost. A second
    Ctrl-C stops at once, and the run goes on from the last regular checkpoint.

    A checkpoint is written once its step and the validation after it are in the history: Lightning calls before both,
    and a run that ended in between would go on without these lines. On a signal it does not wait for the validation,
    which may take longer than the signal leaves.
    """

    def __init__(self, checkpoint: Path, checkpoints: "Whole", minutes: float):
        self.checkpoint, self.checkpoints, self.minutes = checkpoint, checkpoints, minutes
        self.signal: int | None = None  # that came to this process
        self.stopped_by: int | None = None  # that came to any, and that all have heard of
        self.last = time.monotonic()
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer, module) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal != REQUEUE:
            self.signal = number

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if (index + 1) % trainer.accumulate_grad_batches == 0 and self._due(trainer, module):
            trainer.save_checkpoint(self.checkpoint)
            self.last = time.monotonic()

    def _due(self, trainer, module) -> bool:
        """Whether any process wants a checkpoint: they save after the same step, and stop for the same reason."""
        own = 1 if time.monotonic() - self.last >= 60 * self.minutes else 0
        if self.signal is not None:
            own = SIGNALS.index(self.signal) + 2
        most = int(trainer.strategy.reduce(torch.tensor(own, device=module.device), reduce_op="max"))
        if most > 1:
            self.stopped_by = SIGNALS[most - 2]
        return most > 0

    def on_validation_start(self, trainer, module) -> None:
        if self.stopped_by is not None:
            self.checkpoints.write()

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.checkpoints.write()
        self._leave(trainer, module)

    def after_training(self, trainer, module) -> None:
        """Once the last checkpoint is written: a signal that came in the last step, or in the validation after it, is
        meant for what comes now."""
        self._due(trainer, module)
        self._leave(trainer, module)

    def _leave(self, trainer, module) -> None:
        if self.stopped_by is None:
            return
        trainer.strategy.barrier()  # Slurm may end the one that writes as soon as another has left
        stopped = f"stopped by a signal after step {trainer.global_step} of {module.steps}"
        announce(stopped)
        raise Interrupted(
            f"{stopped}; the same command goes on from there, unless it says force=true", self.stopped_by
        )

    def on_train_end(self, trainer, module) -> None:
        self._restore()

    def on_exception(self, trainer, module, exception) -> None:
        self._restore()

    def _restore(self) -> None:
        # Before Lightning restores its own: its handler would else stay, and with it the model, for good.
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class Whole(TorchCheckpointIO):
    """Checkpoints that appear on `write`, whole or not at all: a kill or a full disk leaves the one before.

    Until then one lies beside it. Lightning's own would be put together in memory, where it counts as memory of
    training, and be moved from the folder for temporary files, which copies it where that is another disk.
    """

    def __init__(self) -> None:
        self.waiting: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        self.waiting = Path(path)
        self.waiting.parent.mkdir(parents=True, exist_ok=True)
        try:
            with half(self.waiting).open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides why a file cannot be written
            raise (error.__context__ or error) from None

    def write(self) -> None:
        if self.waiting:
            half(self.waiting).replace(self.waiting)
            self.waiting = None

    def discard(self) -> None:
        if self.waiting:
            half(self.waiting).unlink(missing_ok=True)
            self.waiting = None


class Bars(TQDMProgressBar):
    """Lightning's bars, ended where training ends early, or they would be drawn once more below the message."""

    drawn = False

    def on_train_start(self, *args) -> None:
        super().on_train_start(*args)
        self.drawn = True

    def on_exception(self, *args) -> None:
        if self.drawn:
            self.train_progress_bar.close()


def _bar(progress: bool) -> list[TQDMProgressBar]:
    return [Bars(refresh_rate=1)] if progress else []


def _steps_done(checkpoint: Path) -> int:
    """The optimizer steps in a checkpoint; 0 where there is none or it was cut short."""
    try:
        return int(torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["global_step"])
    except FileNotFoundError:
        return 0
    except Exception as error:  # whatever a truncated file makes its reader raise
        print(f"{checkpoint} is damaged ({type(error).__name__}); training starts again", file=sys.stderr)
        return 0


def _slurm_plugins() -> list:
    """Inside submitit the launcher owns the requeue signal: two owners would requeue twice."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]
